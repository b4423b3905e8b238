/* engine_loop_host.c: the C half of engine_loop: a model without weights, its schedule, and the comparison.
 *
 * Contents: logits; schedule; executor; requests; comparison.
 */
#include "decode/generate.h"
#include "device/loop.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_OPS = 40, N = 300, BLOCK = 16, REQUESTS = 9, POSITIONS = 512 };

int engine_loop_host(int argc, char **argv);

#define CHECK(call)                                                                                          \
  do {                                                                                                       \
    struct us_err err = {0};                                                                                 \
    if ((call) != US_OK) {                                                                                   \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, err.message);                                       \
      exit(5);                                                                                               \
    }                                                                                                        \
  } while (0)

static uint32_t word(uint32_t a, uint32_t b) {
  return us_philox_token(us_philox_key(31), a, b, 0, 12);
}

/* ---- logits -------------------------------------------------------------------------------------------------------- */

/* Of a slot. The drafter's slot i proposes what the target's slot i - 1 draws, but for some slots. Some rows have few levels, so that
 * filters cut among equals; in one all are equal. */
static void slot_logits(bool draft, uint32_t slot, float *logits) {
  uint32_t source = draft ? slot + BLOCK - 1 : slot + BLOCK, levels = source % 4 == 1 ? 29 : 8;
  for (uint32_t i = 0; i < N; i++)
    logits[i] = (float)(word(source, i) >> levels << levels) * 0x1p-32f * 4.0f * (source % 8 != 3);
  if (source % 8 == 3) return;
  logits[word(source, 1000) % N] = 9.0f;
  if (draft && slot % 5 == 4) logits[7] = 20.0f;
}

/* ---- schedule ------------------------------------------------------------------------------------------------------ */

static float *device_logits(uint32_t rows, uint32_t block, bool draft, uint32_t first, uint32_t count) {
  float *host = malloc(rows * count * sizeof *host), *device = NULL, all[N];
  for (uint32_t r = 0; r < rows; r++) {
    slot_logits(draft, r % block, all);
    memcpy(host + r * count, all + first, count * sizeof *host);
  }
  (void)cudaMalloc((void **)&device, rows * count * sizeof *device);
  (void)cudaMemcpy(device, host, rows * count * sizeof *device, cudaMemcpyHostToDevice);
  free(host);
  return device;
}

static void *zeros(size_t bytes) {
  void *memory = NULL;
  (void)cudaMalloc(&memory, bytes);
  (void)cudaMemset(memory, 0, bytes);
  return memory;
}

/* SELECT of every row tile, of one pass. */
static void push_selects(struct us_device_schedule *s, enum us_engine_program program, float *logits) {
  uint32_t last = s->row_tiles * ((program == US_ENGINE_PASS_TARGET) + s->options.drafter);
  s->begin[program] = s->op_count;
  for (uint32_t t = 0; t < s->row_tiles; t++) {
    struct us_engine_op *op = &s->ops[s->op_count];
    *op = (struct us_engine_op){
        .kind = US_ENGINE_SELECT, .program = program, .layer = UINT32_MAX, .row_tile = t};
    op->task_op = UINT32_MAX;
    op->wait = program == US_ENGINE_PASS_DRAFT ? 2 * s->row_tiles : s->op_count ? s->op_count - 1 : last;
    op->select.logits = logits + (size_t)t * 8 * s->logits_stride;
    op->select.stride = s->logits_stride, op->select.first = s->logits_first,
    op->select.count = s->logits_count;
    op->select.vocab = N, op->select.draft = program == US_ENGINE_PASS_DRAFT;
    op->select.row = 8 * t, op->select.step = 1, op->select.rows = 8 * t + 8;
    op->select.number = program == US_ENGINE_PASS_DRAFT ? t : s->row_tiles + t;
    op->select.last = t + 1 == s->row_tiles;
    s->op_count++;
  }
  s->end[program] = s->op_count;
}

