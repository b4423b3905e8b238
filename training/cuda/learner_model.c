/* learner_model.c: models of the CUDA learner: one copy a lane, and its losses. */
#include "training/cuda/gemm.h"
#include "training/cuda/learner_state.h"

#include <stdlib.h>

/* --- life --- */

void us_cuda_learner_model_free(struct us_learner_model *base) {
  struct cuda_model *model = (struct cuda_model *)base;
  struct us_learner *learner = base->set->learner;
  for (uint32_t i = 0; model->loss && i < learner->lanes; i++) us_cuda_loss_free(model->loss[i]);
  for (uint32_t i = 0; model->lane && i < learner->lanes; i++) us_cuda_model_free(model->lane[i]);
  us_cuda_give(model->logits);
  free(model->loss);
  free(model->lane);
  free(model->routed);
  free(model);
}

enum us_status us_cuda_learner_model_create(struct us_learner_set *set, const struct us_shape *shape,
                                            size_t capacity, enum us_train_memory memory,
                                            struct us_learner_model **ret_model, struct us_err *err) {
  struct cuda_learner *learner = us_cuda_learner_of(set);
  struct cuda_model *model = calloc(1, sizeof *model);
  uint32_t lanes = learner->base.lanes;
  *ret_model = NULL;
  if (!model) return us_err_memory(err, "model", sizeof *model);
  model->base = (struct us_learner_model){.set = set, .shape = *shape, .capacity = capacity};
  model->lane = calloc(lanes, sizeof *model->lane);
  model->loss = calloc(lanes, sizeof *model->loss);
  enum us_status status =
      model->lane && model->loss ? US_OK : us_err_memory(err, "model", lanes * sizeof *model->lane);
  for (uint32_t i = 0; i < lanes && status == US_OK; i++)
    status = us_cuda_model_create(learner->cuda[i], shape, ((struct cuda_set *)set)->lane[i], capacity,
                                  memory, &model->lane[i], err);
  if (status == US_OK)
    *ret_model = &model->base;
  else
    us_cuda_learner_model_free(&model->base);
  return status;
}

/* --- passes --- */

static enum us_status open_loss(struct cuda_model *model, uint32_t lane, bool teacher, struct us_err *err) {
  const struct us_shape *shape = &model->base.shape;
  if (model->loss[lane] && teacher && !model->with_teacher)
    return us_err_set(err, US_ERR_USAGE, "a teacher must be there from a model's first pass on");
  if (model->loss[lane]) return US_OK;
  if (lane == 0) model->with_teacher = teacher;
  return us_cuda_loss_create(us_cuda_learner_of(model->base.set)->cuda[lane], model->base.capacity,
                             shape->hidden, shape->vocab, teacher ? shape->hidden : 0, &model->loss[lane],
                             err);
}

static enum us_status forward(struct cuda_model *model, uint32_t lane, const struct us_batch *batch,
                              struct us_err *err) {
  const struct cuda_model *follow = (const struct cuda_model *)model->base.opt_follow;
  model->lane[lane]->opt_follow = follow ? follow->lane[lane] : NULL;
  return us_cuda_model_forward(model->lane[lane], batch, NULL, err);
}

enum us_status us_cuda_learner_pass(struct us_learner_model *base, uint32_t lane,
                                    const struct us_learner_pass *pass, struct us_err *err) {
  struct cuda_model *model = (struct cuda_model *)base, *teacher = (struct cuda_model *)pass->teacher;
  struct us_cuda_model *own = model->lane[lane];
  struct us_cuda_head_teacher distribution = {0};
  enum us_status status = open_loss(model, lane, teacher != NULL, err);
  if (status == US_OK && teacher) {
    status = us_cuda_model_forward(teacher->lane[lane], &pass->batch, NULL, err);
    distribution = (struct us_cuda_head_teacher){
        .x = teacher->lane[lane]->hidden, .D = teacher->base.shape.hidden, .head = teacher->lane[lane]->head};
  }
  if (status == US_OK) status = forward(model, lane, &pass->batch, err);
  if (status != US_OK) return status;
  struct us_cuda_head_loss head = {.R = pass->batch.R,
                                   .x = own->hidden,
                                   .head = own->head,
                                   .label = pass->label,
                                   .weight = pass->weight,
                                   .opt_teacher = teacher ? &distribution : NULL,
                                   .scale = pass->scale,
                                   .dx = pass->gradient ? own->dhidden : NULL,
                                   .dhead = pass->gradient ? own->head_grad : NULL};
  status = us_cuda_loss_add(model->loss[lane], &head, err);
  own->routers = (struct us_cuda_router_lesson){.opt_teacher = teacher ? teacher->lane[lane] : NULL,
                                                .target = pass->router_target,
                                                .opt_weight = model->loss[lane]->weight,
                                                .scale = pass->scale * pass->routers,
                                                .margin = pass->margin,
                                                .margin_scale = pass->scale * pass->margin_weight};
  return status == US_OK && pass->gradient ? us_cuda_model_backward(own, err) : status;
}

