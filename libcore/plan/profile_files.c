/* profile_files.c: traces as HDF5 and PNG. */
#include "plan/profile_files.h"

#include "base/h5.h"
#include "base/plot.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- HDF5 -------------------------------------------------------------------------------------------------------- */

/* A column of the artefact: where in a span its values lie. */
struct column {
  const char *name;
  enum us_h5_type type;
  size_t offset, bytes; /* in struct us_span; narrower fields are widened to the type */
};

static const struct column columns[] = {{"claimed", US_H5_U64, offsetof(struct us_span, claimed), 8},
                                        {"start", US_H5_U64, offsetof(struct us_span, start), 8},
                                        {"end", US_H5_U64, offsetof(struct us_span, end), 8},
                                        {"bytes", US_H5_U64, offsetof(struct us_span, bytes), 8},
                                        {"layer", US_H5_U32, offsetof(struct us_span, layer), 4},
                                        {"pass", US_H5_U32, offsetof(struct us_span, pass), 4},
                                        {"op", US_H5_U32, offsetof(struct us_span, op), 2},
                                        {"worker", US_H5_U32, offsetof(struct us_span, worker), 2},
                                        {"program", US_H5_U32, offsetof(struct us_span, program), 1}};

static enum us_status put_column(struct us_h5_writer *out, const struct us_trace *trace,
                                 const struct column *column, char *values, struct us_err *err) {
  size_t n = us_trace_count(trace), size = us_h5_type_size(column->type);
  memset(values, 0, n * size);
  for (size_t i = 0; i < n; i++)
    memcpy(values + i * size, (const char *)us_trace_span(trace, i) + column->offset, column->bytes);
  return us_h5_put(out, column->name, column->type, 1, &n, values, err);
}

/* Names 0 .. n-1 separated by commas. */
static void join_names(char *text, size_t size, int n, const char *(*name)(int)) {
  size_t used = 0;
  text[0] = 0;
  for (int i = 0; i < n && used < size; i++)
    used += (size_t)snprintf(text + used, size - used, "%s%s", i ? "," : "", name(i));
}

static const char *op_name(int op) {
  return us_task_op_name((enum us_task_op)op);
}
static const char *kind_name(int kind) {
  return us_program_kind_name((enum us_program_kind)kind);
}

static enum us_status put_all(struct us_h5_writer *out, const struct us_trace *trace,
                              const char *provenance_json, char *values, struct us_err *err) {
  char names[512];
  enum us_status status = us_h5_put_text(out, "provenance", provenance_json, err);
  join_names(names, sizeof names, US_TASK_OP_COUNT, op_name);
  if (status == US_OK) status = us_h5_put_text(out, "ops", names, err);
  join_names(names, sizeof names, US_PROGRAM_KINDS, kind_name);
  if (status == US_OK) status = us_h5_put_text(out, "programs", names, err);
  for (size_t c = 0; c < sizeof columns / sizeof *columns && status == US_OK; c++)
    status = put_column(out, trace, &columns[c], values, err);
  return status;
}

enum us_status us_profile_write_h5(const struct us_trace *trace, const char *path,
                                   const char *provenance_json, struct us_err *err) {
  size_t bytes = us_trace_count(trace) * sizeof(uint64_t) + 1;
  struct us_h5_writer *out = NULL;
  char *values = malloc(bytes);
  if (!values) return us_err_memory(err, "the trace", bytes);
  enum us_status status = us_h5_create(path, US_TRACE_KIND, &out, err);
  if (status == US_OK) {
    status = put_all(out, trace, provenance_json, values, err);
    if (status == US_OK)
      status = us_h5_finish(out, err);
    else
      us_h5_abandon(out);
  }
  free(values);
  return status;
}

/* ---- PNG --------------------------------------------------------------------------------------------------------- */

static uint64_t last_end(const struct us_trace *trace) {
  uint64_t last = 0;
  for (size_t i = 0; i < us_trace_count(trace); i++)
    if (us_trace_span(trace, i)->end > last) last = us_trace_span(trace, i)->end;
  return last;
}

enum us_status us_profile_plot(const struct us_trace *trace, int workers, double milliseconds,
                               const char *path, const char *opt_provenance, struct us_err *err) {
  size_t n = us_trace_count(trace), kept = 0;
  uint64_t last = last_end(trace), window = (uint64_t)(milliseconds * 1e6), first = 0;
  if (window && window < last) first = last - window;
  struct us_plot_span *spans = calloc(n + 1, sizeof *spans);
  char(*labels)[24] = calloc((size_t)workers, sizeof *labels);
  const char **rows = calloc((size_t)workers, sizeof *rows), *ops[US_TASK_OP_COUNT];
  if (!spans || !labels || !rows) {
    free(spans), free(labels), free(rows);
    return us_err_memory(err, "the timeline", n * sizeof *spans);
  }
  for (int w = 0; w < workers; w++) {
    snprintf(labels[w], sizeof labels[w], "worker %d", w);
    rows[w] = labels[w];
  }
  for (int op = 0; op < US_TASK_OP_COUNT; op++) ops[op] = op_name(op);
  for (size_t i = 0; i < n; i++) {
    const struct us_span *s = us_trace_span(trace, i);
    if (s->start < first || s->worker >= workers) continue;
    spans[kept++] = (struct us_plot_span){.begin = (double)(s->start - first) / 1e6,
                                          .end = (double)(s->end - first) / 1e6,
                                          .row = s->worker,
                                          .kind = s->op};
  }
  struct us_plot_axes axes = {.title = "Tile program timeline", .x_title = "time (ms)"};
  enum us_status status = us_plot_timeline(path, &axes, rows, (size_t)workers, ops, US_TASK_OP_COUNT, spans,
                                           kept, opt_provenance, err);
  free(spans), free(labels), free(rows);
  return status;
}
