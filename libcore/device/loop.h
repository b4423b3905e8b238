/* loop.h: decode rounds that stay on the GPUs: admit sequences, launch, listen to what they commit, park.
 *
 *     struct us_device_loop *loop = NULL;
 *     struct us_device_loop_options options = {.batch = rounds->batch, .block = rounds->block, .drafting = rounds->drafting};
 *     us_device_loop_create(&parts, &options, &loop, &err);       // parts: us_executor_cuda_parts
 *     us_device_loop_run(loop, rounds, &err);                     // what us_executor_ops.rounds promises
 *     us_device_loop_free(loop);                                  // before the executor's devices, weights and pools
 *
 * One launch serves up to US_DEVICE_LOOP_ROUNDS rounds on every GPU: the schedule's whole list, again and again. Meanwhile the
 * host reads committed tokens from a ring in mapped memory and writes what it wants (end this sequence, park) beside it; the
 * kernels wait for nothing from the host. When a sequence ends they park; caches have pages for all positions that a launch may
 * reach before it starts. As a graph (US_DEVICE_GRAPH) the host launches each round and looks between them.
 *
 * ops->rounds of the CUDA executor is us_device_rounds with a loop that it keeps: made at the first call, made anew when a call
 * asks for another batch, block or drafter, freed by the executor.
 */
#ifndef US_DEVICE_LOOP_H
#define US_DEVICE_LOOP_H

#include "device/executor.h"

#define US_DEVICE_LOOP_ROUNDS 256 /* of one launch: 2,048 positions of a sequence at a block of 8 */

struct us_device_loop;

struct us_device_loop_options {
  uint32_t batch, block; /* most sequences together; rows a sequence: 1 + most proposals */
  bool drafting;         /* the drafter runs */
  bool adaptive;         /* rounds may ask for adaptive lengths */
};

/* Makes a group of schedules from the executor's parts (borrowed). What us_device_group_create returns; US_ERR_USAGE: a batch or
 * block that the engine has no rows for. */
US_CHECKED enum us_status us_device_loop_create(const struct us_executor_cuda_parts *parts,
                                                const struct us_device_loop_options *options,
                                                struct us_device_loop **ret_loop, struct us_err *err);
void us_device_loop_free(struct us_device_loop *loop); /* NULL is allowed */

/* Run rounds until one in which a sequence ended (model/executor.h). Any rule; up to 16 stop ids of a sequence
 * end it on the GPU, further ones are left to on_round, which costs up to two rounds. US_ERR_USAGE: what the loop was not made
 * for; US_INTERRUPTED; US_ERR_DEVICE: CUDA, or the watchdog, which says who waits for what. */
US_CHECKED enum us_status us_device_loop_run(struct us_device_loop *loop, struct us_rounds *rounds,
                                             struct us_err *err);

/* The same for an executor that keeps a loop: *loop is made, or made anew, when `rounds` needs it. */
US_CHECKED enum us_status us_device_rounds(const struct us_executor *executor, struct us_device_loop **loop,
                                           struct us_rounds *rounds, struct us_err *err);

/* The loop's schedules and launches, for profiles and tests. */
struct us_device_group *us_device_loop_group(struct us_device_loop *loop);

#endif
