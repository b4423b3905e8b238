/* down_stream.cuh: what fills the ring in the experts' down projection, and what a stage holds.
 *
 *     us_engine_down_stream(b, op);      // the streaming thread: weights
 *     us_engine_down_pairs(b, op);       // a thread of the epilogue: activations, and struct us_engine_down_stage for the compute warps
 *
 * Two threads, since one is slower than the multiplies: a stage is up to 12 copies, each some 30 dependent instructions of one lane
 * beside 16 busy warps. They walk through the same stages by themselves; a stage's barrier waits for both.
 */
#ifndef US_KERNELS_ENGINE_DOWN_STREAM_CUH
#define US_KERNELS_ENGINE_DOWN_STREAM_CUH

#include "kernels/engine/gemm.cuh"

#define US_DOWN_TILES  3
#define US_DOWN_PAD    64   /* bytes between pairs in a stage: neighbours start in different banks */
#define US_DOWN_LAST   4    /* added to the count of the last stage */
#define US_DOWN_JOINED 8    /* and to that of a stage with two steps of one expert */
#define US_DOWN_ZEROS  1024 /* bytes of zeros, as much as a pair's activations of a step at most */

/* Blocks' shares: groups of three tiles. */
static __device__ __forceinline__ uint32_t us_engine_down_groups(const struct us_engine_down *d) {
  return (d->w.tiles + US_DOWN_TILES - 1) / US_DOWN_TILES;
}
static __device__ __forceinline__ uint32_t us_engine_down_tiles(const struct us_engine_down *d,
                                                                uint32_t group) {
  uint32_t left = d->w.tiles - group * US_DOWN_TILES;
  return left < US_DOWN_TILES ? left : US_DOWN_TILES;
}

/* Sizes in a stage. Steps are numbered expert by expert. */
struct us_down_plan {
  uint32_t steps, stage_steps; /* an expert; a stage at most */
  uint32_t run, step_bytes;    /* a tile's pages of a step; all three tiles' */
  uint32_t rows_bytes;         /* a pair's activations of a step */
  uint32_t tile_bytes;         /* of an expert */
  uint32_t active;
};
static __device__ __forceinline__ struct us_down_plan us_down_plan(const struct us_engine_down *d,
                                                                   uint32_t active) {
  struct us_down_plan p;
  p.steps = d->steps, p.stage_steps = d->stage_steps;
  p.run = d->step_slices * d->w.page_bytes, p.step_bytes = US_DOWN_TILES * p.run;
  p.rows_bytes = d->step_slices * d->w.groups * 64;
  p.tile_bytes = d->w.slices * d->w.page_bytes;
  p.active = active;
  return p;
}

/* A step: its expert's place in the list and brief, and the brief of the expert behind it, which is loaded long before it is needed. */
struct us_down_at {
  uint32_t slot, step, brief, next;
};
static __device__ __forceinline__ uint32_t us_down_expert(uint32_t brief) {
  return us_engine_brief_expert(brief);
}
static __device__ __forceinline__ uint32_t us_down_first(uint32_t brief) {
  return us_engine_brief_first(brief);
}
static __device__ __forceinline__ uint32_t us_down_pairs(uint32_t brief) {
  return us_engine_brief_pairs(brief);
}
static __device__ __forceinline__ uint32_t us_down_brief(const struct us_engine_shared *s, uint32_t slot) {
  return s->active.brief[slot < US_ENGINE_SLOTS ? slot : 0];
}
static __device__ __forceinline__ struct us_down_at us_down_begin(const struct us_engine_shared *s) {
  struct us_down_at at = {0, 0, us_down_brief(s, 0), us_down_brief(s, 1)};
  return at;
}
/* `count` steps on: as many as a stage held. */
static __device__ __forceinline__ void us_down_next(const struct us_engine_shared *s,
                                                    const struct us_down_plan *p, struct us_down_at *at,
                                                    uint32_t count) {
  at->step += count;
  if (at->step < p->steps) return;
  bool two = p->steps == 1 && count == 2;
  at->step = p->steps == 1 ? 0 : at->step - p->steps;
  at->slot += two ? 2 : 1;
  at->brief = two ? us_down_brief(s, at->slot) : at->next;
  at->next = us_down_brief(s, at->slot + 1);
}

/* What the stage that begins at a step holds: as many steps as fit with their activations, one always does. Two steps of one
 * expert are joined: tile by tile and row by row both lie together, which takes half as many copies. */
