/* gemm.cuh: 8 rows times streamed weights: what the compute, streaming and epilogue warps of a block do for one GEMM.
 *
 * Bound: bytes of weights from HBM. K is split over the compute warps, each keeps its slices of the activations in registers for
 * the whole operation; all shared memory is ring. A stage is what 16 warps multiply at once: their pages side by side, one bulk
 * copy, one barrier. The warps' partial sums go through two buffers to the epilogue warps, one each, which add them in warp order while
 * the compute warps are at the next tile: they never wait for an epilogue.
 *
 * Contents: which tiles a block has; streaming; compute warps; epilogue warps.
 */
#ifndef US_KERNELS_ENGINE_GEMM_CUH
#define US_KERNELS_ENGINE_GEMM_CUH

#include "formats/bf16.h"
#include "kernels/cpu/exp.h"
#include "kernels/engine/page.cuh"

/* ---- which tiles a block has -------------------------------------------------------------------------------------- */

/* Items of an operation (tile of a part, or of an active expert) go round robin over the blocks from op->shift on: all of
 * DOWN's, the first US_ENGINE_DEALT a block of a product's. A product's others go to whoever asks first, since HBM is not fair to SMs
 * and fixed shares last as long as the slowest: no sum depends on who multiplies a tile. */
static __device__ __forceinline__ uint32_t us_engine_first_item(const struct us_engine_block *b,
                                                                uint32_t shift) {
  uint32_t blocks = b->blocks,
           place = b->index + blocks - (shift - us_engine_quotient(shift, blocks) * blocks);
  return place < blocks ? place : place - blocks;
}

static __device__ __forceinline__ uint32_t us_engine_gemm_items(const struct us_engine_block *b,
                                                                const struct us_engine_gemm *g) {
  return g->w.tiles * (g->experts ? us_engine_shared_of(b)->active.count : g->parts);
}

/* A block's share of a product: items [base, base + count), which `blocks` blocks have together; the first two are dealt out. If the
 * parts of K divide the rank's blocks, a share is a part's tiles, so that a block loads its activations once. The streaming thread asks
 * for the others two tiles ahead, which hides the way to L2, and writes them down for the other roles: shared.item of tile t (of the
 * launch) stands before the last stage of tile t - 2 is full. */
#define US_ENGINE_DEALT 2
struct us_engine_items {
  uint32_t first, second; /* US_ENGINE_NONE: there is none */
  uint32_t base, count, blocks, counter;
};
/* One function for the three roles, which all come to it at every product. */
static __device__ __noinline__ struct us_engine_items us_engine_share(uint32_t tiles, uint32_t parts,
                                                                      uint32_t all, uint32_t shift) {
  const struct us_engine_block *b = us_engine_self();
  struct us_engine_items x = {0, 0, 0, all, b->blocks, 0};
  uint32_t place = us_engine_first_item(b, shift);
  uint32_t share = us_engine_quotient(x.blocks, parts), at = us_engine_quotient(place, parts);
  if (parts > 1 && parts <= US_ENGINE_PARTS && share * parts == x.blocks) { /* experts have one */
    x.counter = place - at * parts, place = at;
    x.base = x.counter * tiles, x.count = tiles, x.blocks = share;
  }
  x.first = place < x.count ? x.base + place : US_ENGINE_NONE;
  x.second = place + x.blocks < x.count ? x.base + place + x.blocks : US_ENGINE_NONE;
  return x;
}
static __device__ __forceinline__ struct us_engine_items us_engine_items(const struct us_engine_block *b,
                                                                         const struct us_engine_gemm *g,
                                                                         uint32_t shift) {
  return us_engine_share(g->w.tiles, g->parts, us_engine_gemm_items(b, g), shift);
}

static __device__ __forceinline__ uint32_t *us_engine_counter(const struct us_engine_block *b, uint32_t op,
                                                              uint32_t counter) {
  return us_engine_rank_of(b)->claimed + op * US_ENGINE_COUNTERS + counter;
}

/* Ask for an item that was not dealt out: its number, or one past the last. The answer is on its way while the thread goes on. */
static __device__ __forceinline__ uint32_t us_engine_claim(const struct us_engine_block *b,
                                                           uint32_t counter) {
  uint32_t number;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(number)
               : "l"(us_engine_counter(b, b->op_index, counter)));
  return number;
}

