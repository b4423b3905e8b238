/* attention_decode.cu: a block has a sequence's KV head, and up to four of its query heads.
 *
 * LANES neighbours of a warp have a key: 8 of its dims each, 16 bytes of key and of value a load. The block's groups of LANES
 * take the keys by turns, four at a time so that 8 loads are under way a lane, each group with a softmax of its own (largest
 * score, sum, weighted values); the groups meet once, at the end.
 */
#include "kernels/attention_seq/attention_decode.h"
#include "kernels/gpu/rows.cuh"

#include <math_constants.h>

#define THREADS 64 /* small blocks, since each has a chain of loads: 5 % more tokens/s of nano than 128 */
#define WARPS   (THREADS / 32)
#define AT_ONCE 4
#define LOG2E   1.4426950408889634f

/* Softmax of the keys that a group has seen; scores are in units of log 2. */
template <int HEADS> struct part { float max[HEADS], sum[HEADS], value[HEADS][8]; };

static __device__ __forceinline__ void unpack(const uint4 &bits, float x[8]) {
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = us_low_half(word[i]), x[2 * i + 1] = us_high_half(word[i]);
}

static __device__ __forceinline__ uint4 load_8(const uint16_t *from, bool exists) {
  return exists ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
}

/* 2^(x - max), 0 where nothing was seen. */
static __device__ __forceinline__ float power(float x, float max) {
  return x == -CUDART_INF_F ? 0.0f : exp2f(x - max);
}

/* Where the block's work lies. */
struct place {
  const uint16_t *k_row, *v_row; /* of the row itself */
  uint16_t *k_cache, *v_cache;   /* (T, Q), (T, V) */
  uint32_t keys, current;        /* seen; where the row's own is kept */
  uint32_t first_head;
};

static __device__ __forceinline__ struct place find_place(const struct us_attention_decode &a, uint32_t slot,
                                                          uint32_t g, uint32_t first_head) {
  const uint32_t position = a.position[slot];
  const size_t row = slot * a.stride, cache = ((size_t)slot * a.kv_heads + g) * a.capacity;
  struct place p;
  p.k_row = a.k + row + a.k_offset[g], p.v_row = a.v + row + a.v_offset[g];
  p.k_cache = a.k_cache + cache * a.qk_dim, p.v_cache = a.v_cache + cache * a.v_dim;
  p.keys = min(position + 1, a.capacity), p.current = position % a.capacity;
  p.first_head = first_head;
  return p;
}

/* --- keys --- */

/* AT_ONCE keys from `first` on, a stride of `groups` apart: the row's own is read where it was computed. */
template <int LANES, int HEADS>
static __device__ __forceinline__ void take_keys(const struct us_attention_decode &a, const struct place &p,
                                                 const float q[HEADS][8], uint32_t first, uint32_t groups,
                                                 uint32_t dim, struct part<HEADS> *part) {
  uint4 k[AT_ONCE], v[AT_ONCE];
  float score[AT_ONCE][HEADS];
#pragma unroll
  for (int u = 0; u < AT_ONCE; u++) {
    const uint32_t j = first + u * groups;
    const bool own = j == p.current;
    k[u] = load_8(own ? p.k_row + dim : p.k_cache + (size_t)j * a.qk_dim + dim, j < p.keys && dim < a.qk_dim);
    v[u] = load_8(own ? p.v_row + dim : p.v_cache + (size_t)j * a.v_dim + dim, j < p.keys && dim < a.v_dim);
  }
#pragma unroll
  for (int u = 0; u < AT_ONCE; u++) {
    float x[8];
    unpack(k[u], x);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) dot = fmaf(q[h][i], x[i], dot);
      dot = us_warp_sum<LANES>(dot);
      score[u][h] = first + u * groups < p.keys ? dot : -CUDART_INF_F;
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float max = part->max[h];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) max = fmaxf(max, score[u][h]);
    const float shrink = power(part->max[h], max);
    part->max[h] = max;
    part->sum[h] *= shrink;
