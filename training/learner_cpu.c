/* learner_cpu.c: the CPU as a learner: one lane, the operations of model_train.h, draft_train.h, params.h and optim.h.
 *
 * Contents: the learner; parameters; models; drafters; answers.
 */
#include "kernels/head_loss/head_loss.h"
#include "training/learner_ops.h"

#include <stdlib.h>

struct cpu_learner {
  struct us_learner base;
  struct us_seq seq;
};

struct cpu_model {
  struct us_learner_model base;
  struct us_model_train *train;
  double total, counted; /* since they were asked for */
};

struct cpu_draft {
  struct us_learner_draft base;
  struct us_draft_train *train;
  struct us_draft_loss loss;
  float *taps;                     /* (rows, taps * D) */
  const struct us_param *own_head; /* NULL: the target's */
};

static struct us_seq *seq_of(const struct us_learner_set *set) {
  return &((struct cpu_learner *)set->learner)->seq;
}

static enum us_status check_scratch(const struct us_learner_set *set, struct us_err *err) {
  return seq_of(set)->failed ? us_err_memory(err, "scratch", 0) : US_OK;
}

/* --- the learner --- */

static void cpu_free(struct us_learner *learner) {
  us_seq_release(&((struct cpu_learner *)learner)->seq);
  free(learner);
}

static enum us_status cpu_each(struct us_learner *learner, us_learner_body body, void *arg,
                               struct us_err *err) {
  return body(arg, 0, err);
}

/* --- parameters --- */

static enum us_status cpu_place(struct us_learner *learner, struct us_params *params,
                                struct us_learner_set **ret_set, struct us_err *err) {
  struct us_learner_set *set = malloc(sizeof *set);
  *ret_set = set;
  if (!set) return us_err_memory(err, "parameters", sizeof *set);
  *set = (struct us_learner_set){.learner = learner, .params = params};
  return US_OK;
}

static void cpu_remove(struct us_learner_set *set) {
  free(set);
}

/* The host's arenas are those that train. */
static enum us_status cpu_send(struct us_learner_set *set, struct us_err *err) {
  return US_OK;
}

static enum us_status cpu_fetch(struct us_learner_set *set, bool moments, struct us_err *err) {
  return US_OK;
}

static float *cpu_bias(struct us_learner_set *set, const struct us_param *p) {
  return p->value;
}

static enum us_status cpu_send_bias(struct us_learner_set *set, const struct us_param *p,
                                    struct us_err *err) {
  return US_OK;
}

static enum us_status cpu_refresh(struct us_learner_set *set, struct us_err *err) {
  return us_params_refresh(set->params, seq_of(set)->pool, seq_of(set)->rounding, err);
}

static void cpu_zero_grad(struct us_learner_set *set) {
  us_params_zero_grad(set->params, seq_of(set)->pool);
}

static void cpu_scale_grad(struct us_learner_set *set, float factor) {
  us_params_scale_grad(set->params, seq_of(set)->pool, factor);
}

static enum us_status cpu_clip(struct us_learner_set *set, double limit, double *ret_norm,
                               struct us_err *err) {
  enum us_status status = check_scratch(set, err);
  *ret_norm = status == US_OK ? us_params_clip(set->params, seq_of(set)->pool, limit) : 0.0;
  return status;
}

static enum us_status cpu_nonfinite(struct us_learner_set *set, const struct us_param **ret_param,
                                    struct us_err *err) {
  *ret_param = us_params_find_nonfinite(set->params, true);
  return US_OK;
}

static enum us_status cpu_update(struct us_learner_set *set, const struct us_optim *optim, double rate,
                                 struct us_err *err) {
  us_optim_step(optim, set->params, rate, seq_of(set));
  return check_scratch(set, err);
}

/* --- models --- */

static enum us_status cpu_model_create(struct us_learner_set *set, const struct us_shape *shape,
                                       size_t capacity, enum us_train_memory memory,
                                       struct us_learner_model **ret_model, struct us_err *err) {
  struct cpu_model *model = calloc(1, sizeof *model);
  *ret_model = NULL;
  if (!model) return us_err_memory(err, "model", sizeof *model);
  model->base = (struct us_learner_model){.set = set, .shape = *shape, .capacity = capacity};
  enum us_status status =
      us_model_train_create(shape, set->params, seq_of(set), capacity, memory, &model->train, err);
  if (status == US_OK)
    *ret_model = &model->base;
  else
    free(model);
  return status;
}

static void cpu_model_free(struct us_learner_model *model) {
  us_model_train_free(((struct cpu_model *)model)->train);
  free(model);
}

static enum us_status forward(struct cpu_model *model, const struct us_batch *batch, struct us_err *err) {
  const struct cpu_model *follow = (const struct cpu_model *)model->base.opt_follow;
  model->train->opt_follow = follow ? follow->train : NULL;
  return us_model_train_forward(model->train, batch, NULL, err);
}

