/* bench.c: timed rounds of sequences without prompts.
 *
 * Contents: the GPUs; placing sequences; what rounds report; recording; figures; a run.
 */
#include "device/bench.h"

#include "base/philox.h"
#include "device/ceiling.h"
#include "device/loop.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the GPUs ----------------------------------------------------------------------------------------------------- */

static enum us_status need_parts(const struct us_executor *ex, struct us_executor_cuda_parts *parts,
                                 struct us_err *err) {
  if (us_executor_cuda_parts(ex, parts)) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%s is not an executor on GPUs", ex->name);
}

/* The largest matrix of a rank: on GPUs that weights fill there is nothing else to read. */
static const struct us_engine_matrix *largest(const struct us_device_weights *w, size_t *ret_bytes) {
  const struct us_device_matrix *best = &w->head;
  size_t most = w->head.bytes;
  for (uint32_t l = 0; l < w->shape.layers; l++) {
    uint64_t bytes = w->layers[l].up.bytes * (w->shape.moe_layer[l] ? w->shape.experts : 1);
    if (bytes > most) best = &w->layers[l].up, most = bytes;
  }
  *ret_bytes = most;
  return &best->pages;
}

#define CEILING_LEAST ((size_t)1 << 30) /* 20 times the L2 */

static enum us_status ceiling_of(const struct us_executor_cuda_parts *parts, uint32_t gpu, double *ret_rate,
                                 struct us_err *err) {
  uint32_t each = parts->devices->ranks / parts->devices->gpus;
  size_t bytes;
  const void *data = largest(parts->weights[gpu * each], &bytes)->pages;
  void *own = NULL;
  us_devices_use(parts->devices, gpu);
  if (bytes < CEILING_LEAST && cudaMalloc(&own, CEILING_LEAST) == cudaSuccess)
    data = own, bytes = CEILING_LEAST;
  (void)cudaGetLastError(); /* without that much memory the largest matrix is read, whatever its size */
  enum us_status status = us_device_ceiling(data, bytes, parts->devices->stream[gpu], ret_rate, err);
  (void)cudaFree(own);
  return status;
}

static void add_bytes(struct us_device_bytes *sum, const struct us_device_bytes *b) {
  sum->experts += b->experts, sum->attention += b->attention, sum->dense += b->dense;
  sum->router += b->router, sum->head += b->head, sum->embed += b->embed;
  sum->draft += b->draft, sum->draft_head += b->draft_head, sum->vectors += b->vectors;
}

static uint64_t free_page_bytes(const struct us_kv_pool *pool) {
  uint64_t bytes = 0;
  for (uint32_t kind = 0; pool && kind < 2; kind++)
    bytes += us_kv_pool_left(pool, kind) * us_kv_pool_memory(pool)->page_bytes[kind];
  return bytes;
}

enum us_status us_bench_device(const struct us_executor *ex, struct us_bench_device *ret_device,
                               struct us_err *err) {
  struct us_executor_cuda_parts parts;
  enum us_status status = need_parts(ex, &parts, err);
  if (status != US_OK) return status;
  struct us_bench_device d = {.gpus = parts.devices->gpus, .ranks = parts.devices->ranks, .engine = ex->name};
  snprintf(d.name, sizeof d.name, "%s", parts.devices->name[0]);
  for (uint32_t r = 0; r < d.ranks / d.gpus; r++) add_bytes(&d.bytes, &parts.weights[r]->bytes);
  d.cache_bytes = (free_page_bytes(parts.pool) + free_page_bytes(parts.draft_pool)) / d.gpus;
  for (uint32_t gpu = 0; status == US_OK && gpu < d.gpus; gpu++) {
    uint64_t left, total;
    double rate;
    status = us_devices_memory(parts.devices, gpu, &left, &total, err);
    if (status == US_OK && total - left > d.used_bytes) d.used_bytes = total - left, d.total_bytes = total;
    if (status == US_OK) status = ceiling_of(&parts, gpu, &rate, err);
    if (status == US_OK) d.ceiling += rate;
  }
  *ret_device = d;
  return status;
}

/* ---- placing sequences -------------------------------------------------------------------------------------------- */

static enum us_status place_cache(const struct us_kv_memory *memory, struct us_kv_spec spec, uint32_t context,
                                  uint32_t positions, struct us_kv **ret_kv, struct us_err *err) {
  enum us_status status = us_kv_create_in(memory, &spec, positions, US_KV_BF16, ret_kv, err);
  if (status == US_OK && context) status = us_kv_reserve(*ret_kv, 0, context, err);
  return status;
}

