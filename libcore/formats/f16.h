/* f16.h: IEEE 754 binary16 to FP32.
 *
 *     float x = us_f16_to_f32(half); // exact, subnormals, Inf and NaN included
 */
#ifndef US_FORMATS_F16_H
#define US_FORMATS_F16_H

#include "formats/bf16.h"

static US_HD float us_f16_to_f32(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t normal = (magnitude << 13) + (112u << 23);
  uint32_t subnormal = us_f32_bits((float)magnitude * 0x1p-24f);
  uint32_t special = 0x7f800000u | magnitude << 13;
  return us_f32_from_bits(sign | (magnitude >= 0x7c00u ? special : magnitude >= 0x400u ? normal : subnormal));
}

#endif
