/* params.h: what is trained: FP32 masters, their gradients, the weights as multiplied, and how each is treated.
 *
 *     struct us_params params;
 *     us_params_init_fresh(&params, &shape, seed, 0.02f, &err);   // or us_params_init_model(&params, model, pool, false, &err)
 *     us_params_refresh(&params, pool, US_SEQ_ROUND_BF16, &err);   // compute = bf16 or fake-quantised masters
 *     ... forward and backward: read .compute, add to .grad; an optimizer step updates .value ...
 *     us_params_export(&params, model, &err);                   // encode the masters into a us_model's tensors
 *     us_params_release(&params);
 *
 * One us_param is one published tensor. All masters lie in one arena in file order, and so do the gradients and the
 * compute copies (each tensor padded to 16 floats), so that state is written and norms are taken in one order.
 */
#ifndef US_TRAINING_PARAMS_H
#define US_TRAINING_PARAMS_H

#include "kernels/optim/oscillation.h"
#include "kernels/seq/seq.h"
#include "model/model.h"

enum us_param_group {
  US_PARAM_ADAMW, /* embedding, head, router, vectors */
  US_PARAM_MUON,  /* matrices of the layers; the drafter's fc */
  US_PARAM_BIAS,  /* router bias: no gradient, moved by us_router_balance */
};

/* How a matrix divides into the matrices that Muon orthogonalises apart: `chunks` runs of q | k | v rows; 0: whole. */
struct us_param_split {
  uint32_t chunks, q_rows, k_rows, v_rows; /* rows a chunk */
};

struct us_param {
  char name[128];
  const char *family; /* us_tensor_ref.family */
  uint32_t layer;
  size_t rows, cols; /* (N, K); (n, 1) for a vector */
  size_t offset;     /* of this tensor in the arenas, in floats */
  bool vector;
  bool frozen;      /* no gradient is taken (grad is NULL-safe: ask us_param_grad), no update */
  bool decay;       /* weight decay applies: matrices, not vectors */
  float rate_scale; /* multiplies the learning rate; 1 */
  enum us_param_group group;
  struct us_param_split split;
  struct us_matrix_encoding encoding; /* what it is multiplied as and exported as; FORMAT_F32 for vectors */
  float *value;                       /* master */
  float *grad;                        /* summed since us_params_zero_grad */
  float *compute;                     /* as the forward pass multiplies it */
  float *moment1;                     /* AdamW: first moment; Muon: momentum */
  float *moment2;                     /* AdamW; NULL for Muon */
};

/* struct us_oscillation of every weight, in arenas like the moments; NULL unless us_params_watch made them. */
struct us_watch {
  float *share, *mean, *turn;
};

struct us_params {
  struct us_param *items;
  size_t count;
  size_t floats;                                     /* of each arena */
  float *value, *grad, *compute, *moment1, *moment2; /* arenas; grad and moments are NULL in a frozen set */
  struct us_watch watch;
};

/* Tensors of a shape, randomly initialised: matrices N(0, deviation) by Philox (stream US_STREAM_INIT, keyed by seed and
 * tensor index), norms 1, sinks and router bias 0. deviation 0: 1 / sqrt(K) a matrix. Encodings follow shape->precision. */
US_CHECKED enum us_status us_params_init_fresh(struct us_params *params, const struct us_shape *shape,
                                               uint64_t seed, float deviation, struct us_err *err);
/* The same bits, drawn by the threads of a pool: a billion values take half a minute on one. */
US_CHECKED enum us_status us_params_init_fresh_on(struct us_params *params, const struct us_shape *shape,
                                                  struct us_pool *pool, uint64_t seed, float deviation,
                                                  struct us_err *err);
US_CHECKED enum us_status us_params_init_fresh_draft(struct us_params *params,
                                                     const struct us_draft_shape *shape, uint64_t seed,
                                                     float deviation, struct us_err *err);

/* Tensors decoded from a model, by the threads of a pool (NULL: this one alone). With `frozen` there are no gradients and moments, and
 * compute is value. */
US_CHECKED enum us_status us_params_init_model(struct us_params *params, struct us_model *model,
                                               struct us_pool *pool, bool frozen, struct us_err *err);
US_CHECKED enum us_status us_params_init_draft(struct us_params *params, struct us_draft *draft, bool frozen,
                                               struct us_err *err);
void us_params_release(struct us_params *params);

/* Arenas for what training/oscillation.h does, zeroed; they are released with the rest. */
US_CHECKED enum us_status us_params_watch(struct us_params *params, struct us_err *err);

/* The tensor of that published name, or NULL. */
struct us_param *us_params_find(const struct us_params *params, const char *name);

/* Gradient to add to, or NULL if the tensor takes none. */
static inline float *us_param_grad(const struct us_param *p) {
  return p->frozen ? NULL : p->grad;
}

/* Bring .compute up to date with .value. US_SEQ_ROUND_NONE copies the masters of F32 and BF16 tensors unrounded; FP8 and
 * MXFP4 are fake-quantised in either case. NaN or Inf in a master is US_ERR_CHECK and names tensor and index. */
US_CHECKED enum us_status us_params_refresh(struct us_params *params, struct us_pool *pool,
                                            enum us_seq_rounding rounding, struct us_err *err);
/* The same for one tensor. */
US_CHECKED enum us_status us_param_refresh(const struct us_param *p, enum us_seq_rounding rounding,
                                           struct us_err *err);

void us_params_zero_grad(struct us_params *params, struct us_pool *pool);

/* L2 norm of all gradients in double, in a fixed order; and multiply all of them by a factor. */
double us_params_grad_norm(const struct us_params *params, struct us_pool *pool);
void us_params_scale_grad(struct us_params *params, struct us_pool *pool, float factor);

/* First tensor whose gradient (or master) is not finite; NULL if all are. */
const struct us_param *us_params_find_nonfinite(const struct us_params *params, bool gradients);

/* Encode the masters into the tensors of a model or drafter made by us_model_create from the same shape: memory comes
 * from the model, formats from each us_param's encoding. */
US_CHECKED enum us_status us_params_export(const struct us_params *params, struct us_model *model,
                                           struct us_err *err);
US_CHECKED enum us_status us_params_export_draft(const struct us_params *params, struct us_draft *draft,
                                                 struct us_err *err);

#endif
