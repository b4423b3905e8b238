/* learner.h: where the recipes' passes and updates happen: on the CPU, or on CUDA GPUs, behind one interface.
 *
 *     struct us_learner *learner;
 *     us_learner_create_cpu(pool, &learner, &err);                    // or us_learner_create_cuda (cuda/learner.h)
 *     us_learner_place(learner, &params, &set, &err);                 // masters go where they are trained
 *     us_learner_model_create(set, &shape, rows, US_TRAIN_SAVE, &model, &err);
 *     us_learner_refresh(set, &err);                                  // a step: us_trainer does what is around the passes
 *     us_learner_zero_grad(set);
 *     us_learner_each(learner, my_passes, arg, &err);                 // in every lane: us_learner_pass(model, lane, &pass, err)
 *     us_learner_total(model, &total, &counted, &err);                // of all lanes and processes
 *     us_learner_clip(set, 1.0, &norm, &err);
 *     us_learner_update(set, &optim, rate, &err);
 *     us_learner_fetch(set, true, &err);                              // params.value and its moments are up to date
 *     us_learner_model_free(model); us_learner_remove(set); us_learner_free(learner);
 *
 * A lane is a GPU of this process with its own copy of every model; the CPU is one lane. A rank is a lane of some process: rank
 * learner->rank + lane. Sequences of a step are divided among ranks (us_learner_share), gradients are summed at the clip,
 * so the mean over a step is that of one GPU up to the order of sums. On the CPU every bit is what the operations of
 * model_train.h, draft_train.h, params.h and optim.h give; on GPUs it is the same every run at the same number of ranks.
 */
#ifndef US_TRAINING_LEARNER_H
#define US_TRAINING_LEARNER_H

#include "training/draft_loss.h"
#include "training/draft_train.h"
#include "training/generation.h"
#include "training/gptq.h"
#include "training/model_train.h"
#include "training/optim.h"

struct us_learner {
  const struct us_learner_ops *ops;
  uint32_t lanes;     /* of this process */
  uint32_t rank;      /* of lane 0 */
  uint32_t ranks;     /* lanes of all processes */
  uint32_t processes; /* 1: nobody to agree with */
  char name[64];      /* "CPU", or what the GPUs are called */
  bool
      apart; /* the host's arenas change in a fetch alone, so that they can be written while training goes on */
  size_t busy; /* rows of a pass that a lane wants, so that it is not idle between operations; 0: no matter */
  double peak; /* bf16 operations a second of all ranks together, for MFU; 0: not known */
};

/* Borrows the pool; NULL is one thread. */
US_CHECKED enum us_status us_learner_create_cpu(struct us_pool *pool, struct us_learner **ret_learner,
                                                struct us_err *err);
void us_learner_free(struct us_learner *learner); /* NULL is allowed */

/* Whether this process writes files and logs: the one with rank 0. */
static inline bool us_learner_leads(const struct us_learner *learner) {
  return learner->rank == 0;
}

/* The lane's part [begin, end) of n items that all ranks divide in the order of ranks. */
static inline void us_learner_share(const struct us_learner *learner, uint32_t lane, size_t n,
                                    size_t *ret_begin, size_t *ret_end) {
  size_t rank = (size_t)learner->rank + lane;
  *ret_begin = n * rank / learner->ranks;
  *ret_end = n * (rank + 1) / learner->ranks;
}

/* Sequences of a pass: `micro` if it is not 0, else as many as `rows` rows hold, or those that the lanes want; never more than a
 * rank's share of a step's `sequences`. */
size_t us_learner_micro(const struct us_learner *learner, size_t micro, size_t rows, size_t rows_of_one,
                        size_t sequences);

/* US_ERR_USAGE when a step has fewer sequences than there are ranks. */
US_CHECKED enum us_status us_learner_check_batch(const struct us_learner *learner, size_t sequences,
                                                 struct us_err *err);

/* What processes do together is done: from now on one that ends is no loss to the others. After a success alone. */
void us_learner_part(struct us_learner *learner);

