/* trace.c: spans of executed tasks. */
#include "plan/trace.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

struct us_trace {
  struct us_span *spans;
  size_t capacity;
  atomic_size_t next; /* claims a place; may run past capacity */
  uint64_t origin;
};

static uint64_t monotonic_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

enum us_status us_trace_create(size_t capacity, struct us_trace **ret_trace, struct us_err *err) {
  struct us_trace *trace = calloc(1, sizeof *trace);
  struct us_span *spans = calloc(capacity ? capacity : 1, sizeof *spans);
  if (!trace || !spans) {
    free(trace);
    free(spans);
    return us_err_memory(err, "the trace", capacity * sizeof *spans);
  }
  trace->spans = spans;
  trace->capacity = capacity;
  trace->origin = monotonic_now();
  *ret_trace = trace;
  return US_OK;
}

void us_trace_free(struct us_trace *trace) {
  if (!trace) return;
  free(trace->spans);
  free(trace);
}

uint64_t us_trace_now(const struct us_trace *trace) {
  return monotonic_now() - trace->origin;
}

void us_trace_add(struct us_trace *trace, const struct us_span *span) {
  size_t place = atomic_fetch_add_explicit(&trace->next, 1, memory_order_relaxed);
  if (place < trace->capacity) trace->spans[place] = *span;
}

size_t us_trace_count(const struct us_trace *trace) {
  size_t next = atomic_load_explicit(&trace->next, memory_order_relaxed);
  return next < trace->capacity ? next : trace->capacity;
}

size_t us_trace_dropped(const struct us_trace *trace) {
  size_t next = atomic_load_explicit(&trace->next, memory_order_relaxed);
  return next < trace->capacity ? 0 : next - trace->capacity;
}

const struct us_span *us_trace_span(const struct us_trace *trace, size_t i) {
  return &trace->spans[i];
}
