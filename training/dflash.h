/* dflash.h: distil a DFlash drafter from a frozen target.
 *
 *     struct us_dflash run = {.target = model, .shape = draft_shape, .shards = shards, .batch = 8, .length = 512,
 *                             .anchors = 64, .seed = 1, .loss = {.kind = US_DRAFT_CE, ...}, .trainer = {...}};
 *     us_dflash(&run, pool, &err);
 *     us_params_export_draft(&run.params, draft, &err);
 *     us_dflash_release(&run);
 *
 * A step: sequences drawn by Philox(seed; step, index) run through the target, whose tapped residual rows are the
 * drafter's context in the same step; blocks at random anchors learn the tokens that follow them (draft_blocks.h,
 * draft_loss.h). Sequences are text, or answers that the target wrote itself (responses.h), or a mix of both.
 */
#ifndef US_TRAINING_DFLASH_H
#define US_TRAINING_DFLASH_H

#include "training/responses.h"
#include "training/shards.h"
#include "training/trainer.h"

/* A line of the log. */
struct us_dflash_log {
  uint64_t step, tokens;         /* context tokens seen */
  uint64_t rows;                 /* block rows trained since the start of the process */
  double seconds;                /* trained so far */
  struct us_draft_tally train;   /* since the last line */
  struct us_draft_tally heldout; /* weight 0 unless evaluated now */
  double rate, norm;
  double rows_per_second, gflops; /* block rows, since the last line */
  double mfu;                     /* gflops over the learner's peak; NAN where that is not known */
};

struct us_dflash {
  struct us_learner *learner; /* where; NULL: the CPU, on the pool of the call */
  struct us_model *target;
  struct us_draft_shape shape;
  struct us_draft *init; /* continue from this drafter, of the same shape; NULL: fresh weights */
  const struct us_matrix_encoding
      *encoding; /* what matrices are multiplied and stored as; NULL: as in init, else bf16 */
  const struct us_matrix_encoding
      *head; /* of shape.head: the drafter gets a copy of the target's head in it, which is not
                                            trained; NULL: init's own, or none */
  const struct us_shards *shards;     /* text; NULL with answers alone */
  const struct us_responses *answers; /* NULL: text alone */
  const struct us_responses *heldout; /* answers to evaluate on; NULL: the shards' held-out part */
  double text_share;                  /* with answers: share of sequences that are text */
  double across;                      /* share of the text in which attention goes on over document edges */
  size_t batch, length;               /* sequences a step, tokens a sequence */
  size_t anchors;                     /* a sequence */
  size_t micro;                       /* sequences a pass; 0: as many as 8,192 block rows hold */
  uint64_t seed;
  bool fixed_mask;                /* do not train the mask vector */
  struct us_draft_loss loss;      /* kind, weights, gamma, alpha */
  uint64_t log_every, eval_every; /* steps; 0: at the end alone */
  size_t eval_sequences;          /* of an evaluation; 0: all */
  bool resume;
  struct us_trainer
      trainer; /* optim, schedule, clip, steps, minutes, state and options; the rest is filled */

  void (*on_log)(void *arg, const struct us_dflash_log *log);
  void *log_arg;
  bool (*interrupted)(void); /* asked between steps; NULL: never */

  struct us_params params;   /* result */
  struct us_dflash_log last; /* result: the last line, with an evaluation */
};

/* Train. US_INTERRUPTED after a clean stop and a save. */
US_CHECKED enum us_status us_dflash(struct us_dflash *run, struct us_pool *pool, struct us_err *err);
void us_dflash_release(struct us_dflash *run);

#endif
