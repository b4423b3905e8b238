/* engine_parity.c: the CUDA executor against the tile executor on the CPU, its two modes against each other, and generation.
 *
 *   A script of passes | Comparison | Generation | Cases
 *
 * Usage: engine_parity [CASE...], of tiny, tiny-pro, ranks, heads, markov, pico, pro; gpus2, gpus4, gpus8 only where they are named. Exit 0, 1, 5, 77.
 *
 * Bound. Both sides round at the same points (to bf16) and differ in the order of FP32 sums, so an intermediate value is either
 * equal or one bf16 step (2^-8 of it) off; fewer than one in 16 is (sums of a few thousand terms differ by less than 2^-12 of a
 * value, a step is 2^-8). Over n roundings on the way to a logit these add up at random: sqrt(n / 16) 2^-8 of its row's scale. A
 * layer has 6 roundings (two norms, attention's q, kv and output, inner activations); 6 deviations cover all values looked at.
 *
 * Where two experts nearly tie, the sides may choose differently; that row and those that see it are then not compared. The first
 * difference of a sequence must be a near-tie: the scores differ by less than 2^-5 (a score's slope is 1/4). Likewise the slots of a
 * block whose drafter has a Markov head, behind one whose likeliest tokens tie within the bound.
 */
#include "decode/generate.h"
#include "parity_models.h"

#include <math.h>
#include <signal.h>

#define MAX_RANKS 8

/* A script of passes */

#define MAX_OUTPUT_ROWS 512

/* Every row that ran, in order. */
struct trace {
  size_t rows, draft_rows;
  float *logits, *taps, *router; /* (rows, N), (rows, taps * D), (L, E) of each row: the CPU's */
  uint32_t *routed;              /* (rows, L, K) */
  uint32_t sequence[MAX_OUTPUT_ROWS], position[MAX_OUTPUT_ROWS];
  float *draft_logits, *hidden; /* (draft_rows, N), (draft_rows, D) */
  uint32_t slot[64];            /* (draft_rows) of the block; logits are of the slot after it */
};

struct script {
  const struct models *m;
  struct us_executor *ex;
  const struct trace *opt_cpu; /* the drafter gets the CPU's taps */
  struct trace *out;
  struct us_kv *kv[SEQUENCES], *draft_kv;
  uint32_t position[SEQUENCES], salt; /* salt: other tokens after a step back */
};

static struct trace new_trace(const struct models *m) {
  const struct us_shape *s = &m->model->shape;
  return (struct trace){.logits = take(MAX_OUTPUT_ROWS * (size_t)s->vocab, sizeof(float)),
                        .taps =
                            take(MAX_OUTPUT_ROWS * (size_t)m->draft->shape.taps * s->hidden, sizeof(float)),
                        .router = take(MAX_OUTPUT_ROWS * (size_t)s->layers * s->experts, sizeof(float)),
                        .routed = take(MAX_OUTPUT_ROWS * (size_t)s->layers * s->top_k, sizeof(uint32_t)),
                        .draft_logits = take(64 * (size_t)s->vocab, sizeof(float)),
                        .hidden = take(64 * (size_t)s->hidden, sizeof(float))};
}

static void drop_trace(struct trace *t) {
  free(t->logits), free(t->taps), free(t->router), free(t->routed), free(t->draft_logits), free(t->hidden);
}

/* The CPU's router scores, for near-ties. */
static bool keep_router(void *arg, const char *op, uint32_t layer, const float *values, size_t R,
                        size_t width) {
  const struct script *s = arg;
  uint32_t layers = s->m->model->shape.layers;
  for (size_t r = 0; !strcmp(op, "router") && r < R; r++)
    memcpy(s->out->router + ((s->out->rows + r) * layers + layer) * width, values + r * width,
           width * sizeof *values);
  return true;
}

static int32_t token_at(const struct script *s, uint32_t sequence, uint32_t position) {
  return (int32_t)(((sequence * 977u + s->salt * 31u + position * 2654435761u) >> 5) %
                   s->m->model->shape.vocab);
}

