/* t_exp.c: our e^x, against the C library in double. */
#include "kernels/cpu/exp.h"
#include "values.h"

START_TEST(exp_is_within_two_ulp_of_the_double_result) {
  double worst = 0;
  for (uint32_t i = 0; i < 400000; i++) {
    float x = -87.0f + (float)i * (175.0f / 400000);
    double truth = exp((double)x), unit = exp2(floor(log2(truth)) - 23);
    double error = fabs((double)us_expf(x) - truth) / unit;
    if (error > worst) worst = error;
  }
  ck_assert_msg(worst < 2.0, "error is %g ulp", worst);
}
END_TEST

START_TEST(exp_of_zero_is_one_and_the_ends_are_zero_and_inf) {
  ck_assert(us_expf(0.0f) == 1.0f);
  ck_assert(us_expf(-0.0f) == 1.0f);
  ck_assert(us_expf(-INFINITY) == 0.0f);
  ck_assert(us_expf(-104.0f) == 0.0f);
  ck_assert(isinf(us_expf(89.0f)));
  ck_assert(isinf(us_expf(INFINITY)));
  ck_assert(isnan(us_expf(NAN)));
}
END_TEST

START_TEST(exp_rounds_once_into_the_subnormals) {
  for (float x = -103.0f; x < -87.0f; x += 0.37f)
    ck_assert_msg(fabs((double)us_expf(x) - exp((double)x)) <= 0x1p-149 + exp((double)x) * 0x1p-21, "x = %g",
                  (double)x);
}
END_TEST

START_TEST(exp_never_falls_as_x_grows_by_a_step_of_the_softmax) {
  float last = 0;
  for (int i = -11000; i <= 8800; i++) {
    float y = us_expf((float)i * 0.01f);
    ck_assert(y >= last);
    last = y;
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("exp");
  tcase_add_test(c, exp_is_within_two_ulp_of_the_double_result);
  tcase_add_test(c, exp_of_zero_is_one_and_the_ends_are_zero_and_inf);
  tcase_add_test(c, exp_rounds_once_into_the_subnormals);
  tcase_add_test(c, exp_never_falls_as_x_grows_by_a_step_of_the_softmax);
  return us_suite("exp", c);
}
US_TEST_MAIN(make_suite)
