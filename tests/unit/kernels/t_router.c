/* t_router.c: expert selection and weights. */
#include "kernels/router/router.h"
#include "values.h"

#include <math.h>

START_TEST(ties_go_to_the_lowest_id) {
  float logits[6] = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f}, weights[3];
  uint32_t ids[3];
  us_router_select(
      &(struct us_router_args){.logits = logits, .E = 6, .K = 3, .normalise = true, .scaling = 1}, ids,
      weights);
  for (uint32_t i = 0; i < 3; i++) ck_assert(ids[i] == i && fabsf(weights[i] - 1.0f / 3) < 1e-6f);
}
END_TEST

START_TEST(the_bias_chooses_but_does_not_weigh) {
  float logits[4] = {2, 1, 0, -1}, bias[4] = {0, 0, 0, 5}, weights[2];
  uint32_t ids[2];
  us_router_select(
      &(struct us_router_args){
          .logits = logits, .bias = bias, .E = 4, .K = 2, .normalise = false, .scaling = 1},
      ids, weights);
  ck_assert(ids[0] == 0 && ids[1] == 3);
  ck_assert(fabs((double)weights[0] - 1 / (1 + exp(-2.0))) < 1e-6 &&
            fabs((double)weights[1] - 1 / (1 + exp(1.0))) < 1e-6);
}
END_TEST

START_TEST(selection_equals_a_full_sort_and_weights_sum_to_the_scaling) {
  uint64_t state = us_test_seed();
  for (int trial = 0; trial < 200; trial++) {
    float *logits = new_values(48, 3, &state), *bias = new_values(48, 0.3f, &state), weights[8], sum = 0;
    if (trial % 3 == 0)
      for (int i = 0; i < 24; i++) logits[i * 2] = 0.25f, bias[i * 2] = 0;
    uint32_t ids[8];
    us_router_select(
        &(struct us_router_args){
            .logits = logits, .bias = bias, .E = 48, .K = 8, .normalise = true, .scaling = 2.5f},
        ids, weights);
    for (uint32_t e = 0, at = 0; e < 48; e++) {
      int better = 0;
      float mine = 1.0f / (1.0f + expf(-logits[e])) + bias[e];
      for (uint32_t other = 0; other < 48; other++) {
        float theirs = 1.0f / (1.0f + expf(-logits[other])) + bias[other];
        if (theirs > mine || (theirs == mine && other < e)) better++;
      }
      bool chosen = at < 8 && ids[at] == e;
      ck_assert_msg(chosen == (better < 8), "expert %u of trial %d", e, trial);
      if (chosen) at++;
    }
    for (int i = 0; i < 8; i++) sum += weights[i];
    ck_assert(fabsf(sum - 2.5f) < 1e-5f);
    free(logits);
    free(bias);
  }
}
END_TEST

START_TEST(a_nan_logit_is_not_chosen_before_numbers) {
  float logits[4] = {NAN, -3, -4, NAN}, weights[2];
  uint32_t ids[2];
  us_router_select(
      &(struct us_router_args){.logits = logits, .E = 4, .K = 2, .normalise = true, .scaling = 1}, ids,
      weights);
  ck_assert(ids[0] == 1 && ids[1] == 2);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("router");
  tcase_add_test(c, ties_go_to_the_lowest_id);
  tcase_add_test(c, the_bias_chooses_but_does_not_weigh);
  tcase_add_test(c, selection_equals_a_full_sort_and_weights_sum_to_the_scaling);
  tcase_add_test(c, a_nan_logit_is_not_chosen_before_numbers);
  return us_suite("router", c);
}
US_TEST_MAIN(make_suite)
