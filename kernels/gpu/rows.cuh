/* rows.cuh: what the kernels over rows share: four values at a time in FP32 or bf16, sums over warps and blocks. Internal.
 *
 * bf16 goes through CUDA's conversions, which tests/gpu/codec_bits.cu compares with formats/bf16.h (NaN patterns aside).
 */
#ifndef US_KERNELS_GPU_ROWS_CUH
#define US_KERNELS_GPU_ROWS_CUH

#include "formats/bf16.h"
#include <cuda_bf16.h>

struct us_four {
  float v[4];
};

static __device__ __forceinline__ struct us_four us_load_four(const float *from) {
  float4 a = *(const float4 *)from;
  return {{a.x, a.y, a.z, a.w}};
}

static __device__ __forceinline__ void us_store_four(float *to, const struct us_four &x) {
  *(float4 *)to = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}

static __device__ __forceinline__ float us_low_half(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

static __device__ __forceinline__ float us_high_half(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

static __device__ __forceinline__ uint32_t us_pair_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(const uint32_t *)&pair;
}

static __device__ __forceinline__ struct us_four us_load_four(const uint16_t *from) {
  uint2 a = *(const uint2 *)from;
  return {{us_low_half(a.x), us_high_half(a.x), us_low_half(a.y), us_high_half(a.y)}};
}

static __device__ __forceinline__ void us_store_four(uint16_t *to, const struct us_four &x) {
  *(uint2 *)to = make_uint2(us_pair_bf16(x.v[0], x.v[1]), us_pair_bf16(x.v[2], x.v[3]));
}

/* Sum over a warp, or over the LANES neighbours of it that a lane belongs to: the same order and bits in every lane. */
template <int LANES = 32, typename T> static __device__ __forceinline__ T us_warp_sum(T x) {
  uint32_t lanes = 0xffffffffu >> (32 - LANES) << (threadIdx.x % 32 / LANES * LANES);
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(lanes, x, step);
  return x;
}

/* Sum over a block of THREADS, known to all its threads; `warps` is shared memory for THREADS / 32 values. */
template <int THREADS, typename T> static __device__ __forceinline__ T us_block_sum(T x, T *warps) {
  x = us_warp_sum(x);
  __syncthreads(); /* the last sum's readers are done */
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = warps[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) sum += warps[w];
  return sum;
}

#endif