/* One pass: counts[i] rows of sequence i. */
static void pass(struct script *s, const uint32_t *counts, bool prefill) {
  const struct us_shape *shape = &s->m->model->shape;
  struct us_row rows[MAX_OUTPUT_ROWS];
  struct trace *t = s->out;
  struct us_err err = {0};
  size_t R = 0, LK = (size_t)shape->layers * shape->top_k, K = shape->top_k;
  for (uint32_t i = 0; i < SEQUENCES; i++)
    for (uint32_t j = 0; j < counts[i]; j++, R++) {
      t->sequence[t->rows + R] = i, t->position[t->rows + R] = s->position[i];
      rows[R] = (struct us_row){token_at(s, i, s->position[i]), s->position[i], s->kv[i]};
      s->position[i]++;
    }
  uint32_t *routed = take(R * LK, sizeof *routed);
  struct us_observer observer = {keep_router, s};
  struct us_pass p = {.rows = rows,
                      .R = R,
                      .logits = t->logits + t->rows * shape->vocab,
                      .taps = t->taps + t->rows * s->m->draft->shape.taps * shape->hidden,
                      .routed = routed,
                      .observer = s->ex == s->m->cpu ? &observer : NULL,
                      .prefill = prefill};
  need(s->ex->ops->forward(s->ex, &p, &err), &err, "forward");
  for (size_t r = 0; r < R; r++)
    for (uint32_t l = 0; l < shape->layers; l++)
      memcpy(t->routed + (t->rows + r) * LK + l * K, routed + (l * R + r) * K, K * sizeof *routed);
  free(routed);
  t->rows += R;
}

/* Drafts of `block` rows after the tokens of sequence 0 so far, whose first rows of the trace are its taps. */
static void draft(struct script *s, uint32_t block) {
  const struct us_shape *shape = &s->m->model->shape;
  struct trace *t = s->out;
  struct us_err err = {0};
  struct us_draft_pass p = {.kv = s->draft_kv,
                            .anchor = 7,
                            .position = s->position[0],
                            .block = block,
                            .logits = t->draft_logits + t->draft_rows * shape->vocab,
                            .hidden = t->hidden + t->draft_rows * shape->hidden};
  need(s->ex->ops->draft(s->ex, &p, &err), &err, "draft");
  for (uint32_t j = 0; j < block; j++) t->slot[t->draft_rows++] = j;
}

static void context(struct script *s, uint32_t first, uint32_t count) {
  const struct trace *from = s->opt_cpu ? s->opt_cpu : s->out;
  struct us_err err = {0};
  size_t width = (size_t)s->m->draft->shape.taps * s->m->model->shape.hidden;
  struct us_draft_context c = {
      .kv = s->draft_kv, .position = first, .R = count, .taps = from->taps + first * width};
  need(s->ex->ops->draft_context(s->ex, &c, &err), &err, "context");
}

static void open_caches(struct script *s) {
  struct us_kv_spec spec = us_kv_spec_of(&s->m->model->shape),
                    draft = us_kv_spec_of_draft(&s->m->draft->shape);
  struct us_err err = {0};
  for (uint32_t i = 0; i < SEQUENCES; i++) {
    if (i != 1)
      need(us_kv_create_in(s->ex->kv_memory, &spec, 400, US_KV_BF16, &s->kv[i], &err), &err, "cache");
  }
  need(us_kv_create_in(s->ex->draft_kv_memory, &draft, 400, US_KV_BF16, &s->draft_kv, &err), &err, "cache");
}

