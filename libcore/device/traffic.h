/* traffic.h: the bytes that a round of the engine reads, from its list of operations and what it counted.
 *
 *     struct us_device_traffic traffic;
 *     us_device_traffic(schedule->ops, first, last, &traffic);
 *     double mean = (double)state->experts / (double)state->expert_layers;          // slots of experts a ROUTE
 *     double bytes = ranks * us_device_traffic_bytes(&traffic, mean);               // weights, of a round on all ranks
 *
 * Weights of the operations as they are listed: a matrix that several row tiles multiply by is read once a row tile. Experts of several row
 * tiles are one operation; one with more than 8 rows counts as often as it is streamed.
 */
#ifndef US_DEVICE_TRAFFIC_H
#define US_DEVICE_TRAFFIC_H

#include "kernels/engine/engine.h"
#include "plan/program.h"

/* Of one rank. */
struct us_device_traffic {
  uint64_t always;                        /* weights that every round reads */
  uint64_t per_expert;                    /* and those of one active expert in every ROUTE's operations */
  uint64_t by_task[US_TASK_OP_COUNT + 1]; /* both, by enum us_task_op; the last: what belongs to no task */
  bool of_experts[US_TASK_OP_COUNT + 1];  /* by_task is of one active expert a layer */
};

/* Of operations [first, last). */
void us_device_traffic(const struct us_engine_op *ops, uint32_t first, uint32_t last,
                       struct us_device_traffic *ret_traffic);

/* Of a round in which a ROUTE operation had so many active experts in the mean. */
double us_device_traffic_bytes(const struct us_device_traffic *traffic, double experts);

/* Whether `bytes` of the operation is of one active expert. */
bool us_device_op_of_experts(const struct us_engine_op *op);

/* Keys and values that a round's attention reads on one rank: every live row tile's sequences, with `context` cached positions
 * each (a window reads no more than itself). */
uint64_t us_device_kv_bytes(const struct us_engine_op *ops, uint32_t first, uint32_t last, uint32_t sequences,
                            uint32_t context);

#endif
