/* optim.h: one optimizer step over all parameters: AdamW, and Muon for the matrices of the layers.
 *
 *     struct us_optim optim = us_optim_default(US_OPTIM_MUON);
 *     optim.step++;                                              // 1 at the first step
 *     double norm = us_params_clip(&params, pool, 1.0);          // before the step
 *     us_optim_step(&optim, &params, 3e-4, &seq);
 *
 * AdamW: Loshchilov & Hutter, decoupled decay, bias correction. Muon: Jordan; scale 0.2 sqrt(max(N, K)) matches AdamW's
 * update size (Moonlight), decay by the unscaled rate. Newton-Schulz runs in FP32. Frozen and bias tensors are skipped.
 */
#ifndef US_TRAINING_OPTIM_H
#define US_TRAINING_OPTIM_H

#include "training/oscillation.h"

enum us_optim_kind { US_OPTIM_ADAMW /* for every tensor */, US_OPTIM_MUON /* where the group says so */ };
enum us_newton { US_NEWTON_SCHULZ5, US_NEWTON_POLAR_EXPRESS };

struct us_optim {
  enum us_optim_kind kind;
  uint64_t step; /* steps taken, the one being taken included */
  double beta1, beta2, epsilon, adamw_decay;
  double momentum, muon_decay;
  double muon_rate; /* multiplies the rate for Muon's tensors; 1 with the matched scale */
  bool nesterov;
  enum us_newton newton;
  struct us_oscillation_rule oscillation; /* threshold 0: no weight is fixed */
};

/* beta .9/.95, epsilon 1e-8, decay .1 (AdamW with vectors excluded), momentum .95, Nesterov, Newton-Schulz. */
struct us_optim us_optim_default(enum us_optim_kind kind);

/* Update every trainable tensor with learning rate `rate`, and fix weights that oscillate (us_params_hold). Muon's scratch comes from seq (sticky failure there). */
void us_optim_step(const struct us_optim *optim, struct us_params *params, double rate, struct us_seq *seq);

/* Scale the gradients so that their norm is at most `limit` (0: no limit). Returns the norm before. */
double us_params_clip(struct us_params *params, struct us_pool *pool, double limit);

/* One AdamW update of n values, step >= 1. */
void us_adamw_update(const struct us_optim *optim, double rate, double decay, float *value, const float *grad,
                     float *moment1, float *moment2, size_t n);

/* Orthogonalise g (rows, cols) in place by five steps. scratch: us_newton_scratch floats. A zero matrix stays zero. */
void us_newton_orthogonalise(enum us_newton kind, float *g, size_t rows, size_t cols, float *scratch);
size_t us_newton_scratch(size_t rows, size_t cols);

/* One Muon update of a whole matrix; scratch: rows * cols + us_newton_scratch floats. */
void us_muon_update(const struct us_optim *optim, double rate, double decay, float *value, const float *grad,
                    float *moment, size_t rows, size_t cols, float *scratch);

#endif
