/* schedule_order.c: the proof that hand-offs order every two accesses of a buffer, round after round.
 *
 * Contents: what blocks know; hand-offs; rows and sequences; one operation; rounds.
 *
 * How blocks run a list (kernels/engine/block.cuh), and so what may be concluded:
 * - The compute warps of a block take operations in order. All of them wait for op->wait before they touch memory, also in blocks
 *   that have no part in the operation; weights alone are read ahead.
 * - Attention's rows and page tables are read by a warp that plans it (attention_ahead.cuh): when its block's compute warps have come to
 *   the dense product of one row tile before it, to the reduction of one before that, or to the attention, and attention.ready is done.
 * - A dense product of several row tiles (wide.cuh) is a vector operation to the others: its compute warps finish it. A warp of its
 *   own loads its activations into the ring. That warp waits at the end of a round and where such products do, nowhere else, and a stage's
 *   barrier does not tell it one phase from the next but one: attention, which takes the ring, must be over.
 * - done[op] of a vector operation counts blocks whose compute warps have passed it: then all blocks have passed all operations
 *   before it, except that the epilogue warps of products before it may still be writing.
 * - done[op] of a product counts epilogue warps, which take products in order: then all products up to it are written. A block
 *   without tiles counts itself early, but one that has tiles has waited as the operation says.
 * - A reduction ends in a block with slices only when all columns of all ranks have been pushed, which their pushers do after
 *   waiting; a block without slices passes it at once. What comes by such data and not by a count ("over") proves that reads are
 *   over, and that another rank is past an operation; it does not make plain writes visible ("seen").
 * - A SELECT ends in block 0, and so is done, only when every block of every rank has sent its candidates, after waiting.
 * - Which block multiplies a tile of a product is decided by a counter that blocks ask before they wait for anything, and that the
 *   last question of a round sets back. A block asks in an operation of the next round only when it has passed the round's last
 *   SELECT and so knows the last product done; products before it are, too, and a block is not done with one that it still asks for.
 * - A block with a share of the experts' down projection ends it after all of gate and up is done, but begins with the experts whose
 *   epilogues have said so. Others wait at its beginning. What it writes, it writes at its end.
 * - Words that carry their own flag (route.flagged, gemm.awaits: logits, attended rows) are made absent by a reduction and written once
 *   after it; a block reads them until none is absent. That makes them seen, and nothing else: no count is waited for.
 * - Slices of columns belong to the same block in every reduction: residual and taps are that block's own.
 */
#include "device/schedule_order.h"

#include <stdlib.h>

#define ROUNDS 3 /* the first has nothing before it; the others differ if a hazard spans two rounds */

/* ---- what blocks know -------------------------------------------------------------------------------------------- */

static const struct view nothing = {{-1, -1}, {-1, -1}, -1, -1};

static void join_known(struct known *to, struct known from) {
  us_schedule_raise(&to->vector, from.vector);
  us_schedule_raise(&to->gemm, from.gemm);
}

static void join_over(struct view *to, const struct view *from) {
  join_known(&to->over, from->over);
  us_schedule_raise(&to->peers, from->peers);
  us_schedule_raise(&to->pushed, from->pushed);
}

static void join(struct view *to, const struct view *from) {
  join_known(&to->seen, from->seen);
  join_over(to, from);
}

enum us_status us_schedule_order_wrong(const struct us_schedule_order *o, int64_t x, const char *what) {
  return us_schedule_wrong(o->s, (uint32_t)(x % o->n), o->err, "%s", what);
}

/* ---- hand-offs --------------------------------------------------------------------------------------------------- */

/* The operation that `other`, named by operation x, means: of this round, or if it is not earlier of the round before. */
static int64_t meant(const struct us_schedule_order *o, int64_t x, uint32_t other) {
  int64_t round = x / o->n;
  return (other < x % o->n ? round : round - 1) * (int64_t)o->n + other;
}

/* `view` learns that done[v] is complete. */
static void learn_done(const struct us_schedule_order *o, struct view *view, int64_t v) {
  if (v < 0) return;
  struct view learnt = nothing;
  if (us_schedule_is_gemm(us_schedule_op(o, v)))
    learnt.seen.gemm = v, learnt.over.gemm = v;
  else
    learnt.seen.vector = v, learnt.over.vector = v;
  join(view, &learnt);
  join(view, us_schedule_is_gemm(us_schedule_op(o, v)) ? &o->start[v] : &o->end[v]);
}

