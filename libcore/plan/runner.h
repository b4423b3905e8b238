/* runner.h: run a tile program on the thread pool. Internal to plan/.
 *
 *     us_runner_run(&runner, program, pool, run_tile, &pass, &err);     // run_tile(&pass, task, worker)
 *
 * Workers claim tasks in list order, wait until the task's events are complete, run it and signal. The checker's
 * deadlock proof is about exactly this rule.
 */
#ifndef US_PLAN_RUNNER_H
#define US_PLAN_RUNNER_H

#include "base/pool.h"
#include "plan/program.h"
#include "plan/trace.h"

#include <stdatomic.h>

/* Runs one tile; returns the weight bytes it streamed (for experts they depend on the routing). */
typedef uint64_t us_task_body(void *pass, const struct us_task *task, int worker);

struct us_runner {
  atomic_uint *events; /* (event_capacity) signals counted so far */
  size_t event_capacity;
  struct us_trace *trace; /* borrowed; NULL: no tracing */
  uint32_t passes;        /* run so far */
};

/* Run every task; returns when all are done. */
US_CHECKED enum us_status us_runner_run(struct us_runner *runner, const struct us_program *program,
                                        struct us_pool *pool, us_task_body *body, void *pass,
                                        struct us_err *err);
void us_runner_release(struct us_runner *runner);

#endif
