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
                                        {"program", US_H5_U32, offsetof(struct us_span, program), 1},
                                        {"role", US_H5_U32, offsetof(struct us_span, role), 1},
                                        {"wait", US_H5_U32, offsetof(struct us_span, wait), 1}};

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

static const char *kind_name(int kind) {
  return us_program_kind_name((enum us_program_kind)kind);
}

static enum us_status put_all(struct us_h5_writer *out, const struct us_trace *trace,
                              const char *provenance_json, char *values, struct us_err *err) {
  char names[512];
  enum us_status status = us_h5_put_text(out, "provenance", provenance_json, err);
  join_names(names, sizeof names, US_TASK_OP_COUNT + 1, us_trace_op_name);
  if (status == US_OK) status = us_h5_put_text(out, "ops", names, err);
  join_names(names, sizeof names, US_PROGRAM_KINDS, kind_name);
  if (status == US_OK) status = us_h5_put_text(out, "programs", names, err);
  join_names(names, sizeof names, US_TRACE_ROLES, us_trace_role_name);
  if (status == US_OK) status = us_h5_put_text(out, "roles", names, err);
  join_names(names, sizeof names, US_TRACE_WAITS, us_trace_wait_name);
  if (status == US_OK) status = us_h5_put_text(out, "waits", names, err);
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
  for (int op = 0; op < US_TASK_OP_COUNT; op++) ops[op] = us_trace_op_name(op);
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

/* ---- PNG of the engine ------------------------------------------------------------------------------------------- */

#define ENGINE_KINDS (US_TRACE_WAITS + US_TASK_OP_COUNT + 1)

struct engine_plot {
  uint64_t first, last; /* of the trace's clock */
  struct us_plot_span *spans;
  size_t count;
  const char *kinds[ENGINE_KINDS]; /* those that occur */
  char names[ENGINE_KINDS][32];
  size_t kind_count, kind_of[ENGINE_KINDS];
  char (*labels)[32];
  const char **rows;
  size_t row_count;
  uint16_t row_of[UINT16_MAX + 1][US_TRACE_ROLES]; /* row + 1 */
};

static size_t kind_at(struct engine_plot *p, const struct us_span *s) {
  size_t kind = s->wait ? s->wait : US_TRACE_WAITS + (size_t)s->op;
  if (!p->kind_of[kind]) {
    snprintf(p->names[kind], sizeof p->names[kind], "%s%s", s->wait ? "wait: " : "",
             s->wait ? us_trace_wait_name(s->wait) : us_trace_op_name(s->op));
    p->kinds[p->kind_count++] = p->names[kind];
    p->kind_of[kind] = p->kind_count;
  }
  return p->kind_of[kind] - 1;
}

/* Rows by GPU, block and role. */
static enum us_status number_rows(struct engine_plot *p, const struct us_trace *trace, struct us_err *err) {
  for (size_t i = 0; i < us_trace_count(trace); i++) {
    const struct us_span *s = us_trace_span(trace, i);
    p->row_of[s->worker][s->role] = 1;
  }
  for (size_t w = 0; w <= UINT16_MAX; w++)
    for (int role = 0; role < US_TRACE_ROLES; role++) p->row_count += p->row_of[w][role];
  p->labels = calloc(p->row_count + 1, sizeof *p->labels);
  p->rows = calloc(p->row_count + 1, sizeof *p->rows);
  if (!p->labels || !p->rows) return us_err_memory(err, "the timeline", p->row_count * sizeof *p->labels);
  size_t row = 0;
  for (size_t w = 0; w <= UINT16_MAX; w++)
    for (int role = 0; role < US_TRACE_ROLES; role++) {
      if (!p->row_of[w][role]) continue;
      snprintf(p->labels[row], sizeof *p->labels, "%zu:%zu %s", w / US_TRACE_BLOCKS, w % US_TRACE_BLOCKS,
               us_trace_role_name(role));
      p->rows[row] = p->labels[row];
      p->row_of[w][role] = (uint16_t)++row;
    }
  return US_OK;
}

/* Waits over operations, so that what remains of an operation's colour is its work. */
static void place_spans(struct engine_plot *p, const struct us_trace *trace, bool waits) {
  for (size_t i = 0; i < us_trace_count(trace); i++) {
    const struct us_span *s = us_trace_span(trace, i);
    if ((s->wait != 0) != waits || s->end <= p->first || s->start >= p->last) continue;
    uint64_t from = s->start > p->first ? s->start : p->first, to = s->end < p->last ? s->end : p->last;
    p->spans[p->count++] = (struct us_plot_span){.begin = (double)(from - p->first) / 1e3,
                                                 .end = (double)(to - p->first) / 1e3,
                                                 .row = p->row_of[s->worker][s->role] - 1u,
                                                 .kind = kind_at(p, s)};
  }
}

enum us_status us_profile_plot_engine(const struct us_trace *trace, double milliseconds, const char *path,
                                      const char *opt_provenance, struct us_err *err) {
  size_t n = us_trace_count(trace);
  struct engine_plot *p = calloc(1, sizeof *p);
  if (!p) return us_err_memory(err, "the timeline", sizeof *p);
  uint64_t window = (uint64_t)(milliseconds * 1e6), end = last_end(trace);
  p->first = window && window < end ? (end - window) / 2
                                    : 0; /* the middle: a launch begins and ends unlike the rest */
  p->last = window && window < end ? p->first + window : end;
  p->spans = calloc(n + 1, sizeof *p->spans);
  enum us_status status =
      p->spans ? number_rows(p, trace, err) : us_err_memory(err, "the timeline", n * sizeof *p->spans);
  if (status == US_OK) {
    place_spans(p, trace, false);
    place_spans(p, trace, true);
    struct us_plot_axes axes = {
        .title = "Engine timeline (GPU:SM role)", .x_title = "time (us)", .width = 1800};
    status = us_plot_timeline(path, &axes, p->rows, p->row_count, p->kinds, p->kind_count, p->spans, p->count,
                              opt_provenance, err);
  }
  free(p->spans), free(p->labels), free(p->rows), free(p);
  return status;
}