/* The item that an answer means. Every block asks in vain once; the last to do so leaves the counter as it was. */
static __device__ __forceinline__ uint32_t us_engine_claimed(const struct us_engine_block *b,
                                                             const struct us_engine_items *x,
                                                             uint32_t number) {
  uint32_t item = US_ENGINE_DEALT * x->blocks + number;
  if (item < x->count) return x->base + item;
  if (item == x->count + x->blocks - 1)
    *(volatile uint32_t *)us_engine_counter(b, b->op_index, x->counter) = 0;
  return US_ENGINE_NONE;
}

/* ---- streaming ------------------------------------------------------------------------------------------------------ */

/* A role's place in the ring, in registers while it runs an operation: shared.cuh's fields live in memory. */
struct us_engine_cursor {
  uint32_t stage, phase;
};
/* In four instructions: it is part of every stage. */
static __device__ __forceinline__ void us_engine_advance(struct us_engine_cursor *c) {
  asm volatile("{ .reg .pred last; setp.eq.u32 last, %0, %2; add.u32 %0, %0, 1; @last mov.u32 %0, 0; @last "
               "xor.b32 %1, %1, 1; }"
               : "+r"(c->stage), "+r"(c->phase)
               : "n"(US_ENGINE_STAGES - 1));
}

/* The epilogue's place in the ring, which it helps to fill in DOWN and in dense products of several row tiles: `stages` on. */
static __device__ __forceinline__ void us_engine_skip(struct us_engine_block *b, uint32_t stages) {
  __syncwarp(); /* the lanes share `b` */
  if (threadIdx.x % 32 == 0) {
    uint32_t at = b->stage + stages;
    b->stage = at % US_ENGINE_STAGES, b->phase ^= at / US_ENGINE_STAGES & 1;
  }
  __syncwarp();
}

/* Whether this round's weights are copied: see us_engine_launch.resident. */
static __device__ __forceinline__ bool us_engine_copies(const struct us_engine_block *b) {
  return b->round == 0 || !b->launch->resident;
}

/* One thread that fills a stage alone: wait until it is free, then expect `bytes`. Returns its full barrier, which wants two arrivals, since
 * in DOWN and in dense products of several row tiles two threads fill a stage. */
static __device__ __forceinline__ uint32_t us_engine_take(const struct us_engine_block *b,
                                                          struct us_engine_shared *s,
                                                          struct us_engine_cursor c, uint32_t bytes) {
  us_engine_barrier_wait(b, &s->empty[c.stage], c.phase ^ 1, US_ENGINE_WAIT_FREE);
  uint32_t full = us_shared_address(&s->full[c.stage]);
  us_barrier_more(full, bytes);
  us_barrier_arrive_many(full, US_ENGINE_FILLERS);
  return full;
}

/* All lanes of a warp together: one arrival. */
static __device__ __forceinline__ void us_engine_elected_arrive(uint32_t barrier) {
  asm volatile(
      "{ .reg .pred one; elect.sync _|one, 0xffffffff; @one mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(
          barrier)
      : "memory");
}

/* One warp: it has read the stage. */
static __device__ __forceinline__ void us_engine_release(struct us_engine_shared *s, uint32_t stage) {
  __syncwarp();
  us_engine_elected_arrive(us_shared_address(&s->empty[stage]));
}

/* The active list of the last ROUTE that this role has passed. */
static __device__ __forceinline__ void us_engine_wait_routed(const struct us_engine_block *b) {
  us_engine_barrier_await(us_shared_address(&us_engine_shared_of(b)->routed), (b->routes - 1) & 1,
                          US_ENGINE_WAIT_ROUTE);
}

/* The streamed bytes of an item: one part of a tile, or a tile of an active expert. */
static __device__ __forceinline__ const uint8_t *us_engine_gemm_item(const struct us_engine_gemm *g,
                                                                     const struct us_engine_shared *s,
                                                                     uint32_t item) {
  uint32_t outer = item / g->w.tiles, tile = item % g->w.tiles;
  const uint8_t *from = g->w.pages + (uint64_t)tile * g->w.slices * g->w.page_bytes;
  return from + (g->experts ? s->active.expert[outer] * g->w.matrix_bytes
                            : (uint64_t)outer * g->subs * g->warps * g->w.page_bytes);
}

