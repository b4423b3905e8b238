/* prefill_parity.c: prompt passes on the GPU against the tile executor on the CPU, and against themselves cut otherwise.
 *
 *   Models | A prompt on the CPU | A prompt on the GPU | Comparison | Bits | Cases
 *
 * Usage: prefill_parity [CASE...], of tiny-pro, wide, ranks. Exit 0, 1, 5, 77.
 *
 * Bound, as engine_parity.c derives it: both sides round at the same points, a value is equal or, one in 16 at most, one bf16 step
 * off; over n roundings on the way to a logit that is sqrt(n / 16) 2^-8 of its row's scale, 6 deviations for all that are looked
 * at. A row that chooses an expert by less than 2^-5 of a score may choose another, and is not compared, nor are those after it.
 */
#include "device/prefill.h"
#include "model/random.h"
#include "parity.h"
#include "plan/tiles.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <signal.h>

#define ROWS      200
#define PROMPTS   4
#define POSITIONS 400

/* Models */

struct models {
  const char *name;
  struct us_model *model;
  struct us_draft *draft;
  struct us_pool *pool;
  struct us_executor *cpu;
  uint32_t prompt; /* which tokens */
};

/* Room for 8 ranks, other formats, and K wide enough for split products. A rank of 8 has one chunk of FP8's qkv; one rank alone
 * would have chunks that do not end where tiles do. */
static void widen(struct us_shape *s, uint32_t ranks) {
  snprintf(s->name, sizeof s->name, "wide");
  s->hidden = 512, s->dense_inner = 1024, s->expert_inner = 256;
  s->full.q_heads = s->swa.q_heads = 16, s->full.kv_heads = s->swa.kv_heads = 8;
  s->full.v_dim = s->swa.v_dim = 32;
  s->qkv_chunks = 8;
  s->precision.experts = US_FORMAT_MXFP4, s->precision.qkv = ranks == 8 ? US_FORMAT_FP8 : US_FORMAT_MXFP4;
  s->precision.dense = US_FORMAT_FP8;
}

/* Choice of experts is spread out, so that near-ties are rare; scores still decide between neighbours. */
static void spread_router(struct us_model *m) {
  uint32_t word = 12345;
  for (uint32_t l = 0; l < m->shape.layers; l++)
    for (uint32_t e = 0; m->layers[l].router_bias && e < m->shape.experts; e++) {
      word = word * 1664525u + 1013904223u;
      m->layers[l].router_bias[e] = (float)(word >> 16) * 0x1p-15f;
    }
}

static struct models open_models(const char *name, bool wide, uint32_t ranks) {
  struct models m = {.name = name};
  struct us_shape shape;
  struct us_err err = {0};
  need(us_shape_load("tiny-pro", &shape, &err), &err, name);
  if (wide) widen(&shape, ranks);
  struct us_draft_shape draft = draft_shape(&shape, wide ? 8 : 2, 8);
  need(us_pool_create(0, &m.pool, &err), &err, name);
  need(us_shape_check(&shape, &err), &err, name);
  need(us_model_random(&shape, 5, m.pool, &m.model, &err), &err, name);
  need(us_draft_random(&draft, US_FORMAT_BF16, 6, m.pool, &m.draft, &err), &err, name);
  spread_router(m.model);
  need(us_executor_create_tiles(m.model, m.draft, m.pool, US_ROUND_BF16, &m.cpu, &err), &err, name);
  return m;
}

static void close_models(struct models *m) {
  m->cpu->ops->free(m->cpu);
  us_draft_free(m->draft);
  us_model_free(m->model);
  us_pool_free(m->pool);
}

static int32_t token_at(const struct models *m, uint32_t position) {
  return (int32_t)(((position + m->prompt * 1000003u) * 2654435761u >> 5) % m->model->shape.vocab);
}

static size_t tap_width(const struct models *m) {
  return (size_t)m->draft->shape.taps * m->model->shape.hidden;
}

/* A prompt on the CPU */