struct us_down_stage {
  uint32_t count, other; /* steps; the brief of the second's expert */
  bool joined;
};
static __device__ __forceinline__ struct us_down_stage us_down_stage(const struct us_down_plan *p,
                                                                     const struct us_down_at *at) {
  struct us_down_stage stage = {1, at->brief, false};
  bool same = at->step + 1 < p->steps;
  if (p->stage_steps < 2 || (!same && at->slot + 1 >= p->active)) return stage;
  if (!same) stage.other = at->next;
  uint32_t pairs = us_down_pairs(at->brief) + us_down_pairs(stage.other);
  if (2 * p->step_bytes + pairs * (p->rows_bytes + US_DOWN_PAD) > US_ENGINE_STAGE_BYTES) return stage;
  stage.count = 2, stage.joined = same;
  return stage;
}

/* ---- streaming ------------------------------------------------------------------------------------------------------ */

/* The weights of a stage's steps: contiguous if a step is a whole tile row of pages, else tile by tile. */
static __device__ __forceinline__ void us_engine_down_copy(const struct us_engine_down *d,
                                                           const struct us_down_plan *p, const uint8_t *mine,
                                                           const struct us_down_at *at,
                                                           const struct us_down_stage *stage, uint32_t tiles,
                                                           uint32_t to, uint32_t full, uint64_t policy) {
  const uint8_t *from = mine + us_down_expert(at->brief) * d->w.matrix_bytes + (size_t)at->step * p->run;
  if (p->steps == 1) {
    us_bulk_load_once(to, from, tiles * p->run, full, policy);
    if (stage->count == 2)
      us_bulk_load_once(to + p->step_bytes, mine + us_down_expert(stage->other) * d->w.matrix_bytes,
                        tiles * p->run, full, policy);
    return;
  }
  uint32_t run = stage->joined ? 2 * p->run : p->run;
#pragma unroll
  for (uint32_t t = 0; t < US_DOWN_TILES; t++)
    if (t < tiles) us_bulk_load_once(to + t * run, from + (size_t)t * p->tile_bytes, run, full, policy);
  if (stage->count == 1 || stage->joined) return;
  from = mine + us_down_expert(stage->other) * d->w.matrix_bytes;
#pragma unroll 1
  for (uint32_t t = 0; t < tiles; t++)
    us_bulk_load_once(to + p->step_bytes + t * run, from + (size_t)t * p->tile_bytes, run, full, policy);
}

/* What the compute warps need to know of a stage. A pair's activations of step k lie rows[k] + number * their stride bytes into the
 * ring, modulo 2^32. */
static __device__ __forceinline__ void us_down_tell(struct us_engine_shared *s, const struct us_down_plan *p,
                                                    const struct us_down_at *at,
                                                    const struct us_down_stage *stage, uint32_t index) {
  uint32_t stride = (stage->joined ? 2 : 1) * p->rows_bytes + US_DOWN_PAD,
           rows = index * US_ENGINE_STAGE_BYTES + stage->count * p->step_bytes;
  bool same = at->step + 1 < p->steps;
  uint32_t ends =
      at->step + stage->count >= p->steps ? at->slot + 1 : at->slot; /* experts before the next stage */
  if (stage->count == 2 && !same && p->steps == 1) ends = at->slot + 2;
  struct us_engine_down_stage tell = {
      at->slot | (same ? at->slot : at->slot + 1) << 16, stage->count, {0, 0}};
  tell.rows[0] = rows - us_down_first(at->brief) * stride;
  tell.rows[1] = stage->joined ? tell.rows[0] + p->rows_bytes
                               : rows + (us_down_pairs(at->brief) - us_down_first(stage->other)) * stride;
  if (stage->joined) tell.count |= US_DOWN_JOINED;
  if (ends == p->active) tell.count |= US_DOWN_LAST;
  s->down[index] = tell;
}

/* Pairs of one expert's step, `bytes` of each. */
static __device__ __forceinline__ uint32_t us_down_pairs_copy(const struct us_engine_down *d, uint32_t brief,
                                                              uint32_t offset, uint32_t bytes, uint32_t to,
                                                              uint32_t full) {
  uint32_t pair_bytes = us_engine_pair_bytes(d->F);
  const uint8_t *from = (const uint8_t *)d->pairs + us_down_first(brief) * pair_bytes + offset;
#pragma unroll 1
  for (uint32_t i = 0; i < us_down_pairs(brief); i++, from += pair_bytes, to += bytes + US_DOWN_PAD)
    us_bulk_load(to, from, bytes, full);
  return to;
}

