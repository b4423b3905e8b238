/* t_shards.c: documents to shards and back: parts, order, masks, windows, bad files. */
#include "training/shards_write.h"
#include "training/bpe_train.h"
#include "suite.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define N_DOCUMENTS 400

static char folder[] = "/tmp/t_shards.XXXXXX";
static char path[64], text_path[64];
static struct us_buffer tokenizer_json;
static struct us_tokenizer *tokenizer;

static void ok(enum us_status status, const struct us_err *err) {
  ck_assert_msg(status == US_OK, "%s", err->message);
}

static void document_text(int i, char text[64]) {
  snprintf(text, 64, "document number %d about %d things", i, i * i);
}

static enum us_status add(struct us_shards_writer *writer, const char *text, struct us_err *err) {
  struct us_segment segment = {.end = strlen(text), .loss = true};
  struct us_document document = {
      .source = "test", .text = text, .bytes = strlen(text), .segments = &segment, .n_segments = 1};
  return us_shards_writer_take(&document, writer, err);
}

static void setup(void) {
  struct us_err err = {0};
  struct us_bpe_trainer *trainer;
  struct us_shards_writer *writer;
  char text[64];
  ck_assert_ptr_nonnull(mkdtemp(folder));
  snprintf(path, sizeof path, "%s/s.h5", folder);
  snprintf(text_path, sizeof text_path, "%s/t.jsonl", folder);
  ok(us_bpe_trainer_create(&trainer, &err), &err);
  for (int i = 0; i < N_DOCUMENTS; i++) {
    document_text(i, text);
    ok(us_bpe_trainer_add(trainer, text, strlen(text), &err), &err);
  }
  ok(us_bpe_trainer_finish(trainer, 280, &tokenizer_json, &err), &err);
  us_bpe_trainer_free(trainer);
  ok(us_tokenizer_parse(tokenizer_json.data, tokenizer_json.size, "test", &tokenizer, &err), &err);
  ok(us_shards_writer_create(tokenizer, tokenizer_json.data, 0.25, &writer, &err), &err);
  for (int i = 0; i < N_DOCUMENTS; i++) {
    document_text(i % (N_DOCUMENTS - 10), text); /* the last ten are duplicates */
    ok(add(writer, text, &err), &err);
  }
  ck_assert_uint_eq(us_shards_writer_counts(writer)->duplicates, 10);
  ok(us_shards_writer_finish(writer, path, "{}", &err), &err);
  us_shards_writer_free(writer);
}

static void teardown(void) {
  unlink(path);
  unlink(text_path);
  rmdir(folder);
  us_tokenizer_free(tokenizer);
  us_buffer_release(&tokenizer_json);
}

static struct us_shards *open_shards(void) {
  struct us_err err = {0};
  struct us_shards *shards = NULL;
  ok(us_shards_open(path, &shards, &err), &err);
  return shards;
}

/* The text of a token range. */
static void decode(const struct us_window *window, size_t begin, size_t end, struct us_buffer *text) {
  struct us_err err = {0};
  us_buffer_clear(text);
  ok(us_tokenizer_decode(tokenizer, window->ids + begin, end - begin, false, text, &err), &err);
}

START_TEST(every_document_comes_back_once_in_one_part) {
  struct us_err err = {0};
  struct us_shards *shards = open_shards();
  struct us_window window;
  struct us_buffer text = {0};
  int seen[N_DOCUMENTS] = {0};
  ok(us_window_init(&window, 64, &err), &err);
  for (int part = 0; part < US_N_PARTS; part++)
    for (size_t i = 0; i < us_shards_documents(shards, part); i++) {
      size_t begin, end;
      int number;
      char expected[96];
      us_shards_document(shards, part, i, &begin, &end);
      ck_assert_uint_le(end - begin, 64);
      us_shards_copy(shards, part, begin, &window);
      decode(&window, 0, end - begin, &text);
      ck_assert_int_eq(sscanf(text.data, "document number %d", &number), 1);
      document_text(number, expected);
      strcat(expected, "<|endoftext|>");
      ck_assert_str_eq(text.data, expected);
      seen[number]++;
    }
  for (int i = 0; i < N_DOCUMENTS; i++) ck_assert_int_eq(seen[i], i < N_DOCUMENTS - 10);
  /* 390 draws at 0.25: 97.5 expected, sigma 8.6; five sigma. */
  ck_assert_uint_gt(us_shards_documents(shards, US_PART_HELDOUT), 55);
  ck_assert_uint_lt(us_shards_documents(shards, US_PART_HELDOUT), 140);
  ck_assert_int_eq(us_shards_vocab(shards), 280);
  ck_assert_str_eq(us_shards_tokenizer(shards), tokenizer_json.data);
  us_window_release(&window);
  us_buffer_release(&text);
  us_shards_close(shards);
}
END_TEST

