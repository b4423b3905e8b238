/* down_stream.cuh: what fills the ring in the experts' down projection, and what a stage holds.
 *
 *     us_engine_down_stream(b, op);      // the streaming thread: weights
 *     us_engine_down_pairs(b, op);       // the epilogue warps: activations, and struct us_down_told for the compute warps
 *
 * All of them, since one is slower than the multiplies: a dependent instruction takes some six cycles beside 16 busy warps, and a stage is
 * there some 1400. They walk through the same stages by themselves; a stage's barrier waits for the thread and one of the warps.
 *
 * Contents: what a stage holds; weights; what compute warps are told; activations; the roles.
 */
#ifndef US_KERNELS_ENGINE_DOWN_STREAM_CUH
#define US_KERNELS_ENGINE_DOWN_STREAM_CUH

#include "kernels/engine/gemm.cuh"

#define US_DOWN_TILES 3
#define US_DOWN_PAD   64   /* bytes between pairs in a stage: neighbours start in different banks */
#define US_DOWN_LAST  4    /* added to the count of the last stage */
#define US_DOWN_ZEROS 1024 /* bytes of zeros, as much as a pair's activations of a step at most */

/* Several row tiles: a warp's sums of a row, 16 columns: r at this offset + 4 r, r + 8 at that ^ 32. Neighbouring rows are in different
 * banks. */
static __device__ __forceinline__ uint32_t us_down_sums_offset(uint32_t row) {
  return row * 64 + (row & 2) * 16;
}

/* ---- what a stage holds ------------------------------------------------------------------------------------------- */

/* What compute warps are told of a stage, so that each looks once and computes no address. A column of the multiply is a row of the row
 * tile, or of several row tiles a pair of the expert's slot. A step that is not there is loaded, but not multiplied. Addresses are those of
 * shared memory. */
struct us_down_pages {
  alignas(16) uint32_t first; /* a tile's pages of either step */
  uint32_t second;
  uint32_t count; /* steps, and US_DOWN_LAST */
};
struct us_down_told {
  uint32_t rows[US_ENGINE_ROWS][2];       /* a column's activations of either step */
  float weight[US_ENGINE_ROWS / 2][2][2]; /* routing weight: two columns, steps, which of the two */
  uint32_t sums[US_ENGINE_ROWS / 2][2]
               [2]; /* several row tiles: where the row's sums lie, or US_ENGINE_NONE */
  struct us_down_pages tile[US_DOWN_TILES];
};
static_assert(sizeof(struct us_down_told) == US_ENGINE_DOWN_TOLD, "it lies behind US_ENGINE_DOWN_BYTES");

/* One row tile, over scratch. Copies of weights never come here, so that what is told needs no fence; of several row tiles, whose sums lie
 * here, it stands at the end of its stage. */
struct us_down_room {
  alignas(16) uint8_t zeros[US_DOWN_ZEROS]; /* what a row has of an expert that it does not use */
  struct us_down_told told[US_ENGINE_STAGES];
  float4 sums[US_ENGINE_COMPUTE_WARPS][32]; /* whole MXFP4 pages: each warp's at the end */
};
static_assert(sizeof(struct us_down_room) <= US_ENGINE_SCRATCH, "over scratch");
static __device__ __forceinline__ struct us_down_room *us_down_room(void) {
  return (struct us_down_room *)us_engine_shared_of(NULL)->scratch;
}

/* Blocks' shares: groups of three tiles. */
static __device__ __forceinline__ uint32_t us_engine_down_groups(const struct us_engine_down *d) {
  return (d->w.tiles + US_DOWN_TILES - 1) / US_DOWN_TILES;
}
static __device__ __forceinline__ uint32_t us_engine_down_tiles(const struct us_engine_down *d,
                                                                uint32_t group) {
  uint32_t left = d->w.tiles - group * US_DOWN_TILES;
  return left < US_DOWN_TILES ? left : US_DOWN_TILES;
}

/* Bytes of a pair's activations of a step; and from one pair's to the next's in a stage: there may be two steps of one expert, joined. */
static __device__ __forceinline__ uint32_t us_down_rows_bytes(const struct us_engine_down *d) {
  return d->step_slices * d->w.groups * 64;
}
static __device__ __forceinline__ uint32_t us_down_stride(const struct us_engine_down *d) {
  return (d->steps > 1 && d->stage_steps == 2 ? 2 : 1) * us_down_rows_bytes(d) + US_DOWN_PAD;
}
static_assert(US_ENGINE_ROWS * (2 * US_DOWN_ZEROS + US_DOWN_PAD) <= US_ENGINE_DOWN_BYTES / 2,
              "where two steps fit a stage, one does with every row's activations");

