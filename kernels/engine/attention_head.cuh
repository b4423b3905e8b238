/* attention_head.cuh: one head of a row, as 16 lanes hold it: per-head norm, rotation, and its place in the cache.
 *
 *     struct us_head h = {.values = kv + g * Q, .norm = k_norm, .rope = rope + position * rotary, ...};
 *     us_head_load<0>(&h, lane, x);                 // two heads a warp, 16 lanes each; x[i]: dims 32 i + 2 lane and the next
 *     us_head_finish<0>(&h, lane, x);               // normed and rotated, FP32
 *
 * Rotation: the operations of kernels/rope on the CPU, the same bits. Norm: as kernels/rmsnorm, but the sum of squares has each
 * lane take its dims in ascending order and then a tree over lanes 8, 4, 2, 1 apart.
 * The template argument is Q where it is known when compiled (a multiple of 32), or 0.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_HEAD_CUH
#define US_KERNELS_ENGINE_ATTENTION_HEAD_CUH

#include "formats/bf16.h"
#include "kernels/engine/block.cuh"
#include <cuda_bf16.h>

#define US_HEAD_PAIRS 6 /* of a lane: Q <= 192 */

struct us_head {
  const float *values; /* (Q) as the projection stored them */
  const float *norm;   /* (Q) or NULL */
  const float *rope;   /* cosines, then sines, of the row's position */
  uint32_t Q, rotary;
  float eps;
};

template <int QS> struct us_head_count { static const uint32_t pairs = QS ? QS / 32 : US_HEAD_PAIRS; };

/* Whether the lane's i-th pair exists. */
template <int QS>
static __device__ __forceinline__ bool us_head_has(const struct us_head *h, uint32_t lane, uint32_t i) {
  return QS || 32 * i + 2 * lane < h->Q;
}

/* All loads at once; 0 beyond Q. */
template <int QS>
static __device__ __forceinline__ void us_head_load(const struct us_head *h, uint32_t lane,
                                                    float2 x[US_HEAD_PAIRS]) {
  const float2 *from = (const float2 *)h->values + lane;
#pragma unroll
  for (uint32_t i = 0; i < us_head_count<QS>::pairs; i++)
    x[i] = us_head_has<QS>(h, lane, i) ? __ldcg(from + 16 * i) : make_float2(0, 0);
}

/* Quotient and 1 / sqrt, correctly rounded for normal numbers: an approximation, and one step with the exact remainder (Markstein
 * 1990). The operators would call a function for subnormal ones, and a call drives the registers of its caller into memory. */
static __device__ __forceinline__ float us_head_divide(float x, float by) {
  float r, q;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(by));
  r = fmaf(fmaf(-by, r, 1.0f), r, r), q = x * r;
  return fmaf(fmaf(-by, q, x), r, q);
}
static __device__ __forceinline__ float us_head_inverse_root(float x) {
  float y, root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  root = x * y, root = fmaf(fmaf(-root, root, x), 0.5f * y, root);
  return us_head_divide(1.0f, root);
}

/* x / rms * norm; returns 1 / rms, the same in the 16 lanes. */
template <int QS>
static __device__ __forceinline__ float us_head_norm(const struct us_head *h, uint32_t lane,
                                                     float2 x[US_HEAD_PAIRS]) {
  const float2 *norm = (const float2 *)h->norm + lane;
  float sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < us_head_count<QS>::pairs; i++)
    sum = fmaf(x[i].y, x[i].y, fmaf(x[i].x, x[i].x, sum));
#pragma unroll
  for (uint32_t step = 8; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  float scale = us_head_inverse_root(us_head_divide(sum, (float)h->Q) + h->eps);
#pragma unroll
  for (uint32_t i = 0; i < us_head_count<QS>::pairs; i++) {
    if (!us_head_has<QS>(h, lane, i)) continue;
    float2 w = norm[16 * i];
    x[i].x = x[i].x * scale * w.x, x[i].y = x[i].y * scale * w.y;
  }
  return scale;
}

/* A lane's cosines and sines: of rotary sizes 64 and 128. */
struct us_head_rope {
  float2 c[2], s[2];
};

/* Loads without a condition, which would make them wait for each other. */
static __device__ __forceinline__ struct us_head_rope us_head_load_rope(const struct us_head *h,
                                                                        uint32_t lane) {
  uint32_t n = h->rotary % 64 ? 0 : h->rotary / 64, two = n & 2;
  const float2 *table = (const float2 *)h->rope + (n ? lane : 0);
  struct us_head_rope r;
  r.c[0] = table[0], r.s[0] = table[16 * n];
  r.c[1] = table[two * 8], r.s[1] = table[two * 24];
  return r;
}

/* Partners in the same lane: rotary sizes of 64 N. */
template <int N>
static __device__ __forceinline__ void us_head_rotate(const struct us_head_rope *r, float2 x[US_HEAD_PAIRS]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    float2 c = r->c[i], s = r->s[i], a = x[i], b = x[i + N];
    x[i] = make_float2(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
    x[i + N] = make_float2(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
  }
}

/* Dim d of value x, for any rotary size: the partner is read again. */
static __device__ __forceinline__ float us_head_rotate_any(const struct us_head *h, uint32_t d, float x,
                                                           float scale) {
  uint32_t half = h->rotary / 2, pair = d < half ? d : d - half, other = d < half ? d + half : d - half;
  if (d >= h->rotary) return x;
  float y = __ldcg(h->values + other), c = h->rope[pair], s = h->rope[half + pair];
  if (h->norm) y = y * scale * h->norm[other];
  return d < half ? x * c - y * s : x * c + y * s;
}

/* Norm and rotation; whole warps. Rotary sizes: all up to 64 (that of all published models), and 128. */
template <int QS>
static __device__ __forceinline__ void us_head_turn(const struct us_head *h, const struct us_head_rope *rope,
                                                    uint32_t lane, float2 x[US_HEAD_PAIRS]) {
  float scale = 1;
  if (h->norm) scale = us_head_norm<QS>(h, lane, x);
  if (h->rotary == 64) {
    us_head_rotate<1>(rope, x);
  } else if (h->rotary == 128) {
    us_head_rotate<2>(rope, x);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      x[i].x = us_head_rotate_any(h, 32 * i + 2 * lane, x[i].x, scale);
      x[i].y = us_head_rotate_any(h, 32 * i + 2 * lane + 1, x[i].y, scale);
    }
  }
}

template <int QS>
static __device__ __forceinline__ void us_head_finish(const struct us_head *h, uint32_t lane,
                                                      float2 x[US_HEAD_PAIRS]) {
  struct us_head_rope rope = us_head_load_rope(h, lane);
  us_head_turn<QS>(h, &rope, lane, x);
}

/* Two values rounded to bf16, the first in the low half. */
static __device__ __forceinline__ uint32_t us_head_round(float x, float y) {
  __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &h, 4);
  return bits;
}

/* ---- the cache -------------------------------------------------------------------------------------------------------- */

/* A page of 64 positions as one KV head sees it: offsets in bytes. */
static __device__ __forceinline__ uint32_t us_head_key_offset(uint32_t Q, uint32_t g, uint32_t slot) {
  return (g * 64 + slot) * us_engine_k_stride(Q) * 2;
}
static __device__ __forceinline__ uint32_t us_head_value_offset(uint32_t G, uint32_t Q, uint32_t V,
                                                                uint32_t g, uint32_t dim) {
  return us_engine_v_offset(G, Q) + (g * V + dim) * 128;
}

#endif