/* A prompt, a fork, passes of one row, of a block, of two, of all sequences, and a step back over rejected rows. */
static struct trace run_script(const struct models *m, struct us_executor *ex, const struct trace *opt_cpu) {
  struct trace out = new_trace(m);
  struct script s = {.m = m, .ex = ex, .opt_cpu = opt_cpu, .out = &out};
  struct us_err err = {0};
  uint32_t most = m->draft->shape.block;
  open_caches(&s);
  pass(&s, (uint32_t[SEQUENCES]){75}, true);
  need(us_kv_fork(s.kv[0], &s.kv[1], &err), &err, "fork");
  s.position[1] = s.position[0];
  context(&s, 0, 75);
  draft(&s, 8), draft(&s, most), draft(&s, 3);
  pass(&s, (uint32_t[SEQUENCES]){8, 3}, false);
  s.position[0] -= 5, s.salt = 1;
  context(&s, 75, 3);
  draft(&s, 8);
  pass(&s, (uint32_t[SEQUENCES]){1, 8}, false);
  pass(&s, (uint32_t[SEQUENCES]){0, 0, 1, 1, 1, 1, 1, 1}, false);
  pass(&s, (uint32_t[SEQUENCES]){8, 8, 8, 8, 8, 8, 8, 8}, false);
  pass(&s, (uint32_t[SEQUENCES]){16, 0, 5, 7, 9}, false);
  pass(&s, (uint32_t[SEQUENCES]){1}, false);
  for (uint32_t i = 0; i < SEQUENCES; i++) us_kv_free(s.kv[i]);
  us_kv_free(s.draft_kv);
  return out;
}

/* Comparison */

static double row_scale(const float *x, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sqrt(sum / (double)n);
}

/* Largest difference in units of the row's root mean square; infinite for a value that is not a number. */
static double row_error(const float *a, const float *b, size_t n) {
  double worst = 0, scale = row_scale(a, n);
  for (size_t i = 0; i < n; i++) {
    double e = fabs((double)a[i] - (double)b[i]) / scale;
    if (!(e <= worst)) worst = e == e ? e : INFINITY;
  }
  return worst;
}

static double bound_of(uint32_t layers) {
  return 6.0 * sqrt((6.0 * layers + 2.0) / 16.0) * 0x1p-8;
}

/* Distance between the last chosen and the first refused score + bias of the CPU's row in a layer. */
static double gap_of(const struct models *m, const struct trace *cpu, size_t row, uint32_t layer) {
  const struct us_shape *s = &m->model->shape;
  const float *scores = cpu->router + (row * s->layers + layer) * s->experts;
  const uint32_t *chosen = cpu->routed + (row * s->layers + layer) * s->top_k;
  double least = INFINITY, most = -INFINITY;
  for (uint32_t e = 0; e < s->experts; e++) {
    double score = 1.0 / (1.0 + exp(-(double)scores[e])) + (double)m->model->layers[layer].router_bias[e];
    bool in = false;
    for (uint32_t k = 0; k < s->top_k; k++) in |= chosen[k] == e;
    if (in && score < least) least = score;
    if (!in && score > most) most = score;
  }
  return least - most;
}

struct verdict {
  uint64_t rows, over, ties, wrong_routes;
  double worst, worst_taps;
};

/* Rows of sequences that have not met a near-tie yet. Sequence 1 begins as sequence 0. */
static struct verdict compare(const struct models *m, const struct trace *cpu, const struct trace *gpu) {
  const struct us_shape *s = &m->model->shape;
  size_t LK = (size_t)s->layers * s->top_k, width = (size_t)m->draft->shape.taps * s->hidden;
  uint32_t spoilt[SEQUENCES];
  struct verdict v = {0};
  memset(spoilt, 0xff, sizeof spoilt); /* from this position on */
  for (size_t r = 0; r < cpu->rows; r++) {
    uint32_t q = cpu->sequence[r], p = cpu->position[r];
    if (r == 75) spoilt[1] = spoilt[0];
    if (p >= spoilt[q]) continue;
    for (uint32_t l = 0; l < s->layers && spoilt[q] > p; l++) {
      if (!memcmp(cpu->routed + r * LK + l * s->top_k, gpu->routed + r * LK + l * s->top_k,
                  s->top_k * sizeof *cpu->routed))
        continue;
      spoilt[q] = p, v.ties++;
      if (gap_of(m, cpu, r, l) > 0x1p-5) v.wrong_routes++;
    }
    if (p >= spoilt[q]) continue;
    double e = row_error(cpu->logits + r * s->vocab, gpu->logits + r * s->vocab, s->vocab);
    double taps = row_error(cpu->taps + r * width, gpu->taps + r * width, width);
    v.rows++;
    v.over += e > bound_of(s->layers) || taps > bound_of(s->layers);
    if (e > v.worst) v.worst = e;
    if (taps > v.worst_taps) v.worst_taps = taps;
  }
  return v;
}

