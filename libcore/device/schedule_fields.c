/* schedule_fields.c: the proof that sizes, cuts and numbers of every operation are what weights, shapes and kernels want.
 *
 * Contents: buffers; products; experts; reductions; attention and rows; all.
 */
#include "device/schedule_impl.h"
#include "model/kv.h"

#include <math.h>
#include <string.h>

struct fields {
  const struct us_device_schedule *s;
  uint32_t op, exchanges; /* exchanges so far */
  struct us_err *err;
};

#define WANT(condition, ...)                                                                                 \
  do {                                                                                                       \
    if (!(condition)) return us_schedule_wrong(f->s, f->op, f->err, __VA_ARGS__);                            \
  } while (0)

static const struct us_engine_op *op_of(const struct fields *f) {
  return &f->s->ops[f->op];
}

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

static bool inside(struct us_schedule_range r, const void *begin, uint64_t bytes) {
  uintptr_t from = (uintptr_t)begin;
  return begin && r.begin >= from && r.end <= from + bytes;
}

/* Whether the range lies in `count` row tiles of one buffer, the first the operation's `tile`-th. */
static bool in_tiles(const struct fields *f, struct us_schedule_range r, uint32_t tile, uint32_t count) {
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  const struct {
    const void *begin;
    uint64_t tile;
  } buffers[] = {{b->normed, b->normed_tile},   {b->attended, b->attended_tile},
                 {b->inner, b->inner_tile},     {b->router, b->router_tile},
                 {b->pairs, b->pairs_tile},     {b->features, b->features_tile},
                 {b->logits, b->logits_tile},   {b->draft_logits, b->logits_tile},
                 {b->partial, b->partial_tile}, {b->arrivals, b->arrivals_tile}};
  uint32_t t = op_of(f)->row_tile + tile;
  for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
    if (buffers[i].begin &&
        inside(r, (const uint8_t *)buffers[i].begin + t * buffers[i].tile, count * buffers[i].tile))
      return true;
  return false;
}

/* Rows of the operation's row tile in a buffer of (rows of the pass, columns). */
static bool in_rows(const struct fields *f, struct us_schedule_range r, uint32_t piece, const void *base,
                    uint64_t columns) {
  uint64_t tile = US_ENGINE_ROWS * columns * sizeof(float);
  return base && r.begin == (uintptr_t)base + (op_of(f)->row_tile + piece) * tile && r.end == r.begin + tile;
}

