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
 * A stage is one slice: its activations of all row tiles, then the slice's page of each tile. A warp has one tile and four row tiles (two,
 * of tiles with two halves), so that it decodes a weight once for them, and goes through all of K: in the order in which a row tile alone
 * is summed, the slices of warp 0, of warp 1, ... each from zero, then their sums in order. So the bits are those of gemm.cuh. Sums end
 * in one warp, which stores them: no epilogue.
 */
#ifndef US_KERNELS_ENGINE_WIDE_CUH
#define US_KERNELS_ENGINE_WIDE_CUH

#include "kernels/engine/gemm.cuh"
#include "kernels/engine/wide_page.cuh"

/* Bytes of a row tile's activations in a stage. */
static __device__ __forceinline__ uint32_t us_wide_rows_bytes(const struct us_engine_gemm *g) {
  return g->w.groups * 512u;
}

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
/* Groups of row tiles that a warp multiplies a tile with, and how many a group has. */
static __device__ __forceinline__ uint32_t us_wide_group(const struct us_engine_gemm *g) {
  return US_WIDE_ROWS / g->w.halves;
}
static __device__ __forceinline__ uint32_t us_wide_groups(const struct us_engine_gemm *g,
                                                          uint32_t row_tiles) {
  return (row_tiles + us_wide_group(g) - 1) / us_wide_group(g);
}
/* Tiles of a panel at most: a warp each and group, and what a stage holds. */
static __device__ __forceinline__ uint32_t us_wide_most(const struct us_engine_gemm *g, uint32_t row_tiles) {
  uint32_t warps = US_ENGINE_COMPUTE_WARPS / us_wide_groups(g, row_tiles);
  return min(warps, (US_ENGINE_STAGE_BYTES - row_tiles * us_wide_rows_bytes(g)) / g->w.page_bytes);
}
/* The next panel; false: there is none. Panels of a part are as equal as they can be. */
static __device__ __forceinline__ bool us_wide_next(const struct us_engine_gemm *g, uint32_t most,
                                                    struct us_wide_walk *walk, struct us_wide_panel *panel) {
  if (walk->at >= walk->end) return false;
  uint32_t part = walk->at / g->w.tiles;
  uint32_t tile = walk->at - part * g->w.tiles, left = walk->end - walk->at;
  if (left > g->w.tiles - tile) left = g->w.tiles - tile;
  uint32_t panels = (left + most - 1) / most;
  panel->part = part, panel->tile = tile, panel->count = (left + panels - 1) / panels;
  walk->at += panel->count;
  return true;
}

/* ---- streaming ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void us_engine_wide_stream(struct us_engine_block *b,
                                                             const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  uint32_t bytes = g->w.page_bytes, warps = g->warps, subs = g->subs, most = us_wide_most(g, op->row_tiles),
           skip = op->row_tiles * us_wide_rows_bytes(g);
  size_t tile_bytes = (size_t)g->w.slices * bytes;
  bool copies = us_engine_copies(b);
  uint64_t policy = us_read_once();
  while (us_wide_next(g, most, &walk, &panel)) {
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

/* The other one passes by. */
static __device__ __forceinline__ void us_engine_wide_pass(struct us_engine_block *b,
                                                           const struct us_engine_op *op) {
  const struct us_engine_gemm *g = &op->gemm;
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  uint32_t panels = 0, most = us_wide_most(g, op->row_tiles);
  while (us_wide_next(g, most, &walk, &panel)) panels++;
  us_engine_skip(b, panels * g->warps * g->subs);
}