static void compare_drafts(const struct models *m, const char *name, const struct trace *cpu,
                           const struct trace *gpu) {
  const struct us_shape *s = &m->model->shape;
  double worst = 0, hidden = 0, bound = bound_of(m->draft->shape.layers + 1);
  uint64_t over = 0, left = 0;
  bool apart = false;
  char note[128];
  for (size_t r = 0; r < cpu->draft_rows; r++) {
    const float *a = cpu->draft_logits + r * s->vocab, *b = gpu->draft_logits + r * s->vocab;
    apart = apart && cpu->slot[r];
    bool there = r + 1 < cpu->draft_rows && row_scale(a, s->vocab) > 0;
    double e = there && !apart ? row_error(a, b, s->vocab) : 0;
    double h = row_error(cpu->hidden + r * s->hidden, gpu->hidden + r * s->hidden, s->hidden);
    over += e > bound || h > bound;
    left += apart;
    if (e > worst) worst = e;
    if (h > hidden) hidden = h;
    int32_t likeliest = us_sample_argmax(b, s->vocab);
    if (!there || apart || !m->draft->shape.markov || likeliest == us_sample_argmax(a, s->vocab)) continue;
    over += a[us_sample_argmax(a, s->vocab)] - a[likeliest] > 2.0 * bound * row_scale(a, s->vocab);
    apart = true;
  }
  snprintf(note, sizeof note, "worst %.3g hidden %.3g of %.3g, %llu slots behind near-ties", worst, hidden,
           bound, (unsigned long long)left);
  record(name, "drafts within the bound", cpu->draft_rows, over, note);
  record(name, "two thirds of the slots compared", cpu->draft_rows, left * 3 > cpu->draft_rows, "");
}

static void compare_traces(const struct models *m, const char *name, const struct trace *cpu,
                           const struct trace *gpu) {
  char note[160];
  struct verdict v = compare(m, cpu, gpu);
  snprintf(note, sizeof note, "worst %.3g taps %.3g of %.3g, %llu near-ties", v.worst, v.worst_taps,
           bound_of(m->model->shape.layers), (unsigned long long)v.ties);
  record(name, "logits within the bound", v.rows, v.over, note);
  record(name, "experts equal but for near-ties", v.rows + v.ties, v.wrong_routes, "");
  record(name, "a third of the rows compared", cpu->rows, v.rows * 3 < cpu->rows, "");
  compare_drafts(m, name, cpu, gpu);
}

static void compare_bits(const struct models *m, const char *name, const char *check, const struct trace *a,
                         const struct trace *b) {
  const struct us_shape *s = &m->model->shape;
  size_t width = (size_t)m->draft->shape.taps * s->hidden, LK = (size_t)s->layers * s->top_k;
  uint64_t bad = 0;
  for (size_t r = 0; r < a->rows; r++)
    bad += memcmp(a->logits + r * s->vocab, b->logits + r * s->vocab, s->vocab * sizeof(float)) ||
           memcmp(a->taps + r * width, b->taps + r * width, width * sizeof(float)) ||
           memcmp(a->routed + r * LK, b->routed + r * LK, LK * sizeof(uint32_t));
  bad += memcmp(a->draft_logits, b->draft_logits, a->draft_rows * s->vocab * sizeof(float)) != 0;
  record(name, check, a->rows + a->draft_rows, bad, "");
}

/* Operation by operation: the same names in the same order, values near the CPU's, for rows that route alike. */

struct watch {
  FILE *names;
  float *values[512];
  size_t count, n[512];
  const char *name[512];
  uint32_t layer[512];
};

static bool note_op(void *arg, const char *op, uint32_t layer, const float *values, size_t R, size_t width) {
  struct watch *w = arg;
  if (w->count == 512) return false;
  w->values[w->count] = take(R * width, sizeof(float));
  memcpy(w->values[w->count], values, R * width * sizeof(float));
  w->n[w->count] = R * width, w->name[w->count] = op, w->layer[w->count] = layer;
  w->count++;
  return true;
}