/* What every row gives; keys and values of the drafter's context (layer, position, head, [K | V]) in its ring. */
struct trace {
  float *logits, *taps, *router; /* (rows, N), (rows, taps * D), (rows, L, E): the CPU's */
  uint32_t *routed;              /* (rows, L, K) */
  float *keys, *draft_keys;      /* (L, ROWS, G, Q + V) and the drafter's: those that the caches hold */
};

static size_t keys_size(const struct us_attention_shape *a, uint32_t layers) {
  return (size_t)layers * ROWS * a->kv_heads * (a->qk_dim + a->v_dim);
}

static struct trace new_trace(const struct models *m) {
  const struct us_shape *s = &m->model->shape;
  return (struct trace){
      .logits = take((size_t)ROWS * s->vocab, sizeof(float)),
      .taps = take(ROWS * tap_width(m), sizeof(float)),
      .router = take((size_t)ROWS * s->layers * s->experts, sizeof(float)),
      .routed = take((size_t)ROWS * s->layers * s->top_k, sizeof(uint32_t)),
      .keys = take(keys_size(&s->full, s->layers), sizeof(float)),
      .draft_keys = take(keys_size(&m->draft->shape.attention, m->draft->shape.layers), sizeof(float))};
}

static void drop_trace(struct trace *t) {
  free(t->logits), free(t->taps), free(t->router), free(t->routed), free(t->keys), free(t->draft_keys);
}

struct watch {
  const struct models *m;
  struct trace *out;
};

static bool keep_router(void *arg, const char *op, uint32_t layer, const float *values, size_t R,
                        size_t width) {
  const struct watch *w = arg;
  uint32_t layers = w->m->model->shape.layers;
  for (size_t r = 0; !strcmp(op, "router") && r < R; r++)
    memcpy(w->out->router + (r * layers + layer) * width, values + r * width, width * sizeof *values);
  return true;
}

/* First position that the next row of a layer sees: what comes before may be gone. */
static uint32_t held_from(const struct us_attention_shape *a) {
  return a->window && ROWS + 1 > a->window ? ROWS + 1 - a->window : 0;
}

static void read_keys(const struct us_kv *kv, const struct us_attention_shape *a, uint32_t layer,
                      float *keys) {
  size_t width = a->qk_dim + a->v_dim;
  for (uint32_t p = held_from(a); p < ROWS; p++)
    for (uint32_t g = 0; g < a->kv_heads; g++) {
      float *at = keys + (((size_t)layer * ROWS + p) * a->kv_heads + g) * width;
      us_kv_read_k(kv, layer, p, g, at);
      us_kv_read_v(kv, layer, p, g, at + a->qk_dim);
    }
}

static struct trace run_cpu(const struct models *m) {
  const struct us_shape *shape = &m->model->shape;
  const struct us_draft_shape *draft = &m->draft->shape;
  struct trace t = new_trace(m);
  struct us_kv *kv, *draft_kv;
  struct us_kv_spec spec = us_kv_spec_of(shape), draft_spec = us_kv_spec_of_draft(draft);
  struct us_row rows[ROWS];
  struct us_err err = {0};
  size_t K = shape->top_k, LK = shape->layers * K;
  uint32_t *routed = take(ROWS * LK, sizeof *routed);
  need(us_kv_create(&spec, POSITIONS, US_KV_BF16, &kv, &err), &err, "cache");
  need(us_kv_create(&draft_spec, POSITIONS, US_KV_BF16, &draft_kv, &err), &err, "cache");
  for (uint32_t r = 0; r < ROWS; r++) rows[r] = (struct us_row){token_at(m, r), r, kv};
  struct watch watch = {m, &t};
  struct us_observer observer = {keep_router, &watch};
  struct us_pass pass = {.rows = rows,
                         .R = ROWS,
                         .logits = t.logits,
                         .taps = t.taps,
                         .routed = routed,
                         .observer = &observer,
                         .prefill = true};
  need(m->cpu->ops->forward(m->cpu, &pass, &err), &err, "forward");
  struct us_draft_context context = {.kv = draft_kv, .position = 0, .R = ROWS, .taps = t.taps};
  need(m->cpu->ops->draft_context(m->cpu, &context, &err), &err, "context");
  for (uint32_t r = 0; r < ROWS; r++)
    for (uint32_t l = 0; l < shape->layers; l++)
      memcpy(t.routed + r * LK + l * K, routed + (l * ROWS + r) * K, K * sizeof *routed);
  for (uint32_t l = 0; l < shape->layers; l++) read_keys(kv, us_shape_attention(shape, l), l, t.keys);
  for (uint32_t l = 0; l < draft->layers; l++) read_keys(draft_kv, &draft->attention, l, t.draft_keys);
  free(routed);
  us_kv_free(kv), us_kv_free(draft_kv);
  return t;
}

