/* runner.c: in-order claiming of tile tasks by the workers of a pool. */
#include "plan/runner.h"

#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* About as long as a small tile takes; past it the core is given away, since more threads than cores may be running. */
#define SPINS_BEFORE_YIELD 2000

struct run {
  struct us_runner *runner;
  const struct us_program *program;
  us_task_body *body;
  void *pass;
  atomic_size_t next;
};

static void wait_for_event(const atomic_uint *count, unsigned total) {
  for (unsigned spins = 0; atomic_load_explicit(count, memory_order_acquire) != total; spins++) {
    if (spins >= SPINS_BEFORE_YIELD) {
      sched_yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

static void run_task(struct run *run, const struct us_task *task, int worker) {
  struct us_runner *runner = run->runner;
  struct us_trace *trace = runner->trace;
  struct us_span span = {.layer = task->layer,
                         .op = task->op,
                         .worker = (uint16_t)worker,
                         .pass = runner->passes,
                         .program = (uint8_t)run->program->kind};
  if (trace) span.claimed = us_trace_now(trace);
  for (int w = 0; w < US_TASK_WAITS; w++)
    if (task->waits[w] != US_EVENT_NONE)
      wait_for_event(&runner->events[task->waits[w]], run->program->event_totals[task->waits[w]]);
  if (trace) span.start = us_trace_now(trace);
  span.bytes = run->body(run->pass, task, worker);
  if (trace) {
    span.end = us_trace_now(trace);
    us_trace_add(trace, &span);
  }
  if (task->signal != US_EVENT_NONE)
    atomic_fetch_add_explicit(&runner->events[task->signal], 1, memory_order_release);
}

static void run_worker(void *arg, int worker, int workers) {
  struct run *run = arg;
  (void)workers;
  for (;;) {
    size_t i = atomic_fetch_add_explicit(&run->next, 1, memory_order_relaxed);
    if (i >= run->program->task_count) return;
    run_task(run, &run->program->tasks[i], worker);
  }
}

enum us_status us_runner_run(struct us_runner *runner, const struct us_program *program, struct us_pool *pool,
                             us_task_body *body, void *pass, struct us_err *err) {
  if (program->event_count > runner->event_capacity) {
    atomic_uint *events = realloc(runner->events, program->event_count * sizeof *events);
    if (!events)
      return us_err_memory(err, "the events of a tile program", program->event_count * sizeof *events);
    runner->events = events;
    runner->event_capacity = program->event_count;
  }
  for (uint32_t e = 0; e < program->event_count; e++) atomic_init(&runner->events[e], 0);
  struct run run = {.runner = runner, .program = program, .body = body, .pass = pass};
  atomic_init(&run.next, 0);
  us_pool_run(pool, run_worker, &run);
  runner->passes++;
  return US_OK;
}

void us_runner_release(struct us_runner *runner) {
  free(runner->events);
  runner->events = NULL;
  runner->event_capacity = 0;
}