static __device__ __forceinline__ void us_engine_gemm_stream(struct us_engine_block *b,
                                                             const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t bytes = g->warps * g->w.page_bytes, subs = g->subs,
           shift = op->shift; /* a look at L2: before waiting */
  bool copies = us_engine_copies(b);
  uint64_t policy = us_read_once();
  if (g->experts) us_engine_wait_routed(b);
  struct us_engine_items items = us_engine_items(b, g, shift);
  bool more = items.count > US_ENGINE_DEALT * items.blocks; /* then every block has all that are dealt out */
  uint32_t tile = b->tile;
  for (uint32_t i = items.first, next = items.second, after; i != US_ENGINE_NONE; i = next, next = after) {
    bool asks = more && next != US_ENGINE_NONE;
    if (asks) us_engine_jitter(b);
    uint32_t number = asks ? us_engine_claim(b, items.counter) : 0;
    const uint8_t *from = us_engine_gemm_item(g, s, i);
    for (uint32_t j = 0; j < subs; j++, from += bytes) {
      if (j + 1 == subs) {
        after = asks ? us_engine_claimed(b, &items, number) : US_ENGINE_NONE;
        s->item[(tile++ + US_ENGINE_DEALT) % US_ENGINE_ITEMS] = after;
      }
      uint32_t full = us_engine_take(b, s, c, copies ? bytes : 0);
      if (copies) us_bulk_load_once(us_shared_address(s->ring[c.stage]), from, bytes, full, policy);
      us_engine_advance(&c);
    }
  }
  b->stage = c.stage, b->phase = c.phase, b->tile = tile;
}

/* ---- compute warps -------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ bool us_engine_absent16(uint4 v) {
  return v.x == US_ENGINE_ABSENT || v.y == US_ENGINE_ABSENT || v.z == US_ENGINE_ABSENT ||
         v.w == US_ENGINE_ABSENT;
}

/* One warp: until its first 512 bytes of an operand whose words carry their own flag are there. The others come at about the same time: all
 * of an operand, read again and again by all SMs, would be in the way of who makes it. */
static __device__ __noinline__ void us_engine_await_rows(const uint4 *from) {
  const struct us_engine_block *b = us_engine_self();
  struct us_engine_watch watch = {0, 0};
  uint64_t begin = us_engine_span_begin(b);
  us_engine_jitter(b);
  while (__any_sync(0xffffffffu, us_engine_absent16(us_load_gpu16(from)))) {
    __nanosleep(100);
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, us_engine_fetched_op(b)->wait, 0, 1);
  }
  us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
}

/* Activations of this warp for `part`: slice part * warps * subs + j * warps + warp, all its groups. */
template <int FORMAT, int HALVES, bool WHOLE>
static __device__ __forceinline__ void us_engine_load_rows(const struct us_engine_gemm *g, uint32_t part,
                                                           int warp, int lane, uint4 *rows) {
  constexpr int MOST = us_engine_page_groups<FORMAT, HALVES>::most;
  uint32_t groups = WHOLE ? MOST : g->w.groups, subs = g->subs, step = g->warps * groups * 32;
  const uint4 *operand = (const uint4 *)g->operand + (part * subs * g->warps + warp) * groups * 32 + lane;
  bool awaits = g->awaits, absent;
  if (awaits) us_engine_await_rows(operand);
  do {
    absent = false;
#pragma unroll
    for (int j = 0; j < us_engine_page_groups<FORMAT, HALVES>::subs; j++)
#pragma unroll
      for (int q = 0; q < MOST; q++) {
        rows[j * MOST + q] =
            make_uint4(0, 0, 0, 0); /* a conditional load alone would keep 48 registers busy everywhere */
        if (j < subs && q < groups) rows[j * MOST + q] = us_load_gpu16(operand + j * step + q * 32);
      }
#pragma unroll
    for (int i = 0; i < us_engine_page_groups<FORMAT, HALVES>::subs * MOST; i++)
      absent |= us_engine_absent16(rows[i]);
  } while (awaits && __any_sync(0xffffffffu, absent)); /* soon: the first are there */
}

/* This warp's sums of its next tile to the epilogue. What it needs is found anew here: in registers it would be in the way of the multiplies.
 * Returns the number of tiles that the role has passed. */