/* A prompt on the GPU */

struct gpu {
  const struct models *m;
  struct us_devices *devices;
  struct us_device_weights *weights[US_ENGINE_MAX_RANKS];
  struct us_kv_pool *pool, *draft_pool;
  struct us_device_prefill *prefill;
};

static struct us_kv_pool *open_pool(struct us_devices *devices, const struct us_kv_spec *spec) {
  struct us_kv_pool_options options = {.positions = POSITIONS};
  struct us_kv_pool *pool;
  struct us_err err = {0};
  us_kv_pool_need(spec, POSITIONS, 2, options.pages);
  need(us_kv_pool_create(devices, spec, &options, &pool, &err), &err, "pool");
  return pool;
}

static struct gpu open_gpu(const struct models *m, uint32_t ranks) {
  struct gpu g = {.m = m};
  struct us_err err = {0};
  struct us_kv_spec spec = us_kv_spec_of(&m->model->shape), draft = us_kv_spec_of_draft(&m->draft->shape);
  need(us_devices_open(0, 1, ranks, &g.devices, &err), &err, "GPU");
  for (uint32_t r = 0; r < ranks; r++) {
    struct us_device_weights_options options = {.device = 0, .rank = r, .ranks = ranks};
    need(us_device_weights_load(m->model, m->draft, &options, &g.weights[r], &err), &err, "weights");
  }
  g.pool = open_pool(g.devices, &spec), g.draft_pool = open_pool(g.devices, &draft);
  struct us_device_prefill_options options = {.rows = ROWS, .logit_rows = ROWS, .max_positions = POSITIONS};
  uint64_t bytes;
  need(us_device_prefill_bytes(&m->model->shape, &m->draft->shape, ranks, &options, &bytes, &err), &err,
       "bytes");
  need(us_device_prefill_create(g.devices, g.weights, &options, &g.prefill, &err), &err, "prefill");
  us_device_prefill_caches(g.prefill, g.pool, g.draft_pool);
  return g;
}

static void close_gpu(struct gpu *g) {
  us_device_prefill_free(g->prefill);
  us_kv_pool_free(g->pool), us_kv_pool_free(g->draft_pool);
  for (uint32_t r = 0; r < g->devices->ranks; r++) us_device_weights_free(g->weights[r]);
  us_devices_close(g->devices);
}

