/* arena_train.cu: passes over whole arenas: cast, scale, sum of squares, first value that is not finite.
 *
 * Bound: bytes, 4 to 8 a value. Sums: SUM_BLOCKS x THREADS threads, each over its values in order, four FP64 sums (one of each of
 * 4 neighbours); then the threads of a block, then the blocks: the order depends on n alone. A square of an FP32 value is
 * exact in FP64.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/quant/quant_train.h"

#define THREADS    256
#define SUM_BLOCKS 1024

/* Blocks for n values, 16 a thread, all resident at once at most a few times over. */
static unsigned blocks_for(size_t n) {
  size_t blocks = (n + THREADS * 16 - 1) / (THREADS * 16);
  return (unsigned)(blocks < 4096 ? blocks ? blocks : 1 : 4096);
}

static __global__ void __launch_bounds__(THREADS) cast_values(size_t n, const float *x, uint16_t *out) {
  size_t step = (size_t)gridDim.x * THREADS * 4, i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4;
  for (; i + 4 <= n; i += step) us_store_four(out + i, us_load_four(x + i));
  for (; i < n; i++) out[i] = us_bf16_from_f32(x[i]);
}

int us_bf16_train(size_t n, const float *x, uint16_t *out, cudaStream_t stream) {
  cast_values<<<blocks_for(n), THREADS, 0, stream>>>(n, x, out);
  return cudaGetLastError();
}

static __global__ void __launch_bounds__(THREADS) scale_values(size_t n, const float *factor, float *x) {
  float by = *factor;
  if (by == 1.0f) return;
  size_t step = (size_t)gridDim.x * THREADS * 4, i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4;
  for (; i + 4 <= n; i += step) {
    struct us_four v = us_load_four(x + i);
#pragma unroll
    for (int j = 0; j < 4; j++) v.v[j] *= by;
    us_store_four(x + i, v);
  }
  for (; i < n; i++) x[i] *= by;
}

int us_scale_train(size_t n, const float *factor, float *x, cudaStream_t stream) {
  scale_values<<<blocks_for(n), THREADS, 0, stream>>>(n, factor, x);
  return cudaGetLastError();
}

static __global__ void __launch_bounds__(THREADS) square_values(size_t n, const float *x, double *partial) {
  __shared__ double warps[THREADS / 32];
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  size_t step = (size_t)SUM_BLOCKS * THREADS * 4, i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4;
#pragma unroll 4
  for (; i + 4 <= n; i += step) {
    struct us_four v = us_load_four(x + i);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] = fma((double)v.v[j], (double)v.v[j], sum[j]);
  }
  for (; i < n; i++) sum[0] = fma((double)x[i], (double)x[i], sum[0]);
  double all = us_block_sum<THREADS>((sum[0] + sum[1]) + (sum[2] + sum[3]), warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = all;
}

static __global__ void __launch_bounds__(SUM_BLOCKS) add_partials(const double *partial, double *sum) {
  __shared__ double warps[SUM_BLOCKS / 32];
  double all = us_block_sum<SUM_BLOCKS>(partial[threadIdx.x], warps);
  if (threadIdx.x == 0) *sum = all;
}

size_t us_sum_squares_train_scratch(void) {
  return SUM_BLOCKS * sizeof(double);
}

int us_sum_squares_train(size_t n, const float *x, double *sum, void *scratch, cudaStream_t stream) {
  square_values<<<SUM_BLOCKS, THREADS, 0, stream>>>(n, x, (double *)scratch);
  add_partials<<<1, SUM_BLOCKS, 0, stream>>>((const double *)scratch, sum);
  return cudaGetLastError();
}

static __global__ void clip_factor(const double *sum, double limit, float *factor) {
  double norm = sqrt(*sum);
  *factor = limit > 0.0 && norm > limit ? (float)(limit / norm) : 1.0f;
}

int us_clip_factor_train(const double *sum, double limit, float *factor, cudaStream_t stream) {
  clip_factor<<<1, 1, 0, stream>>>(sum, limit, factor);
  return cudaGetLastError();
}

static __device__ __forceinline__ bool finite(float x) {
  return (us_f32_bits(x) & 0x7fffffffu) < 0x7f800000u;
}

static __device__ __forceinline__ void note_index(uint64_t *index, size_t i) {
  atomicMin((unsigned long long *)index, (unsigned long long)i);
}

static __global__ void __launch_bounds__(THREADS) find_nonfinite(size_t n, const float *x, uint64_t *index) {
  size_t step = (size_t)gridDim.x * THREADS * 4, i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4;
#pragma unroll 4
  for (; i + 4 <= n; i += step) {
    struct us_four v = us_load_four(x + i);
    if (finite(v.v[0]) & finite(v.v[1]) & finite(v.v[2]) & finite(v.v[3])) continue;
    for (int j = 0; j < 4; j++)
      if (!finite(v.v[j])) note_index(index, i + j);
  }
  for (; i < n; i++)
    if (!finite(x[i])) note_index(index, i);
}

int us_nonfinite_train(size_t n, const float *x, uint64_t *index, cudaStream_t stream) {
  find_nonfinite<<<blocks_for(n), THREADS, 0, stream>>>(n, x, index);
  return cudaGetLastError();
}