template <int HALVES> static __device__ __forceinline__ uint32_t us_engine_hand_sums(const float *acc) {
  struct us_engine_block *b = us_engine_self();
  struct us_engine_shared *s = us_engine_shared_of(b);
  uint32_t tile = b->tile, buffer = tile % 2, use = tile / 2, lane = us_engine_lane();
  us_engine_barrier_wait(b, &s->sums_empty[buffer], (use & 1) ^ 1, US_ENGINE_WAIT_SUMS);
  float4 *mine = (float4 *)s->partial[buffer][us_engine_thread() / 32];
#pragma unroll
  for (int h = 0; h < HALVES; h++)
    mine[h * 32 + lane] = make_float4(acc[4 * h], acc[4 * h + 1], acc[4 * h + 2], acc[4 * h + 3]);
  __syncwarp();
  if (lane == 0)
    b->tile = tile + 1; /* all have read it, and read it again behind the next stage's barrier of the lanes */
  us_engine_elected_arrive(us_shared_address(&s->sums_full[buffer]));
  return tile + 1;
}

/* What a warp needs in every stage: its place in the ring, and where its page of the first stage lies. */
struct us_engine_pages {
  struct us_engine_cursor c;
  struct us_page_at first;
  uint32_t subs, groups;
  bool working;
};
template <int FORMAT, int HALVES>
static __device__ __forceinline__ struct us_engine_pages us_engine_pages(const struct us_engine_block *b,
                                                                         const struct us_engine_gemm *g,
                                                                         int warp, int lane) {
  uint32_t page = us_shared_address(us_engine_shared_of(b)->ring) + warp * g->w.page_bytes;
  struct us_engine_pages p = {{b->stage, b->phase},
                              us_page_at<FORMAT, HALVES>(page, g->w.groups, lane),
                              g->subs,
                              g->w.groups,
                              warp < g->warps};
  us_engine_keep(&p.first.words), us_engine_keep(&p.first.scales);
  return p;
}

/* One stage of a tile. */
template <int FORMAT, int HALVES, bool WHOLE>
static __device__ __forceinline__ void us_engine_gemm_stage(const struct us_engine_block *b,
                                                            struct us_engine_shared *s,
                                                            struct us_engine_pages *p, const uint4 *rows,
                                                            float *acc) {
  constexpr int MOST = us_engine_page_groups<FORMAT, HALVES>::most;
  uint32_t stage = p->c.stage, at = stage * US_ENGINE_STAGE_BYTES;
  us_engine_barrier_wait(b, &s->full[stage], p->c.phase, US_ENGINE_WAIT_STAGE);
  struct us_page_at page = {p->first.words + at, p->first.scales + at};
  if (WHOLE || p->working) us_page_multiply<FORMAT, HALVES>(page, WHOLE ? MOST : p->groups, rows, acc);
  us_engine_release(s, stage);
  us_engine_advance(&p->c);
}

/* One tile: all its stages. F32, whose multiplies are long code for a small matrix, has one copy of them, before which the
 * activations go round. */
template <int FORMAT, int HALVES, bool WHOLE>
static __device__ __forceinline__ void us_engine_gemm_tile(const struct us_engine_block *b,
                                                           struct us_engine_shared *s,
                                                           struct us_engine_pages *p, uint4 *rows,
                                                           float *acc) {
  constexpr int MOST = us_engine_page_groups<FORMAT, HALVES>::most,
                SUBS = us_engine_page_groups<FORMAT, HALVES>::subs;
  if (FORMAT == US_FORMAT_F32) {
#pragma unroll 1
    for (int j = 0; j < SUBS; j++) {
      if (j < p->subs) us_engine_gemm_stage<FORMAT, HALVES, WHOLE>(b, s, p, rows, acc);
      uint4 first = rows[0];
#pragma unroll
      for (int i = 0; i + 1 < SUBS; i++) rows[i] = rows[i + 1];
      rows[SUBS - 1] = first;
    }
  } else {
#pragma unroll
    for (int j = 0; j < SUBS; j++)
      if (j < p->subs) us_engine_gemm_stage<FORMAT, HALVES, WHOLE>(b, s, p, rows + j * MOST, acc);
  }
}

/* Behind a role's last tile of an operation: its place in the ring, for the next one. */
static __device__ __forceinline__ void us_engine_keep_place(struct us_engine_cursor c) {
  struct us_engine_block *b = us_engine_self();
  __syncwarp(); /* the lanes share `b` */
  if (us_engine_lane() == 0) b->stage = c.stage, b->phase = c.phase;
  __syncwarp();
}