/* Run body in every lane, at the same time in several; returns when all have ended, with the first lane's error. */
typedef enum us_status (*us_learner_body)(void *arg, uint32_t lane, struct us_err *err);
US_CHECKED enum us_status us_learner_each(struct us_learner *learner, us_learner_body body, void *arg,
                                          struct us_err *err);

/* Replace values (n, at most 64) by their sums over the processes, the same bits in each. Every process calls it. */
US_CHECKED enum us_status us_learner_sum(struct us_learner *learner, double *values, size_t n,
                                         struct us_err *err);

/* -- Parameters -- */

struct us_learner_set {
  struct us_learner *learner;
  struct us_params
      *params; /* borrowed; on a GPU its compute and grad are not used, value and moments after a fetch */
};

/* Bring parameters to the lanes. A frozen set (no gradients) is only multiplied. */
US_CHECKED enum us_status us_learner_place(struct us_learner *learner, struct us_params *params,
                                           struct us_learner_set **ret_set, struct us_err *err);
void us_learner_remove(
    struct us_learner_set *set); /* NULL is allowed; params stay, without what was not fetched */

/* Host values and moments to the lanes, after the host's were read from a file; and values, with `moments` those too, from the lanes to
 * the host. */
US_CHECKED enum us_status us_learner_send(struct us_learner_set *set, struct us_err *err);
US_CHECKED enum us_status us_learner_fetch(struct us_learner_set *set, bool moments, struct us_err *err);

/* As us_params_refresh with US_SEQ_ROUND_BF16, us_params_zero_grad and us_params_scale_grad. */
US_CHECKED enum us_status us_learner_refresh(struct us_learner_set *set, struct us_err *err);
void us_learner_zero_grad(struct us_learner_set *set);
void us_learner_scale_grad(struct us_learner_set *set, float factor);

/* Sum the gradients over all ranks, then scale them so that their norm is at most `limit` (0: no limit). *ret_norm is the norm
 * before. */
US_CHECKED enum us_status us_learner_clip(struct us_learner_set *set, double limit, double *ret_norm,
                                          struct us_err *err);

/* After a clip: the first tensor whose gradient is not finite; NULL if all are. */
US_CHECKED enum us_status us_learner_nonfinite(struct us_learner_set *set, const struct us_param **ret_param,
                                               struct us_err *err);

/* As us_optim_step, and every rank has the new values. US_ERR_MEMORY when scratch ran out. */
US_CHECKED enum us_status us_learner_update(struct us_learner_set *set, const struct us_optim *optim,
                                            double rate, struct us_err *err);

/* -- Models -- */

struct us_learner_model {
  struct us_learner_set *set;
  struct us_shape shape;
  size_t capacity; /* rows of a pass */
  /* Of the same learner, with as many layers and experts: rows visit the experts that this model chose in its last pass, over the same
   * rows (a pass's teacher, say, which runs first); NULL: those that they choose themselves. */
  struct us_learner_model *opt_follow;
};

/* One micro-batch. Arrays are the caller's and may be reused after the call. */
struct us_learner_pass {
  struct us_batch batch;
  const int32_t *label;             /* (R) -1: none */
  const float *weight;              /* (R) 0: the row does not count */
  struct us_learner_model *teacher; /* KL to its distribution, row by row; NULL: cross-entropy */
  float scale;                      /* of loss and gradients */
  /* Weight of the cross-entropy of all routing scores against the teacher's, without one against router_target; in the gradient alone.
   * 0: none. */
  float routers, router_target;
  /* Logits that scores are kept from where the choice of an expert tips, and the weight of that (router_grad.h); 0: none. */
  float margin, margin_weight;
  bool gradient; /* add gradients to the lane's */
};

/* Room for passes of up to `capacity` rows in every lane. */
US_CHECKED enum us_status us_learner_model_create(struct us_learner_set *set, const struct us_shape *shape,
                                                  size_t capacity, enum us_train_memory memory,
                                                  struct us_learner_model **ret_model, struct us_err *err);
void us_learner_model_free(struct us_learner_model *model); /* NULL is allowed */