/* One warp of the epilogue: a lane a row tile. */
static __device__ __forceinline__ void us_engine_wide_rows(struct us_engine_block *b,
                                                           const struct us_engine_op *op) {
  const struct us_engine_gemm local = op->gemm, *g = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  uint32_t lane = threadIdx.x % 32, tiles = op->row_tiles, bytes = us_wide_rows_bytes(g), warps = g->warps,
           most = us_wide_most(g, tiles);
  const uint8_t *mine = (const uint8_t *)g->operand + (lane < tiles ? lane : 0) * g->operand_tile;
  if (lane == 0 && op->wait != US_ENGINE_NONE) us_engine_poll_done(b, op->wait);
  __syncwarp();
  asm volatile("fence.proxy.async;" ::: "memory");
  while (us_wide_next(g, most, &walk, &panel))
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

/* A warp's work on a panel: one of its tiles, and `count` row tiles from `rows` on. No row tiles: none. */
struct us_wide_lot {
  uint32_t tile, rows, count;
};
static __device__ __forceinline__ struct us_wide_lot us_wide_lot(const struct us_engine_gemm *g,
                                                                 uint32_t row_tiles) {
  uint32_t warp = threadIdx.x / 32, groups = us_wide_groups(g, row_tiles), group = us_wide_group(g);
  struct us_wide_lot lot = {warp / groups, warp % groups * group, 0};
  lot.count = min(group, row_tiles - lot.rows);
  return lot;
}

/* Sums over a warp's slices are added to those of the warps before in shared memory, which no epilogue uses meanwhile: registers are
 * scarce. On return acc[r] holds all so far. */
#define US_WIDE_TOTAL (US_WIDE_ROWS * 32) /* float4 of a warp */
static_assert(US_ENGINE_COMPUTE_WARPS * US_WIDE_TOTAL * sizeof(float4) <= US_ENGINE_VECTOR_BYTES,
              "sums of all warps");
template <int HALVES>
static __device__ __forceinline__ void us_wide_add(float4 *mine, bool first, float (*acc)[4 * HALVES]) {
#pragma unroll
  for (int i = 0; i < US_WIDE_ROWS; i++) {
    float *sum = acc[i / HALVES] + i % HALVES * 4;
    float4 before = first ? make_float4(0, 0, 0, 0) : mine[i * 32];
    sum[0] = __fadd_rn(before.x, sum[0]), sum[1] = __fadd_rn(before.y, sum[1]);
    sum[2] = __fadd_rn(before.z, sum[2]), sum[3] = __fadd_rn(before.w, sum[3]);
    mine[i * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
}

/* A tile's sums of one row tile to where they go. */
template <int HALVES>
static __device__ __forceinline__ void us_wide_out(const struct us_engine_block *b,
                                                   const struct us_engine_gemm *g, struct us_wide_panel panel,
                                                   uint32_t tile, uint32_t rows, int lane, const float *sum) {
  float undo = us_engine_undo(g->w.format);
  uint8_t *out = (uint8_t *)g->out + rows * g->out_tile;
  struct us_engine_place at = {panel.part, tile, (uint32_t)lane / 4, (uint32_t)lane % 4 * 2};
  float4 v[HALVES];
#pragma unroll
  for (int h = 0; h < HALVES; h++)
    v[h] = us_engine_times(make_float4(sum[4 * h], sum[4 * h + 1], sum[4 * h + 2], sum[4 * h + 3]), undo);
  if (g->epilogue == US_ENGINE_SWIGLU) {
    us_engine_gate(out, at, v[0], v[HALVES - 1]);
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

/* One panel: all of K. acc: the warp's sums of its row tiles. */
template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_wide_panel_sums(struct us_engine_block *b,
                                                          const struct us_engine_gemm *g,
                                                          struct us_engine_cursor *c, struct us_wide_lot lot,
                                                          uint32_t skip, bool working, int lane,
                                                          float (*acc)[4 * HALVES]) {
  constexpr int ROWS = US_WIDE_ROWS / HALVES;
  struct us_engine_shared *s = us_engine_shared_of(b);
  float4 *mine = (float4 *)us_engine_scratch(b) + threadIdx.x / 32 * US_WIDE_TOTAL + lane;
  uint32_t warps = g->warps, subs = g->subs, groups = g->w.groups, stride = us_wide_rows_bytes(g),
           rows = lot.rows * stride + lane * 16, page = skip + lot.tile * g->w.page_bytes;
#pragma unroll 1
  for (uint32_t w = 0; w < warps; w++) {
#pragma unroll
    for (int i = 0; i < ROWS * 4 * HALVES; i++) acc[i / (4 * HALVES)][i % (4 * HALVES)] = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < subs; j++) {
      us_engine_barrier_wait(b, &s->full[c->stage], c->phase, US_ENGINE_WAIT_STAGE);
      const uint8_t *stage = s->ring[c->stage];
      if (working)
        us_wide_page<FORMAT, HALVES>(stage + page, groups, lane, stage + rows, stride, lot.count, acc);
      us_engine_release(s, c->stage);
      us_engine_advance(c);
    }
    us_wide_add<HALVES>(mine, w == 0, acc);
  }
}

template <int FORMAT, int HALVES>
static __device__ __noinline__ void us_wide_panels(struct us_engine_block *b, const struct us_engine_op *op) {
  constexpr int ROWS = US_WIDE_ROWS / HALVES;
  const struct us_engine_gemm *g = &op->gemm;
  struct us_engine_cursor c = {b->stage, b->phase};
  struct us_wide_walk walk = us_wide_begin(b, g);
  struct us_wide_panel panel;
  struct us_wide_lot lot = us_wide_lot(g, op->row_tiles);
  int lane = threadIdx.x % 32;
  uint32_t most = us_wide_most(g, op->row_tiles), skip = op->row_tiles * us_wide_rows_bytes(g);
  while (us_wide_next(g, most, &walk, &panel)) {
    float acc[ROWS][4 * HALVES];
    bool working = lot.tile < panel.count;
    us_wide_panel_sums<FORMAT, HALVES>(b, g, &c, lot, skip, working, lane, acc);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (working && r < lot.count)
        us_wide_out<HALVES>(b, g, panel, panel.tile + lot.tile, lot.rows + r, lane, acc[r]);
  }
  b->stage = c.stage, b->phase = c.phase;
}

static __device__ __forceinline__ void us_engine_wide_compute(struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  uint32_t format = op->gemm.w.format;
  bool two = op->gemm.w.halves == 2;
  us_engine_wait_done(b, op->wait);
  us_engine_drain(b);
  if (format == US_FORMAT_FP8 && two) us_wide_panels<US_FORMAT_FP8, 2>(b, op);
  if (format == US_FORMAT_FP8 && !two) us_wide_panels<US_FORMAT_FP8, 1>(b, op);
  if (format == US_FORMAT_BF16 && two) us_wide_panels<US_FORMAT_BF16, 2>(b, op);
  if (format == US_FORMAT_BF16 && !two) us_wide_panels<US_FORMAT_BF16, 1>(b, op);
  if (format == US_FORMAT_F32) us_wide_panels<US_FORMAT_F32, 1>(b, op);
  us_engine_finish(b);
}

#endif
