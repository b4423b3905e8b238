/* price.h: what a tile program costs in bytes, and the floor that follows.
 *
 *     struct us_price price;
 *     us_program_price(program, us_expected_active(384, 8, 8), &price);      // 59.5 of 384 experts
 *     double seconds = price.total / (4 * 4.62e12);                          // four GPUs at 4.62 TB/s
 */
#ifndef US_PLAN_PRICE_H
#define US_PLAN_PRICE_H

#include "plan/program.h"

/* Weight bytes streamed by all ranks together. Doubles: the active experts are an expectation. */
struct us_price {
  double by_op[US_TASK_OP_COUNT];
  double total;
};

/* Expected number of distinct experts of a layer when R rows each draw K of E uniformly and independently:
 * E (1 - (1 - K/E)^R). */
double us_expected_active(uint32_t experts, uint32_t top_k, uint32_t rows);

/* Sum the bytes of a program in which `active_experts` experts of each MoE layer are active. */
void us_program_price(const struct us_program *program, double active_experts, struct us_price *ret_price);

#endif