/* Forward (the teacher's too), loss, and with `gradient` backward. A GPU may still be at it when the call returns. */
US_CHECKED enum us_status us_learner_pass(struct us_learner_model *model, uint32_t lane,
                                          const struct us_learner_pass *pass, struct us_err *err);

/* Sum of weight * loss * scale, and rows with a loss, of all passes of all ranks since the last call. Not inside a lane. */
US_CHECKED enum us_status us_learner_total(struct us_learner_model *model, double *ret_total,
                                           double *ret_counted, struct us_err *err);

/* Largest load of an expert over the mean in the worst layer, over all ranks' rows since the last balance or clear. Then move
 * the router biases by rate * sign(mean load - load), and forget the loads. */
US_CHECKED enum us_status us_learner_balance(struct us_learner_model *model, float rate,
                                             double *ret_imbalance, struct us_err *err);
void us_learner_clear_load(struct us_learner_model *model);

/* Forward alone, in lane 0; then logits of rows [first, first + rows), written to (rows, N), from any thread; and the experts (R, K)
 * that the layer chose, or NULL for a dense layer, valid until the next forward. */
US_CHECKED enum us_status us_learner_forward(struct us_learner_model *model, const struct us_batch *batch,
                                             struct us_err *err);
US_CHECKED enum us_status us_learner_logits(struct us_learner_model *model, size_t first, size_t rows,
                                            float *logits, struct us_err *err);
US_CHECKED enum us_status us_learner_routed(struct us_learner_model *model, uint32_t layer,
                                            const uint32_t **ret_id, struct us_err *err);

/* -- Drafters -- */

struct us_learner_draft {
  struct us_learner_set *set;
  struct us_learner_model *target; /* forward only */
  struct us_draft_shape shape;
};

/* Room for passes of up to target->capacity rows and `blocks` blocks. Of `loss`, kind, weights, gamma, alpha and survived
 * (one rank's; filled when a tally returns) are read. */
US_CHECKED enum us_status us_learner_draft_create(struct us_learner_set *set,
                                                  const struct us_draft_shape *shape,
                                                  struct us_learner_model *target,
                                                  const struct us_draft_loss *loss, size_t blocks,
                                                  struct us_learner_draft **ret_draft, struct us_err *err);
void us_learner_draft_free(struct us_learner_draft *draft); /* NULL is allowed; before its target */

/* Target and drafter forward over the rows and blocks (aimed), loss, and with `gradient` backward: the gradient of the weighted
 * sum, which the caller divides by the weights' sum. */
US_CHECKED enum us_status us_learner_draft_pass(struct us_learner_draft *draft, uint32_t lane,
                                                const struct us_batch *batch,
                                                const struct us_draft_blocks *blocks, bool gradient,
                                                struct us_err *err);

/* What all passes of all ranks since the last call add up to. Not inside a lane. */
US_CHECKED enum us_status us_learner_draft_tally(struct us_learner_draft *draft,
                                                 struct us_draft_tally *ret_tally, struct us_err *err);

/* -- GPTQ -- */

/* us_gptq_start where the learner is: on the CPU in its pool, on GPUs in lane 0 of every process, which all come to the same bits, for
 * they have the same GPUs. Before the masters are placed: it wants the memory. */
US_CHECKED enum us_status us_learner_gptq(struct us_learner *learner, const struct us_gptq *gptq,
                                          const struct us_shape *shape, struct us_params *original,
                                          struct us_params *params, struct us_err *err);

/* -- Answers -- */

/* Continue all prompts with the generation's model, in all lanes of this process: every process of a run generates all, so that each
 * has the same, which is why a time limit is US_ERR_USAGE with several. What cannot be generated is refused as
 * us_generation_check says; US_ERR_MEMORY when a GPU has no room for the sequences; US_ERR_CHECK when logits are not finite;
 * US_INTERRUPTED. */
US_CHECKED enum us_status us_learner_generate(struct us_learner *learner, struct us_generation *generation,
                                              struct us_err *err);

#endif
