/* schedule_list.c: units of the tile programs become the engine's operations, one a row tile.
 *
 * Contents: growing; waits; reductions; experts; units; ends of a pass; the round.
 *
 * Products of several row tiles are one operation, where kernels can (us_schedule_together).
 *
 * Waits come from the programs' events. One that every block of the rank has already waited for, itself or through others, is
 * left out: each costs a load from L2 on the way of a hand-off, and between router and experts nothing hides it.
 */
#include "device/schedule_impl.h"

#include <stdlib.h>

/* What all blocks know has ended on this rank, by acquired counts: vector operations up to and with `vector` (and what products
 * before it read), products up to and with `gemm`. AFTER_ROUND: everything of the round before; NOTHING: not even that. */
struct known {
  int64_t vector, gemm;
};
#define AFTER_ROUND (-1)
#define NOTHING     (-2)

/* ACCEPT has no place yet: set_accept puts it in. */
#define ACCEPT (US_ENGINE_NONE - 1)

/* The list as it grows. Nothing is added after a failure. */
struct list {
  struct us_device_schedule *s;
  enum us_engine_program pass;
  const struct us_schedule_units *units;
  uint32_t (*last)[US_ENGINE_MAX_TILES]; /* (units) the unit's last operation of each row tile */
  uint32_t capacity, tiles;
  struct known known, *at; /* now; (ops) when an operation begins */
  uint32_t exchanges, shift;
  enum us_status status;
  struct us_err *err;
};

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

/* Append an operation for row tiles, of a unit or of none; NULL after a failure. Consecutive operations go on dealing out items
 * where the one before ended. */
static struct us_engine_op *add_tiles(struct list *list, enum us_engine_kind kind,
                                      const struct us_schedule_unit *unit, uint32_t tile, uint32_t tiles) {
  if (list->status != US_OK || !grow(list)) return NULL;
  uint32_t index = list->s->op_count;
  struct us_engine_op *op = &list->s->ops[index];
  *op = (struct us_engine_op){.kind = (uint16_t)kind,
                              .program = (uint16_t)list->pass,
                              .layer = unit ? unit->layer : US_LAYER_NONE,
                              .task_op = unit ? unit->op : US_TASK_OP_COUNT,
                              .row_tile = tile,
                              .row_tiles = tiles,
                              .wait = US_ENGINE_NONE,
                              .shift = list->shift};
  list->status = us_schedule_fill(list->s, op, unit ? unit->slot : 0, list->err);
  if (list->status != US_OK && op->layer != US_LAYER_NONE) us_err_prefix(list->err, "layer %u", op->layer);
  if (list->status != US_OK) return NULL;
  list->s->op_count++;
  list->shift = (list->shift + us_schedule_items(list->s, op)) % US_SCHEDULE_NOMINAL_BLOCKS;
  list->at[index] = list->known;
  for (uint32_t t = tile; unit && t < tile + tiles; t++) list->last[unit - list->units->unit][t] = index;
  return op;
}

static struct us_engine_op *add(struct list *list, enum us_engine_kind kind,
                                const struct us_schedule_unit *unit, uint32_t tile) {
  return add_tiles(list, kind, unit, tile, 1);
}

/* ---- waits ------------------------------------------------------------------------------------------------------- */

static void join(struct known *to, struct known from) {
  if (from.vector > to->vector) to->vector = from.vector;
  if (from.gemm > to->gemm) to->gemm = from.gemm;
}

/* The newest operation waits until `before` is done, unless that is known. */
static void wait_for(struct list *list, struct us_engine_op *op, int64_t before) {
  bool gemm = before >= 0 && us_schedule_is_gemm(&list->s->ops[before]);
  if (before <= (gemm ? list->known.gemm : list->known.vector)) return;
  op->wait = before == AFTER_ROUND ? ACCEPT : (uint32_t)before;
  if (before == AFTER_ROUND)
    join(&list->known, (struct known){AFTER_ROUND, AFTER_ROUND});
  else
    join(&list->known, list->at[before]);
  join(&list->known, gemm ? (struct known){NOTHING, before} : (struct known){before, NOTHING});
  list->at[op - list->s->ops] = list->known;
}

/* Wait for the units that this one's tasks wait for, in row tile `tile`. */
static void wait_for_events(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit,
                            uint32_t tile) {
  for (uint32_t i = 0; i < unit->wait_count; i++) wait_for(list, op, list->last[unit->waits[i]][tile]);
}

