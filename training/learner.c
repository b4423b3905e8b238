/* learner.c: what every kind of learner does alike: dispatch, sums over processes, balance. */
#include "training/learner.h"

#include "kernels/router/router_grad.h"
#include "training/learner_ops.h"

#include <stdio.h>
#include <stdlib.h>

/* --- lanes and processes --- */

void us_learner_free(struct us_learner *learner) {
  if (learner) learner->ops->free(learner);
}

size_t us_learner_micro(const struct us_learner *learner, size_t micro, size_t rows, size_t rows_of_one,
                        size_t sequences) {
  size_t share = (sequences + learner->ranks - 1) / learner->ranks;
  if (rows < learner->busy) rows = learner->busy;
  if (!micro) micro = rows_of_one < rows ? rows / rows_of_one : 1;
  return micro < share ? micro : share;
}

enum us_status us_learner_check_batch(const struct us_learner *learner, size_t sequences,
                                      struct us_err *err) {
  if (sequences >= learner->ranks) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%zu sequences a step cannot be divided among %u GPUs", sequences,
                    learner->ranks);
}

enum us_status us_learner_each(struct us_learner *learner, us_learner_body body, void *arg,
                               struct us_err *err) {
  return learner->ops->each(learner, body, arg, err);
}

void us_learner_part(struct us_learner *learner) {
  if (learner->processes > 1) learner->ops->part(learner);
}

enum us_status us_learner_sum(struct us_learner *learner, double *values, size_t n, struct us_err *err) {
  return learner->processes > 1 ? learner->ops->sum(learner, values, n, err) : US_OK;
}

/* --- parameters --- */

enum us_status us_learner_place(struct us_learner *learner, struct us_params *params,
                                struct us_learner_set **ret_set, struct us_err *err) {
  return learner->ops->place(learner, params, ret_set, err);
}

void us_learner_remove(struct us_learner_set *set) {
  if (set) set->learner->ops->remove(set);
}

enum us_status us_learner_send(struct us_learner_set *set, struct us_err *err) {
  return set->learner->ops->send(set, err);
}

enum us_status us_learner_fetch(struct us_learner_set *set, bool moments, struct us_err *err) {
  return set->learner->ops->fetch(set, moments, err);
}

enum us_status us_learner_refresh(struct us_learner_set *set, struct us_err *err) {
  return set->learner->ops->refresh(set, err);
}

void us_learner_zero_grad(struct us_learner_set *set) {
  set->learner->ops->zero_grad(set);
}

void us_learner_scale_grad(struct us_learner_set *set, float factor) {
  set->learner->ops->scale_grad(set, factor);
}

enum us_status us_learner_clip(struct us_learner_set *set, double limit, double *ret_norm,
                               struct us_err *err) {
  return set->learner->ops->clip(set, limit, ret_norm, err);
}

enum us_status us_learner_nonfinite(struct us_learner_set *set, const struct us_param **ret_param,
                                    struct us_err *err) {
  return set->learner->ops->nonfinite(set, ret_param, err);
}

enum us_status us_learner_update(struct us_learner_set *set, const struct us_optim *optim, double rate,
                                 struct us_err *err) {
  return set->learner->ops->update(set, optim, rate, err);
}

/* --- models --- */

enum us_status us_learner_model_create(struct us_learner_set *set, const struct us_shape *shape,
                                       size_t capacity, enum us_train_memory memory,
                                       struct us_learner_model **ret_model, struct us_err *err) {
  return set->learner->ops->model_create(set, shape, capacity, memory, ret_model, err);
}

void us_learner_model_free(struct us_learner_model *model) {
  if (model) model->set->learner->ops->model_free(model);
}

enum us_status us_learner_pass(struct us_learner_model *model, uint32_t lane,
                               const struct us_learner_pass *pass, struct us_err *err) {
  return model->set->learner->ops->pass(model, lane, pass, err);
}

enum us_status us_learner_total(struct us_learner_model *model, double *ret_total, double *ret_counted,
                                struct us_err *err) {
  struct us_learner *learner = model->set->learner;
  double sums[2] = {0.0, 0.0};
  enum us_status status = learner->ops->total(model, &sums[0], &sums[1], err);
  if (status == US_OK) status = us_learner_sum(learner, sums, 2, err);
  *ret_total = sums[0], *ret_counted = sums[1];
  return status;
}

/* Loads in doubles, exact below 2^53, so that one kind of sum serves everything that processes share. */
static enum us_status sum_loads(struct us_learner *learner, uint64_t *load, size_t n, struct us_err *err) {
  enum us_status status = US_OK;
  double part[64];
  for (size_t first = 0; first < n && learner->processes > 1 && status == US_OK; first += 64) {
    size_t count = n - first < 64 ? n - first : 64;
    for (size_t i = 0; i < count; i++) part[i] = (double)load[first + i];
    status = us_learner_sum(learner, part, count, err);
    for (size_t i = 0; i < count; i++) load[first + i] = (uint64_t)part[i];
  }
  return status;
}

static double imbalance_of(const struct us_shape *shape, const uint64_t *load) {
  double worst = 0.0;
  for (uint32_t l = 0; l < shape->layers; l++) {
    uint64_t total = 0, largest = 0;
    for (uint32_t e = 0; e < shape->experts; e++) {
      uint64_t own = load[(size_t)l * shape->experts + e];
      total += own;
      if (own > largest) largest = own;
    }
    double ratio = total ? (double)largest * shape->experts / (double)total : 0.0;
    if (ratio > worst) worst = ratio;
  }
  return worst;
}

