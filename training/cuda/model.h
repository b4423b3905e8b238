/* model.h: forward and backward of a whole MiMo-V2 target over packed sequences on a GPU.
 *
 *     size_t bytes = us_cuda_model_bytes(&shape, R, US_TRAIN_SAVE);            // before anything is allocated
 *     us_cuda_model_create(cuda, &shape, &params, R, US_TRAIN_SAVE, &model, &err);
 *     us_cuda_model_forward(model, &batch, NULL, &err);
 *     us_cuda_loss_add(loss, &(struct us_cuda_head_loss){.x = model->hidden, .dx = model->dhidden, ...}, &err);
 *     us_cuda_model_backward(model, &err);                   // adds to params->grad
 *     us_cuda_loss_collect(loss, &total, &counted, &err);    // the step's one wait
 *     us_cuda_model_free(model);
 *
 * The graph of training/model_train.h with the storage of the GPU: residual stream, its gradient, router and sums FP32; outputs
 * of norms, qkv, attention, gate_up and the experts' rows bf16, and so are the gradients that products read. Nothing waits
 * for the GPU and nothing is allocated after creation. Same bits every run, and in both memory modes.
 */
#ifndef US_TRAINING_CUDA_MODEL_H
#define US_TRAINING_CUDA_MODEL_H

#include "training/cuda/cuda.h"
#include "training/cuda/params.h"
#include "training/model_train.h"

/* Features wanted on the way: bf16 of the residual stream after these layers. */
struct us_cuda_taps {
  uint32_t count;
  uint32_t layer[US_MAX_TAPS];
  uint16_t *out; /* device (R, count * D), written */
};

/* As us_router_lesson. */
struct us_cuda_router_lesson {
  const struct us_cuda_model *opt_teacher;
  float target;
  const float *opt_weight; /* device (R) */
  float scale, margin, margin_scale;
};

struct us_cuda_model {
  struct us_cuda *cuda; /* borrowed */
  struct us_shape shape;
  struct us_cuda_params *params; /* borrowed */
  size_t capacity;               /* largest R */
  enum us_train_memory memory;
  size_t R;         /* of the last forward pass */
  uint16_t *hidden; /* device (R, D) after the final norm */
  float *dhidden;   /* device (R, D) gradient of hidden, consumed by backward; NULL with US_TRAIN_FORWARD */
  const uint16_t *head;                   /* device (N, D) compute weights */
  float *head_grad;                       /* device (N, D); NULL if frozen */
  struct us_cuda_router_lesson routers;   /* for the backward pass; wants a multiple of 8 experts */
  const struct us_cuda_model *opt_follow; /* as us_model_train's */
  uint64_t *load; /* device (L, E) rows each expert got since us_cuda_model_clear_load */
  struct us_cuda_model_state *state;
};

/* Device bytes that create takes beside the parameters. */
size_t us_cuda_model_bytes(const struct us_shape *shape, size_t capacity, enum us_train_memory memory);

/* US_ERR_MEMORY if the activations do not fit; US_ERR_CHECK if tensors are missing or lie apart. */
US_CHECKED enum us_status us_cuda_model_create(struct us_cuda *cuda, const struct us_shape *shape,
                                               struct us_cuda_params *params, size_t capacity,
                                               enum us_train_memory memory, struct us_cuda_model **ret_model,
                                               struct us_err *err);
void us_cuda_model_free(struct us_cuda_model *model);

/* Fill model->hidden. The batch is in host memory and may be reused when the call returns. Positions must be below the
 * capacity. US_ERR_USAGE or US_ERR_INPUT for a batch that does not fit, as us_model_train_forward. */
US_CHECKED enum us_status us_cuda_model_forward(struct us_cuda_model *model, const struct us_batch *batch,
                                                const struct us_cuda_taps *opt_taps, struct us_err *err);

/* Gradients of all trainable tensors but the head's (the loss adds that), from model->dhidden. */
US_CHECKED enum us_status us_cuda_model_backward(struct us_cuda_model *model, struct us_err *err);

/* Wait, and copy the loads (L, E) to host memory. With several GPUs the caller adds them up. */
US_CHECKED enum us_status us_cuda_model_fetch_load(struct us_cuda_model *model, uint64_t *load,
                                                   struct us_err *err);
void us_cuda_model_clear_load(struct us_cuda_model *model);

/* Wait, and copy the expert ids that layer l's rows chose in the last forward pass, (R, K), to host memory. US_ERR_USAGE
 * for a dense layer. */
US_CHECKED enum us_status us_cuda_model_routed(struct us_cuda_model *model, uint32_t layer, uint32_t *id,
                                               struct us_err *err);

#endif
