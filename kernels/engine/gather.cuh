/* gather.cuh: the experts of several row tiles: chosen row tile by row tile, listed together, gate and up streamed once for all of them.
 *
 *     us_engine_route(b, op);                 // compute warps: ROUTE of any number of row tiles
 *     us_engine_gather_stream(b, op);         // gate and up of several: the streaming thread,
 *     us_engine_gather_compute(b, op);        // the compute warps,
 *     us_engine_gather_epilogue(b, op);       // the epilogue warps
 *
 * Bound: bytes of weights from HBM: 64 rows x 8 choose 284 of 384 experts, where 8 row tiles after one another stream 477. A slot
 * of the list is up to 8 rows of one expert: the 8 columns of the tensor core. An expert with more rows has more slots and is streamed
 * again, still no more often than once a row tile. Slots ascend by expert and rows, so a row's sum has the order that it has alone.
 *
 * Choosing is a row tile's business: block t chooses for row tile t and publishes {expert, routing weight} a row and choice, 8 bytes that
 * carry their own flag. Every block reads all of them, one a thread, and makes the list: a bit mask of rows an expert, two sums.
 *
 * A block has consecutive tiles of consecutive slots, so that a compute warp loads a slot's activations, gathered from its rows' operands,
 * two or three times an operation into the registers where those of a row tile would lie.
 *
 * Contents: choices; the list; gate and up.
 */
#ifndef US_KERNELS_ENGINE_GATHER_CUH
#define US_KERNELS_ENGINE_GATHER_CUH

#include "kernels/engine/route.cuh"

/* ---- choices ------------------------------------------------------------------------------------------------------ */

#define US_GATHER_NOBODY 0xffffu /* an expert: the row does not exist, or has fewer choices */
static_assert(US_ENGINE_SLOTS == US_ENGINE_COMPUTE, "one thread a choice");

static __device__ __forceinline__ uint32_t us_gather_running(const struct us_engine_block *b,
                                                             const struct us_engine_route *r) {
  uint32_t running = b->launch->exchanges + b->round * b->launch->exchanges_a_round + r->exchange;
  return (running + 1) & 0xffffu;
}

/* Everything about a row tile that does not depend on its logits. */
static __device__ __forceinline__ void us_gather_prepare(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_route_work *work, uint32_t tile) {
  us_route_rows(b, op, tile);
  us_route_keys(b, op, work);
}

/* One warp a row: its choices to all blocks, and to who observes. */
static __device__ __forceinline__ void us_gather_publish(const struct us_engine_block *b,
                                                         const struct us_engine_route *r,
                                                         const struct us_route_work *work, uint32_t tile,
                                                         uint32_t token, uint32_t lane) {
  uint32_t row = tile * US_ENGINE_ROWS + token, id = US_GATHER_NOBODY, weight = 0;
  if (lane == 0) us_engine_jitter(b);
  __syncwarp();
  if (lane >= US_ENGINE_MAX_TOPK) return;
  if (us_engine_shared_of(b)->rows.exists[token] && lane < r->top_k) {
    id = work->id[token][lane], weight = __float_as_uint(us_route_weight(work, r, token, lane));
    if (r->opt_routed) r->opt_routed[row * r->top_k + lane] = id;
  }
  us_store_flagged(r->choices + row * US_ENGINE_MAX_TOPK + lane,
                   (uint64_t)(id << 16 | us_gather_running(b, r)) << 32 | weight);
}

/* All threads have met since us_gather_prepare. */
static __device__ __forceinline__ void us_gather_choose(const struct us_engine_block *b,
                                                        const struct us_engine_route *r,
                                                        struct us_route_work *work, uint32_t tile) {
  uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32;
  us_route_gather(work, r, r->logits + tile * r->logits_tile);
  us_route_score(work, r);
  if (token < US_ENGINE_ROWS && us_engine_shared_of(b)->rows.exists[token])
    us_route_choose(work, r, token, lane);
  if (token < US_ENGINE_ROWS) us_gather_publish(b, r, work, tile, token, lane);
}

/* This thread's choice, of all row tiles' in order of rows; nobody's beyond them. */
static __device__ __forceinline__ uint64_t us_gather_read(const struct us_engine_block *b,
                                                          const struct us_engine_op *op) {
  const struct us_engine_route *r = &op->route;
  uint32_t running = us_gather_running(b, r);
  uint64_t word = (uint64_t)US_GATHER_NOBODY << 48;
  if (threadIdx.x >= op->row_tiles * US_ENGINE_ACTIVE) return word;
  struct us_engine_watch watch = {0, 0};
  while (((word = us_load_flagged(r->choices + threadIdx.x)) >> 32 & 0xffffu) != running)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_ROUTE, threadIdx.x, word >> 32 & 0xffffu, running);
  return word;
}

/* ---- the list ----------------------------------------------------------------------------------------------------- */

