/* schedule_pieces.c: memory as the proof of hand-offs sees it: pieces that were last written by one operation each.
 *
 * Contents: readers and writers; what operations read and write.
 */
#include "device/schedule_order.h"

#include <stdlib.h>
#include <string.h>

/* ---- readers and writers ----------------------------------------------------------------------------------------- */

/* Whether everything that `reader` has read is read, as far as the view tells. What an operation itself reads before it writes is
 * its own affair. */
bool us_schedule_read_is_over(const struct us_schedule_order *o, const struct view *v, int64_t reader) {
  if (reader < 0 || v->over.vector >= reader) return true;
  const struct us_engine_op *op = us_schedule_op(o, reader);
  if (us_schedule_is_gemm(op) && v->over.gemm >= reader) return true;
  if (!us_schedule_pushes(op)) return false;
  return v->pushed >= reader / o->n * o->n +
                          o->reduction[us_schedule_exchange(op) + op->row_tiles - 1]; /* the last of its */
}

bool us_schedule_is_written(const struct us_schedule_order *o, const struct known *k, int64_t writer) {
  return writer < 0 || (us_schedule_is_gemm(us_schedule_op(o, writer)) ? k->gemm : k->vector) >= writer;
}

static void note_reader(const struct us_schedule_order *o, struct piece *p, int64_t x, bool own) {
  const struct us_engine_op *op = us_schedule_op(o, x);
  us_schedule_raise(own                       ? &p->own_read
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

static bool same_owner(const struct access *a, const struct piece *p, bool own) {
  return own && a->own && p->begin == a->range.begin && p->end == a->range.end;
}

enum us_status us_schedule_read(struct us_schedule_order *o, const struct access *a, bool parts,
                                int64_t *opt_writer) {
  uintptr_t at = a->range.begin;
  for (size_t i = find(o, at); at < a->range.end; i++) {
    struct piece *p = i < o->count ? &o->piece[i] : NULL;
    if (!p || p->begin > at) return us_schedule_order_wrong(o, a->x, "reads what nothing has written");
    if (!parts && p->writer >= 0 && (p->begin != a->range.begin || p->end != a->range.end))
      return us_schedule_order_wrong(o, a->x, "does not read all that one operation wrote, and nothing else");
    if (!same_owner(a, p, p->own) && !us_schedule_is_written(o, &a->view->seen, p->writer))
      return us_schedule_order_wrong(o, a->x, "reads what may not be written yet");
    if (opt_writer) *opt_writer = p->writer;
    note_reader(o, p, a->x, a->own);
    at = p->end;
  }
  return US_OK;
}

int64_t us_schedule_writer(const struct us_schedule_order *o, struct us_schedule_range range) {
  size_t i = find(o, range.begin);
  bool whole = i < o->count && o->piece[i].begin == range.begin && o->piece[i].end == range.end;
  return whole ? o->piece[i].writer : -1;
}

static enum us_status check_overwrite(const struct us_schedule_order *o, const struct access *a,
                                      const struct piece *p) {
  const struct view *v = a->view;
  int64_t readers[] = {same_owner(a, p, true) ? -1 : p->own_read, p->vector, p->gemm, p->pushing};
  for (size_t i = 0; i < sizeof readers / sizeof *readers; i++)
    if (readers[i] != a->x && !us_schedule_read_is_over(o, v, readers[i]))
      return us_schedule_order_wrong(o, a->x, "overwrites what may still be read");
  if (!same_owner(a, p, p->own) && !us_schedule_is_written(o, &v->over, p->writer))
    return us_schedule_order_wrong(o, a->x, "overwrites what may still be written");
  return US_OK;
}

enum us_status us_schedule_write(struct us_schedule_order *o, const struct access *a) {
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

enum us_status us_schedule_stands(struct us_schedule_order *o, struct us_schedule_range range) {
  struct piece p = {range.begin, range.end, -1, false, -1, -1, -1, -1};
  size_t at = find(o, p.begin);
  return splice(o, at, at, &p, 1);
}

/* ---- what operations read and write ------------------------------------------------------------------------------ */

/* A row tile's piece of what an operation reads. */
static struct us_schedule_range piece_of(const void *base, uint64_t tile_bytes, uint32_t piece,
                                         uint64_t bytes) {
  return us_schedule_range((const uint8_t *)base + piece * tile_bytes, bytes);
}

struct us_schedule_range us_schedule_input(const struct us_device_schedule *s, const struct us_engine_op *op,
                                           uint32_t piece) {
  switch ((enum us_engine_kind)op->kind) {
  case US_ENGINE_GEMM:
    return piece_of(op->gemm.operand, op->gemm.operand_tile, piece,
                    us_schedule_operand_bytes((uint64_t)op->gemm.w.slices * op->gemm.w.groups * 32));
  case US_ENGINE_DOWN:
    return us_schedule_range(op->down.pairs, (uint64_t)op->row_tiles * US_ENGINE_ROWS *
                                                 s->weights->shape.top_k * us_engine_pair_bytes(op->down.F));
  case US_ENGINE_ATTENTION:
    return us_schedule_range(op->attention.qkv, us_schedule_row_bytes(op->attention.qkv_rows));
  case US_ENGINE_ROUTE:
    return piece_of(op->route.logits, op->route.logits_tile * sizeof(float), piece,
                    op->route.parts * us_schedule_row_bytes(op->route.stride));
  case US_ENGINE_CONTEXT:
    return us_schedule_range(op->context.kv,
                             us_schedule_row_bytes((uint64_t)op->context.layers * op->context.G *
                                                   (op->context.Q + op->context.V)));
  case US_ENGINE_SELECT: /* with a Markov head: of the pass */
    return piece_of(op->select.slots ? s->draft_logits : op->select.logits,
                    us_schedule_row_bytes(s->logits_stride), piece, us_schedule_row_bytes(s->logits_stride));
  default:
    return us_schedule_range(NULL, 0);
  }
}

struct us_schedule_range us_schedule_output(const struct us_device_schedule *s, const struct us_engine_op *op,
                                            uint32_t piece) {
  const struct us_engine_gemm *g = &op->gemm;
  if (us_schedule_reduces(op))
    return piece_of(op->reduce.operand, op->reduce.operand_tile, piece,
                    us_schedule_operand_bytes(op->reduce.D));
  if (op->kind == US_ENGINE_ATTENTION)
    return us_schedule_range(op->attention.operand,
                             us_schedule_operand_bytes((uint64_t)op->attention.H * op->attention.V));
  if (op->kind != US_ENGINE_GEMM || g->epilogue == US_ENGINE_PUSH) return us_schedule_range(NULL, 0);
  if (g->epilogue == US_ENGINE_STORE)
    return piece_of(g->out, g->out_tile, piece, g->parts * us_schedule_row_bytes(g->out_stride));
  if (g->epilogue == US_ENGINE_SWIGLU)
    return piece_of(g->out, g->out_tile, piece, us_schedule_operand_bytes(g->F));
  return us_schedule_range(g->out, (uint64_t)op->row_tiles * US_ENGINE_ROWS * s->weights->shape.top_k *
                                       us_engine_pair_bytes(g->F));
}
