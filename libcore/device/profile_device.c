/* profile_device.c: recording rounds.
 *
 * Contents: buffers of spans; rounds; results; a run.
 */
#include "device/profile_device.h"

#include "device/bench.h"
#include "device/loop.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>

#define PLAIN_ROUNDS   32 /* timed without recording, before the recorded ones and after them, */
#define WARM_ROUNDS    48 /* after so many that bring the clocks up */
#define LEAST_CAPACITY 2048

struct recording {
  struct us_executor *ex;
  const struct us_device_profile_options *options;
  struct us_executor_cuda_parts parts;
  bool drafting;
  struct us_engine_profile profile[US_ENGINE_MAX_RANKS]; /* (gpus) on each GPU */
};

/* ---- buffers of spans ---------------------------------------------------------------------------------------------- */

static uint32_t lanes_of(const struct recording *r, uint32_t gpu) {
  return r->parts.devices->blocks[gpu] * US_ENGINE_ROLES;
}

static void free_spans(struct recording *r) {
  for (uint32_t gpu = 0; gpu < r->parts.devices->gpus; gpu++) {
    us_devices_use(r->parts.devices, gpu);
    (void)cudaFree(r->profile[gpu].spans), (void)cudaFree(r->profile[gpu].counts);
  }
}

/* As many spans a role as there is room for. */
static enum us_status alloc_spans(struct recording *r, uint32_t gpu, struct us_err *err) {
  struct us_engine_profile p = {
      .capacity = r->options->capacity, .first = WARM_ROUNDS, .kernel = us_engine_profiled};
  uint32_t lanes = lanes_of(r, gpu);
  us_devices_use(r->parts.devices, gpu);
  int code = (int)cudaMalloc((void **)&p.counts, lanes * sizeof *p.counts);
  enum us_status status = us_cuda_status(code, "counters of spans", err);
  if (status != US_OK) return status;
  while ((code = (int)cudaMalloc((void **)&p.spans, (size_t)lanes * p.capacity * sizeof *p.spans)) != 0 &&
         p.capacity / 2 >= LEAST_CAPACITY)
    p.capacity /= 2, p.spans = NULL;
  (void)cudaGetLastError();
  if (!code) code = (int)cudaMemset(p.counts, 0, lanes * sizeof *p.counts);
  if (!code) code = (int)cudaStreamSynchronize(NULL); /* the engine's streams do not wait for it */
  r->profile[gpu] = p;
  return us_cuda_status(code, "spans", err);
}

/* ---- rounds -------------------------------------------------------------------------------------------------------- */

struct heard {
  uint32_t wanted;
  uint32_t rounds, first;
  uint64_t since, until; /* end of round `first`, of the last */
  uint32_t last;
};

static bool hear(void *arg, const struct us_rounds_report *report) {
  struct heard *h = arg;
  uint32_t round = report->round;
  if (round <= h->first) h->since = report->time;
  if (round < h->wanted) h->until = report->time, h->last = round;
  return round + 1 < h->wanted;
}

/* WARM_ROUNDS and so many more of a loop of their own; the mean time of those. */
static enum us_status run_rounds(struct recording *r, bool recorded, uint32_t timed,
                                 struct us_device_profile_result *result, double *ret_seconds,
                                 struct us_err *err) {
  uint32_t wanted = WARM_ROUNDS + timed;
  const struct us_device_profile_options *o = r->options;
  static const int32_t any = 0;
  struct us_device_loop_options options = {.batch = o->batch, .block = o->block, .drafting = r->drafting};
  struct us_device_loop *loop = NULL;
  struct us_bench_place place;
  struct heard heard = {.wanted = wanted, .first = WARM_ROUNDS - 1};
  uint32_t positions = o->context + (wanted + 4) * o->block + US_MAX_BLOCK;
  enum us_status status =
      us_bench_place(r->ex, o->batch, o->context, positions, r->drafting, o->seed, &place, err);
  if (status != US_OK) return status;
  for (uint32_t i = 0; i < o->batch; i++) {
    struct us_rounds_sequence *s = &place.sequence[i];
    s->limit = positions - US_MAX_BLOCK, s->drafts = o->block - 1;
    if (!r->drafting && o->block > 1) s->replay = &any, s->replay_count = 1, s->replay_first = o->context + 1;
  }
  struct us_rounds rounds = {.sequences = place.sequence,
                             .n = o->batch,
                             .batch = o->batch,
                             .block = o->block,
                             .drafting = r->drafting,
                             .on_round = hear,
                             .interrupted = o->interrupted,
                             .arg = &heard};
  status = us_device_loop_create(&r->parts, &options, &loop, err);
  for (uint32_t gpu = 0; status == US_OK && recorded && gpu < r->parts.devices->gpus; gpu++)
    us_device_loop_group(loop)->profile[gpu] = r->profile[gpu];
  if (status == US_OK) status = us_device_loop_run(loop, &rounds, err);
  if (status == US_OK && heard.last <= heard.first)
    status = us_err_set(err, US_ERR_CHECK, "the rounds ended after %u", heard.last + 1);
  if (status == US_OK) {
    *ret_seconds = 1e-9 * (double)(heard.until - heard.since) / (heard.last - heard.first);
    result->experts = rounds.expert_layers ? (double)rounds.experts / (double)rounds.expert_layers : 0;
  }
  us_device_loop_free(loop);
  us_bench_unplace(&place);
  return status;
}

/* ---- results ------------------------------------------------------------------------------------------------------- */