/* 11 rows after `before` others of the same sequence. */
static void observe(const struct models *m, struct us_executor *ex, uint32_t before, struct watch *w) {
  struct us_kv_spec spec = us_kv_spec_of(&m->model->shape);
  struct us_observer observer = {note_op, w};
  struct us_kv *kv;
  struct us_row rows[64];
  struct us_err err = {0};
  float *logits = take(11 * (size_t)m->model->shape.vocab, sizeof *logits);
  need(us_kv_create_in(ex->kv_memory, &spec, 64, US_KV_BF16, &kv, &err), &err, "cache");
  for (uint32_t i = 0; i < before + 11; i++)
    rows[i] = (struct us_row){(int32_t)((i * 37 + 5) % m->model->shape.vocab), i, kv};
  struct us_pass first = {.rows = rows, .R = before};
  need(ex->ops->forward(ex, &first, &err), &err, "pass");
  struct us_pass p = {.rows = rows + before, .R = 11, .logits = logits, .observer = &observer};
  need(ex->ops->forward(ex, &p, &err), &err, "observed pass");
  us_kv_free(kv);
  free(logits);
}

static void compare_ops(const struct models *m, const char *name, struct us_executor *ex, uint32_t before) {
  struct watch *cpu = take(1, sizeof *cpu), *gpu = take(1, sizeof *gpu);
  uint64_t bad = 0;
  double worst = 0;
  char note[160] = "";
  observe(m, m->cpu, before, cpu), observe(m, ex, before, gpu);
  if (cpu->count != gpu->count)
    snprintf(note, sizeof note, "%zu operations, not %zu", gpu->count, cpu->count), bad++;
  for (size_t i = 0; !bad && i < cpu->count; i++) {
    bool same =
        !strcmp(cpu->name[i], gpu->name[i]) && cpu->layer[i] == gpu->layer[i] && cpu->n[i] == gpu->n[i];
    double e = same ? row_error(cpu->values[i], gpu->values[i], cpu->n[i]) : INFINITY;
    if (e > worst) worst = e;
    if (same && e <= 4.0 * bound_of(m->model->shape.layers)) continue;
    bad++;
    snprintf(note, sizeof note, "%s of layer %d: error %.3g; the CPU's is %s of layer %d", gpu->name[i],
             (int)gpu->layer[i], e, cpu->name[i], (int)cpu->layer[i]);
  }
  if (!bad) snprintf(note, sizeof note, "worst %.3g", worst);
  record(name, before ? "every operation near the CPU's, later rows" : "every operation near the CPU's",
         cpu->count, bad, note);
  for (size_t i = 0; i < cpu->count; i++) free(cpu->values[i]);
  for (size_t i = 0; i < gpu->count; i++) free(gpu->values[i]);
  free(cpu), free(gpu);
}

/* Generation */

#define REQUESTS 8

static void generate(struct us_executor *ex, size_t vocab, uint32_t block, uint32_t batch, uint32_t tokens,
                     float temperature, struct us_result *results) {
  static int32_t prompts[REQUESTS][90];
  struct us_request requests[REQUESTS];
  struct us_err err = {0};
  for (uint32_t i = 0; i < REQUESTS; i++) {
    for (uint32_t j = 0; j < 90; j++) prompts[i][j] = (int32_t)((i * 7919u + j * 104729u) % vocab);
    requests[i] = (struct us_request){.prompt = prompts[i],
                                      .prompt_count = 10 + 11 * i,
                                      .sampling = {.temperature = temperature, .top_p = 1.0f},
                                      .seed = 3 + i,
                                      .samples = i == 2 ? 3 : 1,
                                      .max_tokens = tokens};
  }
  struct us_generate_options options = {.block = block, .batch = batch};
  need(us_generate(ex, requests, REQUESTS, &options, results, NULL, &err), &err, "generate");
}