enum us_status us_bench_place(struct us_executor *ex, uint32_t batch, uint32_t context, uint32_t positions,
                              bool drafting, uint64_t seed, struct us_bench_place *ret_place,
                              struct us_err *err) {
  struct us_bench_place *p = ret_place;
  const struct us_shape *shape = &ex->model->shape;
  enum us_status status = US_OK;
  *p = (struct us_bench_place){.batch = batch};
  for (uint32_t i = 0; status == US_OK && i < batch; i++) {
    uint32_t words[4];
    us_philox_quad(us_philox_key(seed), i, 0, 0, US_STREAM_INIT, words);
    p->sequence[i] = (struct us_rounds_sequence){
        .anchor = (int32_t)us_uniform_index(words[0], shape->vocab), .position = context, .seed = seed + i};
    status = place_cache(ex->kv_memory, us_kv_spec_of(shape), context, positions, &p->kv[i], err);
    p->sequence[i].kv = p->kv[i];
    if (status != US_OK || !drafting) continue;
    struct us_kv_spec spec = us_kv_spec_of_draft(&ex->draft->shape);
    status = place_cache(ex->draft_kv_memory, spec, context, positions, &p->draft_kv[i], err);
    p->sequence[i].draft_kv = p->draft_kv[i];
  }
  if (status != US_OK) us_bench_unplace(p);
  return status;
}

void us_bench_unplace(struct us_bench_place *place) {
  for (uint32_t i = 0; i < place->batch; i++) us_kv_free(place->kv[i]), us_kv_free(place->draft_kv[i]);
  place->batch = 0;
}

/* ---- what rounds report -------------------------------------------------------------------------------------------- */

/* One round of one sequence. */
struct step {
  uint64_t time;
  uint32_t round, count;
};

struct listening {
  struct step *steps; /* (capacity) */
  size_t n, capacity;
  uint32_t first, rounds;               /* the first round's number; rounds that are wanted */
  int32_t *tokens[US_ENGINE_SEQUENCES]; /* (token_capacity) recorded; NULL: not wanted */
  size_t token_count[US_ENGINE_SEQUENCES], token_capacity;
  bool broken;
};

static bool listen(void *arg, const struct us_rounds_report *report) {
  struct listening *l = arg;
  l->broken |= report->broken;
  if (!l->first) l->first = report->round + 1; /* 0: none yet */
  uint32_t round = report->round + 1 - l->first;
  if (round >= l->rounds) return false;
  if (l->n < l->capacity)
    l->steps[l->n++] = (struct step){.time = report->time, .round = round, .count = report->count};
  int32_t *tokens = l->tokens[report->sequence];
  size_t *have = &l->token_count[report->sequence];
  for (uint32_t i = 0; tokens && i < report->count && *have < l->token_capacity; i++)
    tokens[(*have)++] = report->tokens[i];
  return true;
}

static enum us_status run_rounds(struct us_device_loop *loop, struct us_bench_place *place, bool drafting,
                                 const struct us_bench_options *o, struct listening *l,
                                 struct us_rounds *rounds, struct us_err *err) {
  *rounds = (struct us_rounds){.sequences = place->sequence,
                               .n = place->batch,
                               .batch = o->batch,
                               .block = o->block,
                               .drafting = drafting,
                               .on_round = listen,
                               .interrupted = o->interrupted,
                               .arg = l};
  enum us_status status = us_device_loop_run(loop, rounds, err);
  if (status == US_OK && l->broken)
    return us_err_set(err, US_ERR_CHECK, "the logits of a round are not finite");
  return status;
}

/* ---- recording ------------------------------------------------------------------------------------------------------ */

/* The target's own tokens of every sequence, one a round. */
static enum us_status record(struct us_executor *ex, const struct us_executor_cuda_parts *parts,
                             const struct us_bench_options *o, struct listening *l, struct us_err *err) {
  struct us_bench_options plain = *o;
  plain.block = 1;
  struct us_device_loop_options options = {.batch = o->batch, .block = 1};
  struct us_bench_place place;
  struct us_device_loop *loop = NULL;
  struct us_rounds rounds;
  enum us_status status =
      us_bench_place(ex, o->batch, o->context, us_bench_positions(o), false, o->seed, &place, err);
  if (status != US_OK) return status;
  for (uint32_t i = 0; i < o->batch; i++) place.sequence[i].limit = o->context + (uint32_t)l->token_capacity;
  l->rounds = UINT32_MAX;
  status = us_device_loop_create(parts, &options, &loop, err);
  if (status == US_OK) status = run_rounds(loop, &place, false, &plain, l, &rounds, err);
  us_device_loop_free(loop);
  us_bench_unplace(&place);
  return status;
}

/* ---- figures -------------------------------------------------------------------------------------------------------- */

