/* gemm_avx512.c: tiles of 8 x 48: 24 sums, 3 of B and a broadcast fill 28 of 32 registers; 24 fmas (12 cycles) a k against
 * 11 loads (6 cycles). */
#include <immintrin.h>

#define W       16
#define V       __m512
#define ROWS    8
#define VECTORS 3
#define LOAD    _mm512_loadu_ps
#define STORE   _mm512_storeu_ps
#define SET1    _mm512_set1_ps
#define ZERO    _mm512_setzero_ps
#define FMA     _mm512_fmadd_ps
#define MUL     _mm512_mul_ps
#define ADD     _mm512_add_ps
#define NAME    us_gemm_avx512

#define PAIR(lo, hi, imm_lo, imm_hi, shuffle)                                                                \
  do {                                                                                                       \
    __m512 first = lo, second = hi;                                                                          \
    lo = shuffle(first, second, imm_lo);                                                                     \
    hi = shuffle(first, second, imm_hi);                                                                     \
  } while (0)

/* 16 x 16: interleave pairs and quads inside the 128-bit lanes, then move the lanes. */
static inline void transpose16(const float *in, size_t in_row, float *out, size_t out_row) {
  __m512 r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(in + (size_t)i * in_row);
  for (int i = 0; i < 16; i += 4) {
    __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    r[i] = _mm512_shuffle_ps(a, c, 0x44), r[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    r[i + 2] = _mm512_shuffle_ps(b, d, 0x44), r[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; i++) { /* r[4 q + i], lane l: columns 4 l + i of rows 4 q .. 4 q + 3 */
    PAIR(r[i], r[4 + i], 0x88, 0xdd, _mm512_shuffle_f32x4);
    PAIR(r[8 + i], r[12 + i], 0x88, 0xdd, _mm512_shuffle_f32x4);
    PAIR(r[i], r[8 + i], 0x88, 0xdd, _mm512_shuffle_f32x4);
    PAIR(r[4 + i], r[12 + i], 0x88, 0xdd, _mm512_shuffle_f32x4);
    _mm512_storeu_ps(out + (size_t)i * out_row, r[i]);
    _mm512_storeu_ps(out + (size_t)(4 + i) * out_row, r[4 + i]);
    _mm512_storeu_ps(out + (size_t)(8 + i) * out_row, r[8 + i]);
    _mm512_storeu_ps(out + (size_t)(12 + i) * out_row, r[12 + i]);
  }
}

#define TRANSPOSE transpose16

#include "kernels/gemm/gemm_tile.h"
