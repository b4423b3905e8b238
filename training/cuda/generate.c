/* generate.c: sequences continued on one GPU.
 *
 * Contents: sizes; memory; sequences in; a step; steps; answers out.
 */
#include "training/cuda/generate.h"

#include "device/device.h"
#include "kernels/attention_seq/attention_decode.h"
#include "kernels/slots/slots_train.h"
#include "training/cuda/gemm.h"
#include "training/cuda/model_state.h"
#include "training/cuda/prefill.h"

#include <math.h>
#include <stdlib.h>
#include <time.h>

#define MOST_SLOTS  4096 /* nano: 1.00 M tokens/s with 1,024, 1.33 with 2,048, 1.58 with 4,096 */
#define MOST_CACHE  ((uint64_t)32 << 30)
#define GRAPH_STEPS 8 /* launching a graph costs about 10 us, a step of nano 1 ms */
#define BURST       4 /* graphs between two looks at the status; one where prompts wait for it */

struct generator {
  const struct us_cuda_generate *job;
  struct us_cuda *cuda;
  struct us_cuda_model *model;
  uint32_t slots, positions;
  struct us_cuda_kept *cache; /* (L) */
  float *logits;              /* (slots, N) */
  struct us_slots state;
  struct us_slots_status *seen[2]; /* pinned: as of the last two bursts */
  int32_t *index[2], *token[2];    /* likewise (slots) */
  struct us_cuda_prefill prefill;  /* if prompts are held */
  cudaEvent_t event[2];
  cudaGraphExec_t graph;
  void *memory, *pinned;
  double end; /* of the time; 0: never */
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- sizes --- */

static uint32_t longest(const struct us_generation *g) {
  uint32_t most = 1;
  for (size_t i = 0; i < g->n; i++)
    if (g->items[i].prompt_count + g->items[i].max_tokens > most)
      most = g->items[i].prompt_count + g->items[i].max_tokens;
  return most;
}

static uint32_t longest_prompt(const struct us_generation *g) {
  uint32_t most = 0;
  for (size_t i = 0; i < g->n; i++)
    if (g->items[i].prompt_count > most) most = g->items[i].prompt_count;
  return most;
}

static uint32_t capacity_of(const struct us_shape *shape, uint32_t l, uint32_t positions) {
  uint32_t window = us_shape_attention(shape, l)->window;
  return window && window < positions ? window : positions;
}

/* Of one sequence. */
static uint64_t cache_bytes(const struct us_shape *shape, uint32_t positions) {
  uint64_t bytes = 0;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const struct us_attention_shape *a = us_shape_attention(shape, l);
    bytes += (uint64_t)capacity_of(shape, l, positions) * a->kv_heads * (a->qk_dim + a->v_dim) * 2;
  }
  return bytes;
}

uint32_t us_cuda_generate_slots(const struct us_generation *g) {
  uint64_t each = cache_bytes(&g->model->shape, longest(g)), slots = MOST_SLOTS;
  if (g->slots) return (g->slots + 7) / 8 * 8;
  while (slots > 8 && (slots * each > MOST_CACHE || slots / 2 >= g->n)) slots /= 2;
  return (uint32_t)slots;
}

/* --- memory --- */

struct totals {
  uint64_t prompts, ids;
};

static struct totals totals_of(const struct us_cuda_generate *job) {
  struct totals t = {0};
  for (size_t i = 0; i < job->n; i++) {
    t.prompts += job->generation->items[job->first + i].prompt_count;
    t.ids += job->generation->items[job->first + i].max_tokens;
  }
  return t;
}

static void take_all(struct us_arena *t, struct generator *g, const struct totals *totals) {
  const struct us_shape *shape = &g->job->generation->model->shape;
  bool counting = t->base == NULL;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const struct us_attention_shape *a = us_shape_attention(shape, l);
    struct us_cuda_kept ignored, *c = counting ? &ignored : &g->cache[l];
    c->capacity = capacity_of(shape, l, g->positions);
    size_t rows = (size_t)g->slots * a->kv_heads * c->capacity;
    US_ARENA_TAKE(t, c->k, rows * a->qk_dim);
    US_ARENA_TAKE(t, c->v, rows * a->v_dim);
  }
  US_ARENA_TAKE(t, g->logits, (size_t)g->slots * shape->vocab);
  struct us_slots *s = &g->state;
  s->sequence = us_arena_take(t, g->job->n, sizeof *s->sequence);
  s->prompts = us_arena_take(t, totals->prompts, sizeof *s->prompts);
  US_ARENA_TAKE(t, s->ids, totals->ids);
  US_ARENA_TAKE(t, s->result, g->job->n);
  US_ARENA_TAKE(t, s->index, g->slots);
  US_ARENA_TAKE(t, s->row, g->slots);
  US_ARENA_TAKE(t, s->drawn, g->slots);
  US_ARENA_TAKE(t, s->ended, g->slots);
  US_ARENA_TAKE(t, s->status, 1);
}

