/* schedule_check.c: the proof that a list is what the tile programs ask for.
 *
 * Contents: words; ranges of the list; operations of a unit; events; bytes; the check.
 *
 * Sizes are schedule_fields.c's part, hand-offs schedule_order.c's.
 */
#include "device/schedule_impl.h"
#include "plan/check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- words ------------------------------------------------------------------------------------------------------- */

static const char *name_of(const struct us_engine_op *op) {
  if (op->task_op < US_TASK_OP_COUNT) return us_task_op_name((enum us_task_op)op->task_op);
  return op->kind == US_ENGINE_SELECT ? "select" : "accept";
}

enum us_status us_schedule_wrong(const struct us_device_schedule *s, uint32_t index, struct us_err *err,
                                 const char *format, ...) {
  static const char *const passes[US_ENGINE_PASSES] = {"context", "draft", "target"};
  const struct us_engine_op *op = &s->ops[index];
  char text[256], layer[32] = "";
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (op->layer != US_LAYER_NONE) snprintf(layer, sizeof layer, " of layer %u", op->layer);
  return us_err_set(err, US_ERR_CHECK, "operation %u (%s, %s%s, row tile %u): %s", index,
                    op->program < US_ENGINE_PASSES ? passes[op->program] : "?", name_of(op), layer,
                    op->row_tile, text);
}

/* ---- ranges of the list ------------------------------------------------------------------------------------------ */

static enum us_status check_pass(const struct us_device_schedule *s, uint32_t pass, struct us_err *err) {
  uint32_t exchanges = 0, selects = 0;
  for (uint32_t i = s->begin[pass]; i < s->end[pass]; i++) {
    if (s->ops[i].program != pass) return us_schedule_wrong(s, i, err, "it stands in another pass");
    exchanges += us_schedule_reduces(&s->ops[i]) ? s->ops[i].row_tiles : 0;
    selects += s->ops[i].kind == US_ENGINE_SELECT;
  }
  if (exchanges == s->exchanges[pass] && selects == s->selects[pass]) return US_OK;
  return us_err_set(err, US_ERR_CHECK, "pass %u counts %u exchanges and %u choices where there are %u and %u",
                    pass, s->exchanges[pass], s->selects[pass], exchanges, selects);
}

/* Passes one after the other; the target ends with one SELECT a row tile, and ACCEPT. */
static enum us_status check_ranges(const struct us_device_schedule *s, struct us_err *err) {
  uint32_t at = 0, target = s->end[US_ENGINE_PASS_TARGET];
  enum us_status status = US_OK;
  for (uint32_t pass = 0; status == US_OK && pass < US_ENGINE_PASSES; pass++) {
    if (s->begin[pass] != at || s->end[pass] < at || s->end[pass] > s->op_count)
      return us_err_set(err, US_ERR_CHECK, "pass %u is operations [%u, %u) after %u", pass, s->begin[pass],
                        s->end[pass], at);
    at = s->end[pass];
    status = check_pass(s, pass, err);
  }
  if (status != US_OK) return status;
  bool tail = at == s->op_count && s->head_end + s->row_tiles + 1 == target &&
              s->selects[US_ENGINE_PASS_TARGET] == s->row_tiles;
  for (uint32_t i = s->head_end; tail && i < target; i++)
    tail = i + 1 < target ? s->ops[i].kind == US_ENGINE_SELECT && s->ops[i].row_tile == i - s->head_end
                          : s->ops[i].kind == US_ENGINE_ACCEPT && s->ops[i].row_tile == 0;
  return tail ? US_OK : us_err_set(err, US_ERR_CHECK, "the list does not end with SELECT and ACCEPT");
}

/* ---- operations of a unit ---------------------------------------------------------------------------------------- */

/* A pass: its units, and the first and last operation of each in each row tile. */
struct pass {
  const struct us_device_schedule *s;
  uint32_t index;
  struct us_schedule_units units;
  struct {
    uint32_t first, last, count;
  } (*ops)[US_ENGINE_MAX_TILES];
  const struct us_schedule_order *order;
  struct us_err *err;
};

static enum us_engine_kind kind_of(enum us_task_op op, bool last) {
  switch (op) {
  case US_TASK_EMBED_NORM:
    return US_ENGINE_EMBED;
  case US_TASK_ATTENTION:
    return US_ENGINE_ATTENTION;
  case US_TASK_RESIDUAL_NORM:
  case US_TASK_CONTEXT_NORM:
    return US_ENGINE_REDUCE;
  case US_TASK_ROUTE:
    return US_ENGINE_ROUTE;
  case US_TASK_EXPERT_DOWN:
    return US_ENGINE_DOWN;
  case US_TASK_CONTEXT_KV:
    return last ? US_ENGINE_CONTEXT : US_ENGINE_GEMM;
  default:
    return US_ENGINE_GEMM;
  }
}

