/* schedule_list.c: units of the tile programs become the engine's operations, one a row tile.
 *
 * Contents: growing; waits; products; reductions; attention and experts; units; what ends a pass; the round.
 *
 * Waits come from the programs' events. One that every block of the rank has already waited for, itself or through others, is
 * left out: each costs a load from L2 on the way of a hand-off, and between router and experts nothing hides it.
 */
#include "device/schedule_impl.h"
#include "model/kv.h"

#include <math.h>
#include <stdlib.h>

/* What all blocks know has ended on this rank, by acquired counts: vector operations up to and with `vector` (and what products
 * before it read), products up to and with `gemm`. -1: everything of the round before; -2: nothing. */
struct known {
  int64_t vector, gemm;
};

/* The list as it grows. Nothing is added after a failure. */
struct list {
  struct us_device_schedule *s;
  const struct us_schedule_buffers *b;
  enum us_engine_program pass;
  const struct us_schedule_units *units;
  uint32_t (*last)[US_ENGINE_MAX_TILES]; /* (units) the unit's last operation of each row tile */
  uint32_t capacity, tiles;
  struct known known, *at; /* now; (ops) when an operation begins */
  uint32_t exchanges, shift;
  enum us_status status;
  struct us_err *err;
};

#define AFTER_ROUND (-1) /* wait for the ACCEPT of the round before */

/* ---- growing ----------------------------------------------------------------------------------------------------- */

static bool grow(struct list *list) {
  if (list->s->op_count < list->capacity) return true;
  uint32_t capacity = list->capacity ? 2 * list->capacity : 256;
  struct us_engine_op *ops = realloc(list->s->ops, capacity * sizeof *ops);
  if (ops) list->s->ops = ops;
  struct known *at = ops ? realloc(list->at, capacity * sizeof *at) : NULL;
  if (at) list->at = at;
  if (!at) {
    list->status = us_err_memory(list->err, "a list of operations", capacity * sizeof *ops);
    return false;
  }
  list->capacity = capacity;
  return true;
}

/* Append an operation for a row tile; NULL after a failure. */
static struct us_engine_op *add(struct list *list, enum us_engine_kind kind,
                                const struct us_schedule_unit *unit, uint32_t tile) {
  if (list->status != US_OK || !grow(list)) return NULL;
  uint32_t index = list->s->op_count++;
  struct us_engine_op *op = &list->s->ops[index];
  *op = (struct us_engine_op){.kind = (uint16_t)kind,
                              .program = (uint16_t)list->pass,
                              .layer = unit ? unit->layer : US_LAYER_NONE,
                              .task_op = unit ? unit->op : US_TASK_OP_COUNT,
                              .row_tile = tile,
                              .wait = US_ENGINE_NONE};
  list->at[index] = list->known;
  if (unit) list->last[unit - list->units->unit][tile] = index;
  return op;
}

static uint32_t index_of(const struct list *list, const struct us_engine_op *op) {
  return (uint32_t)(op - list->s->ops);
}

/* ---- waits ------------------------------------------------------------------------------------------------------- */

static void join(struct known *to, struct known from) {
  if (from.vector > to->vector) to->vector = from.vector;
  if (from.gemm > to->gemm) to->gemm = from.gemm;
}

/* The operation waits until `before` is done, unless that is known. */
static void wait_for(struct list *list, struct us_engine_op *op, int64_t before) {
  bool gemm = before >= 0 && us_schedule_is_gemm(&list->s->ops[before]);
  if (before <= (gemm ? list->known.gemm : list->known.vector)) return;
  op->wait =
      before == AFTER_ROUND ? US_ENGINE_NONE - 1 : (uint32_t)before; /* ACCEPT is not there yet: set_accept */
  join(&list->known,
       gemm ? (struct known){-2, before} : (struct known){before, before == AFTER_ROUND ? before : -2});
  if (before >= 0) join(&list->known, list->at[before]);
  list->at[index_of(list, op)] = list->known;
}

/* The same for an operation of another unit; row tile `tile`. */
static void wait_for_unit(struct list *list, struct us_engine_op *op, uint32_t unit, uint32_t tile) {
  wait_for(list, op, list->last[unit][tile]);
}

