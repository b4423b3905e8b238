/* weights_plan.c: the list of a rank's packed matrices.
 *
 * Contents: items; attention; MLPs; vocabulary; drafter; the whole.
 */
#include "device/weights_plan.h"
#include "device/weights_layout.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- items ------------------------------------------------------------------------------------------------------- */

/* The first problem is kept in `status`, and what follows does nothing. */
struct builder {
  struct us_weights_plan *plan;
  uint32_t rank, ranks;
  enum us_status status;
  struct us_err *err;
};

US_PRINTF(2, 3)
static void fail(struct builder *b, const char *format, ...) {
  char text[US_ERR_MESSAGE_MAX];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (b->status == US_OK) b->status = us_err_set(b->err, US_ERR_USAGE, "%s", text);
}

static uint64_t place(struct builder *b, uint64_t *kind, uint64_t bytes) {
  uint64_t offset = b->plan->arena_bytes, aligned = us_weights_align(bytes);
  b->plan->arena_bytes += aligned;
  *kind += aligned;
  return offset;
}

/* This rank's part of n things. */
static struct us_share share(struct builder *b, const char *what, uint32_t n) {
  if (n % b->ranks) fail(b, "%s: %u cannot be shared by %u ranks", what, n, b->ranks);
  return us_share_of(n, b->rank, b->ranks);
}

/* A new item without gathers, room for `gathers` a source. NULL after a failure. */
US_PRINTF(6, 7)
static struct us_weights_item *new_item(struct builder *b, struct us_device_matrix *to, uint32_t count,
                                        uint32_t matrices, uint32_t gathers, const char *format, ...) {
  if (b->status != US_OK) return NULL;
  struct us_weights_item *item = &b->plan->items[b->plan->item_count];
  size_t n = (size_t)count * matrices * gathers;
  *item = (struct us_weights_item){.count = count, .matrices = matrices, .to = to};
  item->gather = calloc(n, sizeof *item->gather);
  if (!item->gather) {
    b->status = us_err_memory(b->err, "list of weights", n * sizeof *item->gather);
    return NULL;
  }
  b->plan->item_count++;
  va_list args;
  va_start(args, format);
  vsnprintf(item->name, sizeof item->name, format, args);
  va_end(args);
  return item;
}

/* Rows of w after those of the only source so far; one gather with them if they continue. */
static void gather(struct us_weights_item *item, const struct us_matrix *w, uint32_t first, uint32_t rows) {
  struct us_weights_gather *last = item->gathers ? &item->gather[item->gathers - 1] : NULL;
  if (last && last->w == w && last->first + last->rows == first)
    last->rows += rows;
  else
    item->gather[item->gathers++] = (struct us_weights_gather){w, first, rows};
}

/* Every 16 rows of an FP8 source lie in one block of its matrix. */
static bool fp8_rows_fit(const struct us_weights_item *item, const struct us_weights_gather *g) {
  for (uint32_t i = 0; i < item->gathers; i++) {
    if (g[i].rows % US_WEIGHTS_FP8_ROWS && i + 1 < item->gathers) return false;
    for (uint32_t n = 0; n < g[i].rows; n += US_WEIGHTS_FP8_ROWS) {
      uint32_t last = n + US_WEIGHTS_FP8_ROWS <= g[i].rows ? n + US_WEIGHTS_FP8_ROWS - 1 : g[i].rows - 1;
      if (us_matrix_scale_row(g[i].w, g[i].first + n) != us_matrix_scale_row(g[i].w, g[i].first + last))
        return false;
    }
  }
  return true;
}