static uint64_t differing(const struct us_result *a, const struct us_result *b) {
  uint64_t bad = 0;
  for (uint32_t i = 0; i < REQUESTS; i++)
    for (uint32_t s = 0; s < a[i].samples; s++) {
      const struct us_ids *x = &a[i].outputs[s].ids, *y = &b[i].outputs[s].ids;
      bad += x->count != y->count || memcmp(x->ids, y->ids, x->count * sizeof *x->ids);
    }
  return bad;
}

static void release(struct us_result *results) {
  for (uint32_t i = 0; i < REQUESTS; i++) us_result_release(&results[i]);
}

/* Speculative equals plain: blocks 1 to the drafter's, batches 1 to 8, greedy and drawn. */
static void check_generation(const struct models *m, const char *name, struct us_executor *ex,
                             uint32_t tokens) {
  static const struct {
    uint32_t block, batch;
    float temperature;
  } runs[] = {{1, 8, 0}, {2, 1, 0},  {8, 1, 0}, {16, 1, 0}, {5, 3, 0},
              {8, 8, 0}, {16, 8, 0}, {1, 8, 1}, {8, 4, 1}};
  size_t vocab = m->model->shape.vocab;
  struct us_result plain[2][REQUESTS], other[REQUESTS];
  uint64_t bad = 0, runs_done = 0;
  for (int t = 0; t < 2; t++) generate(ex, vocab, 1, 1, tokens, (float)t, plain[t]);
  for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
    uint32_t most = m->draft->shape.block, block = runs[i].block < most ? runs[i].block : most;
    generate(ex, vocab, block, runs[i].batch, tokens, runs[i].temperature, other);
    bad += differing(plain[runs[i].temperature > 0], other), runs_done++;
    release(other);
  }
  record(name, "speculative equals plain, any block and batch", runs_done * REQUESTS, bad, "");
  release(plain[0]), release(plain[1]);
}

/* Cases */

/* The bound must tell a mistake from rounding: the CPU with one, against itself. */
static void check_bound(const struct models *m, const struct trace *cpu) {
  struct us_attention_shape *swa = &m->model->shape.swa;
  float *sink = m->model->layers[1].sink, kept = sink[0];
  double theta = swa->rope_theta;
  for (int i = 0; i < 2; i++) {
    sink[0] = i == 0 ? -INFINITY : kept; /* one head of one layer without its sink */
    swa->rope_theta = i == 1 ? m->model->shape.full.rope_theta : theta;
    struct trace wrong = run_script(m, m->cpu, NULL);
    struct verdict v = compare(m, cpu, &wrong);
    char note[64];
    snprintf(note, sizeof note, "worst %.3g, %llu near-ties", v.worst, (unsigned long long)v.ties);
    record(m->name, i ? "the other kind's theta is outside the bound" : "a dropped sink is outside the bound",
           v.rows, v.over == 0, note);
    drop_trace(&wrong);
  }
  sink[0] = kept, swa->rope_theta = theta;
}

static void run_case(const struct models *m, uint32_t gpus, uint32_t ranks, bool observed) {
  char name[64];
  struct us_executor_cuda_options options = {.gpus = gpus, .ranks = ranks};
  snprintf(name, sizeof name, "%s, %u rank%s on %u GPU%s", m->name, ranks, ranks > 1 ? "s" : "", gpus,
           gpus > 1 ? "s" : "");
  struct trace cpu = run_script(m, m->cpu, NULL);
  if (ranks == 1) check_bound(m, &cpu);
  struct us_executor *ex = open_cuda(m, &options);
  struct trace engine = run_script(m, ex, &cpu);
  compare_traces(m, name, &cpu, &engine);
  struct trace again = run_script(m, ex, &cpu);
  compare_bits(m, name, "a second run gives the same bits", &engine, &again);
  for (uint32_t before = 0; observed && before <= 20; before += 20) compare_ops(m, name, ex, before);
  check_generation(m, name, ex, 24);
  ex->ops->free(ex);
  options.mode = US_DEVICE_GRAPH;
  ex = open_cuda(m, &options);
  struct trace graph = run_script(m, ex, &cpu);
  compare_bits(m, name, "graph equals engine", &engine, &graph);
  ex->ops->free(ex);
  options.mode = US_DEVICE_ENGINE, options.jitter = 3000;
  ex = open_cuda(m, &options);
  struct trace late = run_script(m, ex, &cpu);
  compare_bits(m, name, "random delays change nothing", &engine, &late);
  ex->ops->free(ex);
  drop_trace(&cpu), drop_trace(&engine), drop_trace(&again), drop_trace(&graph), drop_trace(&late);
}

