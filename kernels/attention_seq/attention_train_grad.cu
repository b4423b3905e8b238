/* attention_train_grad.cu: the gradients of attention for training.
 *
 * First (lse, delta) of every row, read once: out and dout, 4 V bytes a row. Then dk and dv by blocks of keys and dq by blocks of
 * queries: scores and dout v^T are multiplied twice (7 products instead of 5), which costs less than ordering the sums of dq
 * over blocks, and keeps every sum in registers.
 */
#include "kernels/attention_seq/attention_train_job.h"
#include "kernels/attention_seq/attention_train_keys.cuh"
#include "kernels/attention_seq/attention_train_queries.cuh"

#define NOTE_THREADS 256
#define SINK_THREADS 1024

static __device__ __forceinline__ float dot_words(uint32_t x, uint32_t y) {
  float low = __uint_as_float(x << 16) * __uint_as_float(y << 16);
  return fmaf(__uint_as_float(x & 0xffff0000u), __uint_as_float(y & 0xffff0000u), low);
}

/* Eight lanes a query and head. */
static __global__ void __launch_bounds__(NOTE_THREADS)
    note_rows(const __grid_constant__ struct us_attention_job job) {
  const struct us_attention_train &a = job.a;
  uint32_t lane = threadIdx.x % 8, chunks = a.v_dim / 8;
  size_t row = ((size_t)blockIdx.x * NOTE_THREADS + threadIdx.x) / 8, rows = (size_t)a.queries * a.q_heads;
  if (row >= rows) row = rows - 1; /* the same result twice */
  const uint4 *out = (const uint4 *)(a.out + row * a.v_dim),
              *dout = (const uint4 *)(job.grads.dout + row * a.v_dim);
  float sum = 0;
#pragma unroll 2
  for (uint32_t c = lane; c < chunks; c += 8) {
    uint4 x = out[c], y = dout[c];
    sum += (dot_words(x.x, y.x) + dot_words(x.y, y.y)) + (dot_words(x.z, y.z) + dot_words(x.w, y.w));
  }
#pragma unroll
  for (int s = 1; s < 8; s *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, s);
  if (lane == 0) ((float2 *)job.grads.scratch)[row] = make_float2(a.lse[row] * US_TRAIN_LOG2E, sum);
}

/* A block a head. */
static __global__ void __launch_bounds__(SINK_THREADS)
    sum_sinks(const __grid_constant__ struct us_attention_job job) {
  __shared__ float part[SINK_THREADS];
  uint32_t head = blockIdx.x;
  const float2 *note = (const float2 *)job.grads.scratch + head;
  float sink = job.a.sink[head] * US_TRAIN_LOG2E, sum = 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < job.a.queries; i += SINK_THREADS) {
    float2 n = note[(size_t)i * job.a.q_heads];
    sum += exp2f(sink - n.x) * n.y;
  }
  part[threadIdx.x] = sum;
  for (uint32_t width = SINK_THREADS / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) part[threadIdx.x] += part[threadIdx.x + width];
  }
  if (threadIdx.x == 0) job.grads.dsink[head] -= part[0];
}

size_t us_attention_train_scratch(uint32_t queries, uint32_t q_heads) {
  return (size_t)queries * q_heads * sizeof(float2);
}

template <int Q, int V, int ROWS, bool WINDOW>
static cudaError_t grad_products(const struct us_attention_job *job, cudaStream_t stream) {
  constexpr int KEYS = WINDOW ? 48 : 64, GROUPS = WINDOW ? 1 : 2, BLOCKS = WINDOW ? 2 : 1;
  cudaError_t status = job->a.keys ? us_launch_keys<Q, V, ROWS, GROUPS, BLOCKS>(job, stream) : cudaSuccess;
  if (status != cudaSuccess || !job->a.queries) return status;
  return us_launch_queries<Q, V, KEYS, GROUPS, BLOCKS>(job, stream);
}

static cudaError_t grad_of(const struct us_attention_job *job, cudaStream_t stream) {
  const struct us_attention_train *a = &job->a;
  bool window = a->opt_window && a->opt_window <= US_SHORT_WINDOW;
  if (a->qk_dim <= 64 && a->v_dim <= 64)
    return window ? grad_products<64, 64, 32, true>(job, stream)
                  : grad_products<64, 64, 64, false>(job, stream);
  if (a->qk_dim <= 128)
    return window ? grad_products<128, 128, 32, true>(job, stream)
                  : grad_products<128, 128, 64, false>(job, stream);
  return grad_products<192, 128, 32, false>(job, stream);
}

int us_attention_train_grad(const struct us_attention_train *a, const struct us_attention_train_grads *grads,
                            cudaStream_t stream) {
  struct us_attention_job job;
  int status = us_attention_job_of(a, &job);
  if (status != cudaSuccess) return status;
  job.grads = *grads;
  size_t rows = (size_t)a->queries * a->q_heads;
  if (rows)
    note_rows<<<(unsigned)((rows * 8 + NOTE_THREADS - 1) / NOTE_THREADS), NOTE_THREADS, 0, stream>>>(job);
  if (rows && a->sink && grads->dsink) sum_sinks<<<a->q_heads, SINK_THREADS, 0, stream>>>(job);
  return grad_of(&job, stream);
}
