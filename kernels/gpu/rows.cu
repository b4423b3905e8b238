/* rows.cu: one block a token row: its largest magnitude, then f16 in operand order. Bound: latency, a few us; the engine
 * fuses it with the norm before it. */
#include "kernels/gpu/rows.cuh"
#include "kernels/gpu/rows_gpu.h"

#define THREADS 256

static __device__ uint32_t block_max(uint32_t bits) {
  __shared__ uint32_t warp_max[THREADS / 32];
  bits = __reduce_max_sync(0xffffffffu, bits);
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = bits;
  __syncthreads();
  uint32_t largest = 0;
  for (int w = 0; w < THREADS / 32; w++) largest = warp_max[w] > largest ? warp_max[w] : largest;
  return largest;
}

static __global__ void pack_rows(const float *x, uint32_t R, uint32_t K, size_t x_stride, uint32_t *operand,
                                 float *unscale) {
  uint32_t token = blockIdx.x;
  const float *row = x + token * x_stride;
  bool present = token < R;
  uint32_t bits = 0;
  for (uint32_t k = threadIdx.x; present && k < K; k += THREADS) {
    uint32_t magnitude = __float_as_uint(row[k]) & 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  int p = us_row_exponent(block_max(bits));
  float scale = us_power_of_two(p);
  if (threadIdx.x == 0) unscale[token] = us_power_of_two(-p);
  for (uint32_t i = threadIdx.x; i < K / 2; i += THREADS) {
    uint32_t group = i / 16, t = i / 4 % 4, word = i % 4;
    uint32_t k = group * 32 + us_row_word_column(word, t);
    uint32_t value = present ? us_pack_f16(row[k] * scale, row[k + 1] * scale) : 0;
    operand[((size_t)group * 32 + token * 4 + t) * 4 + word] = value;
  }
}

cudaError_t us_rows_pack_gpu(const float *x, uint32_t R, uint32_t K, size_t x_stride, void *operand,
                             float *unscale, cudaStream_t stream) {
  if (R > US_ROWS || K % 32) return cudaErrorInvalidValue;
  pack_rows<<<US_ROWS, THREADS, 0, stream>>>(x, R, K, x_stride, (uint32_t *)operand, unscale);
  return cudaGetLastError();
}
