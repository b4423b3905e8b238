/* builder.h: how lower.c appends tasks and events. Internal to plan/.
 *
 * After the first failure every call does nothing; us_builder_finish reports it, so lowering reads as a list of ops.
 */
#ifndef US_PLAN_BUILDER_H
#define US_PLAN_BUILDER_H

#include "base/err.h"
#include "plan/program.h"

#include <stdbool.h>

struct us_builder {
  struct us_program *program;
  size_t task_capacity;
  uint32_t event_capacity;
  bool failed;
};

/* A set of events that the next op waits for: at most US_TASK_WAITS. */
struct us_event_set {
  uint32_t events[US_TASK_WAITS];
  uint32_t count;
};

/* One op cut into tiles: what us_builder_tiles repeats for each tile. */
struct us_tiling {
  enum us_task_op op;
  uint32_t layer, rank, slot;
  uint32_t begin, end, tile; /* [begin, end) in tiles of at most `tile` */
  uint64_t bytes;            /* streamed by the whole range; shared out so that tiles add up to it exactly */
  struct us_event_set waits;
  uint32_t signal;
};

void us_builder_init(struct us_builder *builder, struct us_program *program);
uint32_t us_builder_event(struct us_builder *builder);
void us_builder_tiles(struct us_builder *builder, const struct us_tiling *tiling);
US_CHECKED enum us_status us_builder_finish(struct us_builder *builder, struct us_err *err);

static inline struct us_event_set us_wait1(uint32_t event) {
  return (struct us_event_set){.events = {event}, .count = event == US_EVENT_NONE ? 0 : 1};
}
static inline struct us_event_set us_wait2(uint32_t a, uint32_t b) {
  return (struct us_event_set){.events = {a, b}, .count = 2};
}

#endif
