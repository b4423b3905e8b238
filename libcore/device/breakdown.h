/* breakdown.h: the engine's spans as where a round's time went, and as a trace.
 *
 *     struct us_breakdown b = {.skip = 1};
 *     struct us_breakdown_spans spans = {ops, op_count, host_spans, host_counts, capacity, blocks, ranks};
 *     us_breakdown_gpu(&b, &spans, &err);                                       // every GPU's
 *     us_breakdown_finish(&b);
 *     us_breakdown_trace(&spans, gpu, 4, us_breakdown_origin(&spans), 59.5, trace);
 *
 * The compute role's time is what a round lasts: it goes from operation to operation without a gap. An operation's time less its
 * waits is work; in an operation with weights, "ring empty" is waiting for HBM. The stream role's waiting for a full ring is time
 * in which the SM asks HBM for nothing. Needs no GPU.
 */
#ifndef US_DEVICE_BREAKDOWN_H
#define US_DEVICE_BREAKDOWN_H

#include "kernels/engine/engine.h"
#include "plan/profile.h"

/* Of one GPU's launch, or of launches one after the other. */
struct us_breakdown_spans {
  const struct us_engine_op *ops;
  uint32_t op_count;
  const struct us_engine_span *spans; /* (blocks, US_ENGINE_ROLES, capacity) */
  const uint32_t *counts;             /* (blocks, US_ENGINE_ROLES) seen, also those that found no room */
  uint32_t capacity, blocks;
  uint32_t ranks; /* that share the GPU, each as many blocks as another */
};

#define US_BREAKDOWN_RAMP                                                                                    \
  3000 /* ns behind its input in which an operation asks the ring for the first time */

/* One operation of the tile program. Seconds of a round, mean over SMs and rounds. */
struct us_breakdown_op {
  double time;                 /* the compute role's, waits included */
  double wait[US_TRACE_WAITS]; /* of that */
  double ramp;      /* of wait[STAGE]: the first one, right behind the input, before weights flow */
  double ring_full; /* of the stream role */
  bool weights;     /* it streams some */
};

struct us_breakdown {
  uint32_t skip; /* rounds at the start that do not count: the ring was empty */
  /* By enum us_program_kind and enum us_task_op; the last: choosing tokens and ending the round. */
  struct us_breakdown_op ops[US_PROGRAM_KINDS][US_TASK_OP_COUNT + 1];
  double round;                /* seconds a round, from the end of one to the end of the next; mean */
  double streaming;            /* in operations with weights: multiplying, and waiting for HBM (ring empty) */
  double vectors;              /* work of all other operations */
  double wait[US_TRACE_WAITS]; /* everything else, by cause */
  uint64_t rounds;             /* that counted, over all SMs */
  uint64_t dropped;            /* spans that found no room */
};

/* Adds a GPU's. US_ERR_CHECK: no room for the spans of skip + 1 rounds. */
US_CHECKED enum us_status us_breakdown_gpu(struct us_breakdown *b, const struct us_breakdown_spans *spans,
                                           struct us_err *err);

/* Sums become means. */
void us_breakdown_finish(struct us_breakdown *b);

/* When the first span began. */
uint64_t us_breakdown_origin(const struct us_breakdown_spans *spans);

/* Append the spans of `keep` blocks (0: all), evenly chosen, with times from `origin` on. `experts`: active ones a layer, for the
 * bytes of operations, which the stream role's spans carry. */
void us_breakdown_trace(const struct us_breakdown_spans *spans, uint32_t gpu, uint32_t keep, uint64_t origin,
                        double experts, struct us_trace *trace);

#endif