/* Sizes in a stage. Steps are numbered expert by expert. */
struct us_down_plan {
  uint32_t steps;              /* an expert */
  uint32_t run, step_bytes;    /* a tile's pages of a step; all three tiles' */
  uint32_t rows_bytes, stride; /* as above */
  uint32_t tile_bytes;         /* of an expert */
  uint32_t active;
  int room; /* for the activations of two steps; negative: a stage has one */
};
static __device__ __forceinline__ struct us_down_plan us_down_plan(const struct us_engine_down *d,
                                                                   uint32_t active) {
  struct us_down_plan p;
  p.steps = d->steps;
  p.run = d->step_slices * d->w.page_bytes, p.step_bytes = US_DOWN_TILES * p.run;
  p.rows_bytes = us_down_rows_bytes(d), p.stride = us_down_stride(d);
  p.tile_bytes = d->w.slices * d->w.page_bytes;
  p.active = active;
  p.room = d->stage_steps < 2 ? -1 : (int)(US_ENGINE_DOWN_BYTES - 2 * p.step_bytes);
  return p;
}

/* A step: its expert's place in the list and brief, and the brief of the expert behind it, which is loaded long before it is needed. */
struct us_down_at {
  uint32_t slot, step, brief, next;
};
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

/* What the stage that begins at a step holds: two steps if they fit with their activations. Two of one expert are joined: tile by tile and
 * row by row both lie together, which takes half as many copies. */
struct us_down_stage {
  uint32_t count, other; /* steps; the brief of the last one's expert */
  uint32_t pairs;        /* of its experts */
  bool joined;
};
static __device__ __forceinline__ struct us_down_stage us_down_stage(const struct us_down_plan *p,
                                                                     const struct us_down_at *at) {
  uint32_t pairs = us_engine_brief_pairs(at->brief);
  bool same = at->step + 1 < p->steps;
  uint32_t both = same ? pairs : pairs + us_engine_brief_pairs(at->next);
  if ((int)(both * p->stride) > p->room || (!same && at->slot + 1 >= p->active))
    return {1, at->brief, pairs, false};
  return {2, same ? at->brief : at->next, both, same};
}

/* ---- weights ------------------------------------------------------------------------------------------------------ */

/* The weights of a stage's steps: contiguous if a step is a whole tile row of pages, else tile by tile. */
static __device__ __forceinline__ void us_engine_down_copy(const struct us_engine_down *d,
                                                           const struct us_down_plan *p, const uint8_t *mine,
                                                           const struct us_down_at *at,
                                                           const struct us_down_stage *stage, uint32_t tiles,
                                                           uint32_t to, uint32_t full, uint64_t policy) {
  const uint8_t *from =
      mine + us_engine_brief_expert(at->brief) * d->w.matrix_bytes + (size_t)at->step * p->run;
  if (p->steps == 1) {
    us_bulk_load_once(to, from, tiles * p->run, full, policy);
    if (stage->count == 2)
      us_bulk_load_once(to + p->step_bytes, mine + us_engine_brief_expert(stage->other) * d->w.matrix_bytes,
                        tiles * p->run, full, policy);
    return;
  }
  uint32_t run = stage->joined ? 2 * p->run : p->run;
#pragma unroll
  for (uint32_t t = 0; t < US_DOWN_TILES; t++)
    if (t < tiles) us_bulk_load_once(to + t * run, from + (size_t)t * p->tile_bytes, run, full, policy);
  if (stage->count == 1 || stage->joined) return;
  from = mine + us_engine_brief_expert(stage->other) * d->w.matrix_bytes;
#pragma unroll 1
  for (uint32_t t = 0; t < tiles; t++)
    us_bulk_load_once(to + p->step_bytes + t * run, from + (size_t)t * p->tile_bytes, run, full, policy);
}

/* ---- what compute warps are told ---------------------------------------------------------------------------------- */

/* Where the activations of step k's pairs begin. */
static __device__ __forceinline__ uint32_t us_down_rows_at(const struct us_down_plan *p,
                                                           const struct us_down_at *at,
                                                           const struct us_down_stage *stage, uint32_t ring,
                                                           uint32_t k) {
  uint32_t rows = ring + stage->count * p->step_bytes;
  return rows + (k ? (stage->joined ? p->rows_bytes : us_engine_brief_pairs(at->brief) * p->stride) : 0);
}

