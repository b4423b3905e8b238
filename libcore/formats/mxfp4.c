/* mxfp4.c: encode, decode and check MXFP4 rows, a group of 32 at a time. */
#include "formats/mxfp4.h"

static const char *const rule_names[US_SCALE_RULE_COUNT] = {
    [US_SCALE_MSE] = "mse",     [US_SCALE_FLOOR] = "floor", [US_SCALE_EVEN] = "even",
    [US_SCALE_RCEIL] = "rceil", [US_SCALE_R7_25] = "r7.25",
};

const char *us_scale_rule_name(enum us_scale_rule rule) {
  return (unsigned)rule < US_SCALE_RULE_COUNT ? rule_names[rule] : NULL;
}

enum us_status us_scale_rule_parse(const char *name, enum us_scale_rule *ret_rule, struct us_err *err) {
  for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++) {
    if (strcmp(name, rule_names[rule]) != 0) continue;
    *ret_rule = (enum us_scale_rule)rule;
    return US_OK;
  }
  return us_err_set(err, US_ERR_USAGE, "unknown scale rule '%s' (mse, floor, even, rceil, r7.25)", name);
}

/* Largest magnitude of a group as bits: magnitudes compare as integers, and any NaN or Inf comes out on top.
 */
static uint32_t group_max_bits(const float *w) {
  int32_t largest[4] = {0};
  for (int i = 0; i < US_MXFP4_GROUP; i += 4)
    for (int lane = 0; lane < 4; lane++) {
      int32_t magnitude = (int32_t)(us_f32_bits(w[i + lane]) & 0x7fffffffu);
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    }
  int32_t a = largest[0] > largest[1] ? largest[0] : largest[1];
  int32_t b = largest[2] > largest[3] ? largest[2] : largest[3];
  return (uint32_t)(a > b ? a : b);
}

/* The code of each value under scale byte `byte`. Multiplying by 2^(127-byte) is exact wherever it decides a
 * code. */
static void group_codes(const float *w, uint8_t byte, uint32_t *codes) {
  float inverse = us_e8m0_inverse(byte);
  for (int i = 0; i < US_MXFP4_GROUP; i++) codes[i] = us_e2m1_from_f32(w[i] * inverse);
}

/* Squared error in units of the group's lower candidate scale: four FP64 lanes, i mod 4, added as (0+1) +
 * (2+3). The FP32 differences are exact: a value and its code differ by less than the value, in steps of
 * the value's last bit. */
static double group_error(const float *w, float inverse, float unit, const uint32_t *codes) {
  float error[US_MXFP4_GROUP];
  for (int i = 0; i < US_MXFP4_GROUP; i++)
    error[i] = us_e2m1_to_f32((uint8_t)codes[i]) * unit - w[i] * inverse;
  double lane_sum[4] = {0};
  for (int i = 0; i < US_MXFP4_GROUP; i += 4)
    for (int lane = 0; lane < 4; lane++) lane_sum[lane] += (double)error[i + lane] * (double)error[i + lane];
  return (lane_sum[0] + lane_sum[1]) + (lane_sum[2] + lane_sum[3]);
}

/* Fill codes and return the scale byte. For MSE: when nothing is clipped at `byte`, the grid of byte + 1 is a
 * subset of byte's, so the lower candidate cannot lose and the search is skipped; that is 6 blocks in 10 of
 * Gaussian weights. */
static uint8_t group_encode(const float *w, uint32_t max_bits, enum us_scale_rule rule, uint32_t *codes) {
  uint8_t byte = us_mxfp4_scale_byte(us_f32_from_bits(max_bits), rule);
  group_codes(w, byte, codes);
  int clips = us_f32_from_bits(max_bits) * us_e8m0_inverse(byte) > 6.0f;
  if (rule != US_SCALE_MSE || !clips) return byte;

  uint32_t upper[US_MXFP4_GROUP];
  group_codes(w, (uint8_t)(byte + 1), upper);
  float inverse = us_e8m0_inverse(byte);
  if (group_error(w, inverse, 1.0f, codes) <= group_error(w, inverse, 2.0f, upper)) return byte;
  memcpy(codes, upper, sizeof upper);
  return (uint8_t)(byte + 1);
}

enum us_status us_mxfp4_encode(const float *w, size_t K, enum us_scale_rule rule, uint8_t *codes,
                               uint8_t *scales, struct us_err *err) {
  if (K % US_MXFP4_GROUP)
    return us_err_set(err, US_ERR_USAGE, "%zu columns: MXFP4 wants a multiple of 32", K);
  if (!us_scale_rule_name(rule)) return us_err_set(err, US_ERR_USAGE, "scale rule %d", (int)rule);
  for (size_t g = 0; g < K / US_MXFP4_GROUP; g++) {
    const float *group = w + g * US_MXFP4_GROUP;
    uint32_t max_bits = group_max_bits(group), code[US_MXFP4_GROUP];
    if (max_bits >= 0x7f800000u) {
      size_t i = 0;
      while ((us_f32_bits(group[i]) & 0x7fffffffu) < 0x7f800000u) i++;
      return us_err_set(err, US_ERR_INPUT, "value %zu is %s", g * US_MXFP4_GROUP + i,
                        group[i] != group[i] ? "NaN" : "Inf");
    }
    scales[g] = group_encode(group, max_bits, rule, code);
    uint8_t *out = codes + g * (US_MXFP4_GROUP / 2);
    for (int i = 0; i < US_MXFP4_GROUP / 2; i++) out[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
  }
  return US_OK;
}

void us_mxfp4_decode(const uint8_t *codes, const uint8_t *scales, size_t K, float *values) {
  for (size_t g = 0; g < K / US_MXFP4_GROUP; g++) {
    float scale = us_e8m0_to_f32(scales[g]);
    const uint8_t *in = codes + g * (US_MXFP4_GROUP / 2);
    float *out = values + g * US_MXFP4_GROUP;
    uint8_t code[US_MXFP4_GROUP]; /* unpacked first, so that the loop over values is one vector loop */
    for (int i = 0; i < US_MXFP4_GROUP / 2; i++) {
      code[2 * i] = in[i] & 15u;
      code[2 * i + 1] = in[i] >> 4;
    }
    for (int i = 0; i < US_MXFP4_GROUP; i++) out[i] = us_e2m1_to_f32(code[i]) * scale;
  }
}

enum us_status us_mxfp4_check(const uint8_t *codes, const uint8_t *scales, size_t K, struct us_err *err) {
  for (size_t g = 0; g < K / US_MXFP4_GROUP; g++) {
    if (scales[g] < 253) continue;
    if (scales[g] == US_MXFP4_SCALE_NAN)
      return us_err_set(err, US_ERR_INPUT, "scale byte 255 is NaN (block %zu)", g);
    /* 2^126 * 4 and 2^127 * 2 are 2^128. */
    unsigned first_bad = scales[g] == 253 ? 6 : 4;
    const uint8_t *in = codes + g * (US_MXFP4_GROUP / 2);
    for (int i = 0; i < US_MXFP4_GROUP / 2; i++)
      if ((in[i] & 7u) >= first_bad || (in[i] >> 4 & 7u) >= first_bad)
        return us_err_set(err, US_ERR_INPUT, "a value overflows FP32 at scale byte %d (block %zu)", scales[g],
                          g);
  }
  return US_OK;
}