/* All addends of a reduction have come: their pushers, on every rank, had waited as the list says. */
static void learn_pushed(const struct us_schedule_order *o, struct view *view, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  if (op->kind != US_ENGINE_REDUCE) return;
  for (uint32_t t = 0; t < op->row_tiles; t++) {
    const struct view *pusher = &o->start[x / o->n * o->n + o->pusher[op->reduce.exchange + t]];
    join_over(view, pusher);
    us_schedule_raise(&view->peers, pusher->over.vector);
  }
  us_schedule_raise(&view->pushed, x);
}

static enum us_status check_wait(const struct us_schedule_order *o, int64_t x, uint32_t wait) {
  if (wait == US_ENGINE_NONE || wait < o->n) return US_OK;
  return us_schedule_order_wrong(o, x, "waits for an operation that does not exist");
}

/* Start and end of operation x, and what blocks know after it. */
static enum us_status pass_operation(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  enum us_status status = check_wait(o, x, op->wait);
  if (status != US_OK) return status;
  if (x % o->n == 0) o->loads = o->all;
  if (op->wait != US_ENGINE_NONE && !us_schedule_reads_flags(op)) {
    learn_done(o, &o->all, meant(o, x, op->wait));
    learn_done(o, &o->own, meant(o, x, op->wait));
    if (us_schedule_is_wide(op)) learn_done(o, &o->loads, meant(o, x, op->wait));
  }
  o->start[x] = us_schedule_reduces(op) ? o->own : o->all;
  if (us_schedule_reduces(op)) learn_pushed(o, &o->own, x);
  o->end[x] = o->own;
  if (op->kind == US_ENGINE_SELECT) us_schedule_raise(&o->end[x].peers, o->start[x].over.vector);
  return US_OK;
}

/* ---- rows and sequences ------------------------------------------------------------------------------------------ */

/* Rows of a pass on this rank: which token each has (the drafter's SELECT writes the target's), and all else about them, with the
 * sequences (ACCEPT writes). Tokens drawn: the target's SELECT writes. Numbers in place of addresses: no buffer lies so high. */
enum state { TOKENS = 0, PLACES = US_ENGINE_PASSES, DRAWN = 2 * US_ENGINE_PASSES, STATES };

static struct us_schedule_range state_range(enum state what, uint32_t row, uint32_t rows) {
  uintptr_t begin = ((uintptr_t)1 << 62) + (uintptr_t)what * US_ENGINE_MAX_ROWS + row;
  return (struct us_schedule_range){begin, begin + rows};
}

static enum us_status read_state(struct us_schedule_order *o, int64_t x, const struct view *view,
                                 enum state what, uint32_t row, uint32_t rows) {
  struct access a = {.x = x, .view = view, .range = state_range(what, row, rows)};
  return us_schedule_read(o, &a, true, NULL);
}

static enum us_status write_state(struct us_schedule_order *o, int64_t x, enum state what, uint32_t row,
                                  uint32_t rows) {
  struct access a = {.x = x, .view = &o->start[x], .range = state_range(what, row, rows)};
  return us_schedule_write(o, &a);
}

/* ---- one operation ----------------------------------------------------------------------------------------------- */

/* A wide product's activations come into the ring when attention has given it back. */
static enum us_status check_ring(const struct us_schedule_order *o, int64_t x) {
  int64_t begin = x - x % o->n, i = x - 1;
  while (i >= begin && us_schedule_op(o, i)->kind != US_ENGINE_ATTENTION) i--;
  if (i < begin || o->loads.over.vector >= i) return US_OK;
  return us_schedule_order_wrong(o, x, "loads activations while attention may have the ring");
}

