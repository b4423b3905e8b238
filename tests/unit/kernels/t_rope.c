/* t_rope.c: rotary position embedding, against complex multiplication in double. */
#include "kernels/rope/rope.h"
#include "values.h"

#include <complex.h>
#include <math.h>

START_TEST(pairs_half_a_rotary_dim_apart_turn_as_complex_numbers) {
  uint64_t state = us_test_seed();
  float *x = new_values(24, 2, &state), before[24], table[16];
  memcpy(before, x, sizeof before);
  us_rope_table(10000.0, 16, 321, table);
  us_rope_apply(table, 16, x);
  for (int i = 0; i < 8; i++) {
    double angle = 321 * pow(10000.0, -i / 8.0);
    double complex z = ((double)before[i] + (double)before[i + 8] * I) * cexp(I * angle);
    ck_assert(fabs((double)x[i] - creal(z)) < 1e-6 && fabs((double)x[i + 8] - cimag(z)) < 1e-6);
  }
  assert_same_bits(x + 16, before + 16, 8, "dims past rotary_dim");
  free(x);
}
END_TEST

START_TEST(position_zero_changes_nothing) {
  uint64_t state = us_test_seed();
  float *x = new_values(64, 2, &state), before[64], table[64];
  memcpy(before, x, sizeof before);
  us_rope_table(1e7, 64, 0, table);
  us_rope_apply(table, 64, x);
  for (int i = 0; i < 64; i++) ck_assert(x[i] == before[i]);
  free(x);
}
END_TEST

START_TEST(scores_depend_on_the_distance_only) {
  uint64_t state = us_test_seed() + 1;
  float *q = new_values(32, 1, &state), *k = new_values(32, 1, &state);
  double scores[2];
  for (int shift = 0; shift < 2; shift++) {
    float a[32], b[32], table[32];
    memcpy(a, q, sizeof a);
    memcpy(b, k, sizeof b);
    us_rope_table(1e4, 32, 500 + 9000 * (uint32_t)shift, table);
    us_rope_apply(table, 32, a);
    us_rope_table(1e4, 32, 463 + 9000 * (uint32_t)shift, table);
    us_rope_apply(table, 32, b);
    scores[shift] = 0;
    for (int i = 0; i < 32; i++) scores[shift] += (double)a[i] * (double)b[i];
  }
  ck_assert(fabs(scores[0] - scores[1]) < 2e-6);
  free(q);
  free(k);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("rope");
  tcase_add_test(c, pairs_half_a_rotary_dim_apart_turn_as_complex_numbers);
  tcase_add_test(c, position_zero_changes_nothing);
  tcase_add_test(c, scores_depend_on_the_distance_only);
  return us_suite("rope", c);
}
US_TEST_MAIN(make_suite)
