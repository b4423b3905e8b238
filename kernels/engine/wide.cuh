/* wide.cuh: a dense product of several row tiles: its weights are streamed once, and multiplied with every row tile while they lie in
 * the ring.
 *
 *     us_engine_wide_stream(b, op);        // the streaming thread: weights
 *     us_engine_wide_rows(b, op);          // an epilogue warp: activations
 *     us_engine_wide_compute(b, op);       // the compute warps: everything else
 *
 * Bound: L2. Activations of 64 rows and K 6144 are 786 KB: neither registers nor shared memory hold them, so they come through the ring
 * beside the weights, 16 KB a slice of K, and are shared by as many tiles as a block has at once, up to 8: with 3.2 tiles a block (qkv on
 * four ranks) 2.5 bytes of activations come from L2 for each of weights from HBM; 8 row tiles one after the other read 8 of weights.
 *
 * A stage is one slice: its activations of all row tiles, then the slice's page of each tile. A warp has one row tile and every second of
 * the tiles (of fewer row tiles, fewer of them), and goes through all of K: in the order in which a row tile alone is summed, the
 * slices of warp 0, of warp 1, ... each from zero, then their sums in order. So the bits are those of gemm.cuh. Sums end in the registers
 * of one warp, which stores them: no epilogue.
 */
#ifndef US_KERNELS_ENGINE_WIDE_CUH
#define US_KERNELS_ENGINE_WIDE_CUH

#include "kernels/engine/gemm.cuh"

#define US_WIDE_SUMS 4 /* tiles of a warp at once, at most; of two halves 2 */

/* A block's share of (part, tile), in panels of tiles of one part that are multiplied together. */
struct us_wide_walk {
  uint32_t at, end;
};
struct us_wide_panel {
  uint32_t part, tile, count;
};
static __device__ __forceinline__ struct us_wide_walk us_wide_begin(const struct us_engine_block *b,
                                                                    const struct us_engine_gemm *g) {
  uint32_t items = g->parts * g->w.tiles;
  struct us_wide_walk walk = {items * b->index / b->blocks, items * (b->index + 1) / b->blocks};
  return walk;
}
/* The next panel; false: there is none. Panels of a part are as equal as they can be. */
static __device__ __forceinline__ bool us_wide_next(const struct us_engine_gemm *g, struct us_wide_walk *walk,
                                                    struct us_wide_panel *panel) {
  if (walk->at >= walk->end) return false;
  uint32_t most = 2 * US_WIDE_SUMS / g->w.halves, part = walk->at / g->w.tiles;
  uint32_t tile = walk->at - part * g->w.tiles, left = walk->end - walk->at;
  if (left > g->w.tiles - tile) left = g->w.tiles - tile;
  uint32_t panels = (left + most - 1) / most;
  panel->part = part, panel->tile = tile, panel->count = (left + panels - 1) / panels;
  walk->at += panel->count;
  return true;
}

/* Bytes of a row tile's activations in a stage. */
static __device__ __forceinline__ uint32_t us_wide_rows_bytes(const struct us_engine_gemm *g) {
  return g->w.groups * 512u;
}