/* Where a warp's loop ends: in memory, since registers are short there. */
static __device__ __forceinline__ void us_engine_until(uint32_t end) {
  struct us_engine_block *b = us_engine_self();
  __syncwarp();
  if (us_engine_lane() == 0) b->until = end;
  __syncwarp();
}

/* This block's items, which ascend, part by part, so that a part's activations are loaded once. WHOLE: all warps work, and pages have as many
 * groups as they can, which spares the inner loop its tests. Every register counts: what the loop needs once a tile stays in
 * memory. */
template <int FORMAT, int HALVES, bool WHOLE>
static __device__ __forceinline__ void us_engine_gemm_tiles(struct us_engine_block *b,
                                                            const struct us_engine_op *op, uint32_t i,
                                                            uint32_t next) {
  const struct us_engine_gemm *g = &op->gemm;
  struct us_engine_shared *s = us_engine_shared_of(b);
  int warp = us_engine_thread() / 32, lane = us_engine_lane();
  struct us_engine_pages p = us_engine_pages<FORMAT, HALVES>(b, g, warp, lane);
  while (i != US_ENGINE_NONE) {
    uint32_t part = g->experts ? 0 : i / g->w.tiles;
    uint4 rows[US_ENGINE_GROUPS];
    us_engine_until(g->experts ? US_ENGINE_NONE : (part + 1) * g->w.tiles);
    us_engine_load_rows<FORMAT, HALVES, WHOLE>(g, part, p.working ? warp : 0, lane, rows);
    do {
      float acc[4 * HALVES] = {};
      us_engine_gemm_tile<FORMAT, HALVES, WHOLE>(b, s, &p, rows, acc);
      uint32_t passed = us_engine_hand_sums<HALVES>(acc);
      i = next, next = s->item[(passed + 1) % US_ENGINE_ITEMS];
    } while (i < *(volatile uint32_t *)&us_engine_self()->until);
  }
  us_engine_keep_place(p.c);
}

namespace us_rare {
template <int FORMAT, int HALVES, bool WHOLE>
static __device__ __noinline__ void gemm_tiles(uint32_t i, uint32_t next) {
  struct us_engine_block *b = us_engine_self();
  us_engine_gemm_tiles<FORMAT, HALVES, WHOLE>(b, us_engine_fetched_op(b), i, next);
}
} // namespace us_rare

/* OFTEN: in every layer of a model as it is published, so in the kernel itself; what is not lies apart (shared.cuh, us_rare). */
template <int FORMAT, int HALVES, bool OFTEN>
static __device__ __forceinline__ void us_engine_gemm_pages(struct us_engine_block *b,
                                                            const struct us_engine_op *op, uint32_t i,
                                                            uint32_t next) {
  if (op->gemm.w.groups != us_engine_page_groups<FORMAT, HALVES>::most ||
      op->gemm.warps != US_ENGINE_COMPUTE_WARPS)
    us_rare::gemm_tiles<FORMAT, HALVES, false>(i, next);
  else if (!OFTEN)
    us_rare::gemm_tiles<FORMAT, HALVES, true>(i, next);
  else
    us_engine_gemm_tiles<FORMAT, HALVES, true>(b, op, i, next);
}

/* What is known before the wait passes it in shared memory, what is told apart is so at once: see us_engine_thread. */
static __device__ __forceinline__ void us_engine_gemm_compute(struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  struct us_engine_items items = us_engine_items(b, &op->gemm, op->shift);
  b->items[0] = items.first, b->items[1] = items.second;
  if (op->gemm.awaits)
    us_engine_meet();
  else
    us_engine_wait_done(b, op->wait);
  op = us_engine_fetched_op(b);
  uint32_t first = *(volatile uint32_t *)&b->items[0], second = *(volatile uint32_t *)&b->items[1];
  switch (op->gemm.w.format * 2 + op->gemm.w.halves - 1) {
  case US_FORMAT_MXFP4 * 2 + 1:
    us_engine_gemm_pages<US_FORMAT_MXFP4, 2, true>(b, op, first, second);
    break;
  case US_FORMAT_MXFP4 * 2:
    us_engine_gemm_pages<US_FORMAT_MXFP4, 1, false>(b, op, first, second);
    break;
  case US_FORMAT_FP8 * 2 + 1:
    us_engine_gemm_pages<US_FORMAT_FP8, 2, false>(b, op, first, second);
    break;
  case US_FORMAT_FP8 * 2:
    us_engine_gemm_pages<US_FORMAT_FP8, 1, true>(b, op, first, second);
    break;
  case US_FORMAT_BF16 * 2 + 1:
    us_engine_gemm_pages<US_FORMAT_BF16, 2, false>(b, op, first, second);
    break;
  case US_FORMAT_BF16 * 2:
    us_engine_gemm_pages<US_FORMAT_BF16, 1, false>(b, op, first, second);
    break;
  case US_FORMAT_F32 * 2:
    us_engine_gemm_pages<US_FORMAT_F32, 1, true>(b, op, first, second);
    break;
  }
}

