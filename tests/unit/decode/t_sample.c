/* t_sample.c: filters against a sort, draws against the law, our exponential against libm's. */
#include "decode/sample.h"
#include "stats.h"
#include "suite.h"

#include <math.h>

enum { N = 97 };

static uint32_t word(uint32_t a, uint32_t b) {
  return us_philox_token(us_philox_key(us_test_seed()), a, b, 0, 77);
}

/* Logits on a coarse grid, so that there are many ties. */
static void random_logits(uint32_t seed, float *logits) {
  float step = seed % 3 == 0 ? 1.0f : 0.125f;
  for (uint32_t i = 0; i < N; i++) logits[i] = (float)((int)(word(seed, i) % 120) - 90) * step;
}

static const float *sort_logits;

static int by_logit_then_id(const void *a, const void *b) {
  uint32_t i = *(const uint32_t *)a, j = *(const uint32_t *)b;
  if (sort_logits[i] != sort_logits[j]) return sort_logits[i] > sort_logits[j] ? -1 : 1;
  return i < j ? -1 : 1;
}

/* The filtered set by sorting and summing doubles: how many of the sorted ids are kept. *ret_margin is how close a sum or
 * a ratio came to its limit. */
static size_t oracle_filter(const float *logits, const struct us_sampling *s, uint32_t *order,
                            double *ret_margin) {
  double mass[N], sum = 0.0, total = 0.0;
  for (uint32_t i = 0; i < N; i++) order[i] = i;
  sort_logits = logits;
  qsort(order, N, sizeof *order, by_logit_then_id);
  size_t kept = s->top_k && s->top_k < N ? s->top_k : N, n = 0;
  *ret_margin = 1.0;
  for (size_t i = 0; i < kept; i++) {
    mass[i] = exp(((double)logits[order[i]] - (double)logits[order[0]]) / (double)s->temperature);
    total += mass[i];
  }
  if (s->top_p > 0.0f && s->top_p < 1.0f) {
    while (n < kept && sum < (double)s->top_p * total) {
      sum += mass[n++];
      *ret_margin = fmin(*ret_margin, fabs(sum / total - (double)s->top_p));
    }
    kept = n;
  }
  for (n = 0; n < kept && mass[n] >= (double)s->min_p; n++)
    if (s->min_p > 0.0f) *ret_margin = fmin(*ret_margin, fabs(mass[n] - (double)s->min_p));
  return s->min_p > 0.0f ? n : kept;
}

START_TEST(filters_keep_what_a_sort_keeps) {
  static const struct us_sampling cases[] = {
      {1.0f, 5, 1.0f, 0.0f},   {1.0f, 0, 0.9f, 0.0f},  {0.7f, 20, 0.8f, 0.0f},  {1.3f, 0, 1.0f, 0.05f},
      {1.0f, 40, 0.95f, 0.1f}, {5.0f, 1, 0.5f, 0.5f},  {50.0f, 0, 0.5f, 0.02f}, {1.0f, N, 0.0f, 0.0f},
      {0.3f, 96, 0.99f, 0.2f}, {90.0f, 7, 0.6f, 0.0f},
  };
  float logits[N];
  uint32_t order[N];
  int checked = 0;
  for (uint32_t seed = 0; seed < 300; seed++) {
    const struct us_sampling *s = &cases[seed % (sizeof cases / sizeof *cases)];
    random_logits(seed, logits);
    double margin;
    size_t kept = oracle_filter(logits, s, order, &margin);
    if (margin < 1e-7) continue;
    struct us_cut cut = us_sample_cut(logits, N, s, logits[order[0]]);
    for (size_t i = 0; i < N; i++) ck_assert_int_eq(us_cut_keeps(cut, logits[order[i]], order[i]), i < kept);
    checked++;
  }
  ck_assert_int_gt(checked, 250);
}
END_TEST

START_TEST(ties_go_to_the_lowest_id) {
  float logits[N];
  for (int i = 0; i < N; i++) logits[i] = 1.0f;
  logits[3] = logits[8] = 2.0f;
  ck_assert_int_eq(us_sample_argmax(logits, N), 3);
  struct us_sampling three = {1.0f, 3, 1.0f, 0.0f};
  struct us_cut cut = us_sample_cut(logits, N, &three, 2.0f);
  for (uint32_t i = 0; i < N; i++)
    ck_assert_int_eq(us_cut_keeps(cut, logits[i], i), i == 0 || i == 3 || i == 8);
}
END_TEST