static enum us_status check_range(const struct fields *f, struct us_schedule_range r, uint32_t tile,
                                  uint32_t count, const char *what) {
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  const struct us_engine_op *op = op_of(f);
  bool rows =
      op->task_op == US_TASK_CONTEXT_KV || op->task_op == US_TASK_QKV || op->task_op == US_TASK_ATTENTION;
  if (r.begin == r.end || in_tiles(f, r, tile, count)) return US_OK;
  if (rows && op->task_op == US_TASK_CONTEXT_KV)
    rows = in_rows(f, r, tile, b->context_kv, f->s->weights->draft_kv.rows);
  else if (rows)
    rows = in_rows(f, r, tile, b->qkv, us_schedule_layer(f->s, op->program, op->layer)->qkv.rows);
  WANT(rows, "its %s lies outside of its row tile's buffers", what);
  return US_OK;
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

static enum us_status check_matrix(const struct fields *f, const struct us_engine_matrix *w) {
  const struct us_engine_op *op = op_of(f);
  const struct us_device_matrix *m =
      us_schedule_matrix(f->s, op->program, (enum us_task_op)op->task_op, op->layer);
  WANT(m && memcmp(w, &m->pages, sizeof *w) == 0, "its pages are another matrix's");
  WANT(w->slices * w->groups * 32 == m->cols, "%u pages a tile do not hold %u columns", w->slices, m->cols);
  WANT(w->tiles == (m->rows + 16 * w->halves - 1) / (16 * w->halves), "%u tiles do not hold %u rows",
       w->tiles, m->rows);
  WANT(op->bytes == m->bytes && op->bytes == (uint64_t)w->tiles * w->slices * w->page_bytes,
       "its bytes are not its pages'");
  return US_OK;
}

static enum us_status check_cut(const struct fields *f, const struct us_engine_gemm *g) {
  bool stored_once = g->epilogue != US_ENGINE_PUSH && op_of(f)->task_op != US_TASK_ROUTER;
  uint32_t most = US_ENGINE_MAX_SUBS(g->w.format, g->w.halves);
  WANT(g->parts && g->parts * g->warps * g->subs == g->w.slices,
       "%u parts of %u warps and %u stages are not %u slices", g->parts, g->warps, g->subs, g->w.slices);
  WANT(g->warps <= US_ENGINE_COMPUTE_WARPS && g->warps * g->w.page_bytes <= US_ENGINE_STAGE_BYTES,
       "%u warps' pages are no stage", g->warps);
  WANT(g->subs <= most && g->w.groups <= US_ENGINE_PAGE_GROUPS(g->w.format, g->w.halves),
       "%u stages of %u groups are too many for registers", g->subs, g->w.groups);
  WANT(g->parts == 1 || !stored_once, "nobody adds its %u parts", g->parts);
  return US_OK;
}

/* What a task's product does with its sums. */
static enum us_engine_epilogue epilogue_of(enum us_task_op op) {
  switch (op) {
  case US_TASK_O_PROJ:
  case US_TASK_DENSE_DOWN:
  case US_TASK_CONTEXT_FC:
    return US_ENGINE_PUSH;
  case US_TASK_DENSE_UP:
    return US_ENGINE_SWIGLU;
  case US_TASK_EXPERT_UP:
    return US_ENGINE_SWIGLU_EXPERT;
  default:
    return US_ENGINE_STORE;
  }
}

static enum us_status check_push(const struct fields *f, const struct us_engine_gemm *g) {
  bool gather = op_of(f)->task_op == US_TASK_CONTEXT_FC;
  const struct us_engine_rank *r = &f->s->rank;
  WANT(g->gather == gather && g->valid * (gather ? r->ranks : 1) == r->D &&
           g->first == (gather ? r->rank * g->valid : 0),
       "columns [%u, + %u) of %u are not this rank's", g->first, g->valid, r->D);
  WANT(g->valid == g->w.tiles * g->w.halves * 16, "pads %u columns", g->valid);
  return US_OK;
}

/* The choice that the operation uses: the one before it in the list, of its layer and row tile. */
static enum us_status check_route(const struct fields *f, uint32_t route) {
  const struct us_engine_op *op = op_of(f);
  uint32_t before = f->op;
  while (before && f->s->ops[before].kind != US_ENGINE_ROUTE) before--;
  const struct us_engine_op *from = &f->s->ops[before];
  WANT(route == before && from->kind == US_ENGINE_ROUTE && from->layer == op->layer &&
           from->row_tile == op->row_tile && from->row_tiles == op->row_tiles,
       "its choice of experts is not operation %u", route);
  return US_OK;
}

/* From a row tile's operand to the next's, and its output. */
static uint64_t operand_tile(const struct fields *f) {
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  switch ((enum us_task_op)op_of(f)->task_op) {
  case US_TASK_CONTEXT_FC:
    return b->features_tile;
  case US_TASK_O_PROJ:
    return b->attended_tile;
  case US_TASK_DENSE_DOWN:
    return b->inner_tile;
  default:
    return b->normed_tile;
  }
}
static uint64_t out_tile(const struct fields *f, const struct us_engine_gemm *g) {
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  switch ((enum us_task_op)op_of(f)->task_op) {
  case US_TASK_ROUTER:
    return b->router_tile;
  case US_TASK_HEAD:
    return b->logits_tile;
  case US_TASK_DENSE_UP:
    return b->inner_tile;
  case US_TASK_QKV:
  case US_TASK_CONTEXT_KV:
    return us_schedule_row_bytes(g->valid);
  default:
    return 0;
  }
}

static enum us_status check_gemm(const struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  const struct us_engine_gemm *g = &op->gemm;
  const struct us_device_matrix *m =
      us_schedule_matrix(f->s, op->program, (enum us_task_op)op->task_op, op->layer);
  enum us_status status = check_matrix(f, &g->w);
  if (status == US_OK) status = check_cut(f, g);
  if (status != US_OK) return status;
  WANT(g->epilogue == epilogue_of((enum us_task_op)op->task_op), "its sums go elsewhere");
  bool gated = g->epilogue == US_ENGINE_SWIGLU || g->epilogue == US_ENGINE_SWIGLU_EXPERT;
  WANT(g->valid == (gated ? m->rows / 2 : m->rows) && g->F == (gated ? g->valid : 0),
       "%u of %u rows are valid", g->valid, m->rows);
  WANT(!gated || (g->w.halves == 2 && g->F == g->w.tiles * 16), "gate and up do not fill its tiles");
  if (g->epilogue == US_ENGINE_STORE) {
    uint32_t stride = op->task_op == US_TASK_HEAD ? f->s->logits_stride : m->rows;
    WANT(g->out_stride == stride && stride >= g->valid, "rows of %u outputs lie %u apart", g->valid,
         g->out_stride);
  }
  WANT(g->experts == (op->task_op == US_TASK_EXPERT_UP), "takes other weights than its task's");
  WANT(g->operand_tile == (op->row_tiles > 1 ? operand_tile(f) : 0) &&
           g->out_tile == (op->row_tiles > 1 ? out_tile(f, g) : 0),
       "its row tiles lie elsewhere");
  WANT(g->flagged == (op->task_op == US_TASK_ROUTER && us_schedule_flags(f->s)),
       "its sums' flags are not what their reader looks for");
  WANT(g->awaits == (op->task_op == US_TASK_O_PROJ && us_schedule_flags(f->s)),
       "its operand's flags are not what their writer leaves");
  if (g->experts) status = check_route(f, g->route);
  return status == US_OK && g->epilogue == US_ENGINE_PUSH ? check_push(f, g) : status;
}

/* ---- experts ----------------------------------------------------------------------------------------------------- */

static enum us_status check_down(const struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  const struct us_engine_down *d = &op->down;
  enum us_status status = check_matrix(f, &d->w);
  if (status == US_OK) status = check_route(f, d->route);
  if (status != US_OK) return status;
  for (uint32_t i = d->route + 1; i < f->op; i++)
    WANT(f->s->ops[i].kind == US_ENGINE_GEMM, "operation %u may use the scratch where its stages are told of",
         i);
  WANT(d->w.halves == 1 && d->w.format != US_FORMAT_F32 && d->w.tiles * 16 == f->s->rank.D,
       "its pages are not a down matrix's");
  WANT(d->F == us_schedule_layer(f->s, op->program, op->layer)->down.cols,
       "%u inner columns are not the matrix's", d->F);
  WANT(d->step_slices && d->step_slices * d->steps == d->w.slices, "%u steps of %u slices are not %u",
       d->steps, d->step_slices, d->w.slices);
  WANT(d->step_slices * d->w.groups <= US_ENGINE_COMPUTE_WARPS, "a step has more than a group a warp");
  WANT((d->stage_steps == 1 || d->stage_steps == 2) &&
           us_schedule_step_bytes(&d->w, d->step_slices, true) <= US_ENGINE_DOWN_BYTES &&
           d->stage_steps * us_schedule_step_bytes(&d->w, d->step_slices, false) <= US_ENGINE_DOWN_BYTES,
       "%u steps are no stage", d->stage_steps);
  return US_OK;
}

/* Where row tiles that are chosen for together lie, and who makes their choices' running number. */
static enum us_status check_choices(const struct fields *f, const struct us_engine_route *r) {
  const struct us_engine_op *op = op_of(f);
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  uint32_t exchange = 0;
  bool several = op->row_tiles > 1;
  for (uint32_t i = f->op; several && i < f->s->op_count; i++)
    if (f->s->ops[i].kind == US_ENGINE_DOWN && f->s->ops[i].down.route == f->op) {
      exchange = f->s->ops[i].down.exchange;
      break;
    }
  WANT(r->logits_tile == (several ? b->router_tile / sizeof(float) : 0) &&
           r->choices == (several ? b->choices + (size_t)op->row_tile * US_ENGINE_ACTIVE : NULL),
       "its row tiles' choices lie elsewhere");
  WANT(r->exchange == exchange, "its choices' number is another's");
  return US_OK;
}

static enum us_status check_routing(const struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  const struct us_engine_route *r = &op->route;
  const struct us_shape *shape = &f->s->weights->shape;
  uint32_t rows = f->s->row_tiles * US_ENGINE_ROWS, *routed = f->s->routed;
  if (routed) routed += ((size_t)op->layer * rows + op->row_tile * US_ENGINE_ROWS) * shape->top_k;
  WANT(r->stride == shape->experts && r->E == shape->experts && r->top_k == shape->top_k,
       "its logits are not the router's");
  WANT(r->bias == us_schedule_layer(f->s, op->program, op->layer)->router_bias,
       "its bias is another layer's");
  WANT(r->scaling == (float)shape->routed_scaling && r->normalise == shape->norm_topk_prob,
       "its weights are not the shape's");
  WANT(r->uniform == f->s->options.uniform && r->uniform_seed == f->s->options.uniform_seed,
       "it draws otherwise than asked");
  WANT(r->opt_routed == routed, "its choice is kept elsewhere");
  WANT(r->flagged == us_schedule_flags(f->s), "its logits' flags are not what their writer leaves");
  return check_choices(f, r);
}

/* ---- reductions -------------------------------------------------------------------------------------------------- */

static uint32_t addends_of(const struct us_device_schedule *s, uint32_t exchange) {
  for (uint32_t i = 0; i < s->op_count; i++) {
    const struct us_engine_op *op = &s->ops[i];
    if (!us_schedule_pushes_to(op, exchange)) continue;
    if (op->kind == US_ENGINE_DOWN) return s->rank.ranks;
    return op->gemm.gather ? op->gemm.parts : s->rank.ranks * op->gemm.parts;
  }
  return 0;
}

/* Whether it adds the sums of an MLP. */
static bool after_mlp(const struct us_device_schedule *s, uint32_t exchange) {
  for (uint32_t i = 0; i < s->op_count; i++)
    if (us_schedule_pushes_to(&s->ops[i], exchange))
      return s->ops[i].task_op == US_TASK_DENSE_DOWN || s->ops[i].task_op == US_TASK_EXPERT_DOWN;
  return false;
}

static enum us_status check_tap(const struct fields *f, bool mlp) {
  const struct us_engine_op *op = op_of(f);
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  uint32_t tap =
      mlp && op->program == US_ENGINE_PASS_TARGET ? us_schedule_tap(f->s, op->layer) : US_ENGINE_NONE;
  const void *want =
      tap == US_ENGINE_NONE ? NULL : b->features + op->row_tile * b->features_tile + tap * b->normed_tile;
  WANT(op->reduce.opt_tap == want, "its tap is not its layer's");
  return US_OK;
}

/* What it makes absent: all that the router or the attention behind it writes. */
static enum us_status check_absent(const struct fields *f, bool mlp) {
  const struct us_engine_op *op = op_of(f);
  uint32_t *words, count;
  enum us_status status = us_schedule_absent(f->s, op, mlp, &words, &count, f->err);
  if (status != US_OK) return status;
  WANT(op->reduce.opt_absent == words && op->reduce.absent == count, "it makes other words absent");
  return check_tap(f, mlp);
}

static enum us_status check_reduce(struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  const struct us_engine_reduce *r = &op->reduce;
  const struct us_device_weights *w = f->s->weights;
  bool embed = op->kind == US_ENGINE_EMBED, target = op->program == US_ENGINE_PASS_TARGET;
  bool mlp = !embed && after_mlp(f->s, r->exchange);
  WANT(r->exchange == f->exchanges, "exchange %u is out of order", r->exchange);
  f->exchanges += op->row_tiles;
  uint32_t addends = addends_of(f->s, r->exchange); /* EMBED: none */
  uint32_t slots = f->s->rank.slots;
  WANT(slots && (slots & (slots - 1)) == 0, "%u exchange slots are no power of two", slots);
  WANT(r->addends == addends && addends <= f->s->rank.addends, "adds %u sums where %u come", r->addends,
       addends);
  WANT(r->D == f->s->rank.D && r->D % us_engine_slice(r->D) == 0, "%u columns do not divide into slices",
       r->D);
  WANT(r->weight &&
           r->weight == us_schedule_norm(f->s, op->program, (enum us_task_op)op->task_op, op->layer, mlp),
       "its norm is another's");
  WANT(r->eps == (float)(target ? w->shape.norm_eps : w->draft_shape.norm_eps), "its eps is another's");
  WANT(r->replace == (op->task_op == US_TASK_CONTEXT_NORM), "it keeps or replaces the residual wrongly");
  WANT(r->draft == (embed && !target), "it embeds another pass's rows");
  struct us_schedule_range rows = {(uintptr_t)r->residual,
                                   (uintptr_t)r->residual + US_ENGINE_ROWS * r->D * sizeof(float)};
  WANT(in_rows(f, rows, 0, us_schedule_owner(f->s)->buffers.residual, r->D),
       "its residual is not its row tile's");
  WANT(!r->opt_plain, "nobody looks at its plain rows");
  WANT(r->operand_tile == (op->row_tiles > 1 ? us_schedule_owner(f->s)->buffers.normed_tile : 0) &&
           r->tap_tile ==
               (op->row_tiles > 1 && r->opt_tap ? us_schedule_owner(f->s)->buffers.features_tile : 0),
       "its row tiles lie elsewhere");
  return check_absent(f, mlp);
}

/* ---- attention and rows ------------------------------------------------------------------------------------------ */

static enum us_status check_attention(const struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  const struct us_engine_attention *t = &op->attention;
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  const struct us_device_weights *w = f->s->weights;
  const struct us_device_layer *layer = us_schedule_layer(f->s, op->program, op->layer);
  bool draft = op->program == US_ENGINE_PASS_DRAFT;
  int kind = draft                           ? US_SCHEDULE_DRAFT
             : w->shape.swa_layer[op->layer] ? US_SCHEDULE_WINDOWED
                                             : US_SCHEDULE_FULL;
  const struct us_attention_shape *a = us_schedule_attention(f->s, (enum us_schedule_attention)kind);
  WANT(t->draft == draft && t->layer == op->layer, "it is another layer's");
  WANT(t->H * w->ranks == a->q_heads && t->G * w->ranks == a->kv_heads && t->Q == a->qk_dim &&
           t->V == a->v_dim && t->rotary == a->rotary_dim && t->window == a->window,
       "its heads are not the shape's");
  WANT(t->qkv_rows == layer->qkv.rows &&
           t->qkv_rows == (uint32_t)t->H * t->Q + (uint32_t)t->G * (t->Q + t->V),
       "%u projected rows are not its heads'", t->qkv_rows);
  WANT(layer->o_proj.cols == (uint32_t)t->H * t->V, "o_proj has %u columns", layer->o_proj.cols);
  WANT(t->sink == layer->sink && t->q_norm == (draft ? layer->q_norm : NULL) &&
           t->k_norm == (draft ? layer->k_norm : NULL),
       "its vectors are another layer's");
  WANT(t->rope == b->rope[kind] && t->page_count == us_kv_pages_of(a, f->s->options.max_positions),
       "its tables are another kind's");
  WANT(t->scale == (float)(1.0 / sqrt(a->qk_dim)) &&
           t->value_scale == (float)(draft ? w->draft_shape.value_scale : w->shape.value_scale) &&
           t->eps == (float)(draft ? w->draft_shape.norm_eps : w->shape.norm_eps),
       "its factors are not the shape's");
  uint64_t partial =
      us_engine_attention_partial_bytes(t->H, t->G, t->V, t->window, f->s->options.max_positions);
  struct us_schedule_range work = {(uintptr_t)t->partial, (uintptr_t)t->partial + partial};
  WANT(in_tiles(f, work, 0, 1) &&
           t->arrivals == b->arrivals + op->row_tile * (b->arrivals_tile / sizeof *b->arrivals),
       "its partial results lie outside of its row tile's");
  return US_OK;
}

static enum us_status check_context(const struct fields *f) {
  const struct us_engine_context *c = &op_of(f)->context;
  const struct us_device_weights *w = f->s->weights;
  const struct us_attention_shape *a = &w->draft_shape.attention;
  WANT(c->layers == w->draft_shape.layers && c->G * w->ranks == a->kv_heads && c->Q == a->qk_dim &&
           c->V == a->v_dim && c->rotary == a->rotary_dim &&
           c->layers * c->G * (uint32_t)(c->Q + c->V) == w->draft_kv.rows,
       "its heads are not the drafter's");
  WANT(c->k_norm == w->draft_k_norms && c->rope == us_schedule_owner(f->s)->buffers.rope[US_SCHEDULE_DRAFT] &&
           c->page_count == us_kv_pages_of(a, f->s->options.max_positions),
       "its tables are not the drafter's");
  WANT(c->value_scale == (float)w->draft_shape.value_scale && c->eps == (float)w->draft_shape.norm_eps,
       "its factors are not the drafter's");
  return US_OK;
}

static enum us_status check_select(const struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  const struct us_engine_select *c = &op->select;
  const struct us_device_weights *w = f->s->weights;
  WANT(c->count == w->head.rows && c->first == w->rank * w->embed_rows && c->vocab == w->shape.vocab &&
           c->first + c->count <= c->vocab,
       "ids [%u, + %u) of %u are not this rank's", c->first, c->count, c->vocab);
  WANT(c->draft == (op->program == US_ENGINE_PASS_DRAFT), "it chooses for another pass");
  uint32_t slots = c->draft ? us_schedule_slots(f->s) : 0, places = us_schedule_draft_places(f->s),
           row = op->row_tile * US_ENGINE_ROWS;
  WANT(slots ? op->row_tile == 0 && c->row == 1 && c->step == f->s->options.block &&
                   c->rows == f->s->row_tiles * US_ENGINE_ROWS
             : c->row == row && c->step == 1 && c->rows == row + US_ENGINE_ROWS,
       "rows %u, %u, ... below %u are not its own", c->row, c->row + c->step, c->rows);
  WANT(c->stride == c->step * f->s->logits_stride &&
           c->logits == (c->draft ? us_schedule_owner(f->s)->buffers.draft_logits
                                  : us_schedule_owner(f->s)->buffers.logits) +
                            (size_t)c->row * f->s->logits_stride,
       "its logits are not those of its rows");
  WANT(c->slots == slots && c->markov == (slots ? w->draft_shape.markov : 0) &&
           c->before == (slots ? w->markov_before : NULL) && c->after == (slots ? w->markov_after : NULL) &&
           c->markov <= US_ENGINE_MARKOV,
       "its Markov head is not the drafter's");
  WANT(c->number == op->row_tile + (c->draft ? 0 : places), "its candidates' place is not its own");
  WANT(f->s->rank.selects == places + f->s->row_tiles && f->s->rank.selects <= US_ENGINE_SELECTS,
       "there are %u places for candidates", f->s->rank.selects);
  WANT(c->last == (slots ? slots == 1 : op->row_tile + 1 == f->s->row_tiles),
       "it takes another SELECT for the last");
  return US_OK;
}

static enum us_status check_accept(const struct fields *f) {
  const struct us_engine_accept *a = &op_of(f)->accept;
  const struct us_schedule_buffers *b = &us_schedule_owner(f->s)->buffers;
  const struct us_device_weights *w = f->s->weights;
  WANT(a->vocab == w->shape.vocab, "it accepts from another vocabulary");
  WANT(a->tiles == f->s->row_tiles && a->logits == b->logits && a->opt_draft_logits == b->draft_logits,
       "it looks at other rows than the passes made");
  WANT(a->stride == f->s->logits_stride && a->count == w->head.rows && a->first == w->rank * w->embed_rows,
       "ids [%u, + %u) are not this rank's", a->first, a->count);
  return US_OK;
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

static enum us_status check_op(struct fields *f) {
  const struct us_engine_op *op = op_of(f);
  bool streams = op->kind == US_ENGINE_GEMM || op->kind == US_ENGINE_DOWN;
  WANT(op->row_tile < f->s->row_tiles, "there is no row tile %u", op->row_tile);
  bool together = streams || op->kind == US_ENGINE_ROUTE || us_schedule_reduces(op);
  WANT(op->row_tiles == (together ? us_schedule_together(f->s, op->program, (enum us_task_op)op->task_op,
                                                         op->layer, op->row_tile)
                                  : 1),
       "it has %u row tiles", op->row_tiles);
  WANT(streams || !op->bytes, "it streams nothing, but has bytes");
  enum us_status status = US_OK;
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_GEMM:
    status = check_gemm(f);
    break;
  case US_ENGINE_DOWN:
    status = check_down(f);
    break;
  case US_ENGINE_EMBED:
  case US_ENGINE_REDUCE:
    status = check_reduce(f);
    break;
  case US_ENGINE_ATTENTION:
    status = check_attention(f);
    break;
  case US_ENGINE_ROUTE:
    status = check_routing(f);
    break;
  case US_ENGINE_CONTEXT:
    status = check_context(f);
    break;
  case US_ENGINE_SELECT:
    status = check_select(f);
    break;
  case US_ENGINE_ACCEPT:
    status = check_accept(f);
    break;
  default:
    WANT(false, "there is no such kind");
  }
  uint32_t inputs = us_schedule_inputs(op);
  for (uint32_t t = 0; status == US_OK && t < inputs; t++)
    status = check_range(f, us_schedule_input(f->s, op, t), t, inputs == 1 ? op->row_tiles : 1, "input");
  uint32_t outputs = us_schedule_outputs(op);
  for (uint32_t t = 0; status == US_OK && t < outputs; t++)
    status = check_range(f, us_schedule_output(f->s, op, t), t, outputs == 1 ? op->row_tiles : 1, "output");
  return status;
}

enum us_status us_schedule_check_fields(const struct us_device_schedule *s, struct us_err *err) {
  struct fields f = {.s = s, .err = err};
  enum us_status status = US_OK;
  for (f.op = 0; status == US_OK && f.op < s->op_count; f.op++) status = check_op(&f);
  return status;
}