static enum us_status take_memory(struct generator *g, const struct totals *totals, struct us_err *err) {
  struct us_cuda *cuda = g->cuda;
  struct us_arena t = {0};
  take_all(&t, g, totals);
  g->cache = calloc(g->job->generation->model->shape.layers, sizeof *g->cache);
  if (!g->cache) return us_err_memory(err, "caches", sizeof *g->cache);
  enum us_status status = us_cuda_take(cuda, t.used, "keys, values and text of sequences", &g->memory, err);
  size_t words = (size_t)2 * g->slots * sizeof(int32_t), bytes = sizeof *g->seen[0] + words;
  if (status == US_OK) status = us_cuda_take_pinned(2 * bytes, "status of sequences", &g->pinned, err);
  for (int i = 0; i < 2 && status == US_OK; i++) {
    g->seen[i] = (struct us_slots_status *)((char *)g->pinned + i * bytes);
    g->index[i] = (int32_t *)(g->seen[i] + 1), g->token[i] = g->index[i] + g->slots;
    status = us_cuda_status(cudaEventCreateWithFlags(&g->event[i], cudaEventDisableTiming), "making an event",
                            err);
  }
  if (status != US_OK) return status;
  t = (struct us_arena){.base = g->memory};
  take_all(&t, g, totals);
  return US_OK;
}

/* --- sequences in --- */

static void send(struct generator *g, const void *device, const void *host, size_t bytes) {
  us_cuda_did(
      g->cuda,
      cudaMemcpyAsync((void *)(uintptr_t)device, host, bytes, cudaMemcpyHostToDevice, g->cuda->stream),
      "copying prompts");
}

static enum us_status send_sequences(struct generator *g, const struct totals *totals, struct us_err *err) {
  const struct us_continuation *items = g->job->generation->items + g->job->first;
  size_t n = g->job->n;
  struct us_slots_sequence *sequence = calloc(n, sizeof *sequence);
  int32_t *prompts = malloc(totals->prompts * sizeof *prompts);
  enum us_status status =
      sequence && prompts ? US_OK : us_err_memory(err, "prompts", totals->prompts * sizeof *prompts);
  struct totals at = {0};
  for (size_t i = 0; i < n && status == US_OK; i++) {
    sequence[i] = (struct us_slots_sequence){.prompt = at.prompts,
                                             .ids = at.ids,
                                             .seed = items[i].seed,
                                             .prompt_count = items[i].prompt_count,
                                             .max_tokens = items[i].max_tokens};
    memcpy(prompts + at.prompts, items[i].prompt, items[i].prompt_count * sizeof *prompts);
    at.prompts += items[i].prompt_count, at.ids += items[i].max_tokens;
  }
  if (status == US_OK) {
    send(g, g->state.sequence, sequence, n * sizeof *sequence);
    send(g, g->state.prompts, prompts, totals->prompts * sizeof *prompts);
    status = us_cuda_sync(g->cuda, err);
  }
  free(sequence);
  free(prompts);
  return status;
}

static void set_rules(struct generator *g) {
  const struct us_generation *generation = g->job->generation;
  struct us_slots *s = &g->state;
  s->slots = g->slots, s->sequences = (uint32_t)g->job->n;
  s->token = g->model->state->token, s->position = g->model->state->position;
  s->stops = (uint32_t)generation->stop_id_count;
  for (uint32_t i = 0; i < s->stops; i++) s->stop[i] = generation->stop_ids[i];
  s->gram = US_LOOP_GRAM, s->repeats = generation->cut_loops ? US_LOOP_REPEATS : 0;
  s->held = generation->stepwise ? 0 : US_CUDA_PREFILL_LEAST;
}

/* By all items, so that a pass's rows do not depend on how many GPUs share them. */
static enum us_status open_prefill(struct generator *g, struct us_err *err) {
  const struct us_generation *generation = g->job->generation;
  uint32_t longest = longest_prompt(generation);
  if (!g->state.held || longest < g->state.held) return US_OK;
  g->prefill = (struct us_cuda_prefill){
      .cuda = g->cuda, .slots = &g->state, .kept = g->cache, .items = generation->items + g->job->first};
  return us_cuda_prefill_open(&g->prefill, &generation->model->shape, g->job->params, longest, err);
}