/* Lanes of 16 and more: their tile's pages. `last`: US_DOWN_LAST or 0. */
static __device__ __forceinline__ void us_down_tell_pages(struct us_down_told *told,
                                                          const struct us_down_plan *p,
                                                          const struct us_down_stage *stage, uint32_t ring,
                                                          uint32_t last) {
  uint32_t tile = threadIdx.x % 32 - 2 * US_ENGINE_ROWS;
  struct us_down_pages pages = {ring + tile * (stage->joined ? 2 : 1) * p->run, 0, stage->count | last};
  pages.second = pages.first + (stage->joined ? p->run : p->step_bytes);
  if (tile < US_DOWN_TILES) told->tile[tile] = pages;
}

/* A warp, one row tile: a lane a column of a step, then a lane a tile. */
static __device__ __forceinline__ void us_down_tell(struct us_engine_shared *s, const struct us_down_plan *p,
                                                    const struct us_down_at *at,
                                                    const struct us_down_stage *stage, uint32_t index,
                                                    uint32_t last) {
  struct us_down_room *room = us_down_room();
  struct us_down_told *told = &room->told[index];
  uint32_t lane = threadIdx.x % 32, column = lane % 8, k = lane / 8, ring = us_shared_address(s->ring[index]);
  us_down_tell_pages(told, p, stage, ring, last);
  if (k > 1) return;
  uint32_t step = k < stage->count ? k : 0, slot = at->slot + (step && !stage->joined);
  int pair = s->active.pair[slot][column];
  uint32_t number = (uint32_t)pair - us_engine_brief_first(step ? stage->other : at->brief),
           rows = us_down_rows_at(p, at, stage, ring, step) + number * p->stride;
  told->rows[column][k] = pair < 0 ? us_shared_address(room->zeros) : rows;
  told->weight[column / 2][k][column % 2] = s->active.weight[slot][column];
}

/* A warp, several row tiles. Pairs come to the even columns first, whose sums one lane has; a column without one multiplies the slot's
 * first pair, for nothing. */
static __device__ __forceinline__ void us_down_tell_several(struct us_engine_shared *s,
                                                            const struct us_down_plan *p,
                                                            const struct us_down_at *at,
                                                            const struct us_down_stage *stage, uint32_t index,
                                                            uint32_t last) {
  struct us_down_told *told = (struct us_down_told *)(s->ring[index] + US_ENGINE_DOWN_BYTES);
  const struct us_engine_active *active = &s->active;
  uint32_t lane = threadIdx.x % 32, k = lane / 8, ring = us_shared_address(s->ring[index]);
  us_down_tell_pages(told, p, stage, ring, last);
  if (k < 2) {
    uint32_t step = k < stage->count ? k : 0, column = lane % 8, number = column / 2 + column % 2 * 4;
    uint32_t brief = step ? stage->other : at->brief, pair = us_engine_brief_first(brief) + number;
    bool exists = number < us_engine_brief_pairs(brief);
    told->rows[column][k] = us_down_rows_at(p, at, stage, ring, step) + (exists ? number * p->stride : 0);
    told->weight[column / 2][k][column % 2] = exists ? active->pair_weight[pair] : 0.0f;
    told->sums[column / 2][k][column % 2] = exists ? us_down_sums_offset(active->row[pair]) : US_ENGINE_NONE;
  }
  /* weights are copied over it later */
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Where a lane looks for what it is told of the ring's first stage: the activations of its column of the operand, the routing weights (and
 * behind them the sums) of its two columns of the sums, its warp's pages. `apart`: from one stage's to the next's. */
struct us_down_lane {
  uint32_t rows, weight, pages, apart;
};
template <bool SEVERAL>
static __device__ __forceinline__ struct us_down_lane us_down_lane(uint32_t base, uint32_t lane,
                                                                   uint32_t tile) {
  uint32_t told = base + (SEVERAL ? US_ENGINE_DOWN_BYTES
                                  : (uint32_t)(offsetof(struct us_engine_shared, scratch) +
                                               offsetof(struct us_down_room, told)));
  return {told + (uint32_t)offsetof(struct us_down_told, rows) + lane / 4 * 8,
          told + (uint32_t)offsetof(struct us_down_told, weight) + lane % 4 * 16,
          told + (uint32_t)offsetof(struct us_down_told, tile) + tile * 16,
          SEVERAL ? US_ENGINE_STAGE_BYTES : (uint32_t)sizeof(struct us_down_told)};
}

/* ---- activations -------------------------------------------------------------------------------------------------- */

