/* schedule.h: from a tile program to the engine's list of operations, and the buffers they work in.
 *
 *     struct us_device_schedule_options options = {.batch = 1, .block = 8};
 *     us_device_schedule_create(weights, &options, &schedule, &err);      // one a rank
 *     us_device_schedule_check(schedule, &err);                            // one of them: the lists are alike
 *     us_device_schedule_connect(schedules, ranks);                        // peers' exchange buffers, once all exist
 *     launch.rank[i] = schedule->rank; launch.first = schedule->begin[US_ENGINE_PASS_TARGET]; ...
 *     us_device_schedule_free(schedule);
 *
 * A round's list is context, draft, target, each lowered by plan/lower.h for batch * block rows and grouped into operations:
 * what the tile program cuts into tasks of one operation, layer and rank becomes one operation a row tile of 8 rows, or of up to 8
 * row tiles where weights or hand-offs are shared. All row
 * tiles of an operation come before the next operation, so that the hand-offs of one tile hide behind the others' work; only
 * routing, gate and up, and down of the experts stay together, since a block holds one list of active experts at a time.
 * us_device_schedule_check proves the list against the programs.
 *
 * A launch of several rounds runs the whole list; a launch of a part of it runs one round. Needs no CUDA but for
 * us_device_schedule_create.
 */
#ifndef US_DEVICE_SCHEDULE_H
#define US_DEVICE_SCHEDULE_H

#include "device/memory.h"
#include "device/weights.h"

struct us_device_schedule_options {
  uint32_t batch, block;  /* sequences a pass, rows a sequence; defaults 1, 1 */
  uint32_t max_positions; /* of the rope tables and the caches; default: the model's, at most 32768 */
  bool drafter;           /* context and draft passes too (the weights have a drafter) */
  bool uniform;           /* route uniformly from Philox; the router still runs */
  uint64_t uniform_seed;
  bool observe; /* keep routed ids */
  bool
      adaptive; /* the drafter's last SELECT may take rows out of the target's pass, so that pass waits for it */
};

/* Blocks of a rank, at most: what SELECT's buffer has room for. */
#define US_DEVICE_SCHEDULE_BLOCKS 144

struct us_device_schedule {
  struct us_device_schedule_options options; /* defaults resolved */
  const struct us_device_weights *weights;
  struct us_engine_rank rank; /* device pointers; blocks, caches, mailbox and stuck are the caller's to set */
  struct us_engine_op *ops;   /* host copy */
  uint32_t op_count;
  uint32_t begin[US_ENGINE_PASSES],
      end[US_ENGINE_PASSES]; /* ranges of the list; the target's ends with SELECT and ACCEPT */
  uint32_t head_end;         /* the target's operations up to its logits: what a plain forward pass runs */
  uint32_t exchanges[US_ENGINE_PASSES],
      selects[US_ENGINE_PASSES]; /* row tiles of EMBED and REDUCE operations of each, and SELECT operations */
  uint32_t row_tiles;
  float *logits;       /* device: (row_tiles * 8, logits_stride) of this rank's vocabulary share */
  float *draft_logits; /* NULL without a drafter */
  uint32_t logits_stride, logits_first, logits_count;
  float *residual;  /* device: (row_tiles * 8, D) */
  void *features;   /* device: operand of the taps, (row_tiles, taps * D / 32, 512); or NULL */
  uint32_t *routed; /* device: (L, row_tiles * 8, top_k); NULL unless observed */
  uint64_t workspace_bytes;
  void *owner;
};

/* US_ERR_USAGE: what the kernels cannot run, by name and size. The current GPU's memory; weights outlive the schedule. */
US_CHECKED enum us_status us_device_schedule_create(const struct us_device_weights *weights,
                                                    const struct us_device_schedule_options *options,
                                                    struct us_device_schedule **ret_schedule,
                                                    struct us_err *err);

/* The same with buffers from `memory`, whose `arg` outlives the schedule. */
US_CHECKED enum us_status us_device_schedule_create_in(const struct us_device_weights *weights,
                                                       const struct us_device_schedule_options *options,
                                                       const struct us_device_memory_ops *memory,
                                                       struct us_device_schedule **ret_schedule,
                                                       struct us_err *err);

/* Tell every rank where the others' exchange, select, logits and embedding buffers are. Peer access between their GPUs is on. */
void us_device_schedule_connect(struct us_device_schedule *const *schedules, uint32_t ranks);

/* Prove the list against the programs it was made from; US_ERR_CHECK names the first operation that is wrong:
 * - the programs pass plan/check.h; every task belongs to one operation a row tile, whose weights have the task's bytes;
 * - whatever a task waits for is implied, for every block, by the list's order and hand-offs;
 * - sizes and cuts fit the kernels, and buffers do not overlap;
 * - over rounds without end: what an operation reads was written whole and is visible; nobody still reads what it overwrites; an
 *   exchange slot, or a SELECT's buffer, is used again only when every rank has let go of it; no wait is for ever.
 * Ranks are taken to run the same list. */
US_CHECKED enum us_status us_device_schedule_check(const struct us_device_schedule *schedule,
                                                   struct us_err *err);

/* GPU memory a schedule will take beside the weights and caches; 0 if it cannot be made. */
uint64_t us_device_schedule_bytes(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                  uint32_t ranks, const struct us_device_schedule_options *options);

void us_device_schedule_free(struct us_device_schedule *schedule); /* NULL is allowed */

#endif
