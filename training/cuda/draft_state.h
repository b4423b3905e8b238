/* draft_state.h: what draft.c, draft_forward.c and draft_grad.c share: activations, buffers. Internal. */
#ifndef US_TRAINING_CUDA_DRAFT_STATE_H
#define US_TRAINING_CUDA_DRAFT_STATE_H

#include "kernels/attention_seq/attention_train.h"
#include "kernels/embed/embed_train.h"
#include "kernels/rmsnorm/rmsnorm_train.h"
#include "kernels/rope/rope_train.h"
#include "training/arena.h"
#include "training/cuda/draft.h"
#include "training/cuda/staging.h"
#include "training/model_roles.h"

/* Activations of one layer that backward needs. Rows of raw and qkv: R of the context, whose q part is unused, then the
 * blocks'. raw holds q and k before their norms, and v as it is multiplied; qkv holds normed, rotated q and k. */
struct us_cuda_draft_saved {
  uint16_t *raw, *qkv, *norm1, *attention, *norm2, *gate_up;
  float *q_inverse, *k_inverse; /* (block rows, H), (all rows, G) */
  float *inverse1, *inverse2, *lse, *middle;
};

struct us_cuda_draft_state {
  struct us_draft_roles roles;
  struct us_cuda_draft_saved saved[US_MAX_DRAFT_LAYERS];
  void *memory; /* device: everything that lies there */
  struct us_cuda_staging staging;
  uint64_t *plan_work; /* host (2 block rows) */

  uint32_t *q_offset, *k_offset, *v_offset, *qk_offset; /* (H), (G), (G), (H + G) in a row of qkv */
  float *table;                                         /* (capacity + B, rotary) */
  uint32_t *position;                                   /* (all rows) */
  int32_t *token;                                       /* (block rows) */
  uint32_t *range[4];                                   /* (block rows) as us_draft_blocks.range */
  uint32_t *mask_row;                                   /* of the plan of the mask vector's gradient */
  struct us_embed_train_piece *mask_piece;
  size_t mask_pieces;
  void *plan; /* of attention */

  float *fused, *fused_inverse;             /* (R, D), (R) */
  uint16_t *context, *dfused;               /* (R, D): c = rmsnorm(fc f); gradient of fc f */
  float *residual[US_MAX_DRAFT_LAYERS + 1]; /* (block rows, D) */
  float *final_inverse;
  uint32_t *previous;                /* (block rows) token before; of a Markov head, as what follows */
  uint16_t *before, *inner, *dinner; /* (block rows, D), (.., rank), (.., rank) */
  float *dx, *dnorm, *dcontext;
  uint16_t *dx_rounded, *dqkv, *dattention, *a, *da;
  void *scratch;
};

static inline size_t us_cuda_draft_rows(const struct us_cuda_draft *draft) {
  return draft->blocks * draft->shape.block;
}

/* Columns before K in a row of qkv. */
static inline size_t us_cuda_draft_q_width(const struct us_cuda_draft *draft) {
  return (size_t)draft->shape.attention.q_heads * draft->shape.attention.qk_dim;
}

/* Check a pass and queue its way to the device. */
US_CHECKED enum us_status us_cuda_draft_accept(struct us_cuda_draft *draft, size_t R,
                                               const uint32_t *position, const struct us_draft_blocks *blocks,
                                               struct us_err *err);

struct us_attention_train us_cuda_draft_attention(const struct us_cuda_draft *draft, uint32_t l);

/* Norm of `rows` FP32 rows; per-head norm of q (block rows) or k (all rows) of a layer. */
struct us_rmsnorm_train us_cuda_draft_norm(const struct us_cuda_draft *draft, size_t rows, const float *x,
                                           const struct us_param *gain, uint16_t *y, float *inverse);
struct us_rmsnorm_train us_cuda_draft_q_norm(const struct us_cuda_draft *draft, uint32_t l);
struct us_rmsnorm_train us_cuda_draft_k_norm(const struct us_cuda_draft *draft, uint32_t l);

/* Rotation of q and k of the block rows, and of k of the context rows, of x laid out as qkv; nothing is scaled. */
struct us_rope_train us_cuda_draft_block_rope(const struct us_cuda_draft *draft, uint16_t *x);
struct us_rope_train us_cuda_draft_context_rope(const struct us_cuda_draft *draft, uint16_t *x);

/* Scaling of v in x laid out as raw, of `rows` rows; nothing is rotated. */
struct us_rope_train us_cuda_draft_scale(const struct us_cuda_draft *draft, size_t rows, uint16_t *x);

#endif