/* The unit that an operation computes. Of a layer's two reductions the first belongs to slot 0. */
static uint32_t unit_of(const struct pass *p, uint32_t index) {
  const struct us_engine_op *op = &p->s->ops[index];
  for (uint32_t u = 0; u < p->units.count; u++) {
    const struct us_schedule_unit *unit = &p->units.unit[u];
    if (unit->op != (enum us_task_op)op->task_op || unit->layer != op->layer) continue;
    bool again = unit->op == US_TASK_RESIDUAL_NORM && p->ops[u][op->row_tile].count;
    if (!again) return u;
  }
  return US_ENGINE_NONE;
}

static bool in_list(const struct us_device_schedule *s, const struct us_engine_op *op) {
  return op->row_tile < s->row_tiles && op->row_tiles && op->row_tiles <= s->row_tiles - op->row_tile &&
         op->row_tiles <= US_ENGINE_GATHERED;
}

static enum us_status find_ops(struct pass *p) {
  for (uint32_t i = p->s->begin[p->index]; i < p->s->end[p->index]; i++) {
    const struct us_engine_op *op = &p->s->ops[i];
    bool end = op->kind == US_ENGINE_SELECT || op->kind == US_ENGINE_ACCEPT;
    if (end && op->task_op == US_TASK_OP_COUNT && op->layer == US_LAYER_NONE) continue; /* of no task */
    uint32_t t = op->row_tile, unit = in_list(p->s, op) ? unit_of(p, i) : US_ENGINE_NONE;
    if (unit == US_ENGINE_NONE) return us_schedule_wrong(p->s, i, p->err, "it belongs to no task");
    for (uint32_t tile = t; tile < t + op->row_tiles; tile++) {
      if (!p->ops[unit][tile].count++) p->ops[unit][tile].first = i;
      p->ops[unit][tile].last = i;
    }
    if (op->kind != kind_of((enum us_task_op)op->task_op, p->ops[unit][t].count > 1))
      return us_schedule_wrong(p->s, i, p->err, "its kind is not its task's");
  }
  return US_OK;
}

static enum us_status unit_wrong(const struct pass *p, const struct us_schedule_unit *unit,
                                 const char *what) {
  char layer[32] = "";
  if (unit->layer != US_LAYER_NONE) snprintf(layer, sizeof layer, " of layer %u", unit->layer);
  return us_err_set(p->err, US_ERR_CHECK, "%s%s: %s", us_task_op_name(unit->op), layer, what);
}

/* Every task is in one operation a row tile; the context's keys and values in two, product and cache. */
static enum us_status check_counts(const struct pass *p) {
  for (uint32_t u = 0; u < p->units.count; u++) {
    uint32_t want = p->units.unit[u].op == US_TASK_CONTEXT_KV ? 2 : 1;
    for (uint32_t t = 0; t < p->s->row_tiles; t++)
      if (p->ops[u][t].count != want) return unit_wrong(p, &p->units.unit[u], "not one operation a row tile");
  }
  return US_OK;
}

/* ---- events ------------------------------------------------------------------------------------------------------ */

/* What unit `from` makes stands when operation `op` of row tile t uses it. */
static enum us_status check_event(const struct pass *p, uint32_t op, uint32_t from, uint32_t t) {
  const struct us_device_schedule *s = p->s;
  uint32_t before = p->ops[from][t].last;
  const struct us_engine_op *x = &s->ops[op], *y = &s->ops[before];
  if (x->kind == US_ENGINE_REDUCE) { /* by data that carries its own flag */
    if (us_schedule_pushes(y) &&
        us_schedule_exchange(y) + t - y->row_tile == x->reduce.exchange + t - x->row_tile)
      return US_OK;
    return us_schedule_wrong(s, op, p->err, "it adds other sums than its task's");
  }
  if (y->kind ==
      US_ENGINE_ROUTE) { /* in every block's own memory; and the rows that were routed are multiplied */
    uint32_t logits = us_schedule_source(p->order, before, t);
    bool same = logits != US_ENGINE_NONE &&
                us_schedule_source(p->order, op, t) == us_schedule_source(p->order, logits, t);
    return same && x->gemm.route == before
               ? US_OK
               : us_schedule_wrong(s, op, p->err, "it multiplies other rows than were routed");
  }
  bool as_they_come = us_schedule_reads_flags(x) && x->wait == before;
  if (!as_they_come && !us_schedule_after(p->order, op, before))
    return us_schedule_wrong(s, op, p->err, "it does not wait for operation %u as its tasks do", before);
  if (us_schedule_source(p->order, op, t) != before)
    return us_schedule_wrong(s, op, p->err, "it does not read what operation %u wrote", before);
  return US_OK;
}

