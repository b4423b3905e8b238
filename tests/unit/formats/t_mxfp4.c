/* t_mxfp4: the MXFP4 codec against a slow definition in FP64, published golden values, and published
 * statistics. */
#include "formats/mxfp4.h"

#include "gauss.h"
#include "suite.h"

#include <math.h>

static const double grid[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
static const enum us_scale_rule stable_rules[] = {US_SCALE_MSE, US_SCALE_FLOOR, US_SCALE_EVEN,
                                                  US_SCALE_R7_25};

/* ---- the definition: OCP MX v1.0 section 6.3 with rounding to nearest even, in exact FP64 ---- */

static int slow_code(double scaled) {
  double m = fmin(fabs(scaled), 8); /* beyond 8 the differences below would round */
  int best = 0;
  for (int c = 1; c < 8; c++) {
    double gain = fabs(m - grid[best]) - fabs(m - grid[c]);
    if (gain > 0 || (gain == 0 && c % 2 == 0)) best = c;
  }
  return best | (signbit(scaled) ? 8 : 0);
}

/* The smallest s with limit * 2^s >= a. */
static int ceil_exponent(double a, double limit) {
  int s = -400;
  while (ldexp(limit, s) < a) s++;
  return s;
}

static int slow_scale(double a, enum us_scale_rule rule) {
  int exponent;
  if (a == 0) return 0;
  double m = frexp(a, &exponent); /* a = m * 2^exponent, m in [.5, 1): floor(log2 a) = exponent - 1 */
  int s = exponent - 1 - 2;
  if (rule == US_SCALE_EVEN) {
    frexp(ldexp(rint(m * 4) / 4, exponent), &exponent);
    s = exponent - 1 - 2;
  }
  if (rule == US_SCALE_RCEIL) s = ceil_exponent(a, 6);
  if (rule == US_SCALE_R7_25) s = ceil_exponent(a, 7.25);
  int byte = s + 127;
  return byte < 0 ? 0 : byte > 254 ? 254 : byte;
}

static long double slow_error(const float *w, int byte) {
  long double sum = 0;
  for (int i = 0; i < 32; i++) {
    int code = slow_code(ldexp((double)w[i], 127 - byte));
    long double error =
        (long double)ldexp(code & 8 ? -grid[code & 7] : grid[code], byte - 127) - (long double)w[i];
    sum += error * error;
  }
  return sum;
}

static int slow_block_scale(const float *w, enum us_scale_rule rule) {
  double a = 0;
  for (int i = 0; i < 32; i++) a = fmax(a, fabs((double)w[i]));
  int byte = slow_scale(a, rule);
  if (rule != US_SCALE_MSE) return byte;
  return slow_error(w, byte + 1) < slow_error(w, byte) ? byte + 1 : byte;
}

static int code_at(const uint8_t *codes, size_t i) {
  return codes[i / 2] >> (i % 2 * 4) & 15;
}

static void encode(const float *w, size_t K, enum us_scale_rule rule, uint8_t *codes, uint8_t *scales) {
  struct us_err err = {0};
  ck_assert_msg(us_mxfp4_encode(w, K, rule, codes, scales, &err) == US_OK, "%s", err.message);
}

/* ---- scalars ---- */

START_TEST(codes_are_the_nearest_values_with_ties_to_even_for_every_fp32_up_to_16) {
  uint32_t last = us_f32_bits(16.0f);
  for (uint32_t bits = us_f32_bits(0.125f); bits <= last; bits++) {
    int expected = slow_code((double)us_f32_from_bits(bits)), got = us_e2m1_from_f32(us_f32_from_bits(bits));
    if (got != expected)
      ck_abort_msg("%a: code %d, expected %d", (double)us_f32_from_bits(bits), got, expected);
  }
}
END_TEST

START_TEST(codes_of_every_bf16_value_equal_the_definition) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    float x = us_bf16_to_f32((uint16_t)h);
    if (isfinite(x)) ck_assert_int_eq(us_e2m1_from_f32(x), slow_code((double)x));
  }
}
END_TEST

