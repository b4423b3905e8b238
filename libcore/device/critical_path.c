/* critical_path.c: backwards from the end of the last round, from cause to cause.
 *
 * Contents: stays of blocks in operations; who was last; causes of waits; the walk; a GPU.
 */
#include "device/critical_path.h"

#include "device/spans.h"

#include <stdlib.h>

#define SECOND 1e9

/* ---- stays of blocks in operations --------------------------------------------------------------------------------- */

/* A block's stay in an operation of a round. Times are the GPU's, ns; an operation that was not recorded has none. */
struct stay {
  uint64_t begin, computed, done; /* computed: the compute role's end; done: the epilogue's too */
  uint32_t first, last;           /* of the compute role's spans; `last` is the operation itself */
};

struct walk {
  const struct us_breakdown_spans *spans;
  uint32_t rounds;   /* whole ones */
  struct stay *stay; /* (blocks, rounds, op_count) */
};

static struct stay *stay_at(const struct walk *w, uint32_t block, uint64_t n) {
  return w->stay + block * ((uint64_t)w->rounds * w->spans->op_count) + n;
}
static const struct us_engine_op *op_at(const struct walk *w, uint64_t n) {
  return &w->spans->ops[n % w->spans->op_count];
}

static bool is_product(const struct us_engine_op *op) {
  return op->kind == US_ENGINE_GEMM || op->kind == US_ENGINE_DOWN;
}

static void note_lane(struct walk *w, uint32_t block, uint32_t role) {
  uint32_t count, round = 0, first = 0;
  const struct us_engine_span *span = us_spans_of(w->spans, block, role, &count);
  for (uint32_t i = 0; i < count; i++) {
    round += i && us_spans_wrap(&span[i - 1], &span[i]);
    if (round >= w->rounds) return;
    if (span[i].what != US_ENGINE_WAIT_NOTHING || span[i].op >= w->spans->op_count) continue;
    struct stay *stay = stay_at(w, block, (uint64_t)round * w->spans->op_count + span[i].op);
    uint64_t end = span[i].begin + span[i].ns;
    if (role == US_SPANS_COMPUTE)
      *stay = (struct stay){.begin = span[i].begin, .computed = end, .done = end, .first = first, .last = i};
    else if (stay->done && end > stay->done && is_product(&w->spans->ops[span[i].op]))
      stay->done = end;
    first = i + 1;
  }
}

/* ---- who was last -------------------------------------------------------------------------------------------------- */

/* A time in a block's stay in operation n of the rounds' list. */
struct place {
  uint32_t block;
  uint64_t n, time;
};

/* Blocks of the rank that `block` belongs to. */
static void rank_of(const struct walk *w, uint32_t block, uint32_t *ret_begin, uint32_t *ret_end) {
  uint32_t each = w->spans->blocks / w->spans->ranks;
  *ret_begin = block / each * each, *ret_end = *ret_begin + each;
}

static uint64_t done_of(const struct walk *w, uint32_t block, uint64_t n) {
  return stay_at(w, block, n)->done;
}
static uint64_t begin_of(const struct walk *w, uint32_t block, uint64_t n) {
  return stay_at(w, block, n)->begin;
}
/* When a block had all partial sums: behind it, it publishes its part of the norm. */
static uint64_t summed_of(const struct walk *w, uint32_t block, uint64_t n) {
  const struct stay *stay = stay_at(w, block, n);
  uint32_t count;
  const struct us_engine_span *span = us_spans_of(w->spans, block, US_SPANS_COMPUTE, &count);
  for (uint32_t i = stay->first; i < stay->last; i++)
    if (span[i].what == US_ENGINE_WAIT_EXCHANGE) return span[i].begin + span[i].ns;
  return stay->begin;
}

/* The block of [begin, end) for which `time_of` is latest. */
static struct place latest(const struct walk *w, uint32_t begin, uint32_t end, uint64_t n,
                           uint64_t (*time_of)(const struct walk *, uint32_t, uint64_t)) {
  struct place last = {.block = begin, .n = n, .time = 0};
  for (uint32_t block = begin; block < end; block++) {
    uint64_t time = time_of(w, block, n);
    if (time > last.time) last.block = block, last.time = time;
  }
  return last;
}

/* ---- causes of waits ----------------------------------------------------------------------------------------------- */

/* The operation that a hand-off in operation n waits for; false: none of the recorded rounds. */
static bool read_by(const struct walk *w, uint64_t n, uint64_t *ret_n) {
  uint32_t op = (uint32_t)(n % w->spans->op_count), read = w->spans->ops[op].wait;
  if (read == US_ENGINE_NONE || read >= w->spans->op_count) return false;
  uint64_t back = read < op ? op - read : op + w->spans->op_count - read;
  *ret_n = n - back;
  return back <= n;
}

/* The product whose partial sums operation n adds. */
static bool summed_by(const struct walk *w, uint64_t n, uint64_t *ret_n) {
  for (uint64_t back = 1; back <= n % w->spans->op_count; back++)
    if (is_product(op_at(w, n - back))) {
      *ret_n = n - back;
      return true;
    }
  return false;
}