static void download(void *to, const void *from, size_t bytes) {
  struct us_err err = {0};
  need(us_cuda_status((int)cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy", &err), &err,
       "results");
}

static float bf16(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
}

/* Keys and values of one layer from all ranks' pages. */
static void fetch_keys(const struct gpu *g, const struct us_kv_pool *pool, const struct us_kv *kv,
                       const struct us_attention_shape *a, uint32_t layer, float *keys) {
  uint32_t ranks = g->devices->ranks, G = a->kv_heads / ranks, Q = a->qk_dim, V = a->v_dim,
           stride = us_engine_k_stride(Q);
  size_t bytes = us_engine_page_bytes(G, Q, V);
  uint8_t *page = take(bytes, 1);
  for (uint32_t tile = held_from(a) / US_KV_PAGE; tile <= (ROWS - 1) / US_KV_PAGE; tile++)
    for (uint32_t r = 0; r < ranks; r++) {
      uint64_t place = us_kv_place(kv, layer, tile % us_kv_page_count(kv, layer));
      download(page, us_kv_pool_pages(pool, r) + place, bytes);
      const uint16_t *k = (const uint16_t *)page, *v = (const uint16_t *)(page + us_engine_v_offset(G, Q));
      for (uint32_t slot = 0; slot < US_KV_PAGE; slot++) {
        uint32_t p = tile * US_KV_PAGE + slot;
        if (p < held_from(a) || p >= ROWS) continue;
        for (uint32_t h = 0; h < G; h++) {
          float *at = keys + (((size_t)layer * ROWS + p) * a->kv_heads + r * G + h) * (Q + V);
          for (uint32_t d = 0; d < Q; d++) at[d] = bf16(k[(h * US_KV_PAGE + slot) * stride + d]);
          for (uint32_t d = 0; d < V; d++) at[Q + d] = bf16(v[(h * V + d) * US_KV_PAGE + slot]);
        }
      }
    }
  free(page);
}

/* Rows [begin, begin + rows) of the chunk that has just run. */
static void fetch_rows(const struct gpu *g, uint32_t begin, uint32_t rows, struct trace *t) {
  const struct us_shape *s = &g->m->model->shape;
  struct us_err err = {0};
  size_t width = tap_width(g->m), K = s->top_k, LK = s->layers * K;
  need(us_device_prefill_fetch_logits(g->prefill, rows, t->logits + (size_t)begin * s->vocab, &err), &err,
       "logits");
  struct us_device_prefill_result result = us_device_prefill_result(g->prefill, g->devices->ranks - 1);
  uint16_t *features = take(rows * width, sizeof *features);
  uint32_t *routed = take(ROWS * LK, sizeof *routed);
  download(features, result.features, rows * width * sizeof *features);
  download(routed, result.routed, ROWS * LK * sizeof *routed);
  for (size_t i = 0; i < rows * width; i++) t->taps[begin * width + i] = bf16(features[i]) * 0x1p-64f;
  for (uint32_t l = 0; l < s->layers; l++)
    for (uint32_t r = 0; r < rows; r++) {
      uint32_t *to = t->routed + (begin + r) * LK + l * K;
      if (s->moe_layer[l])
        memcpy(to, routed + (l * (size_t)ROWS + r) * K, K * sizeof *to);
      else
        memset(to, 0xff, K * sizeof *to);
    }
  free(features), free(routed);
}

/* The prompt in chunks of these lengths, the last as often as needed. */
static struct trace run_gpu(const struct gpu *g, const uint32_t *lengths, uint32_t count) {
  const struct us_shape *s = &g->m->model->shape;
  const struct us_draft_shape *d = &g->m->draft->shape;
  struct us_kv_spec spec = us_kv_spec_of(s), draft_spec = us_kv_spec_of_draft(d);
  struct trace t = new_trace(g->m);
  struct us_kv *kv, *draft_kv;
  struct us_err err = {0};
  int32_t tokens[ROWS];
  for (uint32_t r = 0; r < ROWS; r++) tokens[r] = token_at(g->m, r);
  need(us_kv_create_in(us_kv_pool_memory(g->pool), &spec, POSITIONS, US_KV_BF16, &kv, &err), &err, "cache");
  need(us_kv_create_in(us_kv_pool_memory(g->draft_pool), &draft_spec, POSITIONS, US_KV_BF16, &draft_kv, &err),
       &err, "cache");
  for (uint32_t begin = 0, i = 0, rows; begin < ROWS; begin += rows) {
    struct us_engine_kv tables[US_ENGINE_MAX_RANKS], draft_tables[US_ENGINE_MAX_RANKS];
    rows = lengths[i < count ? i++ : count - 1];
    if (rows > ROWS - begin) rows = ROWS - begin;
    need(us_kv_reserve(kv, begin, rows, &err), &err, "pages");
    need(us_kv_reserve(draft_kv, begin, rows, &err), &err, "pages");
    need(us_kv_pool_tables(g->pool, kv, tables, &err), &err, "tables");
    need(us_kv_pool_tables(g->draft_pool, draft_kv, draft_tables, &err), &err, "tables");
    struct us_device_prefill_chunk chunk = {.tokens = tokens + begin,
                                            .position = begin,
                                            .rows = rows,
                                            .kv = tables,
                                            .opt_draft_kv = draft_tables,
                                            .logits = rows};
    need(us_device_prefill_run(g->prefill, &chunk, &err), &err, "chunk");
    fetch_rows(g, begin, rows, &t);
  }
  for (uint32_t l = 0; l < s->layers; l++) fetch_keys(g, g->pool, kv, us_shape_attention(s, l), l, t.keys);
  for (uint32_t l = 0; l < d->layers; l++)
    fetch_keys(g, g->draft_pool, draft_kv, &d->attention, l, t.draft_keys);
  us_kv_free(kv), us_kv_free(draft_kv);
  return t;
}

/* Comparison */

static double row_error(const float *a, const float *b, size_t n) {
  double worst = 0, sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)a[i] * (double)a[i];
  double scale = sqrt(sum / (double)n);
  for (size_t i = 0; i < n; i++) {
    double e = fabs((double)a[i] - (double)b[i]);
    if (!(e <= worst)) worst = e == e ? e : INFINITY;
  }
  return scale > 0 ? worst / scale : worst;
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

/* Rows before the first that chose other experts than the CPU; *ret_wrong: it had no near-tie. */
static uint32_t rows_alike(const struct models *m, const struct trace *cpu, const struct trace *gpu,
                           bool *ret_wrong) {
  const struct us_shape *s = &m->model->shape;
  size_t K = s->top_k, LK = s->layers * K;
  *ret_wrong = false;
  for (uint32_t r = 0; r < ROWS; r++)
    for (uint32_t l = 0; l < s->layers; l++) {
      if (!memcmp(cpu->routed + r * LK + l * K, gpu->routed + r * LK + l * K, K * sizeof(uint32_t))) continue;
      *ret_wrong = gap_of(m, cpu, r, l) > 0x1p-5;
      return r;
    }
  return ROWS;
}

/* The same of values stored in bf16: one step, 2^-7 of a value, is no error. */
static double stored_error(const float *a, const float *b, size_t n) {
  double worst = 0, sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)a[i] * (double)a[i];
  double scale = sqrt(sum / (double)n);
  for (size_t i = 0; i < n; i++) {
    double e = fabs((double)a[i] - (double)b[i]) - 0x1p-7 * fabs((double)a[i]);
    if (!(e <= worst)) worst = e == e ? e : INFINITY;
  }
  return scale > 0 ? worst / scale : worst;
}