/* The input of most operations: exactly what one operation wrote, but for the taps. */
static enum us_status touch_input(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  uint32_t inputs = us_schedule_inputs(op), *source = o->source + x % o->n * US_ENGINE_GATHERED;
  bool wide = us_schedule_is_wide(op);
  enum us_status status = wide ? check_ring(o, x) : US_OK;
  struct view view = wide ? o->loads : o->start[x];
  if (us_schedule_reads_flags(op) && op->wait != US_ENGINE_NONE) { /* this input alone */
    us_schedule_raise(&view.seen.gemm, meant(o, x, op->wait));
    us_schedule_raise(&view.seen.vector, meant(o, x, op->wait));
  }
  for (uint32_t t = 0; status == US_OK && t < op->row_tiles; t++) {
    struct access a = {.x = x, .view = &view, .range = us_schedule_input(o->s, op, t)};
    int64_t writer = -1;
    source[t] = source[0];
    if (t >= inputs) continue;
    status = us_schedule_read(o, &a, op->task_op == US_TASK_CONTEXT_FC, &writer);
    source[t] = writer < 0 ? US_ENGINE_NONE : (uint32_t)(writer % o->n);
  }
  return status;
}

/* What is read by its own flag was made absent since it was read last. */
static enum us_status check_marked(const struct us_schedule_order *o, int64_t x,
                                   struct us_schedule_range range) {
  int64_t writer = us_schedule_writer(o, range);
  const struct us_engine_op *op = writer < 0 ? NULL : us_schedule_op(o, writer);
  if (op && us_schedule_reduces(op) && (uintptr_t)op->reduce.opt_absent == range.begin) return US_OK;
  return us_schedule_order_wrong(o, x, "writes words with a flag of their own where none was absent");
}

static enum us_status touch_output(struct us_schedule_order *o, int64_t x, const struct view *view) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  enum us_status status = US_OK;
  for (uint32_t t = 0; status == US_OK && t < us_schedule_outputs(op); t++) {
    struct access a = {.x = x, .view = view, .range = us_schedule_output(o->s, op, t)};
    bool flagged = op->kind == US_ENGINE_GEMM ? op->gemm.flagged
                                              : op->kind == US_ENGINE_ATTENTION && us_schedule_flags(o->s);
    if (flagged) status = check_marked(o, x, a.range);
    if (status == US_OK && a.range.end > a.range.begin) status = us_schedule_write(o, &a);
  }
  return status;
}

/* The slot of a push was last read by a reduction that every rank has ended. tile: of its row tiles. */
static enum us_status check_slot(const struct us_schedule_order *o, int64_t x, uint32_t tile) {
  int64_t all = o->exchanges, e = x / o->n * all + us_schedule_exchange(us_schedule_op(o, x)) + tile,
          before = e - o->s->rank.slots;
  while (before >= 0 && o->pusher[before % all] == US_ENGINE_NONE) before -= o->s->rank.slots;
  if (before < 0 || o->start[x].peers >= before / all * o->n + o->reduction[before % all]) return US_OK;
  return us_schedule_order_wrong(o, x, "pushes into an exchange slot that a rank may not have emptied");
}

/* A row tile's residual, and what is tapped of it. */
static enum us_status touch_residual(struct us_schedule_order *o, int64_t x, uint32_t tile) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  const struct us_engine_reduce *r = &op->reduce;
  uint64_t bytes = us_schedule_row_bytes(r->D);
  struct access a = {.x = x,
                     .view = &o->start[x],
                     .range = us_schedule_range((const uint8_t *)r->residual + tile * bytes, bytes),
                     .own = true};
  enum us_status status = US_OK;
  if (op->kind == US_ENGINE_EMBED) {
    status = read_state(o, x, a.view, TOKENS + op->program, (op->row_tile + tile) * US_ENGINE_ROWS,
                        US_ENGINE_ROWS);
  } else if (!r->replace) {
    status = us_schedule_read(o, &a, false, NULL);
  }
  if (status == US_OK) status = us_schedule_write(o, &a);
  if (status != US_OK || !r->opt_tap) return status;
  a.range =
      us_schedule_range((const uint8_t *)r->opt_tap + tile * r->tap_tile, us_schedule_operand_bytes(r->D));
  return us_schedule_write(o, &a);
}

