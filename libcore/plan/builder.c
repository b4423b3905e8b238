/* builder.c: growing a tile program. */
#include "plan/builder.h"

#include <stdlib.h>

void us_builder_init(struct us_builder *builder, struct us_program *program) {
  *builder = (struct us_builder){.program = program};
}

/* Doubles *array when it is full; marks the builder failed when memory is short. */
static bool grow(struct us_builder *builder, void **array, size_t used, size_t *capacity, size_t item) {
  if (used < *capacity) return true;
  size_t wanted = *capacity ? *capacity * 2 : 256;
  void *bigger = realloc(*array, wanted * item);
  if (!bigger) {
    builder->failed = true;
    return false;
  }
  *array = bigger;
  *capacity = wanted;
  return true;
}

uint32_t us_builder_event(struct us_builder *builder) {
  struct us_program *program = builder->program;
  if (builder->failed) return US_EVENT_NONE;
  size_t capacity = builder->event_capacity;
  void *totals = program->event_totals;
  bool ok = grow(builder, &totals, program->event_count, &capacity, sizeof *program->event_totals);
  program->event_totals = totals;
  builder->event_capacity = (uint32_t)capacity;
  if (!ok) return US_EVENT_NONE;
  program->event_totals[program->event_count] = 0;
  return program->event_count++;
}

static void push_task(struct us_builder *builder, const struct us_task *task) {
  struct us_program *program = builder->program;
  void *tasks = program->tasks;
  bool ok = grow(builder, &tasks, program->task_count, &builder->task_capacity, sizeof *task);
  program->tasks = tasks;
  if (!ok) return;
  program->tasks[program->task_count++] = *task;
  if (task->signal != US_EVENT_NONE) program->event_totals[task->signal]++;
}

void us_builder_tiles(struct us_builder *builder, const struct us_tiling *tiling) {
  uint64_t width = tiling->end - tiling->begin;
  for (uint32_t begin = tiling->begin; begin < tiling->end && !builder->failed; begin += tiling->tile) {
    uint32_t end = tiling->end - begin < tiling->tile ? tiling->end : begin + tiling->tile;
    uint64_t from = tiling->bytes * (begin - tiling->begin) / width,
             to = tiling->bytes * (end - tiling->begin) / width;
    struct us_task task = {.op = (uint16_t)tiling->op,
                           .rank = (uint16_t)tiling->rank,
                           .layer = tiling->layer,
                           .slot = tiling->slot,
                           .begin = begin,
                           .end = end,
                           .signal = tiling->signal,
                           .bytes = to - from};
    for (uint32_t w = 0; w < US_TASK_WAITS; w++)
      task.waits[w] = w < tiling->waits.count ? tiling->waits.events[w] : US_EVENT_NONE;
    push_task(builder, &task);
  }
}

enum us_status us_builder_finish(struct us_builder *builder, struct us_err *err) {
  if (!builder->failed) return US_OK;
  return us_err_memory(err, "the tile program", builder->program->task_count * sizeof(struct us_task));
}