START_TEST(both_sides_of_every_midpoint_round_apart) {
  const float middle[] = {.25f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  const int tie[] = {0, 2, 2, 4, 4, 6, 6};
  for (int i = 0; i < 7; i++) {
    ck_assert_int_eq(us_e2m1_from_f32(nextafterf(middle[i], 0)), i);
    ck_assert_int_eq(us_e2m1_from_f32(middle[i]), tie[i]);
    ck_assert_int_eq(us_e2m1_from_f32(nextafterf(middle[i], 9)), i + 1);
    ck_assert_int_eq(us_e2m1_from_f32(-middle[i]), tie[i] | 8);
  }
}
END_TEST

START_TEST(scale_bytes_decode_to_powers_of_two_and_their_inverses) {
  for (int b = 0; b < 255; b++) {
    ck_assert_double_eq((double)us_e8m0_to_f32((uint8_t)b), ldexp(1, b - 127));
    ck_assert_double_eq((double)us_e8m0_inverse((uint8_t)b), ldexp(1, 127 - b));
  }
  ck_assert_uint_eq(us_f32_bits(us_e8m0_inverse(254)), 0x00400000);
  ck_assert(isnan(us_e8m0_to_f32(255)) && isnan(us_e8m0_inverse(255)));
}
END_TEST

START_TEST(scale_rules_equal_their_definition_for_every_bf16_and_its_fp32_neighbours) {
  for (uint32_t h = 0; h < 0x7f80; h++)
    for (int delta = -1; delta <= 1; delta++) {
      uint32_t bits = (h << 16) + (uint32_t)delta;
      if (bits >= 0x7f800000u) continue;
      float a = us_f32_from_bits(bits);
      for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
        int expected = slow_scale((double)a, (enum us_scale_rule)rule);
        int got = us_mxfp4_scale_byte(a, (enum us_scale_rule)rule);
        if (got != expected)
          ck_abort_msg("%a, %s: %d, expected %d", (double)a, us_scale_rule_name((enum us_scale_rule)rule),
                       got, expected);
      }
    }
}
END_TEST

/* ---- golden bytes ---- */

struct golden {
  double amax;
  int floor[2], even[2], rceil[2], r7_25[2], mse[2]; /* scale byte, code of the maximum */
};

/* A block of amax and 31 zeros. MSE takes the lower scale where both err alike (1.75, 3.5 and 7 lie in the
 * middle). */
static const struct golden goldens[] = {
    {1, {125, 6}, {125, 6}, {125, 6}, {125, 6}, {125, 6}},
    {1.75, {125, 7}, {126, 6}, {126, 6}, {125, 7}, {125, 7}},
    {3, {126, 7}, {126, 7}, {126, 7}, {126, 7}, {126, 7}},
    {3.5, {126, 7}, {127, 6}, {127, 6}, {126, 7}, {126, 7}},
    {6, {127, 7}, {127, 7}, {127, 7}, {127, 7}, {127, 7}},
    {6.03125, {127, 7}, {127, 7}, {128, 5}, {127, 7}, {127, 7}},
    {7, {127, 7}, {128, 6}, {128, 6}, {127, 7}, {127, 7}},
    {7.28, {127, 7}, {128, 6}, {128, 6}, {128, 6}, {128, 6}},
    {8, {128, 6}, {128, 6}, {128, 6}, {128, 6}, {128, 6}},
    {0x1p-127, {0, 2}, {0, 2}, {0, 2}, {0, 2}, {0, 2}},
    {0x3p-127, {0, 5}, {0, 5}, {0, 5}, {0, 5}, {0, 5}},
    {0x6p-127, {0, 7}, {0, 7}, {0, 7}, {0, 7}, {0, 7}},
    {0x1p-130, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}},
    {0x1p-149, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}},
    {0x1.fep127, {252, 7}, {253, 6}, {253, 6}, {253, 6}, {253, 6}}, /* the largest bf16 */
};