START_TEST(temperature_0_is_argmax_whatever_the_filters) {
  float logits[N];
  for (uint32_t seed = 0; seed < 50; seed++) {
    random_logits(seed, logits);
    struct us_sampling s = {0.0f, 3, 0.5f, 0.2f};
    ck_assert_int_eq(us_sample_token(logits, N, &s, us_noise_target(seed, 5, 0)),
                     us_sample_argmax(logits, N));
  }
}
END_TEST

START_TEST(nan_and_minus_infinity_are_never_drawn) {
  float logits[N];
  for (int i = 0; i < N; i++) logits[i] = i % 2 ? NAN : -INFINITY;
  logits[10] = -3.0f, logits[20] = -4.0f;
  struct us_sampling s = {1.0f, 0, 1.0f, 0.0f};
  for (uint32_t position = 0; position < 2000; position++) {
    int32_t token = us_sample_token(logits, N, &s, us_noise_target(1, position, 0));
    ck_assert(token == 10 || token == 20);
  }
}
END_TEST

START_TEST(keys_keep_the_order_of_floats) {
  static const float ascending[] = {-INFINITY, -3e38f, -1.0f, -1e-40f, 0.0f,
                                    1e-40f,    0.5f,   1.0f,  3e38f,   INFINITY};
  for (size_t i = 1; i < sizeof ascending / sizeof *ascending; i++)
    ck_assert_uint_lt(us_sample_key(ascending[i - 1]), us_sample_key(ascending[i]));
  ck_assert_uint_eq(us_sample_key(-0.0f), us_sample_key(0.0f));
  ck_assert_uint_lt(us_sample_key(NAN), us_sample_key(-INFINITY));
}
END_TEST

START_TEST(the_bound_that_skips_logarithms_never_changes_a_draw) {
  float logits[N];
  for (uint32_t seed = 0; seed < 3000; seed++) {
    random_logits(seed % 50, logits);
    struct us_sampling s = {seed % 2 ? 1.0f : 20.0f, seed % 7 ? 0 : 9, 1.0f, 0.0f};
    struct us_noise noise = us_noise_target(us_test_seed(), seed, 2);
    struct us_cut cut = us_sample_cut(logits, N, &s, logits[us_sample_argmax(logits, N)]);
    int32_t best = -1;
    float best_score = -INFINITY;
    for (uint32_t i = 0; i < N; i++) {
      uint32_t bits = us_philox_token(noise.key, seed, 2, i, US_STREAM_SAMPLE);
      float score = fmaf(logits[i], 1.0f / s.temperature, us_gumbel_bits(bits));
      if (us_cut_keeps(cut, logits[i], i) && score > best_score) best_score = score, best = (int32_t)i;
    }
    ck_assert_int_eq(us_sample_token(logits, N, &s, noise), best);
  }
}
END_TEST

START_TEST(the_bound_covers_the_noise_of_every_leading_bit) {
  for (int zeros = 0; zeros < 32; zeros++)
    for (uint32_t i = 0; i < 3; i++) {
      uint32_t top = 0x80000000u >> zeros, bits = i == 0   ? top
                                                  : i == 1 ? top | (top - 1)
                                                           : top | (word(3, i) & (top - 1));
      ck_assert(us_gumbel_bound(bits) >= us_gumbel_bits(bits));
    }
  ck_assert(us_gumbel_bound(0) >= us_gumbel_bits(0));
}
END_TEST

START_TEST(draws_follow_the_filtered_softmax) {
  enum { M = 12, DRAWS = 200000 };
  static const struct us_sampling cases[] = {
      {1.0f, 0, 1.0f, 0.0f}, {0.7f, 6, 0.9f, 0.01f}, {1.5f, 0, 0.8f, 0.0f}};
  float logits[M];
  for (int i = 0; i < M; i++) logits[i] = (float)(word(5, (uint32_t)i) % 1000) * 0.004f;
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    double counts[M] = {0}, law[M];
    us_sample_probs(logits, M, &cases[c], law);
    for (uint32_t position = 0; position < DRAWS; position++)
      counts[us_sample_token(logits, M, &cases[c], us_noise_target(us_test_seed(), position, 0))]++;
    for (int i = 0; i < M; i++) ck_assert(law[i] > 0.0 || counts[i] == 0.0);
    ck_assert_double_lt(fabs(g_test_z(counts, law, M)), 4.5);
  }
}
END_TEST

