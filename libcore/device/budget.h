/* budget.h: what an engine takes of each GPU's memory, known before anything is allocated.
 *
 *     struct us_device_budget_options options = {.gpus = 4, .ranks = 4, .sequences = 9};
 *     us_device_budget(&shape, opt_draft_shape, &options, free_bytes, &budget, &err);
 *     us_device_budget_say(&budget, say, arg);          // a line a kind of memory
 *     us_device_budget_check(&budget, free_bytes, "GPU 0", &err);
 */
#ifndef US_DEVICE_BUDGET_H
#define US_DEVICE_BUDGET_H

#include "device/kv_pool.h"
#include "device/schedule.h"

struct us_device_budget_options {
  uint32_t gpus, ranks;
  uint32_t
      sequences; /* caches that live at once: sequences that step together, and the prompt that others are made from */
  uint32_t
      positions; /* of a sequence, at most; 0: the model's, no more than US_DEVICE_POSITIONS, halved until it fits */
  uint64_t prefill_bytes; /* of a rank: workspace of the prefill kernels */
};
#define US_DEVICE_POSITIONS 32768

/* Schedules of the executor: passes of so many rows are made when one is first needed. */
#define US_DEVICE_GROUPS 5
static inline struct us_device_schedule_options us_device_group_options(uint32_t index,
                                                                        uint32_t draft_block) {
  uint32_t rows = 8u << index, block = rows == 8 || (draft_block && draft_block <= 8) ? 8 : 16;
  return (struct us_device_schedule_options){
      .batch = rows / block, .block = block, .drafter = draft_block != 0};
}

struct us_device_budget {
  struct us_device_budget_options options; /* positions resolved */
  struct us_device_bytes weights;          /* of the largest rank */
  uint64_t workspace;            /* of a rank: activations, exchange, lists of all schedules, prefill */
  uint64_t caches, draft_caches; /* of a rank */
  struct us_kv_pool_options pool, draft_pool;
  uint64_t gpu_bytes; /* of a GPU in all */
};

/* free_bytes 0: not known, positions are not halved. US_ERR_USAGE: the shape cannot be cut into so many ranks. */
US_CHECKED enum us_status us_device_budget(const struct us_shape *shape,
                                           const struct us_draft_shape *opt_draft,
                                           const struct us_device_budget_options *options,
                                           uint64_t free_bytes, struct us_device_budget *ret_budget,
                                           struct us_err *err);

/* US_ERR_MEMORY: says what is needed, by kind, and what is free. */
US_CHECKED enum us_status us_device_budget_check(const struct us_device_budget *budget, uint64_t free_bytes,
                                                 const char *gpu, struct us_err *err);

/* The report: "memory of each GPU, GiB: experts 103.2, attention 6.5, ..." and what the caches hold. */
void us_device_budget_say(const struct us_device_budget *budget, void (*say)(void *arg, const char *line),
                          void *arg);

#endif