static enum us_status open_generator(struct generator *g, struct us_err *err) {
  const struct us_generation *generation = g->job->generation;
  struct totals totals = totals_of(g->job);
  g->slots = us_cuda_generate_slots(generation);
  g->positions = longest(generation);
  /* The table of rotations has a row for each of the model's rows. */
  size_t rows = g->slots > g->positions ? g->slots : g->positions;
  enum us_status status = us_cuda_model_create(g->cuda, &generation->model->shape, g->job->params, rows,
                                               US_TRAIN_FORWARD, &g->model, err);
  if (status == US_OK) status = take_memory(g, &totals, err);
  if (status != US_OK) return status;
  g->model->R = g->slots;
  set_rules(g);
  status = open_prefill(g, err);
  return status == US_OK ? send_sequences(g, &totals, err) : status;
}

/* --- a step --- */

static void attend(struct generator *g, uint32_t l) {
  const struct us_cuda_model_state *s = g->model->state;
  const struct us_cuda_attention_roles *a = &s->attention[g->model->shape.swa_layer[l]];
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  const struct us_param *sink = s->roles[l].sink;
  struct us_attention_decode attention = {.slots = g->slots,
                                          .q_heads = a->shape->q_heads,
                                          .kv_heads = a->shape->kv_heads,
                                          .qk_dim = a->shape->qk_dim,
                                          .v_dim = a->shape->v_dim,
                                          .q = saved->qkv,
                                          .k = saved->qkv,
                                          .v = saved->qkv,
                                          .stride = a->width,
                                          .q_offset = a->q_offset,
                                          .k_offset = a->k_offset,
                                          .v_offset = a->v_offset,
                                          .token = s->token,
                                          .position = s->position,
                                          .k_cache = g->cache[l].k,
                                          .v_cache = g->cache[l].v,
                                          .capacity = g->cache[l].capacity,
                                          .scale = (float)(1.0 / sqrt((double)a->shape->qk_dim)),
                                          .opt_sink =
                                              sink ? us_cuda_param_rounded(g->model->params, sink) : NULL,
                                          .out = saved->attention};
  us_cuda_did(g->cuda, us_attention_decode(&attention, g->cuda->stream), "attention over kept keys");
}

static void queue_step(struct generator *g) {
  struct us_cuda_model *model = g->model;
  struct us_cuda *cuda = g->cuda;
  uint32_t N = model->shape.vocab;
  us_cuda_model_begin(model);
  for (uint32_t l = 0; l < model->shape.layers; l++) {
    us_cuda_model_project(model, l, NULL);
    attend(g, l);
    us_cuda_model_merge(model, l);
    us_cuda_model_mlp(model, l, false);
  }
  us_cuda_model_end(model, NULL);
  us_cuda_linear_f32(cuda, &(struct us_cuda_linear){.R = g->slots, .N = N, .K = model->shape.hidden},
                     model->hidden, model->head, g->logits);
  struct us_sample_train sample = {.R = g->slots,
                                   .N = N,
                                   .logits = g->logits,
                                   .stride = N,
                                   .row = g->state.row,
                                   .sampling = g->job->generation->sampling,
                                   .token = g->state.drawn};
  us_cuda_did(cuda, us_sample_train(&sample, cuda->stream), "draw of tokens");
  us_cuda_did(cuda, us_slots_advance(&g->state, cuda->stream), "end of sequences");
}

/* --- steps --- */

/* The first step is run as it is: what the libraries load at a first call cannot be captured. */
static enum us_status capture(struct generator *g, struct us_err *err) {
  cudaStream_t stream = g->cuda->stream;
  cudaGraph_t graph = NULL;
  us_cuda_did(g->cuda, us_slots_start(&g->state, stream), "first sequences");
  queue_step(g);
  enum us_status status = us_cuda_sync(g->cuda, err);
  if (status == US_OK)
    status = us_cuda_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                            "capturing a step", err);
  if (status != US_OK) return status;
  for (int i = 0; i < GRAPH_STEPS; i++) queue_step(g);
  cudaError_t code = cudaStreamEndCapture(stream, &graph);
  status = us_cuda_failed(g->cuda, err);
  if (status == US_OK) status = us_cuda_status(code, "capturing a step", err);
  if (status == US_OK)
    status = us_cuda_status(cudaGraphInstantiate(&g->graph, graph, 0), "making a graph", err);
  if (graph) (void)cudaGraphDestroy(graph);
  return status;
}

