/* schedule_order.c: the proof that hand-offs order every two accesses of a buffer, round after round.
 *
 * Contents: what blocks know; hand-offs; buffers; accesses; one operation; rounds.
 *
 * How blocks run a list (kernels/engine/block.cuh), and so what may be concluded:
 * - The compute warps of a block take operations in order. All of them wait for op->wait before they touch memory, also in blocks
 *   that have no part in the operation; weights alone are read ahead.
 * - done[op] of a vector operation counts blocks whose compute warps have passed it: then all blocks have passed all operations
 *   before it, except that the epilogue warps of products before it may still be writing.
 * - done[op] of a product counts epilogue warps, which take products in order: then all products up to it are written. A block
 *   without tiles counts itself early, but one that has tiles has waited as the operation says.
 * - A reduction ends in a block with slices only when all columns of all ranks have been pushed, which their pushers do after
 *   waiting; a block without slices passes it at once. What comes by such data and not by a count ("over") proves that reads are
 *   over, and that another rank is past an operation; it does not make plain writes visible ("seen").
 * - A SELECT ends in block 0, and so is done, only when every block of every rank has sent its candidates, after waiting.
 * - Slices of columns belong to the same block in every reduction: residual and taps are that block's own.
 */
#include "device/schedule_impl.h"

#include <stdlib.h>
#include <string.h>

#define ROUNDS 3 /* the first has nothing before it; the others differ if a hazard spans two rounds */

/* ---- what blocks know -------------------------------------------------------------------------------------------- */

/* Operations are numbered through the rounds. All vector operations up to `vector` are over in every block, and what products
 * before it read has been read; all products up to `gemm` are written. */
struct known {
  int64_t vector, gemm;
};
struct view {
  struct known seen, over; /* over: seen included */
  int64_t peers;           /* vector operations up to it are over on every rank */
  int64_t pushed;          /* reductions up to it have had all their addends */
};

static const struct view nothing = {{-1, -1}, {-1, -1}, -1, -1};

static void raise_to(int64_t *to, int64_t from) {
  if (from > *to) *to = from;
}

static void join_known(struct known *to, struct known from) {
  raise_to(&to->vector, from.vector);
  raise_to(&to->gemm, from.gemm);
}

static void join_over(struct view *to, const struct view *from) {
  join_known(&to->over, from->over);
  raise_to(&to->peers, from->peers);
  raise_to(&to->pushed, from->pushed);
}

static void join(struct view *to, const struct view *from) {
  join_known(&to->seen, from->seen);
  join_over(to, from);
}

/* Bytes [begin, end) as they were last written, and who has read them since. */
struct piece {
  uintptr_t begin, end;
  int64_t writer;
  bool own;                                /* written by blocks that own its columns */
  int64_t vector, gemm, pushing, own_read; /* the last reader of each kind; -1: none */
};

struct us_schedule_order {
  const struct us_device_schedule *s;
  uint32_t n, exchanges;
  struct view *start;   /* (ROUNDS * n) when an operation touches memory; reductions: of blocks with slices */
  struct view *end;     /* (ROUNDS * n) what its count tells: blocks with slices have ended it */
  struct view all, own; /* now: what every block knows, what blocks with slices know */
  uint32_t *pusher, *reduction;                            /* (exchanges) operations by their number */
  uint32_t *source;                                        /* (n) */
  uint32_t last_attention[2][US_MAX_LAYERS], last_context; /* by target, drafter; US_ENGINE_NONE */
  struct piece *piece;                                     /* ascending, apart */
  size_t count, capacity;
  struct us_err *err;
};

static const struct us_engine_op *op_at(const struct us_schedule_order *o, int64_t x) {
  return &o->s->ops[x % o->n];
}

static enum us_status wrong(const struct us_schedule_order *o, int64_t x, const char *what) {
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
  if (us_schedule_is_gemm(op_at(o, v)))
    learnt.seen.gemm = v, learnt.over.gemm = v;
  else
    learnt.seen.vector = v, learnt.over.vector = v;
  join(view, &learnt);
  join(view, us_schedule_is_gemm(op_at(o, v)) ? &o->start[v] : &o->end[v]);
}

