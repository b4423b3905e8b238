/* vec16.h: 16 FP32 lanes as one AVX-512 register or two AVX2 registers: the fast kernels are written once over it.
 *
 *     vec16 acc = vec16_zero();
 *     acc = vec16_fma(vec16_load(w), vec16_load(x), acc);
 *     float dot = vec16_sum(acc);                       // the canonical tree
 *
 * Only <op>_avx2.c and <op>_avx512.c include it, through <op>_simd.h. Every function is lane-wise IEEE arithmetic, so
 * both give the bits of the plain C definition in <op>_ref.c.
 */
#ifndef US_KERNELS_CPU_VEC16_H
#define US_KERNELS_CPU_VEC16_H

#include "kernels/cpu/exp.h"
#include <immintrin.h>
#include <stddef.h>

#define VEC16_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

typedef __m512 vec16;

/* Keep a loaded value in a register: GCC would repeat the load in each fma that uses it, and two loads a cycle are then the
 * limit. */
#define VEC16_KEEP(a) __asm__("" : "+v"(a))

VEC16_INLINE vec16 vec16_zero(void) {
  return _mm512_setzero_ps();
}
VEC16_INLINE vec16 vec16_set1(float a) {
  return _mm512_set1_ps(a);
}
VEC16_INLINE vec16 vec16_load(const float *p) {
  return _mm512_loadu_ps(p);
}
VEC16_INLINE void vec16_store(float *p, vec16 a) {
  _mm512_storeu_ps(p, a);
}
VEC16_INLINE vec16 vec16_add(vec16 a, vec16 b) {
  return _mm512_add_ps(a, b);
}
VEC16_INLINE vec16 vec16_sub(vec16 a, vec16 b) {
  return _mm512_sub_ps(a, b);
}
VEC16_INLINE vec16 vec16_mul(vec16 a, vec16 b) {
  return _mm512_mul_ps(a, b);
}
VEC16_INLINE vec16 vec16_div(vec16 a, vec16 b) {
  return _mm512_div_ps(a, b);
}
VEC16_INLINE vec16 vec16_fma(vec16 a, vec16 b, vec16 c) {
  return _mm512_fmadd_ps(a, b, c);
}
/* min and max return b when either is NaN, as the instructions do. */
VEC16_INLINE vec16 vec16_min(vec16 a, vec16 b) {
  return _mm512_min_ps(a, b);
}
VEC16_INLINE vec16 vec16_max(vec16 a, vec16 b) {
  return _mm512_max_ps(a, b);
}

VEC16_INLINE float vec16_sum(vec16 a) {
  __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

VEC16_INLINE vec16 vec16_load_bf16(const uint16_t *p) {
  __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
}

/* p * 2^i where i is the low 10 bits, signed, of t's bits. */
VEC16_INLINE vec16 vec16_scale_exp(vec16 p, vec16 t) {
  __m512i i = _mm512_srai_epi32(_mm512_slli_epi32(_mm512_castps_si512(t), 22), 22);
  __m512i half = _mm512_srai_epi32(i, 1), rest = _mm512_sub_epi32(i, half), bias = _mm512_set1_epi32(127);
  vec16 a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), 23));
  vec16 b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), 23));
  return _mm512_mul_ps(_mm512_mul_ps(p, a), b);
}

/* Round to bf16, nearest even; NaN stays NaN (quiet). */
VEC16_INLINE vec16 vec16_round_bf16(vec16 a) {
  __m512i bits = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i rounded = _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u));
  __m512i quiet = _mm512_and_si512(_mm512_or_si512(bits, _mm512_set1_epi32(0x400000)),
                                   _mm512_set1_epi32((int)0xffff0000u));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_blend_epi32(nan, rounded, quiet));
}

#else

typedef struct {
  __m256 lo, hi;
} vec16;

#define VEC16_KEEP(a)                  ((void)0) /* 16 registers are too few */
#define VEC16_BOTH(lo_value, hi_value) ((vec16){.lo = (lo_value), .hi = (hi_value)})

