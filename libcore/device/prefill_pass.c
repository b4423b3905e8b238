/* prefill_pass.c: the operations of a chunk, layer after layer, on every rank.
 *
 * Between two waits for the other GPUs a rank only reads what they wrote before, or writes what they read after: partial sums go
 * to the owner of a row (o_proj, experts), rounded rows from it to all (norms). Neither buffer is written again before its
 * readers have passed the next wait.
 *
 * Contents: steps; norms; attention; experts and MLP; head; drafter context; a chunk.
 */
#include "device/prefill_impl.h"

#include "plan/program.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

/* A chunk on its way through one rank. */
struct pass {
  struct us_device_prefill *p;
  const struct us_device_prefill_chunk *chunk;
  uint32_t own; /* rows a rank owns, but the last ones */
  struct us_err *err;
};

/* ---- steps ------------------------------------------------------------------------------------------------------- */

/* One operation of a rank; a cudaError_t. `layer` is US_LAYER_NONE outside of the layers. */
typedef int operation(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream);

static const struct us_device_weights *weights_of(const struct pass *s, uint32_t rank) {
  return s->p->rank[rank].weights;
}

static const struct us_prefill_buffers *buffers_of(const struct pass *s, uint32_t rank) {
  return &s->p->rank[rank].buffers;
}

static enum us_status run(const struct pass *s, operation *step, uint32_t layer, const char *what) {
  const struct us_devices *devices = s->p->devices;
  for (uint32_t rank = 0; rank < devices->ranks; rank++) {
    uint32_t gpu = us_devices_gpu(devices, rank);
    us_devices_use(devices, gpu);
    enum us_status status = us_cuda_status(step(s, rank, layer, devices->stream[gpu]), what, s->err);
    if (status == US_OK) continue;
    return layer == US_LAYER_NONE ? us_err_prefix(s->err, "prompt pass")
                                  : us_err_prefix(s->err, "prompt pass, layer %u", layer);
  }
  return US_OK;
}

/* What every GPU queued so far is done before any goes on. */
static enum us_status meet(const struct pass *s) {
  const struct us_devices *devices = s->p->devices;
  uint32_t each = devices->ranks / devices->gpus;
  int code = cudaSuccess;
  for (uint32_t gpu = 0; !code && devices->gpus > 1 && gpu < devices->gpus; gpu++) {
    us_devices_use(devices, gpu);
    code = (int)cudaEventRecord(s->p->rank[gpu * each].arrived, devices->stream[gpu]);
  }
  for (uint32_t gpu = 0; !code && gpu < devices->gpus; gpu++)
    for (uint32_t other = 0; !code && other < devices->gpus; other++) {
      if (other == gpu) continue;
      us_devices_use(devices, gpu);
      code = (int)cudaStreamWaitEvent(devices->stream[gpu], s->p->rank[other * each].arrived, 0);
    }
  return us_cuda_status(code, "GPUs waiting for each other", s->err);
}

/* out = rows x w of a rank. */
static struct us_prefill_gemm product(const struct us_device_matrix *w, const uint16_t *x, uint32_t rows) {
  return (struct us_prefill_gemm){
      .w = w->pages, .x = x, .x_stride = w->cols, .rows = rows, .parts = 1, .valid = w->rows};
}

/* Partial sums to the owners of the rows. `slot`: of the addends, the first. */
static struct us_prefill_rows to_owners(const struct pass *s, uint32_t slot) {
  uint64_t addend = (uint64_t)s->p->sizes.own_rows * weights_of(s, 0)->shape.hidden;
  struct us_prefill_rows out = {.per_rank = s->own, .stride = weights_of(s, 0)->shape.hidden, .part = addend};
  for (uint32_t r = 0; r < s->p->devices->ranks; r++) out.base[r] = buffers_of(s, r)->sums + slot * addend;
  return out;
}

/* ---- norms ------------------------------------------------------------------------------------------------------- */