/* All addends of a reduction have come: their pushers, on every rank, had waited as the list says. */
static void learn_pushed(const struct us_schedule_order *o, struct view *view, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  if (op->kind != US_ENGINE_REDUCE) return;
  const struct view *pusher = &o->start[x / o->n * o->n + o->pusher[op->reduce.exchange]];
  join_over(view, pusher);
  raise_to(&view->peers, pusher->over.vector);
  raise_to(&view->pushed, x);
}

static enum us_status check_wait(const struct us_schedule_order *o, int64_t x, uint32_t wait) {
  if (wait == US_ENGINE_NONE || wait < o->n) return US_OK;
  return wrong(o, x, "waits for an operation that does not exist");
}

/* Start and end of operation x, and what blocks know after it. */
static enum us_status pass_operation(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  enum us_status status = check_wait(o, x, op->wait);
  if (status != US_OK) return status;
  if (op->wait != US_ENGINE_NONE) {
    learn_done(o, &o->all, meant(o, x, op->wait));
    learn_done(o, &o->own, meant(o, x, op->wait));
  }
  o->start[x] = us_schedule_reduces(op) ? o->own : o->all;
  if (us_schedule_reduces(op)) learn_pushed(o, &o->own, x);
  o->end[x] = o->own;
  if (op->kind == US_ENGINE_SELECT) raise_to(&o->end[x].peers, o->start[x].over.vector);
  return US_OK;
}

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

/* Whether everything that `reader` has read is read, as far as the view tells. What an operation itself reads before it writes is
 * its own affair. */
static bool read_is_over(const struct us_schedule_order *o, const struct view *v, int64_t reader) {
  if (reader < 0 || v->over.vector >= reader) return true;
  const struct us_engine_op *op = op_at(o, reader);
  if (us_schedule_is_gemm(op) && v->over.gemm >= reader) return true;
  if (!us_schedule_pushes(op)) return false;
  return v->pushed >= reader / o->n * o->n + o->reduction[us_schedule_exchange(op)];
}

static bool write_is(const struct us_schedule_order *o, const struct known *k, int64_t writer) {
  return writer < 0 || (us_schedule_is_gemm(op_at(o, writer)) ? k->gemm : k->vector) >= writer;
}

static void note_reader(const struct us_schedule_order *o, struct piece *p, int64_t x, bool own) {
  const struct us_engine_op *op = op_at(o, x);
  raise_to(own                       ? &p->own_read
           : us_schedule_pushes(op)  ? &p->pushing
           : us_schedule_is_gemm(op) ? &p->gemm
                                     : &p->vector,
           x);
}