static const int *golden_of(const struct golden *g, enum us_scale_rule rule) {
  switch (rule) {
  case US_SCALE_FLOOR:
    return g->floor;
  case US_SCALE_EVEN:
    return g->even;
  case US_SCALE_RCEIL:
    return g->rceil;
  case US_SCALE_R7_25:
    return g->r7_25;
  default:
    return g->mse;
  }
}

START_TEST(golden_blocks_have_their_published_bytes) {
  for (size_t i = 0; i < sizeof goldens / sizeof *goldens; i++)
    for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++)
      for (int sign = 0; sign < 2; sign++) {
        float w[32] = {0};
        w[i % 32] = (float)(sign ? -goldens[i].amax : goldens[i].amax);
        uint8_t codes[16], scale;
        encode(w, 32, (enum us_scale_rule)rule, codes, &scale);
        const int *expected = golden_of(&goldens[i], (enum us_scale_rule)rule);
        ck_assert_msg(scale == expected[0] && code_at(codes, i % 32) == (expected[1] | sign << 3),
                      "%a, %s: %d/%d, expected %d/%d", goldens[i].amax,
                      us_scale_rule_name((enum us_scale_rule)rule), scale, code_at(codes, i % 32),
                      expected[0], expected[1]);
      }
}
END_TEST

START_TEST(the_published_ties_vector_rounds_as_published) {
  const float in[] = {0, .25f, .4f, .75f, 1.25f, 1.4f, 1.75f, 2.5f, 2.9f, 3.5f, 5, 5.1f};
  const float out[] = {0, 0, .5f, 1, 1, 1.5f, 2, 2, 3, 4, 4, 6};
  float w[32] = {[31] = 6}, back[32]; /* the 6 pins the scale at 1 */
  uint8_t codes[16], scale;
  memcpy(w, in, sizeof in);
  for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
    encode(w, 32, (enum us_scale_rule)rule, codes, &scale);
    ck_assert_int_eq(scale, 127);
    us_mxfp4_decode(codes, &scale, 32, back);
    for (int i = 0; i < 12; i++) ck_assert_float_eq(back[i], out[i]);
  }
}
END_TEST

START_TEST(the_even_rule_rounds_the_maximum_to_the_published_power_of_two) {
  const float amax[] = {5.69f, 7.29f, 8.57f}, power[] = {4, 8, 8};
  for (int i = 0; i < 3; i++)
    ck_assert_float_eq(us_e8m0_to_f32(us_mxfp4_scale_byte(amax[i], US_SCALE_EVEN)) * 4, power[i]);
}
END_TEST

START_TEST(an_all_zero_block_has_scale_byte_0_and_keeps_its_signs) {
  float w[64] = {[3] = -0.0f};
  uint8_t codes[32], scales[2];
  for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
    encode(w, 64, (enum us_scale_rule)rule, codes, scales);
    ck_assert_int_eq(scales[0] | scales[1], 0);
    for (int i = 0; i < 64; i++) ck_assert_int_eq(code_at(codes, (size_t)i), i == 3 ? 8 : 0);
  }
}
END_TEST

START_TEST(the_low_nibble_is_the_even_element) {
  float w[32] = {6, 1, -0.5f, 3};
  uint8_t codes[16], scale;
  encode(w, 32, US_SCALE_FLOOR, codes, &scale);
  ck_assert_int_eq(codes[0], 0x27);
  ck_assert_int_eq(codes[1], 0x59);
}
END_TEST

/* ---- non-finite values, bad arguments ---- */

START_TEST(nan_and_inf_are_refused_by_index) {
  const float bad[] = {NAN, INFINITY, -INFINITY};
  for (int i = 0; i < 3; i++)
    for (size_t at = 0; at < 96; at += 19) {
      float w[96];
      uint8_t codes[48], scales[3];
      for (int k = 0; k < 96; k++) w[k] = 1;
      w[at] = bad[i];
      struct us_err err = {0};
      ck_assert_int_eq(us_mxfp4_encode(w, 96, US_SCALE_MSE, codes, scales, &err), US_ERR_INPUT);
      char expected[64];
      snprintf(expected, sizeof expected, "value %zu is %s", at, i ? "Inf" : "NaN");
      ck_assert_str_eq(err.message, expected);
    }
}
END_TEST

