/* oscillation.h: weights whose codes go to and fro while a quantized model is finetuned are fixed (kernels/optim/oscillation.h).
 *
 *     us_params_watch(&params, &err);                                        // after the encodings are set: room for what is watched
 *     struct us_freeze freeze = {.first = 0.05, .last = 0.01, .memory = 0.99};
 *     optim.oscillation = us_freeze_rule(&freeze, progress);                  // every step, before its update
 *     us_optim_step(&optim, &params, rate, &seq);                             // ends with us_params_hold
 *     double share = us_params_held(&params);
 *
 * Watched are the matrices that train and that are multiplied in MXFP4 or FP8. The threshold falls by a cosine, since most
 * weights that oscillate late do so because others were fixed (Nagel et al. 2022, section 4.3).
 */
#ifndef US_TRAINING_OSCILLATION_H
#define US_TRAINING_OSCILLATION_H

#include "training/params.h"

/* Shares of the steps in which a code moves back, above which a weight is fixed: at first, at the end. first 0: none is. */
struct us_freeze {
  double first, last;
  double memory; /* of the running means, below 1 */
};

/* The first tenth of a run only watches: moments and means are still those of the start. */
#define US_FREEZE_BEGINS 0.1

/* At `progress` of the run, 0 to 1: threshold INFINITY at first, then from `first` to `last` as half a cosine; 0 where first is 0. */
struct us_oscillation_rule us_freeze_rule(const struct us_freeze *freeze, double progress);

/* Whether the weights of that tensor are watched. */
bool us_param_is_watched(const struct us_params *params, const struct us_param *p);

/* After an update: round the masters of what is watched, compare with .compute, which holds the roundings before it, and put masters that
 * are fixed where they belong. Gradients are overwritten. Nothing without us_params_watch, or with a threshold of 0. A tensor with a
 * master that is not finite is left for us_params_refresh to name. */
void us_params_hold(struct us_params *params, struct us_pool *pool, const struct us_oscillation_rule *rule);

/* Share of the watched weights that are fixed; 0 if none is watched. */
double us_params_held(const struct us_params *params);

#endif