START_TEST(a_sample_depends_on_seed_step_and_index_alone) {
  struct us_err err = {0};
  struct us_shards *shards = open_shards();
  struct us_window a, b;
  int differ = 0;
  ok(us_window_init(&a, 33, &err), &err);
  ok(us_window_init(&b, 33, &err), &err);
  ck_assert(us_shards_can_sample(shards, 33));
  ck_assert(!us_shards_can_sample(shards, us_shards_tokens(shards, US_PART_TRAIN) + 1));
  for (uint64_t i = 0; i < 100; i++) {
    us_shards_sample(shards, 7, i, 3, &a);
    us_shards_sample(shards, 8, i, 3, &b);
    differ += memcmp(a.ids, b.ids, 33 * sizeof *a.ids) != 0;
    us_shards_sample(shards, 7, i, 4, &b);
    differ += memcmp(a.ids, b.ids, 33 * sizeof *a.ids) != 0;
    us_shards_sample(shards, 7, i, 3, &b);
    ck_assert_uint_eq(a.n, 33);
    ck_assert_int_eq(memcmp(a.ids, b.ids, 33 * sizeof *a.ids), 0);
    ck_assert_int_eq(memcmp(a.document, b.document, 33 * sizeof *a.document), 0);
  }
  ck_assert_int_gt(differ, 190);
  us_window_release(&a);
  us_window_release(&b);
  us_shards_close(shards);
}
END_TEST

START_TEST(a_share_of_the_samples_is_one_document) {
  struct us_err err = {0};
  struct us_shards *shards = open_shards();
  struct us_window parted, window;
  int cut = 0, joined = 0;
  ok(us_window_init(&parted, 200, &err), &err);
  ok(us_window_init(&window, 200, &err), &err);
  for (uint64_t i = 0; i < 400; i++) {
    us_shards_sample(shards, 5, i, 0, &parted);
    us_shards_sample_across(shards, 5, i, 0, 0.25, &window);
    ck_assert_int_eq(memcmp(window.ids, parted.ids, 200 * sizeof *window.ids), 0);
    bool same = memcmp(window.document, parted.document, 200 * sizeof *window.document) == 0;
    bool whole = window.document[199] == 0;
    ck_assert(same || whole);
    if (parted.document[199] == 0) continue;
    cut++;
    joined += whole;
    us_shards_sample_across(shards, 5, i, 0, 1.0, &window);
    ck_assert_int_eq(window.document[199], 0);
  }
  /* 0.25 of those that hold an edge; with 300 of them sigma is 7.5: five sigma. */
  ck_assert_int_gt(cut, 100);
  ck_assert_int_lt(abs(4 * joined - cut), (int)(4.0 * 5.0 * sqrt(0.1875 * cut)));
  us_window_release(&parted);
  us_window_release(&window);
  us_shards_close(shards);
}
END_TEST

START_TEST(samples_reach_the_first_and_the_last_token) {
  struct us_err err = {0};
  struct us_shards *shards = open_shards();
  struct us_window window, first, last;
  size_t n = us_shards_tokens(shards, US_PART_TRAIN), length = n - 3;
  bool at_first = false, at_last = false;
  ok(us_window_init(&window, length, &err), &err);
  ok(us_window_init(&first, length, &err), &err);
  ok(us_window_init(&last, length, &err), &err);
  us_shards_copy(shards, US_PART_TRAIN, 0, &first);
  us_shards_copy(shards, US_PART_TRAIN, n - length, &last);
  for (uint64_t i = 0; i < 60; i++) { /* four starts: missing one has probability 0.75^60 */
    us_shards_sample(shards, 1, i, 0, &window);
    at_first |= memcmp(window.ids, first.ids, length * sizeof *window.ids) == 0;
    at_last |= memcmp(window.ids, last.ids, length * sizeof *window.ids) == 0;
  }
  ck_assert(at_first && at_last);
  us_window_release(&window);
  us_window_release(&first);
  us_window_release(&last);
  us_shards_close(shards);
}
END_TEST