static enum us_status touch_reduce(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_reduce *r = &us_schedule_op(o, x)->reduce;
  struct access marks = {.x = x,
                         .view = &o->start[x],
                         .range = us_schedule_range(r->opt_absent, (uint64_t)r->absent * sizeof(uint32_t))};
  enum us_status status = r->opt_absent ? us_schedule_write(o, &marks) : US_OK;
  for (uint32_t t = 0; status == US_OK && t < us_schedule_op(o, x)->row_tiles; t++)
    status = touch_residual(o, x, t);
  return status == US_OK ? touch_output(o, x, &o->end[x]) : status; /* after the norm's exchange */
}

/* Cached keys: those before the pass's rows. The target appends to them, the drafter's are the context's. */
static enum us_status check_cache(const struct us_schedule_order *o, int64_t x, const struct view *early) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  bool target = op->program == US_ENGINE_PASS_TARGET;
  int64_t writer =
      target ? (x / o->n - 1) * o->n + o->last_attention[0][op->layer] : meant(o, x, o->last_context);
  if (writer < 0 || early->seen.vector >= writer) return US_OK;
  return us_schedule_order_wrong(o, x, "reads cached keys that may not be written yet");
}

/* What is fetched before op->wait: after op->attention.ready, or not before. */
static enum us_status touch_early(struct us_schedule_order *o, int64_t x, struct view before) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  uint32_t ready = op->attention.ready, row = op->row_tile * US_ENGINE_ROWS;
  enum us_status status = check_wait(o, x, ready);
  if (status != US_OK) return status;
  if (ready == US_ENGINE_NONE)
    before = o->start[x];
  else
    learn_done(o, &before, meant(o, x, ready));
  status = read_state(o, x, &before, PLACES + op->program, row, US_ENGINE_ROWS);
  return status == US_OK ? check_cache(o, x, &before) : status;
}

/* New keys of a row may stand in the projections of row tiles close by. */
static enum us_status touch_attention(struct us_schedule_order *o, int64_t x, struct view before) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  const struct us_engine_attention *t = &op->attention;
  struct us_schedule_range mine = us_schedule_input(o->s, op, 0);
  struct us_schedule_span span = us_schedule_span(o->s, op->row_tile);
  if (!t->draft) { /* a pass that is not ACCEPT's may lay out a sequence's 16 rows anywhere */
    span.first = op->row_tile > 2 ? op->row_tile - 2 : 0;
    span.last = op->row_tile;
  }
  enum us_status status = touch_early(o, x, before);
  for (uint32_t tile = span.first; status == US_OK && tile <= span.last; tile++) {
    uintptr_t offset = ((uintptr_t)tile - op->row_tile) * (mine.end - mine.begin);
    struct access a = {.x = x, .view = &o->start[x], .range = {mine.begin + offset, mine.end + offset}};
    status = us_schedule_read(o, &a, false, NULL);
  }
  if (status == US_OK) status = touch_input(o, x);
  struct access work = {.x = x, .view = &o->start[x]};
  uint64_t partial =
      us_engine_attention_partial_bytes(t->H, t->G, t->V, t->window, o->s->options.max_positions);
  work.range = us_schedule_range(t->partial, partial);
  if (status == US_OK) status = us_schedule_write(o, &work);
  work.range = us_schedule_range(t->arrivals, us_engine_attention_counters(t->H, t->G) * sizeof(uint32_t));
  if (status == US_OK) status = us_schedule_write(o, &work);
  return status == US_OK ? touch_output(o, x, &o->start[x]) : status;
}

static enum us_status touch_context(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  enum us_status status = touch_input(o, x);
  if (status == US_OK)
    status =
        read_state(o, x, &o->start[x], PLACES + op->program, op->row_tile * US_ENGINE_ROWS, US_ENGINE_ROWS);
  for (uint32_t l = 0; status == US_OK && l < op->context.layers; l++) {
    int64_t reader = meant(o, x, o->last_attention[1][l]);
    if (o->last_attention[1][l] != US_ENGINE_NONE && !us_schedule_read_is_over(o, &o->start[x], reader))
      status = us_schedule_order_wrong(o, x, "writes cached keys that may still be read");
  }
  return status;
}