/* When each round was over: rank 0 reports its sequences one by one, the last one counts. */
static enum us_status summarise(const struct listening *l, uint32_t warmup, struct us_bench_result *r,
                                struct us_err *err) {
  uint32_t rounds = 0;
  for (size_t i = 0; i < l->n; i++)
    if (l->steps[i].round + 1 > rounds) rounds = l->steps[i].round + 1;
  if (rounds < warmup + 2)
    return us_err_set(err, US_ERR_CHECK, "only %u rounds ran; %u are for warming up", rounds, warmup);
  uint64_t *over = calloc(rounds, sizeof *over);
  struct us_bench_sample *of_round = calloc(rounds, sizeof *of_round),
                         *of_token = calloc(l->n, sizeof *of_token);
  if (over && of_round && of_token) {
    uint32_t first = warmup ? warmup : 1; /* a round's time is from the one before it */
    size_t n = 0;
    for (size_t i = 0; i < l->n; i++)
      if (l->steps[i].time > over[l->steps[i].round]) over[l->steps[i].round] = l->steps[i].time;
    for (uint32_t i = first; i < rounds; i++)
      of_round[i - first] = (struct us_bench_sample){1e-9 * (double)(over[i] - over[i - 1]), 1};
    for (size_t i = 0; i < l->n; i++) {
      const struct step *s = &l->steps[i];
      if (s->round < first) continue;
      r->tokens += s->count, r->steps++;
      double seconds = of_round[s->round - first].value;
      if (s->count) of_token[n++] = (struct us_bench_sample){seconds / s->count, s->count};
    }
    r->rounds = rounds - first;
    r->seconds = 1e-9 * (double)(over[rounds - 1] - over[first - 1]);
    r->token = us_bench_spread_of(of_token, n);
    r->round = us_bench_spread_of(of_round, r->rounds);
  }
  bool failed = !over || !of_round || !of_token;
  free(over), free(of_round), free(of_token);
  return failed ? us_err_memory(err, "the times of rounds", l->n * sizeof *of_token) : US_OK;
}

static void count_bytes(struct us_device_group *group, bool drafting, const struct us_bench_options *o,
                        const struct us_rounds *rounds, struct us_bench_result *r) {
  const struct us_device_schedule *s = group->schedule[0];
  uint32_t first = s->begin[drafting ? US_ENGINE_PASS_CONTEXT : US_ENGINE_PASS_TARGET],
           last = s->end[US_ENGINE_PASS_TARGET], ranks = group->devices->ranks;
  r->experts = rounds->expert_layers ? (double)rounds->experts / (double)rounds->expert_layers : 0;
  us_device_traffic(s->ops, first, last, &r->traffic);
  r->weight_bytes = ranks * us_device_traffic_bytes(&r->traffic, r->experts);
  r->kv_bytes = ranks * (double)us_device_kv_bytes(s->ops, first, last, o->batch, o->context);
  r->workspace_bytes = s->workspace_bytes * (ranks / group->devices->gpus);
}

/* ---- a run ---------------------------------------------------------------------------------------------------------- */

static enum us_status measure(struct us_executor *ex, const struct us_executor_cuda_parts *parts,
                              const struct us_bench_options *o, struct listening *l,
                              struct us_bench_result *r, struct us_err *err) {
  bool drafting = ex->draft && o->block > 1;
  struct us_device_loop_options options = {.batch = o->batch, .block = o->block, .drafting = drafting};
  struct us_bench_place place;
  struct us_device_loop *loop = NULL;
  struct us_rounds rounds;
  enum us_status status =
      us_bench_place(ex, o->batch, o->context, us_bench_positions(o), drafting, o->seed, &place, err);
  if (status != US_OK) return status;
  for (uint32_t i = 0; i < o->batch; i++) {
    struct us_rounds_sequence *s = &place.sequence[i];
    s->limit = us_bench_positions(o) - US_MAX_BLOCK, s->drafts = o->block - 1;
    if (!l->tokens[i]) continue;
    s->replay = l->tokens[i], s->replay_count = l->token_count[i], s->replay_first = o->context + 1;
    s->accept = o->accept, s->accept_count = o->accept_count;
    l->tokens[i] = NULL; /* recorded no longer */
  }
  l->rounds = o->warmup + o->rounds, l->n = 0, l->first = 0;
  status = us_device_loop_create(parts, &options, &loop, err);
  if (status == US_OK) status = run_rounds(loop, &place, drafting, o, l, &rounds, err);
  if (status == US_OK) status = summarise(l, o->warmup, r, err);
  if (status == US_OK) count_bytes(us_device_loop_group(loop), drafting, o, &rounds, r);
  us_device_loop_free(loop);
  us_bench_unplace(&place);
  return status;
}

enum us_status us_bench_run(struct us_executor *ex, const struct us_bench_options *options,
                            struct us_bench_result *ret_result, struct us_err *err) {
  struct us_executor_cuda_parts parts;
  *ret_result = (struct us_bench_result){0};
  enum us_status status = need_parts(ex, &parts, err);
  if (status == US_OK)
    status = us_bench_check(ex, options->batch, options->block, options->accept != NULL, err);
  if (status != US_OK) return status;
  bool replay = options->accept && options->block > 1;
  struct listening l = {.capacity = (size_t)(options->warmup + options->rounds) * options->batch,
                        .token_capacity = replay ? us_bench_replayed(options) : 0};
  l.steps = calloc(l.capacity, sizeof *l.steps);
  int32_t *tokens = calloc(options->batch * l.token_capacity + 1, sizeof *tokens);
  if (!l.steps || !tokens)
    status = us_err_memory(err, "rounds", l.capacity * sizeof *l.steps);
  else if (replay) {
    for (uint32_t i = 0; i < options->batch; i++) l.tokens[i] = tokens + i * l.token_capacity;
    status = record(ex, &parts, options, &l, err);
  }
  if (status == US_OK) status = measure(ex, &parts, options, &l, ret_result, err);
  free(l.steps), free(tokens);
  return status;
}