START_TEST(a_row_that_is_not_whole_groups_is_refused) {
  float w[48] = {0};
  uint8_t codes[24], scales[2];
  struct us_err err = {0};
  ck_assert_int_eq(us_mxfp4_encode(w, 48, US_SCALE_MSE, codes, scales, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_mxfp4_encode(w, 32, US_SCALE_RULE_COUNT, codes, scales, &err), US_ERR_USAGE);
}
END_TEST

START_TEST(scale_byte_255_decodes_to_nan_and_fails_the_check) {
  uint8_t codes[32] = {0}, scales[2] = {100, 255};
  float back[64];
  us_mxfp4_decode(codes, scales, 64, back);
  for (int i = 0; i < 32; i++) ck_assert(back[i] == 0 && isnan(back[32 + i]));
  struct us_err err = {0};
  ck_assert_int_eq(us_mxfp4_check(codes, scales, 64, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "scale byte 255 is NaN (block 1)");
}
END_TEST

START_TEST(the_check_refuses_exactly_the_values_that_overflow_fp32) {
  for (int b = 250; b < 255; b++)
    for (int c = 0; c < 16; c++) {
      uint8_t codes[16] = {[9] = (uint8_t)(c << 4)}, scale = (uint8_t)b;
      float back[32];
      us_mxfp4_decode(codes, &scale, 32, back);
      struct us_err err = {0};
      enum us_status expected = isfinite(back[19]) ? US_OK : US_ERR_INPUT;
      ck_assert_int_eq(us_mxfp4_check(codes, &scale, 32, &err), expected);
    }
}
END_TEST

START_TEST(rules_have_names_that_parse) {
  struct us_err err = {0};
  for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
    enum us_scale_rule parsed = US_SCALE_RULE_COUNT;
    ck_assert_int_eq(us_scale_rule_parse(us_scale_rule_name((enum us_scale_rule)rule), &parsed, &err), US_OK);
    ck_assert_int_eq(parsed, rule);
  }
  enum us_scale_rule parsed;
  ck_assert_int_eq(us_scale_rule_parse("round", &parsed, &err), US_ERR_USAGE);
  ck_assert_ptr_nonnull(strstr(err.message, "mse, floor, even, rceil, r7.25"));
  ck_assert_ptr_null(us_scale_rule_name(US_SCALE_RULE_COUNT));
}
END_TEST

/* ---- whole blocks ---- */

START_TEST(blocks_of_every_magnitude_equal_the_definition) {
  uint64_t state = us_test_seed();
  for (int block = 0; block < 20000; block++) {
    float w[32];
    int exponent = (int)(test_next(&state) % 286) - 152, coarse = block % 2;
    test_gauss_bf16(&state, 32, w);
    for (int i = 0; i < 32; i++) {
      float fine = coarse ? w[i] : w[i] * (float)(1 + test_uniform(&state) / 64); /* ties, and not */
      w[i] = (float)fmax(-0x1.fep127, fmin(0x1.fep127, ldexp((double)fine, exponent)));
    }
    for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
      uint8_t codes[16], scale;
      encode(w, 32, (enum us_scale_rule)rule, codes, &scale);
      int expected = slow_block_scale(w, (enum us_scale_rule)rule);
      ck_assert_msg(scale == expected, "%s: byte %d, expected %d",
                    us_scale_rule_name((enum us_scale_rule)rule), scale, expected);
      for (size_t i = 0; i < 32; i++)
        ck_assert_int_eq(code_at(codes, i), slow_code(ldexp((double)w[i], 127 - scale)));
    }
  }
}
END_TEST

