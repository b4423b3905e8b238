/* attention_head.cuh: one head of a row, as 16 lanes hold it: per-head norm, rotation, and its place in the cache.
 *
 *     struct us_head h = {.values = kv + g * Q, .norm = k_norm, .rope = rope + position * rotary, ...};
 *     us_head_load(&h, lane, x);                    // two heads a warp, 16 lanes each; x[i] is value lane + 16 i
 *     us_head_finish(&h, lane, x);                  // normed and rotated, FP32
 *
 * The operations of kernels/rmsnorm and kernels/rope on the CPU in their order, so the same bits: the sum of squares has 16 lanes,
 * lane k % 16 taking fmaf(x, x, lane) in ascending k, then a tree.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_HEAD_CUH
#define US_KERNELS_ENGINE_ATTENTION_HEAD_CUH

#include "formats/bf16.h"
#include "kernels/engine/block.cuh"
#include <cuda_bf16.h>

#define US_HEAD_VALUES 12 /* of a lane: Q <= 192 */

struct us_head {
  const float *values; /* (Q) as the projection stored them */
  const float *norm;   /* (Q) or NULL */
  const float *rope;   /* cosines, then sines, of the row's position */
  uint32_t Q, rotary;
  float eps;
};

/* All loads at once; 0 beyond Q. */
static __device__ __forceinline__ void us_head_load(const struct us_head *h, uint32_t lane,
                                                    float x[US_HEAD_VALUES]) {
#pragma unroll
  for (uint32_t i = 0; i < US_HEAD_VALUES; i++)
    x[i] = lane + 16 * i < h->Q ? __ldcg(h->values + lane + 16 * i) : 0.0f;
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

/* 1 / rms, the same in the 16 lanes. */
static __device__ __forceinline__ float us_head_scale(const struct us_head *h,
                                                      const float x[US_HEAD_VALUES]) {
  float sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < US_HEAD_VALUES; i++) sum = fmaf(x[i], x[i], sum);
#pragma unroll
  for (uint32_t step = 8; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return us_head_inverse_root(us_head_divide(sum, (float)h->Q) + h->eps);
}

/* Partners in the same lane: rotary sizes of 32 PAIRS. */
template <int PAIRS>
static __device__ __forceinline__ void us_head_rotate(const struct us_head *h, uint32_t lane,
                                                      float x[US_HEAD_VALUES]) {
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    float c = h->rope[lane + 16 * i], s = h->rope[16 * PAIRS + lane + 16 * i], a = x[i], b = x[i + PAIRS];
    x[i] = a * c - b * s, x[i + PAIRS] = b * c + a * s;
  }
}

/* Any rotary size up to 64: the partner is read again. */
static __device__ __forceinline__ void us_head_rotate_any(const struct us_head *h, uint32_t lane, float scale,
                                                          float x[US_HEAD_VALUES]) {
  uint32_t half = h->rotary / 2;
#pragma unroll
  for (uint32_t i = 0; i < 4; i++) {
    uint32_t d = lane + 16 * i;
    if (d >= h->rotary) continue;
    uint32_t pair = d < half ? d : d - half, other = d < half ? d + half : d - half;
    float y = __ldcg(h->values + other), c = h->rope[pair], s = h->rope[half + pair];
    if (h->norm) y = y * scale * h->norm[other];
    x[i] = d < half ? x[i] * c - y * s : x[i] * c + y * s;
  }
}

/* Norm and rotation; whole warps. Rotary sizes: all up to 64 (that of all published models), and 128. */
static __device__ __forceinline__ void us_head_finish(const struct us_head *h, uint32_t lane,
                                                      float x[US_HEAD_VALUES]) {
  float scale = 1;
  if (h->norm) {
    scale = us_head_scale(h, x);
#pragma unroll
    for (uint32_t i = 0; i < US_HEAD_VALUES; i++)
      if (lane + 16 * i < h->Q) x[i] = x[i] * scale * h->norm[lane + 16 * i];
  }
  if (h->rotary == 64)
    us_head_rotate<2>(h, lane, x);
  else if (h->rotary == 128)
    us_head_rotate<4>(h, lane, x);
  else
    us_head_rotate_any(h, lane, scale, x);
}

/* The device's own rounding: the same as us_bf16_from_f32 but for the payload of a NaN. */
static __device__ __forceinline__ uint16_t us_head_bf16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

/* ---- the cache ------------------------------------------------------------------------------------------------------ */

/* A layer's pages as one KV head sees them. */
struct us_head_pages {
  const uint64_t *table; /* offsets of the layer's pages */
  const uint8_t *pool;
  uint32_t page_count;
  uint32_t k_stride;           /* bytes of a K row */
  uint32_t k_offset, v_offset; /* of this KV head in a page, bytes */
};

static __device__ __forceinline__ struct us_head_pages us_head_pages(const uint8_t *pool,
                                                                     const uint64_t *table,
                                                                     uint32_t page_count, uint32_t G,
                                                                     uint32_t Q, uint32_t V, uint32_t g) {
  struct us_head_pages p;
  p.table = table, p.pool = pool, p.page_count = page_count;
  p.k_stride = us_engine_k_stride(Q) * 2;
  p.k_offset = g * 64 * p.k_stride, p.v_offset = us_engine_v_offset(G, Q) + g * V * 128;
  return p;
}

/* The page of the 64 positions [64 leaf, 64 leaf + 64). */
static __device__ __forceinline__ const uint8_t *us_head_page(const struct us_head_pages *p, uint32_t leaf) {
  return p->pool + p->table[leaf % p->page_count];
}

#endif
