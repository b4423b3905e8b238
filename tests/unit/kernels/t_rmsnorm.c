/* t_rmsnorm.c: RMS normalisation, against double. */
#include "kernels/rmsnorm/rmsnorm.h"
#include "values.h"

#include <math.h>

static void run(const float *x, const float *w, size_t R, size_t D, bool rounded, enum us_isa isa, float *y) {
  us_rmsnorm(&(struct us_rmsnorm_args){.x = x,
                                       .x_stride = D,
                                       .weight = w,
                                       .y = y,
                                       .y_stride = D,
                                       .R = R,
                                       .D = D,
                                       .eps = 1e-5f,
                                       .round_bf16 = rounded,
                                       .isa = isa});
}

START_TEST(rmsnorm_is_near_the_formula_in_double) {
  uint64_t state = us_test_seed();
  float *x = new_values(3 * 100, 4, &state), *w = new_values(100, 1, &state), y[300];
  run(x, w, 3, 100, false, US_ISA_BEST, y);
  for (size_t r = 0; r < 3; r++) {
    double sum = 0;
    for (size_t k = 0; k < 100; k++) sum += (double)x[r * 100 + k] * (double)x[r * 100 + k];
    double scale = 1.0 / sqrt(sum / 100 + (double)1e-5f);
    for (size_t k = 0; k < 100; k++) {
      double truth = (double)x[r * 100 + k] * scale * (double)w[k];
      ck_assert(fabs((double)y[r * 100 + k] - truth) <= 16 * 0x1p-24 * fabs(truth));
    }
  }
  free(x);
  free(w);
}
END_TEST

START_TEST(instruction_sets_give_the_bits_of_plain_c_at_any_width) {
  uint64_t state = us_test_seed() + 1;
  enum us_isa isas[2];
  size_t isa_count = fast_isas(isas);
  for (size_t D = 1; D < 70; D += 3) {
    float *x = new_values(2 * D, 3, &state), *w = new_values(D, 1, &state), plain[140], fast[140];
    for (int rounded = 0; rounded < 2; rounded++) {
      run(x, w, 2, D, rounded, US_ISA_PLAIN, plain);
      for (size_t i = 0; i < isa_count; i++) {
        run(x, w, 2, D, rounded, isas[i], fast);
        assert_same_bits(fast, plain, 2 * D, us_isa_name(isas[i]));
      }
    }
    free(x);
    free(w);
  }
}
END_TEST

START_TEST(the_one_rounding_is_to_nearest_bf16) {
  uint64_t state = us_test_seed() + 2;
  float *x = new_values(64, 3, &state), *w = new_values(64, 1, &state), exact[64], rounded[64];
  run(x, w, 1, 64, false, US_ISA_BEST, exact);
  run(x, w, 1, 64, true, US_ISA_BEST, rounded);
  for (size_t k = 0; k < 64; k++) ck_assert(rounded[k] == us_bf16_round(exact[k]));
  free(x);
  free(w);
}
END_TEST

START_TEST(a_row_of_zeros_stays_zero_and_may_be_done_in_place) {
  float x[32] = {0}, w[32];
  for (int i = 0; i < 32; i++) w[i] = 1;
  run(x, w, 1, 32, true, US_ISA_BEST, x);
  for (int i = 0; i < 32; i++) ck_assert(x[i] == 0);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("rmsnorm");
  tcase_add_test(c, rmsnorm_is_near_the_formula_in_double);
  tcase_add_test(c, instruction_sets_give_the_bits_of_plain_c_at_any_width);
  tcase_add_test(c, the_one_rounding_is_to_nearest_bf16);
  tcase_add_test(c, a_row_of_zeros_stays_zero_and_may_be_done_in_place);
  return us_suite("rmsnorm", c);
}
US_TEST_MAIN(make_suite)
