/* profile.c: summaries and text forms of a trace. */
#include "plan/profile.h"

#include <stdbool.h>
#include <string.h>

#define SECOND      1e9
#define MICROSECOND 1e3

const char *us_program_kind_name(enum us_program_kind kind) {
  static const char *const names[US_PROGRAM_KINDS] = {"target", "draft", "context"};
  return kind >= 0 && kind < US_PROGRAM_KINDS ? names[kind] : "unknown";
}

/* Time covered by the spans of one pass, whose spans need not be adjacent in the trace. */
struct pass_extent {
  uint32_t pass;
  uint64_t first, last;
};

static void widen(struct pass_extent *extent, const struct us_span *span) {
  if (span->claimed < extent->first) extent->first = span->claimed;
  if (span->end > extent->last) extent->last = span->end;
}

void us_profile_summarise(const struct us_trace *trace, int workers, struct us_profile *ret_profile) {
  struct us_profile *p = ret_profile;
  *p = (struct us_profile){.workers = workers};
  size_t count = us_trace_count(trace);
  if (!count) return;
  /* Passes follow each other, so all spans of one stand together. */
  struct pass_extent all = {.first = UINT64_MAX}, pass = {.first = UINT64_MAX};
  for (size_t i = 0; i < count; i++) {
    const struct us_span *span = us_trace_span(trace, i);
    struct us_profile_op *op = &p->ops[span->program][span->op];
    op->tasks++;
    op->busy += (double)(span->end - span->start) / SECOND;
    op->wait += (double)(span->start - span->claimed) / SECOND;
    op->bytes += (double)span->bytes;
    if (i == 0 || span->pass != pass.pass) {
      if (i > 0) p->in_passes += (double)(pass.last - pass.first) / SECOND;
      pass = (struct pass_extent){.pass = span->pass, .first = UINT64_MAX};
      p->passes++;
    }
    widen(&pass, span);
    widen(&all, span);
  }
  p->in_passes += (double)(pass.last - pass.first) / SECOND;
  p->span = (double)(all.last - all.first) / SECOND;
  for (int kind = 0; kind < US_PROGRAM_KINDS; kind++)
    for (int op = 0; op < US_TASK_OP_COUNT; op++) {
      p->busy += p->ops[kind][op].busy;
      p->wait += p->ops[kind][op].wait;
      p->bytes += p->ops[kind][op].bytes;
    }
  if (p->in_passes > 0 && workers > 0) p->idle_share = 1 - p->busy / (workers * p->in_passes);
}

static enum us_status written(FILE *file, struct us_err *err) {
  return ferror(file) ? us_err_errno(err, US_ERR_IO, "cannot write the trace") : US_OK;
}

enum us_status us_profile_write_tsv(const struct us_trace *trace, FILE *file, struct us_err *err) {
  fprintf(file, "pass\tprogram\top\tlayer\tworker\tclaimed_us\tstart_us\tend_us\tbytes\n");
  for (size_t i = 0; i < us_trace_count(trace); i++) {
    const struct us_span *s = us_trace_span(trace, i);
    fprintf(file, "%u\t%s\t%s\t%d\t%u\t%.3f\t%.3f\t%.3f\t%llu\n", s->pass, us_program_kind_name(s->program),
            us_task_op_name(s->op), s->layer == US_LAYER_NONE ? -1 : (int)s->layer, s->worker,
            (double)s->claimed / MICROSECOND, (double)s->start / MICROSECOND, (double)s->end / MICROSECOND,
            (unsigned long long)s->bytes);
  }
  return written(file, err);
}

/* One complete event ("X"). Names come from fixed tables: nothing needs escaping. */
static void write_event(FILE *file, const struct us_span *s, bool waiting) {
  uint64_t from = waiting ? s->claimed : s->start, to = waiting ? s->start : s->end;
  fprintf(file,
          ",\n{\"name\":\"%s%s\",\"cat\":\"%s\",\"ph\":\"X\",\"pid\":1,\"tid\":%u,\"ts\":%.3f,\"dur\":%.3f",
          waiting ? "wait " : "", us_task_op_name(s->op), us_program_kind_name(s->program),
          2u * s->worker + (waiting ? 1 : 0), (double)from / MICROSECOND, (double)(to - from) / MICROSECOND);
  fprintf(file, ",\"args\":{\"pass\":%u,\"layer\":%d,\"bytes\":%llu}}", s->pass,
          s->layer == US_LAYER_NONE ? -1 : (int)s->layer, (unsigned long long)(waiting ? 0 : s->bytes));
}

enum us_status us_profile_write_perfetto(const struct us_trace *trace, FILE *file, struct us_err *err) {
  unsigned workers = 0;
  for (size_t i = 0; i < us_trace_count(trace); i++)
    if (us_trace_span(trace, i)->worker + 1u > workers) workers = us_trace_span(trace, i)->worker + 1u;
  fprintf(file, "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n");
  fprintf(file, "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"ultraspeed\"}}");
  for (unsigned w = 0; w < 2 * workers; w++)
    fprintf(
        file,
        ",\n{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":%u,\"args\":{\"name\":\"worker %u%s\"}}",
        w, w / 2, w % 2 ? " waits" : "");
  for (size_t i = 0; i < us_trace_count(trace); i++) {
    const struct us_span *span = us_trace_span(trace, i);
    write_event(file, span, false);
    if (span->start > span->claimed) write_event(file, span, true);
  }
  fprintf(file, "\n]}\n");
  return written(file, err);
}
