/* t_philox.c: Philox against Random123's published vectors, the logarithm against long double. */
#include "base/philox.h"
#include "suite.h"

#include <math.h>

/* Random123 1.14, tests/kat_vectors, "philox4x32 10". */
static const struct {
  uint32_t counter[4], key[2], out[4];
} known[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

START_TEST(the_block_function_gives_the_published_vectors) {
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
    uint32_t out[4];
    us_philox4x32(known[i].counter, known[i].key, out);
    for (int j = 0; j < 4; j++) ck_assert_uint_eq(out[j], known[i].out[j]);
  }
}
END_TEST

START_TEST(the_output_may_overwrite_the_counter) {
  uint32_t words[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
  us_philox4x32(words, known[2].key, words);
  for (int j = 0; j < 4; j++) ck_assert_uint_eq(words[j], known[2].out[j]);
}
END_TEST

START_TEST(a_token_draws_its_word_of_the_quad) {
  struct us_philox_key key = us_philox_key(0x299f31d0a4093822ull);
  ck_assert_uint_eq(key.word[0], 0xa4093822u);
  uint32_t out[4];
  /* Counter (position, sample, token / 4, stream). */
  us_philox_quad(key, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, out);
  for (uint32_t j = 0; j < 4; j++) {
    ck_assert_uint_eq(out[j], known[2].out[j]);
    ck_assert_uint_eq(us_philox_token(key, 0x243f6a88, 0x85a308d3, 4 * 0x13198a2eu + j, 0x03707344), out[j]);
  }
}
END_TEST

START_TEST(uniforms_have_the_documented_range) {
  ck_assert_double_eq(us_uniform(0), 0x1p-24);
  ck_assert_double_eq(us_uniform(0xffffffffu), 1 - 0x1p-24);
  ck_assert_double_eq(us_uniform_curand(0), 0x1p-33);
  ck_assert_double_eq(us_uniform_curand(0xffffffffu), 1.0);
  ck_assert_uint_eq(us_uniform_index(0xffffffffu, 7), 6);
  ck_assert_uint_eq(us_uniform_index(0, 7), 0);
  ck_assert_uint_eq(us_uniform_index(0x80000000u, 10), 5);
}
END_TEST

START_TEST(uniforms_have_the_moments_of_the_uniform_law) {
  struct us_philox_key key = us_philox_key(us_test_seed());
  double sum = 0, squares = 0;
  enum { N = 1 << 20 };
  for (uint32_t i = 0; i < N; i++) {
    double u = us_uniform(us_philox_token(key, 0, 0, i, US_STREAM_SAMPLE)) - 0.5;
    sum += u;
    squares += u * u;
  }
  /* Five standard errors: sqrt(1/12/N) and sqrt(1/180/N). */
  ck_assert_double_lt(fabs(sum / N), 5 * sqrt(1.0 / 12 / N));
  ck_assert_double_lt(fabs(squares / N - 1.0 / 12), 5 * sqrt(1.0 / 180 / N));
}
END_TEST

static double ulps_of_log(float x) {
  long double exact = logl((long double)x);
  float got = us_logf(x);
  if (exact == 0) return got == 0 ? 0 : INFINITY;
  int exponent;
  frexpl(exact, &exponent);
  return (double)(fabsl(got - exact) / ldexpl(1, exponent - 24));
}

START_TEST(the_logarithm_is_within_its_documented_error_everywhere) {
  double worst = 0;
  float at = 0;
  /* Every 997th positive float, subnormals included, and every one of the 2^18 next to 1 where the result
   * cancels. */
  for (uint32_t bits = 1; bits < 0x7f800000u; bits += 997) {
    double error = ulps_of_log(us_float_from_bits(bits));
    if (error > worst) worst = error, at = us_float_from_bits(bits);
  }
  for (uint32_t bits = 0x3f000000u; bits < 0x40000000u; bits++) {
    double error = ulps_of_log(us_float_from_bits(bits));
    if (error > worst) worst = error, at = us_float_from_bits(bits);
  }
  fprintf(stderr, "us_logf: at most %.4f ulp, at %a\n", worst, (double)at);
  ck_assert_double_le(worst, 0.86);
}
END_TEST

START_TEST(the_logarithm_of_one_is_exactly_zero) {
  ck_assert_uint_eq(us_float_bits(us_logf(1.0f)), 0);
}
END_TEST

START_TEST(the_logarithm_of_what_has_none_is_as_in_ieee_754) {
  ck_assert(us_logf(0.0f) == -INFINITY);
  ck_assert(us_logf(-0.0f) == -INFINITY);
  ck_assert(us_logf(INFINITY) == INFINITY);
  ck_assert(isnan(us_logf(-INFINITY)));
  ck_assert(isnan(us_logf(-1.0f)));
  ck_assert(isnan(us_logf(-0x1p-149f)));
  ck_assert(isnan(us_logf(NAN)));
}
END_TEST

START_TEST(gumbel_noise_follows_its_formula) {
  for (uint64_t i = 0; i <= 0xffffffffu; i += 0xfffb) {
    uint32_t bits = (uint32_t)i;
    long double w = ((long double)bits + 0.5L) * 0x1p-32L;
    long double exponential = -log1pl(-w), noise = -logl(exponential);
    ck_assert_double_lt((double)(fabsl(us_exponential_bits(bits) - exponential) / exponential), 4e-7);
    ck_assert_double_lt((double)fabsl(us_gumbel_bits(bits) - noise), 4e-7 + 2e-7 * (double)fabsl(noise));
    float u = us_uniform(bits);
    long double direct = -logl(-logl((long double)u));
    ck_assert_double_lt((double)fabsl(us_gumbel(u) - direct), 4e-7 + 2e-7 * (double)fabsl(direct));
  }
}
END_TEST

START_TEST(gumbel_noise_is_finite_and_rising_at_the_ends) {
  ck_assert_double_eq_tol(us_gumbel_bits(0), 33 * log(2), 1e-5);
  ck_assert_double_eq_tol(us_gumbel_bits(0xffffffffu), -log(33 * log(2)), 1e-5);
  ck_assert(us_gumbel_bits(0) > us_gumbel_bits(1));
  ck_assert(us_gumbel_bits(0xfffffffeu) > us_gumbel_bits(0xffffffffu));
}
END_TEST

START_TEST(gumbel_max_draws_from_the_softmax) {
  /* Four tokens with probabilities 0.5, 0.3, 0.15, 0.05; chi-square with 3 degrees of freedom, 1e-6
   * quantile 30.7. */
  const double p[4] = {0.5, 0.3, 0.15, 0.05};
  struct us_philox_key key = us_philox_key(us_test_seed());
  enum { N = 200000 };
  int count[4] = {0};
  for (uint32_t position = 0; position < N; position++) {
    uint32_t words[4];
    us_philox_quad(key, position, 0, 0, US_STREAM_SAMPLE, words);
    int best = 0;
    float best_score = -INFINITY;
    for (int i = 0; i < 4; i++) {
      float score = us_logf((float)p[i]) + us_gumbel_bits(words[i]);
      if (score > best_score) best = i, best_score = score;
    }
    count[best]++;
  }
  double chi2 = 0;
  for (int i = 0; i < 4; i++) chi2 += (count[i] - N * p[i]) * (count[i] - N * p[i]) / (N * p[i]);
  ck_assert_double_lt(chi2, 30.7);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("philox");
  tcase_add_test(c, the_block_function_gives_the_published_vectors);
  tcase_add_test(c, the_output_may_overwrite_the_counter);
  tcase_add_test(c, a_token_draws_its_word_of_the_quad);
  tcase_add_test(c, uniforms_have_the_documented_range);
  tcase_add_test(c, uniforms_have_the_moments_of_the_uniform_law);
  tcase_add_test(c, the_logarithm_is_within_its_documented_error_everywhere);
  tcase_add_test(c, the_logarithm_of_one_is_exactly_zero);
  tcase_add_test(c, the_logarithm_of_what_has_none_is_as_in_ieee_754);
  tcase_add_test(c, gumbel_noise_follows_its_formula);
  tcase_add_test(c, gumbel_noise_is_finite_and_rising_at_the_ends);
  tcase_add_test(c, gumbel_max_draws_from_the_softmax);
  return us_suite("philox", c);
}
US_TEST_MAIN(make_suite)