static enum us_status cpu_pass(struct us_learner_model *base, uint32_t lane,
                               const struct us_learner_pass *pass, struct us_err *err) {
  struct cpu_model *model = (struct cpu_model *)base, *teacher = (struct cpu_model *)pass->teacher;
  struct us_head_teacher distribution = {0};
  enum us_status status = US_OK;
  if (teacher) {
    status = us_model_train_forward(teacher->train, &pass->batch, NULL, err);
    distribution = (struct us_head_teacher){.x = teacher->train->hidden,
                                            .D = teacher->train->shape.hidden,
                                            .head = teacher->train->head->compute};
  }
  if (status == US_OK) status = forward(model, &pass->batch, err);
  if (status != US_OK) return status;
  struct us_head_loss head = {.R = pass->batch.R,
                              .D = base->shape.hidden,
                              .N = base->shape.vocab,
                              .x = model->train->hidden,
                              .head = model->train->head->compute,
                              .label = pass->label,
                              .weight = pass->weight,
                              .teacher = teacher ? &distribution : NULL,
                              .scale = pass->scale,
                              .dx = pass->gradient ? model->train->dhidden : NULL,
                              .dhead = pass->gradient ? us_param_grad(model->train->head) : NULL};
  us_head_loss(seq_of(base->set), &head);
  model->total += head.total;
  model->counted += (double)head.counted;
  model->train->routers = (struct us_router_lesson){.opt_teacher = teacher ? teacher->train : NULL,
                                                    .target = pass->router_target,
                                                    .opt_weight = pass->weight,
                                                    .scale = pass->scale * pass->routers,
                                                    .margin = pass->margin,
                                                    .margin_scale = pass->scale * pass->margin_weight};
  status = check_scratch(base->set, err);
  return status == US_OK && pass->gradient ? us_model_train_backward(model->train, err) : status;
}

static enum us_status cpu_total(struct us_learner_model *base, double *ret_total, double *ret_counted,
                                struct us_err *err) {
  struct cpu_model *model = (struct cpu_model *)base;
  *ret_total = model->total, *ret_counted = model->counted;
  model->total = model->counted = 0.0;
  return US_OK;
}

static enum us_status cpu_load(struct us_learner_model *base, uint64_t *load, struct us_err *err) {
  const struct us_model_train *train = ((struct cpu_model *)base)->train;
  memcpy(load, train->load, (size_t)base->shape.layers * base->shape.experts * sizeof *load);
  return US_OK;
}

static void cpu_clear_load(struct us_learner_model *base) {
  us_model_train_clear_load(((struct cpu_model *)base)->train);
}

static enum us_status cpu_forward(struct us_learner_model *base, const struct us_batch *batch,
                                  struct us_err *err) {
  return forward((struct cpu_model *)base, batch, err);
}

static enum us_status cpu_logits(struct us_learner_model *base, size_t first, size_t rows, float *logits,
                                 struct us_err *err) {
  const struct us_model_train *train = ((struct cpu_model *)base)->train;
  size_t D = base->shape.hidden, N = base->shape.vocab;
  us_seq_gemm(false, true, rows, N, D, 1.0f, train->hidden + first * D, D, train->head->compute, D, 0.0f,
              logits, N);
  return US_OK;
}

static enum us_status cpu_routed(struct us_learner_model *base, uint32_t layer, const uint32_t **ret_id,
                                 struct us_err *err) {
  *ret_id = us_model_train_routed(((struct cpu_model *)base)->train, layer);
  return US_OK;
}

/* --- drafters --- */

static void cpu_draft_free(struct us_learner_draft *base) {
  struct cpu_draft *draft = (struct cpu_draft *)base;
  us_draft_train_free(draft->train);
  us_draft_loss_release(&draft->loss);
  free(draft->taps);
  free(draft);
}

static enum us_status cpu_draft_create(struct us_learner_set *set, const struct us_draft_shape *shape,
                                       struct us_learner_model *target, const struct us_draft_loss *loss,
                                       size_t blocks, struct us_learner_draft **ret_draft,
                                       struct us_err *err) {
  struct cpu_draft *draft = calloc(1, sizeof *draft);
  size_t floats = target->capacity * shape->taps * shape->hidden;
  *ret_draft = NULL;
  if (!draft) return us_err_memory(err, "drafter", sizeof *draft);
  draft->base = (struct us_learner_draft){.set = set, .target = target, .shape = *shape};
  draft->own_head = us_params_find(set->params, "lm_head.weight");
  draft->loss = (struct us_draft_loss){.kind = loss->kind,
                                       .weights = loss->weights,
                                       .gamma = loss->gamma,
                                       .alpha = loss->alpha,
                                       .survived = loss->survived};
  const float *embed = us_params_find(target->set->params, "model.embed_tokens.weight")->compute;
  enum us_status status = us_draft_loss_init(&draft->loss, blocks, shape->block, shape->hidden, err);
  if (status == US_OK && !(draft->taps = calloc(floats, sizeof *draft->taps)))
    status = us_err_memory(err, "features", floats * sizeof *draft->taps);
  if (status == US_OK)
    status = us_draft_train_create(shape, set->params, embed, seq_of(set), target->capacity, blocks,
                                   &draft->train, err);
  if (status == US_OK)
    *ret_draft = &draft->base;
  else
    cpu_draft_free(&draft->base);
  return status;
}

