/* group.h: the schedules of all ranks for one number of rows, and their launches: as one kernel, or as a CUDA graph.
 *
 *     us_device_group_create(devices, weights, &(struct us_device_schedule_options){.batch = 1, .block = 8}, &group, &err);
 *     us_device_group_caches(group, target_pool, draft_pool);
 *     group->state.target[0] = (struct us_engine_row){...};
 *     us_device_group_upload(group, &tables, &err);                         // the state of every rank
 *     us_device_group_run(group, US_DEVICE_ENGINE, first, last, &err);      // operations [first, last), once
 *     us_devices_sync(devices, group->schedule[0]->ops, group->schedule[0]->op_count, &err);
 *     us_device_group_free(group);
 *
 * US_DEVICE_ENGINE is one launch for the range; US_DEVICE_GRAPH one launch an operation, captured once for each range and
 * replayed; US_DEVICE_SINGLE the same launches without a graph, for whoever looks between them. All give the same bits.
 * A loop of many rounds fills its own launch: us_device_group_fill, us_engine_run, then us_device_group_ran with the
 * rounds that were completed.
 */
#ifndef US_DEVICE_GROUP_H
#define US_DEVICE_GROUP_H

#include "device/kv_pool.h"
#include "device/schedule.h"

enum us_device_mode { US_DEVICE_ENGINE, US_DEVICE_GRAPH, US_DEVICE_SINGLE };

struct us_device_graph; /* captured launches */

struct us_device_group {
  struct us_devices *devices;
  struct us_device_schedule
      *schedule[US_ENGINE_MAX_RANKS]; /* (ranks); their lists have the same operations */
  uint32_t rows;                      /* of a pass: row tiles * 8 */
  uint32_t exchanges;           /* EMBED and REDUCE operations since the buffers were made: a running index */
  struct us_engine_state state; /* the host's copy, without tables */
  uint32_t jitter;              /* test: of every launch */
  uint64_t timeout_ns;          /* of the watchdog; 0: the engine's default */
  struct us_engine_profile profile[US_ENGINE_MAX_RANKS]; /* (gpus) of launches from now on; spans NULL: off */
  struct us_device_graph *graphs;
};

/* weights (ranks). Makes every rank's schedule and tells each where the others' buffers are. */
US_CHECKED enum us_status us_device_group_create(struct us_devices *devices,
                                                 struct us_device_weights *const *weights,
                                                 const struct us_device_schedule_options *options,
                                                 struct us_device_group **ret_group, struct us_err *err);
void us_device_group_free(struct us_device_group *group); /* NULL is allowed */

/* Where the caches' pages are; opt_draft NULL without a drafter. */
void us_device_group_caches(struct us_device_group *group, const struct us_kv_pool *target,
                            const struct us_kv_pool *opt_draft);

/* The host's state to every rank; tables [sequence][rank] of the caches (NULL entries: not used). */
struct us_device_tables {
  struct us_engine_kv kv[US_ENGINE_SEQUENCES][US_ENGINE_MAX_RANKS],
      draft_kv[US_ENGINE_SEQUENCES][US_ENGINE_MAX_RANKS];
};
US_CHECKED enum us_status us_device_group_upload(struct us_device_group *group,
                                                 const struct us_device_tables *tables, struct us_err *err);

/* Launch operations [first, last) once on every GPU. Returns when they are queued. */
US_CHECKED enum us_status us_device_group_run(struct us_device_group *group, enum us_device_mode mode,
                                              uint32_t first, uint32_t last, struct us_err *err);

/* What us_device_group_run launches on a GPU: all ranks of it, one round. The caller may set rounds and mailboxes. */
void us_device_group_fill(const struct us_device_group *group, uint32_t gpu, uint32_t first, uint32_t last,
                          struct us_engine_launch *ret_launch);

/* A launch of [first, last) completed so many rounds: the running indices go on from there. */
void us_device_group_ran(struct us_device_group *group, uint32_t first, uint32_t last, uint32_t rounds);

/* Partial sums that nobody took are forgotten: after a range that ended between a push and its reduction. Waits. */
US_CHECKED enum us_status us_device_group_reset(struct us_device_group *group, struct us_err *err);

/* Wait for all GPUs (us_devices_sync with the group's operations). */
US_CHECKED enum us_status us_device_group_sync(struct us_device_group *group, struct us_err *err);

#endif