/* A thread an expert: its slots. */
static __device__ __forceinline__ void us_gather_slots(struct us_engine_active *active,
                                                       struct us_route_work *work) {
  uint32_t e = threadIdx.x, pairs = __popc(work->rows[e][0]) + __popc(work->rows[e][1]), total;
  uint32_t slots = (pairs + US_ENGINE_ROWS - 1) / US_ENGINE_ROWS;
  uint32_t before = us_route_before(work, pairs | slots << 16, &total);
  uint32_t first = before & 0xffffu;
  work->first[e] = first;
  for (uint32_t i = 0; i < slots; i++, first += US_ENGINE_ROWS, pairs -= US_ENGINE_ROWS)
    active->brief[(before >> 16) + i] =
        us_engine_brief(e, first, pairs < US_ENGINE_ROWS ? pairs : US_ENGINE_ROWS);
  if (e == 0) active->count = total >> 16;
}

/* The list of all row tiles' choices; the masks are zero, all threads have met since. */
static __device__ __forceinline__ void us_gather_list(const struct us_engine_block *b,
                                                      const struct us_engine_op *op,
                                                      struct us_route_work *work) {
  struct us_engine_active *active = &us_engine_shared_of(b)->active;
  uint64_t word = us_gather_read(b, op);
  uint32_t e = (uint32_t)(word >> 48), row = threadIdx.x / US_ENGINE_MAX_TOPK, half = row / 32;
  bool chosen = e != US_GATHER_NOBODY;
  if (chosen) atomicOr(&work->rows[e][half], 1u << row % 32);
  us_engine_meet();
  us_gather_slots(active, work);
  us_engine_meet();
  if (chosen) {
    uint32_t below = __popc(work->rows[e][half] & ((1u << row % 32) - 1));
    uint32_t number = work->first[e] + below + (half ? __popc(work->rows[e][0]) : 0);
    active->pair_weight[number] = __uint_as_float((uint32_t)word);
    active->row[number] = (uint8_t)row;
  }
  us_engine_meet();
}

static __device__ __noinline__ void us_engine_gather_build(struct us_engine_block *b,
                                                           const struct us_engine_op *op) {
  struct us_route_work *work = (struct us_route_work *)us_engine_scratch(b);
  us_engine_barrier_wait(b, &us_engine_shared_of(b)->listed, (b->routes - 1) & 1, US_ENGINE_WAIT_ROUTE);
  us_engine_drain(b);
  work->rows[threadIdx.x][0] = work->rows[threadIdx.x][1] = 0;
  if (b->index < op->row_tiles) us_gather_prepare(b, op, work, b->index);
  us_engine_wait_done(b, op->wait);
  for (uint32_t tile = b->index; tile < op->row_tiles; tile += b->blocks) {
    if (tile != b->index) { /* fewer blocks than row tiles */
      us_engine_meet();
      us_gather_prepare(b, op, work, tile);
      us_engine_meet();
    }
    us_gather_choose(b, &op->route, work, tile);
  }
  us_gather_list(b, op, work);
}

/* The list that a ROUTE operation makes, which is the compute warps' (us_engine_fetched_op). */
static __device__ __forceinline__ void us_engine_route_list(struct us_engine_block *b,
                                                            const struct us_engine_op *op) {
  if (US_ENGINE_SEVERAL && op->row_tiles > 1)
    us_engine_gather_build(b, op);
  else
    us_engine_route_build();
}

static __device__ void us_engine_route(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_route_list(b, op);
  if (threadIdx.x == 0) {
    us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->routed));
    if (b->index == 0) { /* without waiting for the sums */
      atomicAdd((unsigned long long *)&b->rank->state->experts, us_engine_shared_of(b)->active.count);
      atomicAdd((unsigned long long *)&b->rank->state->expert_layers, 1ull);
    }
  }
  us_engine_finish(b);
}

/* ---- gate and up -------------------------------------------------------------------------------------------------- */

/* Items (slot, tile) of a block: [begin, end). */
struct us_gather_share {
  uint32_t begin, end;
};
static __device__ __forceinline__ struct us_gather_share us_gather_share(const struct us_engine_block *b,
                                                                         const struct us_engine_gemm *g) {
  uint32_t items = us_engine_shared_of(b)->active.count * g->w.tiles;
  struct us_gather_share share = {items * b->index / b->blocks, items * (b->index + 1) / b->blocks};
  return share;
}

static __device__ __forceinline__ void us_engine_gather_stream(struct us_engine_block *b,
                                                               const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t bytes = g->warps * g->w.page_bytes;
  bool copies = us_engine_copies(b);
  uint64_t policy = us_read_once();
  us_engine_wait_routed(b);
  struct us_gather_share share = us_gather_share(b, g);
  for (uint32_t i = share.begin; i < share.end; i++) {
    uint32_t slot = i / g->w.tiles, tile = i - slot * g->w.tiles;
    const uint8_t *from = g->w.pages + us_engine_brief_expert(s->active.brief[slot]) * g->w.matrix_bytes +
                          (uint64_t)tile * g->w.slices * g->w.page_bytes;
    for (uint32_t j = 0; j < g->subs; j++, from += bytes) {
      uint32_t full = us_engine_take(b, s, c, copies ? bytes : 0);
      if (copies) us_bulk_load_once(us_shared_address(s->ring[c.stage]), from, bytes, full, policy);
      us_engine_advance(&c);
    }
  }
  b->stage = c.stage, b->phase = c.phase, b->tile += share.end - share.begin;
}

