/* experts_grad.h: y = sum over a row's experts of weight * down(silu(gate x) * (up x)), grouped by expert; gradients.
 *
 *     us_experts_sort(&ex, id, plan);                       // rows of each expert, ascending
 *     us_experts_seq(&seq, &ex, &plan, x, weight, &act, y);
 *     us_experts_grad(&seq, &ex, &plan, weight, &act, dy, dx, dweight, grads);
 *
 * Slot s of the plan is one (row, expert) pair; slots of an expert are contiguous and ascend by row. A row's experts add
 * in ascending id, so the sum does not depend on its neighbours. Gate and up lie behind each other: (2F, D).
 */
#ifndef US_KERNELS_EXPERTS_GRAD_H
#define US_KERNELS_EXPERTS_GRAD_H

#include "kernels/seq/seq.h"

struct us_experts_rows {
  size_t R, D, F;
  uint32_t E, K;
  const float *const *gate_up; /* (E) of (2F, D) */
  const float *const *down;    /* (E) of (D, F) */
};

struct us_experts_plan {
  uint32_t *start; /* (E + 1) first slot of each expert */
  uint32_t *row;   /* (R * K) row of a slot */
  uint32_t *slot;  /* (R, K) slot of a row's k-th expert */
};

/* Saved between forward and backward. */
struct us_experts_saved {
  float *x;       /* (R * K, D) gathered rows */
  float *gate_up; /* (R * K, 2F) */
  float *a;       /* (R * K, F) */
};

void us_experts_sort(const struct us_experts_rows *ex, const uint32_t *id, struct us_experts_plan *plan);

/* y (R, D) written; weight (R, K). Needs scratch. */
void us_experts_seq(struct us_seq *seq, const struct us_experts_rows *ex, const struct us_experts_plan *plan,
                    const float *x, const float *weight, struct us_experts_saved *saved, float *y);

struct us_experts_grads {
  float *const *gate_up; /* (E) of (2F, D), added to; NULL if frozen */
  float *const *down;    /* (E) of (D, F), added to */
};

/* dy (R, D); dx (R, D) written; dweight (R, K) written. Overwrites saved->gate_up and a. */
void us_experts_grad(struct us_seq *seq, const struct us_experts_rows *ex, const struct us_experts_plan *plan,
                     const float *weight, struct us_experts_saved *saved, const float *dy, float *dx,
                     float *dweight, const struct us_experts_grads *opt_grads);

#endif
