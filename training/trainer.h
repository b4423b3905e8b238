/* trainer.h: what every training loop does around its forward and backward pass.
 *
 *     struct us_trainer t = {.set = set, .optim = us_optim_default(US_OPTIM_MUON), .schedule = {...}, .clip = 1,
 *                            .steps = 1000, .state_path = "run.state", .save_every = 100};    // set: us_learner_place
 *     us_trainer_start(&t, resume, &err);
 *     while (!us_trainer_done(&t)) {
 *       us_trainer_open_step(&t, &err);                   // compute weights, zero gradients
 *       ... forward and backward; everything random from (seed, t.step) ...
 *       us_trainer_close_step(&t, loss, tokens, &err);    // finite? clip, update, save when due
 *     }
 *     us_trainer_finish(&t, &err);                          // a last save
 *
 * A run ends after `steps` or `minutes`, whichever comes first; the schedule follows the one that is further. A run by
 * steps is bit-exact across kill and resume; one by minutes depends on the clock. Where several processes train together, all
 * make these calls; the clock and the files are those of the one that leads, and an interruption of one stops all.
 */
#ifndef US_TRAINING_TRAINER_H
#define US_TRAINING_TRAINER_H

#include "training/learner.h"
#include "training/schedule.h"
#include "training/state.h"

struct us_trainer {
  struct us_learner_set *set; /* borrowed: what is trained, and where */
  struct us_optim optim;
  struct us_schedule schedule;
  struct us_freeze freeze; /* of weights that oscillate; where params are watched */
  double clip;             /* largest gradient norm; 0: none */
  uint64_t steps;          /* 0: no limit by steps */
  double minutes;          /* 0: no limit by time */
  const char *state_path;  /* NULL: keep no state */
  uint64_t save_every;     /* steps between saves; 0: at the end alone */
  const char *options;     /* us_train_state.options */

  uint64_t step; /* steps taken */
  uint64_t tokens;
  double rate,
      norm; /* of the last step: learning rate and gradient norm before clipping; NAN before one is taken */
  double before;  /* seconds trained before this process */
  double started; /* clock at start */
  uint64_t saved; /* step of the last save; UINT64_MAX: none */
  int slot;
  struct us_trainer_save *under_way; /* a save that a thread writes; NULL: none */
};

/* What us_trainer_start would refuse of its settings: neither steps nor minutes, or, without `resume`, an earlier run's state
 * (US_ERR_USAGE). To be asked before a log is begun, answers are generated or models are placed. The set may be NULL. */
US_CHECKED enum us_status us_trainer_check(const struct us_trainer *trainer, bool resume, struct us_err *err);

/* Begin, or continue where the state files say. Without `resume`, existing state is US_ERR_USAGE; with it, missing state
 * begins anew. One of steps and minutes must be set. */
US_CHECKED enum us_status us_trainer_start(struct us_trainer *trainer, bool resume, struct us_err *err);

/* Share of the run that lies behind, 0 to 1; seconds trained, earlier processes included. */
double us_trainer_progress(const struct us_trainer *trainer);
double us_trainer_seconds(const struct us_trainer *trainer);
bool us_trainer_done(const struct us_trainer *trainer);

/* Progress as the leading process sees it, the same in all: with `minutes` every process has a clock of its own. */
US_CHECKED enum us_status us_trainer_agree(const struct us_trainer *trainer, double *ret_progress,
                                           struct us_err *err);

US_CHECKED enum us_status us_trainer_open_step(struct us_trainer *trainer, struct us_err *err);

/* US_ERR_CHECK when loss or gradient is not finite, naming the tensor: nothing is updated, the last save stays. */
US_CHECKED enum us_status us_trainer_close_step(struct us_trainer *trainer, double loss, uint64_t tokens,
                                                struct us_err *err);

/* A last save, and every save is on disk when it returns. us_trainer_run calls it; after an error us_trainer_settle alone is due,
 * which waits for a save under way, so that what it reads may be released. Where the host's arenas are apart (learner.h) saves are
 * written while training goes on, and a failure shows at the next save or here. */
US_CHECKED enum us_status us_trainer_finish(struct us_trainer *trainer, struct us_err *err);
US_CHECKED enum us_status us_trainer_settle(struct us_trainer *trainer, struct us_err *err);

/* The loop that the recipes share: step, save, and say how it goes. */
struct us_trainer_loop {
  void *arg;
  enum us_status (*step)(void *arg, struct us_err *err); /* from open_step to close_step */
  /* Log, after an evaluation on held-out text if `evaluates`. After the last step it is called once, evaluating, with
   * everything saved. */
  enum us_status (*report)(void *arg, bool evaluates, struct us_err *err);
  uint64_t log_every, eval_every; /* steps; 0: at the end alone */
  bool (*interrupted)(void);      /* optional; once true, the loop saves and ends with US_INTERRUPTED */
};

US_CHECKED enum us_status us_trainer_run(struct us_trainer *trainer, const struct us_trainer_loop *loop,
                                         struct us_err *err);

#endif