static void queue_burst(struct generator *g, int which) {
  for (int i = 0; i < (g->prefill.model ? 1 : BURST); i++)
    us_cuda_did(g->cuda, cudaGraphLaunch(g->graph, g->cuda->stream), "steps of generation");
  us_cuda_download(g->cuda, g->seen[which], g->state.status, sizeof *g->seen[which]);
  us_cuda_download(g->cuda, g->index[which], g->state.index, g->slots * sizeof *g->index[which]);
  us_cuda_download(g->cuda, g->token[which], g->state.token, g->slots * sizeof *g->token[which]);
  us_cuda_did(g->cuda, cudaEventRecord(g->event[which], g->cuda->stream), "recording an event");
}

static enum us_status look(struct generator *g, int which, bool *ret_done, struct us_err *err) {
  const struct us_generation *generation = g->job->generation;
  us_cuda_did(g->cuda, cudaEventSynchronize(g->event[which]), "steps of generation");
  enum us_status status = us_cuda_failed(g->cuda, err);
  if (status != US_OK) return status;
  const struct us_slots_status *seen = g->seen[which];
  if (seen->broken)
    return us_err_set(err, US_ERR_CHECK, "prompt %zu: the logits for position %u are not finite",
                      g->job->first + seen->broken - 1, seen->position);
  if (generation->interrupted && generation->interrupted())
    return us_err_set(err, US_INTERRUPTED, "interrupted");
  if (g->job->leads && generation->progress)
    generation->progress(generation->progress_arg, seen->finished, g->job->n);
  *ret_done = seen->finished >= g->job->n || (g->end > 0.0 && now() >= g->end);
  if (*ret_done || !g->prefill.model) return US_OK;
  return us_cuda_prefill_queue(&g->prefill, g->index[which], g->token[which], err);
}

/* One burst is under way while the status of the last is looked at. */
static enum us_status run(struct generator *g, struct us_err *err) {
  bool done = false;
  enum us_status status = capture(g, err);
  if (status != US_OK) return status;
  queue_burst(g, 0);
  for (int which = 0; status == US_OK && !done; which = !which) {
    queue_burst(g, !which);
    status = look(g, which, &done, err);
  }
  return status;
}

/* --- answers out --- */

static enum us_status fetch(struct generator *g, struct us_err *err) {
  struct us_continuation *items = g->job->generation->items + g->job->first;
  size_t n = g->job->n;
  uint64_t ids = totals_of(g->job).ids, at = 0;
  struct us_slots_result *result = calloc(n, sizeof *result);
  int32_t *text = malloc(ids * sizeof *text);
  enum us_status status = result && text ? US_OK : us_err_memory(err, "answers", ids * sizeof *text);
  if (status == US_OK) {
    us_cuda_download(g->cuda, result, g->state.result, n * sizeof *result);
    us_cuda_download(g->cuda, text, g->state.ids, ids * sizeof *text);
    status = us_cuda_sync(g->cuda, err);
  }
  static const enum us_finish finish[] = {[US_SLOTS_STOP] = US_FINISH_STOP,
                                          [US_SLOTS_LENGTH] = US_FINISH_LENGTH,
                                          [US_SLOTS_LOOP] = US_FINISH_LOOP};
  for (size_t i = 0; i < n && status == US_OK; at += items[i++].max_tokens) {
    items[i].count = result[i].count;
    items[i].finish = result[i].finish == US_SLOTS_GOES_ON ? US_FINISH_NONE : finish[result[i].finish];
    memcpy(items[i].ids, text + at, items[i].count * sizeof *text);
  }
  free(result);
  free(text);
  return status;
}

static void close_generator(struct generator *g) {
  (void)cudaStreamSynchronize(g->cuda->stream); /* what is queued reads what is freed here */
  if (g->graph) (void)cudaGraphExecDestroy(g->graph);
  for (int i = 0; i < 2; i++)
    if (g->event[i]) (void)cudaEventDestroy(g->event[i]);
  if (g->prefill.cuda) us_cuda_prefill_close(&g->prefill);
  us_cuda_give_pinned(g->pinned);
  us_cuda_give(g->memory);
  us_cuda_model_free(g->model);
  free(g->cache);
}

enum us_status us_cuda_generate(const struct us_cuda_generate *generate, struct us_err *err) {
  double seconds = generate->generation->seconds;
  struct generator g = {
      .job = generate, .cuda = generate->cuda, .end = seconds > 0.0 ? now() + seconds : 0.0};
  if (!generate->n) return US_OK;
  us_cuda_use(g.cuda);
  enum us_status status = open_generator(&g, err);
  if (status == US_OK) status = run(&g, err);
  if (status == US_OK) status = fetch(&g, err);
  close_generator(&g);
  return status;
}