static enum us_status check_events(const struct pass *p) {
  enum us_status status = US_OK;
  for (uint32_t u = 0; u < p->units.count; u++) {
    const struct us_schedule_unit *unit = &p->units.unit[u];
    for (uint32_t i = 0; i < unit->wait_count; i++)
      for (uint32_t t = 0; status == US_OK && t < p->s->row_tiles; t++)
        status = check_event(p, p->ops[u][t].first, unit->waits[i], t);
  }
  return status;
}

/* CONTEXT and SELECT are no tasks: each uses its row tile's product. */
static enum us_status check_ends(const struct pass *p) {
  uint32_t last = p->units.count - 1;
  for (uint32_t i = p->s->begin[p->index]; i < p->s->end[p->index]; i++) {
    const struct us_engine_op *op = &p->s->ops[i];
    if (op->kind != US_ENGINE_CONTEXT && op->kind != US_ENGINE_SELECT) continue;
    if (us_schedule_source(p->order, i, op->row_tile) != p->ops[last][op->row_tile].first)
      return us_schedule_wrong(p->s, i, p->err, "it does not read its row tile's product");
  }
  return US_OK;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

/* Weights without scales and padding; with them a page has at most an eighth more (FP8: 16 bytes a page, MXFP4: a byte for 16), and
 * the last tile may be almost empty. MXFP4 of 32 columns (experts of 128 on 4 ranks) fills half of a page: 512 + 64 bytes for 256.
 * Task bytes count the checkpoint's scales; shares of ranks are rounded down or up. */
static enum us_status check_bytes(const struct pass *p) {
  for (uint32_t u = 0; u < p->units.count; u++) {
    const struct us_schedule_unit *unit = &p->units.unit[u];
    const struct us_engine_op *op = &p->s->ops[p->ops[u][0].first];
    const struct us_device_matrix *m = us_schedule_matrix(p->s, p->index, unit->op, unit->layer);
    if (!m) {
      if (unit->bytes || op->bytes) return unit_wrong(p, unit, "it streams nothing, but has bytes");
      continue;
    }
    uint64_t rows = (uint64_t)m->pages.tiles * m->pages.halves * 16;
    uint64_t codes = us_matrix_data_bytes((enum us_format)m->pages.format, m->rows, m->cols);
    uint64_t padded = us_matrix_data_bytes((enum us_format)m->pages.format, rows, m->cols);
    if (unit->bytes + 1 < codes || unit->bytes > codes + codes / 8 + 64)
      return unit_wrong(p, unit, "its tasks' bytes are not its matrix's");
    if (op->bytes < padded || op->bytes > 2 * padded + padded / 4)
      return unit_wrong(p, unit, "its pages' bytes are not its matrix's");
  }
  return US_OK;
}

/* ---- the check --------------------------------------------------------------------------------------------------- */

/* The units of a pass and their operations. */
static enum us_status begin_pass(struct pass *p, const struct us_program *program) {
  enum us_status status = us_program_check(program, p->err);
  if (status == US_OK) status = us_schedule_units_create(program, p->s->weights->rank, &p->units, p->err);
  if (status != US_OK) return status;
  p->ops = calloc(p->units.count + 1, sizeof *p->ops);
  if (!p->ops) return us_err_memory(p->err, "a proof", p->units.count * sizeof *p->ops);
  status = find_ops(p);
  return status == US_OK ? check_counts(p) : status;
}

static enum us_status check_tasks(struct pass *p, const struct us_schedule_order *order) {
  p->order = order;
  enum us_status status = check_events(p);
  if (status == US_OK) status = check_ends(p);
  return status == US_OK ? check_bytes(p) : status;
}

enum us_status us_device_schedule_check(const struct us_device_schedule *s, struct us_err *err) {
  struct us_schedule_programs programs;
  struct us_schedule_order *order = NULL;
  struct pass pass[US_ENGINE_PASSES] = {0};
  enum us_status status = us_schedule_lower(s, &programs, err);
  if (status == US_OK) status = check_ranges(s, err);
  for (uint32_t i = 0; status == US_OK && i < US_ENGINE_PASSES; i++) {
    pass[i] = (struct pass){.s = s, .index = i, .err = err};
    if (programs.program[i])
      status = begin_pass(&pass[i], programs.program[i]);
    else if (s->begin[i] < s->end[i])
      status = us_schedule_wrong(s, s->begin[i], err, "its pass has no program");
  }
  if (status == US_OK) status = us_schedule_check_fields(s, err);
  if (status == US_OK) status = us_schedule_check_order(s, &order, err);
  for (uint32_t i = 0; status == US_OK && i < US_ENGINE_PASSES; i++)
    if (programs.program[i]) status = check_tasks(&pass[i], order);
  for (uint32_t i = 0; i < US_ENGINE_PASSES; i++) free(pass[i].units.unit), free(pass[i].ops);
  us_schedule_order_free(order);
  us_schedule_programs_release(&programs);
  return status;
}