enum us_status us_device_schedule_create(const struct us_device_weights *weights,
                                         const struct us_device_schedule_options *options,
                                         struct us_device_schedule **ret_schedule, struct us_err *err) {
  struct us_device_schedule *s = calloc(1, sizeof *s);
  uint32_t share = (N + weights->ranks - 1) / weights->ranks, first = share * weights->rank;
  s->options = *options, s->weights = weights;
  s->row_tiles = (options->batch * options->block + 7) / 8;
  s->logits_stride = share, s->logits_first = first, s->logits_count = N - first < share ? N - first : share;
  s->ops = calloc(2 * s->row_tiles + 1, sizeof *s->ops);
  s->logits =
      device_logits(s->row_tiles * 8, options->block, false, first, share < N - first ? share : N - first);
  s->draft_logits =
      device_logits(s->row_tiles * 8, options->block, true, first, share < N - first ? share : N - first);
  s->logits_stride = s->logits_count;
  if (options->drafter) push_selects(s, US_ENGINE_PASS_DRAFT, s->draft_logits);
  push_selects(s, US_ENGINE_PASS_TARGET, s->logits);
  s->ops[s->op_count] = (struct us_engine_op){.kind = US_ENGINE_ACCEPT,
                                              .program = US_ENGINE_PASS_TARGET,
                                              .layer = UINT32_MAX,
                                              .task_op = UINT32_MAX,
                                              .wait = s->op_count - 1,
                                              .accept = {.vocab = N,
                                                         .tiles = s->row_tiles,
                                                         .logits = s->logits,
                                                         .opt_draft_logits = s->draft_logits,
                                                         .stride = s->logits_stride,
                                                         .count = s->logits_count,
                                                         .first = s->logits_first}};
  s->end[US_ENGINE_PASS_TARGET] = ++s->op_count;
  struct us_engine_op *ops = zeros(MAX_OPS * sizeof *ops);
  (void)cudaMemcpy(ops, s->ops, s->op_count * sizeof *ops, cudaMemcpyHostToDevice);
  s->rank = (struct us_engine_rank){.rank = weights->rank, .ranks = weights->ranks, .slots = 1, .ops = ops};
  s->rank.selects = 2 * s->row_tiles;
  s->rank.done = zeros(MAX_OPS * sizeof(uint32_t));
  s->rank.state = zeros(sizeof(struct us_engine_state));
  s->rank.select[weights->rank] = zeros(us_engine_select_bytes(weights->ranks, 132, 2 * s->row_tiles));
  s->rank.logits_all[weights->rank] = zeros((size_t)s->row_tiles * 8 * N * sizeof(float));
  *ret_schedule = s;
  return US_OK;
}

void us_device_schedule_connect(struct us_device_schedule *const *schedules, uint32_t ranks) {
  for (uint32_t a = 0; a < ranks; a++)
    for (uint32_t b = 0; b < ranks; b++) {
      schedules[a]->rank.select[b] = schedules[b]->rank.select[b];
      schedules[a]->rank.logits_all[b] = schedules[b]->rank.logits_all[b];
    }
}

enum us_status us_device_schedule_check(const struct us_device_schedule *schedule, struct us_err *err) {
  return US_OK;
}

void us_device_schedule_free(struct us_device_schedule *s) {
  if (!s) return;
  uint32_t rank = s->rank.rank;
  void *owned[] = {s->logits,     s->draft_logits,      (void *)s->rank.ops,     s->rank.done,
                   s->rank.state, s->rank.select[rank], s->rank.logits_all[rank]};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) (void)cudaFree(owned[i]);
  free(s->ops);
  free(s);
}

/* ---- executor ------------------------------------------------------------------------------------------------------ */

enum { EXPERTS = 8 };

struct slots { /* an executor whose logits depend on the slot alone */
  struct us_executor base;
  struct us_model model;
  struct us_draft draft;
  struct us_executor_cuda_parts parts;
  struct us_device_weights weights[US_ENGINE_MAX_RANKS], *weight[US_ENGINE_MAX_RANKS];
  struct us_device_loop *loop;
  uint32_t jitter;
  struct us_layer layers[2]; /* for the bytes of a round: adaptive lengths */
  struct us_expert experts[EXPERTS];
  struct us_draft_layer draft_layers[1];
};

bool us_executor_cuda_parts(const struct us_executor *executor, struct us_executor_cuda_parts *ret_parts) {
  *ret_parts = ((const struct slots *)executor)->parts;
  return true;
}

