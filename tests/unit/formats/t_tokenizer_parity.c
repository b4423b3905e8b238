/* t_tokenizer_parity.c: token for token equal to the `tokenizers` library on 2.5 MB of mixed text.
 *
 * Independent truth: tokenizer_goldens.h, made by tests/parity/make_tokenizer_goldens.py with that library. Text and the
 * 150 K vocabulary are made here again by the same rules; their digests say whether the inputs are the same.
 */
#include "formats/tokenizer.h"
#include "tokenizer_corpus.h"
#include "tokenizer_goldens.h"

static struct us_buffer text;
static struct us_tokenizer *small_tokenizer, *large_tokenizer, *flagged_tokenizer;
static char merges_sha256[US_SHA256_HEX];

static struct us_tokenizer *parse(char *json) {
  struct us_err err = {0};
  struct us_tokenizer *tokenizer = NULL;
  ck_assert_ptr_nonnull(json);
  corpus_ok(us_tokenizer_parse(json, strlen(json), "test", &tokenizer, &err), &err);
  free(json);
  return tokenizer;
}

static void make_large(void) {
  struct corpus_vocab vocab = {0};
  struct us_buffer list = {0};
  corpus_vocab_init(&vocab, &text);
  for (size_t i = 0; i < vocab.n_merges; i++) {
    for (int half = 0; half < 2; half++) {
      size_t n;
      const char *bytes = us_intern_get(&vocab.tokens, vocab.merges[i][half], &n);
      char hex[3];
      for (size_t j = 0; j < n; j++) {
        snprintf(hex, sizeof hex, "%02x", (unsigned char)bytes[j]);
        corpus_add(&list, hex, 2);
      }
      corpus_add(&list, half ? "\n" : " ", 1);
    }
  }
  corpus_sha256(list.data, list.size, merges_sha256);
  large_tokenizer = parse(corpus_vocab_json(&vocab));
  us_buffer_release(&list);
  corpus_vocab_release(&vocab);
}

/* The 4 K vocabulary with an unreachable token, ignore_merges, and every flag of added tokens. */
static void make_flagged(void) {
  json_t *root = corpus_fixture("4k.json"), *more = corpus_fixture("flagged_tokens.json");
  json_t *model = json_object_get(root, "model");
  json_object_set_new(model, "ignore_merges", json_true());
  json_object_set_new(json_object_get(model, "vocab"), "\xc4\xa0unreachable", json_integer(4096));
  json_array_extend(json_object_get(root, "added_tokens"), more);
  flagged_tokenizer = parse(json_dumps(root, JSON_COMPACT));
  json_decref(root);
  json_decref(more);
}

static void setup(void) {
  json_t *small = corpus_fixture("4k.json");
  corpus_text(&text);
  small_tokenizer = parse(json_dumps(small, JSON_COMPACT));
  json_decref(small);
  make_large();
  make_flagged();
}

static void teardown(void) {
  us_buffer_release(&text);
  us_tokenizer_free(small_tokenizer);
  us_tokenizer_free(large_tokenizer);
  us_tokenizer_free(flagged_tokenizer);
}

static void check_ids(const struct us_tokenizer *tokenizer, bool special, size_t count, const char *sha256) {
  struct us_err err = {0};
  struct us_ids ids = {0};
  char hex[US_SHA256_HEX];
  corpus_ok(us_tokenizer_encode(tokenizer, text.data, text.size, special, &ids, &err), &err);
  ck_assert_uint_eq(ids.count, count);
  corpus_sha256(ids.ids, ids.count * sizeof *ids.ids, hex);
  ck_assert_str_eq(hex, sha256);
  us_ids_release(&ids);
}

static void check_goldens(const struct us_tokenizer *tokenizer, const struct golden *list, size_t n) {
  for (size_t i = 0; i < n; i++) {
    struct us_err err = {0};
    struct us_ids ids = {0};
    corpus_ok(us_tokenizer_encode(tokenizer, list[i].text, (size_t)list[i].bytes, true, &ids, &err), &err);
    ck_assert_msg((int)ids.count == list[i].n, "text %zu: %zu ids, not %d", i, ids.count, list[i].n);
    for (int j = 0; j < list[i].n; j++)
      ck_assert_msg(ids.ids[j] == list[i].ids[j], "text %zu, id %d: %d, not %d", i, j, ids.ids[j],
                    list[i].ids[j]);
    us_ids_release(&ids);
  }
}