/* This rank's rows of the chunk, to every rank's `normed`; weight, sums and taps are the caller's. */
static struct us_prefill_norm norm_rows(const struct pass *s, uint32_t rank) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  uint32_t D = w->shape.hidden, first = rank * s->own,
           left = s->chunk->rows > first ? s->chunk->rows - first : 0;
  struct us_prefill_norm norm = {.rows = left < s->own ? left : s->own,
                                 .first = first,
                                 .D = D,
                                 .ranks = w->ranks,
                                 .residual = b->residual,
                                 .sums = b->sums,
                                 .addend = (uint64_t)s->p->sizes.own_rows * D,
                                 .eps = (float)w->shape.norm_eps,
                                 .out_stride = D,
                                 .tap_stride = w->draft_shape.taps * D};
  for (uint32_t r = 0; r < w->ranks; r++) norm.out[r] = buffers_of(s, r)->normed;
  return norm;
}

static int embed(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  struct us_prefill_norm norm = norm_rows(s, rank);
  int code = (int)cudaMemcpyAsync(b->tokens, s->chunk->tokens, s->chunk->rows * sizeof(int32_t),
                                  cudaMemcpyHostToDevice, stream);
  norm.opt_tokens = b->tokens + norm.first;
  norm.embed_rows = w->embed_rows, norm.weight = w->layers[layer].input_norm;
  for (uint32_t r = 0; r < w->ranks; r++) norm.embed[r] = weights_of(s, r)->embed;
  return code ? code : us_prefill_norm(&norm, stream);
}

static int norm_after_attention(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_layer *of = &weights_of(s, rank)->layers[layer];
  struct us_prefill_norm norm = norm_rows(s, rank);
  norm.addends = s->p->devices->ranks * us_prefill_parts(&of->o_proj.pages);
  norm.weight = of->post_norm;
  return us_prefill_norm(&norm, stream);
}

/* The layer's output is tapped where the drafter wants it; the norm is the next layer's, or the final one. */
static int norm_after_mlp(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  struct us_prefill_norm norm = norm_rows(s, rank);
  bool moe = w->shape.moe_layer[layer];
  norm.addends = w->ranks * (moe ? 1 : us_prefill_parts(&w->layers[layer].down.pages));
  norm.weight = layer + 1 < w->shape.layers ? w->layers[layer + 1].input_norm : w->final_norm;
  for (uint32_t t = 0; w->draft_shape.layers && t < w->draft_shape.taps; t++)
    for (uint32_t r = 0; w->draft_shape.tap_layer[t] == layer && r < w->ranks; r++)
      norm.tap[r] = buffers_of(s, r)->features + (size_t)t * w->shape.hidden;
  return us_prefill_norm(&norm, stream);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static const struct us_attention_shape *attention_of(const struct us_device_weights *w, uint32_t layer) {
  return us_shape_attention(&w->shape, layer);
}

static enum us_prefill_attention_kind kind_of(const struct us_device_weights *w, uint32_t layer) {
  return w->shape.swa_layer[layer] ? US_PREFILL_WINDOWED : US_PREFILL_FULL;
}

static int qkv(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  struct us_prefill_gemm g = product(&weights_of(s, rank)->layers[layer].qkv, b->normed, s->chunk->rows);
  g.out = us_prefill_local(b->qkv, s->p->sizes.qkv_stride);
  return us_prefill_gemm(&g, stream);
}

/* Pages of a target layer; `staged`: those of a windowed layer's chunk in the staging memory, since its ring has no room for
 * what the chunk's first rows still see. */
static struct us_prefill_cache cache_of(const struct pass *s, uint32_t rank, uint32_t layer, bool staged) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_attention_shape *a = attention_of(w, layer);
  return (struct us_prefill_cache){.pool = s->p->rank[rank].pool,
                                   .tables = s->chunk->kv[rank].tables,
                                   .layer = layer,
                                   .page_count = us_kv_pages_of(a, s->p->options.max_positions),
                                   .G = (uint16_t)(a->kv_heads / w->ranks),
                                   .Q = (uint16_t)a->qk_dim,
                                   .V = (uint16_t)a->v_dim,
                                   .opt_staging = staged && a->window ? buffers_of(s, rank)->staging : NULL,
                                   .first_tile = s->chunk->position / US_KV_PAGE};
}