/* Who was waited for in the stay at `at`, if it was another block; time 0: nobody that is known. */
static struct place cause_of(const struct walk *w, const struct place *at, uint32_t what) {
  uint32_t begin, end;
  uint64_t n;
  rank_of(w, at->block, &begin, &end);
  switch (what) {
  case US_ENGINE_WAIT_DONE:
    if (read_by(w, at->n, &n)) return latest(w, begin, end, n, done_of);
    break;
  case US_ENGINE_WAIT_EXCHANGE:
    if (summed_by(w, at->n, &n)) return latest(w, 0, w->spans->blocks, n, done_of);
    break;
  case US_ENGINE_WAIT_NORM:
    return latest(w, begin, end, at->n, summed_of);
  case US_ENGINE_WAIT_SELECT:
    return latest(w, 0, w->spans->blocks, at->n, begin_of);
  default:
    break;
  }
  return (struct place){.time = 0};
}

/* ---- the walk ------------------------------------------------------------------------------------------------------ */

static struct us_critical_op *sum_of(struct us_critical_path *path, const struct us_engine_op *op) {
  return &path->ops[us_spans_program(op)][us_spans_task(op)];
}

/* To the end of an operation in a block that was last: behind its multiplies only sums are stored. */
static struct place enter(const struct walk *w, struct us_critical_path *path, struct place at) {
  const struct stay *stay = stay_at(w, at.block, at.n);
  if (at.time > stay->computed) {
    sum_of(path, op_at(w, at.n))->epilogue += (double)(at.time - stay->computed) / SECOND;
    at.time = stay->computed;
  }
  return at;
}

/* The operation that the block did before: it ended when this one began, but for what a new round waits for. False: there is none
 * from operation `first` on. */
static bool step_back(const struct walk *w, struct us_critical_path *path, uint64_t first, struct place *at) {
  do
    if (at->n-- <= first) return false;
  while (!done_of(w, at->block, at->n));
  const struct stay *stay = stay_at(w, at->block, at->n);
  if (at->time <= stay->computed) return true;
  sum_of(path, op_at(w, at->n))->wait[US_ENGINE_WAIT_ROUND] += (double)(at->time - stay->computed) / SECOND;
  at->time = stay->computed;
  return true;
}

/* Back in one stay, to its beginning (false), or to where another block was waited for (true). */
static bool follow(const struct walk *w, struct us_critical_path *path, struct place *at) {
  const struct stay *stay = stay_at(w, at->block, at->n);
  struct us_critical_op *sum = sum_of(path, op_at(w, at->n));
  uint32_t count;
  const struct us_engine_span *span = us_spans_of(w->spans, at->block, US_SPANS_COMPUTE, &count);
  for (uint32_t i = stay->last; i-- > stay->first;) {
    uint64_t begin = span[i].begin, end = begin + span[i].ns;
    if (begin < stay->begin || begin >= at->time || span[i].what >= US_TRACE_WAITS) continue;
    if (end > at->time) end = at->time;
    sum->work += (double)(at->time - end) / SECOND;
    struct place cause = cause_of(w, at, span[i].what);
    if (cause.time > end) cause.time = end; /* it told before it wrote its own span down */
    bool others = cause.time > begin;
    at->time = others ? cause.time : begin;
    sum->wait[span[i].what] += (double)(end - at->time) / SECOND;
    if (!others) continue;
    *at = cause;
    return true;
  }
  if (at->time > stay->begin) sum->work += (double)(at->time - stay->begin) / SECOND, at->time = stay->begin;
  return false;
}

static void walk_back(const struct walk *w, struct us_critical_path *path) {
  uint64_t first = (uint64_t)path->skip * w->spans->op_count;
  uint64_t n = (uint64_t)w->rounds * w->spans->op_count - 1;
  while (n > first && !done_of(w, 0, n)) n--; /* a launch may leave the list's end out */
  struct place at = latest(w, 0, w->spans->blocks, n, done_of);
  uint64_t until = at.time;
  bool more = true;
  for (bool jumped = true; more && at.n >= first;) {
    if (jumped) at = enter(w, path, at);
    n = at.n;
    jumped = follow(w, path, &at);
    if (!jumped) more = step_back(w, path, first, &at);
    sum_of(path, op_at(w, n))->visits += !more || at.n != n;
  }
  path->round += (double)(until - at.time) / SECOND;
  path->rounds += w->rounds - path->skip;
}

/* ---- a GPU --------------------------------------------------------------------------------------------------------- */

enum us_status us_critical_path_gpu(struct us_critical_path *path, const struct us_breakdown_spans *spans,
                                    struct us_err *err) {
  static const uint32_t roles[] = {US_SPANS_COMPUTE, US_SPANS_EPILOGUE};
  struct walk w = {.spans = spans};
  enum us_status status = us_spans_whole(spans, roles, path->skip, &w.rounds, err);
  if (status != US_OK) return status;
  size_t stays = (size_t)spans->blocks * w.rounds * spans->op_count;
  w.stay = calloc(stays, sizeof *w.stay);
  if (!w.stay) return us_err_memory(err, "spans of operations", stays * sizeof *w.stay);
  for (uint32_t block = 0; block < spans->blocks; block++)
    for (int i = 0; i < 2; i++) note_lane(&w, block, roles[i]);
  walk_back(&w, path);
  free(w.stay);
  return US_OK;
}

void us_critical_path_finish(struct us_critical_path *path) {
  double n = path->rounds ? (double)path->rounds : 1;
  path->round /= n;
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    for (int task = 0; task <= US_TASK_OP_COUNT; task++) {
      struct us_critical_op *op = &path->ops[program][task];
      op->visits /= n, op->work /= n, op->epilogue /= n;
      for (int wait = 0; wait < US_TRACE_WAITS; wait++) op->wait[wait] /= n;
    }
}