/* ---- streaming ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void us_engine_wide_stream(struct us_engine_block *b,
                                                             const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  uint32_t bytes = g->w.page_bytes, warps = g->warps, subs = g->subs,
           skip = op->row_tiles * us_wide_rows_bytes(g);
  size_t tile_bytes = (size_t)g->w.slices * bytes;
  bool copies = us_engine_copies(b);
  uint64_t policy = us_read_once();
  while (us_wide_next(g, &walk, &panel)) {
    const uint8_t *first = g->w.pages + panel.tile * tile_bytes + (size_t)panel.part * subs * warps * bytes;
    for (uint32_t w = 0; w < warps; w++)
      for (uint32_t j = 0; j < subs; j++) {
        const uint8_t *from = first + (size_t)(j * warps + w) * bytes;
        us_engine_barrier_wait(b, &s->empty[c.stage], c.phase ^ 1, US_ENGINE_WAIT_FREE);
        uint32_t full = us_shared_address(&s->full[c.stage]), to = us_shared_address(s->ring[c.stage]) + skip;
        us_barrier_expect(full, copies ? panel.count * bytes : 0);
        for (uint32_t m = 0; copies && m < panel.count; m++, from += tile_bytes, to += bytes)
          us_bulk_load_once(to, from, bytes, full, policy);
        us_engine_advance(&c);
      }
  }
  b->stage = c.stage, b->phase = c.phase;
}

/* One warp of the epilogue: a lane a row tile. */
static __device__ __forceinline__ void us_engine_wide_rows(struct us_engine_block *b,
                                                           const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  uint32_t lane = threadIdx.x % 32, tiles = op->row_tiles, bytes = us_wide_rows_bytes(g), warps = g->warps;
  const uint8_t *mine = (const uint8_t *)g->operand + (lane < tiles ? lane : 0) * g->operand_tile;
  if (lane == 0 && op->wait != US_ENGINE_NONE) us_engine_poll_done(b, op->wait);
  __syncwarp();
  asm volatile("fence.proxy.async;" ::: "memory");
  while (us_wide_next(g, &walk, &panel))
    for (uint32_t w = 0; w < warps; w++)
      for (uint32_t j = 0; j < g->subs; j++) {
        uint32_t slice = (panel.part * g->subs + j) * warps + w;
        us_engine_barrier_wait(b, &s->empty[c.stage], c.phase ^ 1, US_ENGINE_WAIT_FREE);
        uint32_t full = us_shared_address(&s->full[c.stage]);
        if (lane == 0) us_barrier_expect(full, tiles * bytes);
        __syncwarp();
        if (lane < tiles)
          us_bulk_load(us_shared_address(s->ring[c.stage]) + lane * bytes, mine + (size_t)slice * bytes,
                       bytes, full);
        us_engine_advance(&c);
      }
  __syncwarp();
  if (lane == 0) b->stage = c.stage, b->phase = c.phase;
  __syncwarp();
}

/* ---- compute warps ------------------------------------------------------------------------------------------------ */

/* Which row tile a warp has, and which of a panel's tiles: first, first + step, ... */
struct us_wide_lot {
  uint32_t rows, first, step;
  bool working;
};
static __device__ __forceinline__ struct us_wide_lot us_wide_lot(uint32_t row_tiles) {
  uint32_t warp = threadIdx.x / 32, step = US_ENGINE_COMPUTE_WARPS / row_tiles;
  struct us_wide_lot lot = {warp % row_tiles, warp / row_tiles, step, warp / row_tiles < step};
  return lot;
}

/* One stage: acc[k] += page of the warp's k-th tile x its row tile. */
template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_wide_multiply(const uint8_t *stage, const struct us_engine_gemm *g,
                                                        struct us_wide_lot lot, uint32_t row_tiles,
                                                        uint32_t count, int lane, float (*acc)[4 * HALVES]) {
  constexpr int MOST = us_engine_page_groups<FORMAT, HALVES>::most;
  uint32_t groups = g->w.groups, bytes = g->w.page_bytes;
  const uint4 *from = (const uint4 *)(stage + lot.rows * groups * 512) + lane;
  const uint8_t *page = stage + row_tiles * groups * 512 + lot.first * bytes;
  uint4 rows[MOST];
#pragma unroll
  for (int q = 0; q < MOST; q++) {
    rows[q] = make_uint4(0, 0, 0, 0);
    if (q < groups) rows[q] = from[q * 32];
  }
#pragma unroll
  for (int k = 0; k < US_WIDE_SUMS / HALVES; k++)
    if (lot.first + k * lot.step < count)
      us_page_multiply<FORMAT, HALVES>(page + k * lot.step * bytes, groups, lane, rows, acc[k]);
}

