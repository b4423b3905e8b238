/* mxfp4.c: encode, decode and check MXFP4 rows, a group of 32 at a time. */
#include "formats/mxfp4_group.h"

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

enum us_status us_mxfp4_encode(const float *w, size_t K, enum us_scale_rule rule, uint8_t *codes,
                               uint8_t *scales, struct us_err *err) {
  if (K % US_MXFP4_GROUP)
    return us_err_set(err, US_ERR_USAGE, "%zu columns: MXFP4 wants a multiple of 32", K);
  if (!us_scale_rule_name(rule)) return us_err_set(err, US_ERR_USAGE, "scale rule %d", (int)rule);
  for (size_t g = 0; g < K / US_MXFP4_GROUP; g++) {
    const float *group = w + g * US_MXFP4_GROUP;
    uint32_t max_bits = us_mxfp4_group_max(group), code[US_MXFP4_GROUP];
    if (max_bits >= 0x7f800000u) {
      size_t i = 0;
      while ((us_f32_bits(group[i]) & 0x7fffffffu) < 0x7f800000u) i++;
      return us_err_set(err, US_ERR_INPUT, "value %zu is %s", g * US_MXFP4_GROUP + i,
                        group[i] != group[i] ? "NaN" : "Inf");
    }
    scales[g] = us_mxfp4_group_encode(group, max_bits, rule, code);
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