static int append(const struct pass *s, uint32_t rank, uint32_t layer, bool staged, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_attention_shape *a = attention_of(w, layer);
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  uint32_t Q = a->qk_dim;
  struct us_prefill_append args = {.cache = cache_of(s, rank, layer, staged),
                                   .kv = b->qkv + a->q_heads / w->ranks * Q,
                                   .stride = s->p->sizes.qkv_stride,
                                   .v_first = a->kv_heads / w->ranks * Q,
                                   .rows = s->chunk->rows,
                                   .position = s->chunk->position,
                                   .rope = b->rope[kind_of(w, layer)],
                                   .rotary = a->rotary_dim,
                                   .value_scale = (float)w->shape.value_scale,
                                   .eps = (float)w->shape.norm_eps};
  return us_prefill_append(&args, stream);
}

/* Keys and values of the rows first, then the rows; a windowed layer keeps its last pages afterwards. */
static int attention(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_attention_shape *a = attention_of(w, layer);
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  struct us_prefill_attention args = {.cache = cache_of(s, rank, layer, true),
                                      .q = b->qkv,
                                      .stride = s->p->sizes.qkv_stride,
                                      .rows = s->chunk->rows,
                                      .position = s->chunk->position,
                                      .H = a->q_heads / w->ranks,
                                      .rope = b->rope[kind_of(w, layer)],
                                      .rotary = a->rotary_dim,
                                      .opt_sink = a->sink ? w->layers[layer].sink : NULL,
                                      .window = a->window,
                                      .scale = (float)(1.0 / sqrt(a->qk_dim)),
                                      .out = b->attended};
  int code = append(s, rank, layer, true, stream);
  if (!code) code = us_prefill_attention(&args, stream);
  return code || !a->window ? code : append(s, rank, layer, false, stream);
}

static int o_proj(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_matrix *w = &weights_of(s, rank)->layers[layer].o_proj;
  struct us_prefill_gemm g = product(w, buffers_of(s, rank)->attended, s->chunk->rows);
  g.parts = us_prefill_parts(&w->pages);
  g.out = to_owners(s, rank * g.parts);
  return us_prefill_gemm(&g, stream);
}

/* ---- experts and MLP --------------------------------------------------------------------------------------------- */

static int dense(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_layer *of = &weights_of(s, rank)->layers[layer];
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  struct us_prefill_gemm up = product(&of->up, b->normed, s->chunk->rows);
  up.opt_swiglu = b->inner, up.swiglu_stride = of->down.cols;
  int code = us_prefill_gemm(&up, stream);
  struct us_prefill_gemm down = product(&of->down, b->inner, s->chunk->rows);
  down.parts = us_prefill_parts(&of->down.pages);
  down.out = to_owners(s, rank * down.parts);
  return code ? code : us_prefill_gemm(&down, stream);
}

static int route(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_device_layer *of = &w->layers[layer];
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  uint32_t E = w->shape.experts, K = w->shape.top_k, rows = s->chunk->rows;
  struct us_prefill_gemm g = product(&of->router, b->normed, rows);
  g.parts = us_prefill_parts(&of->router.pages);
  g.out = us_prefill_local(b->router, E), g.out.part = (uint64_t)rows * E;
  int code = us_prefill_gemm(&g, stream);
  struct us_prefill_route args = {.logits = b->router,
                                  .opt_bias = of->router_bias,
                                  .rows = rows,
                                  .parts = g.parts,
                                  .stride = E,
                                  .E = E,
                                  .top_k = K,
                                  .part = (uint64_t)rows * E,
                                  .scaling = (float)w->shape.routed_scaling,
                                  .normalise = w->shape.norm_topk_prob,
                                  .uniform = s->p->options.uniform,
                                  .uniform_seed = s->p->options.uniform_seed,
                                  .position = s->chunk->position,
                                  .layer = layer,
                                  .ids = b->routed + (size_t)layer * s->p->options.rows * K,
                                  .weights = b->weights,
                                  .groups = b->groups};
  return code ? code : us_prefill_route(&args, stream);
}

