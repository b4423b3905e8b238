/* rope_train.h: what happens to q, k and v between their product and attention, in place, in one pass; and the way back.
 *
 *     struct us_rope_train rope = {.R = R, .stride = W, .x = qkv, .table = table, .position = position, .rotary = 64,
 *                                  .rotated = qk_offset, .rotated_heads = H + G,
 *                                  .scaled = v_offset, .scaled_heads = G, .scaled_dim = V, .scale = value_scale};
 *     us_rope_train(&rope, stream);          // forward over qkv
 *     rope.x = dqkv, us_rope_train_grad(&rope, stream);
 *
 * As rope_grad.h: NeoX pairs (i, i + rotary/2) of the leading `rotary` dims of each head are rotated in FP32 and rounded once;
 * the gradient is the rotation back. Values are scaled in both directions. All pointers are device memory; a call returns a
 * cudaError_t, cudaErrorInvalidValue for sizes the rules below do not allow.
 */
#ifndef US_KERNELS_ROPE_TRAIN_H
#define US_KERNELS_ROPE_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* stride, the offsets, rotary / 2 and scaled_dim are multiples of 8, x is 16-byte aligned (else a slower path, same bits). */
struct us_rope_train {
  size_t R;
  size_t stride;            /* values between rows */
  uint16_t *x;              /* bf16 rows */
  const float *table;       /* (positions, rotary): cosines, then sines, as us_rope_table makes them */
  const uint32_t *position; /* (R) */
  uint32_t rotary;          /* even */
  const uint32_t *
      rotated; /* (rotated_heads) where each head that is rotated starts in a row; may be NULL with 0 heads */
  uint32_t rotated_heads;
  const uint32_t *scaled; /* (scaled_heads) where each head that is scaled starts */
  uint32_t scaled_heads, scaled_dim;
  float scale; /* 1: the scaled heads are not touched */
};
int us_rope_train(const struct us_rope_train *rope, cudaStream_t stream);
int us_rope_train_grad(const struct us_rope_train *rope, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