static enum us_status forward(struct us_executor *ex, const struct us_pass *pass, struct us_err *err) {
  uint32_t slot = 0;
  for (size_t r = 0; r < pass->R; r++) {
    slot = r && !pass->prefill && pass->rows[r].kv == pass->rows[r - 1].kv ? slot + 1 : 0;
    if (pass->logits && (!pass->want_logits || pass->want_logits[r]))
      slot_logits(false, slot, pass->logits + r * N);
  }
  if (pass->taps) memset(pass->taps, 0, pass->R * 4 * sizeof(float));
  if (pass->routed) memset(pass->routed, 0, 2 * pass->R * sizeof *pass->routed);
  return US_OK;
}

static enum us_status draft_context(struct us_executor *ex, const struct us_draft_context *context,
                                    struct us_err *err) {
  return US_OK;
}

static enum us_status draft(struct us_executor *ex, const struct us_draft_pass *pass, struct us_err *err) {
  for (uint32_t j = 1; j < pass->block; j++) slot_logits(true, j, pass->logits + (j - 1) * N);
  return US_OK;
}

static enum us_status run_rounds(struct us_executor *ex, struct us_rounds *rounds, struct us_err *err) {
  struct slots *s = (struct slots *)ex;
  if (s->loop) us_device_loop_group(s->loop)->jitter = s->jitter;
  return us_device_rounds(ex, &s->loop, rounds, err);
}

static const struct us_executor_ops own_ops = {
    .forward = forward, .draft_context = draft_context, .draft = draft};
static const struct us_executor_ops loop_ops = {
    .forward = forward, .draft_context = draft_context, .draft = draft, .rounds = run_rounds};

static void open_pool(struct slots *s, const struct us_kv_spec *spec, struct us_kv_pool **ret_pool) {
  struct us_kv_pool_options options = {.positions = POSITIONS};
  us_kv_pool_need(spec, POSITIONS, 12, options.pages);
  CHECK(us_kv_pool_create(s->parts.devices, spec, &options, ret_pool, &err));
}

static void open_slots(struct slots *s, uint32_t ranks, enum us_device_mode mode) {
  struct us_attention_shape attention = {.q_heads = 4, .kv_heads = 4, .qk_dim = 32, .v_dim = 32};
  *s = (struct slots){
      .base = {.name = "slots", .model = &s->model, .draft = &s->draft, .rounding = US_ROUND_BF16}};
  s->model.shape = (struct us_shape){
      .layers = 2, .hidden = 4, .vocab = N, .full = attention, .swa = attention, .swa_layer = {0, 1}};
  s->model.shape.experts = EXPERTS, s->model.shape.top_k = 1, s->model.shape.moe_layer[1] = 1;
  s->model.layers = s->layers, s->layers[1].experts = s->experts;
  s->model.head = (struct us_matrix){.format = US_FORMAT_BF16, .rows = N, .cols = 32};
  for (int e = 0; e < EXPERTS; e++)
    s->experts[e].gate = (struct us_matrix){.format = US_FORMAT_BF16, .rows = 160, .cols = 32};
  s->model.shape.swa.window = 128, s->model.shape.max_positions = POSITIONS - BLOCK;
  s->draft.shape = (struct us_draft_shape){.layers = 1,
                                           .hidden = 4,
                                           .vocab = N,
                                           .attention = attention,
                                           .block = BLOCK,
                                           .taps = 1,
                                           .target_layers = 2};
  s->draft.layers = s->draft_layers;
  CHECK(us_devices_open(0, 1, ranks, &s->parts.devices, &err));
  for (uint32_t r = 0; r < ranks; r++) {
    s->weights[r] = (struct us_device_weights){.rank = r, .ranks = ranks, .shape = s->model.shape};
    s->weight[r] = &s->weights[r];
  }
  s->parts.weights = s->weight, s->parts.positions = POSITIONS, s->parts.mode = mode;
  struct us_kv_spec spec = us_kv_spec_of(&s->model.shape), draft_spec = us_kv_spec_of_draft(&s->draft.shape);
  open_pool(s, &spec, &s->parts.pool);
  open_pool(s, &draft_spec, &s->parts.draft_pool);
}

