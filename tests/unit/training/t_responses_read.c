/* t_responses_read.c: recorded answers as training text. The truth is written out by hand. */
#include "training/responses.h"
#include "suite.h"

#include <string.h>

static const char recorded[] =
    "{\"id\": \"a\", \"prompt_ids\": [1, 2, 3], \"ids\": [4, 5]}\n"
    "{\"id\": \"b\", \"prompt_ids\": [1, 2, 3, 4, 5, 6], \"ids\": [7, 8, 9]}\n"
    "{\"id\": \"c\", \"prompt_ids\": [1], \"ids\": [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}\n"
    "{\"id\": \"d\", \"prompt_ids\": [1], \"ids\": []}\n"
    "{\"id\": \"e\", \"prompt_ids\": [9], \"ids\": [8]}\n";

static struct us_run *parse(void) {
  struct us_err err = {0};
  struct us_run *run = NULL;
  ck_assert_msg(us_run_parse(recorded, strlen(recorded), "recorded", &run, &err) == US_OK, "%s", err.message);
  return run;
}

static void expect(const struct us_responses *r, size_t i, uint32_t prompt, const int32_t *ids, uint32_t n) {
  ck_assert_uint_eq(r->prompt[i], prompt);
  ck_assert_uint_eq(r->total[i], n);
  ck_assert_mem_eq(r->ids + i * r->length, ids, n * sizeof *ids);
}

START_TEST(answers_keep_the_end_of_their_prompt_and_their_own_beginning) {
  struct us_err err = {0};
  struct us_run *run = parse();
  struct us_responses r;
  struct us_responses_part part = {.length = 6, .every = 4, .vocab = 12};
  ck_assert_msg(us_responses_read(run, &part, &r, &err) == US_OK, "%s", err.message);
  ck_assert_uint_eq(r.n, 2); /* a and e are held out, d is empty */
  ck_assert_uint_eq(r.tokens, 8);
  expect(&r, 0, 3, (const int32_t[]){4, 5, 6, 7, 8, 9}, 6);
  expect(&r, 1, 1, (const int32_t[]){1, 2, 3, 4, 5, 6}, 6);
  us_responses_release(&r);
  part.heldout = true;
  ck_assert_int_eq(us_responses_read(run, &part, &r, &err), US_OK);
  ck_assert_uint_eq(r.n, 2);
  expect(&r, 0, 3, (const int32_t[]){1, 2, 3, 4, 5}, 5);
  expect(&r, 1, 1, (const int32_t[]){9, 8}, 2);
  us_responses_release(&r);
  us_run_free(run);
}
END_TEST

START_TEST(ids_of_another_vocabulary_and_empty_runs_are_refused) {
  struct us_err err = {0};
  struct us_run *run = parse();
  struct us_responses r;
  struct us_responses_part part = {.length = 6, .every = 4, .vocab = 11};
  ck_assert_int_eq(us_responses_read(run, &part, &r, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "answer 'c': token 11 is not"), "%s", err.message);
  part.vocab = 12;
  run->n = 1; /* nothing but what is held out */
  ck_assert_int_eq(us_responses_read(run, &part, &r, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "no answer among 1"), "%s", err.message);
  run->n = 5;
  us_run_free(run);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("responses_read");
  tcase_add_test(c, answers_keep_the_end_of_their_prompt_and_their_own_beginning);
  tcase_add_test(c, ids_of_another_vocabulary_and_empty_runs_are_refused);
  return us_suite("responses_read", c);
}

US_TEST_MAIN(make_suite)
