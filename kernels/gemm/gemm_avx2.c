/* gemm_avx2.c: tiles of 6 x 16: 12 sums, 2 of B and a broadcast fill 15 of 16 registers. */
#include <immintrin.h>

#define W       8
#define V       __m256
#define ROWS    6
#define VECTORS 2
#define LOAD    _mm256_loadu_ps
#define STORE   _mm256_storeu_ps
#define SET1    _mm256_set1_ps
#define ZERO    _mm256_setzero_ps
#define FMA     _mm256_fmadd_ps
#define MUL     _mm256_mul_ps
#define ADD     _mm256_add_ps
#define NAME    us_gemm_avx2

static inline void transpose8(const float *in, size_t in_row, float *out, size_t out_row) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(in + (size_t)i * in_row);
  for (int i = 0; i < 8; i += 4) {
    __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + (size_t)i * out_row, _mm256_permute2f128_ps(t[i], t[4 + i], 0x20));
    _mm256_storeu_ps(out + (size_t)(4 + i) * out_row, _mm256_permute2f128_ps(t[i], t[4 + i], 0x31));
  }
}

#define TRANSPOSE transpose8

#include "kernels/gemm/gemm_tile.h"
