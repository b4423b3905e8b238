/* experts.h: the routed experts of a MoE layer: y[r] = sum over r's experts e, ascending, of weight * expert_e(x[r]).
 *
 *     us_experts_group(ids, weights, R, K, E, &groups);              // active experts and their rows
 *     us_experts_inner(&args, i, f0, f1, scratch);                   // each active expert i, each tile of F
 *     us_experts_outer(&args, d0, d1, scratch);                      // then each tile of D
 *
 * An expert multiplies its own rows only, so a weight that is Inf or NaN in an expert a row does not use
 * cannot reach it. Rows add fmaf(weight, expert output, sum) from 0 in ascending expert id, FP32. Inner
 * activations are rounded once to bf16. The two stages are what a tile program schedules; within a stage the
 * calls are independent.
 */
#ifndef US_KERNELS_EXPERTS_EXPERTS_H
#define US_KERNELS_EXPERTS_EXPERTS_H

#include "kernels/linear/linear.h"

/* Rows by expert. Arrays belong to the caller: expert (E), begin (E + 1), row and weight (R * K). */
struct us_expert_groups {
  uint32_t active;  /* number of experts with at least one row */
  uint32_t *expert; /* (active) ids, ascending */
  uint32_t *begin;  /* (active + 1) where each one's rows start in row and weight */
  uint32_t *row;    /* (R * K) token rows of each expert, ascending */
  float *weight;    /* (R * K) */
};

struct us_experts_args {
  const struct us_matrix *experts; /* (E, 3) gate (F, D), up (F, D), down (D, F): &layer->experts[0].gate */
  const struct us_expert_groups *groups;
  const float *x; /* packed rows (R, packed D), us_linear_pack */
  size_t x_stride;
  size_t R, D, F;
  float *inner; /* (R * K, packed F) between the stages: one packed row a routed pair */
  float *y;     /* (R, D) written */
  size_t y_stride;
  bool round_bf16;
  enum us_isa isa;
};

/* Group R rows by their experts. ids (R, K) ascending in each row, weights (R, K); K * R fits 32 bits. */
void us_experts_group(const uint32_t *ids, const float *weights, size_t R, uint32_t K, uint32_t E,
                      struct us_expert_groups *groups);

/* Floats of scratch a call of either stage needs for a tile of `width` output columns and at most R rows an
 * expert. */
size_t us_experts_scratch(size_t R, size_t width);

/* Inner columns [begin, end) of the i-th active expert: begin a multiple of 32, end too or F. */
void us_experts_inner(const struct us_experts_args *args, uint32_t i, size_t begin, size_t end,
                      float *scratch);

/* Output columns [begin, end) of all rows, all active experts; rows without an expert get 0. */
void us_experts_outer(const struct us_experts_args *args, size_t begin, size_t end, float *scratch);

#endif