static int experts(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_device_layer *of = &w->layers[layer];
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  uint32_t rows = s->chunk->rows;
  int code = route(s, rank, layer, stream);
  struct us_prefill_gemm up = product(&of->up, b->normed, rows), down = product(&of->down, b->inner, rows);
  up.opt_swiglu = b->inner, up.swiglu_stride = of->down.cols, up.opt_gather = b->groups.row;
  down.out = us_prefill_local(b->pairs, w->shape.hidden), down.opt_scatter = b->groups.pair;
  up.opt_experts = down.opt_experts = &b->groups;
  if (!code) code = us_prefill_gemm(&up, stream);
  if (!code) code = us_prefill_gemm(&down, stream);
  struct us_prefill_combine combine = {b->pairs,       b->weights,      rows,
                                       w->shape.top_k, w->shape.hidden, to_owners(s, rank)};
  return code ? code : us_prefill_combine(&combine, stream);
}

static int mlp(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  return weights_of(s, rank)->shape.moe_layer[layer] ? experts(s, rank, layer, stream)
                                                     : dense(s, rank, layer, stream);
}

/* ---- head -------------------------------------------------------------------------------------------------------- */

static int head(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  size_t first = s->chunk->rows - s->chunk->logits;
  struct us_prefill_gemm g = product(&w->head, b->normed + first * w->shape.hidden, s->chunk->logits);
  g.out = us_prefill_local(b->logits, s->p->sizes.logits_stride);
  return w->head.rows ? us_prefill_gemm(&g, stream)
                      : cudaSuccess; /* the last ranks' share of a small vocabulary is empty */
}

/* ---- drafter context --------------------------------------------------------------------------------------------- */

static int context_fc(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  struct us_prefill_gemm g = product(&w->draft_fc, buffers_of(s, rank)->features, s->chunk->rows);
  g.parts = us_prefill_parts(&w->draft_fc.pages);
  g.out = to_owners(s, 0), g.out.first = rank * w->draft_fc.rows;
  return us_prefill_gemm(&g, stream);
}

static int context_norm(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  struct us_prefill_norm norm = norm_rows(s, rank);
  norm.addends = us_prefill_parts(&w->draft_fc.pages), norm.replace = true;
  norm.weight = w->draft_hidden_norm, norm.eps = (float)w->draft_shape.norm_eps;
  return us_prefill_norm(&norm, stream);
}

/* K and V of all layers, layer after layer, in one product. */
static int context_kv(const struct pass *s, uint32_t rank, uint32_t layer, cudaStream_t stream) {
  const struct us_device_weights *w = weights_of(s, rank);
  const struct us_attention_shape *a = &w->draft_shape.attention;
  const struct us_prefill_buffers *b = buffers_of(s, rank);
  uint32_t G = a->kv_heads / w->ranks, Q = a->qk_dim, V = a->v_dim;
  struct us_prefill_gemm g = product(&w->draft_kv, b->normed, s->chunk->rows);
  g.out = us_prefill_local(b->context, w->draft_kv.rows);
  int code = us_prefill_gemm(&g, stream);
  for (uint32_t l = 0; !code && l < w->draft_shape.layers; l++) {
    struct us_prefill_append args = {.cache = {.pool = s->p->rank[rank].draft_pool,
                                               .tables = s->chunk->opt_draft_kv[rank].tables,
                                               .layer = l,
                                               .page_count = us_kv_pages_of(a, s->p->options.max_positions),
                                               .G = (uint16_t)G,
                                               .Q = (uint16_t)Q,
                                               .V = (uint16_t)V},
                                     .kv = b->context + (size_t)l * G * (Q + V),
                                     .stride = w->draft_kv.rows,
                                     .v_first = G * Q,
                                     .rows = s->chunk->rows,
                                     .position = s->chunk->position,
                                     .rope = b->rope[US_PREFILL_DRAFT],
                                     .rotary = a->rotary_dim,
                                     .opt_k_norm = w->draft_k_norms + (size_t)l * Q,
                                     .value_scale = (float)w->draft_shape.value_scale,
                                     .eps = (float)w->draft_shape.norm_eps};
    code = us_prefill_append(&args, stream);
  }
  return code;
}