/* Where the GPU's greedy text leaves the CPU's, the CPU's two best logits must nearly tie. */
static uint64_t unexplained(const struct models *m, const int32_t *prompt, size_t prompt_count,
                            const struct us_ids *cpu, const struct us_ids *gpu, size_t *ret_same) {
  size_t N = m->model->shape.vocab, same = 0;
  while (same < cpu->count && same < gpu->count && cpu->ids[same] == gpu->ids[same]) same++;
  *ret_same += same;
  if (same == cpu->count && same == gpu->count) return 0;
  size_t R = prompt_count + same;
  struct us_row *rows = take(R, sizeof *rows);
  float *logits = take(R * N, sizeof *logits);
  uint8_t *want = take(R, 1);
  struct us_kv_spec spec = us_kv_spec_of(&m->model->shape);
  struct us_kv *kv;
  struct us_err err = {0};
  need(us_kv_create(&spec, (uint32_t)R, US_KV_BF16, &kv, &err), &err, "cache");
  for (size_t i = 0; i < R; i++)
    rows[i] = (struct us_row){i < prompt_count ? prompt[i] : cpu->ids[i - prompt_count], (uint32_t)i, kv};
  want[R - 1] = 1;
  struct us_pass p = {.rows = rows, .R = R, .logits = logits, .want_logits = want};
  need(m->cpu->ops->forward(m->cpu, &p, &err), &err, "forward");
  const float *row = logits + (R - 1) * N;
  double gap = fabs((double)row[cpu->ids[same]] - (double)row[gpu->ids[same]]);
  double bound = 2.0 * bound_of(m->model->shape.layers) * row_scale(row, N);
  us_kv_free(kv);
  free(rows), free(logits), free(want);
  return gap > bound;
}

/* Logits against the CPU's and no more: for models whose CPU passes are long, or whose near-ties are many. */
static void run_oracle(const struct models *m, uint32_t ranks) {
  char name[64];
  snprintf(name, sizeof name, "%s, %u rank%s", m->name, ranks, ranks > 1 ? "s" : "");
  struct trace cpu = run_script(m, m->cpu, NULL);
  struct us_executor *ex = open_cuda(m, &(struct us_executor_cuda_options){.ranks = ranks});
  struct trace gpu = run_script(m, ex, &cpu);
  compare_traces(m, name, &cpu, &gpu);
  ex->ops->free(ex);
  drop_trace(&cpu), drop_trace(&gpu);
}

static void run_pico(void) {
  struct models m;
  struct us_result cpu[REQUESTS], gpu[REQUESTS];
  if (!open_pico(&m)) return;
  run_oracle(&m, 1);
  struct us_executor *ex = open_cuda(&m, NULL);
  size_t vocab = m.model->shape.vocab, same = 0;
  generate(m.cpu, vocab, 1, 8, 48, 0, cpu);
  generate(ex, vocab, 1, 8, 48, 0, gpu);
  uint64_t bad = 0;
  for (uint32_t i = 0; i < REQUESTS; i++) {
    int32_t prompt[90];
    for (uint32_t j = 0; j < 90; j++) prompt[j] = (int32_t)((i * 7919u + j * 104729u) % vocab);
    bad += unexplained(&m, prompt, 10 + 11 * i, &cpu[i].outputs[0].ids, &gpu[i].outputs[0].ids, &same);
  }
  char note[64];
  snprintf(note, sizeof note, "%zu of %d tokens before the first difference", same, REQUESTS * 48);
  record("pico", "greedy text leaves the CPU's only at near-ties", REQUESTS, bad, note);
  check_generation(&m, "pico", ex, 48);
  release(cpu), release(gpu);
  ex->ops->free(ex);
  close_models(&m);
}

