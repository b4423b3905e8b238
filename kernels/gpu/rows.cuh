/* rows.cuh: up to 8 token rows as the 8-column f16 operand of the tensor cores.
 *
 * A row enters times the power of two that brings its largest magnitude into [2^14, 2^15), so that bf16 values keep all
 * their bits down to 2^-28 of the row's largest and nothing overflows; what is lost below is at most 2^-39 of the largest.
 * Operand layout: group of 32 columns g, lane: 16 bytes, (b0, b1) of columns 32g + 0..15, then of + 16..31; lane 4n + t
 * holds token n, columns 2t, 2t + 1 (b0) and + 8 (b1).
 */
#ifndef US_KERNELS_GPU_ROWS_CUH
#define US_KERNELS_GPU_ROWS_CUH

#include <cuda_fp16.h>
#include <stdint.h>

#define US_ROWS 8

/* Exponent p of the power of two for a row of largest magnitude `bits` (FP32 bits without sign); 0 for an empty row or one
 * with Inf or NaN. At most 126, so that 2^p and 2^-p are normal. */
__device__ __forceinline__ int us_row_exponent(uint32_t bits) {
  int exponent = (int)(bits >> 23);
  if (bits == 0 || exponent == 255) return 0;
  return 141 - exponent < 126 ? 141 - exponent : 126;
}

/* 2^p for |p| <= 126. */
__device__ __forceinline__ float us_power_of_two(int p) {
  return __uint_as_float((uint32_t)(p + 127) << 23);
}

__device__ __forceinline__ uint32_t us_pack_f16(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

/* Word 0..3 of a token's 16 bytes for columns of one group: which column it starts at. */
__device__ __forceinline__ int us_row_word_column(int word, int t) {
  return word / 2 * 16 + word % 2 * 8 + 2 * t;
}

#endif