START_TEST(decode_is_exact_for_all_16_codes_and_255_scales) {
  for (int b = 0; b < 255; b++) {
    uint8_t codes[16], scale = (uint8_t)b;
    float back[32];
    for (int i = 0; i < 16; i++) codes[i] = (uint8_t)(i * 17);
    us_mxfp4_decode(codes, &scale, 32, back);
    for (int c = 0; c < 16; c++) {
      double value = ldexp(grid[c & 7], b - 127), expected = c & 8 ? -value : value;
      if (value >= 0x1p128) expected = c & 8 ? -INFINITY : INFINITY;
      ck_assert_double_eq((double)back[2 * c], expected);
      ck_assert_int_eq(signbit(back[2 * c + 1]) != 0, c >= 8);
      if (isfinite(back[2 * c])) ck_assert_float_eq(us_bf16_round(back[2 * c]), back[2 * c]);
    }
  }
}
END_TEST

START_TEST(encode_of_decode_keeps_all_16_codes_at_255_scales) {
  for (int b = 0; b < 255; b++)
    for (int c = 0; c < 16; c++) {
      /* The second value pins the scale: 6, or the largest that is finite at bytes 253 and 254. */
      int pin = b < 253 ? 7 : b == 253 ? 5 : 3;
      if ((c & 7) > pin) continue;
      uint8_t codes[16] = {(uint8_t)(c | pin << 4)}, scale = (uint8_t)b, codes2[16], scale2;
      float w[32], back[32];
      us_mxfp4_decode(codes, &scale, 32, w);
      for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
        encode(w, 32, (enum us_scale_rule)rule, codes2, &scale2);
        us_mxfp4_decode(codes2, &scale2, 32, back);
        ck_assert(memcmp(w, back, sizeof w) == 0);
        if (b < 253) ck_assert(scale2 == scale && memcmp(codes, codes2, 16) == 0);
      }
    }
}
END_TEST

START_TEST(encoding_again_keeps_every_value_whichever_rules_made_it) {
  enum { K = 32 * 2000 };
  float *w = malloc(K * sizeof *w), *once = malloc(K * sizeof *w), *twice = malloc(K * sizeof *w);
  uint8_t *codes = malloc(K), *scales = malloc(K);
  uint64_t state = us_test_seed();
  test_gauss_bf16(&state, K, w);
  for (int first = 0; first < US_SCALE_RULE_COUNT; first++)
    for (int second = 0; second < US_SCALE_RULE_COUNT; second++) {
      encode(w, K, (enum us_scale_rule)first, codes, scales);
      us_mxfp4_decode(codes, scales, K, once);
      encode(once, K, (enum us_scale_rule)second, codes, scales);
      us_mxfp4_decode(codes, scales, K, twice);
      ck_assert(memcmp(once, twice, K * sizeof *w) == 0);
    }
  free(w), free(once), free(twice), free(codes), free(scales);
}
END_TEST

/* Share of blocks whose scale byte changes when values made by `first` are encoded by `second`. */
static double moved_bytes(enum us_scale_rule first, enum us_scale_rule second) {
  enum { K = 32 * 10000 };
  float *w = malloc(K * sizeof *w);
  uint8_t *codes = malloc(K), *scales = malloc(K / 32), *again = malloc(K / 32);
  uint64_t state = us_test_seed();
  int moved = 0;
  test_gauss_bf16(&state, K, w);
  encode(w, K, first, codes, scales);
  us_mxfp4_decode(codes, scales, K, w);
  encode(w, K, second, codes, again);
  for (int g = 0; g < K / 32; g++) moved += scales[g] != again[g];
  free(w), free(codes), free(scales), free(again);
  return moved / (K / 32.0);
}

START_TEST(all_rules_but_rceil_keep_the_bytes_of_already_encoded_values) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) ck_assert_double_eq(moved_bytes(stable_rules[i], stable_rules[j]), 0);
}
END_TEST

START_TEST(rceil_moves_27_percent_of_the_bytes_of_its_own_output) {
  ck_assert_double_eq_tol(moved_bytes(US_SCALE_RCEIL, US_SCALE_RCEIL), 0.27, 0.02);
}
END_TEST

