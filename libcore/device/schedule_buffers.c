/* schedule_buffers.c: the memory that a schedule's operations work in.
 *
 * Every row tile has buffers of its own: tiles of one operation run side by side. One set serves all layers and passes; that
 * nobody overwrites what another block still reads is proved by schedule_order.c.
 */
#include "device/schedule_impl.h"
#include "kernels/rope/rope.h"

#include <math.h>
#include <stdlib.h>

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

const struct us_attention_shape *us_schedule_attention(const struct us_device_schedule *s,
                                                       enum us_schedule_attention kind) {
  const struct us_shape *shape = &s->weights->shape;
  if (kind == US_SCHEDULE_DRAFT) return us_schedule_drafts(s) ? &s->weights->draft_shape.attention : NULL;
  for (uint32_t l = 0; l < shape->layers; l++)
    if (shape->swa_layer[l] == (kind == US_SCHEDULE_WINDOWED))
      return kind == US_SCHEDULE_WINDOWED ? &shape->swa : &shape->full;
  return NULL;
}

/* Largest of what the layers and passes put into one buffer. */
struct sizes {
  uint32_t qkv, attended, inner; /* rows, columns, columns */
  uint32_t router_parts, addends;
  uint64_t partial, arrivals; /* bytes of a row tile */
};

static void most(uint32_t *to, uint32_t value) {
  if (value > *to) *to = value;
}

static void size_attention(const struct us_device_schedule *s, struct sizes *z) {
  uint32_t ranks = s->weights->ranks;
  for (int kind = 0; kind < US_SCHEDULE_ATTENTIONS; kind++) {
    const struct us_attention_shape *a = us_schedule_attention(s, (enum us_schedule_attention)kind);
    if (!a) continue;
    uint32_t H = a->q_heads / ranks, G = a->kv_heads / ranks;
    uint64_t partial = us_engine_attention_partial_bytes(H, G, a->v_dim, a->window, s->options.max_positions);
    uint64_t arrivals = us_engine_attention_counters(H, G) * sizeof(uint32_t);
    most(&z->qkv, us_attention_qkv_rows(a) / ranks);
    most(&z->attended, H * a->v_dim);
    if (partial > z->partial) z->partial = partial;
    if (arrivals > z->arrivals) z->arrivals = arrivals;
  }
  z->partial = us_device_align(z->partial), z->arrivals = us_device_align(z->arrivals);
}

static enum us_status size_layers(const struct us_device_schedule *s, uint32_t program, uint32_t layers,
                                  struct sizes *z, struct us_err *err) {
  enum us_status status = US_OK;
  for (uint32_t l = 0; status == US_OK && l < layers; l++) {
    const struct us_device_layer *layer = us_schedule_layer(s, program, l);
    bool moe = layer->router.rows > 0;
    struct us_schedule_cut cut;
    if (!moe) most(&z->inner, layer->down.cols);
    status = us_schedule_cut_of(s, program, US_TASK_O_PROJ, l, &cut, err);
    if (status == US_OK) most(&z->addends, s->weights->ranks * cut.parts);
    if (status == US_OK)
      status = us_schedule_cut_of(s, program, moe ? US_TASK_ROUTER : US_TASK_DENSE_DOWN, l, &cut, err);
    if (status == US_OK)
      most(moe ? &z->router_parts : &z->addends, moe ? cut.parts : s->weights->ranks * cut.parts);
    if (status != US_OK) us_err_prefix(err, "layer %u", l);
  }
  return status;
}

static enum us_status size_all(const struct us_device_schedule *s, struct sizes *ret_sizes,
                               struct us_err *err) {
  const struct us_device_weights *w = s->weights;
  *ret_sizes = (struct sizes){.addends = w->ranks};
  size_attention(s, ret_sizes);
  enum us_status status = size_layers(s, US_ENGINE_PASS_TARGET, w->shape.layers, ret_sizes, err);
  if (status != US_OK || !us_schedule_drafts(s)) return status;
  struct us_schedule_cut cut;
  status = size_layers(s, US_ENGINE_PASS_DRAFT, w->draft_shape.layers, ret_sizes, err);
  if (status == US_OK)
    status = us_schedule_cut_of(s, US_ENGINE_PASS_CONTEXT, US_TASK_CONTEXT_FC, US_LAYER_NONE, &cut, err);
  if (status == US_OK) most(&ret_sizes->addends, cut.parts);
  return status == US_OK ? US_OK : us_err_prefix(err, "drafter");
}

