/* model_train.h: forward and backward of a whole MiMo-V2 target over packed sequences.
 *
 *     struct us_model_train *train;
 *     us_model_train_create(&shape, &params, &seq, R, US_TRAIN_SAVE, &train, &err);
 *     us_model_train_forward(train, &(struct us_batch){.R = R, .token = t, .position = p, .document = d}, NULL, &err);
 *     us_head_loss(&seq, &loss);                        // loss.x = train->hidden, loss.dx = train->dhidden
 *     us_model_train_backward(train, &err);             // adds to the gradients in params
 *
 * Operations and rounding points are those of the reference executor, by sequence instead of by row. Memory: about
 * (5 D + qkv + H V + K (D + 3 F)) floats a row and layer with US_TRAIN_SAVE, one layer's worth plus D a row and layer with
 * US_TRAIN_RECOMPUTE (the same bits), one layer's worth with US_TRAIN_FORWARD.
 */
#ifndef US_TRAINING_MODEL_TRAIN_H
#define US_TRAINING_MODEL_TRAIN_H

#include "training/params.h"

enum us_train_memory {
  US_TRAIN_SAVE,
  US_TRAIN_RECOMPUTE,
  US_TRAIN_FORWARD /* no backward: frozen targets, evaluation */
};

/* R rows, documents behind each other. */
struct us_batch {
  size_t R;
  const int32_t *token;     /* (R) */
  const uint32_t *position; /* (R) position inside the document */
  const uint32_t *document; /* (R) row at which the row's document starts: keys before it are invisible */
};

/* Features wanted on the way: residual stream after these layers. */
struct us_train_taps {
  uint32_t count;
  uint32_t layer[US_MAX_TAPS];
  float *out; /* (R, count * D) written */
};

/* What the backward pass teaches to the routers: another model's scores, or one for all (kernels/router/router_grad.h). */
struct us_router_lesson {
  const struct us_model_train
      *opt_teacher; /* after its forward pass over the same batch; NULL: `target` for every score */
  float target;
  const float *opt_weight;    /* (R) */
  float scale;                /* 0: nothing of the scores */
  float margin, margin_scale; /* 0: no margin around the choice */
};

struct us_model_train {
  struct us_shape shape;
  struct us_params *params; /* borrowed */
  struct us_seq *seq;       /* borrowed */
  size_t capacity;          /* largest R */
  enum us_train_memory memory;
  struct us_batch batch;       /* of the last forward pass */
  float *hidden;               /* (R, D) after the final norm */
  float *dhidden;              /* (R, D) gradient of hidden, consumed by backward */
  const struct us_param *head; /* compute is the head's weights, us_param_grad(head) its gradient */
  struct us_router_lesson routers;
  /* Rows visit the experts that this model chose in its last forward pass, over the same rows, by their own gates; NULL: their own. */
  const struct us_model_train *opt_follow;
  uint64_t *load; /* (L, E) rows each expert got since us_model_train_balance or _clear_load */
  struct us_model_train_state *state;
};

US_CHECKED enum us_status us_model_train_create(const struct us_shape *shape, struct us_params *params,
                                                struct us_seq *seq, size_t capacity,
                                                enum us_train_memory memory,
                                                struct us_model_train **ret_train, struct us_err *err);
void us_model_train_free(struct us_model_train *train);

/* Fill train->hidden. The batch's arrays must live until backward. Positions must be below the capacity. US_ERR_MEMORY if
 * scratch ran out, US_ERR_USAGE for a batch that does not fit. */
US_CHECKED enum us_status us_model_train_forward(struct us_model_train *train, const struct us_batch *batch,
                                                 const struct us_train_taps *opt_taps, struct us_err *err);

/* Gradients of all trainable tensors but the head's (us_head_loss adds that), from train->dhidden. */
US_CHECKED enum us_status us_model_train_backward(struct us_model_train *train, struct us_err *err);

/* Move the router biases by rate * sign(mean load - load) and clear the loads. */
void us_model_train_balance(struct us_model_train *train, float rate);

/* Forget the loads: after a forward pass that was no training step. */
void us_model_train_clear_load(struct us_model_train *train);

/* Expert ids that layer l's rows chose in the last forward pass (R, K); NULL for a dense layer or if not kept. */
const uint32_t *us_model_train_routed(const struct us_model_train *train, uint32_t layer);

/* Floating-point operations of one row's forward pass at an average of `keys` visible keys; training is 3 times this. */
double us_model_train_flops(const struct us_shape *shape, double keys);

#endif
