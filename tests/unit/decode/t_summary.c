/* t_summary.c: runs by scenario, against figures worked out by hand. */
#include "decode/summary.h"

#include "suite.h"

#include <math.h>

static void add(struct us_summary *s, struct us_run_entry entry) {
  struct us_err err = {0};
  entry.text = entry.text ? entry.text : "";
  ck_assert_msg(us_summary_add(s, &entry, &err) == US_OK, "%s", err.message);
}

START_TEST(acceptance_is_pooled_and_its_error_is_over_requests) {
  struct us_summary s = {0};
  add(&s, (struct us_run_entry){.scenario = "math", .stats = {.rounds = 10, .committed = 40, .seconds = 2}});
  add(&s, (struct us_run_entry){.scenario = "math", .stats = {.rounds = 30, .committed = 60, .seconds = 3}});
  add(&s, (struct us_run_entry){.scenario = "chat", .stats = {.rounds = 10, .committed = 10, .seconds = 5}});
  us_summary_finish(&s);
  ck_assert_uint_eq(s.n, 2);
  ck_assert_str_eq(s.groups[0].scenario, "math");
  ck_assert_double_eq_tol(s.groups[0].length, 2.5, 1e-12);
  /* residuals 40 - 25 and 60 - 75: sqrt(2 * 15^2 * 2 / 1) / 40 */
  ck_assert_double_eq_tol(s.groups[0].length_error, 30.0 / 40.0, 1e-12);
  ck_assert_double_eq_tol(s.groups[0].tokens_per_second, 20.0, 1e-12);
  ck_assert(isnan(s.groups[1].length_error));
  ck_assert_double_eq_tol(s.all.length, 110.0 / 50.0, 1e-12);
  ck_assert_uint_eq(s.all.entries, 3);
  us_summary_release(&s);
}
END_TEST

START_TEST(a_rate_is_of_the_proposals_that_were_verified) {
  struct us_summary s = {0};
  add(&s, (struct us_run_entry){
              .stats = {.rounds = 10, .committed = 20, .offered = {10, 4}, .accepted = {5, 1}}});
  add(&s, (struct us_run_entry){
              .stats = {.rounds = 10, .committed = 20, .offered = {10, 0}, .accepted = {9, 0}}});
  us_summary_finish(&s);
  ck_assert_uint_eq(s.all.slots, 2);
  ck_assert_double_eq_tol(s.all.rate[0], 0.7, 1e-12);
  ck_assert_double_eq_tol(s.all.rate[1], 0.25, 1e-12);
  ck_assert(isnan(s.all.rate[2]));
  us_summary_release(&s);
}
END_TEST

START_TEST(loops_and_answers_are_counted) {
  struct us_summary s = {0};
  add(&s, (struct us_run_entry){.finish = US_FINISH_LOOP});
  add(&s, (struct us_run_entry){.text = "it is 4", .answer = "4", .finish = US_FINISH_STOP});
  add(&s, (struct us_run_entry){.text = "it is 5", .answer = "4", .finish = US_FINISH_STOP});
  add(&s, (struct us_run_entry){.text = "it is 4", .finish = US_FINISH_LENGTH});
  us_summary_finish(&s);
  ck_assert_double_eq_tol(s.all.loop_share, 0.25, 1e-12);
  ck_assert_uint_eq(s.all.answered, 2);
  ck_assert_double_eq_tol(s.all.exact_share, 0.5, 1e-12);
  ck_assert_double_eq_tol(s.all.exact_error, sqrt(0.125), 1e-12);
  ck_assert(isnan(s.all.length));
  us_summary_release(&s);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("summary");
  tcase_add_test(c, acceptance_is_pooled_and_its_error_is_over_requests);
  tcase_add_test(c, a_rate_is_of_the_proposals_that_were_verified);
  tcase_add_test(c, loops_and_answers_are_counted);
  return us_suite("summary", c);
}

US_TEST_MAIN(make_suite)
