/* critical_path.h: the chain of work and waits that a round's length consists of, from the engine's spans.
 *
 *     struct us_critical_path path = {.skip = 1};
 *     struct us_breakdown_spans spans = {ops, op_count, host_spans, host_counts, capacity, blocks, ranks};
 *     us_critical_path_gpu(&path, &spans, &err);                               // every GPU's
 *     us_critical_path_finish(&path);
 *     path.ops[US_PROGRAM_TARGET][US_TASK_QKV].work                            // seconds a round
 *
 * A mean over SMs (breakdown.h) says what SMs do, not what a round waits for: an operation that 16 SMs do and 116 wait for is short
 * there. The path is walked backwards from the end of the last round. Work is followed in its block; a wait that was for other
 * blocks leads to the block that was last, at the time when it was done: of a hand-off the last of the operation that is read, of a
 * partial sum the last of the product before, of a norm the block whose sums came last, of a choice of tokens the last block to come.
 * What remains of the wait is the hand-off itself. A wait whose cause is older than itself stays with its block: another GPU's sum,
 * the ring, a plan. The pieces are gapless, so they add up to the rounds' length. Needs no GPU.
 */
#ifndef US_DEVICE_CRITICAL_PATH_H
#define US_DEVICE_CRITICAL_PATH_H

#include "device/breakdown.h"

/* One operation of the tile program, what of it is on the path. Seconds of a round, mean over GPUs and rounds. */
struct us_critical_op {
  double visits;               /* how often the path comes by */
  double work;                 /* the compute role's */
  double epilogue;             /* of a product: from the last multiply to the last sum stored or pushed */
  double wait[US_TRACE_WAITS]; /* by cause, what is left of it when the cause was there */
};

struct us_critical_path {
  uint32_t skip; /* rounds at the start that do not count */
  /* By enum us_program_kind and enum us_task_op; the last: choosing tokens and ending the round. */
  struct us_critical_op ops[US_PROGRAM_KINDS][US_TASK_OP_COUNT + 1];
  double round;    /* seconds a round: the sum of all of the above */
  uint64_t rounds; /* that counted, over all GPUs */
};

/* Adds a GPU's. US_ERR_CHECK: no room for the spans of skip + 1 rounds; US_ERR_MEMORY. */
US_CHECKED enum us_status us_critical_path_gpu(struct us_critical_path *path,
                                               const struct us_breakdown_spans *spans, struct us_err *err);

/* Sums become means. */
void us_critical_path_finish(struct us_critical_path *path);

#endif