START_TEST(document_numbers_rise_behind_each_end_of_text) {
  struct us_err err = {0};
  struct us_shards *shards = open_shards();
  struct us_window window;
  int32_t end = us_tokenizer_id(tokenizer, "<|endoftext|>");
  ok(us_window_init(&window, 200, &err), &err);
  for (uint64_t step = 0; step < 20; step++) {
    us_shards_sample(shards, 1, step, 0, &window);
    ck_assert_int_eq(window.document[0], 0);
    for (size_t i = 1; i < window.n; i++)
      ck_assert_int_eq(window.document[i], window.document[i - 1] + (window.ids[i - 1] == end));
  }
  us_window_release(&window);
  us_shards_close(shards);
}
END_TEST

START_TEST(heldout_windows_predict_every_token_but_the_first_once) {
  struct us_err err = {0};
  struct us_shards *shards = open_shards();
  size_t n = us_shards_tokens(shards, US_PART_HELDOUT);
  size_t lengths[] = {2, 17, 64, n - 1, n, n + 5};
  struct us_window whole;
  ok(us_window_init(&whole, n, &err), &err);
  us_shards_copy(shards, US_PART_HELDOUT, 0, &whole);
  for (size_t k = 0; k < 6; k++) {
    struct us_window window;
    size_t predicted = 1;
    ok(us_window_init(&window, lengths[k], &err), &err);
    for (size_t i = 0; i < us_shards_n_heldout(shards, lengths[k]); i++) {
      us_shards_heldout(shards, i, &window);
      ck_assert_uint_ge(window.n, 2);
      ck_assert_int_eq(memcmp(window.ids, whole.ids + predicted - 1, window.n * sizeof *window.ids), 0);
      predicted += window.n - 1;
    }
    ck_assert_uint_eq(predicted, n);
    us_window_release(&window);
  }
  us_window_release(&whole);
  us_shards_close(shards);
}
END_TEST

/* Write lines to a file, read them as a corpus with a template, and decode what carries a loss. */
static void masked(const char *lines, enum us_template template, struct us_buffer *whole,
                   struct us_buffer *learned) {
  struct us_err err = {0};
  struct us_shards_writer *writer;
  struct us_shards *shards;
  struct us_window window;
  struct us_corpus_options options = {.template = template};
  FILE *file = fopen(text_path, "w");
  char out[80];
  snprintf(out, sizeof out, "%s/m.h5", folder);
  fputs(lines, file);
  fclose(file);
  ok(us_shards_writer_create(tokenizer, tokenizer_json.data, 0, &writer, &err), &err);
  ok(us_corpus_read(text_path, &options, us_shards_writer_take, writer, &err), &err);
  ok(us_shards_writer_finish(writer, out, "{}", &err), &err);
  us_shards_writer_free(writer);
  ok(us_shards_open(out, &shards, &err), &err);
  size_t n = us_shards_tokens(shards, US_PART_TRAIN);
  ok(us_window_init(&window, n, &err), &err);
  us_shards_copy(shards, US_PART_TRAIN, 0, &window);
  decode(&window, 0, n, whole);
  for (size_t i = 0; i < n; i++)
    if (window.loss[i]) ok(us_tokenizer_decode(tokenizer, window.ids + i, 1, false, learned, &err), &err);
  us_window_release(&window);
  us_shards_close(shards);
  unlink(out);
}

