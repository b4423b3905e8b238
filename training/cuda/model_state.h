/* model_state.h: what model.c, model_forward.c and model_grad.c share: device pointers of tensors, activations, scratch. Internal. */
#ifndef US_TRAINING_CUDA_MODEL_STATE_H
#define US_TRAINING_CUDA_MODEL_STATE_H

#include "kernels/attention_seq/attention_train.h"
#include "kernels/embed/embed_train.h"
#include "kernels/experts/experts_train.h"
#include "kernels/experts/grouped_gemm.h"
#include "kernels/rmsnorm/rmsnorm_train.h"
#include "kernels/rope/rope_train.h"
#include "kernels/router/router_train.h"
#include "training/arena.h"
#include "training/cuda/model.h"
#include "training/cuda/staging.h"
#include "training/model_roles.h"

/* Geometry of full [0] and sliding [1] layers. */
struct us_cuda_attention_roles {
  const struct us_attention_shape *shape;
  uint32_t width;                                       /* qkv columns */
  uint32_t *q_offset, *k_offset, *v_offset, *qk_offset; /* device (H), (G), (G), (H + G) */
  float *table;                                         /* device (capacity, rotary) */
  uint32_t *begin;                                      /* device (capacity) first visible key of each row */
  void *plan;                                           /* of us_attention_train, for the batch */
};

/* Activations of one layer that backward needs. */
struct us_cuda_layer_saved {
  uint16_t *norm1, *qkv, *attention, *norm2; /* (R, D), (R, width), (R, H V), (R, D) */
  float *inverse1, *inverse2, *lse, *middle; /* (R), (R), (R, H), (R, D) */
  uint16_t *gate_up;                         /* (R, 2F) or by slot (R * K, 2F) */
  float *scores, *weight;                    /* MoE: (R, E), (R, K) */
  uint32_t *start, *row, *pair, *slot;       /* (E + 1), (R * K), (R * K), (R, K) */
  uint16_t *x;                               /* (R * K, D) */
};

struct us_cuda_model_state {
  struct us_model_roles model;
  struct us_layer_roles *roles; /* (L) host */
  struct us_cuda_attention_roles attention[2];
  struct us_cuda_layer_saved *saved; /* (L) host; all the same buffers unless US_TRAIN_SAVE */
  uint32_t **id;                     /* (L) host: (R, K) each */
  float **residual;                  /* (L + 1) host: stream before each layer and after the last */
  void *memory;                      /* device: everything that lies there */

  struct us_cuda_staging staging;
  uint64_t *load; /* pinned (L, E) */
  int32_t *token;
  uint32_t *position, *end; /* device (capacity); end[i] = i + 1 */
  uint32_t *embed_row;      /* device (capacity): of the plan of the embedding's gradient */
  struct us_embed_train_piece *embed_piece;
  size_t embed_pieces;
  uint64_t *embed_work; /* host (2 capacity) */

  float *final_inverse;
  uint16_t *a;          /* forward: (R, F) or (R * K, F); backward: the same, weighted by slot */
  uint16_t *slot_y;     /* (R * K, D) output of experts; backward: gradient of their input */
  uint16_t *slot_dy;    /* (R * K, D) */
  uint16_t *da;         /* (R, F) or (R * K, F) */
  float *dx, *dnorm;    /* (R, D) */
  uint16_t *dx_rounded; /* (R, D) */
  uint16_t *dqkv, *dattention;
  float *dweight, *dlogit; /* (R, K) */
  uint16_t *lesson;        /* (R, E) gradient of the logits towards the teacher's scores */
  void *scratch;           /* of whatever operation runs */
};

/* Check a batch and queue its way to the device. */
US_CHECKED enum us_status us_cuda_model_accept(struct us_cuda_model *model, const struct us_batch *batch,
                                               struct us_err *err);

/* Which tiles of keys the batch's rows see, once for all layers. */
void us_cuda_model_plan(struct us_cuda_model *model);

/* Run layer l from residual[l] to residual[l + 1]; again: only what backward reads, and loads are not counted. */
void us_cuda_model_layer(struct us_cuda_model *model, uint32_t l, const struct us_cuda_taps *opt_taps,
                         bool again);

/* The same in pieces, over model->R rows whose tokens and positions are in state->token and state->position: embedding to residual[0]; q, k
 * and v of residual[l], rotated, to saved->qkv; saved->attention's projection to saved->middle; the MLP to residual[l + 1];
 * and residual[L] normed to model->hidden. */
void us_cuda_model_begin(struct us_cuda_model *model);
void us_cuda_model_project(struct us_cuda_model *model, uint32_t l, const struct us_cuda_taps *opt_taps);
void us_cuda_model_merge(struct us_cuda_model *model, uint32_t l);
void us_cuda_model_mlp(struct us_cuda_model *model, uint32_t l, bool again);
void us_cuda_model_end(struct us_cuda_model *model, const struct us_cuda_taps *opt_taps);

/* And these in smaller ones: attention of saved->qkv to saved->attention; saved->middle normed to saved->norm2; experts chosen, with the
 * plan of their rows; and from there, or through a dense MLP, to state->a and residual[l + 1]. */
void us_cuda_model_attend(struct us_cuda_model *model, uint32_t l);
void us_cuda_model_norm_middle(struct us_cuda_model *model, uint32_t l);
void us_cuda_model_route(struct us_cuda_model *model, uint32_t l, bool again);
void us_cuda_model_experts(struct us_cuda_model *model, uint32_t l, bool again);
void us_cuda_model_dense(struct us_cuda_model *model, uint32_t l, bool again);

struct us_attention_train us_cuda_model_attention(const struct us_cuda_model *model, uint32_t l);
struct us_rope_train us_cuda_model_rope(const struct us_cuda_model *model, uint32_t l, uint16_t *x);
struct us_grouped us_cuda_model_grouped(const struct us_cuda_model *model, uint32_t l, uint32_t N,
                                        uint32_t K);
struct us_rmsnorm_train us_cuda_model_norm(const struct us_cuda_model *model, const float *x,
                                           const struct us_param *gain, uint16_t *y, float *inverse);

/* Values from one expert's matrices to the next one's. */
static inline uint64_t us_cuda_expert_stride(const struct us_shape *shape,
                                             const struct us_layer_roles *roles) {
  return shape->experts > 1 ? roles->experts[3].offset - roles->experts[0].offset : 0;
}

#endif