/* Wait for the units that this one's tasks wait for. */
static void wait_for_events(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit,
                            uint32_t tile) {
  for (uint32_t i = 0; i < unit->wait_count; i++) wait_for_unit(list, op, unit->waits[i], tile);
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* Consecutive operations go on dealing out tiles where the one before ended. */
static void spread(struct list *list, struct us_engine_op *op, uint32_t items) {
  op->shift = list->shift;
  list->shift = (list->shift + items) % US_SCHEDULE_NOMINAL_BLOCKS;
}

static uint32_t active_experts(const struct list *list) {
  const struct us_shape *shape = &list->s->weights->shape;
  uint32_t most = US_ENGINE_ROWS * shape->top_k;
  return most < shape->experts ? most : shape->experts;
}

/* What all products share: matrix, cut, bytes, balance. */
static void fill_gemm(struct list *list, struct us_engine_op *op, enum us_engine_epilogue epilogue) {
  struct us_engine_gemm *g = &op->gemm;
  enum us_task_op task = (enum us_task_op)op->task_op;
  const struct us_device_matrix *m = us_schedule_matrix(list->s, op->program, task, op->layer);
  struct us_schedule_cut cut;
  list->status = us_schedule_cut_of(list->s, op->program, task, op->layer, &cut, list->err);
  if (list->status != US_OK) return;
  *g = (struct us_engine_gemm){.w = m->pages,
                               .parts = cut.parts,
                               .warps = cut.warps,
                               .subs = cut.subs,
                               .valid = m->rows,
                               .epilogue = epilogue};
  op->bytes = m->bytes;
  bool experts = epilogue == US_ENGINE_SWIGLU_EXPERT;
  spread(list, op, m->pages.tiles * (experts ? active_experts(list) : cut.parts));
}

static void *tile_at(const void *base, uint64_t tile_bytes, uint32_t tile) {
  return base ? (uint8_t *)base + tile * tile_bytes : NULL;
}

/* A product whose rows stand in `out` (8, rows) a part. */
static void fill_store(struct list *list, struct us_engine_op *op, const void *operand, void *out,
                       uint32_t stride) {
  fill_gemm(list, op, US_ENGINE_STORE);
  op->gemm.operand = operand;
  op->gemm.out = out;
  op->gemm.out_stride = stride;
}

static void fill_push(struct list *list, struct us_engine_op *op, const void *operand) {
  fill_gemm(list, op, US_ENGINE_PUSH);
  op->gemm.operand = operand;
  if (op->task_op != US_TASK_CONTEXT_FC) return;
  op->gemm.gather = true;
  op->gemm.first = list->s->weights->rank * op->gemm.valid;
}

static void fill_product(struct list *list, struct us_engine_op *op) {
  const struct us_schedule_buffers *b = list->b;
  const struct us_device_weights *w = list->s->weights;
  uint32_t t = op->row_tile,
           rows = us_schedule_matrix(list->s, op->program, (enum us_task_op)op->task_op, op->layer)->rows;
  const void *normed = tile_at(b->normed, b->normed_tile, t);
  uint64_t stored_tile = (uint64_t)US_ENGINE_ROWS * rows * sizeof(float);
  switch ((enum us_task_op)op->task_op) {
  case US_TASK_QKV:
    fill_store(list, op, normed, tile_at(b->qkv, stored_tile, t), rows);
    break;
  case US_TASK_CONTEXT_KV:
    fill_store(list, op, normed, tile_at(b->context_kv, stored_tile, t), rows);
    break;
  case US_TASK_ROUTER:
    fill_store(list, op, normed, tile_at(b->router, b->router_tile, t), w->shape.experts);
    break;
  case US_TASK_HEAD:
    fill_store(list, op, normed,
               tile_at(list->pass == US_ENGINE_PASS_DRAFT ? b->draft_logits : b->logits, b->logits_tile, t),
               list->s->logits_stride);
    break;
  case US_TASK_O_PROJ:
    fill_push(list, op, tile_at(b->attended, b->attended_tile, t));
    break;
  case US_TASK_DENSE_DOWN:
    fill_push(list, op, tile_at(b->inner, b->inner_tile, t));
    break;
  case US_TASK_CONTEXT_FC:
    fill_push(list, op, tile_at(b->features, b->features_tile, t));
    break;
  default: /* DENSE_UP */
    fill_gemm(list, op, US_ENGINE_SWIGLU);
    op->gemm.operand = normed;
    op->gemm.out = tile_at(b->inner, b->inner_tile, t);
    op->gemm.valid = op->gemm.F = rows / 2;
  }
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

/* EMBED and REDUCE. */
static void fill_reduce(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit) {
  const struct us_schedule_buffers *b = list->b;
  const struct us_device_weights *w = list->s->weights;
  bool target = list->pass == US_ENGINE_PASS_TARGET;
  uint32_t t = op->row_tile, D = w->shape.hidden;
  op->reduce = (struct us_engine_reduce){
      .residual = b->residual + (size_t)t * US_ENGINE_ROWS * D,
      .weight = us_schedule_norm(list->s, list->pass, unit->op, unit->layer, unit->slot),
      .operand = tile_at(b->normed, b->normed_tile, t),
      .eps = (float)(target ? w->shape.norm_eps : w->draft_shape.norm_eps),
      .D = D,
      .replace = unit->op == US_TASK_CONTEXT_NORM,
      .exchange = list->exchanges++,
      .draft = op->kind == US_ENGINE_EMBED && !target};
  uint32_t tap = target && unit->op == US_TASK_RESIDUAL_NORM && unit->slot == 1
                     ? us_schedule_tap(list->s, unit->layer)
                     : US_ENGINE_NONE;
  if (tap != US_ENGINE_NONE)
    op->reduce.opt_tap = (uint8_t *)tile_at(b->features, b->features_tile, t) + tap * b->normed_tile;
}

/* The products whose sums a reduction adds learn its number. */
static void meet_pushes(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit) {
  for (uint32_t i = 0; i < unit->wait_count; i++) {
    struct us_engine_op *from = &list->s->ops[list->last[unit->waits[i]][op->row_tile]];
    uint32_t ranks = list->s->weights->ranks;
    if (from->kind == US_ENGINE_DOWN) {
      from->down.exchange = op->reduce.exchange;
      op->reduce.addends = ranks;
    } else {
      from->gemm.exchange = op->reduce.exchange;
      op->reduce.addends = from->gemm.gather ? from->gemm.parts : ranks * from->gemm.parts;
    }
  }
}

/* ---- attention and experts --------------------------------------------------------------------------------------- */

struct us_schedule_span us_schedule_span(const struct us_device_schedule *s, uint32_t tile) {
  uint32_t block = s->options.block, first = tile * US_ENGINE_ROWS / block * block;
  uint32_t last = (tile * US_ENGINE_ROWS + US_ENGINE_ROWS - 1) / block * block + block - 1;
  struct us_schedule_span span = {first / US_ENGINE_ROWS, last / US_ENGINE_ROWS};
  if (span.last >= s->row_tiles) span.last = s->row_tiles - 1;
  return span;
}

static void fill_attention(struct list *list, struct us_engine_op *op) {
  const struct us_device_schedule *s = list->s;
  const struct us_schedule_buffers *b = list->b;
  const struct us_device_weights *w = s->weights;
  const struct us_device_layer *layer = us_schedule_layer(s, op->program, op->layer);
  bool draft = list->pass == US_ENGINE_PASS_DRAFT;
  enum us_schedule_attention kind = draft                           ? US_SCHEDULE_DRAFT
                                    : w->shape.swa_layer[op->layer] ? US_SCHEDULE_WINDOWED
                                                                    : US_SCHEDULE_FULL;
  const struct us_attention_shape *a = us_schedule_attention(s, kind);
  uint32_t t = op->row_tile, rows = layer->qkv.rows;
  op->attention = (struct us_engine_attention){
      .qkv = b->qkv + (size_t)t * US_ENGINE_ROWS * rows,
      .operand = tile_at(b->attended, b->attended_tile, t),
      .partial = tile_at(b->partial, b->partial_tile, t),
      .arrivals = tile_at(b->arrivals, b->arrivals_tile, t),
      .sink = layer->sink,
      .q_norm = draft ? layer->q_norm : NULL,
      .k_norm = draft ? layer->k_norm : NULL,
      .rope = b->rope[kind],
      .ready = US_ENGINE_NONE,
      .layer = op->layer,
      .qkv_rows = rows,
      .H = (uint16_t)(a->q_heads / w->ranks),
      .G = (uint16_t)(a->kv_heads / w->ranks),
      .Q = (uint16_t)a->qk_dim,
      .V = (uint16_t)a->v_dim,
      .rotary = (uint16_t)a->rotary_dim,
      .window = a->window,
      .page_count = us_kv_pages_of(a, s->options.max_positions),
      .scale = (float)(1.0 / sqrt(a->qk_dim)),
      .value_scale = (float)(draft ? w->draft_shape.value_scale : w->shape.value_scale),
      .eps = (float)(draft ? w->draft_shape.norm_eps : w->shape.norm_eps),
      .draft = draft};
  if (draft) op->attention.ready = s->end[US_ENGINE_PASS_CONTEXT] - 1;
  spread(list, op, US_ENGINE_ROWS * us_engine_attention_chunks(op->attention.H, op->attention.G));
}

static void fill_route(struct list *list, struct us_engine_op *op, const struct us_engine_op *router) {
  const struct us_device_schedule *s = list->s;
  const struct us_shape *shape = &s->weights->shape;
  uint32_t rows = s->row_tiles * US_ENGINE_ROWS;
  op->route = (struct us_engine_route){.logits = router->gemm.out,
                                       .bias = us_schedule_layer(s, op->program, op->layer)->router_bias,
                                       .parts = router->gemm.parts,
                                       .stride = router->gemm.out_stride,
                                       .E = shape->experts,
                                       .top_k = shape->top_k,
                                       .scaling = (float)shape->routed_scaling,
                                       .normalise = shape->norm_topk_prob,
                                       .uniform = s->options.uniform,
                                       .uniform_seed = s->options.uniform_seed};
  if (list->b->routed)
    op->route.opt_routed =
        list->b->routed + ((size_t)op->layer * rows + op->row_tile * US_ENGINE_ROWS) * shape->top_k;
}

static void fill_expert_up(struct list *list, struct us_engine_op *op, uint32_t route) {
  fill_gemm(list, op, US_ENGINE_SWIGLU_EXPERT);
  op->gemm.operand = tile_at(list->b->normed, list->b->normed_tile, op->row_tile);
  op->gemm.out = tile_at(list->b->pairs, list->b->pairs_tile, op->row_tile);
  op->gemm.valid = op->gemm.F = us_schedule_layer(list->s, op->program, op->layer)->down.cols;
  op->gemm.route = route;
  op->gemm.experts = true;
}

static void fill_expert_down(struct list *list, struct us_engine_op *op, uint32_t route) {
  const struct us_device_matrix *m = &us_schedule_layer(list->s, op->program, op->layer)->down;
  op->down = (struct us_engine_down){.w = m->pages,
                                     .pairs = tile_at(list->b->pairs, list->b->pairs_tile, op->row_tile),
                                     .F = m->cols,
                                     .route = route};
  us_schedule_cut_down(&m->pages, &op->down);
  op->bytes = m->bytes;
  spread(list, op, (m->pages.tiles + 2) / 3);
}

/* Route, gate and up, down of one row tile after the other: `down` is the unit of the last, found through its events. */
static void add_experts(struct list *list, const struct us_schedule_unit *down) {
  const struct us_schedule_unit *up = &list->units->unit[down->waits[0]];
  const struct us_schedule_unit *route = &list->units->unit[up->waits[0]];
  const struct us_schedule_unit *router = &list->units->unit[route->waits[0]];
  for (uint32_t t = 0; t < list->tiles; t++) {
    struct us_engine_op *op = add(list, US_ENGINE_ROUTE, route, t);
    if (!op) return;
    uint32_t routed = index_of(list, op);
    fill_route(list, op, &list->s->ops[list->last[route->waits[0]][t]]);
    wait_for_events(list, op, route, t);
    if (!(op = add(list, US_ENGINE_GEMM, up, t))) return;
    fill_expert_up(list, op, routed);
    wait_for_events(list, op, router,
                    t); /* the list is in the block's own memory; the rows are what the router read */
    if (!(op = add(list, US_ENGINE_DOWN, down, t))) return;
    fill_expert_down(list, op, routed);
    wait_for_events(list, op, down, t);
  }
}

/* ---- units ------------------------------------------------------------------------------------------------------- */

static enum us_engine_kind kind_of(enum us_task_op op) {
  switch (op) {
  case US_TASK_EMBED_NORM:
    return US_ENGINE_EMBED;
  case US_TASK_RESIDUAL_NORM:
  case US_TASK_CONTEXT_NORM:
    return US_ENGINE_REDUCE;
  case US_TASK_ATTENTION:
    return US_ENGINE_ATTENTION;
  default:
    return US_ENGINE_GEMM;
  }
}

/* A product's rows, or an attention's, stand. New keys of a drafter's block may lie in a later row tile. */
static void wait_for_rows(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit) {
  uint32_t t = op->row_tile;
  if (op->kind == US_ENGINE_ATTENTION && op->attention.draft) t = us_schedule_span(list->s, t).last;
  wait_for_events(list, op, unit, t);
  if (!unit->wait_count) wait_for(list, op, AFTER_ROUND); /* features */
}

/* The first rows of a pass: ACCEPT of the round before wrote them, the drafter's SELECT of this row tile the target's tokens. */
static void wait_for_tokens(struct list *list, struct us_engine_op *op) {
  const struct us_device_schedule *s = list->s;
  uint32_t selects = s->selects[US_ENGINE_PASS_DRAFT];
  bool drafted = list->pass == US_ENGINE_PASS_TARGET && selects;
  wait_for(list, op, drafted ? (int64_t)s->end[US_ENGINE_PASS_DRAFT] - selects + op->row_tile : AFTER_ROUND);
}

static void add_unit(struct list *list, const struct us_schedule_unit *unit) {
  if (unit->op == US_TASK_ROUTE || unit->op == US_TASK_EXPERT_UP) return; /* with EXPERT_DOWN */
  if (unit->op == US_TASK_EXPERT_DOWN) {
    add_experts(list, unit);
    return;
  }
  enum us_engine_kind kind = kind_of(unit->op);
  for (uint32_t t = 0; t < list->tiles; t++) {
    struct us_engine_op *op = add(list, kind, unit, t);
    if (!op) return;
    if (kind == US_ENGINE_GEMM) fill_product(list, op);
    if (kind == US_ENGINE_ATTENTION) fill_attention(list, op);
    if (us_schedule_reduces(op)) fill_reduce(list, op, unit);
    if (kind == US_ENGINE_REDUCE)
      meet_pushes(list, op, unit);
    else if (kind == US_ENGINE_EMBED)
      wait_for_tokens(list, op);
    else
      wait_for_rows(list, op, unit);
    if (list->status != US_OK && unit->layer != US_LAYER_NONE)
      us_err_prefix(list->err, "layer %u", unit->layer);
  }
}

/* ---- what ends a pass -------------------------------------------------------------------------------------------- */

/* The context's keys and values into the caches: the other half of the tasks whose products are the last unit. */
static void add_contexts(struct list *list) {
  const struct us_device_schedule *s = list->s;
  const struct us_attention_shape *a = &s->weights->draft_shape.attention;
  const struct us_schedule_unit *unit = &list->units->unit[list->units->count - 1];
  for (uint32_t t = 0; t < list->tiles; t++) {
    uint32_t product = list->last[list->units->count - 1][t];
    struct us_engine_op *op = add(list, US_ENGINE_CONTEXT, unit, t);
    if (!op) return;
    op->context = (struct us_engine_context){.kv = s->ops[product].gemm.out,
                                             .k_norm = s->weights->draft_k_norms,
                                             .rope = list->b->rope[US_SCHEDULE_DRAFT],
                                             .layers = s->weights->draft_shape.layers,
                                             .G = (uint16_t)(a->kv_heads / s->weights->ranks),
                                             .Q = (uint16_t)a->qk_dim,
                                             .V = (uint16_t)a->v_dim,
                                             .rotary = (uint16_t)a->rotary_dim,
                                             .page_count = us_kv_pages_of(a, s->options.max_positions),
                                             .value_scale = (float)s->weights->draft_shape.value_scale,
                                             .eps = (float)s->weights->draft_shape.norm_eps};
    spread(list, op, US_ENGINE_ROWS * op->context.layers * op->context.G);
    wait_for(list, op, product);
  }
}

static void add_selects(struct list *list) {
  const struct us_device_schedule *s = list->s;
  for (uint32_t t = 0; t < list->tiles; t++) {
    uint32_t head = list->last[list->units->count - 1][t];
    struct us_engine_op *op = add(list, US_ENGINE_SELECT, NULL, t);
    if (!op) return;
    op->select = (struct us_engine_select){.logits = s->ops[head].gemm.out,
                                           .stride = s->logits_stride,
                                           .count = s->logits_count,
                                           .first = s->logits_first,
                                           .vocab = s->weights->shape.vocab,
                                           .draft = list->pass == US_ENGINE_PASS_DRAFT};
    wait_for(list, op, head);
  }
}

static void add_accept(struct list *list) {
  uint32_t last = list->s->op_count - 1;
  struct us_engine_op *op = add(list, US_ENGINE_ACCEPT, NULL, 0);
  if (!op) return;
  op->accept.vocab = list->s->weights->shape.vocab;
  wait_for(list, op, last);
}

/* ACCEPT has its place: who waits for it learns which. */
static void set_accept(struct us_device_schedule *s) {
  uint32_t accept = s->op_count - 1;
  for (uint32_t i = 0; i < s->op_count; i++) {
    struct us_engine_op *op = &s->ops[i];
    if (op->wait == US_ENGINE_NONE - 1) op->wait = accept;
    if (op->kind == US_ENGINE_ATTENTION && op->program == US_ENGINE_PASS_TARGET) op->attention.ready = accept;
  }
}

/* ---- the round --------------------------------------------------------------------------------------------------- */

static void add_pass(struct list *list, const struct us_program *program) {
  struct us_device_schedule *s = list->s;
  struct us_schedule_units units;
  list->status = us_schedule_units_create(program, s->weights->rank, &units, list->err);
  list->units = &units;
  if (list->status == US_OK && !(list->last = calloc(units.count, sizeof *list->last)))
    list->status = us_err_memory(list->err, "a list of operations", units.count * sizeof *list->last);
  uint32_t exchanges = list->exchanges;
  for (uint32_t i = 0; list->status == US_OK && i < units.count; i++) add_unit(list, &units.unit[i]);
  if (list->pass == US_ENGINE_PASS_CONTEXT) add_contexts(list);
  if (list->pass == US_ENGINE_PASS_TARGET) s->head_end = s->op_count;
  if (list->pass != US_ENGINE_PASS_CONTEXT) {
    add_selects(list);
    s->selects[list->pass] = list->tiles;
  }
  if (list->pass == US_ENGINE_PASS_TARGET) add_accept(list);
  s->exchanges[list->pass] = list->exchanges - exchanges;
  free(list->last), free(units.unit);
  list->last = NULL;
}

enum us_status us_schedule_list_create(struct us_device_schedule *s,
                                       const struct us_schedule_programs *programs, struct us_err *err) {
  struct list list = {.s = s,
                      .b = &us_schedule_owner(s)->buffers,
                      .tiles = s->row_tiles,
                      .known = {-2, -2},
                      .status = US_OK,
                      .err = err};
  for (int pass = 0; list.status == US_OK && pass < US_ENGINE_PASSES; pass++) {
    s->begin[pass] = s->op_count;
    list.pass = (enum us_engine_program)pass;
    if (programs->program[pass]) add_pass(&list, programs->program[pass]);
    s->end[pass] = s->op_count;
  }
  if (list.status == US_OK) set_accept(s);
  free(list.at);
  return list.status;
}