START_TEST(gaussian_weights_have_the_published_signal_to_noise_and_clipping) {
  static const struct {
    enum us_scale_rule rule;
    double sqnr_db, clipped, zeroed;
  } published[] = {{US_SCALE_FLOOR, 18.86, .415, .081},
                   {US_SCALE_RCEIL, 18.54, 0, .112},
                   {US_SCALE_EVEN, 19.00, .27, .092},
                   {US_SCALE_R7_25, 19.06, .32, .088},
                   {US_SCALE_MSE, 19.06, .32, .088}};
  enum { BLOCKS = 60000 };
  for (size_t p = 0; p < sizeof published / sizeof *published; p++) {
    uint64_t state = us_test_seed();
    double signal = 0, noise = 0, clipped = 0, zeroed = 0;
    for (int block = 0; block < BLOCKS; block++) {
      float w[32], back[32];
      uint8_t codes[16], scale;
      test_gauss_bf16(&state, 32, w);
      encode(w, 32, published[p].rule, codes, &scale);
      us_mxfp4_decode(codes, &scale, 32, back);
      int clips = 0;
      for (int i = 0; i < 32; i++) {
        signal += (double)w[i] * (double)w[i];
        noise += ((double)back[i] - (double)w[i]) * ((double)back[i] - (double)w[i]);
        clips |= fabsf(w[i]) > 6 * us_e8m0_to_f32(scale);
        zeroed += w[i] != 0 && back[i] == 0;
      }
      clipped += clips;
    }
    ck_assert_double_eq_tol(10 * log10(signal / noise), published[p].sqnr_db, 0.05);
    ck_assert_double_eq_tol(clipped / BLOCKS, published[p].clipped, 0.015);
    ck_assert_double_eq_tol(zeroed / (BLOCKS * 32.0), published[p].zeroed, 0.003);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("mxfp4");
  tcase_add_test(c, codes_are_the_nearest_values_with_ties_to_even_for_every_fp32_up_to_16);
  tcase_add_test(c, codes_of_every_bf16_value_equal_the_definition);
  tcase_add_test(c, both_sides_of_every_midpoint_round_apart);
  tcase_add_test(c, scale_bytes_decode_to_powers_of_two_and_their_inverses);
  tcase_add_test(c, scale_rules_equal_their_definition_for_every_bf16_and_its_fp32_neighbours);
  tcase_add_test(c, golden_blocks_have_their_published_bytes);
  tcase_add_test(c, the_published_ties_vector_rounds_as_published);
  tcase_add_test(c, the_even_rule_rounds_the_maximum_to_the_published_power_of_two);
  tcase_add_test(c, an_all_zero_block_has_scale_byte_0_and_keeps_its_signs);
  tcase_add_test(c, the_low_nibble_is_the_even_element);
  tcase_add_test(c, nan_and_inf_are_refused_by_index);
  tcase_add_test(c, a_row_that_is_not_whole_groups_is_refused);
  tcase_add_test(c, scale_byte_255_decodes_to_nan_and_fails_the_check);
  tcase_add_test(c, the_check_refuses_exactly_the_values_that_overflow_fp32);
  tcase_add_test(c, rules_have_names_that_parse);
  tcase_add_test(c, blocks_of_every_magnitude_equal_the_definition);
  tcase_add_test(c, decode_is_exact_for_all_16_codes_and_255_scales);
  tcase_add_test(c, encode_of_decode_keeps_all_16_codes_at_255_scales);
  tcase_add_test(c, encoding_again_keeps_every_value_whichever_rules_made_it);
  tcase_add_test(c, all_rules_but_rceil_keep_the_bytes_of_already_encoded_values);
  tcase_add_test(c, rceil_moves_27_percent_of_the_bytes_of_its_own_output);
  tcase_add_test(c, gaussian_weights_have_the_published_signal_to_noise_and_clipping);
  return us_suite("mxfp4", c);
}
US_TEST_MAIN(make_suite)