/* ---- epilogue warps --------------------------------------------------------------------------------------------------- */

/* The four sums of a lane, in the order of the warps: rows r, r + 8 of the half, tokens 2t, 2t + 1 (r = lane / 4, t = lane % 4). Warps that
 * do not work have handed in zeros, which change no sum that began with +0, so all are added. */
static __device__ __forceinline__ float4 us_engine_add_warps(const struct us_engine_block *b, uint32_t buffer,
                                                             uint32_t half, int lane) {
  float4 sum = make_float4(0, 0, 0, 0);
  const float4 *from = (const float4 *)us_engine_shared_of(b)->partial[buffer][0] + half * 32 + lane;
#pragma unroll 4
  for (uint32_t w = 0; w < US_ENGINE_COMPUTE_WARPS; w++) {
    float4 v = from[w * (US_ENGINE_PARTIAL / 4)];
    sum.x = __fadd_rn(sum.x, v.x), sum.y = __fadd_rn(sum.y, v.y);
    sum.z = __fadd_rn(sum.z, v.z), sum.w = __fadd_rn(sum.w, v.w);
  }
  return sum;
}

static __device__ __forceinline__ uint32_t us_present(float x) { /* never the mark of absence */
  uint32_t bits = __float_as_uint(x);
  return bits == US_ENGINE_ABSENT ? 0x7fffffffu : bits;
}

/* 16 columns x 8 tokens of a partial sum to every rank's exchange; the lanes of a warp. */
static __device__ __forceinline__ void us_engine_push(const struct us_engine_block *b, uint32_t exchange,
                                                      uint32_t addend, uint32_t column, int lane, float4 v) {
  const struct us_engine_rank *rank = us_engine_rank_of(b);
  const struct us_engine_launch *launch = us_engine_launch_of(b);
  uint32_t running = launch->exchanges + b->round * launch->exchanges_a_round + exchange;
  uint32_t slot = running & (rank->slots - 1);
  uint32_t at = (slot * rank->addends + addend) * (8 * rank->D) + column * 8 + lane * 4;
  uint4 bits = make_uint4(us_present(v.x), us_present(v.y), us_present(v.z), us_present(v.w));
  uint32_t ranks = rank->ranks, to = rank->rank;
#pragma unroll 1
  for (uint32_t i = 0; i < ranks; i++) { /* the farthest first, its own last */
    to = to + 1 == ranks ? 0 : to + 1;
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(rank->exchange[to] + at),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  }
}

/* A bf16 times a power of two that is not too small is its own upper half, and so is the one NaN that a multiply makes. */
static __device__ __forceinline__ uint16_t us_engine_operand_bits(float x) {
  return (uint16_t)(us_f32_bits(us_bf16_round(x) * US_ENGINE_OPERAND_UNIT) >> 16);
}

static __device__ __forceinline__ float us_engine_swiglu(float gate, float up) {
  return gate / (1.0f + us_expf(-gate)) * up;
}

/* Where column c of a token lies in a pair. */
static __device__ __forceinline__ uint32_t us_engine_pair_offset(uint32_t column) {
  uint32_t c = column % 32;
  return column / 32 * 64 + c % 8 / 2 * 16 + (c / 16 * 2 + c / 8 % 2) * 4 + c % 2 * 2;
}