#pragma unroll
    for (int i = 0; i < 8; i++) part->value[h][i] *= shrink;
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      score[u][h] = power(score[u][h], max);
      part->sum[h] += score[u][h];
    }
  }
#pragma unroll
  for (int u = 0; u < AT_ONCE; u++) {
    float x[8];
    unpack(v[u], x);
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int i = 0; i < 8; i++) part->value[h][i] = fmaf(score[u][h], x[i], part->value[h][i]);
  }
}

/* --- parts to one --- */

/* Of the warp's groups, in all of them. */
template <int LANES, int HEADS> static __device__ __forceinline__ void join_groups(struct part<HEADS> *part) {
#pragma unroll
  for (int step = LANES; step < 32; step *= 2)
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const float other = __shfl_xor_sync(~0u, part->max[h], step), max = fmaxf(part->max[h], other);
      const float own = power(part->max[h], max);
      part->max[h] = max;
      /* Both sides shrink their own and add them, in the same order for both sides: addition commutes. */
      part->sum[h] *= own;
      part->sum[h] += __shfl_xor_sync(~0u, part->sum[h], step);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        part->value[h][i] *= own;
        part->value[h][i] += __shfl_xor_sync(~0u, part->value[h][i], step);
      }
    }
}

template <int LANES, int HEADS> struct joined {
  float max[WARPS][HEADS], sum[WARPS][HEADS], value[WARPS][HEADS][LANES * 8];
};

template <int LANES, int HEADS>
static __device__ __forceinline__ void write_out(const struct us_attention_decode &a, const struct place &p,
                                                 uint32_t slot, const struct joined<LANES, HEADS> *all) {
  for (uint32_t i = threadIdx.x; i < HEADS * a.v_dim; i += THREADS) {
    const uint32_t h = i / a.v_dim, d = i % a.v_dim, head = p.first_head + h;
    const float sink = a.opt_sink ? a.opt_sink[head] * LOG2E : -CUDART_INF_F;
    float max = sink, sum, value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) max = fmaxf(max, all->max[w][h]);
    sum = power(sink, max);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = power(all->max[w][h], max);
      sum = fmaf(share, all->sum[w][h], sum);
      value = fmaf(share, all->value[w][h][d], value);
    }
    a.out[((size_t)slot * a.q_heads + head) * a.v_dim + d] = us_bf16_from_f32(value / sum);
  }
}

/* --- the block --- */

/* Block (KV head and part of its query heads, slot). */
template <int LANES, int HEADS>
static __global__ void __launch_bounds__(THREADS)
    attend(const __grid_constant__ struct us_attention_decode a, uint32_t parts) {
  __shared__ struct joined<LANES, HEADS> all;
  constexpr uint32_t GROUPS = THREADS / LANES;
  const uint32_t slot = blockIdx.y, g = blockIdx.x / parts, split = blockIdx.x % parts;
  const uint32_t first_head = g * (a.q_heads / a.kv_heads) + split * HEADS;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = threadIdx.x % LANES * 8,
                 group = threadIdx.x / LANES;
  if (a.token[slot] < 0) {
    for (uint32_t i = threadIdx.x; i < HEADS * a.v_dim; i += THREADS)
      a.out[((size_t)slot * a.q_heads + first_head) * a.v_dim + i] = 0;
    return;
  }
  const struct place p = find_place(a, slot, g, first_head);
  float q[HEADS][8];
  struct part<HEADS> part;
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    unpack(load_8(a.q + slot * a.stride + a.q_offset[first_head + h] + dim, dim < a.qk_dim), q[h]);
    part.max[h] = -CUDART_INF_F, part.sum[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) q[h][i] *= a.scale * LOG2E, part.value[h][i] = 0.0f;
  }
  if (split == 0 && group == 0) { /* nobody reads what lay there: it is out of sight from now on */
    if (dim < a.qk_dim)
      *(uint4 *)(p.k_cache + (size_t)p.current * a.qk_dim + dim) = *(const uint4 *)(p.k_row + dim);
    if (dim < a.v_dim)
      *(uint4 *)(p.v_cache + (size_t)p.current * a.v_dim + dim) = *(const uint4 *)(p.v_row + dim);
  }
  for (uint32_t first = warp * (32 / LANES); first < p.keys;
       first += GROUPS * AT_ONCE) /* one trip for the whole warp */
    take_keys<LANES, HEADS>(a, p, q, first + lane / LANES, GROUPS, dim, &part);
  join_groups<LANES, HEADS>(&part);
  if (lane < LANES) {
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      if (lane == 0) all.max[warp][h] = part.max[h], all.sum[warp][h] = part.sum[h];
#pragma unroll
      for (int i = 0; i < 8; i++) all.value[warp][h][dim + i] = part.value[h][i];
    }
  }
  __syncthreads();
  write_out<LANES, HEADS>(a, p, slot, &all);
}

