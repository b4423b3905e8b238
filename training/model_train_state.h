/* model_train_state.h: what model_train.c and model_train_grad.c share: roles, saved activations, buffers. Internal. */
#ifndef US_TRAINING_MODEL_TRAIN_STATE_H
#define US_TRAINING_MODEL_TRAIN_STATE_H

#include "kernels/experts/experts_grad.h"
#include "training/model_roles.h"
#include "training/model_train.h"

/* A layer's experts as arrays of matrices. */
struct us_layer_experts {
  const float **gate_up, **down;     /* (E) compute weights */
  float **gate_up_grad, **down_grad; /* (E) */
};

/* Geometry of full [0] and sliding [1] layers. */
struct us_attention_roles {
  const struct us_attention_shape *shape;
  uint32_t width;                                       /* qkv columns */
  uint32_t *q_offset, *k_offset, *v_offset, *qk_offset; /* (H), (G), (G), (H + G) */
  float *table;                                         /* (capacity, rotary) */
  uint32_t *begin;                                      /* (capacity) first visible key of each row */
};

/* Activations of one layer that backward needs. */
struct us_layer_saved {
  float *norm1, *inverse1, *qkv, *attention, *max, *sum, *middle, *norm2, *inverse2;
  float *gate_up, *a;     /* dense: (R, 2F), (R, F) */
  float *scores, *weight; /* MoE: (R, E), (R, K) */
  struct us_experts_plan plan;
  struct us_experts_saved experts;
};

struct us_model_train_state {
  struct us_model_roles model;
  struct us_layer_roles *roles;     /* (L) */
  struct us_layer_experts *experts; /* (L) */
  struct us_attention_roles attention[2];
  uint32_t *end;                /* (capacity) i + 1 */
  float **residual;             /* (L + 1) stream before each layer and after the last */
  struct us_layer_saved *saved; /* (L), all the same buffers unless US_TRAIN_SAVE */
  uint32_t **id;                /* (L) of (capacity, K) */
  float *final_inverse;
  float *branch;            /* (R, D) output of attention or MLP; backward: gradient of the norm's output */
  float *dx;                /* (R, D) */
  float *dqkv, *dattention; /* (R, widest qkv), (R, widest H V) */
  float *da, *dweight;      /* (R, dense F), (R, K) */
  float *arena;             /* everything above lies in it */
};

/* A forward pass by pieces: take the batch and fill residual[0]; run layer l from residual[l] to residual[l + 1]; fill hidden. */
US_CHECKED enum us_status us_model_train_begin(struct us_model_train *train, const struct us_batch *batch,
                                               struct us_err *err);
void us_model_train_layer(struct us_model_train *train, uint32_t l);
US_CHECKED enum us_status us_model_train_end(struct us_model_train *train, struct us_err *err);

/* A layer by pieces, between the products that one of them reads the weights of: norm1; attention (qkv); middle, norm2, and the
 * sorted choices of experts (o_proj, router); a or experts, and the stream after the layer (gate_up, down). */
enum us_layer_part { US_PART_ATTENTION_INPUTS, US_PART_ATTENTION, US_PART_MLP_INPUTS, US_PART_MLP };
void us_model_train_part(struct us_model_train *train, uint32_t l, enum us_layer_part part);

struct us_attention_seq us_model_train_attention(const struct us_model_train *train, uint32_t l);
struct us_experts_rows us_model_train_experts(const struct us_model_train *train, uint32_t l);

#endif