static void check_sources(struct builder *b, const struct us_weights_item *item) {
  for (uint32_t i = 0; b->status == US_OK && i < item->count * item->matrices; i++) {
    const struct us_weights_gather *g = &item->gather[(size_t)i * item->gathers];
    for (uint32_t j = 0; j < item->gathers; j++)
      if (g[j].w->format != item->pages.format)
        fail(b, "%s: parts in %s and in %s cannot be packed together; convert them", item->name,
             us_format_name(item->pages.format), us_format_name(g[j].w->format));
    if (b->status == US_OK && item->pages.format == US_FORMAT_FP8 && !fp8_rows_fit(item, g))
      fail(b, "%s: its rows cut FP8 blocks inside 16 rows of a tile", item->name);
  }
  if (b->status != US_OK) return;
  struct us_weights_piece whole = {0, 1, 0, us_pages_tiles(&item->pages)};
  struct us_weights_stage stage = us_weights_stage(item, &whole);
  struct us_pages_source source = us_weights_staged(item, &stage, NULL, 0);
  b->status = us_pages_source_check(&item->pages, &source, b->err);
  if (b->status != US_OK) us_err_prefix(b->err, "%s", item->name);
}

/* All gathers are there: pages, place and the engine's description. `cols` of this rank from first_col on. */
static void finish(struct builder *b, struct us_weights_item *item, uint64_t *kind, enum us_weights_use use,
                   uint32_t first_col, uint32_t cols) {
  if (!item || b->status != US_OK) return;
  uint32_t rows = 0;
  for (uint32_t i = 0; i < item->gathers; i++) rows += item->gather[i].rows;
  item->first_col = first_col;
  b->status =
      us_weights_pages(item->gather->w->format, rows * item->matrices, cols, use, &item->pages, b->err);
  if (b->status != US_OK) us_err_prefix(b->err, "%s", item->name);
  check_sources(b, item);
  if (b->status != US_OK) return;
  const struct us_pages *p = &item->pages;
  uint64_t bytes = us_pages_bytes(p);
  *item->to = (struct us_device_matrix){.pages = {.matrix_bytes = bytes,
                                                  .tiles = us_pages_tiles(p),
                                                  .slices = us_pages_slices(p),
                                                  .page_bytes = us_pages_page_bytes(p),
                                                  .groups = (uint16_t)(p->slice_cols / 32),
                                                  .format = (uint8_t)p->format,
                                                  .halves = (uint8_t)us_pages_halves(p)},
                                        .rows = p->rows,
                                        .cols = p->cols,
                                        .bytes = bytes};
  item->offset = place(b, kind, bytes * item->count);
  struct us_weights_piece first = {0};
  (void)us_weights_next(item, &first); /* the first is the largest */
  uint64_t piece = us_weights_stage(item, &first).bytes;
  if (piece > b->plan->piece_bytes) b->plan->piece_bytes = piece;
}

/* One matrix: rows `part` of w, all of its columns. */
static void add_rows(struct builder *b, struct us_device_matrix *to, uint64_t *kind,
                     const struct us_matrix *w, struct us_share part, const char *name) {
  struct us_weights_item *item = new_item(b, to, 1, 1, 1, "%s", name);
  if (item) gather(item, w, part.begin, part.end - part.begin);
  finish(b, item, kind, US_WEIGHTS_PLAIN, 0, (uint32_t)w->cols);
}

/* One matrix: columns `part` of w, all of its rows. */
static void add_cols(struct builder *b, struct us_device_matrix *to, uint64_t *kind,
                     const struct us_matrix *w, struct us_share part, const char *name) {
  struct us_weights_item *item = new_item(b, to, 1, 1, 1, "%s", name);
  if (item) gather(item, w, 0, (uint32_t)w->rows);
  finish(b, item, kind, US_WEIGHTS_PLAIN, part.begin, part.end - part.begin);
}

static void add_vector_at(struct builder *b, float **to, const float *from, uint32_t n, uint64_t offset) {
  b->plan->vectors[b->plan->vector_count++] = (struct us_weights_vector){to, from, n, offset};
}