static void close_slots(struct slots *s) {
  us_device_loop_free(s->loop);
  us_kv_pool_free(s->parts.pool);
  us_kv_pool_free(s->parts.draft_pool);
  us_devices_close(s->parts.devices);
}

/* ---- requests ------------------------------------------------------------------------------------------------------ */

/* `t` numbers the trial; in every other one log-probabilities are asked for. */
static void make_requests(uint32_t t, struct us_request *requests) {
  static int32_t prompt[64];
  static const int32_t stop_ids[] = {3,  17, 31, 40, 41, 42, 43, 44, 45, 46, 47,
                                     48, 49, 50, 51, 52, 60, 61, 62, 63, 64, 65};
  static const struct us_sampling samplings[] = {{0.0f, 0, 0.0f, 0.0f},   {1.0f, 0, 0.0f, 0.0f},
                                                 {0.4f, 12, 0.95f, 0.0f}, {1.4f, 0, 0.0f, 0.1f},
                                                 {0.3f, 0, 0.9f, 0.0f},   {0.3f, 0, 0.0f, 0.0f}};
  for (uint32_t i = 0; i < REQUESTS; i++) {
    uint32_t w = word(t, 2000 + i);
    requests[i] = (struct us_request){.prompt = prompt,
                                      .prompt_count = 3 + w % 60,
                                      .sampling = samplings[w / 64 % 6],
                                      .seed = w,
                                      .samples = 1 + w % 3,
                                      .max_tokens = 1 + w / 7 % 300,
                                      .stop_ids = stop_ids,
                                      .stop_id_count = w / 11 % 4 ? w / 11 % 4
                                                       : t % 3    ? 0
                                                                  : 22,
                                      .cut_loops = w / 13 % 2,
                                      .logprobs = t % 2 && w / 17 % 2};
  }
}

/* ---- comparison ---------------------------------------------------------------------------------------------------- */

static uint32_t differences(const struct us_output *a, const struct us_output *b) {
  const struct us_decode_stats *x = &a->stats, *y = &b->stats;
  uint32_t bad =
      a->ids.count != b->ids.count || memcmp(a->ids.ids, b->ids.ids, a->ids.count * sizeof(int32_t));
  bad += a->finish != b->finish;
  bad += !a->logprobs != !b->logprobs ||
         (a->logprobs && memcmp(a->logprobs, b->logprobs, a->ids.count * sizeof *a->logprobs));
  bad += x->rounds != y->rounds || x->committed != y->committed ||
         memcmp(x->offered, y->offered, sizeof x->offered) ||
         memcmp(x->accepted, y->accepted, sizeof x->accepted) ||
         memcmp(x->histogram, y->histogram, sizeof x->histogram);
  return bad;
}