enum us_status us_cuda_learner_total(struct us_learner_model *base, double *ret_total, double *ret_counted,
                                     struct us_err *err) {
  struct cuda_model *model = (struct cuda_model *)base;
  *ret_total = *ret_counted = 0.0;
  enum us_status status = us_cuda_learner_wait_set(base->set, err);
  for (uint32_t i = 0; i < base->set->learner->lanes && status == US_OK; i++) {
    double total = 0.0;
    size_t counted = 0;
    if (model->loss[i]) status = us_cuda_loss_collect(model->loss[i], &total, &counted, err);
    *ret_total += total;
    *ret_counted += (double)counted;
  }
  return status;
}

/* --- loads --- */

enum us_status us_cuda_learner_load(struct us_learner_model *base, uint64_t *load, struct us_err *err) {
  struct cuda_model *model = (struct cuda_model *)base;
  size_t n = (size_t)base->shape.layers * base->shape.experts;
  uint64_t *own = calloc(n ? n : 1, sizeof *own);
  if (!own) return us_err_memory(err, "expert loads", n * sizeof *own);
  memset(load, 0, n * sizeof *load);
  enum us_status status = us_cuda_learner_wait(us_cuda_learner_of(base->set), err);
  for (uint32_t i = 0; i < base->set->learner->lanes && status == US_OK; i++) {
    status = us_cuda_model_fetch_load(model->lane[i], own, err);
    for (size_t k = 0; k < n; k++) load[k] += own[k];
  }
  free(own);
  return status;
}

void us_cuda_learner_clear_load(struct us_learner_model *base) {
  struct cuda_model *model = (struct cuda_model *)base;
  for (uint32_t i = 0; i < base->set->learner->lanes; i++) us_cuda_model_clear_load(model->lane[i]);
}

/* --- lane 0 for comparisons --- */

enum us_status us_cuda_learner_forward(struct us_learner_model *base, const struct us_batch *batch,
                                       struct us_err *err) {
  us_cuda_use(us_cuda_learner_of(base->set)->cuda[0]);
  return forward((struct cuda_model *)base, 0, batch, err);
}

static enum us_status project(struct cuda_model *model, struct us_cuda *cuda, size_t first, size_t rows,
                              float *logits, struct us_err *err) {
  const struct us_cuda_model *own = model->lane[0];
  size_t D = model->base.shape.hidden, N = model->base.shape.vocab;
  if (rows > model->logits_rows) {
    void *memory = NULL;
    us_cuda_give(model->logits);
    model->logits = NULL, model->logits_rows = 0;
    enum us_status status = us_cuda_take(cuda, rows * N * sizeof *model->logits, "logits", &memory, err);
    if (status != US_OK) return status;
    model->logits = memory, model->logits_rows = rows;
  }
  us_cuda_linear_f32(cuda, &(struct us_cuda_linear){.R = rows, .N = N, .K = D}, own->hidden + first * D,
                     own->head, model->logits);
  us_cuda_did(
      cuda,
      cudaMemcpyAsync(logits, model->logits, rows * N * sizeof *logits, cudaMemcpyDeviceToHost, cuda->stream),
      "copying logits");
  return us_cuda_sync(cuda, err);
}

enum us_status us_cuda_learner_logits(struct us_learner_model *base, size_t first, size_t rows, float *logits,
                                      struct us_err *err) {
  struct cuda_model *model = (struct cuda_model *)base;
  struct cuda_learner *learner = us_cuda_learner_of(base->set);
  pthread_mutex_lock(&learner->mutex);
  us_cuda_use(learner->cuda[0]);
  enum us_status status = project(model, learner->cuda[0], first, rows, logits, err);
  pthread_mutex_unlock(&learner->mutex);
  return status;
}

enum us_status us_cuda_learner_routed(struct us_learner_model *base, uint32_t layer, const uint32_t **ret_id,
                                      struct us_err *err) {
  struct cuda_model *model = (struct cuda_model *)base;
  size_t n = base->capacity * base->shape.top_k;
  if (!model->routed) model->routed = calloc(n ? n : 1, sizeof *model->routed);
  if (!model->routed) return us_err_memory(err, "chosen experts", n * sizeof *model->routed);
  us_cuda_use(us_cuda_learner_of(base->set)->cuda[0]);
  *ret_id = model->routed;
  return us_cuda_model_routed(model->lane[0], layer, model->routed, err);
}