/* The activations of a stage's steps, behind their weights. One copy if pairs are copied whole. */
static __device__ __forceinline__ void us_engine_down_rows(
    const struct us_engine_shared *s, const struct us_engine_down *d, const struct us_down_plan *p,
    const struct us_down_at *at, const struct us_down_stage *stage, uint32_t index) {
  uint32_t full = us_shared_address(&s->full[index]),
           to = us_shared_address(s->ring[index]) + stage->count * p->step_bytes;
  uint32_t pairs = us_down_pairs(at->brief) + (stage->count == 2 ? us_down_pairs(stage->other) : 0);
  if (p->steps == 1) {
    uint32_t bytes = us_engine_pair_bytes(d->F);
    us_barrier_expect(full, pairs * bytes);
    us_bulk_load(to, (const uint8_t *)d->pairs + us_down_first(at->brief) * bytes, pairs * bytes, full);
    return;
  }
  us_barrier_expect(full, pairs * p->rows_bytes);
  uint32_t offset = at->step * p->rows_bytes;
  to = us_down_pairs_copy(d, at->brief, offset, (stage->joined ? 2 : 1) * p->rows_bytes, to, full);
  if (stage->count == 2 && !stage->joined) us_down_pairs_copy(d, stage->other, 0, p->rows_bytes, to, full);
}
static_assert(US_DOWN_PAD == US_ENGINE_PAIR_PAD, "a pair copied whole brings its padding along");

/* One thread: the weights. They run ahead of the activations by up to a ring. */
static __device__ __forceinline__ void us_engine_down_stream(struct us_engine_block *b,
                                                             const struct us_engine_op *op) {
  const struct us_engine_down local = op->down, *d = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t groups = us_engine_down_groups(d), shift = op->shift; /* a look at L2: before waiting */
  us_engine_wait_routed(b);
  struct us_down_plan p = us_down_plan(d, s->active.count);
  bool copies = us_engine_copies(b);
  uint64_t policy = us_read_once();
  for (uint32_t group = us_engine_first_item(b, shift); group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group);
    const uint8_t *mine = d->w.pages + (size_t)group * US_DOWN_TILES * p.tile_bytes;
    for (struct us_down_at at = us_down_begin(s); at.slot < p.active;) {
      struct us_down_stage stage = us_down_stage(&p, &at);
      us_engine_barrier_wait(b, &s->empty[c.stage], c.phase ^ 1, US_ENGINE_WAIT_FREE);
      uint32_t full = us_shared_address(&s->full[c.stage]);
      us_barrier_expect(full, copies ? stage.count * tiles * p.run : 0);
      if (copies)
        us_engine_down_copy(d, &p, mine, &at, &stage, tiles, us_shared_address(s->ring[c.stage]), full,
                            policy);
      us_engine_advance(&c);
      us_down_next(s, &p, &at, stage.count);
    }
  }
  b->stage = c.stage, b->phase = c.phase;
}

/* Whether DOWN waits for a gate and up projection, which tells early; a test may let it wait for something else. */
static __device__ __forceinline__ bool us_down_follows_up(const struct us_engine_block *b, uint32_t wait) {
  if (wait == US_ENGINE_NONE) return false;
  const struct us_engine_op *up = b->rank->ops + wait;
  return up->kind == US_ENGINE_GEMM && up->gemm.experts && up->row_tiles <= 1; /* several row tiles do not */
}

/* The activations of the first experts of the list stand when the gate and up projection's early count does, all when it is done. */
static __device__ __forceinline__ void us_down_await(const struct us_engine_block *b, uint32_t wait,
                                                     bool early) {
  if (early)
    us_engine_poll(b, us_engine_counter(b, wait, US_ENGINE_EARLY), wait,
                   US_ENGINE_EPILOGUES * us_engine_target(b, wait));
  else
    us_engine_poll_done(b, wait);
  asm volatile("fence.proxy.async;" ::: "memory");
}

/* One thread of the epilogue warps, which have nothing else to do: what the stages hold, and the activations. */
static __device__ __forceinline__ void us_engine_down_pairs(struct us_engine_block *b,
                                                            const struct us_engine_op *op) {
  const struct us_engine_down local = op->down, *d = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t groups = us_engine_down_groups(d), shift = op->shift,
           wait = op->wait; /* before waiting, as above */
  us_engine_wait_routed(b);
  struct us_down_plan p = us_down_plan(d, s->active.count);
  uint32_t early = us_down_follows_up(b, wait) ? us_engine_early(s) : 0;
  if (early) us_down_await(b, wait, true);
  for (uint32_t group = us_engine_first_item(b, shift); group < groups; group += b->blocks)
    for (struct us_down_at at = us_down_begin(s); at.slot < p.active;) {
      struct us_down_stage stage = us_down_stage(&p, &at);
      if (at.slot + 1 >= early && early != US_ENGINE_NONE) /* a stage may have two experts */
        us_down_await(b, wait, false), early = US_ENGINE_NONE;
      us_engine_barrier_wait(b, &s->empty[c.stage], c.phase ^ 1, US_ENGINE_WAIT_FREE);
      us_down_tell(s, &p, &at, &stage, c.stage);
      us_engine_down_rows(s, d, &p, &at, &stage, c.stage);
      us_engine_advance(&c);
      us_down_next(s, &p, &at, stage.count);
    }
  b->stage = c.stage, b->phase = c.phase;
}

#endif
