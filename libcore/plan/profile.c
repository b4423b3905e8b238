/* profile.c: summaries and text forms of a trace. */
#include "plan/profile.h"

#include "kernels/engine/engine.h"

#include <stdbool.h>
#include <string.h>

#define SECOND      1e9
#define MICROSECOND 1e3

const char *us_program_kind_name(enum us_program_kind kind) {
  static const char *const names[US_PROGRAM_KINDS] = {"target", "draft", "context"};
  return kind >= 0 && kind < US_PROGRAM_KINDS ? names[kind] : "unknown";
}

const char *us_trace_role_name(int role) {
  static const char *const names[US_TRACE_ROLES] = {"worker", "compute", "stream", "epilogue"};
  return role >= 0 && role < US_TRACE_ROLES ? names[role] : "unknown";
}

const char *us_trace_wait_name(int wait) {
  static const char *const names[] = {
      [US_ENGINE_WAIT_NOTHING] = "nothing",  [US_ENGINE_WAIT_DONE] = "hand-off",
      [US_ENGINE_WAIT_STAGE] = "ring empty", [US_ENGINE_WAIT_FREE] = "ring full",
      [US_ENGINE_WAIT_SUMS] = "sums",        [US_ENGINE_WAIT_EXCHANGE] = "exchange",
      [US_ENGINE_WAIT_NORM] = "norm",        [US_ENGINE_WAIT_ROUTE] = "router",
      [US_ENGINE_WAIT_SELECT] = "select",    [US_ENGINE_WAIT_ROUND] = "round"};
  _Static_assert(sizeof names / sizeof *names == US_TRACE_WAITS, "a name for every wait");
  return wait >= 0 && wait < US_TRACE_WAITS ? names[wait] : "unknown";
}

const char *us_trace_op_name(int op) {
  return op == US_TASK_OP_COUNT ? "round" : us_task_op_name((enum us_task_op)op);
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
  fprintf(file, "pass\tprogram\top\tlayer\tworker\tclaimed_us\tstart_us\tend_us\tbytes\trole\twait\n");
  for (size_t i = 0; i < us_trace_count(trace); i++) {
    const struct us_span *s = us_trace_span(trace, i);
    fprintf(file, "%u\t%s\t%s\t%d\t%u\t%.3f\t%.3f\t%.3f\t%llu\t%s\t%s\n", s->pass,
            us_program_kind_name(s->program), us_trace_op_name(s->op),
            s->layer == US_LAYER_NONE ? -1 : (int)s->layer, s->worker, (double)s->claimed / MICROSECOND,
            (double)s->start / MICROSECOND, (double)s->end / MICROSECOND, (unsigned long long)s->bytes,
            us_trace_role_name(s->role), us_trace_wait_name(s->wait));
  }
  return written(file, err);
}

/* One complete event ("X"). Names come from fixed tables: nothing needs escaping. */
static void write_event(FILE *file, const struct us_span *s, const char *prefix, const char *name,
                        int process, unsigned track, uint64_t from, uint64_t to) {
  bool waiting = prefix[0];
  fprintf(file,
          ",\n{\"name\":\"%s%s\",\"cat\":\"%s\",\"ph\":\"X\",\"pid\":%d,\"tid\":%u,\"ts\":%.3f,\"dur\":%.3f",
          prefix, name, us_program_kind_name(s->program), process, track, (double)from / MICROSECOND,
          (double)(to - from) / MICROSECOND);
  fprintf(file, ",\"args\":{\"pass\":%u,\"layer\":%d,\"bytes\":%llu}}", s->pass,
          s->layer == US_LAYER_NONE ? -1 : (int)s->layer, (unsigned long long)(waiting ? 0 : s->bytes));
}

static void write_span(FILE *file, const struct us_span *s) {
  if (s->role) { /* an operation of the engine, or a wait that lies inside one */
    const char *name = s->wait ? us_trace_wait_name(s->wait) : us_trace_op_name(s->op);
    write_event(file, s, s->wait ? "wait " : "", name, 1 + s->worker / US_TRACE_BLOCKS,
                US_TRACE_ROLES * (s->worker % US_TRACE_BLOCKS) + s->role, s->start, s->end);
    return;
  }
  write_event(file, s, "", us_trace_op_name(s->op), 1, 2u * s->worker, s->start, s->end);
  if (s->start > s->claimed)
    write_event(file, s, "wait ", us_trace_op_name(s->op), 1, 2u * s->worker + 1, s->claimed, s->start);
}

static void write_track(FILE *file, int process, unsigned track, const char *name, unsigned number,
                        const char *what) {
  fprintf(file,
          ",\n{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":%d,\"tid\":%u,\"args\":{\"name\":\"%s %u%s\"}}",
          process, track, name, number, what);
}

/* Names of the tracks that a worker with spans has. */
static void write_names(FILE *file, unsigned worker, bool engine) {
  unsigned block = worker % US_TRACE_BLOCKS;
  int process = 1 + (int)(worker / US_TRACE_BLOCKS);
  if (!engine) {
    write_track(file, 1, 2 * worker, "worker", worker, "");
    write_track(file, 1, 2 * worker + 1, "worker", worker, " waits");
    return;
  }
  write_track(file, process, US_TRACE_ROLES * block + US_TRACE_COMPUTE, "SM", block, " compute");
  write_track(file, process, US_TRACE_ROLES * block + US_TRACE_STREAM, "SM", block, " stream");
  write_track(file, process, US_TRACE_ROLES * block + US_TRACE_EPILOGUE, "SM", block, " epilogue");
}

static void write_processes(FILE *file, unsigned gpus) {
  fprintf(file, "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"%s\"}}",
          gpus ? "GPU 0" : "ultraspeed");
  for (unsigned gpu = 1; gpu < gpus; gpu++)
    fprintf(file, ",\n{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":%u,\"args\":{\"name\":\"GPU %u\"}}",
            gpu + 1, gpu);
}

enum us_status us_profile_write_perfetto(const struct us_trace *trace, FILE *file, struct us_err *err) {
  bool seen[UINT16_MAX + 1] = {false}, engine = us_trace_count(trace) && us_trace_span(trace, 0)->role;
  unsigned workers = 0;
  for (size_t i = 0; i < us_trace_count(trace); i++) {
    unsigned worker = us_trace_span(trace, i)->worker;
    seen[worker] = true;
    if (worker + 1u > workers) workers = worker + 1u;
  }
  fprintf(file, "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n");
  write_processes(file, engine ? (workers + US_TRACE_BLOCKS - 1) / US_TRACE_BLOCKS : 0);
  for (unsigned w = 0; w < workers; w++)
    if (seen[w]) write_names(file, w, engine);
  for (size_t i = 0; i < us_trace_count(trace); i++) write_span(file, us_trace_span(trace, i));
  fprintf(file, "\n]}\n");
  return written(file, err);
}