/* A tile's place in its operation, and where this lane writes: rows `row` and `row` + 8 of a half, tokens `token` and + 1. */
struct us_engine_place {
  uint32_t outer, tile, row, token;
};
static __device__ __forceinline__ struct us_engine_place us_engine_place(const struct us_engine_gemm *g,
                                                                         uint32_t item, int lane) {
  uint32_t outer = us_engine_quotient(item, g->w.tiles);
  return {outer, item - outer * g->w.tiles, (uint32_t)lane / 4, (uint32_t)lane % 4 * 2};
}

/* out: g->out, of the row tile. */
static __device__ __forceinline__ void us_engine_store(const struct us_engine_gemm *g, void *out,
                                                       struct us_engine_place at, uint32_t row, float4 v) {
  float *to = (float *)out + ((at.outer * 8 + at.token) * g->out_stride + row), *next = to + g->out_stride;
  uint32_t bits[4] = {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
  if (g->flagged)
    bits[0] = us_present(v.x), bits[1] = us_present(v.y), bits[2] = us_present(v.z),
    bits[3] = us_present(v.w);
  if (row < g->valid) us_store_gpu4(to, bits[0]), us_store_gpu4(next, bits[1]);
  if (row + 8 < g->valid) us_store_gpu4(to + 8, bits[2]), us_store_gpu4(next + 8, bits[3]);
}

/* Gate and up sums to inner activations of an operand: two rows of two tokens. Eight rows on is 4 bytes on. */
static __device__ __forceinline__ void us_engine_gate(uint8_t *out, struct us_engine_place at, float4 gate,
                                                      float4 up) {
  uint32_t row = at.tile * 16 + at.row, to = us_engine_operand_offset(at.token, row),
           other = us_engine_operand_offset(at.token + 1, row);
#pragma unroll 1 /* small code: it runs beside the multiplies and shares their instruction cache */
  for (int i = 0; i < 4; i++) {
    *(uint16_t *)(out + to) = us_engine_operand_bits(us_engine_swiglu(gate.x, up.x));
    uint32_t below = to + 4;
    to = other, other = below;
    gate.x = gate.y, gate.y = gate.z, gate.z = gate.w;
    up.x = up.y, up.y = up.z, up.z = up.w;
  }
}

/* Where (row, token) of a half lies among a warp's partial sums, as us_engine_hand_sums stores them: in floats. */
static __device__ __forceinline__ uint32_t us_engine_partial_at(uint32_t row, uint32_t token) {
  return (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
}

/* The same of an expert's tile for its pairs alone, which are one of eight tokens or little more: gate of a row in the first sixteen lanes,
 * up in the others, a pair after the other. Sums as us_engine_add_warps makes them. `pair`: that of token `lane` of the first eight, or -1. */
static __device__ __forceinline__ void us_engine_gate_pairs(const struct us_engine_block *b,
                                                            const struct us_engine_gemm *g, uint32_t tile,
                                                            uint32_t buffer, int pair, int lane) {
  const float *from = us_engine_shared_of(b)->partial[buffer][0] + lane / 16 * 128;
  uint32_t row = lane % 16;
  uint8_t *out = (uint8_t *)g->out + us_engine_pair_offset(tile * 16 + row);
  float undo = us_engine_undo(g->w.format);
  uint32_t bytes = us_engine_pair_bytes(g->F), tokens = __ballot_sync(0xffffffffu, lane < 8 && pair >= 0);
#pragma unroll 1
  for (; tokens; tokens &= tokens - 1) {
    uint32_t token = __ffs(tokens) - 1;
    const float *mine = from + us_engine_partial_at(row, token);
    float sum = 0;
#pragma unroll
    for (uint32_t w = 0; w < US_ENGINE_COMPUTE_WARPS; w++) sum = __fadd_rn(sum, mine[w * US_ENGINE_PARTIAL]);
    sum *= undo;
    float up = __shfl_down_sync(0xffffffffu, sum, 16);
    uint16_t inner = us_engine_operand_bits(us_engine_swiglu(sum, up));
    uint8_t *to = out + (uint32_t)__shfl_sync(0xffffffffu, pair, token) * bytes;
    if (lane < 16) *(uint16_t *)to = inner;
  }
}

static __device__ __forceinline__ float4 us_engine_times(float4 v, float s) {
  return make_float4(v.x * s, v.y * s, v.z * s, v.w * s);
}

/* A tile of a product that is not an expert's. */
static __device__ __forceinline__ void us_engine_gemm_tile_out(const struct us_engine_block *b,
                                                               const struct us_engine_gemm *g,
                                                               struct us_engine_place at, uint32_t buffer,
                                                               int lane) {
  float undo = us_engine_undo(g->w.format);
  uint32_t halves = g->w.halves, epilogue = g->epilogue;
  float4 before = make_float4(0, 0, 0, 0), v = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (uint32_t h = 0; h < halves; h++) {
    before = v, v = us_engine_times(us_engine_add_warps(b, buffer, h, lane), undo);
    uint32_t row = (at.tile * halves + h) * 16;
    if (epilogue == US_ENGINE_PUSH)
      us_engine_push(b, g->exchange, g->gather ? at.outer : us_engine_rank_of(b)->rank * g->parts + at.outer,
                     g->first + row, lane, v);
    else if (epilogue == US_ENGINE_STORE)
      us_engine_store(g, g->out, at, row + at.row, v);
  }
  if (epilogue == US_ENGINE_SWIGLU) us_engine_gate((uint8_t *)g->out, at, before, v);
}

/* Experts of the list that DOWN begins with before all are multiplied: the hand-off hides behind the last ones. */
static __device__ __forceinline__ uint32_t us_engine_early(const struct us_engine_shared *s) {
  uint32_t count = s->active.count;
  return count - (count + 7) / 8;
}
/* An epilogue warp: its tiles of these are written. */
static __device__ __forceinline__ void us_engine_tell_early(const struct us_engine_block *b, int lane) {
  __syncwarp();
  if (lane == 0) us_engine_tell(us_engine_counter(b, b->op_index, US_ENGINE_EARLY));
}

/* The epilogue warps: the block's tiles of the product, which end before tile `end` of the launch, are out. */
static __device__ __forceinline__ void us_engine_epilogue_end(struct us_engine_block *b,
                                                              const struct us_engine_gemm *g, uint32_t end) {
  us_engine_skip(b, (end - b->tile) * g->subs);
  b->tile = end;
  us_engine_epilogues_meet();
  if (threadIdx.x == US_ENGINE_EPILOGUE) us_engine_tell(us_engine_rank_of(b)->done + b->op_index);
}

static __device__ __forceinline__ void us_engine_gemm_epilogue(struct us_engine_block *b,
                                                               const struct us_engine_op *op) {
  const struct us_engine_gemm *g = &op->gemm;
  struct us_engine_shared *s = us_engine_shared_of(b);
  int lane = threadIdx.x % 32;
  uint32_t mine = threadIdx.x / 32 % 2; /* the buffer of this warp, and of every other tile */
  uint32_t full = us_shared_address(&s->sums_full[mine]), empty = us_shared_address(&s->sums_empty[mine]);
  if (g->experts) us_engine_wait_routed(b);
  struct us_engine_items items = us_engine_items(b, g, op->shift);
  bool even = b->tile % 2 == mine; /* takes the first */
  uint32_t tile = b->tile + !even, i = even ? items.first : items.second,
           end = b->tile +
                 (items.first != US_ENGINE_NONE);   /* behind the last tile, as far as this warp knows */
  uint32_t early = us_engine_early(s) * g->w.tiles; /* the first item that DOWN's beginning does not need */
  for (bool told = !g->experts;;) {
    if (!told && i >= early) us_engine_tell_early(b, lane), told = true;
    if (i == US_ENGINE_NONE) break;
    struct us_engine_place at = us_engine_place(g, i, lane);
    int pair = g->experts ? s->active.pair[at.outer][lane % 8] : -1;
    us_engine_barrier_await(full, tile / 2 & 1, US_ENGINE_WAIT_SUMS);
    if (g->experts)
      us_engine_gate_pairs(b, g, at.tile, mine, pair, lane);
    else
      us_engine_gemm_tile_out(b, g, at, mine, lane);
    uint32_t after = tile == b->tile ? items.second : s->item[(tile + 1) % US_ENGINE_ITEMS];
    end = tile + (after != US_ENGINE_NONE ? 2 : 1), tile += 2;
    i = s->item[tile % US_ENGINE_ITEMS];
    __syncwarp();
    if (lane == 0) us_barrier_arrive(empty);
  }
  us_engine_epilogue_end(b, g, end);
}

#endif
