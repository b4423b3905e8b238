/* schedule_fill.c: what an operation is told: matrix and cut, buffers of its row tile, sizes of its layer.
 *
 * Contents: products; experts; reductions; attention; ends of a pass; all.
 *
 * Waits, exchanges and the choice of experts refer to other operations: schedule_list.c sets them.
 */
#include "device/schedule_impl.h"
#include "model/kv.h"

#include <math.h>

struct fill {
  const struct us_device_schedule *s;
  const struct us_schedule_buffers *b;
  const struct us_device_weights *w;
  struct us_engine_op *op;
  uint32_t tile;
  struct us_err *err;
};

/* ---- products ---------------------------------------------------------------------------------------------------- */

static void *tile_at(const struct fill *f, const void *base, uint64_t tile_bytes) {
  return base ? (uint8_t *)base + f->tile * tile_bytes : NULL;
}

/* Buffers of the operation's first row tile, tile_bytes a row tile. */
static void *operand(const struct fill *f, struct us_engine_gemm *g, const void *base, uint64_t tile_bytes) {
  g->operand_tile = f->op->row_tiles > 1 ? tile_bytes : 0;
  return tile_at(f, base, tile_bytes);
}
static void out(const struct fill *f, struct us_engine_gemm *g, void *base, uint64_t tile_bytes) {
  g->out_tile = f->op->row_tiles > 1 ? tile_bytes : 0;
  g->out = tile_at(f, base, tile_bytes);
}

static void store(const struct fill *f, struct us_engine_gemm *g, void *base, uint64_t tile_bytes,
                  uint32_t stride) {
  g->epilogue = US_ENGINE_STORE;
  g->out_stride = stride;
  out(f, g, base, tile_bytes);
}

/* Gate and up: half of the rows come out. */
static void gate(struct us_engine_gemm *g, enum us_engine_epilogue epilogue) {
  g->epilogue = epilogue;
  g->valid /= 2;
  g->F = g->valid;
}

/* Where the operand comes from and the sums go. */
static void route_sums(const struct fill *f, struct us_engine_gemm *g) {
  const struct us_schedule_buffers *b = f->b;
  bool draft = f->op->program == US_ENGINE_PASS_DRAFT;
  g->epilogue = US_ENGINE_PUSH;
  switch ((enum us_task_op)f->op->task_op) {
  case US_TASK_QKV:
    store(f, g, b->qkv, us_schedule_row_bytes(g->valid), g->valid);
    break;
  case US_TASK_CONTEXT_KV:
    store(f, g, b->context_kv, us_schedule_row_bytes(g->valid), g->valid);
    break;
  case US_TASK_ROUTER:
    store(f, g, b->router, b->router_tile, g->valid);
    g->flagged = us_schedule_flags(f->s);
    break;
  case US_TASK_HEAD:
    store(f, g, draft ? b->draft_logits : b->logits, b->logits_tile, f->s->logits_stride);
    break;
  case US_TASK_DENSE_UP:
    gate(g, US_ENGINE_SWIGLU);
    out(f, g, b->inner, b->inner_tile);
    break;
  case US_TASK_EXPERT_UP:
    gate(g, US_ENGINE_SWIGLU_EXPERT);
    g->out = tile_at(f, b->pairs, b->pairs_tile);
    g->experts = true;
    break;
  case US_TASK_CONTEXT_FC:
    g->operand = operand(f, g, b->features, b->features_tile);
    g->gather = true;
    g->first = f->w->rank * g->valid;
    break;
  case US_TASK_O_PROJ:
    g->operand = operand(f, g, b->attended, b->attended_tile);
    g->awaits = us_schedule_flags(f->s);
    break;
  default: /* DENSE_DOWN */
    g->operand = operand(f, g, b->inner, b->inner_tile);
  }
}

static enum us_status fill_gemm(const struct fill *f) {
  struct us_engine_op *op = f->op;
  const struct us_device_matrix *m =
      us_schedule_matrix(f->s, op->program, (enum us_task_op)op->task_op, op->layer);
  struct us_schedule_cut cut;
  enum us_status status =
      us_schedule_cut_of(f->s, op->program, (enum us_task_op)op->task_op, op->layer, &cut, f->err);
  if (status != US_OK) return status;
  op->bytes = m->bytes;
  op->gemm = (struct us_engine_gemm){
      .w = m->pages, .parts = cut.parts, .warps = cut.warps, .subs = cut.subs, .valid = m->rows};
  op->gemm.operand = operand(f, &op->gemm, f->b->normed, f->b->normed_tile);
  route_sums(f, &op->gemm);
  return US_OK;
}