VEC16_INLINE vec16 vec16_zero(void) {
  return VEC16_BOTH(_mm256_setzero_ps(), _mm256_setzero_ps());
}
VEC16_INLINE vec16 vec16_set1(float a) {
  return VEC16_BOTH(_mm256_set1_ps(a), _mm256_set1_ps(a));
}
VEC16_INLINE vec16 vec16_load(const float *p) {
  return VEC16_BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
VEC16_INLINE void vec16_store(float *p, vec16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
VEC16_INLINE vec16 vec16_add(vec16 a, vec16 b) {
  return VEC16_BOTH(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi));
}
VEC16_INLINE vec16 vec16_sub(vec16 a, vec16 b) {
  return VEC16_BOTH(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi));
}
VEC16_INLINE vec16 vec16_mul(vec16 a, vec16 b) {
  return VEC16_BOTH(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi));
}
VEC16_INLINE vec16 vec16_div(vec16 a, vec16 b) {
  return VEC16_BOTH(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi));
}
VEC16_INLINE vec16 vec16_fma(vec16 a, vec16 b, vec16 c) {
  return VEC16_BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
VEC16_INLINE vec16 vec16_min(vec16 a, vec16 b) {
  return VEC16_BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi));
}
VEC16_INLINE vec16 vec16_max(vec16 a, vec16 b) {
  return VEC16_BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi));
}

VEC16_INLINE float vec16_sum(vec16 a) {
  __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}

VEC16_INLINE __m256 vec8_load_bf16(const uint16_t *p) {
  __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
}
VEC16_INLINE vec16 vec16_load_bf16(const uint16_t *p) {
  return VEC16_BOTH(vec8_load_bf16(p), vec8_load_bf16(p + 8));
}

VEC16_INLINE __m256 vec8_scale_exp(__m256 p, __m256 t) {
  __m256i i = _mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 22), 22);
  __m256i half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half), bias = _mm256_set1_epi32(127);
  __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(p, a), b);
}
VEC16_INLINE vec16 vec16_scale_exp(vec16 p, vec16 t) {
  return VEC16_BOTH(vec8_scale_exp(p.lo, t.lo), vec8_scale_exp(p.hi, t.hi));
}

VEC16_INLINE __m256 vec8_round_bf16(__m256 a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  __m256i value = _mm256_blendv_epi8(up, quiet, nan);
  return _mm256_castsi256_ps(_mm256_and_si256(value, _mm256_set1_epi32((int)0xffff0000u)));
}
VEC16_INLINE vec16 vec16_round_bf16(vec16 a) {
  return VEC16_BOTH(vec8_round_bf16(a.lo), vec8_round_bf16(a.hi));
}

#endif

/* us_expf on 16 lanes: the same operations in the same order. */
VEC16_INLINE vec16 vec16_exp(vec16 x) {
  x = vec16_max(vec16_set1(-US_EXP_LIMIT), x);
  x = vec16_min(vec16_set1(US_EXP_LIMIT), x);
  vec16 t = vec16_fma(x, vec16_set1(US_EXP_LOG2E), vec16_set1(US_EXP_MAGIC));
  vec16 n = vec16_sub(t, vec16_set1(US_EXP_MAGIC));
  vec16 r = vec16_fma(n, vec16_set1(-US_EXP_LN2_LO), vec16_fma(n, vec16_set1(-US_EXP_LN2_HI), x));
  vec16 p = vec16_fma(r, vec16_set1(US_EXP_C7), vec16_set1(US_EXP_C6));
  p = vec16_fma(p, r, vec16_set1(US_EXP_C5));
  p = vec16_fma(p, r, vec16_set1(US_EXP_C4));
  p = vec16_fma(p, r, vec16_set1(US_EXP_C3));
  p = vec16_fma(p, r, vec16_set1(0.5f));
  p = vec16_fma(p, r, vec16_set1(1.0f));
  p = vec16_fma(p, r, vec16_set1(1.0f));
  return vec16_scale_exp(p, t);
}

#endif