/* A tile's sums of one row tile to where they go. */
template <int HALVES>
static __device__ __forceinline__ void us_wide_out(const struct us_engine_block *b,
                                                   const struct us_engine_gemm *g, struct us_wide_panel panel,
                                                   uint32_t tile, uint32_t rows, int lane, const float *sum) {
  float undo = us_engine_undo(g->w.format);
  uint8_t *out = (uint8_t *)g->out + rows * g->out_tile;
  struct us_engine_place at = {panel.part, tile, (uint32_t)lane / 4, (uint32_t)lane % 4 * 2, {0, 0}};
  float4 v[HALVES];
#pragma unroll
  for (int h = 0; h < HALVES; h++)
    v[h] = us_engine_times(make_float4(sum[4 * h], sum[4 * h + 1], sum[4 * h + 2], sum[4 * h + 3]), undo);
  if (g->epilogue == US_ENGINE_SWIGLU) {
    us_engine_gate(g, out, at, v[0], v[HALVES - 1]);
    return;
  }
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    uint32_t row = (tile * HALVES + h) * 16;
    if (g->epilogue == US_ENGINE_PUSH)
      us_engine_push(b, g->exchange + rows, g->gather ? panel.part : b->rank->rank * g->parts + panel.part,
                     g->first + row, lane, v[h]);
    else
      us_engine_store(g, out, at, row + at.row, v[h]);
  }
}

template <int FORMAT, int HALVES>
static __device__ __noinline__ void us_wide_panels(struct us_engine_block *b, const struct us_engine_op *op) {
  constexpr int SUMS = US_WIDE_SUMS / HALVES;
  const struct us_engine_gemm *g = &op->gemm;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  struct us_wide_lot lot = us_wide_lot(op->row_tiles);
  int lane = threadIdx.x % 32;
  uint32_t row_tiles = op->row_tiles, warps = g->warps, subs = g->subs;
  while (us_wide_next(g, &walk, &panel)) {
    float total[SUMS][4 * HALVES] = {};
    uint32_t count = lot.working ? panel.count : 0;
#pragma unroll 1
    for (uint32_t w = 0; w < warps; w++) {
      float acc[SUMS][4 * HALVES] = {};
#pragma unroll 1
      for (uint32_t j = 0; j < subs; j++) {
        us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
        us_wide_multiply<FORMAT, HALVES>(s->ring[c.stage], g, lot, row_tiles, count, lane, acc);
        us_engine_release(s, c, lane);
        us_engine_advance(&c);
      }
#pragma unroll
      for (int k = 0; k < SUMS; k++)
#pragma unroll
        for (int i = 0; i < 4 * HALVES; i++) total[k][i] = __fadd_rn(total[k][i], acc[k][i]);
    }
#pragma unroll
    for (int k = 0; k < SUMS; k++)
      if (lot.first + k * lot.step < count)
        us_wide_out<HALVES>(b, g, panel, panel.tile + lot.first + k * lot.step, lot.rows, lane, total[k]);
  }
  b->stage = c.stage, b->phase = c.phase;
}

static __device__ __forceinline__ void us_engine_wide_compute(struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  uint32_t format = op->gemm.w.format;
  bool two = op->gemm.w.halves == 2;
  us_engine_wait_done(b, op->wait);
  if (format == US_FORMAT_FP8 && two) us_wide_panels<US_FORMAT_FP8, 2>(b, op);
  if (format == US_FORMAT_FP8 && !two) us_wide_panels<US_FORMAT_FP8, 1>(b, op);
  if (format == US_FORMAT_BF16 && two) us_wide_panels<US_FORMAT_BF16, 2>(b, op);
  if (format == US_FORMAT_BF16 && !two) us_wide_panels<US_FORMAT_BF16, 1>(b, op);
  if (format == US_FORMAT_F32) us_wide_panels<US_FORMAT_F32, 1>(b, op);
  us_engine_finish(b);
}

#endif