START_TEST(draws_from_weights_follow_them) {
  enum { M = 6, DRAWS = 200000 };
  static const double weights[M] = {0.0, 0.3, 0.01, 0.0, 1e-5, 0.2};
  double counts[M] = {0}, law[M];
  for (int i = 0; i < M; i++) law[i] = weights[i] / 0.51001;
  for (uint32_t position = 0; position < DRAWS; position++)
    counts[us_sample_weights(weights, M,
                             us_noise_round(us_test_seed(), position, 3, 0, US_STREAM_RESIDUAL))]++;
  ck_assert_double_eq(counts[0] + counts[3], 0.0);
  ck_assert_double_lt(fabs(g_test_z(counts, law, M)), 4.5);
}
END_TEST

START_TEST(uniforms_fill_the_unit_interval) {
  double counts[16] = {0}, law[16];
  for (int i = 0; i < 16; i++) law[i] = 1.0 / 16;
  for (uint32_t i = 0; i < 100000; i++) {
    double u = us_noise_uniform(us_noise_round(us_test_seed(), i, i % 7, 1, US_STREAM_ACCEPT));
    ck_assert(u >= 0.0 && u < 1.0);
    counts[(int)(u * 16)]++;
  }
  ck_assert_double_lt(fabs(g_test_z(counts, law, 16)), 4.5);
}
END_TEST

START_TEST(our_exponential_is_libms_to_a_few_ulps) {
  for (uint32_t i = 0; i < 100000; i++) {
    double x = -(double)word(9, i) * 0x1p-32 * (i % 2 ? 40.0 : 690.0), truth = exp(x);
    ck_assert_double_le(fabs(us_exp_negative(x) - truth), 1e-15 * truth);
  }
  ck_assert_double_eq(us_exp_negative(0.0), 1.0);
  ck_assert_double_eq(us_exp_negative(-INFINITY), 0.0);
}
END_TEST

START_TEST(probabilities_and_logprobs_are_the_softmax) {
  float logits[N];
  double probs[N];
  for (uint32_t seed = 1; seed < 20; seed++) {
    random_logits(seed, logits);
    struct us_sampling s = {0.9f, 0, 1.0f, 0.0f};
    us_sample_probs(logits, N, &s, probs);
    double max = (double)logits[us_sample_argmax(logits, N)], sum = 0.0, plain = 0.0;
    for (int i = 0; i < N; i++) {
      sum += exp(((double)logits[i] - max) / (double)0.9f);
      plain += exp((double)logits[i] - max);
    }
    for (int i = 0; i < N; i++) {
      /* weights are rounded to 2^-40 of the largest: half a unit each, in the token's and in all of the sum */
      double p = exp(((double)logits[i] - max) / (double)0.9f) / sum;
      ck_assert_double_eq_tol(probs[i], p, 0x1p-41 * (1.0 + N * p) / sum + 1e-14);
      ck_assert_float_eq_tol(us_sample_logprob(logits, N, i), (float)((double)logits[i] - max - log(plain)),
                             2e-5f);
    }
  }
}
END_TEST

START_TEST(noise_differs_by_every_part_of_its_key) {
  struct us_noise a = us_noise_round(1, 2, 3, 4, US_STREAM_DRAFT);
  struct us_noise others[] = {
      us_noise_round(2, 2, 3, 4, US_STREAM_DRAFT),  us_noise_round(1, 3, 3, 4, US_STREAM_DRAFT),
      us_noise_round(1, 2, 4, 4, US_STREAM_DRAFT),  us_noise_round(1, 2, 3, 5, US_STREAM_DRAFT),
      us_noise_round(1, 2, 3, 4, US_STREAM_ACCEPT), us_noise_target(1, 2, 4),
  };
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    ck_assert_double_ne(us_noise_uniform(a), us_noise_uniform(others[i]));
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("sample");
  tcase_add_test(c, filters_keep_what_a_sort_keeps);
  tcase_add_test(c, ties_go_to_the_lowest_id);
  tcase_add_test(c, temperature_0_is_argmax_whatever_the_filters);
  tcase_add_test(c, nan_and_minus_infinity_are_never_drawn);
  tcase_add_test(c, keys_keep_the_order_of_floats);
  tcase_add_test(c, the_bound_that_skips_logarithms_never_changes_a_draw);
  tcase_add_test(c, the_bound_covers_the_noise_of_every_leading_bit);
  tcase_add_test(c, draws_follow_the_filtered_softmax);
  tcase_add_test(c, draws_from_weights_follow_them);
  tcase_add_test(c, uniforms_fill_the_unit_interval);
  tcase_add_test(c, our_exponential_is_libms_to_a_few_ulps);
  tcase_add_test(c, probabilities_and_logprobs_are_the_softmax);
  tcase_add_test(c, noise_differs_by_every_part_of_its_key);
  return us_suite("sample", c);
}
US_TEST_MAIN(make_suite)
