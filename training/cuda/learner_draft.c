/* learner_draft.c: drafters of the CUDA learner: one copy a lane, with its loss. */
#include "training/cuda/learner_state.h"

#include <stdlib.h>

void us_cuda_learner_draft_free(struct us_learner_draft *base) {
  struct cuda_draft *draft = (struct cuda_draft *)base;
  uint32_t lanes = base->set->learner->lanes;
  for (uint32_t i = 0; draft->loss && i < lanes; i++) us_cuda_draft_loss_free(draft->loss[i]);
  for (uint32_t i = 0; draft->lane && i < lanes; i++) us_cuda_draft_free(draft->lane[i]);
  free(draft->loss);
  free(draft->lane);
  free(draft);
}

static enum us_status open_lane(struct cuda_draft *draft, uint32_t lane, const struct us_draft_loss *loss,
                                size_t blocks, struct us_err *err) {
  struct us_cuda *cuda = us_cuda_learner_of(draft->base.set)->cuda[lane];
  struct us_cuda_params *own = ((struct cuda_set *)draft->base.set)->lane[lane];
  const struct cuda_set *target = (const struct cuda_set *)draft->base.target->set;
  const struct us_param *embed = us_params_find(target->base.params, "model.embed_tokens.weight");
  struct us_draft_shape shape = draft->base.shape;
  shape.vocab = draft->base.target->shape.vocab; /* of the head; a published drafter's own number is stale */
  us_cuda_use(cuda);
  enum us_status status =
      us_cuda_draft_create(cuda, &shape, own, us_cuda_param_compute(target->lane[lane], embed),
                           draft->base.target->capacity, blocks, &draft->lane[lane], err);
  if (status == US_OK)
    status = us_cuda_draft_loss_create(cuda, &shape, loss, blocks, &draft->loss[lane], err);
  return status;
}

enum us_status us_cuda_learner_draft_create(struct us_learner_set *set, const struct us_draft_shape *shape,
                                            struct us_learner_model *target, const struct us_draft_loss *loss,
                                            size_t blocks, struct us_learner_draft **ret_draft,
                                            struct us_err *err) {
  struct cuda_draft *draft = calloc(1, sizeof *draft);
  uint32_t lanes = set->learner->lanes;
  *ret_draft = NULL;
  if (!draft) return us_err_memory(err, "drafter", sizeof *draft);
  draft->base = (struct us_learner_draft){.set = set, .target = target, .shape = *shape};
  draft->lane = calloc(lanes, sizeof *draft->lane);
  draft->loss = calloc(lanes, sizeof *draft->loss);
  enum us_status status =
      draft->lane && draft->loss ? US_OK : us_err_memory(err, "drafter", lanes * sizeof *draft->lane);
  for (uint32_t i = 0; i < lanes && status == US_OK; i++) status = open_lane(draft, i, loss, blocks, err);
  if (status == US_OK)
    *ret_draft = &draft->base;
  else
    us_cuda_learner_draft_free(&draft->base);
  return status;
}

enum us_status us_cuda_learner_draft_pass(struct us_learner_draft *base, uint32_t lane,
                                          const struct us_batch *batch, const struct us_draft_blocks *blocks,
                                          bool gradient, struct us_err *err) {
  struct cuda_draft *draft = (struct cuda_draft *)base;
  struct us_cuda_model *target = ((struct cuda_model *)base->target)->lane[lane];
  struct us_cuda_draft *own = draft->lane[lane];
  struct us_cuda_taps taps = {.count = base->shape.taps, .out = own->taps};
  memcpy(taps.layer, base->shape.tap_layer, sizeof taps.layer);
  enum us_status status = us_cuda_model_forward(target, batch, &taps, err);
  if (status == US_OK) status = us_cuda_draft_forward(own, batch->R, batch->position, blocks, err);
  if (status != US_OK) return status;
  const struct us_param *own_head = us_params_find(base->set->params, "lm_head.weight");
  struct us_cuda_draft_teacher teacher = {
      .head = target->head,
      .hidden = draft->loss[lane]->options.kind == US_DRAFT_KL ? target->hidden : NULL,
      .own_head =
          own_head ? us_cuda_param_compute(((struct cuda_set *)base->set)->lane[lane], own_head) : NULL};
  status = us_cuda_draft_loss_add(draft->loss[lane], own, blocks, &teacher, gradient, err);
  return status == US_OK && gradient ? us_cuda_draft_backward(own, err) : status;
}

enum us_status us_cuda_learner_draft_tally(struct us_learner_draft *base, struct us_draft_tally *ret_tally,
                                           struct us_err *err) {
  struct cuda_draft *draft = (struct cuda_draft *)base;
  *ret_tally = (struct us_draft_tally){0};
  enum us_status status = us_cuda_learner_wait_set(base->set, err);
  for (uint32_t i = 0; i < base->set->learner->lanes && status == US_OK; i++) {
    struct us_draft_tally own = {0};
    status = us_cuda_draft_loss_collect(draft->loss[i], &own, err);
    us_draft_tally_add(ret_tally, &own);
  }
  return status;
}