/* First piece that ends after `at`. */
static size_t find(const struct us_schedule_order *o, uintptr_t at) {
  size_t low = 0, high = o->count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (o->piece[middle].end > at)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

/* Replace pieces [from, to) by n others. */
static enum us_status splice(struct us_schedule_order *o, size_t from, size_t to, const struct piece *with,
                             size_t n) {
  if (o->count + n > o->capacity) {
    size_t capacity = 2 * o->capacity + n + 64;
    struct piece *grown = realloc(o->piece, capacity * sizeof *grown);
    if (!grown) return us_err_memory(o->err, "a proof", capacity * sizeof *grown);
    o->piece = grown, o->capacity = capacity;
  }
  memmove(o->piece + from + n, o->piece + to, (o->count - to) * sizeof *o->piece);
  memcpy(o->piece + from, with, n * sizeof *with);
  o->count += n - (to - from);
  return US_OK;
}

/* An access of operation x: what it knows then, what it touches. */
struct access {
  int64_t x;
  const struct view *view;
  struct us_schedule_range range;
  bool own; /* by blocks that own the columns */
};

static bool same_owner(const struct access *a, const struct piece *p, bool own) {
  return own && a->own && p->begin == a->range.begin && p->end == a->range.end;
}

/* A read of what one operation has written; `parts`: of what several have. Sets *opt_writer. */
static enum us_status read_range(struct us_schedule_order *o, const struct access *a, bool parts,
                                 int64_t *opt_writer) {
  uintptr_t at = a->range.begin;
  for (size_t i = find(o, at); at < a->range.end; i++) {
    struct piece *p = i < o->count ? &o->piece[i] : NULL;
    if (!p || p->begin > at) return wrong(o, a->x, "reads what nothing has written");
    if (!parts && p->writer >= 0 && (p->begin != a->range.begin || p->end != a->range.end))
      return wrong(o, a->x, "does not read all that one operation wrote, and nothing else");
    if (!same_owner(a, p, p->own) && !write_is(o, &a->view->seen, p->writer))
      return wrong(o, a->x, "reads what may not be written yet");
    if (opt_writer) *opt_writer = p->writer;
    note_reader(o, p, a->x, a->own);
    at = p->end;
  }
  return US_OK;
}

static enum us_status check_overwrite(const struct us_schedule_order *o, const struct access *a,
                                      const struct piece *p) {
  const struct view *v = a->view;
  int64_t readers[] = {same_owner(a, p, true) ? -1 : p->own_read, p->vector, p->gemm, p->pushing};
  for (size_t i = 0; i < sizeof readers / sizeof *readers; i++)
    if (readers[i] != a->x && !read_is_over(o, v, readers[i]))
      return wrong(o, a->x, "overwrites what may still be read");
  if (!same_owner(a, p, p->own) && !write_is(o, &v->over, p->writer))
    return wrong(o, a->x, "overwrites what may still be written");
  return US_OK;
}

static enum us_status write_range(struct us_schedule_order *o, const struct access *a) {
  size_t from = find(o, a->range.begin), to = from, n = 0;
  struct piece with[3];
  for (; to < o->count && o->piece[to].begin < a->range.end; to++) {
    struct piece *p = &o->piece[to];
    enum us_status status = check_overwrite(o, a, p);
    if (status != US_OK) return status;
    if (p->begin < a->range.begin) with[n] = *p, with[n++].end = a->range.begin;
  }
  with[n++] = (struct piece){a->range.begin, a->range.end, a->x, a->own, -1, -1, -1, -1};
  if (to > from && o->piece[to - 1].end > a->range.end)
    with[n] = o->piece[to - 1], with[n++].begin = a->range.end;
  return splice(o, from, to, with, n);
}

/* ---- accesses ---------------------------------------------------------------------------------------------------- */

static struct us_schedule_range range_of(const void *begin, uint64_t bytes) {
  return (struct us_schedule_range){(uintptr_t)begin, (uintptr_t)begin + bytes};
}

static uint64_t operand_bytes(uint64_t columns) {
  return columns / 32 * 512;
}

static uint64_t row_bytes(uint64_t columns) {
  return US_ENGINE_ROWS * columns * sizeof(float);
}

struct us_schedule_range us_schedule_input(const struct us_device_schedule *s,
                                           const struct us_engine_op *op) {
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_GEMM:
    return range_of(op->gemm.operand, operand_bytes((uint64_t)op->gemm.w.slices * op->gemm.w.groups * 32));
  case US_ENGINE_DOWN:
    return range_of(op->down.pairs,
                    (uint64_t)US_ENGINE_ROWS * s->weights->shape.top_k * us_engine_pair_bytes(op->down.F));
  case US_ENGINE_ATTENTION:
    return range_of(op->attention.qkv, row_bytes(op->attention.qkv_rows));
  case US_ENGINE_ROUTE:
    return range_of(op->route.logits, op->route.parts * row_bytes(op->route.stride));
  case US_ENGINE_CONTEXT:
    return range_of(op->context.kv, row_bytes((uint64_t)op->context.layers * op->context.G *
                                              (op->context.Q + op->context.V)));
  case US_ENGINE_SELECT:
    return range_of(op->select.logits, row_bytes(op->select.stride));
  default:
    return range_of(NULL, 0);
  }
}

