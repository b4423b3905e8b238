/* bf16.h: the upper half of an FP32: 1 sign, 8 exponent and 7 fraction bits.
 *
 *     uint16_t h = us_bf16_from_f32(x);        // round to nearest even
 *     float y = us_bf16_to_f32(h);             // exact
 *     us_bf16_encode(values, n, halves);       // arrays, host only
 *
 * The scalar functions are compiled for host and device. A NaN stays a NaN of its sign, made quiet; finite
 * values beyond the largest bf16 by half a unit or more become Inf, as IEEE 754 rounds.
 */
#ifndef US_FORMATS_BF16_H
#define US_FORMATS_BF16_H

#include "base/hd.h"
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The bits of an FP32 value, and back. */
static US_HD uint32_t us_f32_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static US_HD float us_f32_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static US_HD uint16_t us_bf16_from_f32(float x) {
  uint32_t bits = us_f32_bits(x);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  uint32_t quiet = bits >> 16 | 0x40u;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static US_HD float us_bf16_to_f32(uint16_t half) {
  return us_f32_from_bits((uint32_t)half << 16);
}

/* x rounded to bf16, as FP32. */
static US_HD float us_bf16_round(float x) {
  return us_bf16_to_f32(us_bf16_from_f32(x));
}

/* n values each; in and out must not overlap, but us_bf16_round_all may work in place. */
void us_bf16_encode(const float *values, size_t n, uint16_t *halves);
void us_bf16_decode(const uint16_t *halves, size_t n, float *values);
void us_bf16_round_all(const float *values, size_t n, float *rounded);

#ifdef __cplusplus
}
#endif
#endif