/* ---- experts ----------------------------------------------------------------------------------------------------- */

static enum us_status fill_route(const struct fill *f) {
  struct us_engine_op *op = f->op;
  const struct us_shape *shape = &f->w->shape;
  uint32_t rows = f->s->row_tiles * US_ENGINE_ROWS;
  struct us_schedule_cut cut;
  enum us_status status = us_schedule_cut_of(f->s, op->program, US_TASK_ROUTER, op->layer, &cut, f->err);
  if (status != US_OK) return status;
  op->route = (struct us_engine_route){.logits = tile_at(f, f->b->router, f->b->router_tile),
                                       .bias = us_schedule_layer(f->s, op->program, op->layer)->router_bias,
                                       .parts = cut.parts,
                                       .stride = shape->experts,
                                       .E = shape->experts,
                                       .top_k = shape->top_k,
                                       .scaling = (float)shape->routed_scaling,
                                       .normalise = shape->norm_topk_prob,
                                       .flagged = us_schedule_flags(f->s),
                                       .uniform = f->s->options.uniform,
                                       .uniform_seed = f->s->options.uniform_seed};
  if (op->row_tiles > 1) {
    op->route.logits_tile = f->b->router_tile / sizeof(float);
    op->route.choices = f->b->choices + (size_t)f->tile * US_ENGINE_ACTIVE;
  }
  if (f->b->routed)
    op->route.opt_routed =
        f->b->routed + ((size_t)op->layer * rows + f->tile * US_ENGINE_ROWS) * shape->top_k;
  return US_OK;
}

static void fill_down(const struct fill *f) {
  struct us_engine_op *op = f->op;
  const struct us_device_matrix *m = &us_schedule_layer(f->s, op->program, op->layer)->down;
  op->bytes = m->bytes;
  op->down = (struct us_engine_down){
      .w = m->pages, .pairs = tile_at(f, f->b->pairs, f->b->pairs_tile), .F = m->cols};
  us_schedule_cut_down(&m->pages, &op->down);
}

/* ---- reductions -------------------------------------------------------------------------------------------------- */

uint32_t us_schedule_tap(const struct us_device_schedule *s, uint32_t layer) {
  const struct us_draft_shape *draft = &s->weights->draft_shape;
  for (uint32_t i = 0; us_schedule_drafts(s) && i < draft->taps; i++)
    if (draft->tap_layer[i] == layer) return i;
  return US_ENGINE_NONE;
}

const float *us_schedule_norm(const struct us_device_schedule *s, uint32_t program, enum us_task_op op,
                              uint32_t layer, uint32_t slot) {
  const struct us_device_weights *w = s->weights;
  bool target = program == US_ENGINE_PASS_TARGET;
  if (op == US_TASK_CONTEXT_NORM) return w->draft_hidden_norm;
  if (op == US_TASK_EMBED_NORM) return us_schedule_layer(s, program, 0)->input_norm;
  if (slot == 0) return us_schedule_layer(s, program, layer)->post_norm;
  if (layer + 1 < (target ? w->shape.layers : w->draft_shape.layers))
    return us_schedule_layer(s, program, layer + 1)->input_norm;
  return target ? w->final_norm : w->draft_final_norm;
}

static enum us_status absent_logits(const struct us_device_schedule *s, const struct us_engine_op *op,
                                    uint32_t **ret_words, uint32_t *ret_count, struct us_err *err) {
  if (!us_schedule_layer(s, op->program, op->layer)->router.rows) return US_OK;
  struct us_schedule_cut cut;
  enum us_status status = us_schedule_cut_of(s, op->program, US_TASK_ROUTER, op->layer, &cut, err);
  *ret_words = (uint32_t *)us_schedule_owner(s)->buffers.router;
  *ret_count = status == US_OK ? cut.parts * US_ENGINE_ROWS * s->weights->shape.experts : 0;
  return status;
}

