/* learner_state.h: what the files of the CUDA learner share. Internal. */
#ifndef US_TRAINING_CUDA_LEARNER_STATE_H
#define US_TRAINING_CUDA_LEARNER_STATE_H

#include "training/cuda/draft.h"
#include "training/cuda/group.h"
#include "training/cuda/loss.h"
#include "training/cuda/model.h"
#include "training/learner_ops.h"

#include "base/pool.h"
#include <pthread.h>

struct cuda_learner {
  struct us_learner base;
  struct us_cuda **cuda;         /* (lanes) */
  struct us_pool *threads;       /* one a lane; NULL for one lane */
  struct us_cuda_group *group;   /* NULL for one rank */
  struct us_rendezvous *meeting; /* NULL for one process */
  pthread_mutex_t mutex;         /* of lane 0's stream, while any thread may ask for logits */
};

struct cuda_set {
  struct us_learner_set base;
  struct us_cuda_params **lane; /* (lanes) */
  struct us_owned *owned;       /* (ranks) */
  float *bias;   /* (floats) router biases as of now: the host's arenas may be being written to a file */
  double factor; /* that gradients are still to be multiplied by */
};

struct cuda_model {
  struct us_learner_model base;
  struct us_cuda_model **lane; /* (lanes) */
  struct us_cuda_loss **loss;  /* (lanes) made at the lane's first pass */
  bool with_teacher;           /* the losses have room for one */
  float *logits;               /* device (logits_rows, N) */
  size_t logits_rows;
  uint32_t *routed; /* (capacity, K) */
};

struct cuda_draft {
  struct us_learner_draft base;
  struct us_cuda_draft **lane;      /* (lanes) */
  struct us_cuda_draft_loss **loss; /* (lanes) */
};

static inline struct cuda_learner *us_cuda_learner_of(const struct us_learner_set *set) {
  return (struct cuda_learner *)set->learner;
}

/* Wait for all lanes, and learn whether a process is gone; then whether weights were finite. */
US_CHECKED enum us_status us_cuda_learner_wait(struct cuda_learner *learner, struct us_err *err);
US_CHECKED enum us_status us_cuda_learner_wait_set(const struct us_learner_set *set, struct us_err *err);

/* -- Models and drafters: learner_model.c, learner_draft.c -- */

enum us_status us_cuda_learner_model_create(struct us_learner_set *set, const struct us_shape *shape,
                                            size_t capacity, enum us_train_memory memory,
                                            struct us_learner_model **ret_model, struct us_err *err);
void us_cuda_learner_model_free(struct us_learner_model *model);
enum us_status us_cuda_learner_pass(struct us_learner_model *model, uint32_t lane,
                                    const struct us_learner_pass *pass, struct us_err *err);
enum us_status us_cuda_learner_total(struct us_learner_model *model, double *ret_total, double *ret_counted,
                                     struct us_err *err);
enum us_status us_cuda_learner_load(struct us_learner_model *model, uint64_t *load, struct us_err *err);
void us_cuda_learner_clear_load(struct us_learner_model *model);
enum us_status us_cuda_learner_forward(struct us_learner_model *model, const struct us_batch *batch,
                                       struct us_err *err);
enum us_status us_cuda_learner_logits(struct us_learner_model *model, size_t first, size_t rows,
                                      float *logits, struct us_err *err);
enum us_status us_cuda_learner_routed(struct us_learner_model *model, uint32_t layer, const uint32_t **ret_id,
                                      struct us_err *err);

enum us_status us_cuda_learner_draft_create(struct us_learner_set *set, const struct us_draft_shape *shape,
                                            struct us_learner_model *target, const struct us_draft_loss *loss,
                                            size_t blocks, struct us_learner_draft **ret_draft,
                                            struct us_err *err);
void us_cuda_learner_draft_free(struct us_learner_draft *draft);
enum us_status us_cuda_learner_draft_pass(struct us_learner_draft *draft, uint32_t lane,
                                          const struct us_batch *batch, const struct us_draft_blocks *blocks,
                                          bool gradient, struct us_err *err);
enum us_status us_cuda_learner_draft_tally(struct us_learner_draft *draft, struct us_draft_tally *ret_tally,
                                           struct us_err *err);

/* -- GPTQ: gptq.c -- */

enum us_status us_cuda_learner_gptq(struct us_learner *learner, const struct us_gptq *gptq,
                                    const struct us_shape *shape, struct us_params *original,
                                    struct us_params *params, struct us_err *err);

/* -- Answers: learner_generate.c -- */

enum us_status us_cuda_learner_generate(struct us_learner *learner, struct us_generation *generation,
                                        struct us_err *err);

#endif
