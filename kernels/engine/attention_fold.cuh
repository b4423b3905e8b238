/* attention_fold.cuh: sums of exponentials that add up in a fixed tree, however the keys were cut among warps and blocks.
 *
 *     struct us_attention_sum group = us_attention_nothing();
 *     us_attention_fold(&group, &leaf);                    // ascending leaves; then groups into segments, segments into the whole
 *
 * A sum stands for keys: m the largest score (times log2 e), s = sum of 2^(score - m), o = sum of 2^(score - m) v, of one query
 * head and four dims. Leaf: 64 keys at absolute multiples of 64. Leaves fold in ascending order into groups of 4 (256 keys, at
 * absolute multiples), groups into segments of 4 (1024 keys), segments into the whole; a block of drafts is a last segment of its
 * own. fold(a, b): M = max(a.m, b.m), s = fmaf(b.s, 2^(b.m - M), a.s * 2^(a.m - M)), o likewise. Nothing folded with x is x,
 * so a group or a segment that was folded elsewhere enters as one item.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_FOLD_CUH
#define US_KERNELS_ENGINE_ATTENTION_FOLD_CUH

#include "kernels/engine/block.cuh"
#include <math_constants.h>

#define US_ATTENTION_GROUP   4  /* leaves */
#define US_ATTENTION_SEGMENT 16 /* leaves */
#define US_ATTENTION_BLOCK                                                                                   \
  (1u << 28) /* the leaf of a drafter's own block: after all others, in a segment of its own */
#define US_ATTENTION_LOG2E 1.44269504f

static __device__ __forceinline__ float us_attention_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* The factors of fold(a, b). */
struct us_attention_weights {
  float m, a, b;
};
static __device__ __forceinline__ struct us_attention_weights us_attention_weigh(float a, float b) {
  struct us_attention_weights w;
  w.m = fmaxf(a, b);
  w.a = us_attention_exp2(a - w.m), w.b = us_attention_exp2(b - w.m);
  return w;
}

struct us_attention_sum {
  float m, s;
  float4 o;
};

static __device__ __forceinline__ struct us_attention_sum us_attention_nothing(void) {
  struct us_attention_sum x = {-CUDART_INF_F, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
  return x;
}

static __device__ __forceinline__ void us_attention_fold(struct us_attention_sum *a,
                                                         const struct us_attention_sum *b) {
  struct us_attention_weights w = us_attention_weigh(a->m, b->m);
  a->m = w.m, a->s = fmaf(b->s, w.b, a->s * w.a);
  a->o.x = fmaf(b->o.x, w.b, a->o.x * w.a), a->o.y = fmaf(b->o.y, w.b, a->o.y * w.a);
  a->o.z = fmaf(b->o.z, w.b, a->o.z * w.a), a->o.w = fmaf(b->o.w, w.b, a->o.w * w.a);
}

#endif
