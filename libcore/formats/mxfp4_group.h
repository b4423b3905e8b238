/* mxfp4_group.h: encoding one group of 32 values, for mxfp4.c and for the device: one source, the same bytes.
 *
 *     uint32_t code[US_MXFP4_GROUP], max_bits = us_mxfp4_group_max(values);     // >= 0x7f800000: NaN or Inf inside
 *     uint8_t byte = us_mxfp4_group_encode(values, max_bits, US_SCALE_MSE, code);
 */
#ifndef US_FORMATS_MXFP4_GROUP_H
#define US_FORMATS_MXFP4_GROUP_H

#include "formats/mxfp4.h"

/* Largest magnitude of a group as bits: magnitudes compare as integers, and any NaN or Inf comes out on top.
 */
static US_HD uint32_t us_mxfp4_group_max(const float *w) {
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
static US_HD void us_mxfp4_group_codes(const float *w, uint8_t byte, uint32_t *codes) {
  float inverse = us_e8m0_inverse(byte);
  for (int i = 0; i < US_MXFP4_GROUP; i++) codes[i] = us_e2m1_from_f32(w[i] * inverse);
}

/* Squared error in units of the group's lower candidate scale: four FP64 lanes, i mod 4, added as (0+1) +
 * (2+3). The FP32 differences are exact: a value and its code differ by less than the value, in steps of
 * the value's last bit. */
static US_HD double us_mxfp4_group_error(const float *w, float inverse, float unit, const uint32_t *codes) {
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
static US_HD uint8_t us_mxfp4_group_encode(const float *w, uint32_t max_bits, enum us_scale_rule rule,
                                           uint32_t *codes) {
  uint8_t byte = us_mxfp4_scale_byte(us_f32_from_bits(max_bits), rule);
  us_mxfp4_group_codes(w, byte, codes);
  int clips = us_f32_from_bits(max_bits) * us_e8m0_inverse(byte) > 6.0f;
  if (rule != US_SCALE_MSE || !clips) return byte;

  uint32_t upper[US_MXFP4_GROUP];
  us_mxfp4_group_codes(w, (uint8_t)(byte + 1), upper);
  float inverse = us_e8m0_inverse(byte);
  if (us_mxfp4_group_error(w, inverse, 1.0f, codes) <= us_mxfp4_group_error(w, inverse, 2.0f, upper))
    return byte;
  for (int i = 0; i < US_MXFP4_GROUP; i++) codes[i] = upper[i];
  return (uint8_t)(byte + 1);
}

#endif
