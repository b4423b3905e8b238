/* t_swiglu.c: silu(gate) * up, against double. */
#include "kernels/swiglu/swiglu.h"
#include "values.h"

#include <math.h>

START_TEST(swiglu_is_near_the_formula_and_unclamped) {
  uint64_t state = us_test_seed();
  float *gate = new_values(500, 40, &state), *up = new_values(500, 40, &state), y[500];
  float largest = 0;
  us_swiglu(&(struct us_swiglu_args){.gate = gate, .up = up, .y = y, .n = 500});
  for (size_t i = 0; i < 500; i++) {
    double g = (double)gate[i], truth = g / (1 + exp(-g)) * (double)up[i];
    ck_assert(fabs((double)y[i] - truth) <= 8 * 0x1p-24 * fabs(truth) + 0x1p-140);
    if (fabsf(y[i]) > largest) largest = fabsf(y[i]);
  }
  ck_assert(largest > 500); /* a clamp at 7 would stop at 7 * 8 */
  free(gate);
  free(up);
}
END_TEST

START_TEST(instruction_sets_give_the_bits_of_plain_c_at_any_length) {
  uint64_t state = us_test_seed() + 1;
  enum us_isa isas[2];
  size_t isa_count = fast_isas(isas);
  float *gate = new_values(400, 120, &state), *up = new_values(400, 3, &state), plain[400], fast[400];
  for (size_t n = 1; n < 400; n += 13) {
    for (int rounded = 0; rounded < 2; rounded++) {
      struct us_swiglu_args args = {
          .gate = gate, .up = up, .y = plain, .n = n, .round_bf16 = rounded, .isa = US_ISA_PLAIN};
      us_swiglu(&args);
      args.y = fast;
      for (size_t i = 0; i < isa_count; i++) {
        args.isa = isas[i];
        us_swiglu(&args);
        assert_same_bits(fast, plain, n, us_isa_name(isas[i]));
      }
    }
  }
  free(gate);
  free(up);
}
END_TEST

START_TEST(large_negative_gates_give_zero_not_nan) {
  float gate[3] = {-200, -INFINITY, -88}, up[3] = {3, 0.5f, 2}, y[3];
  gate[1] = -3e38f;
  us_swiglu(&(struct us_swiglu_args){.gate = gate, .up = up, .y = y, .n = 3});
  for (int i = 0; i < 3; i++) ck_assert(!isnan(y[i]) && fabsf(y[i]) < 1e-30f);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("swiglu");
  tcase_add_test(c, swiglu_is_near_the_formula_and_unclamped);
  tcase_add_test(c, instruction_sets_give_the_bits_of_plain_c_at_any_length);
  tcase_add_test(c, large_negative_gates_give_zero_not_nan);
  return us_suite("swiglu", c);
}
US_TEST_MAIN(make_suite)