/* The router's choice lies in every block's own memory, where the products of the choice before have used it. */
static enum us_status touch_route(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  for (int64_t i = x - 1; i >= 0 && i > x - (int64_t)o->n; i--) {
    const struct us_engine_op *user = us_schedule_op(o, i);
    if (!us_schedule_is_gemm(user) || !user->gemm.experts) continue;
    if (!us_schedule_is_written(o, &o->start[x].over, i))
      return us_schedule_order_wrong(o, x, "chooses while the choice before may be in use");
    break;
  }
  enum us_status status = touch_input(o, x);
  if (status == US_OK && op->row_tiles > 1) { /* all blocks have read what was chosen here before */
    struct access a = {.x = x,
                       .view = &o->start[x],
                       .range =
                           us_schedule_range(op->route.choices, (uint64_t)op->row_tiles * US_ENGINE_ACTIVE *
                                                                    sizeof *op->route.choices)};
    status = us_schedule_write(o, &a);
  }
  if (status != US_OK) return status;
  return read_state(o, x, &o->start[x], PLACES + op->program, op->row_tile * US_ENGINE_ROWS,
                    op->row_tiles * US_ENGINE_ROWS);
}

/* A SELECT of a row tile. */
static enum us_status touch_rows(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  uint32_t row = op->row_tile * US_ENGINE_ROWS;
  enum us_status status = touch_input(o, x);
  if (status == US_OK) status = read_state(o, x, &o->start[x], PLACES + op->program, row, US_ENGINE_ROWS);
  if (status != US_OK) return status;
  return write_state(o, x, op->select.draft ? TOKENS + US_ENGINE_PASS_TARGET : DRAWN, row, US_ENGINE_ROWS);
}

/* A Markov head's SELECT: to the logits of all rows, as the head's product made them, it adds what the tokens before give. */
static enum us_status touch_slots(struct us_schedule_order *o, int64_t x) {
  uint32_t rows = o->s->row_tiles * US_ENGINE_ROWS, *source = o->source + x % o->n * US_ENGINE_GATHERED;
  enum us_status status = read_state(o, x, &o->start[x], TOKENS + US_ENGINE_PASS_DRAFT, 0, rows);
  if (status == US_OK) status = read_state(o, x, &o->start[x], PLACES + US_ENGINE_PASS_DRAFT, 0, rows);
  for (uint32_t t = 0; status == US_OK && t < o->s->row_tiles; t++) {
    struct access a = {
        .x = x, .view = &o->start[x], .range = us_schedule_input(o->s, us_schedule_op(o, x), t)};
    int64_t writer = -1;
    status = us_schedule_read(o, &a, false, &writer);
    if (status == US_OK && (writer < 0 || us_schedule_op(o, writer)->task_op != US_TASK_HEAD))
      return us_schedule_order_wrong(o, x, "adds to logits that are not the head's");
    if (t == 0) *source = (uint32_t)(writer % o->n);
    if (status == US_OK) status = us_schedule_write(o, &a);
    if (status == US_OK)
      status = write_state(o, x, TOKENS + US_ENGINE_PASS_TARGET, t * US_ENGINE_ROWS, US_ENGINE_ROWS);
  }
  return status;
}

static enum us_status touch_select(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  uint32_t row = 0;
  if (x >= o->n && o->start[x].peers < x - (int64_t)o->n)
    return us_schedule_order_wrong(
        o, x, "sends candidates where a rank may still look for those of the round before");
  enum us_status status = op->select.slots ? touch_slots(o, x) : touch_rows(o, x);
  bool cuts = op->select.draft && o->s->options.adaptive && (op->select.last || op->select.slots);
  for (; cuts && status == US_OK && row < o->s->row_tiles * US_ENGINE_ROWS; row += US_ENGINE_ROWS)
    status = write_state(o, x, PLACES + US_ENGINE_PASS_TARGET, row, US_ENGINE_ROWS);
  return status;
}

/* Logits of all rows of a pass. */
static enum us_status read_logits(struct us_schedule_order *o, int64_t x, const float *logits) {
  uint64_t tile = us_schedule_row_bytes(o->s->logits_stride);
  enum us_status status = US_OK;
  for (uint32_t t = 0; logits && status == US_OK && t < o->s->row_tiles; t++) {
    struct access a = {
        .x = x, .view = &o->start[x], .range = us_schedule_range((const uint8_t *)logits + t * tile, tile)};
    status = us_schedule_read(o, &a, false, NULL);
  }
  return status;
}

