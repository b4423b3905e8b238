/* t_schedule.c: learning rates over a run. */
#include "training/schedule.h"
#include "suite.h"

#include <math.h>

START_TEST(warmup_climbs_linearly_to_the_peak) {
  struct us_schedule s = {.kind = US_SCHEDULE_COSINE, .peak = 2.0, .floor = 0.1, .warmup = 0.2};
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.0), 0.0, 1e-15);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.05), 0.5, 1e-15);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.2), 2.0, 1e-15);
}
END_TEST

START_TEST(cosine_falls_to_the_floor) {
  struct us_schedule s = {.kind = US_SCHEDULE_COSINE, .peak = 1.0, .floor = 0.1, .warmup = 0.0};
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.0), 1.0, 1e-15);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 1.0 / 3.0), 0.1 + 0.9 * 0.75,
                          1e-12); /* cos(60 degrees) = 1/2 */
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.5), 0.55, 1e-12);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 1.0), 0.1, 1e-12);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 7.0), 0.1, 1e-12);
}
END_TEST

START_TEST(linear_and_constant) {
  struct us_schedule s = {.kind = US_SCHEDULE_LINEAR, .peak = 4.0, .floor = 0.5, .warmup = 0.5};
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.75), 3.0, 1e-12);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 1.0), 2.0, 1e-12);
  s.kind = US_SCHEDULE_CONSTANT;
  ck_assert_double_eq_tol(us_schedule_rate(&s, 1.0), 4.0, 1e-12);
}
END_TEST

START_TEST(quadratic_falls_as_the_square_of_what_is_left) {
  struct us_schedule s = {.kind = US_SCHEDULE_QUADRATIC, .peak = 4.0, .floor = 0.0, .warmup = 0.2};
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.1), 2.0, 1e-12);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.2), 4.0, 1e-12);
  ck_assert_double_eq_tol(us_schedule_rate(&s, 0.6), 1.0, 1e-12); /* half is left: a quarter */
  ck_assert_double_eq_tol(us_schedule_rate(&s, 1.0), 0.0, 1e-12);
}
END_TEST

START_TEST(odd_progress_and_names_are_handled) {
  struct us_schedule s = {.kind = US_SCHEDULE_LINEAR, .peak = 1.0, .warmup = 1.0};
  ck_assert(isfinite(us_schedule_rate(&s, NAN)) && us_schedule_rate(&s, -1.0) == 0.0);
  ck_assert(isfinite(us_schedule_rate(&s, 1.0)));
  enum us_schedule_kind kind;
  struct us_err err;
  ck_assert_int_eq(us_schedule_parse("linear", &kind, &err), US_OK);
  ck_assert_int_eq(kind, US_SCHEDULE_LINEAR);
  ck_assert_int_eq(us_schedule_parse("quadratic", &kind, &err), US_OK);
  ck_assert_int_eq(kind, US_SCHEDULE_QUADRATIC);
  ck_assert_int_eq(us_schedule_parse("cubic", &kind, &err), US_ERR_USAGE);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("schedule");
  tcase_add_test(c, warmup_climbs_linearly_to_the_peak);
  tcase_add_test(c, cosine_falls_to_the_floor);
  tcase_add_test(c, linear_and_constant);
  tcase_add_test(c, quadratic_falls_as_the_square_of_what_is_left);
  tcase_add_test(c, odd_progress_and_names_are_handled);
  return us_suite("schedule", c);
}

US_TEST_MAIN(make_suite)