START_TEST(the_text_is_the_one_the_library_saw) {
  char hex[US_SHA256_HEX];
  corpus_sha256(text.data, text.size, hex);
  ck_assert_str_eq(hex, GOLDEN_TEXT_SHA256);
}
END_TEST

START_TEST(the_large_vocabulary_is_the_one_the_library_saw) {
  ck_assert_str_eq(merges_sha256, GOLDEN_MERGES_SHA256);
  ck_assert_int_eq(us_tokenizer_size(large_tokenizer), CORPUS_VOCAB);
}
END_TEST

START_TEST(a_vocabulary_of_4k_gives_the_librarys_ids) {
  check_ids(small_tokenizer, true, GOLDEN_SMALL_COUNT, GOLDEN_SMALL_SHA256);
}
END_TEST

START_TEST(a_vocabulary_of_150k_gives_the_librarys_ids) {
  check_ids(large_tokenizer, true, GOLDEN_LARGE_COUNT, GOLDEN_LARGE_SHA256);
}
END_TEST

START_TEST(special_tokens_as_plain_text_give_the_librarys_ids) {
  check_ids(small_tokenizer, false, GOLDEN_SMALL_PLAIN_COUNT, GOLDEN_SMALL_PLAIN_SHA256);
  check_ids(large_tokenizer, false, GOLDEN_LARGE_PLAIN_COUNT, GOLDEN_LARGE_PLAIN_SHA256);
}
END_TEST

START_TEST(tricky_texts_give_the_librarys_ids) {
  check_goldens(small_tokenizer, goldens, sizeof goldens / sizeof *goldens);
}
END_TEST

START_TEST(flags_of_added_tokens_and_ignore_merges_give_the_librarys_ids) {
  check_goldens(flagged_tokenizer, flagged_goldens, sizeof flagged_goldens / sizeof *flagged_goldens);
}
END_TEST

START_TEST(decoding_gives_the_repaired_and_normalised_text) {
  struct us_err err = {0};
  struct us_buffer repaired = {0}, normal = {0}, decoded = {0};
  struct us_ids ids = {0};
  corpus_ok(us_utf8_repair(text.data, text.size, &repaired, &err), &err);
  corpus_ok(us_utf8_nfc(repaired.data, repaired.size, &normal, &err), &err);
  corpus_ok(us_tokenizer_encode(large_tokenizer, normal.data, normal.size, false, &ids, &err), &err);
  corpus_ok(us_tokenizer_decode(large_tokenizer, ids.ids, ids.count, false, &decoded, &err), &err);
  ck_assert_uint_eq(decoded.size, normal.size);
  ck_assert_int_eq(memcmp(decoded.data, normal.data, normal.size), 0);
  us_buffer_release(&repaired);
  us_buffer_release(&normal);
  us_buffer_release(&decoded);
  us_ids_release(&ids);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("tokenizer parity");
  tcase_add_unchecked_fixture(c, setup, teardown);
  tcase_add_test(c, the_text_is_the_one_the_library_saw);
  tcase_add_test(c, the_large_vocabulary_is_the_one_the_library_saw);
  tcase_add_test(c, a_vocabulary_of_4k_gives_the_librarys_ids);
  tcase_add_test(c, a_vocabulary_of_150k_gives_the_librarys_ids);
  tcase_add_test(c, special_tokens_as_plain_text_give_the_librarys_ids);
  tcase_add_test(c, tricky_texts_give_the_librarys_ids);
  tcase_add_test(c, flags_of_added_tokens_and_ignore_merges_give_the_librarys_ids);
  tcase_add_test(c, decoding_gives_the_repaired_and_normalised_text);
  return us_suite("tokenizer parity", c);
}

US_TEST_MAIN(make_suite)