struct us_schedule_range us_schedule_output(const struct us_device_schedule *s,
                                            const struct us_engine_op *op) {
  const struct us_engine_gemm *g = &op->gemm;
  if (us_schedule_reduces(op)) return range_of(op->reduce.operand, operand_bytes(op->reduce.D));
  if (op->kind == US_ENGINE_ATTENTION)
    return range_of(op->attention.operand, operand_bytes((uint64_t)op->attention.H * op->attention.V));
  if (op->kind != US_ENGINE_GEMM || g->epilogue == US_ENGINE_PUSH) return range_of(NULL, 0);
  if (g->epilogue == US_ENGINE_STORE) return range_of(g->out, g->parts * row_bytes(g->out_stride));
  if (g->epilogue == US_ENGINE_SWIGLU) return range_of(g->out, operand_bytes(g->F));
  return range_of(g->out, (uint64_t)US_ENGINE_ROWS * s->weights->shape.top_k * us_engine_pair_bytes(g->F));
}

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
  return read_range(o, &a, true, NULL);
}

static enum us_status write_state(struct us_schedule_order *o, int64_t x, enum state what, uint32_t row,
                                  uint32_t rows) {
  struct access a = {.x = x, .view = &o->start[x], .range = state_range(what, row, rows)};
  return write_range(o, &a);
}

/* ---- one operation ----------------------------------------------------------------------------------------------- */

/* The input of most operations: exactly what one operation wrote, but for the taps. */
static enum us_status touch_input(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  struct access a = {.x = x, .view = &o->start[x], .range = us_schedule_input(o->s, op)};
  int64_t writer = -1;
  enum us_status status = read_range(o, &a, op->task_op == US_TASK_CONTEXT_FC, &writer);
  o->source[x % o->n] = writer < 0 ? US_ENGINE_NONE : (uint32_t)(writer % o->n);
  return status;
}

static enum us_status touch_output(struct us_schedule_order *o, int64_t x, const struct view *view) {
  struct access a = {.x = x, .view = view, .range = us_schedule_output(o->s, op_at(o, x))};
  return a.range.end > a.range.begin ? write_range(o, &a) : US_OK;
}

/* The slot of a push was last read by a reduction that every rank has ended. */
static enum us_status check_slot(const struct us_schedule_order *o, int64_t x) {
  int64_t all = o->exchanges, e = x / o->n * all + us_schedule_exchange(op_at(o, x)),
          before = e - o->s->rank.slots;
  while (before >= 0 && o->pusher[before % all] == US_ENGINE_NONE) before -= o->s->rank.slots;
  if (before < 0 || o->start[x].peers >= before / all * o->n + o->reduction[before % all]) return US_OK;
  return wrong(o, x, "pushes into an exchange slot that a rank may not have emptied");
}

static enum us_status touch_reduce(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  const struct us_engine_reduce *r = &op->reduce;
  struct access a = {
      .x = x, .view = &o->start[x], .range = range_of(r->residual, row_bytes(r->D)), .own = true};
  enum us_status status = US_OK;
  if (op->kind == US_ENGINE_EMBED) {
    status = read_state(o, x, a.view, TOKENS + op->program, op->row_tile * US_ENGINE_ROWS, US_ENGINE_ROWS);
  } else if (!r->replace) {
    status = read_range(o, &a, false, NULL);
  }
  if (status == US_OK) status = write_range(o, &a);
  if (status == US_OK && r->opt_tap) {
    a.range = range_of(r->opt_tap, operand_bytes(r->D));
    status = write_range(o, &a);
  }
  return status == US_OK ? touch_output(o, x, &o->end[x]) : status; /* after the norm's exchange */
}

/* Cached keys: those before the pass's rows. The target appends to them, the drafter's are the context's. */
static enum us_status check_cache(const struct us_schedule_order *o, int64_t x, const struct view *early) {
  const struct us_engine_op *op = op_at(o, x);
  bool target = op->program == US_ENGINE_PASS_TARGET;
  int64_t writer =
      target ? (x / o->n - 1) * o->n + o->last_attention[0][op->layer] : meant(o, x, o->last_context);
  if (writer < 0 || early->seen.vector >= writer) return US_OK;
  return wrong(o, x, "reads cached keys that may not be written yet");
}