static enum us_status move_biases(struct us_learner_model *model, const uint64_t *load, float rate,
                                  struct us_err *err) {
  const struct us_shape *shape = &model->shape;
  const struct us_learner_ops *ops = model->set->learner->ops;
  enum us_status status = US_OK;
  for (uint32_t l = 0; l < shape->layers && status == US_OK; l++) {
    char name[128];
    snprintf(name, sizeof name, "model.layers.%u.mlp.gate.e_score_correction_bias", l);
    struct us_param *bias = us_params_find(model->set->params, name);
    if (!bias || bias->frozen) continue;
    us_router_balance(ops->bias(model->set, bias), load + (size_t)l * shape->experts, shape->experts, rate);
    status = ops->send_bias(model->set, bias, err);
  }
  return status;
}

enum us_status us_learner_balance(struct us_learner_model *model, float rate, double *ret_imbalance,
                                  struct us_err *err) {
  struct us_learner *learner = model->set->learner;
  size_t n = (size_t)model->shape.layers * model->shape.experts;
  uint64_t *load = calloc(n ? n : 1, sizeof *load);
  if (!load) return us_err_memory(err, "expert loads", n * sizeof *load);
  enum us_status status = learner->ops->load(model, load, err);
  if (status == US_OK) status = sum_loads(learner, load, n, err);
  if (status == US_OK) *ret_imbalance = imbalance_of(&model->shape, load);
  if (status == US_OK) status = move_biases(model, load, rate, err);
  if (status == US_OK) us_learner_clear_load(model);
  free(load);
  return status;
}

void us_learner_clear_load(struct us_learner_model *model) {
  model->set->learner->ops->clear_load(model);
}

enum us_status us_learner_forward(struct us_learner_model *model, const struct us_batch *batch,
                                  struct us_err *err) {
  return model->set->learner->ops->forward(model, batch, err);
}

enum us_status us_learner_logits(struct us_learner_model *model, size_t first, size_t rows, float *logits,
                                 struct us_err *err) {
  return model->set->learner->ops->logits(model, first, rows, logits, err);
}

enum us_status us_learner_routed(struct us_learner_model *model, uint32_t layer, const uint32_t **ret_id,
                                 struct us_err *err) {
  *ret_id = NULL;
  return model->shape.moe_layer[layer] ? model->set->learner->ops->routed(model, layer, ret_id, err) : US_OK;
}

/* --- drafters --- */

enum us_status us_learner_draft_create(struct us_learner_set *set, const struct us_draft_shape *shape,
                                       struct us_learner_model *target, const struct us_draft_loss *loss,
                                       size_t blocks, struct us_learner_draft **ret_draft,
                                       struct us_err *err) {
  return set->learner->ops->draft_create(set, shape, target, loss, blocks, ret_draft, err);
}

void us_learner_draft_free(struct us_learner_draft *draft) {
  if (draft) draft->set->learner->ops->draft_free(draft);
}

enum us_status us_learner_draft_pass(struct us_learner_draft *draft, uint32_t lane,
                                     const struct us_batch *batch, const struct us_draft_blocks *blocks,
                                     bool gradient, struct us_err *err) {
  return draft->set->learner->ops->draft_pass(draft, lane, batch, blocks, gradient, err);
}

enum us_status us_learner_draft_tally(struct us_learner_draft *draft, struct us_draft_tally *ret_tally,
                                      struct us_err *err) {
  struct us_learner *learner = draft->set->learner;
  enum us_status status = learner->ops->draft_tally(draft, ret_tally, err);
  if (status != US_OK || learner->processes == 1) return status;
  double values[4 + 2 * US_MAX_BLOCK] = {ret_tally->loss, ret_tally->weight, (double)ret_tally->blocks,
                                         (double)ret_tally->accepted};
  for (uint32_t j = 0; j < US_MAX_BLOCK; j++) {
    values[4 + j] = (double)ret_tally->rows[j];
    values[4 + US_MAX_BLOCK + j] = (double)ret_tally->hits[j];
  }
  status = us_learner_sum(learner, values, 4 + 2 * US_MAX_BLOCK, err);
  ret_tally->loss = values[0], ret_tally->weight = values[1];
  ret_tally->blocks = (uint64_t)values[2], ret_tally->accepted = (uint64_t)values[3];
  for (uint32_t j = 0; j < US_MAX_BLOCK; j++) {
    ret_tally->rows[j] = (uint64_t)values[4 + j];
    ret_tally->hits[j] = (uint64_t)values[4 + US_MAX_BLOCK + j];
  }
  return status;
}

/* --- GPTQ --- */

enum us_status us_learner_gptq(struct us_learner *learner, const struct us_gptq *gptq,
                               const struct us_shape *shape, struct us_params *original,
                               struct us_params *params, struct us_err *err) {
  return learner->ops->gptq(learner, gptq, shape, original, params, err);
}

/* --- answers --- */

enum us_status us_learner_generate(struct us_learner *learner, struct us_generation *generation,
                                   struct us_err *err) {
  enum us_status status = us_generation_check(generation, err);
  if (status == US_OK && generation->seconds > 0.0 && learner->processes > 1)
    return us_err_set(err, US_ERR_USAGE,
                      "a time limit for answers, and %u processes: each would have others; give a number",
                      learner->processes);
  return status == US_OK ? learner->ops->generate(learner, generation, err) : status;
}