/* ---- places ------------------------------------------------------------------------------------------------------ */

struct arena {
  uintptr_t base;
  uint64_t used;
};

/* NULL for nothing. */
static void *place(struct arena *arena, uint64_t bytes) {
  uintptr_t at = arena->base + arena->used;
  arena->used += us_device_align(bytes);
  return bytes ? (void *)at : NULL;
}

static void place_tiles(struct us_device_schedule *s, const struct sizes *z, struct arena *a) {
  struct us_schedule_buffers *b = &us_schedule_owner(s)->buffers;
  const struct us_device_weights *w = s->weights;
  const struct us_shape *shape = &w->shape;
  uint64_t T = s->row_tiles, rows = T * US_ENGINE_ROWS, D = shape->hidden;
  b->normed_tile = us_schedule_operand_bytes(D), b->attended_tile = us_schedule_operand_bytes(z->attended),
  b->inner_tile = us_schedule_operand_bytes(z->inner);
  b->router_tile = (uint64_t)z->router_parts * US_ENGINE_ROWS * shape->experts * sizeof(float);
  b->pairs_tile =
      (uint64_t)US_ENGINE_ROWS * shape->top_k * us_engine_pair_bytes(shape->expert_inner / w->ranks);
  if (!z->router_parts) b->pairs_tile = 0;
  b->logits_tile = (uint64_t)US_ENGINE_ROWS * s->logits_stride * sizeof(float);
  b->partial_tile = z->partial, b->arrivals_tile = z->arrivals;
  b->residual = place(a, rows * D * sizeof(float));
  b->normed = place(a, T * b->normed_tile);
  b->qkv = place(a, rows * z->qkv * sizeof(float));
  b->partial = place(a, T * b->partial_tile);
  b->arrivals = place(a, T * b->arrivals_tile);
  b->attended = place(a, T * b->attended_tile);
  b->inner = place(a, T * b->inner_tile);
  b->router = place(a, T * b->router_tile);
  b->pairs = place(a, T * b->pairs_tile);
  b->choices = place(a, z->router_parts && T > 1 ? T * US_ENGINE_ACTIVE * sizeof *b->choices : 0);
  b->logits = place(a, T * b->logits_tile);
  if (s->options.observe) b->routed = place(a, shape->layers * rows * shape->top_k * sizeof(uint32_t));
  if (!us_schedule_drafts(s)) return;
  b->features_tile = us_schedule_operand_bytes((uint64_t)w->draft_shape.taps * D);
  b->features = place(a, T * b->features_tile);
  b->context_kv = place(a, rows * w->draft_kv.rows * sizeof(float));
  b->draft_logits = place(a, T * b->logits_tile);
}

/* Kinds with the same angles share a table. */
static void place_rope(struct us_device_schedule *s, struct arena *a) {
  struct us_schedule_buffers *b = &us_schedule_owner(s)->buffers;
  for (int kind = 0; kind < US_SCHEDULE_ATTENTIONS; kind++) {
    const struct us_attention_shape *mine = us_schedule_attention(s, (enum us_schedule_attention)kind);
    b->rope[kind] = NULL;
    for (int other = 0; mine && other < kind && !b->rope[kind]; other++) {
      const struct us_attention_shape *its = us_schedule_attention(s, (enum us_schedule_attention)other);
      if (its && its->rope_theta == mine->rope_theta && its->rotary_dim == mine->rotary_dim)
        b->rope[kind] = b->rope[other];
    }
    if (mine && !b->rope[kind])
      b->rope[kind] = place(a, (uint64_t)s->options.max_positions * mine->rotary_dim * sizeof(float));
  }
}

static uint64_t exchange_bytes(const struct us_engine_rank *rank) {
  return (uint64_t)rank->slots * rank->addends * US_ENGINE_ROWS * rank->D * sizeof(float);
}