struct tally {
  uint64_t outputs, bad, tokens, rounds, by_law, adaptive, logprobs, offered;
  uint64_t finishes[US_FINISH_CANCELLED + 1];
  double own_seconds, loop_seconds;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void compare(const struct us_result *a, const struct us_result *b, struct tally *tally) {
  for (uint32_t i = 0; i < REQUESTS; i++)
    for (uint32_t s = 0; s < a[i].samples; s++) {
      const struct us_output *out = &a[i].outputs[s];
      tally->outputs++, tally->tokens += out->ids.count, tally->rounds += out->stats.rounds;
      tally->finishes[out->finish]++;
      tally->logprobs += out->logprobs != NULL;
      for (uint32_t j = 0; j < US_MAX_BLOCK; j++) tally->offered += out->stats.offered[j];
      tally->bad += differences(out, &b[i].outputs[s]) != 0;
    }
}

static void release(struct us_result *results) {
  for (uint32_t i = 0; i < REQUESTS; i++) us_result_release(&results[i]);
}

static void generate(struct slots *s, bool loop, const struct us_request *requests,
                     const struct us_generate_options *options, struct us_result *results) {
  s->base.ops = loop ? &loop_ops : &own_ops;
  s->base.kv_memory = loop ? us_kv_pool_memory(s->parts.pool) : NULL;
  s->base.draft_kv_memory = loop ? us_kv_pool_memory(s->parts.draft_pool) : NULL;
  CHECK(us_generate(&s->base, requests, REQUESTS, options, results, NULL, &err));
}

/* Drafted, plain, and every third time replayed from the plain run at rates; by every rule, with and without adaptive lengths. */
static void trial(struct slots *s, uint32_t t, struct tally *tally) {
  static const float rates[] = {0.9f, 0.95f, 0.7f};
  static const uint32_t blocks[] = {8, 1, 16, 5, 3, 8};
  struct us_request requests[REQUESTS];
  struct us_replay replays[REQUESTS][3];
  struct us_result plain[REQUESTS], own[REQUESTS], loop[REQUESTS];
  make_requests(t, requests);
  struct us_generate_options options = {.block = 1};
  double begun = now();
  generate(s, false, requests, &options, plain);
  for (uint32_t i = 0; t % 3 == 0 && i < REQUESTS; i++) {
    for (uint32_t k = 0; k < requests[i].samples; k++)
      replays[i][k] = (struct us_replay){plain[i].outputs[k].ids.ids, plain[i].outputs[k].ids.count};
    requests[i].replay = i % 4 ? replays[i] : NULL;
  }
  s->jitter = t % 2 ? 3000 : 0;
  options = (struct us_generate_options){
      .block = blocks[t % 6], .batch = 1 + t % 8, .accept = rates, .accept_count = t % 3 ? 0 : 3};
  options.rule = (enum us_verify_rule)(t / 2 % 3), options.adaptive = t / 3 % 2;
  tally->by_law += options.rule != US_VERIFY_MATCH, tally->adaptive += options.adaptive;
  generate(s, false, requests, &options, own);
  double between = now();
  generate(s, true, requests, &options, loop);
  tally->own_seconds += between - begun, tally->loop_seconds += now() - between;
  compare(own, loop, tally);
  release(plain), release(own), release(loop);
}

/* engine_loop [CASE...]: all, or 0, 1, ... */
int engine_loop_host(int argc, char **argv) {
  static const struct {
    uint32_t ranks;
    enum us_device_mode mode;
    const char *name;
  } cases[] = {{1, US_DEVICE_ENGINE, "engine"},
               {2, US_DEVICE_ENGINE, "engine"},
               {4, US_DEVICE_ENGINE, "engine"},
               {1, US_DEVICE_GRAPH, "graph"},
               {2, US_DEVICE_SINGLE, "single"}};
  bool failed = false;
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    struct tally tally = {0};
    bool asked = argc < 2;
    for (int i = 1; i < argc; i++) asked |= atoi(argv[i]) == (int)c;
    if (!asked) continue;
    struct slots *s = calloc(1, sizeof *s);
    open_slots(s, cases[c].ranks, cases[c].mode);
    for (uint32_t t = 0; t < (cases[c].mode == US_DEVICE_ENGINE ? 48u : 18u); t++) trial(s, t, &tally);
    close_slots(s);
    free(s);
    bool ok = tally.outputs && !tally.bad;
    failed |= !ok;
    printf("{\"check\": \"loop: %s, %u ranks\", \"ok\": %s, \"checked\": %llu, \"mismatches\": %llu, "
           "\"tokens\": %llu, "
           "\"rounds\": %llu, \"trials by law\": %llu, \"adaptive\": %llu, \"outputs with "
           "log-probabilities\": %llu, "
           "\"proposals\": %llu, \"stop\": %llu, \"length\": %llu, \"loop\": %llu, \"host's seconds\": %.1f, "
           "\"loop's\": %.1f}\n",
           cases[c].name, cases[c].ranks, ok ? "true" : "false", (unsigned long long)tally.outputs,
           (unsigned long long)tally.bad, (unsigned long long)tally.tokens, (unsigned long long)tally.rounds,
           (unsigned long long)tally.by_law, (unsigned long long)tally.adaptive,
           (unsigned long long)tally.logprobs, (unsigned long long)tally.offered,
           (unsigned long long)tally.finishes[US_FINISH_STOP],
           (unsigned long long)tally.finishes[US_FINISH_LENGTH],
           (unsigned long long)tally.finishes[US_FINISH_LOOP], tally.own_seconds, tally.loop_seconds);
    fflush(stdout);
  }
  return failed;
}
