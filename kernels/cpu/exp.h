/* exp.h: our own e^x, the same bits on every instruction set and on the device.
 *
 *     float p = us_expf(score - max);
 *
 * n = x log2(e) rounded to even, r = x - n ln 2 in two fmaf steps, a degree-7 polynomial in r (Taylor coefficients,
 * |r| <= ln2/2), then two exact multiplies by powers of two, the second of which rounds once into the subnormals.
 * Error under 2 ulp (t_exp measures it against the C library in double). x is clamped to [-110, 110], where the result is
 * already 0 or Inf; NaN stays NaN.
 */
#ifndef US_KERNELS_CPU_EXP_H
#define US_KERNELS_CPU_EXP_H

#include "formats/bf16.h"
#include <math.h>

#define US_EXP_LIMIT  110.0f
#define US_EXP_LOG2E  1.44269504f
#define US_EXP_MAGIC  12582912.0f    /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
#define US_EXP_LN2_HI 0.693145752f   /* 0x3f317200: n * LN2_HI is exact for |n| < 2^9 */
#define US_EXP_LN2_LO 1.42860677e-6f /* ln 2 - LN2_HI */
#define US_EXP_C7     1.98412698e-4f
#define US_EXP_C6     1.38888889e-3f
#define US_EXP_C5     8.33333333e-3f
#define US_EXP_C4     4.16666667e-2f
#define US_EXP_C3     1.66666667e-1f

/* 2^n for n in [-126, 127]. */
static US_HD float us_exp2_int(int n) {
  return us_f32_from_bits((uint32_t)(n + 127) << 23);
}

static US_HD float us_expf(float x) {
  x = x < -US_EXP_LIMIT ? -US_EXP_LIMIT : x;
  x = x > US_EXP_LIMIT ? US_EXP_LIMIT : x;
  float t = fmaf(x, US_EXP_LOG2E, US_EXP_MAGIC);
  float n = t - US_EXP_MAGIC;
  float r = fmaf(n, -US_EXP_LN2_LO, fmaf(n, -US_EXP_LN2_HI, x));
  float p = fmaf(r, US_EXP_C7, US_EXP_C6);
  p = fmaf(p, r, US_EXP_C5);
  p = fmaf(p, r, US_EXP_C4);
  p = fmaf(p, r, US_EXP_C3);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  int i = (int)(us_f32_bits(t) & 0x3ffu) - ((us_f32_bits(t) & 0x200u) ? 0x400 : 0); /* n, from t's low bits */
  int half = i >> 1;
  return p * us_exp2_int(half) * us_exp2_int(i - half);
}

#endif