/* What is fetched before op->wait: after op->attention.ready, or not before. */
static enum us_status touch_early(struct us_schedule_order *o, int64_t x, struct view before) {
  const struct us_engine_op *op = op_at(o, x);
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
  const struct us_engine_op *op = op_at(o, x);
  const struct us_engine_attention *t = &op->attention;
  struct us_schedule_range mine = us_schedule_input(o->s, op);
  struct us_schedule_span span = us_schedule_span(o->s, op->row_tile);
  if (!t->draft) { /* a pass that is not ACCEPT's may lay out a sequence's 16 rows anywhere */
    span.first = op->row_tile > 2 ? op->row_tile - 2 : 0;
    span.last = op->row_tile;
  }
  enum us_status status = touch_early(o, x, before);
  for (uint32_t tile = span.first; status == US_OK && tile <= span.last; tile++) {
    uintptr_t offset = ((uintptr_t)tile - op->row_tile) * (mine.end - mine.begin);
    struct access a = {.x = x, .view = &o->start[x], .range = {mine.begin + offset, mine.end + offset}};
    status = read_range(o, &a, false, NULL);
  }
  if (status == US_OK) status = touch_input(o, x);
  struct access work = {.x = x, .view = &o->start[x]};
  uint64_t partial =
      us_engine_attention_partial_bytes(t->H, t->G, t->V, t->window, o->s->options.max_positions);
  work.range = range_of(t->partial, partial);
  if (status == US_OK) status = write_range(o, &work);
  work.range = range_of(t->arrivals, us_engine_attention_counters(t->H, t->G) * sizeof(uint32_t));
  if (status == US_OK) status = write_range(o, &work);
  return status == US_OK ? touch_output(o, x, &o->start[x]) : status;
}

static enum us_status touch_context(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  enum us_status status = touch_input(o, x);
  if (status == US_OK)
    status =
        read_state(o, x, &o->start[x], PLACES + op->program, op->row_tile * US_ENGINE_ROWS, US_ENGINE_ROWS);
  for (uint32_t l = 0; status == US_OK && l < op->context.layers; l++) {
    int64_t reader = meant(o, x, o->last_attention[1][l]);
    if (o->last_attention[1][l] != US_ENGINE_NONE && !read_is_over(o, &o->start[x], reader))
      status = wrong(o, x, "writes cached keys that may still be read");
  }
  return status;
}

/* The router's choice lies in every block's own memory, where the products of the choice before have used it. */
static enum us_status touch_route(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  for (int64_t i = x - 1; i >= 0 && i > x - (int64_t)o->n; i--) {
    const struct us_engine_op *user = op_at(o, i);
    if (!us_schedule_is_gemm(user) || !user->gemm.experts) continue;
    if (!write_is(o, &o->start[x].over, i))
      return wrong(o, x, "chooses while the choice before may be in use");
    break;
  }
  enum us_status status = touch_input(o, x);
  if (status != US_OK) return status;
  return read_state(o, x, &o->start[x], PLACES + op->program, op->row_tile * US_ENGINE_ROWS, US_ENGINE_ROWS);
}

static enum us_status touch_select(struct us_schedule_order *o, int64_t x) {
  const struct us_engine_op *op = op_at(o, x);
  uint32_t row = op->row_tile * US_ENGINE_ROWS;
  if (x >= o->n && o->start[x].peers < x - (int64_t)o->n)
    return wrong(o, x, "sends candidates where a rank may still look for those of the round before");
  enum us_status status = touch_input(o, x);
  if (status == US_OK) status = read_state(o, x, &o->start[x], PLACES + op->program, row, US_ENGINE_ROWS);
  if (status != US_OK) return status;
  return write_state(o, x, op->select.draft ? TOKENS + US_ENGINE_PASS_TARGET : DRAWN, row, US_ENGINE_ROWS);
}

static enum us_status touch_accept(struct us_schedule_order *o, int64_t x) {
  uint32_t rows = o->s->row_tiles * US_ENGINE_ROWS;
  enum us_status status = read_state(o, x, &o->start[x], DRAWN, 0, rows);
  if (status == US_OK) status = read_state(o, x, &o->start[x], TOKENS + US_ENGINE_PASS_TARGET, 0, rows);
  for (int what = TOKENS; what < DRAWN; what++)
    for (uint32_t row = 0; status == US_OK && row < rows; row += US_ENGINE_ROWS)
      status = write_state(o, x, (enum state)what, row, US_ENGINE_ROWS);
  return status;
}