template <int LANES> static void launch(const struct us_attention_decode *a, cudaStream_t stream) {
  const uint32_t group = a->q_heads / a->kv_heads, heads = group % 4 == 0 ? 4 : group % 2 == 0 ? 2 : 1;
  const dim3 grid(a->q_heads / heads, a->slots);
  if (heads == 4)
    attend<LANES, 4><<<grid, THREADS, 0, stream>>>(*a, group / heads);
  else if (heads == 2)
    attend<LANES, 2><<<grid, THREADS, 0, stream>>>(*a, group / heads);
  else
    attend<LANES, 1><<<grid, THREADS, 0, stream>>>(*a, group / heads);
}

int us_attention_decode(const struct us_attention_decode *a, cudaStream_t stream) {
  const uint32_t widest = a->qk_dim > a->v_dim ? a->qk_dim : a->v_dim;
  bool heads = a->kv_heads && a->q_heads && a->q_heads % a->kv_heads == 0;
  bool dims = a->qk_dim && a->v_dim && a->qk_dim % 16 == 0 && a->v_dim % 16 == 0 && widest <= 256;
  if (!heads || !dims || a->stride % 8 || !a->capacity || !(a->scale > 0.0f) || a->slots > 65535)
    return cudaErrorInvalidValue;
  if (!a->slots) return cudaSuccess;
  if (widest <= 64)
    launch<8>(a, stream);
  else if (widest <= 128)
    launch<16>(a, stream);
  else
    launch<32>(a, stream);
  return cudaGetLastError();
}

/* --- packed rows --- */

/* Block a row: 16 bytes of a key or value a thread and turn. */
static __global__ void __launch_bounds__(THREADS)
    keep_row(const __grid_constant__ struct us_attention_keep a) {
  const uint32_t r = blockIdx.x, position = a.position[r], k_words = a.qk_dim / 8, v_words = a.v_dim / 8;
  if (a.slot[r] < 0 || position + a.capacity < a.end[r]) return;
  const uint16_t *k = a.k + r * a.stride, *v = a.v + r * a.stride;
  for (uint32_t i = threadIdx.x; i < a.kv_heads * (k_words + v_words); i += THREADS) {
    const uint32_t g = i / (k_words + v_words), word = i % (k_words + v_words);
    const size_t place = ((size_t)a.slot[r] * a.kv_heads + g) * a.capacity + position % a.capacity;
    if (word < k_words)
      *(uint4 *)(a.k_cache + place * a.qk_dim + word * 8) = *(const uint4 *)(k + a.k_offset[g] + word * 8);
    else
      *(uint4 *)(a.v_cache + place * a.v_dim + (word - k_words) * 8) =
          *(const uint4 *)(v + a.v_offset[g] + (word - k_words) * 8);
  }
}

int us_attention_keep(const struct us_attention_keep *keep, cudaStream_t stream) {
  if (!keep->kv_heads || !keep->capacity || keep->qk_dim % 16 || keep->v_dim % 16 || keep->stride % 8)
    return cudaErrorInvalidValue;
  if (!keep->rows) return cudaSuccess;
  keep_row<<<keep->rows, THREADS, 0, stream>>>(*keep);
  return cudaGetLastError();
}
