/* trace.h: when each task of a run started, waited and ended: what tile-profile draws.
 *
 *     struct us_trace *trace;
 *     us_trace_create(1 << 20, &trace, &err);
 *     us_executor_tiles_trace(executor, trace);            // every pass from now on appends its tasks
 *     ... run ...
 *     for (size_t i = 0; i < us_trace_count(trace); i++) { const struct us_span *span = us_trace_span(trace, i); ... }
 *     us_trace_free(trace);
 */
#ifndef US_PLAN_TRACE_H
#define US_PLAN_TRACE_H

#include "base/err.h"

#include <stddef.h>
#include <stdint.h>

/* Whose time a span is. The tile program's threads do a task from end to end; a block of the engine does three things at once. */
enum us_trace_role { US_TRACE_WORKER, US_TRACE_COMPUTE, US_TRACE_STREAM, US_TRACE_EPILOGUE };

/* `worker` of block b of a GPU's launch. */
#define US_TRACE_BLOCKS 256

/* One executed task, or in the engine an operation of a block's role or one wait inside of it. Times are nanoseconds of the
 * monotonic clock since the trace was created; of the engine: of the GPU's clock since the trace's first span. */
struct us_span {
  uint64_t claimed; /* the worker took the task and began to wait for its events */
  uint64_t start;   /* the events were complete */
  uint64_t end;
  uint64_t bytes; /* weight bytes streamed */
  uint32_t layer;
  uint32_t pass; /* counts passes of the executor: target, draft and context passes alike */
  uint16_t
      op; /* enum us_task_op; US_TASK_OP_COUNT: none of the tile program (choosing tokens, the end of a round) */
  uint16_t worker; /* thread, or GPU * US_TRACE_BLOCKS + block */
  uint8_t program; /* enum us_program_kind */
  uint8_t role;    /* enum us_trace_role */
  uint8_t
      wait; /* enum us_engine_wait: what the engine's role waited for; 0: the operation, its waits included */
};

struct us_trace;

/* Room for `capacity` spans; tasks past it are counted, not kept. */
US_CHECKED enum us_status us_trace_create(size_t capacity, struct us_trace **ret_trace, struct us_err *err);
void us_trace_free(struct us_trace *trace);

/* Nanoseconds since the trace was created. */
uint64_t us_trace_now(const struct us_trace *trace);

/* Append a span; thread-safe, does not block. */
void us_trace_add(struct us_trace *trace, const struct us_span *span);

size_t us_trace_count(const struct us_trace *trace);   /* spans kept */
size_t us_trace_dropped(const struct us_trace *trace); /* spans that found no room */
const struct us_span *us_trace_span(const struct us_trace *trace, size_t i);

#endif