static enum us_status cpu_draft_pass(struct us_learner_draft *base, uint32_t lane,
                                     const struct us_batch *batch, const struct us_draft_blocks *blocks,
                                     bool gradient, struct us_err *err) {
  struct cpu_draft *draft = (struct cpu_draft *)base;
  const struct us_model_train *target = ((struct cpu_model *)base->target)->train;
  struct us_train_taps taps = {.count = base->shape.taps, .out = draft->taps};
  memcpy(taps.layer, base->shape.tap_layer, sizeof taps.layer);
  enum us_status status =
      us_model_train_forward(((struct cpu_model *)base->target)->train, batch, &taps, err);
  if (status == US_OK)
    status = us_draft_train_forward(draft->train, draft->taps, batch->R, batch->position, blocks, err);
  if (status != US_OK) return status;
  const struct us_param *head = draft->own_head ? draft->own_head : target->head;
  us_draft_loss(seq_of(base->set), &draft->loss, blocks, draft->train->hidden, head->compute,
                base->shape.hidden, target->shape.vocab, target->hidden, target->head->compute,
                gradient ? draft->train->dhidden : NULL);
  return gradient ? us_draft_train_backward(draft->train, err) : US_OK;
}

static enum us_status cpu_draft_tally(struct us_learner_draft *base, struct us_draft_tally *ret_tally,
                                      struct us_err *err) {
  struct cpu_draft *draft = (struct cpu_draft *)base;
  *ret_tally = draft->loss.sum;
  draft->loss.sum = (struct us_draft_tally){0};
  return US_OK;
}

/* --- GPTQ --- */

static enum us_status cpu_gptq(struct us_learner *learner, const struct us_gptq *gptq,
                               const struct us_shape *shape, struct us_params *original,
                               struct us_params *params, struct us_err *err) {
  return us_gptq_start(gptq, shape, original, params, ((struct cpu_learner *)learner)->seq.pool, err);
}

/* --- answers --- */

static enum us_status cpu_generate(struct us_learner *learner, struct us_generation *generation,
                                   struct us_err *err) {
  return us_generation_cpu(generation, ((struct cpu_learner *)learner)->seq.pool, err);
}

static const struct us_learner_ops cpu_ops = {.free = cpu_free,
                                              .each = cpu_each,
                                              .place = cpu_place,
                                              .remove = cpu_remove,
                                              .send = cpu_send,
                                              .fetch = cpu_fetch,
                                              .refresh = cpu_refresh,
                                              .zero_grad = cpu_zero_grad,
                                              .scale_grad = cpu_scale_grad,
                                              .clip = cpu_clip,
                                              .nonfinite = cpu_nonfinite,
                                              .update = cpu_update,
                                              .model_create = cpu_model_create,
                                              .model_free = cpu_model_free,
                                              .pass = cpu_pass,
                                              .total = cpu_total,
                                              .load = cpu_load,
                                              .clear_load = cpu_clear_load,
                                              .bias = cpu_bias,
                                              .send_bias = cpu_send_bias,
                                              .forward = cpu_forward,
                                              .logits = cpu_logits,
                                              .routed = cpu_routed,
                                              .draft_create = cpu_draft_create,
                                              .draft_free = cpu_draft_free,
                                              .draft_pass = cpu_draft_pass,
                                              .draft_tally = cpu_draft_tally,
                                              .gptq = cpu_gptq,
                                              .generate = cpu_generate};

enum us_status us_learner_create_cpu(struct us_pool *pool, struct us_learner **ret_learner,
                                     struct us_err *err) {
  struct cpu_learner *learner = calloc(1, sizeof *learner);
  *ret_learner = NULL;
  if (!learner) return us_err_memory(err, "learner", sizeof *learner);
  learner->base = (struct us_learner){.ops = &cpu_ops, .lanes = 1, .ranks = 1, .processes = 1, .name = "CPU"};
  us_seq_init(&learner->seq, pool, US_SEQ_ROUND_BF16);
  *ret_learner = &learner->base;
  return US_OK;
}