static enum us_status touch_accept(struct us_schedule_order *o, int64_t x) {
  uint32_t rows = o->s->row_tiles * US_ENGINE_ROWS;
  enum us_status status = read_state(o, x, &o->start[x], DRAWN, 0, rows);
  if (status == US_OK) status = read_state(o, x, &o->start[x], TOKENS + US_ENGINE_PASS_TARGET, 0, rows);
  if (status == US_OK) status = read_logits(o, x, us_schedule_op(o, x)->accept.logits);
  if (status == US_OK) status = read_logits(o, x, us_schedule_op(o, x)->accept.opt_draft_logits);
  for (int what = TOKENS; what < DRAWN; what++)
    for (uint32_t row = 0; status == US_OK && row < rows; row += US_ENGINE_ROWS)
      status = write_state(o, x, (enum state)what, row, US_ENGINE_ROWS);
  return status;
}

/* How many operations before x blocks begin to plan it, if it is attention. */
static int plans_ahead(const struct us_schedule_order *o, int64_t x) {
  if (x % o->n == 0 || us_schedule_op(o, x)->kind != US_ENGINE_ATTENTION) return 0;
  const struct us_engine_op *op = us_schedule_op(o, x - 1);
  if (op->kind != US_ENGINE_GEMM || op->gemm.experts || op->row_tiles != 1) return 0;
  op = us_schedule_op(o, x % o->n > 1 ? x - 2 : x);
  return op->kind == US_ENGINE_REDUCE && op->row_tiles == 1 ? 2 : 1;
}

/* `before`: what all blocks know before they wait; of attention, when its planning warp begins. */
static enum us_status touch(struct us_schedule_order *o, int64_t x, struct view before) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  enum us_status status = US_OK;
  for (uint32_t t = 0; us_schedule_pushes(op) && status == US_OK && t < op->row_tiles; t++)
    status = check_slot(o, x, t);
  if (status != US_OK) return status;
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_EMBED:
  case US_ENGINE_REDUCE:
    return touch_reduce(o, x);
  case US_ENGINE_ATTENTION:
    return touch_attention(o, x, before);
  case US_ENGINE_ROUTE:
    return touch_route(o, x);
  case US_ENGINE_CONTEXT:
    return touch_context(o, x);
  case US_ENGINE_SELECT:
    return touch_select(o, x);
  case US_ENGINE_ACCEPT:
    return touch_accept(o, x);
  default:
    status = touch_input(o, x);
    return status == US_OK ? touch_output(o, x, &o->start[x]) : status;
  }
}

/* ---- rounds ------------------------------------------------------------------------------------------------------ */

/* Who pushes and who reduces each exchange: one operation each, the reduction later. */
static enum us_status pair_exchanges(struct us_schedule_order *o) {
  for (uint32_t e = 0; e < o->exchanges; e++) o->pusher[e] = o->reduction[e] = US_ENGINE_NONE;
  for (uint32_t i = 0; i < o->n; i++) {
    const struct us_engine_op *op = &o->s->ops[i];
    bool reduces = us_schedule_reduces(op);
    if (!reduces && !us_schedule_pushes(op)) continue;
    uint32_t *of = reduces ? o->reduction : o->pusher;
    for (uint32_t t = 0; t < op->row_tiles; t++) {
      uint32_t e = us_schedule_exchange(op) + t;
      if (e >= o->exchanges || of[e] != US_ENGINE_NONE)
        return us_schedule_order_wrong(o, i, "shares its exchange with another operation");
      of[e] = i;
      if (op->kind == US_ENGINE_REDUCE && o->pusher[e] == US_ENGINE_NONE)
        return us_schedule_order_wrong(o, i, "waits for sums that nothing before it pushes");
    }
  }
  for (uint32_t e = 0; e < o->exchanges; e++)
    if (o->pusher[e] != US_ENGINE_NONE &&
        (o->reduction[e] == US_ENGINE_NONE || o->s->ops[o->reduction[e]].kind != US_ENGINE_REDUCE))
      return us_schedule_order_wrong(o, o->pusher[e], "pushes sums that nothing adds");
  return US_OK;
}

