/* pretrain.h: a base model from scratch, or from another model's weights, on token shards.
 *
 *     struct us_pretrain run = {.shape = &shape, .shards = shards, .batch = 8, .length = 512, .seed = 1, .trainer = {...}};
 *     run.on_log = print_log, run.log_arg = out;
 *     us_pretrain(&run, pool, &err);
 *     us_params_export(&run.params, model, &err);
 *     us_pretrain_release(&run);
 *
 * Cross-entropy on every token of the windows that us_shards_sample draws from (seed, step, index); attention and
 * positions restart at document edges, the first token of a document is predicted from the end of the one before.
 */
#ifndef US_TRAINING_PRETRAIN_H
#define US_TRAINING_PRETRAIN_H

#include "training/shards.h"
#include "training/trainer.h"

/* A line of the log. */
struct us_pretrain_log {
  uint64_t step, tokens;
  double seconds;       /* trained so far */
  double loss;          /* nats a token, mean over the steps since the last line */
  double heldout;       /* nats a token on held-out windows; NAN unless evaluated now */
  double bits_per_byte; /* of the same */
  double rate, norm;
  double tokens_per_second, gflops; /* since the last line */
  double mfu;                       /* gflops over the learner's peak; NAN where that is not known */
  double imbalance; /* largest load of an expert over the mean, worst layer, since the last balancing step */
};

struct us_pretrain {
  struct us_learner *learner; /* where; NULL: the CPU, on the pool of the call */
  const struct us_shape *shape;
  struct us_model *init; /* begin at its weights; of the same shape; NULL: fresh ones */
  const struct us_shards *shards;
  size_t batch, length; /* sequences a step, tokens a sequence */
  size_t micro;         /* sequences a forward pass; 0: the batch, or as many as 16,384 rows hold */
  uint64_t seed;
  float deviation;    /* of the initial weights; 0: 1 / sqrt(K) */
  float balance_rate; /* of the router bias, at the peak of the schedule; 0: none */
  float
      score_decay; /* weight of what draws routing scores to score_target, and so makes gates steep; 0: none */
  float score_target;
  /* Logits that routing scores are kept from where a choice tips (kernels/router/router_grad.h), 0: none; and the weight of that, from
   * 0.3 of the run on, whole from 0.4. */
  float margin, margin_weight;
  enum us_train_memory memory; /* US_TRAIN_SAVE or US_TRAIN_RECOMPUTE */
  bool marked_only;            /* train on the tokens that the shards mark alone */
  double across;               /* share of the windows in which attention goes on over document edges */
  uint64_t eval_every;         /* steps; 0: at the end alone */
  size_t eval_windows;         /* of an evaluation on the way; the last one takes all */
  uint64_t log_every;          /* steps */
  bool resume;
  struct us_trainer
      trainer; /* optim, schedule, clip, steps, minutes, state and options; the rest is filled */

  void (*on_log)(void *arg, const struct us_pretrain_log *log);
  void *log_arg;
  bool (*interrupted)(void); /* asked between steps; NULL: never */

  struct us_params params;     /* result */
  struct us_pretrain_log last; /* result: the last line, evaluated on everything held out */
};

/* Train. US_INTERRUPTED after a clean stop and a save. */
US_CHECKED enum us_status us_pretrain(struct us_pretrain *run, struct us_pool *pool, struct us_err *err);
void us_pretrain_release(struct us_pretrain *run);

#endif