enum us_status us_schedule_absent(const struct us_device_schedule *s, const struct us_engine_op *op,
                                  uint32_t slot, uint32_t **ret_words, uint32_t *ret_count,
                                  struct us_err *err) {
  const struct us_device_weights *w = s->weights;
  bool embed = op->task_op == US_TASK_EMBED_NORM, target = op->program == US_ENGINE_PASS_TARGET;
  *ret_words = NULL, *ret_count = 0;
  if (!us_schedule_flags(s) || (!embed && op->task_op != US_TASK_RESIDUAL_NORM)) return US_OK;
  if (!embed && !slot) return absent_logits(s, op, ret_words, ret_count, err);
  uint32_t layer = embed ? 0 : op->layer + 1, layers = target ? w->shape.layers : w->draft_shape.layers;
  if (layer >= layers) return US_OK;
  *ret_words = (uint32_t *)us_schedule_owner(s)->buffers.attended;
  *ret_count = (uint32_t)(us_schedule_operand_bytes(us_schedule_layer(s, op->program, layer)->o_proj.cols) /
                          sizeof(uint32_t));
  return US_OK;
}

/* EMBED and REDUCE; slot 1: after an MLP. */
static enum us_status fill_reduce(const struct fill *f, uint32_t slot) {
  struct us_engine_op *op = f->op;
  enum us_task_op task = (enum us_task_op)op->task_op;
  bool target = op->program == US_ENGINE_PASS_TARGET;
  uint32_t D = f->w->shape.hidden;
  op->reduce =
      (struct us_engine_reduce){.residual = f->b->residual + (size_t)f->tile * US_ENGINE_ROWS * D,
                                .weight = us_schedule_norm(f->s, op->program, task, op->layer, slot),
                                .operand = tile_at(f, f->b->normed, f->b->normed_tile),
                                .eps = (float)(target ? f->w->shape.norm_eps : f->w->draft_shape.norm_eps),
                                .D = D,
                                .replace = task == US_TASK_CONTEXT_NORM,
                                .draft = op->kind == US_ENGINE_EMBED && !target};
  uint32_t tap = target && task == US_TASK_RESIDUAL_NORM && slot == 1 ? us_schedule_tap(f->s, op->layer)
                                                                      : US_ENGINE_NONE;
  if (op->row_tiles > 1) op->reduce.operand_tile = f->b->normed_tile;
  if (tap != US_ENGINE_NONE && op->row_tiles > 1) op->reduce.tap_tile = f->b->features_tile;
  if (tap != US_ENGINE_NONE)
    op->reduce.opt_tap = (uint8_t *)tile_at(f, f->b->features, f->b->features_tile) + tap * f->b->normed_tile;
  return us_schedule_absent(f->s, op, slot, &op->reduce.opt_absent, &op->reduce.absent, f->err);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static enum us_schedule_attention attention_of(const struct fill *f) {
  if (f->op->program == US_ENGINE_PASS_DRAFT) return US_SCHEDULE_DRAFT;
  return f->w->shape.swa_layer[f->op->layer] ? US_SCHEDULE_WINDOWED : US_SCHEDULE_FULL;
}

static void fill_attention(const struct fill *f) {
  struct us_engine_op *op = f->op;
  const struct us_device_layer *layer = us_schedule_layer(f->s, op->program, op->layer);
  enum us_schedule_attention kind = attention_of(f);
  const struct us_attention_shape *a = us_schedule_attention(f->s, kind);
  bool draft = kind == US_SCHEDULE_DRAFT;
  op->attention = (struct us_engine_attention){
      .qkv = tile_at(f, f->b->qkv, us_schedule_row_bytes(layer->qkv.rows)),
      .operand = tile_at(f, f->b->attended, f->b->attended_tile),
      .partial = tile_at(f, f->b->partial, f->b->partial_tile),
      .arrivals = tile_at(f, f->b->arrivals, f->b->arrivals_tile),
      .sink = layer->sink,
      .q_norm = draft ? layer->q_norm : NULL,
      .k_norm = draft ? layer->k_norm : NULL,
      .rope = f->b->rope[kind],
      .ready = US_ENGINE_NONE,
      .layer = op->layer,
      .qkv_rows = layer->qkv.rows,
      .H = (uint16_t)(a->q_heads / f->w->ranks),
      .G = (uint16_t)(a->kv_heads / f->w->ranks),
      .Q = (uint16_t)a->qk_dim,
      .V = (uint16_t)a->v_dim,
      .rotary = (uint16_t)a->rotary_dim,
      .window = a->window,
      .page_count = us_kv_pages_of(a, f->s->options.max_positions),
      .scale = (float)(1.0 / sqrt(a->qk_dim)),
      .value_scale = (float)(draft ? f->w->draft_shape.value_scale : f->w->shape.value_scale),
      .eps = (float)(draft ? f->w->draft_shape.norm_eps : f->w->shape.norm_eps),
      .draft = draft};
}

static void fill_context(const struct fill *f) {
  const struct us_draft_shape *draft = &f->w->draft_shape;
  const struct us_attention_shape *a = &draft->attention;
  f->op->context = (struct us_engine_context){
      .kv = tile_at(f, f->b->context_kv, us_schedule_row_bytes(f->w->draft_kv.rows)),
      .k_norm = f->w->draft_k_norms,
      .rope = f->b->rope[US_SCHEDULE_DRAFT],
      .layers = draft->layers,
      .G = (uint16_t)(a->kv_heads / f->w->ranks),
      .Q = (uint16_t)a->qk_dim,
      .V = (uint16_t)a->v_dim,
      .rotary = (uint16_t)a->rotary_dim,
      .page_count = us_kv_pages_of(a, f->s->options.max_positions),
      .value_scale = (float)draft->value_scale,
      .eps = (float)draft->norm_eps};
}

/* ---- ends of a pass ---------------------------------------------------------------------------------------------- */

static void fill_select(const struct fill *f) {
  const struct us_device_schedule *s = f->s;
  bool draft = f->op->program == US_ENGINE_PASS_DRAFT;
  uint32_t slots = draft ? us_schedule_slots(s) : 0, row = slots ? 1 : f->op->row_tile * US_ENGINE_ROWS,
           step = slots ? s->options.block : 1;
  f->op->select = (struct us_engine_select){
      .logits = (draft ? f->b->draft_logits : f->b->logits) + (size_t)row * s->logits_stride,
      .stride = step * s->logits_stride,
      .count = s->logits_count,
      .first = s->logits_first,
      .vocab = f->w->shape.vocab,
      .row = row,
      .step = step,
      .rows = slots ? s->row_tiles * US_ENGINE_ROWS : row + US_ENGINE_ROWS,
      .number = f->op->row_tile + (draft ? 0 : us_schedule_draft_places(s)),
      .slots = slots,
      .before = slots ? f->w->markov_before : NULL,
      .after = slots ? f->w->markov_after : NULL,
      .markov = slots ? f->w->draft_shape.markov : 0,
      .draft = draft,
      .last = slots ? slots == 1 : f->op->row_tile + 1 == s->row_tiles};
}

static void fill_accept(const struct fill *f) {
  f->op->accept = (struct us_engine_accept){.vocab = f->w->shape.vocab,
                                            .tiles = f->s->row_tiles,
                                            .logits = f->b->logits,
                                            .opt_draft_logits = f->b->draft_logits,
                                            .stride = f->s->logits_stride,
                                            .count = f->s->logits_count,
                                            .first = f->s->logits_first};
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

enum us_status us_schedule_fill(const struct us_device_schedule *s, struct us_engine_op *op, uint32_t slot,
                                struct us_err *err) {
  struct fill f = {s, &us_schedule_owner(s)->buffers, s->weights, op, op->row_tile, err};
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_GEMM:
    return fill_gemm(&f);
  case US_ENGINE_ROUTE:
    return fill_route(&f);
  case US_ENGINE_DOWN:
    fill_down(&f);
    break;
  case US_ENGINE_EMBED:
  case US_ENGINE_REDUCE:
    return fill_reduce(&f, slot);
  case US_ENGINE_ATTENTION:
    fill_attention(&f);
    break;
  case US_ENGINE_CONTEXT:
    fill_context(&f);
    break;
  case US_ENGINE_SELECT:
    fill_select(&f);
    break;
  default: /* ACCEPT */
    fill_accept(&f);
  }
  return US_OK;
}

uint32_t us_schedule_items(const struct us_device_schedule *s, const struct us_engine_op *op) {
  const struct us_shape *shape = &s->weights->shape;
  uint32_t most = US_ENGINE_ROWS * shape->top_k, active = most < shape->experts ? most : shape->experts;
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_GEMM:
    if (op->row_tiles > 1) return 0; /* each block has its share */
    return op->gemm.w.tiles * (op->gemm.experts ? active : op->gemm.parts);
  case US_ENGINE_DOWN:
    return (op->down.w.tiles + 2) / 3;
  case US_ENGINE_ATTENTION:
    return US_ENGINE_ROWS * us_engine_attention_chunks(op->attention.H, op->attention.G);
  case US_ENGINE_CONTEXT:
    return US_ENGINE_ROWS * op->context.layers * op->context.G / 2;
  default:
    return 0;
  }
}