struct us_schedule_span us_schedule_span(const struct us_device_schedule *s, uint32_t tile) {
  uint32_t block = s->options.block, first = tile * US_ENGINE_ROWS / block * block;
  uint32_t last = (tile * US_ENGINE_ROWS + US_ENGINE_ROWS - 1) / block * block + block - 1;
  struct us_schedule_span span = {first / US_ENGINE_ROWS, last / US_ENGINE_ROWS};
  if (span.last >= s->row_tiles) span.last = s->row_tiles - 1;
  return span;
}

/* What a product or an attention multiplies stands. New keys of a drafter's block may lie in a later row tile. Attention takes the ring
 * away, and the warp that loads a wide product's activations into it does not wait there: it waits for the pass's last. The features
 * stand without a wait: no block leaves a round's ACCEPT before it knows the round's last SELECT, and so all reductions, done. */
static void wait_for_rows(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit) {
  uint32_t t = op->row_tile + op->row_tiles - 1; /* row tiles are in order */
  if (op->kind == US_ENGINE_ATTENTION && op->attention.draft) t = us_schedule_span(list->s, t).last;
  if (unit->op == US_TASK_O_PROJ && us_schedule_is_wide(op)) t = list->tiles - 1;
  if (us_schedule_reads_flags(op))
    op->wait = list->last[unit->waits[0]][t]; /* read as they come: nothing else is known by that */
  else
    wait_for_events(list, op, unit, t);
}

/* The first rows of a pass: ACCEPT of the round before wrote them, the drafter's SELECT of this row tile the target's tokens. A
 * wait for any vector operation of this round is one for the round before: all blocks have passed its end. */
static void wait_for_tokens(struct list *list, struct us_engine_op *op) {
  const struct us_device_schedule *s = list->s;
  uint32_t selects = s->selects[US_ENGINE_PASS_DRAFT];
  bool drafted = list->pass == US_ENGINE_PASS_TARGET && selects;
  bool last = s->options.adaptive ||
              us_schedule_slots(s); /* it decides which rows there are, or chooses for all of them */
  uint32_t tile = last ? selects - 1 : op->row_tile + op->row_tiles - 1;
  wait_for(list, op, drafted ? (int64_t)s->end[US_ENGINE_PASS_DRAFT] - selects + tile : AFTER_ROUND);
}

/* ---- reductions -------------------------------------------------------------------------------------------------- */

/* A reduction takes a number a row tile, and the products whose sums it adds learn them. EMBED has none. */
static void number(struct list *list, struct us_engine_op *op, const struct us_schedule_unit *unit) {
  uint32_t ranks = list->s->weights->ranks;
  op->reduce.exchange = list->exchanges;
  list->exchanges += op->row_tiles;
  for (uint32_t i = 0; i < unit->wait_count; i++)
    for (uint32_t t = 0; t < op->row_tiles; t++) {
      struct us_engine_op *from = &list->s->ops[list->last[unit->waits[i]][op->row_tile + t]];
      uint32_t exchange = op->reduce.exchange + t;
      bool down = from->kind == US_ENGINE_DOWN;
      op->reduce.addends = down || !from->gemm.gather ? ranks : 1;
      if (!down) op->reduce.addends *= from->gemm.parts;
      if (from->row_tile != op->row_tile + t) continue; /* the exchanges of its other row tiles follow */
      *(down ? &from->down.exchange : &from->gemm.exchange) = exchange;
      if (down && from->row_tiles > 1) list->s->ops[from->down.route].route.exchange = exchange;
    }
}

/* ---- experts ----------------------------------------------------------------------------------------------------- */

/* Route, gate and up, down of row tiles that go together, one after the other: `down` is the unit of the last, the others found by its
 * events. A wait for the last row tile's operation is one for those before it. */
