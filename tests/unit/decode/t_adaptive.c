/* t_adaptive.c: the verify length against trying every length, and the byte model against sums by hand. */
#include "decode/adaptive.h"
#include "base/philox.h"
#include "suite.h"

#include <math.h>

static float uniform(uint32_t a, uint32_t b) {
  return us_uniform(us_philox_token(us_philox_key(us_test_seed()), a, b, 0, 55));
}

START_TEST(the_length_has_the_most_expected_tokens_a_byte) {
  uint32_t lengths[16] = {0};
  for (uint32_t i = 0; i < 5000; i++) {
    struct us_verify_cost cost = {.fixed = (double)uniform(i, 0),
                                  .experts = 3.0 * (double)uniform(i, 1),
                                  .idle = 0.5 + 0.5 * (double)uniform(i, 2)};
    float confidence[15];
    double best = 0.0;
    for (uint32_t k = 0; k < 15; k++) confidence[k] = sqrtf(uniform(i, 3 + k));
    uint32_t n = us_adaptive_length(&cost, confidence, 15);
    lengths[n]++;
    for (uint32_t m = 0; m <= 15; m++) { /* expected tokens from the definition: sum of products */
      double tokens = 1.0;
      for (uint32_t k = 1; k <= m; k++) {
        double all = 1.0;
        for (uint32_t j = 0; j < k; j++) all *= (double)confidence[j];
        tokens += all;
      }
      best = fmax(best, tokens / (cost.fixed + cost.experts * (1.0 - pow(cost.idle, m + 1))));
    }
    double tokens = 1.0, all = 1.0;
    for (uint32_t k = 0; k < n; k++) tokens += all *= (double)confidence[k];
    ck_assert_double_eq_tol(tokens / (cost.fixed + cost.experts * (1.0 - pow(cost.idle, n + 1))), best,
                            1e-12 * best);
  }
  ck_assert(lengths[0] > 0 && lengths[3] > 0 && lengths[15] > 0);
}
END_TEST

START_TEST(free_rows_are_all_verified_and_certain_misses_none) {
  struct us_verify_cost dense = {.fixed = 1.0, .idle = 1.0},
                        sparse = {.fixed = 1.0, .experts = 10.0, .idle = 0.9};
  float sure[7] = {1, 1, 1, 1, 1, 1, 1}, lost[7] = {0};
  ck_assert_uint_eq(us_adaptive_length(&dense, lost, 7), 7);
  ck_assert_uint_eq(us_adaptive_length(&sparse, lost, 7), 0);
  ck_assert_uint_eq(us_adaptive_length(&sparse, sure, 7), 7);
  ck_assert_uint_eq(us_adaptive_length(&sparse, sure, 0), 0);
}
END_TEST

START_TEST(bytes_are_those_of_the_matrices) {
  struct us_matrix f32 = {.format = US_FORMAT_F32, .rows = 10, .cols = 64};
  struct us_matrix mxfp4 = {.format = US_FORMAT_MXFP4, .rows = 64, .cols = 64};
  struct us_expert experts[4] = {
      {mxfp4, mxfp4, mxfp4}, {mxfp4, mxfp4, mxfp4}, {mxfp4, mxfp4, mxfp4}, {mxfp4, mxfp4, mxfp4}};
  struct us_layer layers[2] = {
      {.qkv = f32, .o_proj = f32, .gate = f32, .up = f32, .down = f32},
      {.q = f32, .k = f32, .v = f32, .o_proj = f32, .router = f32, .experts = experts}};
  struct us_model model = {.head = f32, .layers = layers};
  model.shape = (struct us_shape){.layers = 2, .moe_layer = {0, 1}, .experts = 4, .top_k = 1};
  struct us_verify_cost cost = us_verify_cost_of(&model, NULL);
  double expert = 3 * (64 * 32 + 64 * 2);
  ck_assert_double_eq(cost.fixed, (1 + 5 + 5) * 10 * 64 * 4);
  ck_assert_double_eq(cost.experts, 4 * expert);
  ck_assert_double_eq_tol(us_verify_cost_bytes(&cost, 1), cost.fixed + expert, 1e-9);
  ck_assert_double_eq_tol(us_verify_cost_bytes(&cost, 2), cost.fixed + expert * 1.75, 1e-9);
  struct us_draft_layer draft_layer = {
      .q = f32, .k = f32, .v = f32, .o_proj = f32, .gate = f32, .up = f32, .down = f32};
  struct us_draft draft = {.fc = f32, .layers = &draft_layer};
  draft.shape.layers = 1;
  ck_assert_double_eq(us_verify_cost_of(&model, &draft).fixed, cost.fixed + (1 + 1 + 7) * 10 * 64 * 4);
  draft.head = mxfp4; /* its own instead of the target's */
  ck_assert_double_eq(us_verify_cost_of(&model, &draft).fixed,
                      cost.fixed + (1 + 7) * 10 * 64 * 4 + expert / 3);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("adaptive");
  tcase_add_test(c, the_length_has_the_most_expected_tokens_a_byte);
  tcase_add_test(c, free_rows_are_all_verified_and_certain_misses_none);
  tcase_add_test(c, bytes_are_those_of_the_matrices);
  return us_suite("adaptive", c);
}
US_TEST_MAIN(make_suite)