static void find_caches(struct us_schedule_order *o) {
  for (int k = 0; k < 2; k++)
    for (int l = 0; l < US_MAX_LAYERS; l++) o->last_attention[k][l] = US_ENGINE_NONE;
  o->last_context = US_ENGINE_NONE;
  for (uint32_t i = 0; i < o->n; i++) {
    const struct us_engine_op *op = &o->s->ops[i];
    if (op->kind == US_ENGINE_ATTENTION) o->last_attention[op->attention.draft][op->layer] = i;
    if (op->kind == US_ENGINE_CONTEXT) o->last_context = i;
  }
}

/* What stands in memory before the first round: rows, taps of rows that are not context. */
static enum us_status begin(struct us_schedule_order *o) {
  const struct us_schedule_buffers *b = &us_schedule_owner(o->s)->buffers;
  enum us_status status = US_OK;
  for (uint32_t t = 0; t < o->s->row_tiles; t++) {
    for (int what = 0; status == US_OK && what < STATES; what++)
      status = us_schedule_stands(o, state_range((enum state)what, t * US_ENGINE_ROWS, US_ENGINE_ROWS));
    if (status == US_OK && b->features)
      status = us_schedule_stands(o, us_schedule_range(b->features + t * b->features_tile, b->features_tile));
  }
  return status;
}

static enum us_status allocate(struct us_schedule_order *o) {
  size_t views = (size_t)ROUNDS * o->n * sizeof *o->start;
  o->start = malloc(views);
  o->end = malloc(views);
  o->pusher = malloc((o->exchanges + 1) * sizeof *o->pusher);
  o->reduction = malloc((o->exchanges + 1) * sizeof *o->reduction);
  o->source = malloc((size_t)o->n * US_ENGINE_GATHERED * sizeof *o->source);
  if (!o->start || !o->end || !o->pusher || !o->reduction || !o->source)
    return us_err_memory(o->err, "a proof", views);
  for (uint32_t i = 0; i < o->n * US_ENGINE_GATHERED; i++) o->source[i] = US_ENGINE_NONE;
  return US_OK;
}

enum us_status us_schedule_check_order(const struct us_device_schedule *s,
                                       struct us_schedule_order **ret_order, struct us_err *err) {
  *ret_order = NULL;
  struct us_schedule_order *o = calloc(1, sizeof *o);
  if (!o) return us_err_memory(err, "a proof", sizeof *o);
  *o = (struct us_schedule_order){
      .s = s, .n = s->op_count, .all = nothing, .own = nothing, .loads = nothing, .err = err};
  for (int pass = 0; pass < US_ENGINE_PASSES; pass++) o->exchanges += s->exchanges[pass];
  enum us_status status = allocate(o);
  if (status == US_OK) status = pair_exchanges(o);
  if (status == US_OK) status = begin(o);
  if (status == US_OK) find_caches(o);
  struct view known[3] = {nothing, nothing,
                          nothing}; /* when blocks come to operation x, the one before, ... */
  for (int64_t x = 0; status == US_OK && x < (int64_t)ROUNDS * o->n; x++) {
    known[2] = known[1], known[1] = known[0], known[0] = o->all;
    status = pass_operation(o, x);
    if (status == US_OK) status = touch(o, x, known[plans_ahead(o, x)]);
  }
  o->err = NULL;
  if (status == US_OK)
    *ret_order = o;
  else
    us_schedule_order_free(o);
  return status;
}

void us_schedule_order_free(struct us_schedule_order *o) {
  if (!o) return;
  free(o->start), free(o->end), free(o->pusher), free(o->reduction), free(o->source), free(o->piece);
  free(o);
}

bool us_schedule_after(const struct us_schedule_order *o, uint32_t op, uint32_t before) {
  int64_t first = (ROUNDS - 1) * (int64_t)o->n;
  return us_schedule_is_written(o, &o->start[first + op].seen, first + before);
}

uint32_t us_schedule_source(const struct us_schedule_order *o, uint32_t op, uint32_t row_tile) {
  uint32_t t = row_tile - o->s->ops[op].row_tile;
  return t < o->s->ops[op].row_tiles ? o->source[op * US_ENGINE_GATHERED + t] : US_ENGINE_NONE;
}