static void add_vector(struct builder *b, float **to, const float *from, uint32_t n) {
  add_vector_at(b, to, from, n, place(b, &b->plan->weights->bytes.vectors, n * sizeof(float)));
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

/* One of the three groups of heads of this rank: from the fused projection, or a matrix of its own. */
static void gather_heads(struct us_weights_item *item, const struct us_matrix *fused,
                         const struct us_matrix *split, const struct us_attention_shape *a, uint32_t chunks,
                         struct us_share heads, uint32_t dim,
                         uint32_t (*row)(const struct us_attention_shape *, uint32_t, uint32_t)) {
  if (!chunks) {
    gather(item, split, heads.begin * dim, (heads.end - heads.begin) * dim);
    return;
  }
  for (uint32_t h = heads.begin; h < heads.end; h++) gather(item, fused, row(a, chunks, h), dim);
}

static void add_attention(struct builder *b, const struct us_layer *from, uint32_t l,
                          const struct us_shape *s) {
  const struct us_attention_shape *a = us_shape_attention(s, l);
  struct us_device_layer *to = &b->plan->weights->layers[l];
  uint64_t *kind = &b->plan->weights->bytes.attention;
  struct us_share kv = share(b, "KV heads", a->kv_heads), q = us_share_of(a->q_heads, b->rank, b->ranks);
  struct us_weights_item *item =
      new_item(b, &to->qkv, 1, 1, q.end - q.begin + 2 * (kv.end - kv.begin), "layers.%u.qkv", l);
  if (!item) return;
  gather_heads(item, &from->qkv, &from->q, a, s->qkv_chunks, q, a->qk_dim, us_attention_q_row);
  gather_heads(item, &from->qkv, &from->k, a, s->qkv_chunks, kv, a->qk_dim, us_attention_k_row);
  gather_heads(item, &from->qkv, &from->v, a, s->qkv_chunks, kv, a->v_dim, us_attention_v_row);
  finish(b, item, kind, US_WEIGHTS_PLAIN, 0, s->hidden);
  char name[32];
  snprintf(name, sizeof name, "layers.%u.o_proj", l);
  add_cols(b, &to->o_proj, kind, &from->o_proj, (struct us_share){q.begin * a->v_dim, q.end * a->v_dim},
           name);
  add_vector(b, &to->input_norm, from->input_norm, s->hidden);
  add_vector(b, &to->post_norm, from->post_norm, s->hidden);
  if (from->sink) add_vector(b, &to->sink, from->sink + q.begin, q.end - q.begin);
}

/* ---- MLPs -------------------------------------------------------------------------------------------------------- */

/* Where the three matrices of MLP e are: an expert's, or those of a dense layer. */
struct mlps {
  const struct us_expert *experts; /* (count) or NULL */
  const struct us_matrix *gate, *up, *down;
  uint32_t count, inner, hidden;
};

/* Kernels multiply 32 columns at a time, so a share is a multiple of them; who asks for too many ranks hears how many there can be. */
static void check_inner(struct builder *b, uint32_t inner, const char *name) {
  uint32_t most = 8;
  if (inner % (32 * b->ranks) == 0) return;
  while (most > 1 && inner % (32 * most)) most /= 2;
  fail(b,
       "%s: an inner size of %u does not make %u shares of a multiple of 32 columns; it runs on %s%u rank%s",
       name, inner, b->ranks, most > 1 ? "up to " : "", most, most > 1 ? "s" : "");
}

static void add_mlps(struct builder *b, struct us_device_layer *to, uint64_t *kind, const struct mlps *m,
                     const char *name) {
  check_inner(b, m->inner, name);
  struct us_share inner = us_share_of(m->inner, b->rank, b->ranks);
  uint32_t F = inner.end - inner.begin;
  struct us_weights_item *up = new_item(b, &to->up, m->count, 2, 1, "%s", name);
  for (uint32_t e = 0; up && e < m->count; e++) {
    up->gather[2 * e] =
        (struct us_weights_gather){m->experts ? &m->experts[e].gate : m->gate, inner.begin, F};
    up->gather[2 * e + 1] =
        (struct us_weights_gather){m->experts ? &m->experts[e].up : m->up, inner.begin, F};
    up->gathers = 1;
  }
  finish(b, up, kind, US_WEIGHTS_GATED, 0, m->hidden);
  struct us_weights_item *down = new_item(b, &to->down, m->count, 1, 1, "%s.down", name);
  for (uint32_t e = 0; down && e < m->count; e++) {
    down->gather[e] = (struct us_weights_gather){m->experts ? &m->experts[e].down : m->down, 0, m->hidden};
    down->gathers = 1;
  }
  finish(b, down, kind, m->experts ? US_WEIGHTS_DOWN : US_WEIGHTS_PLAIN, inner.begin, F);
}

static void add_layer_mlp(struct builder *b, const struct us_layer *from, uint32_t l,
                          const struct us_shape *s) {
  struct us_device_layer *to = &b->plan->weights->layers[l];
  struct us_device_bytes *bytes = &b->plan->weights->bytes;
  char name[32];
  if (!s->moe_layer[l]) {
    snprintf(name, sizeof name, "layers.%u.mlp", l);
    add_mlps(b, to, &bytes->dense,
             &(struct mlps){NULL, &from->gate, &from->up, &from->down, 1, s->dense_inner, s->hidden}, name);
    return;
  }
  snprintf(name, sizeof name, "layers.%u.router", l);
  add_rows(b, &to->router, &bytes->router, &from->router, (struct us_share){0, s->experts}, name);
  add_vector(b, &to->router_bias, from->router_bias, s->experts);
  snprintf(name, sizeof name, "layers.%u.experts", l);
  add_mlps(b, to, &bytes->experts,
           &(struct mlps){
               .experts = from->experts, .count = s->experts, .inner = s->expert_inner, .hidden = s->hidden},
           name);
}

/* ---- vocabulary --------------------------------------------------------------------------------------------------- */

/* Rows of the embedding and of the heads: ceil(N / ranks) a rank, the last has what is left. */
static struct us_share share_vocabulary(struct builder *b, uint32_t N) {
  uint32_t most = (N + b->ranks - 1) / b->ranks;
  uint64_t first = (uint64_t)most * b->rank;
  if (first >= N) {
    fail(b, "a vocabulary of %u leaves rank %u of %u without rows", N, b->rank, b->ranks);
    return (struct us_share){0, 0};
  }
  return (struct us_share){(uint32_t)first, N - first < most ? N : (uint32_t)first + most};
}

static void add_vocabulary(struct builder *b, const struct us_model *model) {
  struct us_device_weights *to = b->plan->weights;
  uint32_t N = model->shape.vocab, D = model->shape.hidden, most = (N + b->ranks - 1) / b->ranks;
  struct us_share rows = share_vocabulary(b, N);
  if (b->status != US_OK) return;
  if (model->embed.format != US_FORMAT_BF16 && model->embed.format != US_FORMAT_FP8)
    fail(b, "the embedding is %s: on the GPU it is bf16, from bf16 or fp8; convert it",
         us_format_name(model->embed.format));
  to->embed_rows = most;
  b->plan->embed = &model->embed, b->plan->embed_first = rows.begin,
  b->plan->embed_rows = rows.end - rows.begin;
  b->plan->embed_offset = place(b, &to->bytes.embed, (uint64_t)most * D * sizeof(uint16_t));
  add_rows(b, &to->head, &to->bytes.head, &model->head, rows, "head");
  add_vector(b, &to->final_norm, model->final_norm, D);
}

/* ---- drafter ----------------------------------------------------------------------------------------------------- */

static void add_draft_layer(struct builder *b, const struct us_draft_layer *from, uint32_t l,
                            const struct us_draft_shape *s, uint64_t k_norm) {
  const struct us_attention_shape *a = &s->attention;
  struct us_device_layer *to = &b->plan->weights->draft_layers[l];
  uint64_t *kind = &b->plan->weights->bytes.draft;
  struct us_share kv = share(b, "the drafter's KV heads", a->kv_heads);
  struct us_share q = us_share_of(a->q_heads, b->rank, b->ranks);
  char name[40];
  struct us_weights_item *item = new_item(b, &to->qkv, 1, 1, 3, "drafter layers.%u.qkv", l);
  if (!item) return;
  gather(item, &from->q, q.begin * a->qk_dim, (q.end - q.begin) * a->qk_dim);
  gather(item, &from->k, kv.begin * a->qk_dim, (kv.end - kv.begin) * a->qk_dim);
  gather(item, &from->v, kv.begin * a->v_dim, (kv.end - kv.begin) * a->v_dim);
  finish(b, item, kind, US_WEIGHTS_PLAIN, 0, s->hidden);
  snprintf(name, sizeof name, "drafter layers.%u.o_proj", l);
  add_cols(b, &to->o_proj, kind, &from->o_proj, (struct us_share){q.begin * a->v_dim, q.end * a->v_dim},
           name);
  snprintf(name, sizeof name, "drafter layers.%u.mlp", l);
  add_mlps(b, to, kind, &(struct mlps){NULL, &from->gate, &from->up, &from->down, 1, s->inner, s->hidden},
           name);
  add_vector(b, &to->input_norm, from->input_norm, s->hidden);
  add_vector(b, &to->post_norm, from->post_norm, s->hidden);
  add_vector(b, &to->q_norm, from->q_norm, a->qk_dim);
  add_vector_at(b, &to->k_norm, from->k_norm, a->qk_dim, k_norm + (uint64_t)l * a->qk_dim * sizeof(float));
  if (from->sink) add_vector(b, &to->sink, from->sink + q.begin, q.end - q.begin);
}

static void add_markov(struct builder *b, uint32_t markov) {
  struct us_device_weights *to = b->plan->weights;
  uint64_t row = markov * sizeof(uint16_t);
  if (markov > US_ENGINE_MARKOV)
    fail(b, "the drafter's Markov head has rank %u; on the GPU %d at most", markov, US_ENGINE_MARKOV);
  b->plan->markov_before = place(b, &to->bytes.draft, to->shape.vocab * row);
  b->plan->markov_after = place(b, &to->bytes.draft, b->plan->embed_rows * row);
}

static void add_draft(struct builder *b, const struct us_draft *draft) {
  const struct us_draft_shape *s = &draft->shape;
  struct us_device_weights *to = b->plan->weights;
  uint32_t Q = s->attention.qk_dim, V = s->attention.v_dim;
  struct us_share kv = share(b, "the drafter's KV heads", s->attention.kv_heads);
  struct us_share rows = share(b, "the drafter's fc: rows", s->hidden);
  if ((rows.end - rows.begin) % 16)
    fail(b, "the drafter's fc: %u rows a rank do not fill tiles of 16", rows.end - rows.begin);
  uint64_t k_norms = place(b, &to->bytes.vectors, (uint64_t)s->layers * Q * sizeof(float));
  add_vector_at(b, &to->draft_k_norms, NULL, 0, k_norms); /* the layers fill it */
  add_rows(b, &to->draft_fc, &to->bytes.draft, &draft->fc, rows, "drafter fc");
  struct us_weights_item *item = new_item(b, &to->draft_kv, 1, 1, 2 * s->layers, "drafter kv");
  for (uint32_t l = 0; item && l < s->layers; l++) {
    gather(item, &draft->layers[l].k, kv.begin * Q, (kv.end - kv.begin) * Q);
    gather(item, &draft->layers[l].v, kv.begin * V, (kv.end - kv.begin) * V);
  }
  finish(b, item, &to->bytes.draft, US_WEIGHTS_PLAIN, 0, s->hidden);
  for (uint32_t l = 0; l < s->layers; l++) add_draft_layer(b, &draft->layers[l], l, s, k_norms);
  if (draft->head.rows)
    add_rows(b, &to->draft_head, &to->bytes.draft_head, &draft->head,
             share_vocabulary(b, (uint32_t)draft->head.rows), "drafter head");
  if (s->markov) add_markov(b, s->markov);
  add_vector(b, &to->draft_hidden_norm, draft->hidden_norm, s->hidden);
  add_vector(b, &to->draft_final_norm, draft->final_norm, s->hidden);
  add_vector(b, &to->mask_embedding, draft->mask_embedding, s->hidden);
}

/* ---- the whole --------------------------------------------------------------------------------------------------- */

static enum us_status allocate(struct us_weights_plan *plan, const struct us_model *model,
                               const struct us_draft *opt_draft, struct us_err *err) {
  size_t layers = model->shape.layers, draft_layers = opt_draft ? opt_draft->shape.layers : 0;
  struct us_device_weights *to = plan->weights = calloc(1, sizeof *to);
  plan->items = calloc(5 * layers + 4 * draft_layers + 4, sizeof *plan->items);
  plan->vectors = calloc(4 * layers + 5 * draft_layers + 5, sizeof *plan->vectors);
  if (to) to->layers = calloc(layers, sizeof *to->layers);
  if (to && draft_layers) to->draft_layers = calloc(draft_layers, sizeof *to->draft_layers);
  if (to && plan->items && plan->vectors && to->layers && (!draft_layers || to->draft_layers)) return US_OK;
  return us_err_memory(err, "list of weights",
                       (layers + draft_layers) * (5 * sizeof *plan->items + sizeof *to->layers));
}

static enum us_status check(const struct us_model *model, const struct us_draft *opt_draft, uint32_t rank,
                            uint32_t ranks, struct us_err *err) {
  if ((ranks != 1 && ranks != 2 && ranks != 4 && ranks != 8) || rank >= ranks)
    return us_err_set(err, US_ERR_USAGE, "rank %u of %u: 1, 2, 4 or 8 ranks", rank, ranks);
  return opt_draft ? us_draft_shape_check(&opt_draft->shape, &model->shape, err) : US_OK;
}

enum us_status us_weights_plan_create(const struct us_model *model, const struct us_draft *opt_draft,
                                      uint32_t rank, uint32_t ranks, struct us_weights_plan **ret_plan,
                                      struct us_err *err) {
  *ret_plan = NULL;
  enum us_status status = check(model, opt_draft, rank, ranks, err);
  if (status != US_OK) return status;
  struct us_weights_plan *plan = calloc(1, sizeof *plan);
  if (!plan) return us_err_memory(err, "list of weights", sizeof *plan);
  struct builder b = {.plan = plan, .rank = rank, .ranks = ranks, .err = err};
  b.status = allocate(plan, model, opt_draft, err);
  if (b.status == US_OK) {
    plan->weights->rank = rank, plan->weights->ranks = ranks, plan->weights->shape = model->shape;
    if (opt_draft) plan->weights->draft_shape = opt_draft->shape;
    add_vocabulary(&b, model);
    for (uint32_t l = 0; l < model->shape.layers; l++) {
      add_attention(&b, &model->layers[l], l, &model->shape);
      add_layer_mlp(&b, &model->layers[l], l, &model->shape);
    }
    if (opt_draft) add_draft(&b, opt_draft);
    plan->weights->bytes.scratch = plan->piece_bytes;
  }
  if (b.status != US_OK) {
    us_weights_plan_free(plan);
    return b.status;
  }
  *ret_plan = plan;
  return US_OK;
}

void us_weights_plan_free(struct us_weights_plan *plan) {
  if (!plan) return;
  for (uint32_t i = 0; i < plan->item_count; i++) free(plan->items[i].gather);
  free(plan->items), free(plan->vectors);
  us_device_layout_free(plan->weights);
  free(plan);
}