/* This warp's columns of the slot's rows: what us_engine_load_rows gives for a row tile. */
static __device__ __forceinline__ void us_gather_load_rows(const struct us_engine_block *b,
                                                           const struct us_engine_gemm *g, uint32_t slot,
                                                           int warp, int lane, uint4 *rows) {
  constexpr int MOST = us_engine_page_groups<US_FORMAT_MXFP4, 2>::most;
  const struct us_engine_active *active = &us_engine_shared_of(b)->active;
  uint32_t brief = active->brief[slot], column = lane / 4, groups = g->w.groups, subs = g->subs;
  bool exists = column < us_engine_brief_pairs(brief);
  uint32_t row = active->row[us_engine_brief_first(brief) + (exists ? column : 0)],
           step = g->warps * groups * 32;
  const uint4 *operand =
      (const uint4 *)((const uint8_t *)g->operand + row / US_ENGINE_ROWS * g->operand_tile) +
      warp * groups * 32 + row % US_ENGINE_ROWS * 4 + lane % 4;
#pragma unroll
  for (int j = 0; j < us_engine_page_groups<US_FORMAT_MXFP4, 2>::subs; j++)
#pragma unroll
    for (int q = 0; q < MOST; q++) {
      rows[j * MOST + q] = make_uint4(0, 0, 0, 0);
      if (exists && j < subs && q < groups) rows[j * MOST + q] = __ldcg(operand + j * step + q * 32);
    }
}

template <bool WHOLE>
static __device__ __forceinline__ void us_gather_tiles(struct us_engine_block *b,
                                                       const struct us_engine_op *op) {
  const struct us_engine_gemm *g = &op->gemm;
  struct us_engine_shared *s = us_engine_shared_of(b);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  struct us_engine_pages p = us_engine_pages<US_FORMAT_MXFP4, 2>(b, g, warp, lane);
  struct us_gather_share share = us_gather_share(b, g);
  for (uint32_t i = share.begin, end; i < share.end; i = end) {
    uint32_t slot = i / g->w.tiles;
    end = (slot + 1) * g->w.tiles < share.end ? (slot + 1) * g->w.tiles : share.end;
    uint4 rows[US_ENGINE_GROUPS];
    us_gather_load_rows(b, g, slot, p.working ? warp : 0, lane, rows);
    us_engine_until(b->tile + end - i);
    uint32_t passed;
    do {
      float acc[8] = {};
      us_engine_gemm_tile<US_FORMAT_MXFP4, 2, WHOLE>(b, s, &p, rows, acc);
      passed = us_engine_hand_sums<2>(acc);
    } while (passed != *(volatile uint32_t *)&us_engine_self()->until);
  }
  us_engine_keep_place(p.c);
}

namespace us_rare {
static __device__ __noinline__ void gather_tiles(void) {
  struct us_engine_block *b = us_engine_self();
  us_gather_tiles<false>(b, us_engine_fetched_op(b));
}
} // namespace us_rare

static __device__ __forceinline__ void us_engine_gather_compute(struct us_engine_block *b,
                                                                const struct us_engine_op *op) {
  us_engine_wait_done(b, op->wait);
  if (op->gemm.w.groups == us_engine_page_groups<US_FORMAT_MXFP4, 2>::most &&
      op->gemm.warps == US_ENGINE_COMPUTE_WARPS)
    us_gather_tiles<true>(b, op);
  else
    us_rare::gather_tiles();
}

static __device__ __forceinline__ void us_engine_gather_epilogue(struct us_engine_block *b,
                                                                 const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  int lane = threadIdx.x % 32;
  uint32_t tile = b->tile, mine = threadIdx.x / 32 % 2;
  us_engine_wait_routed(b);
  struct us_gather_share share = us_gather_share(b, g);
  for (uint32_t i = share.begin; i < share.end; i++, tile++) {
    if (tile % 2 != mine) continue;
    uint32_t slot = i / g->w.tiles, brief = s->active.brief[slot];
    int pair = lane < (int)us_engine_brief_pairs(brief) ? (int)us_engine_brief_first(brief) + lane : -1;
    us_engine_barrier_wait(b, &s->sums_full[mine], tile / 2 & 1, US_ENGINE_WAIT_SUMS);
    us_engine_gate_pairs(b, g, i - slot * g->w.tiles, mine, pair, lane);
    __syncwarp();
    if (lane == 0) us_barrier_arrive(us_shared_address(&s->sums_empty[mine]));
  }
  us_engine_epilogue_end(b, g, tile);
}

#endif
