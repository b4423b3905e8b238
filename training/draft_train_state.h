/* draft_train_state.h: what draft_train.c and draft_train_grad.c share: roles, saved activations, buffers. Internal. */
#ifndef US_TRAINING_DRAFT_TRAIN_STATE_H
#define US_TRAINING_DRAFT_TRAIN_STATE_H

#include "kernels/attention_seq/attention_seq.h"
#include "kernels/linear/linear_grad.h"
#include "kernels/rmsnorm/rmsnorm_grad.h"
#include "kernels/rope/rope_grad.h"
#include "kernels/swiglu/swiglu_grad.h"
#include "training/draft_train.h"
#include "training/model_roles.h"

/* Activations of one layer that backward needs. Rows of raw and qkv: R of the context, whose q part is unused, then the
 * blocks'. raw holds q and k before their norms, and v as it is multiplied; qkv holds normed, rotated q and k. */
struct us_draft_saved {
  float *raw, *qkv;
  float *q_inverse, *k_inverse; /* (block rows, H), (all rows, G) */
  float *norm1, *inverse1, *attention, *max, *sum, *middle, *norm2, *inverse2, *gate_up, *a;
};

struct us_draft_train_state {
  struct us_draft_roles roles;
  struct us_draft_saved saved[US_MAX_DRAFT_LAYERS];
  uint32_t *q_offset, *k_offset, *v_offset; /* (H), (G), (G) in a row of qkv */
  float *table;                             /* (capacity + B, rotary) */
  uint32_t *position;                       /* (all rows) */
  float *features;                          /* (R, taps * D) rounded */
  float *fused, *fused_inverse, *context;   /* (R, D), (R), (R, D): c = rmsnorm(fc f) */
  float *residual[US_MAX_DRAFT_LAYERS + 1]; /* (block rows, D) */
  float *final_inverse;
  int32_t *previous;              /* (block rows) tokens before; of a Markov head, as what follows */
  float *before, *inner, *dinner; /* (block rows, D), (.., rank), (.., rank) */
  float *branch, *dx, *dqkv, *dattention, *da, *dcontext, *masked;
  void *arena;
};

static inline size_t us_draft_block_rows(const struct us_draft_train *train) {
  return train->blocks->n * train->blocks->B;
}

struct us_attention_seq us_draft_train_attention(const struct us_draft_train *train, uint32_t l);

#endif
