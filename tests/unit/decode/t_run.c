/* t_run.c: recorded runs: what is written reads back equal, and bad lines are named. */
#include "decode/run.h"
#include "fail_alloc.h"
#include "suite.h"

#include <string.h>

static int32_t prompt[] = {5, 0, 2147483647}, ids[] = {7, 8, 9, 1};
static float logprobs[] = {-0.5f, -1.25e-7f, -3.4028235e38f, -0.1f};

static struct us_run_entry make_entry(void) {
  struct us_run_entry e = {.id = "gsm-\"1\"\n",
                           .scenario = "math",
                           .answer = "42",
                           .turn = 2,
                           .sample = 3,
                           .best = true,
                           .prompt = prompt,
                           .prompt_count = 3,
                           .ids = ids,
                           .count = 4,
                           .text = "a\t\xc3\xa9",
                           .text_bytes = 4,
                           .logprobs = logprobs,
                           .mean_logprob = -0.75,
                           .finish = US_FINISH_STRING,
                           .settings_json = "{\"temperature\":0.5}"};
  e.stats.rounds = 3, e.stats.committed = 7;
  e.stats.offered[0] = 3, e.stats.offered[1] = 2, e.stats.accepted[0] = 2;
  e.stats.histogram[0] = 1, e.stats.histogram[2] = 2;
  e.stats.first_token_seconds = 0.25, e.stats.seconds = 1.5;
  return e;
}

static struct us_run *write_and_read(const struct us_run_entry *entries, size_t n) {
  char *text;
  size_t bytes;
  struct us_err err = {0};
  struct us_run *run;
  FILE *out = open_memstream(&text, &bytes);
  for (size_t i = 0; i < n; i++) ck_assert_int_eq(us_run_write(out, &entries[i], &err), US_OK);
  fclose(out);
  ck_assert_msg(us_run_parse(text, bytes, "run", &run, &err) == US_OK, "%s", err.message);
  free(text);
  ck_assert_uint_eq(run->n, n);
  return run;
}

START_TEST(a_written_run_reads_back_equal) {
  struct us_run_entry e = make_entry();
  struct us_run *run = write_and_read(&e, 1);
  const struct us_run_entry *r = &run->entries[0];
  ck_assert_str_eq(r->id, e.id);
  ck_assert_str_eq(r->scenario, e.scenario);
  ck_assert_str_eq(r->answer, e.answer);
  ck_assert_str_eq(r->text, e.text);
  ck_assert_uint_eq(r->text_bytes, e.text_bytes);
  ck_assert(r->turn == 2 && r->sample == 3 && r->best && r->finish == US_FINISH_STRING);
  ck_assert(r->prompt_count == 3 && !memcmp(r->prompt, prompt, sizeof prompt));
  ck_assert(r->count == 4 && !memcmp(r->ids, ids, sizeof ids));
  ck_assert_mem_eq(r->logprobs, logprobs, sizeof logprobs);
  ck_assert_double_eq(r->mean_logprob, e.mean_logprob);
  ck_assert_mem_eq(&r->stats, &e.stats, sizeof e.stats);
  us_run_free(run);
}
END_TEST

START_TEST(any_bytes_of_text_become_valid_json) {
  struct us_run_entry e = make_entry();
  static const char bytes[] = "x\xff\0y\x01z";
  e.text = bytes, e.text_bytes = 6, e.logprobs = NULL, e.settings_json = NULL, e.answer = NULL;
  struct us_run *run = write_and_read(&e, 1);
  ck_assert_str_eq(run->entries[0].text, "x\xef\xbf\xbd\xef\xbf\xbdy\x01z");
  ck_assert_ptr_null(run->entries[0].logprobs);
  us_run_free(run);
}
END_TEST

