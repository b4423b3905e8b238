/* rows.cu: what happens to each row between products: embedding, residual adds, norms, taps, and experts' outputs added up.
 *
 * Bound: bytes; a block has a row, a thread 8 columns at a time. Ranks share the rows: each adds and norms its own and writes
 * the result to all (a quarter of the work and of the links' traffic that all rows on every rank would be).
 * Formula: rmsnorm (Zhang and Sennrich 2019).
 */
#include "formats/bf16.h"
#include "kernels/prefill/prefill.h"

#define THREADS 256

struct eight {
  float v[8];
};

static __device__ __forceinline__ struct eight load_eight(const float *from) {
  float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

static __device__ __forceinline__ void store_eight(float *to, const struct eight *x) {
  ((float4 *)to)[0] = make_float4(x->v[0], x->v[1], x->v[2], x->v[3]);
  ((float4 *)to)[1] = make_float4(x->v[4], x->v[5], x->v[6], x->v[7]);
}

/* bf16(x) * 2^64, of 8 values. */
static __device__ __forceinline__ uint4 operand_eight(const struct eight *x) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t low = us_bf16_from_f32(us_bf16_round(x->v[2 * i]) * US_ENGINE_OPERAND_UNIT);
    uint32_t high = us_bf16_from_f32(us_bf16_round(x->v[2 * i + 1]) * US_ENGINE_OPERAND_UNIT);
    word[i] = low | high << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

static __device__ __forceinline__ struct eight embedding(const struct us_prefill_norm *n, uint32_t r,
                                                         uint32_t c) {
  uint32_t token = (uint32_t)n->opt_tokens[r];
  const uint16_t *row = n->embed[token / n->embed_rows] + (size_t)(token % n->embed_rows) * n->D + c;
  struct eight x;
#pragma unroll
  for (int i = 0; i < 8; i++) x.v[i] = us_bf16_to_f32(row[i]);
  return x;
}

/* The row's new residual at column c. */
static __device__ __forceinline__ struct eight new_residual(const struct us_prefill_norm *n, uint32_t r,
                                                            uint32_t c) {
  size_t at = (size_t)r * n->D + c;
  if (n->opt_tokens) return embedding(n, r, c);
  struct eight sum = load_eight(n->sums + at);
  for (uint32_t a = 1; a < n->addends; a++) {
    struct eight part = load_eight(n->sums + a * n->addend + at);
#pragma unroll
    for (int i = 0; i < 8; i++) sum.v[i] += part.v[i];
  }
  if (n->replace) return sum;
  struct eight x = load_eight(n->residual + at);
#pragma unroll
  for (int i = 0; i < 8; i++) x.v[i] += sum.v[i];
  return x;
}

static __device__ __forceinline__ float block_sum(float x) {
  __shared__ float warps[THREADS / 32];
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = warps[0];
#pragma unroll
  for (int w = 1; w < THREADS / 32; w++) sum += warps[w];
  return sum;
}

static __global__ void __launch_bounds__(THREADS)
    prefill_norm(const __grid_constant__ struct us_prefill_norm n) {
  uint32_t r = blockIdx.x;
  float squares = 0;
  for (uint32_t c = threadIdx.x * 8; c < n.D; c += THREADS * 8) {
    struct eight x = new_residual(&n, r, c);
    store_eight(n.residual + (size_t)r * n.D + c, &x);
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(x.v[i], x.v[i], squares);
    if (!n.tap[0]) continue;
    uint4 bits = operand_eight(&x);
    for (uint32_t rank = 0; rank < n.ranks; rank++)
      *(uint4 *)(n.tap[rank] + (size_t)(n.first + r) * n.tap_stride + c) = bits;
  }
  float scale = 1.0f / sqrtf(block_sum(squares) / (float)n.D + n.eps);
  for (uint32_t c = threadIdx.x * 8; c < n.D; c += THREADS * 8) {
    struct eight x = load_eight(n.residual + (size_t)r * n.D + c), weight = load_eight(n.weight + c);
#pragma unroll
    for (int i = 0; i < 8; i++) x.v[i] = x.v[i] * scale * weight.v[i];
    uint4 bits = operand_eight(&x);
    for (uint32_t rank = 0; rank < n.ranks; rank++)
      *(uint4 *)(n.out[rank] + (size_t)(n.first + r) * n.out_stride + c) = bits;
  }
}

int us_prefill_norm(const struct us_prefill_norm *norm, cudaStream_t stream) {
  if (norm->D % 8 || norm->out_stride % 8 || norm->tap_stride % 8) return cudaErrorInvalidValue;
  if (norm->rows) prefill_norm<<<norm->rows, THREADS, 0, stream>>>(*norm);
  return cudaGetLastError();
}

static __global__ void __launch_bounds__(THREADS)
    prefill_combine(const __grid_constant__ struct us_prefill_combine p) {
  uint32_t r = blockIdx.x;
  const struct us_prefill_rows *out = &p.out;
  float *to = out->base[r / out->per_rank] + (size_t)(r % out->per_rank) * out->stride + out->first;
  const float *from = p.pairs + (size_t)r * p.top_k * p.D;
  for (uint32_t c = threadIdx.x * 4; c < p.D; c += THREADS * 4) {
    float4 y = make_float4(0, 0, 0, 0);
    for (uint32_t k = 0; k < p.top_k; k++) {
      float w = p.weights[r * p.top_k + k];
      float4 v = *(const float4 *)(from + (size_t)k * p.D + c);
      y.x = fmaf(w, v.x, y.x), y.y = fmaf(w, v.y, y.y), y.z = fmaf(w, v.z, y.z), y.w = fmaf(w, v.w, y.w);
    }
    *(float4 *)(to + c) = y;
  }
}

int us_prefill_combine(const struct us_prefill_combine *combine, cudaStream_t stream) {
  if (combine->D % 4 || combine->out.stride % 4 || combine->out.first % 4) return cudaErrorInvalidValue;
  if (combine->rows) prefill_combine<<<combine->rows, THREADS, 0, stream>>>(*combine);
  return cudaGetLastError();
}