/* A warp: the activations of a stage's steps, behind their weights; a lane a pair, or one copy if pairs are copied whole. */
static __device__ __forceinline__ void us_engine_down_rows(
    const struct us_engine_shared *s, const struct us_engine_down *d, const struct us_down_plan *p,
    const struct us_down_at *at, const struct us_down_stage *stage, uint32_t index) {
  uint32_t full = us_shared_address(&s->full[index]), ring = us_shared_address(s->ring[index]);
  uint32_t lane = threadIdx.x % 32, k = lane / 8, pair_bytes = us_engine_pair_bytes(d->F);
  uint32_t bytes = (stage->joined ? 2 : 1) * p->rows_bytes;
  const uint8_t *from = (const uint8_t *)d->pairs;
  if (lane == 0) us_barrier_expect(full, stage->pairs * (p->steps == 1 ? pair_bytes : bytes));
  __syncwarp();
  if (p->steps == 1) {
    if (lane == 0)
      us_bulk_load(ring + stage->count * p->step_bytes, from + us_engine_brief_first(at->brief) * pair_bytes,
                   stage->pairs * pair_bytes, full);
    return;
  }
  uint32_t brief = k ? stage->other : at->brief, number = lane % 8;
  if (k >= (stage->joined ? 1 : stage->count) || number >= us_engine_brief_pairs(brief)) return;
  us_bulk_load(us_down_rows_at(p, at, stage, ring, k) + number * p->stride,
               from + (us_engine_brief_first(brief) + number) * pair_bytes +
                   (k ? 0 : at->step * p->rows_bytes),
               bytes, full);
}
static_assert(US_DOWN_PAD == US_ENGINE_PAIR_PAD, "a pair copied whole brings its padding along");

/* ---- the roles ---------------------------------------------------------------------------------------------------- */

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
  const struct us_engine_op *up = us_engine_rank_of(b)->ops + wait;
  return up->kind == US_ENGINE_GEMM && up->gemm.experts && up->row_tiles <= 1; /* several row tiles do not */
}

/* A warp: the activations of the first experts of the list stand when the gate and up projection's early count does, all when it is
 * done. */
static __device__ __noinline__ void us_down_await(uint32_t wait, bool early) {
  const struct us_engine_block *b = us_engine_self();
  if (us_engine_lane() == 0)
    us_engine_poll(b, early ? us_engine_counter(b, wait, US_ENGINE_EARLY) : us_engine_rank_of(b)->done + wait,
                   wait, (early ? US_ENGINE_EPILOGUES : 1) * us_engine_target(b, wait));
  __syncwarp();
  asm volatile("fence.proxy.async;" ::: "memory");
}

/* The epilogue's warps, which have nothing else to do: what the stages hold, and the activations. They take turns. A warp looks at its own
 * stages alone: of the others it may come to hear too late, and a barrier tells one phase from the next only. */
static __device__ __forceinline__ void us_engine_down_pairs(struct us_engine_block *b,
                                                            const struct us_engine_op *op) {
  const struct us_engine_down *d = &op->down;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t groups = us_engine_down_groups(d), shift = op->shift,
           wait = op->wait; /* before waiting, as above */
  bool several = US_ENGINE_SEVERAL && op->row_tiles > 1, mine = threadIdx.x / 32 % 2;
  us_engine_wait_routed(b);
  struct us_down_plan p = us_down_plan(d, s->active.count);
  uint32_t early = us_down_follows_up(b, wait) ? us_engine_early(s) : 0;
  if (early) us_down_await(wait, true);
  for (uint32_t group = us_engine_first_item(b, shift); group < groups; group += b->blocks)
    for (struct us_down_at at = us_down_begin(s); at.slot < p.active; mine = !mine) {
      struct us_down_stage stage = us_down_stage(&p, &at);
      struct us_down_at here = at;
      us_down_next(s, &p, &at, stage.count);
      if (here.slot + 1 >= early && early != US_ENGINE_NONE) /* a stage may have two experts */
        us_down_await(wait, false), early = US_ENGINE_NONE;
      if (mine) {
        us_engine_barrier_await(us_shared_address(&s->empty[c.stage]), c.phase ^ 1, US_ENGINE_WAIT_FREE);
        uint32_t last = at.slot >= p.active ? US_DOWN_LAST : 0;
        if (several)
          us_down_tell_several(s, &p, &here, &stage, c.stage, last);
        else
          us_down_tell(s, &p, &here, &stage, c.stage, last);
        __syncwarp();
        us_engine_down_rows(s, d, &p, &here, &stage, c.stage);
      }
      us_engine_advance(&c);
    }
  __syncwarp(); /* the lanes share `b` */
  if (threadIdx.x % 32 == 0) b->stage = c.stage, b->phase = c.phase;
  __syncwarp();
}

#endif
