/* t_tokenizer.c: the tokenizer beside parity: streaming, long words, files that are not what they should be. */
#include "formats/tokenizer.h"
#include "tokenizer_corpus.h"
#include <time.h>

static struct us_tokenizer *tokenizer;

static void setup(void) {
  struct us_err err = {0};
  json_t *root = corpus_fixture("4k.json");
  char *json = json_dumps(root, JSON_COMPACT);
  corpus_ok(us_tokenizer_parse(json, strlen(json), "4k.json", &tokenizer, &err), &err);
  json_decref(root);
  free(json);
}

static void teardown(void) {
  us_tokenizer_free(tokenizer);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

START_TEST(a_stream_gives_the_decoded_bytes_and_ends_every_write_at_a_character) {
  struct us_err err = {0};
  uint64_t state = us_test_seed();
  for (int round = 0; round < 200; round++) {
    struct us_buffer whole = {0}, streamed = {0};
    struct us_token_stream stream = {0};
    int32_t ids[64];
    for (int i = 0; i < 64; i++) ids[i] = (int32_t)corpus_below(&state, round % 2 ? 4096 : 300);
    corpus_ok(us_tokenizer_decode(tokenizer, ids, 64, false, &whole, &err), &err);
    for (int i = 0; i < 64; i++) {
      corpus_ok(us_tokenizer_stream(tokenizer, &stream, ids[i], false, &streamed, &err), &err);
      /* Nothing is held back without need, and nothing is written that a next byte could complete. */
      bool cut = false;
      if (stream.n_held > 0) {
        ck_assert_int_lt(us_utf8_length((const char *)stream.held, (size_t)stream.n_held, &cut), 0);
        ck_assert(cut);
      } else {
        for (size_t at = streamed.size > 3 ? streamed.size - 3 : 0; at < streamed.size; at++) {
          (void)us_utf8_length(streamed.data + at, streamed.size - at, &cut);
          ck_assert(!cut);
        }
      }
      ck_assert_int_le(stream.n_held, 3);
    }
    corpus_ok(us_tokenizer_stream_end(&stream, &streamed, &err), &err);
    ck_assert_uint_eq(streamed.size, whole.size);
    ck_assert_int_eq(memcmp(streamed.data, whole.data, whole.size), 0);
    us_buffer_release(&whole);
    us_buffer_release(&streamed);
  }
}
END_TEST

START_TEST(an_emoji_streams_only_once_it_is_whole) {
  struct us_err err = {0};
  struct us_buffer out = {0};
  struct us_token_stream stream = {0};
  const char *bytes = "\xf0\x9f\x98\x80";
  for (int i = 0; i < 4; i++) {
    struct us_buffer name = {0};
    corpus_ok(us_byte_level_spell(bytes + i, 1, &name, &err), &err);
    int32_t id = us_tokenizer_id(tokenizer, name.data);
    ck_assert_int_ge(id, 0);
    corpus_ok(us_tokenizer_stream(tokenizer, &stream, id, false, &out, &err), &err);
    ck_assert_uint_eq(out.size, i < 3 ? 0 : 4);
    us_buffer_release(&name);
  }
  ck_assert_int_eq(memcmp(out.data, bytes, 4), 0);
  us_buffer_release(&out);
}
END_TEST

START_TEST(special_tokens_are_known_and_can_be_skipped) {
  struct us_err err = {0};
  struct us_buffer out = {0};
  int32_t end = us_tokenizer_id(tokenizer, "<|im_end|>"), stops[3];
  ck_assert(us_tokenizer_is_special(tokenizer, end));
  ck_assert(!us_tokenizer_is_special(tokenizer, us_tokenizer_id(tokenizer, "a")));
  ck_assert_int_eq(us_tokenizer_stop_ids(tokenizer, stops), 2);
  ck_assert_int_eq(stops[0], end);
  int32_t ids[] = {us_tokenizer_id(tokenizer, "a"), end, us_tokenizer_id(tokenizer, "b")};
  corpus_ok(us_tokenizer_decode(tokenizer, ids, 3, true, &out, &err), &err);
  ck_assert_str_eq(out.data, "ab");
  us_buffer_clear(&out);
  corpus_ok(us_tokenizer_decode(tokenizer, ids, 3, false, &out, &err), &err);
  ck_assert_str_eq(out.data, "a<|im_end|>b");
  us_buffer_release(&out);
}
END_TEST

START_TEST(an_id_without_a_token_is_named) {
  struct us_err err = {0};
  struct us_buffer out = {0};
  ck_assert_int_eq(us_tokenizer_decode(tokenizer, (int32_t[]){0, 4096}, 2, false, &out, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "token 1: no token has id 4096");
  ck_assert_int_eq(us_tokenizer_decode(tokenizer, (int32_t[]){-1}, 1, false, &out, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_tokenizer_id(tokenizer, "no such token"), -1);
  us_buffer_release(&out);
}
END_TEST

/* Encode `unit` repeated to a megabyte; returns processor seconds. */
static double time_megabyte(const char *unit) {
  struct us_err err = {0};
  struct us_buffer text = {0};
  struct us_ids ids = {0};
  while (text.size < 1000000) corpus_add(&text, unit, strlen(unit));
  double begin = now();
  corpus_ok(us_tokenizer_encode(tokenizer, text.data, text.size, true, &ids, &err), &err);
  double seconds = now() - begin;
  ck_assert_uint_gt(ids.count, 0);
  us_buffer_release(&text);
  us_ids_release(&ids);
  return seconds;
}

/* Quadratic work on a megabyte is 10^12 steps: many minutes. Linear work takes a fraction of a second, under sanitizers seconds. */
START_TEST(a_megabyte_of_one_thing_takes_linear_time) {
  static const char *const units[] = {
      "a", " ", "\n", "!", "ab", " \n", "\xcc\x81\xcc\xa3", "<|im_start|", "<", "\xff", "\xe4\xb8\x80"};
  for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
    double seconds = time_megabyte(units[i]);
    ck_assert_msg(seconds < 60, "unit %zu took %.1f s", i, seconds);
  }
}
END_TEST

START_TEST(a_long_word_merges_like_a_short_one) {
  /* 48 bytes are merged by scanning, 49 and more with a heap: cutting a long word where it joins nothing must agree. */
  struct us_err err = {0};
  struct us_ids whole = {0}, halves = {0};
  struct us_buffer word = {0};
  for (int i = 0; i < 40; i++) corpus_add(&word, i == 20 ? "\xe5\xad\x97" : "an", i == 20 ? 3 : 2);
  corpus_ok(us_tokenizer_encode(tokenizer, word.data, word.size, true, &whole, &err), &err);
  corpus_ok(us_tokenizer_encode(tokenizer, word.data, 40, true, &halves, &err), &err);
  size_t first = halves.count;
  ck_assert_int_eq(memcmp(whole.ids, halves.ids, (first - 1) * sizeof *whole.ids), 0);
  ck_assert_uint_gt(whole.count, first);
  us_ids_release(&whole);
  us_ids_release(&halves);
  us_buffer_release(&word);
}
END_TEST

/* A path of keys into the fixture, what is put there (JSON; NULL deletes), and what the message must contain. */
static const struct broken {
  const char *path, *value, *message;
} broken[] = {
    {"model.type", "\"WordPiece\"", "model.type: \"WordPiece\" is not supported"},
    {"model.type", NULL, "model.type: \"\" is not supported"},
    {"model", "[]", "model: not an object"},
    {"model.vocab", "[]", "model.vocab: not an object"},
    {"model.vocab", "{\"a\": 0}", "model.vocab: no token for byte 0x00"},
    {"model.vocab.a", "-1", "model.vocab[\"a\"]: not an id below 2^24"},
    {"model.vocab.a", "1.5", "model.vocab[\"a\"]: not an id below 2^24"},
    {"model.vocab.a", "98", "two tokens have id"},
    {"model.vocab.a", "16777215", "largest id 16777215"},
    {"model.merges", "{}", "model.merges: not an array"},
    {"model.merges", "[\"a b c\"]", "model.merges[0]: neither"},
    {"model.merges", "[[\"a\"]]", "model.merges[0]: neither"},
    {"model.merges", "[[\"a\", 1]]", "model.merges[0]: neither"},
    {"model.merges", "[[\"a\", \"zzzzzz\"]]",
     "model.merges[0]: \"azzzzzz\" or a part of it is not in model.vocab"},
    {"model.dropout", "0.1", "model.dropout: not supported"},
    {"model.unk_token", "\"[UNK]\"", "model.unk_token: not supported"},
    {"model.byte_fallback", "true", "model.byte_fallback: not supported"},
    {"model.ignore_merges", "1", "model.ignore_merges: not true or false"},
    {"normalizer", "{\"type\": \"NFKC\"}", "normalizer.type: \"NFKC\" is not supported"},
    {"pre_tokenizer", "{\"type\": \"Whitespace\"}", "pre_tokenizer: only [Split, ByteLevel]"},
    {"pre_tokenizer", "null", "pre_tokenizer: only [Split, ByteLevel]"},
    {"decoder", "null", "decoder.type: \"\" is not supported"},
    {"post_processor", "{\"type\": \"TemplateProcessing\"}", "post_processor.type: \"TemplateProcessing\""},
    {"added_tokens", "{}", "added_tokens: not an array"},
    {"added_tokens", "[{\"id\": 5000}]", "added_tokens[0].content: not a string"},
    {"added_tokens", "[{\"id\": 5000, \"content\": \"\"}]", "added_tokens[0].content: not a string"},
    {"added_tokens", "[{\"id\": \"x\", \"content\": \"y\"}]", "added_tokens[0].id: not an id"},
    {"added_tokens", "[{\"id\": 300, \"content\": \"<new>\"}]", "added_tokens[0].id: 300 does not agree"},
    {"added_tokens", "[{\"id\": 5000, \"content\": \"<new>\", \"lstrip\": 1}]",
     "added_tokens[0].lstrip: not true"},
};

START_TEST(a_file_that_is_not_supported_is_one_line_with_file_and_field) {
  for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
    struct us_err err = {0};
    struct us_tokenizer *made = NULL;
    json_t *root = corpus_fixture("4k.json"), *at = root;
    char path[64];
    snprintf(path, sizeof path, "%s", broken[i].path);
    char *key = path;
    for (char *dot; (dot = strchr(key, '.')) != NULL; key = dot + 1) {
      *dot = '\0';
      at = json_object_get(at, key);
    }
    if (broken[i].value)
      json_object_set_new(at, key, json_loads(broken[i].value, JSON_DECODE_ANY, NULL));
    else
      json_object_del(at, key);
    char *json = json_dumps(root, JSON_COMPACT);
    ck_assert_int_eq(us_tokenizer_parse(json, strlen(json), "bad.json", &made, &err), US_ERR_INPUT);
    ck_assert_msg(strncmp(err.message, "bad.json: ", 10) == 0 && strstr(err.message, broken[i].message),
                  "%s <- %s: %s", broken[i].path, broken[i].value ? broken[i].value : "nothing", err.message);
    ck_assert_ptr_null(strchr(err.message, '\n'));
    free(json);
    json_decref(root);
  }
}
END_TEST

START_TEST(a_bad_or_endless_pattern_is_an_error) {
  static const char *const patterns[] = {"(", "(?:(?:a+)+)+$"};
  for (int i = 0; i < 2; i++) {
    struct us_err err = {0};
    struct us_tokenizer *made = NULL;
    struct us_ids ids = {0};
    json_t *root = corpus_fixture("4k.json");
    json_t *list = json_object_get(json_object_get(root, "pre_tokenizer"), "pretokenizers");
    json_object_set_new(json_object_get(json_array_get(list, 0), "pattern"), "Regex",
                        json_string(patterns[i]));
    char *json = json_dumps(root, JSON_COMPACT);
    enum us_status status = us_tokenizer_parse(json, strlen(json), "bad.json", &made, &err);
    if (i == 0) {
      ck_assert_int_eq(status, US_ERR_INPUT);
      ck_assert_ptr_nonnull(strstr(err.message, "bad.json: pre_tokenizer: pattern: "));
    } else {
      const char *text = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!";
      corpus_ok(status, &err);
      ck_assert_int_eq(us_tokenizer_encode(made, text, strlen(text), true, &ids, &err), US_ERR_INPUT);
      ck_assert_ptr_nonnull(strstr(err.message, "pattern gave up at byte 0"));
    }
    us_tokenizer_free(made);
    us_ids_release(&ids);
    json_decref(root);
    free(json);
  }
}
END_TEST

START_TEST(text_that_is_not_json_is_named_with_its_line) {
  struct us_err err = {0};
  struct us_tokenizer *made = NULL;
  ck_assert_int_eq(us_tokenizer_parse("{\n\"model\": x}", 13, "bad.json", &made, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "bad.json: line 2 column "));
  ck_assert_int_eq(us_tokenizer_parse("[]", 2, "bad.json", &made, &err), US_ERR_INPUT);
  ck_assert_int_eq(us_tokenizer_open("/nonexistent/tokenizer.json", &made, &err), US_ERR_IO);
  ck_assert_ptr_nonnull(strstr(err.message, "/nonexistent/tokenizer.json"));
}
END_TEST

/* Independent truth: what Python's bytes.decode("utf-8", "replace") gives for these, written down by hand. */
START_TEST(each_maximal_invalid_subpart_becomes_one_replacement) {
  static const struct {
    const char *bytes;
    int replacements;
  } cases[] = {{"\xff", 1},
               {"\xc0\x80", 2},
               {"\xe0\x80\x80", 3},
               {"\xe4\xb8", 1},
               {"\xed\xa0\x80", 3},
               {"\xf0\x9f\x98", 1},
               {"\xf0\x9f\x98\x61", 1},
               {"\xf4\x90\x80\x80", 4},
               {"\xf8\x88", 2},
               {"\xf0\x80\x80\x80", 4},
               {"\xc3\x28", 1},
               {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", 4}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_err err = {0};
    struct us_buffer out = {0};
    int found = 0;
    corpus_ok(us_utf8_repair(cases[i].bytes, strlen(cases[i].bytes), &out, &err), &err);
    for (const char *p = out.data; (p = strstr(p, "\xef\xbf\xbd")) != NULL; p += 3) found++;
    ck_assert_msg(found == cases[i].replacements, "case %zu: %d", i, found);
    ck_assert_uint_eq(us_utf8_valid(out.data, out.size), out.size);
    us_buffer_release(&out);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("tokenizer");
  tcase_add_unchecked_fixture(c, setup, teardown);
  tcase_add_test(c, a_stream_gives_the_decoded_bytes_and_ends_every_write_at_a_character);
  tcase_add_test(c, an_emoji_streams_only_once_it_is_whole);
  tcase_add_test(c, special_tokens_are_known_and_can_be_skipped);
  tcase_add_test(c, an_id_without_a_token_is_named);
  tcase_add_test(c, a_megabyte_of_one_thing_takes_linear_time);
  tcase_add_test(c, a_long_word_merges_like_a_short_one);
  tcase_add_test(c, a_file_that_is_not_supported_is_one_line_with_file_and_field);
  tcase_add_test(c, a_bad_or_endless_pattern_is_an_error);
  tcase_add_test(c, text_that_is_not_json_is_named_with_its_line);
  tcase_add_test(c, each_maximal_invalid_subpart_becomes_one_replacement);
  return us_suite("tokenizer", c);
}

US_TEST_MAIN(make_suite)
