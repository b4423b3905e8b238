/* breakdown.c: spans of blocks to seconds of operations. */
#include "device/breakdown.h"

#include "device/spans.h"
#include "device/traffic.h"

#define SECOND 1e9

/* Where a lane's operation stands: when its input was there, and whether it has waited for the ring since. */
struct stand {
  uint64_t input;
  bool waited;
};

/* Whether a wait for the ring is the operation's ramp. */
static bool is_ramp(struct stand *at, const struct us_engine_span *span) {
  uint64_t end = span->begin + span->ns;
  bool ramp =
      span->what == US_ENGINE_WAIT_STAGE && !at->waited && span->begin < at->input + US_BREAKDOWN_RAMP;
  if (span->what == US_ENGINE_WAIT_STAGE) at->waited = true;
  if (span->what == US_ENGINE_WAIT_DONE) at->input = end;
  if (span->what == US_ENGINE_WAIT_NOTHING) *at = (struct stand){.input = end};
  return ramp;
}

/* One lane's rounds [b->skip, rounds). */
static void add_lane(struct us_breakdown *b, const struct us_breakdown_spans *s, uint32_t block,
                     uint32_t role, uint32_t rounds) {
  uint32_t count, round = 0;
  const struct us_engine_span *span = us_spans_of(s, block, role, &count);
  uint64_t begin = 0, end = 0;
  struct stand at = {.input = count ? span->begin : 0};
  for (uint32_t i = 0; i < count; i++) {
    round += i && us_spans_wrap(&span[i - 1], &span[i]);
    if (round >= rounds) break;
    if (round < b->skip || span[i].op >= s->op_count) continue;
    const struct us_engine_op *op = &s->ops[span[i].op];
    struct us_breakdown_op *sum = &b->ops[us_spans_program(op)][us_spans_task(op)];
    double seconds = span[i].ns / SECOND;
    if (!begin) begin = span[i].begin;
    end = span[i].begin + span[i].ns;
    if (role == US_SPANS_STREAM) {
      if (span[i].what == US_ENGINE_WAIT_FREE) sum->ring_full += seconds;
      continue;
    }
    sum->weights |= op->bytes != 0;
    if (is_ramp(&at, &span[i])) sum->ramp += seconds;
    if (span[i].what == US_ENGINE_WAIT_NOTHING)
      sum->time += seconds;
    else if (span[i].what < US_TRACE_WAITS)
      sum->wait[span[i].what] += seconds;
    if (span[i].what == US_ENGINE_WAIT_ROUND) sum->time += seconds; /* it lies behind the last operation */
  }
  if (role == US_SPANS_COMPUTE) b->round += (double)(end - begin) / SECOND, b->rounds += rounds - b->skip;
}

enum us_status us_breakdown_gpu(struct us_breakdown *b, const struct us_breakdown_spans *spans,
                                struct us_err *err) {
  static const uint32_t roles[] = {US_SPANS_COMPUTE, US_SPANS_STREAM};
  uint32_t rounds;
  enum us_status status = us_spans_whole(spans, roles, b->skip, &rounds, err);
  for (uint32_t block = 0; block < spans->blocks; block++)
    for (int i = 0; i < 2; i++) {
      uint32_t seen = spans->counts[block * US_ENGINE_ROLES + roles[i]];
      if (seen > spans->capacity) b->dropped += seen - spans->capacity;
      if (status == US_OK) add_lane(b, spans, block, roles[i], rounds);
    }
  return status;
}

void us_breakdown_finish(struct us_breakdown *b) {
  double n = b->rounds ? (double)b->rounds : 1;
  b->round /= n;
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    for (int task = 0; task <= US_TASK_OP_COUNT; task++) {
      struct us_breakdown_op *op = &b->ops[program][task];
      double work = op->time /= n;
      op->ring_full /= n, op->ramp /= n;
      for (int wait = 0; wait < US_TRACE_WAITS; wait++) {
        op->wait[wait] /= n;
        work -= op->wait[wait];
        if (!op->weights || wait != US_ENGINE_WAIT_STAGE) b->wait[wait] += op->wait[wait];
      }
      if (op->weights)
        b->streaming += work + op->wait[US_ENGINE_WAIT_STAGE];
      else
        b->vectors += work;
    }
}

/* ---- as a trace ---------------------------------------------------------------------------------------------------- */

uint64_t us_breakdown_origin(const struct us_breakdown_spans *spans) {
  uint64_t origin = UINT64_MAX;
  for (uint32_t block = 0; block < spans->blocks; block++)
    for (uint32_t role = 0; role < US_ENGINE_ROLES; role++) {
      uint32_t count;
      const struct us_engine_span *span = us_spans_of(spans, block, role, &count);
      if (count && span->begin < origin) origin = span->begin;
    }
  return origin;
}

static void trace_lane(const struct us_breakdown_spans *s, uint32_t gpu, uint32_t block, uint32_t role,
                       uint64_t origin, double experts, struct us_trace *trace) {
  uint32_t count, round = 0;
  const struct us_engine_span *span = us_spans_of(s, block, role, &count);
  for (uint32_t i = 0; i < count; i++) {
    round += i && us_spans_wrap(&span[i - 1], &span[i]);
    if (span[i].op >= s->op_count || span[i].begin < origin) continue;
    const struct us_engine_op *op = &s->ops[span[i].op];
    bool streams = role == US_SPANS_STREAM && span[i].what == US_ENGINE_WAIT_NOTHING;
    double bytes = (double)op->bytes * (us_device_op_of_experts(op) ? experts : 1) / s->blocks;
    us_trace_add(trace, &(struct us_span){.claimed = span[i].begin - origin,
                                          .start = span[i].begin - origin,
                                          .end = span[i].begin + span[i].ns - origin,
                                          .bytes = streams ? (uint64_t)bytes : 0,
                                          .layer = op->layer,
                                          .pass = round * US_ENGINE_PASSES + op->program,
                                          .op = (uint16_t)us_spans_task(op),
                                          .worker = (uint16_t)(gpu * US_TRACE_BLOCKS + block),
                                          .program = (uint8_t)us_spans_program(op),
                                          .role = (uint8_t)(US_TRACE_COMPUTE + role),
                                          .wait = (uint8_t)span[i].what});
  }
}

void us_breakdown_trace(const struct us_breakdown_spans *spans, uint32_t gpu, uint32_t keep, uint64_t origin,
                        double experts, struct us_trace *trace) {
  uint32_t blocks = keep && keep < spans->blocks ? keep : spans->blocks;
  for (uint32_t i = 0; i < blocks; i++)
    for (uint32_t role = 0; role < US_ENGINE_ROLES; role++)
      trace_lane(spans, gpu, (uint32_t)((uint64_t)i * spans->blocks / blocks), role, origin, experts, trace);
}