START_TEST(only_answers_and_assistant_turns_carry_a_loss) {
  static const struct {
    const char *line;
    enum us_template template;
    const char *whole, *learned;
  } cases[] = {
      {"{\"question\": \"1+1?\", \"answer\": \"two\"}", US_TEMPLATE_LINES, "1+1?\ntwo<|endoftext|>",
       "two<|endoftext|>"},
      {"{\"prompt\": \"p\", \"response\": \"r\"}", US_TEMPLATE_PLAIN,
       "<|im_start|>user\np<|im_end|><|im_start|>assistant\nr<|im_end|><|endoftext|>",
       "r<|im_end|><|endoftext|>"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", \"content\": "
       "\"a\"}, "
       "{\"role\": \"tool\", \"content\": \"t\"}]}",
       US_TEMPLATE_LINES, "user: u\nassistant: a\ntool: t\n<|endoftext|>", " a\n"},
      {"{\"messages\": [{\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"function\": "
       "{\"name\": \"f\", "
       "\"arguments\": \"{\\\"k\\\": 1}\"}}]}]}",
       US_TEMPLATE_PLAIN,
       "<|im_start|>assistant\n<tool_call>\n<function=f>\n<parameter=k>1</parameter>\n</function>\n</"
       "tool_call><|im_end|>"
       "<|endoftext|>",
       "<tool_call>\n<function=f>\n<parameter=k>1</parameter>\n</function>\n</"
       "tool_call><|im_end|><|endoftext|>"},
      {"{\"text\": \"all <|im_end|>\"}", US_TEMPLATE_CHAT, "all <|im_end|><|endoftext|>",
       "all <|im_end|><|endoftext|>"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_buffer whole = {0}, learned = {0};
    masked(cases[i].line, cases[i].template, &whole, &learned);
    ck_assert_str_eq(whole.data, cases[i].whole);
    ck_assert_str_eq(learned.data, cases[i].learned);
    us_buffer_release(&whole);
    us_buffer_release(&learned);
  }
}
END_TEST

START_TEST(overlapping_documents_are_left_out_and_counted) {
  struct us_err err = {0};
  struct us_shards_writer *writer;
  struct us_decontaminator *filter;
  const char *prompt = "a b c d e f g h i j k l m";
  ok(us_decontaminator_create(&filter, &err), &err);
  ok(us_decontaminator_add(filter, prompt, strlen(prompt), &err), &err);
  ok(us_shards_writer_create(tokenizer, tokenizer_json.data, 0, &writer, &err), &err);
  us_shards_writer_filter(writer, filter, NULL, NULL);
  ok(add(writer, "x A, b, c, d, e, f, g, h, i, j, k, l, m y", &err), &err);
  ck_assert_int_eq(us_shards_writer_finish(writer, path, "{}", &err), US_ERR_INPUT);
  ok(add(writer, "a b c d e f g h i j k l n", &err), &err);
  ck_assert_uint_eq(us_shards_writer_counts(writer)->overlaps, 1);
  ck_assert_uint_eq(us_shards_writer_counts(writer)->documents[US_PART_TRAIN], 1);
  us_shards_writer_free(writer);
  us_decontaminator_free(filter);
}
END_TEST

START_TEST(bad_corpus_lines_are_named) {
  static const struct {
    const char *line, *message;
  } cases[] = {{"{}", "line 1: no text"},
               {"\n{\"text\": 1}", "line 2: no text"},
               {"[", "line 1"},
               {"{\"messages\": []}", "messages: not a list"},
               {"{\"messages\": [{\"content\": \"a\"}]}", "messages[0].role: not a string"},
               {"{\"messages\": [{\"role\": \"robot\", \"content\": \"a\"}]}", "messages[0].role: \"robot\""},
               {"{\"messages\": [{\"role\": \"user\", \"content\": 1}]}", "messages[0].content: neither"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_err err = {0};
    struct us_shards_writer *writer;
    struct us_corpus_options options = {0};
    FILE *file = fopen(text_path, "w");
    fputs(cases[i].line, file);
    fclose(file);
    ok(us_shards_writer_create(tokenizer, tokenizer_json.data, 0, &writer, &err), &err);
    ck_assert_int_eq(us_corpus_read(text_path, &options, us_shards_writer_take, writer, &err), US_ERR_INPUT);
    ck_assert_msg(strncmp(err.message, text_path, strlen(text_path)) == 0 &&
                      strstr(err.message, cases[i].message),
                  "%s", err.message);
    us_shards_writer_free(writer);
  }
}
END_TEST

START_TEST(a_file_of_another_kind_or_cut_short_is_refused) {
  struct us_err err = {0};
  struct us_shards *shards = NULL;
  ck_assert_int_eq(us_shards_open("/nonexistent/s.h5", &shards, &err), US_ERR_IO);
  FILE *file = fopen(text_path, "w");
  fputs("not HDF5", file);
  fclose(file);
  ck_assert_int_eq(us_shards_open(text_path, &shards, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, text_path));
}
END_TEST

/* 300 documents of 64 to 120 KB, 25 MB: more than one batch; every eleventh equals the one before, every seventh overlaps. */
static void add_many(struct us_shards_writer *writer, struct us_err *err) {
  char *text = malloc(128 << 10);
  for (int i = 0; i < 300; i++) {
    int number = i % 11 == 10 ? i - 1 : i;
    size_t n = 0, end = (64u << 10) + (size_t)(number * 191 % 56) * 1024;
    if (number % 7 == 3) n += (size_t)sprintf(text, "a b c d e f g h i j k l m ");
    while (n < end)
      n += (size_t)sprintf(text + n, "number %d, thing %zu; ", number, n * (size_t)number % 977);
    ok(add(writer, text, err), err);
  }
  free(text);
}

START_TEST(any_number_of_threads_writes_the_same_shards) {
  struct us_err err = {0};
  struct us_buffer files[2] = {{0}};
  struct us_shards_counts counts[2];
  const char *prompt = "a b c d e f g h i j k l m";
  for (int many = 0; many < 2; many++) {
    struct us_shards_writer *writer;
    struct us_decontaminator *filter;
    struct us_pool *pool;
    ok(us_pool_create(many ? 5 : 1, &pool, &err), &err);
    ok(us_decontaminator_create(&filter, &err), &err);
    ok(us_decontaminator_add(filter, prompt, strlen(prompt), &err), &err);
    ok(us_shards_writer_create(tokenizer, tokenizer_json.data, 0.1, &writer, &err), &err);
    us_shards_writer_filter(writer, filter, NULL, NULL);
    us_shards_writer_threads(writer, pool);
    add_many(writer, &err);
    ok(us_shards_writer_flush(writer, &err), &err);
    counts[many] = *us_shards_writer_counts(writer);
    ok(us_shards_writer_finish(writer, text_path, "{}", &err), &err);
    ok(us_buffer_read_file(&files[many], text_path, 1 << 30, &err), &err);
    us_shards_writer_free(writer), us_decontaminator_free(filter), us_pool_free(pool);
  }
  ck_assert_uint_eq(counts[0].read, 300);
  ck_assert_uint_ge(counts[0].duplicates, 20);
  ck_assert_uint_ge(counts[0].overlaps, 30);
  ck_assert_mem_eq(&counts[0], &counts[1], sizeof counts[0]);
  ck_assert_uint_eq(files[0].size, files[1].size);
  ck_assert_mem_eq(files[0].data, files[1].data, files[0].size);
  us_buffer_release(&files[0]), us_buffer_release(&files[1]);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("shards");
  tcase_add_unchecked_fixture(c, setup, teardown);
  tcase_add_test(c, every_document_comes_back_once_in_one_part);
  tcase_add_test(c, a_sample_depends_on_seed_step_and_index_alone);
  tcase_add_test(c, a_share_of_the_samples_is_one_document);
  tcase_add_test(c, samples_reach_the_first_and_the_last_token);
  tcase_add_test(c, document_numbers_rise_behind_each_end_of_text);
  tcase_add_test(c, heldout_windows_predict_every_token_but_the_first_once);
  tcase_add_test(c, only_answers_and_assistant_turns_carry_a_loss);
  tcase_add_test(c, overlapping_documents_are_left_out_and_counted);
  tcase_add_test(c, any_number_of_threads_writes_the_same_shards);
  tcase_add_test(c, bad_corpus_lines_are_named);
  tcase_add_test(c, a_file_of_another_kind_or_cut_short_is_refused);
  return us_suite("shards", c);
}

US_TEST_MAIN(make_suite)