/* A head of the drafter's own in each format, by one and by several ranks: the drafts of the CPU, which are not those of the target's
 * head where the copy is coarser. */
static void run_heads(void) {
  static const struct {
    enum us_format format;
    const char *name;
    uint32_t ranks;
  } cases[] = {{US_FORMAT_MXFP4, "wide, own head in mxfp4", 1},
               {US_FORMAT_MXFP4, "wide, own head in mxfp4", 4},
               {US_FORMAT_FP8, "wide, own head in fp8", 2},
               {US_FORMAT_BF16, "wide, own head in bf16", 8}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct models m = open_random("wide", widen);
    struct trace shared = run_script(&m, m.cpu, NULL);
    give_head(&m, cases[i].format, cases[i].name);
    struct trace own = run_script(&m, m.cpu, NULL);
    size_t bytes = (own.draft_rows - 1) * m.model->shape.vocab * sizeof(float);
    bool differs = memcmp(own.draft_logits, shared.draft_logits, bytes) != 0;
    record(m.name, "drafts are those of the target's head where that is bf16, and only there", own.draft_rows,
           differs == (cases[i].format == US_FORMAT_BF16), "");
    run_case(&m, 1, cases[i].ranks, false);
    close_models(&m);
    drop_trace(&shared), drop_trace(&own);
  }
}

/* A drafter with a Markov head: its slots follow one another on the GPU as on the CPU. Draws are engine_exact's part. */
static void run_markov(void) {
  struct models m = open_markov("wide, Markov head", widen), plain = open_random("wide", widen);
  struct trace without = run_script(&plain, plain.cpu, NULL), with = run_script(&m, m.cpu, NULL);
  size_t bytes = (with.draft_rows - 1) * m.model->shape.vocab * sizeof(float);
  record(m.name, "drafts are not those of a drafter without", with.draft_rows,
         memcmp(with.draft_logits, without.draft_logits, bytes) == 0, "");
  for (uint32_t ranks = 1; ranks <= MAX_RANKS; ranks *= 2) run_case(&m, 1, ranks, false);
  drop_trace(&without), drop_trace(&with);
  close_models(&m), close_models(&plain);
}

static bool asked(int argc, char **argv, const char *name) {
  for (int i = 1; i < argc; i++)
    if (!strcmp(argv[i], name)) return true;
  return argc == 1;
}

int main(int argc, char **argv) {
  signal(SIGALRM, hung);
  alarm(watchdog_seconds(200));
  static const char *const plain[] = {"tiny", "tiny-pro"};
  for (int i = 0; i < 2; i++) {
    if (!asked(argc, argv, plain[i])) continue;
    struct models m = open_random(plain[i], NULL);
    run_case(&m, 1, 1, true);
    close_models(&m);
  }
  if (asked(argc, argv, "ranks")) {
    struct models m = open_random("wide", widen);
    for (uint32_t ranks = 1; ranks <= MAX_RANKS; ranks *= 2) run_case(&m, 1, ranks, ranks == 2);
    close_models(&m);
  }
  for (uint32_t gpus = 2; gpus <= MAX_RANKS; gpus *= 2) {
    char name[16];
    snprintf(name, sizeof name, "gpus%u", gpus);
    if (argc == 1 || !asked(argc, argv, name)) continue;
    struct models m = open_random("wide", widen);
    run_case(&m, gpus, gpus, false);
    if (gpus < MAX_RANKS) run_case(&m, gpus, 2 * gpus, false);
    close_models(&m);
    m = open_markov("wide, Markov head", widen);
    run_case(&m, gpus, gpus, false);
    close_models(&m);
  }
  if (asked(argc, argv, "heads")) run_heads();
  if (asked(argc, argv, "markov")) run_markov();
  if (asked(argc, argv, "pico")) run_pico();
  if (asked(argc, argv, "pro")) {
    struct models m = open_pro("pro");
    for (uint32_t ranks = 1; ranks <= 4; ranks *= 4) run_oracle(&m, ranks);
    close_models(&m);
  }
  return any_failed ? 1 : 0;
}