/* ---- a chunk ----------------------------------------------------------------------------------------------------- */

struct planned {
  operation *step;
  const char *what;
  bool meet; /* then wait for the others */
};

static enum us_status run_all(const struct pass *s, const struct planned *steps, uint32_t count,
                              uint32_t layer) {
  enum us_status status = US_OK;
  for (uint32_t i = 0; status == US_OK && i < count; i++) {
    status = run(s, steps[i].step, layer, steps[i].what);
    if (status == US_OK && steps[i].meet) status = meet(s);
  }
  return status;
}

static enum us_status run_layer(const struct pass *s, uint32_t layer) {
  static const struct planned steps[] = {
      {qkv, "qkv", false},           {attention, "attention", false},
      {o_proj, "o_proj", true},      {norm_after_attention, "norm after attention", true},
      {mlp, "experts or MLP", true}, {norm_after_mlp, "norm after the MLP", true}};
  return run_all(s, steps, sizeof steps / sizeof *steps, layer);
}

static enum us_status run_context(const struct pass *s) {
  static const struct planned steps[] = {{context_fc, "drafter's fc", true},
                                         {context_norm, "drafter's norm", true},
                                         {context_kv, "drafter's keys and values", false}};
  return run_all(s, steps, sizeof steps / sizeof *steps, US_LAYER_NONE);
}

static enum us_status check_chunk(const struct us_device_prefill *p, const struct us_device_prefill_chunk *c,
                                  struct us_err *err) {
  const struct us_device_prefill_options *o = &p->options;
  uint32_t vocab = p->rank[0].weights->shape.vocab;
  if (!c->rows || c->rows > o->rows)
    return us_err_set(err, US_ERR_USAGE, "a prompt chunk of %u rows; 1 to %u", c->rows, o->rows);
  if (c->logits > c->rows || c->logits > o->logit_rows)
    return us_err_set(err, US_ERR_USAGE, "logits of %u of %u rows; at most %u", c->logits, c->rows,
                      o->logit_rows);
  if (c->position > o->max_positions || c->rows > o->max_positions - c->position)
    return us_err_set(err, US_ERR_USAGE, "rows at %u + %u; %u positions", c->position, c->rows,
                      o->max_positions);
  for (uint32_t r = 0; r < c->rows; r++)
    if (c->tokens[r] < 0 || (uint32_t)c->tokens[r] >= vocab)
      return us_err_set(err, US_ERR_USAGE, "token %d is outside the vocabulary of %u", c->tokens[r], vocab);
  if (c->opt_draft_kv && !p->rank[0].weights->draft_shape.layers)
    return us_err_set(err, US_ERR_USAGE, "drafter context needs a drafter");
  return US_OK;
}

enum us_status us_device_prefill_run(struct us_device_prefill *p, const struct us_device_prefill_chunk *chunk,
                                     struct us_err *err) {
  struct pass s = {p, chunk, (chunk->rows + p->devices->ranks - 1) / p->devices->ranks, err};
  enum us_status status = check_chunk(p, chunk, err);
  /* A rank's first norm writes to all: what they had from the last chunk must be used up. */
  if (status == US_OK) status = meet(&s);
  if (status == US_OK) status = run(&s, embed, 0, "embedding");
  if (status == US_OK) status = meet(&s);
  for (uint32_t l = 0; status == US_OK && l < p->rank[0].weights->shape.layers; l++)
    status = run_layer(&s, l);
  if (status == US_OK && chunk->logits) status = run(&s, head, US_LAYER_NONE, "head");
  if (status == US_OK && chunk->opt_draft_kv) status = run_context(&s);
  return status;
}