START_TEST(an_entry_is_found_by_prompt_and_sample) {
  int32_t other[] = {5, 0, 3};
  struct us_run_entry e[3] = {make_entry(), make_entry(), make_entry()};
  e[1].prompt = other, e[2].sample = 4;
  struct us_run *run = write_and_read(e, 3);
  ck_assert_ptr_eq(us_run_find(run, other, 3, 3), &run->entries[1]);
  ck_assert_ptr_eq(us_run_find(run, prompt, 3, 4), &run->entries[2]);
  ck_assert_ptr_eq(us_run_find(run, prompt, 3, 3), &run->entries[0]);
  ck_assert_ptr_null(us_run_find(run, prompt, 2, 3));
  us_run_free(run);
}
END_TEST

START_TEST(bad_lines_are_named) {
  static const struct {
    const char *text, *message;
  } cases[] = {
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1]}\n\n{", "run: line 3"},
      {"[]", "not an object"},
      {"{\"ids\":[1],\"prompt_ids\":[1]}", "id"},
      {"{\"id\":\"a\",\"prompt_ids\":[1]}", "ids"},
      {"{\"id\":\"a\",\"ids\":[1,-1],\"prompt_ids\":[1]}", "ids[1]"},
      {"{\"id\":\"a\",\"ids\":[1,2147483648],\"prompt_ids\":[1]}", "ids[1]"},
      {"{\"id\":\"a\",\"ids\":[1.0],\"prompt_ids\":[1]}", "ids[0]"},
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1],\"logprobs\":[1,2]}", "logprobs"},
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1],\"logprobs\":[null]}", "logprobs[0]"},
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1],\"logprobs\":[1e300]}", "logprobs[0]"},
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1],\"finish\":\"tired\"}", "finish"},
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1],\"stats\":{\"histogram\":[1,2,3,4,5,6,7,8,9,10,11,12,13,"
       "14,15,16,17]}}",
       "histogram"},
      {"{\"id\":\"a\",\"ids\":[1],\"prompt_ids\":[1],\"stats\":{\"accepted\":[-1]}}", "accepted"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct us_err err = {0};
    struct us_run *run;
    ck_assert_int_eq(us_run_parse(cases[i].text, strlen(cases[i].text), "run", &run, &err), US_ERR_INPUT);
    ck_assert_msg(strstr(err.message, cases[i].message) != NULL, "%s", err.message);
  }
}
END_TEST

START_TEST(a_full_disk_is_an_error) {
  struct us_run_entry e = make_entry();
  struct us_err err = {0};
  FILE *out = fopen("/dev/full", "w");
  ck_assert_ptr_nonnull(out);
  ck_assert_int_eq(us_run_write(out, &e, &err), US_ERR_IO);
  fclose(out);
}
END_TEST

/* The line of the undisturbed run; every later one that succeeds must be the same. */
static char expected[4096];

static enum us_status write_line(void *arg, struct us_err *err) {
  static char line[sizeof expected], buffer[sizeof expected];
  FILE *out = arg;
  memset(line, 0, sizeof line);
  rewind(out);
  setvbuf(out, buffer, _IOFBF, sizeof buffer);
  struct us_run_entry e = make_entry();
  e.settings_json = NULL; /* jansson 2.14 itself ends where memory does at a closing quote */
  enum us_status status = us_run_write(out, &e, err);
  if (status != US_OK) return status;
  rewind(out);
  if (!fgets(line, sizeof line, out)) return us_err_set(err, US_ERR_CHECK, "no line");
  if (!expected[0]) strcpy(expected, line);
  return strcmp(line, expected) == 0 ? US_OK : us_err_set(err, US_ERR_CHECK, "a part is missing: %s", line);
}

START_TEST(a_line_is_written_whole_or_not_at_all) {
  FILE *out = tmpfile();
  us_fail_alloc(write_line, out, US_FAIL_ALLOC_MAY_SUCCEED);
  fclose(out);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("run");
  tcase_add_test(c, a_line_is_written_whole_or_not_at_all);
  tcase_add_test(c, a_written_run_reads_back_equal);
  tcase_add_test(c, any_bytes_of_text_become_valid_json);
  tcase_add_test(c, an_entry_is_found_by_prompt_and_sample);
  tcase_add_test(c, bad_lines_are_named);
  tcase_add_test(c, a_full_disk_is_an_error);
  return us_suite("run", c);
}
US_TEST_MAIN(make_suite)