/* Everything of the rank that its own or other GPUs' operations share. */
static void place_rank(struct us_device_schedule *s, const struct sizes *z, struct arena *a) {
  const struct us_device_weights *w = s->weights;
  struct us_engine_rank *r = &s->rank;
  uint32_t me = w->rank, D = w->shape.hidden;
  *r = (struct us_engine_rank){.rank = me,
                               .ranks = w->ranks,
                               .D = D,
                               .addends = z->addends,
                               .embed_rows = w->embed_rows,
                               .mask_embedding = w->mask_embedding};
  /* While a rank pushes the sums of one norm, another may still be at the reductions of the one before; between the two there
   * may be an EMBED, which takes numbers but no sums. schedule_order.c proves that this is enough. The next power of two: a block finds
   * an exchange's slot without a division. */
  for (r->slots = 1; r->slots < 3 * s->row_tiles; r->slots *= 2) {}
  r->embed[me] = w->embed;
  r->state = place(a, sizeof *r->state);
  r->exchange[me] = place(a, exchange_bytes(r));
  r->norm_tiles = s->row_tiles;
  r->norm = place(a, 2ull * s->row_tiles * US_ENGINE_ROWS * (D / us_engine_slice(D)) * sizeof(uint64_t));
  r->selects = us_schedule_draft_places(s) + s->row_tiles;
  r->select[me] = place(a, us_engine_select_bytes(w->ranks, US_DEVICE_SCHEDULE_BLOCKS, r->selects));
  if (w->ranks > 1)
    r->logits_all[me] = place(a, (uint64_t)s->row_tiles * US_ENGINE_ROWS * w->shape.vocab * sizeof(float));
}

static uint64_t place_all(struct us_device_schedule *s, const struct sizes *z, void *base) {
  struct arena a = {.base = (uintptr_t)base};
  place_tiles(s, z, &a);
  place_rope(s, &a);
  place_rank(s, z, &a);
  return a.used;
}

/* ---- contents ---------------------------------------------------------------------------------------------------- */

static enum us_status fill_rope(const struct us_device_schedule *s, enum us_schedule_attention kind,
                                struct us_err *err) {
  const struct us_schedule_owner *owner = us_schedule_owner(s);
  const struct us_attention_shape *a = us_schedule_attention(s, kind);
  for (int other = 0; other < (int)kind; other++)
    if (owner->buffers.rope[other] == owner->buffers.rope[kind]) return US_OK;
  size_t n = (size_t)s->options.max_positions * a->rotary_dim;
  float *table = malloc(n * sizeof *table);
  if (!table) return us_err_memory(err, "rotary tables", n * sizeof *table);
  for (uint32_t p = 0; p < s->options.max_positions; p++)
    us_rope_table(a->rope_theta, a->rotary_dim, p, table + (size_t)p * a->rotary_dim);
  enum us_status status =
      owner->memory.upload(owner->memory.arg, owner->buffers.rope[kind], table, n * sizeof *table, err);
  free(table);
  return status;
}

static enum us_status fill_all(const struct us_device_schedule *s, struct us_err *err) {
  const struct us_schedule_owner *owner = us_schedule_owner(s);
  const struct us_device_memory_ops *m = &owner->memory;
  if (!m->fill) return US_OK;
  enum us_status status = m->fill(m->arg, owner->arena, 0, owner->arena_bytes, err);
  if (status == US_OK) /* US_ENGINE_ABSENT everywhere */
    status = m->fill(m->arg, s->rank.exchange[s->rank.rank], 0xff, exchange_bytes(&s->rank), err);
  for (int kind = 0; status == US_OK && kind < US_SCHEDULE_ATTENTIONS; kind++)
    if (owner->buffers.rope[kind]) status = fill_rope(s, (enum us_schedule_attention)kind, err);
  return status;
}

enum us_status us_schedule_buffers_create(struct us_device_schedule *s, struct us_err *err) {
  struct us_schedule_owner *owner = us_schedule_owner(s);
  struct sizes sizes;
  enum us_status status = size_all(s, &sizes, err);
  if (status != US_OK) return status;
  owner->arena_bytes = place_all(s, &sizes, NULL);
  void *arena;
  status = owner->memory.alloc(owner->memory.arg, owner->arena_bytes, &arena, err);
  if (status != US_OK) return status;
  owner->arena = arena;
  place_all(s, &sizes, arena);
  s->residual = owner->buffers.residual;
  s->features = owner->buffers.features;
  s->logits = owner->buffers.logits;
  s->draft_logits = owner->buffers.draft_logits;
  s->routed = owner->buffers.routed;
  return fill_all(s, err);
}