static void add_experts(struct list *list, const struct us_schedule_unit *down) {
  const struct us_schedule_unit *up = &list->units->unit[down->waits[0]];
  const struct us_schedule_unit *route = &list->units->unit[up->waits[0]];
  const struct us_schedule_unit *router = &list->units->unit[route->waits[0]];
  for (uint32_t t = 0, n; t < list->tiles; t += n) {
    uint32_t routed = list->s->op_count, last;
    n = us_schedule_together(list->s, list->pass, down->op, down->layer, t);
    last = t + n - 1;
    struct us_engine_op *op = add_tiles(list, US_ENGINE_ROUTE, route, t, n);
    if (!op) return;
    if (us_schedule_reads_flags(op))
      op->wait = list->last[route->waits[0]][last]; /* as above */
    else
      wait_for_events(list, op, route, last);
    if (!(op = add_tiles(list, US_ENGINE_GEMM, up, t, n))) return;
    op->gemm.route = routed;
    wait_for_events(list, op, router,
                    last); /* the choice is in the block's own memory; the rows are the router's */
    if (!(op = add_tiles(list, US_ENGINE_DOWN, down, t, n))) return;
    op->down.route = routed;
    wait_for_events(list, op, down, last);
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

static void add_unit(struct list *list, const struct us_schedule_unit *unit) {
  if (unit->op == US_TASK_ROUTE || unit->op == US_TASK_EXPERT_UP) return; /* with EXPERT_DOWN */
  if (unit->op == US_TASK_EXPERT_DOWN) {
    add_experts(list, unit);
    return;
  }
  for (uint32_t t = 0, n; t < list->tiles; t += n) {
    n = us_schedule_together(list->s, list->pass, unit->op, unit->layer, t);
    struct us_engine_op *op = add_tiles(list, kind_of(unit->op), unit, t, n);
    if (!op) return;
    if (us_schedule_reduces(op)) number(list, op, unit);
    if (op->kind == US_ENGINE_EMBED)
      wait_for_tokens(list, op);
    else if (op->kind != US_ENGINE_REDUCE)
      wait_for_rows(list, op, unit);
  }
}

/* ---- ends of a pass ---------------------------------------------------------------------------------------------- */

/* One more operation a row tile on the product of the last unit: what CONTEXT_KV's tasks do with it, or the choice of tokens. */
static void add_ends(struct list *list, enum us_engine_kind kind) {
  const struct us_schedule_unit *unit = &list->units->unit[list->units->count - 1];
  for (uint32_t t = 0; t < list->tiles; t++) {
    uint32_t product = list->last[list->units->count - 1][t];
    struct us_engine_op *op = add(list, kind, kind == US_ENGINE_CONTEXT ? unit : NULL, t);
    if (!op) return;
    wait_for(list, op, product);
  }
}

/* With a Markov head one operation chooses for all row tiles. */
static void add_slots(struct list *list) {
  uint32_t product = list->last[list->units->count - 1][list->tiles - 1];
  struct us_engine_op *op = add(list, US_ENGINE_SELECT, NULL, 0);
  if (op) wait_for(list, op, product);
}

static void add_accept(struct list *list) {
  uint32_t last = list->s->op_count - 1;
  struct us_engine_op *op = add(list, US_ENGINE_ACCEPT, NULL, 0);
  if (op) wait_for(list, op, last);
}

/* ACCEPT has its place: who waits for it learns which. Attention may fetch what stands at the beginning of its pass. */
static void set_accept(struct us_device_schedule *s) {
  uint32_t accept = s->op_count - 1;
  for (uint32_t i = 0; i < s->op_count; i++) {
    struct us_engine_op *op = &s->ops[i];
    if (op->wait == ACCEPT) op->wait = accept;
    if (op->kind == US_ENGINE_ATTENTION)
      op->attention.ready = op->attention.draft ? s->end[US_ENGINE_PASS_CONTEXT] - 1 : accept;
  }
}

/* ---- the round --------------------------------------------------------------------------------------------------- */

static void add_units(struct list *list) {
  struct us_device_schedule *s = list->s;
  uint32_t exchanges = list->exchanges;
  for (uint32_t i = 0; i < list->units->count; i++) add_unit(list, &list->units->unit[i]);
  if (list->pass == US_ENGINE_PASS_TARGET) s->head_end = s->op_count;
  bool slots = list->pass == US_ENGINE_PASS_DRAFT && us_schedule_slots(s);
  if (slots)
    add_slots(list);
  else
    add_ends(list, list->pass == US_ENGINE_PASS_CONTEXT ? US_ENGINE_CONTEXT : US_ENGINE_SELECT);
  if (list->pass == US_ENGINE_PASS_TARGET) add_accept(list);
  s->exchanges[list->pass] = list->exchanges - exchanges;
  s->selects[list->pass] = list->pass == US_ENGINE_PASS_CONTEXT ? 0 : slots ? 1 : list->tiles;
}

static void add_pass(struct list *list, const struct us_program *program) {
  struct us_schedule_units units;
  list->status = us_schedule_units_create(program, list->s->weights->rank, &units, list->err);
  if (list->status != US_OK) return;
  list->units = &units;
  list->last = calloc(units.count, sizeof *list->last);
  if (list->last)
    add_units(list);
  else
    list->status = us_err_memory(list->err, "a list of operations", units.count * sizeof *list->last);
  free(list->last), free(units.unit);
}

enum us_status us_schedule_list_create(struct us_device_schedule *s,
                                       const struct us_schedule_programs *programs, struct us_err *err) {
  struct list list = {
      .s = s, .tiles = s->row_tiles, .known = {NOTHING, NOTHING}, .status = US_OK, .err = err};
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