/* A GPU's spans into host memory, as many of each role as any has; the caller frees both arrays. */
static enum us_status fetch(const struct recording *r, uint32_t gpu, struct us_engine_span **ret_spans,
                            uint32_t **ret_counts, uint32_t *ret_capacity, struct us_err *err) {
  const struct us_engine_profile *p = &r->profile[gpu];
  uint32_t lanes = lanes_of(r, gpu), most = 1;
  uint32_t *counts = *ret_counts = calloc(lanes, sizeof *counts);
  if (!counts) return us_err_memory(err, "spans", lanes * sizeof *counts);
  us_devices_use(r->parts.devices, gpu);
  int code = (int)cudaMemcpy(counts, p->counts, lanes * sizeof *counts, cudaMemcpyDeviceToHost);
  for (uint32_t i = 0; i < lanes; i++)
    if (counts[i] > most) most = counts[i];
  if (most > p->capacity) most = p->capacity;
  size_t row = most * sizeof **ret_spans;
  *ret_spans = malloc(lanes * row);
  if (!*ret_spans) return us_err_memory(err, "spans", lanes * row);
  if (!code)
    code = (int)cudaMemcpy2D(*ret_spans, row, p->spans, p->capacity * sizeof **ret_spans, row, lanes,
                             cudaMemcpyDeviceToHost);
  *ret_capacity = most;
  return us_cuda_status(code, "spans", err);
}

static enum us_status take_gpu(const struct recording *r, const struct us_device_schedule *schedule,
                               uint32_t gpu, struct us_device_profile_result *result, struct us_trace *trace,
                               struct us_err *err) {
  struct us_engine_span *spans = NULL;
  uint32_t *counts = NULL;
  const struct us_devices *devices = r->parts.devices;
  struct us_breakdown_spans s = {.ops = schedule->ops,
                                 .op_count = schedule->op_count,
                                 .blocks = devices->blocks[gpu],
                                 .ranks = devices->ranks / devices->gpus};
  enum us_status status = fetch(r, gpu, &spans, &counts, &s.capacity, err);
  s.spans = spans, s.counts = counts;
  if (status == US_OK) status = us_breakdown_gpu(&result->breakdown, &s, err);
  if (status == US_OK && r->options->path) status = us_critical_path_gpu(&result->path, &s, err);
  /* GPUs have clocks of their own: each one's first span is its 0. */
  if (status == US_OK)
    us_breakdown_trace(&s, gpu, r->options->keep, us_breakdown_origin(&s), result->experts, trace);
  free(spans), free(counts);
  return status;
}

/* The list that the loop ran: made once more, since the loop is gone. */
static enum us_status take_all(const struct recording *r, struct us_device_profile_result *result,
                               struct us_trace *trace, struct us_err *err) {
  struct us_device_loop_options options = {
      .batch = r->options->batch, .block = r->options->block, .drafting = r->drafting};
  struct us_device_loop *loop = NULL;
  enum us_status status = us_device_loop_create(&r->parts, &options, &loop, err);
  if (status != US_OK) return status;
  const struct us_device_schedule *schedule = us_device_loop_group(loop)->schedule[0];
  static const enum us_engine_program programs[US_PROGRAM_KINDS] = {
      [US_PROGRAM_TARGET] = US_ENGINE_PASS_TARGET,
      [US_PROGRAM_DRAFT] = US_ENGINE_PASS_DRAFT,
      [US_PROGRAM_CONTEXT] = US_ENGINE_PASS_CONTEXT};
  for (uint32_t gpu = 0; status == US_OK && gpu < r->parts.devices->gpus; gpu++)
    status = take_gpu(r, schedule, gpu, result, trace, err);
  for (int program = 0; program < US_PROGRAM_KINDS; program++)
    us_device_traffic(schedule->ops, schedule->begin[programs[program]], schedule->end[programs[program]],
                      &result->traffic[program]);
  us_device_loop_free(loop);
  us_breakdown_finish(&result->breakdown);
  us_critical_path_finish(&result->path);
  return status;
}

/* ---- a run --------------------------------------------------------------------------------------------------------- */

enum us_status us_device_profile_run(struct us_executor *ex, const struct us_device_profile_options *options,
                                     struct us_device_profile_result *ret_result, struct us_trace *trace,
                                     struct us_err *err) {
  struct recording r = {.ex = ex, .options = options, .drafting = ex->draft && options->block > 1};
  struct us_device_profile_result *result = ret_result;
  *result = (struct us_device_profile_result){.breakdown = {.skip = 0}};
  enum us_status status = us_bench_check(ex, options->batch, options->block, true, err);
  if (status != US_OK) return status;
  if (!us_executor_cuda_parts(ex, &r.parts))
    return us_err_set(err, US_ERR_USAGE, "%s is not an executor on GPUs", ex->name);
  result->gpus = r.parts.devices->gpus, result->ranks = r.parts.devices->ranks;
  result->blocks = r.parts.devices->blocks[0];
  for (uint32_t gpu = 0; status == US_OK && gpu < r.parts.devices->gpus; gpu++)
    status = alloc_spans(&r, gpu, err);
  double before = 0, after = 0;
  if (status == US_OK) status = run_rounds(&r, false, PLAIN_ROUNDS, result, &before, err);
  if (status == US_OK) status = run_rounds(&r, true, options->rounds, result, &result->recorded_round, err);
  if (status == US_OK) status = run_rounds(&r, false, PLAIN_ROUNDS, result, &after, err);
  result->plain_round = (before + after) / 2;
  if (status == US_OK) status = take_all(&r, result, trace, err);
  free_spans(&r);
  return status;
}