/* Rows before `rows`, all their heads, that lie beyond the bound. */
static uint64_t compare_keys(const struct us_attention_shape *a, uint32_t layer, const float *cpu,
                             const float *gpu, uint32_t rows, double bound, double *worst) {
  uint64_t over = 0;
  size_t width = (size_t)a->kv_heads * (a->qk_dim + a->v_dim);
  for (uint32_t p = held_from(a); p < rows; p++) {
    size_t at = ((size_t)layer * ROWS + p) * width;
    double e = stored_error(cpu + at, gpu + at, width);
    over += e > bound;
    if (e > *worst) *worst = e;
  }
  return over;
}

struct verdict {
  uint64_t rows, over, over_keys, wrong; /* wrong: choices that differ without a near-tie */
  double worst, taps, keys, context;
};

static void most(double *to, double value) {
  if (!(value <= *to)) *to = value;
}

static void compare(const struct models *m, const struct trace *cpu, const struct trace *gpu, double bound,
                    struct verdict *v) {
  const struct us_shape *s = &m->model->shape;
  const struct us_draft_shape *d = &m->draft->shape;
  bool wrong;
  uint32_t rows = rows_alike(m, cpu, gpu, &wrong);
  size_t width = tap_width(m);
  v->rows += rows, v->wrong += wrong;
  for (uint32_t r = 0; r < rows; r++) {
    double e = row_error(cpu->logits + (size_t)r * s->vocab, gpu->logits + (size_t)r * s->vocab, s->vocab);
    double t = row_error(cpu->taps + r * width, gpu->taps + r * width, width);
    v->over += e > bound || t > bound;
    most(&v->worst, e), most(&v->taps, t);
  }
  for (uint32_t l = 0; l < s->layers; l++)
    v->over_keys += compare_keys(us_shape_attention(s, l), l, cpu->keys, gpu->keys, rows, bound, &v->keys);
  for (uint32_t l = 0; l < d->layers; l++)
    v->over_keys +=
        compare_keys(&d->attention, l, cpu->draft_keys, gpu->draft_keys, rows, bound, &v->context);
}