/* `before`: what all blocks know before they wait. */
static enum us_status touch(struct us_schedule_order *o, int64_t x, struct view before) {
  const struct us_engine_op *op = op_at(o, x);
  enum us_status status = us_schedule_pushes(op) ? check_slot(o, x) : US_OK;
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
    uint32_t e = us_schedule_exchange(op);
    uint32_t *of = reduces ? o->reduction : o->pusher;
    if (e >= o->exchanges || of[e] != US_ENGINE_NONE)
      return wrong(o, i, "shares its exchange with another operation");
    of[e] = i;
    if (op->kind == US_ENGINE_REDUCE && o->pusher[e] == US_ENGINE_NONE)
      return wrong(o, i, "waits for sums that nothing before it pushes");
  }
  for (uint32_t e = 0; e < o->exchanges; e++)
    if (o->pusher[e] != US_ENGINE_NONE &&
        (o->reduction[e] == US_ENGINE_NONE || o->s->ops[o->reduction[e]].kind != US_ENGINE_REDUCE))
      return wrong(o, o->pusher[e], "pushes sums that nothing adds");
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

static enum us_status add_ready(struct us_schedule_order *o, struct us_schedule_range range) {
  struct piece p = {range.begin, range.end, -1, false, -1, -1, -1, -1};
  size_t at = find(o, p.begin);
  return splice(o, at, at, &p, 1);
}

/* What stands in memory before the first round: rows, taps of rows that are not context. */
static enum us_status begin(struct us_schedule_order *o) {
  const struct us_schedule_buffers *b = &us_schedule_owner(o->s)->buffers;
  enum us_status status = US_OK;
  for (uint32_t t = 0; t < o->s->row_tiles; t++) {
    for (int what = 0; status == US_OK && what < STATES; what++)
      status = add_ready(o, state_range((enum state)what, t * US_ENGINE_ROWS, US_ENGINE_ROWS));
    if (status == US_OK && b->features)
      status = add_ready(o, range_of(b->features + t * b->features_tile, b->features_tile));
  }
  return status;
}

static enum us_status allocate(struct us_schedule_order *o) {
  size_t views = (size_t)ROUNDS * o->n * sizeof *o->start;
  o->start = malloc(views);
  o->end = malloc(views);
  o->pusher = malloc((o->exchanges + 1) * sizeof *o->pusher);
  o->reduction = malloc((o->exchanges + 1) * sizeof *o->reduction);
  o->source = malloc(o->n * sizeof *o->source);
  if (!o->start || !o->end || !o->pusher || !o->reduction || !o->source)
    return us_err_memory(o->err, "a proof", views);
  for (uint32_t i = 0; i < o->n; i++) o->source[i] = US_ENGINE_NONE;
  return US_OK;
}

enum us_status us_schedule_check_order(const struct us_device_schedule *s,
                                       struct us_schedule_order **ret_order, struct us_err *err) {
  *ret_order = NULL;
  struct us_schedule_order *o = calloc(1, sizeof *o);
  if (!o) return us_err_memory(err, "a proof", sizeof *o);
  *o = (struct us_schedule_order){.s = s, .n = s->op_count, .all = nothing, .own = nothing, .err = err};
  for (int pass = 0; pass < US_ENGINE_PASSES; pass++) o->exchanges += s->exchanges[pass];
  enum us_status status = allocate(o);
  if (status == US_OK) status = pair_exchanges(o);
  if (status == US_OK) status = begin(o);
  if (status == US_OK) find_caches(o);
  for (int64_t x = 0; status == US_OK && x < (int64_t)ROUNDS * o->n; x++) {
    struct view before = o->all;
    status = pass_operation(o, x);
    if (status == US_OK) status = touch(o, x, before);
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
  return write_is(o, &o->start[first + op].seen, first + before);
}

uint32_t us_schedule_source(const struct us_schedule_order *o, uint32_t op) {
  return o->source[op];
}