static void record_verdict(const char *name, const struct verdict *v, double bound) {
  char note[192];
  snprintf(note, sizeof note, "worst %.3g, taps %.3g, keys and values %.3g, context %.3g, of %.3g", v->worst,
           v->taps, v->keys, v->context, bound);
  record(name, "logits and taps within the bound", v->rows, v->over, note);
  record(name, "keys, values and drafter context within the bound", v->rows, v->over_keys, "");
  record(name, "choices that differ are near-ties", PROMPTS, v->wrong, "");
  record(name, "a quarter of the rows compared", PROMPTS * ROWS, v->rows * 4 < PROMPTS * ROWS, "");
}

/* Bits */

static void compare_bits(const struct models *m, const char *name, const char *check, const struct trace *a,
                         const struct trace *b) {
  const struct us_shape *s = &m->model->shape;
  const struct us_draft_shape *d = &m->draft->shape;
  size_t LK = (size_t)s->layers * s->top_k;
  uint64_t bad = 0;
  for (size_t r = 0; r < ROWS; r++)
    bad += memcmp(a->logits + r * s->vocab, b->logits + r * s->vocab, s->vocab * sizeof(float)) ||
           memcmp(a->taps + r * tap_width(m), b->taps + r * tap_width(m), tap_width(m) * sizeof(float)) ||
           memcmp(a->routed + r * LK, b->routed + r * LK, LK * sizeof(uint32_t));
  bad += memcmp(a->keys, b->keys, keys_size(&s->full, s->layers) * sizeof(float)) != 0;
  bad += memcmp(a->draft_keys, b->draft_keys, keys_size(&d->attention, d->layers) * sizeof(float)) != 0;
  record(name, check, ROWS, bad, "");
}

/* Cases */

static void run_case(const char *name, bool wide, uint32_t ranks) {
  static const uint32_t whole[] = {ROWS}, pieces[] = {1, 70, 3, 64, 1, 33, 8};
  struct models m = open_models(name, wide, ranks);
  struct gpu g = open_gpu(&m, ranks);
  struct verdict v = {0};
  double bound = 6.0 * sqrt((6.0 * m.model->shape.layers + 2.0) / 16.0) * 0x1p-8;
  for (m.prompt = 0; m.prompt < PROMPTS; m.prompt++) {
    struct trace cpu = run_cpu(&m), one = run_gpu(&g, whole, 1), cut = run_gpu(&g, pieces, 7);
    compare(&m, &cpu, &one, bound, &v);
    compare_bits(&m, name, "the same bits in other chunks", &one, &cut);
    drop_trace(&cpu), drop_trace(&one), drop_trace(&cut);
  }
  record_verdict(name, &v, bound);
  close_gpu(&g);
  close_models(&m);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    bool wide;
    uint32_t ranks;
  } cases[] = {{"tiny-pro", false, 1}, {"wide", true, 1}, {"ranks", true, 8}};
  signal(SIGALRM, hung);
  alarm(90);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    bool wanted = argc <= 1;
    for (int a = 1; a < argc; a++) wanted = wanted || !strcmp(argv[a], cases[i].name);
    if (wanted) run_case(cases[i].name, cases[i].wide, cases[i].ranks);
  }
  return any_failed ? 1 : 0;
}
