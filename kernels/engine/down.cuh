/* down.cuh: the experts' down projection: y[row] = sum over its experts, ascending, of routing weight * down h.
 *
 * Bound: bytes of weights from HBM. A block owns 48 output columns (three tiles of 16) and goes through all active experts, its
 * sums in registers: 6144 / 48 = 128 blocks. A step is what 16 warps multiply at once: step_slices pages of each tile; a warp
 * takes one group of 32 inner columns of all three tiles. A stage of the ring holds one or two steps and behind them the
 * activations of the rows that use their experts, which are copied there too: weights as soon as the stage is free, activations
 * once they have been computed. Rows that are not routed to an expert have zero activations and weight 0.
 */
#ifndef US_KERNELS_ENGINE_DOWN_CUH
#define US_KERNELS_ENGINE_DOWN_CUH

#include "kernels/engine/gemm.cuh"

#define US_DOWN_TILES 3
#define US_DOWN_PAD   64 /* bytes between pairs in a stage: neighbours start in different banks */

/* Blocks' shares: groups of three tiles. */
static __device__ __forceinline__ uint32_t us_engine_down_groups(const struct us_engine_down *d) {
  return (d->w.tiles + US_DOWN_TILES - 1) / US_DOWN_TILES;
}
static __device__ __forceinline__ uint32_t us_engine_down_tiles(const struct us_engine_down *d, uint32_t group) {
  uint32_t left = d->w.tiles - group * US_DOWN_TILES;
  return left < US_DOWN_TILES ? left : US_DOWN_TILES;
}

/* Sizes in a stage, and how far a role has come: steps are numbered expert by expert. */
struct us_down_plan {
  uint32_t steps, stage_steps; /* an expert; a stage at most */
  uint32_t run, step_bytes;    /* a tile's pages of a step; all three tiles' */
  uint32_t rows_bytes;         /* a pair's activations of a step */
  uint32_t total;
};
static __device__ __forceinline__ struct us_down_plan us_down_plan(const struct us_engine_down *d, uint32_t active) {
  struct us_down_plan p;
  p.steps = d->steps, p.stage_steps = d->stage_steps;
  p.run = d->step_slices * d->w.page_bytes, p.step_bytes = US_DOWN_TILES * p.run;
  p.rows_bytes = d->step_slices * d->w.groups * 64;
  p.total = active * d->steps;
  return p;
}

/* Steps in the stage that begins with step i: as many as fit with their activations, one always does. */
static __device__ __forceinline__ uint32_t us_down_stage(const struct us_engine_shared *s, const struct us_down_plan *p,
                                                         uint32_t i) {
  if (p->stage_steps < 2 || i + 1 >= p->total) return 1;
  uint32_t pairs = __popc(s->active.rows[i / p->steps]) + __popc(s->active.rows[(i + 1) / p->steps]);
  return 2 * p->step_bytes + pairs * (p->rows_bytes + US_DOWN_PAD) <= US_ENGINE_STAGE_BYTES ? 2 : 1;
}

/* ---- streaming ------------------------------------------------------------------------------------------------------ */

/* Copy one step's weights: contiguous if a step is a whole tile row of pages, else tile by tile. */
static __device__ __forceinline__ void us_engine_down_copy(const struct us_engine_down *d, const struct us_down_plan *p,
                                                           const uint8_t *from, uint32_t tiles, uint32_t to, uint32_t full) {
  if (p->steps == 1) {
    us_bulk_load(to, from, tiles * p->run, full);
    return;
  }
  for (uint32_t t = 0; t < tiles; t++)
    us_bulk_load(to + t * p->run, from + (size_t)t * d->w.slices * d->w.page_bytes, p->run, full);
}

/* The activations of a stage's steps, behind their weights; the stage's last arrival. */
static __device__ __forceinline__ void us_engine_down_rows(const struct us_engine_shared *s, const struct us_engine_down *d,
                                                           const struct us_down_plan *p, uint32_t first, uint32_t count,
                                                           uint32_t stage) {
  uint32_t full = us_shared_address(&s->full[stage]), pairs = 0;
  for (uint32_t k = 0; k < count; k++) pairs += __popc(s->active.rows[(first + k) / p->steps]);
  us_barrier_expect(full, pairs * p->rows_bytes);
  uint32_t to = us_shared_address(s->ring[stage]) + count * p->step_bytes;
  for (uint32_t i = first; i < first + count; i++) {
    uint32_t slot = i / p->steps, offset = i % p->steps * p->rows_bytes;
    for (uint32_t mask = s->active.rows[slot]; mask; mask &= mask - 1, to += p->rows_bytes + US_DOWN_PAD) {
      uint32_t pair = (uint32_t)s->active.pair[slot][__ffs((int)mask) - 1];
      us_bulk_load(to, (const uint8_t *)d->pairs + (size_t)pair * us_engine_pair_bytes(d->F) + offset, p->rows_bytes, full);
    }
  }
}

/* First steps of the stages that went ahead; kept out of local memory by comparing instead of indexing. */
static __device__ __forceinline__ void us_down_remember(uint32_t *early, uint32_t at, uint32_t step) {
#pragma unroll
  for (uint32_t i = 0; i < US_ENGINE_STAGES; i++)
    if (i == at) early[i] = step;
}

/* The pairs stand in memory on all blocks: give the stages that went ahead theirs. */
static __device__ __forceinline__ void us_engine_down_ready(const struct us_engine_block *b, const struct us_engine_shared *s,
                                                            const struct us_engine_down *d, const struct us_down_plan *p,
                                                            uint32_t wait, const uint32_t *early, uint32_t *behind,
                                                            uint32_t stage) {
  us_engine_poll_done(b, wait);
  asm volatile("fence.proxy.async;" ::: "memory");
#pragma unroll
  for (uint32_t i = 0; i < US_ENGINE_STAGES; i++) {
    if (i >= *behind) continue;
    us_engine_down_rows(s, d, p, early[i], us_down_stage(s, p, early[i]), stage);
    if (++stage == US_ENGINE_STAGES) stage = 0;
  }
  *behind = 0;
}

/* One thread. Weights run ahead of activations by up to a ring; once the gate and up projection is done on all blocks, a
 * stage gets both. */
static __device__ __forceinline__ void us_engine_down_stream(struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_down local = op->down, *d = &local;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  us_engine_wait_routed(b);
  struct us_down_plan p = us_down_plan(d, s->active.count);
  uint32_t groups = us_engine_down_groups(d), wait = op->wait;
  bool ready = wait == US_ENGINE_NONE, copies = us_engine_copies(b);
  uint32_t early[US_ENGINE_STAGES], behind = 0, held = c.stage; /* stages that still lack activations: their first steps */
  for (uint32_t group = us_engine_first_item(b, op->shift); group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group);
    const uint8_t *mine = d->w.pages + (size_t)group * US_DOWN_TILES * d->w.slices * d->w.page_bytes;
    for (uint32_t i = 0, count; i < p.total; i += count) {
      count = us_down_stage(s, &p, i);
      bool last = i + count >= p.total;
      if (!ready && behind == US_ENGINE_STAGES) us_engine_down_ready(b, s, d, &p, wait, early, &behind, held), ready = true;
      us_engine_barrier_wait(b, &s->empty[c.stage], c.phase ^ 1, US_ENGINE_WAIT_FREE);
      uint32_t full = us_shared_address(&s->full[c.stage]);
      if (copies) us_barrier_more(full, count * tiles * p.run);
      for (uint32_t k = 0; copies && k < count; k++)
        us_engine_down_copy(d, &p, mine + s->active.expert[(i + k) / p.steps] * d->w.matrix_bytes + (size_t)((i + k) % p.steps) * p.run,
                            tiles, us_shared_address(s->ring[c.stage]) + k * p.step_bytes, full);
      if (ready)
        us_engine_down_rows(s, d, &p, i, count, c.stage);
      else
        us_down_remember(early, behind++, i);
      us_engine_advance(&c);
      if (!ready && last) us_engine_down_ready(b, s, d, &p, wait, early, &behind, held), ready = true;
    }
  }
  b->stage = c.stage, b->phase = c.phase;
}

/* ---- compute warps -------------------------------------------------------------------------------------------------- */

/* d (16 rows x 8 tokens) = group q of 32 columns of a 16-row page; low, high: the scales of rows r and r + 8. */
template <int FORMAT>
static __device__ __forceinline__ void us_down_group(const uint8_t *page, uint32_t groups, uint32_t q, int lane, uint4 rows,
                                                     float d[4], float *low, float *high) {
  uint32_t a[4];
  d[0] = d[1] = d[2] = d[3] = 0;
  if (FORMAT == US_FORMAT_MXFP4) {
    uint2 w = ((const uint2 *)page)[(q / 2 * 32 + lane) * 2 + q % 2];
    uint2 scales = ((const uint2 *)(page + (groups + 1) / 2 * 512))[lane / 4];
    us_mxfp4_fragment(w.x, a), us_mma_bf16(d, a, rows.x, rows.y, d);
    us_mxfp4_fragment(w.y, a), us_mma_bf16(d, a, rows.z, rows.w, d);
    *low = __uint_as_float((scales.x >> 8 * q & 255u) << 23), *high = __uint_as_float((scales.y >> 8 * q & 255u) << 23);
  } else if (FORMAT == US_FORMAT_FP8) {
    uint4 w = ((const uint4 *)page)[q * 32 + lane];
    us_fp8_fragment(w.x, a), us_fp8_fragment(w.y, a + 2), us_mma_bf16(d, a, rows.x, rows.y, d);
    us_fp8_fragment(w.z, a), us_fp8_fragment(w.w, a + 2), us_mma_bf16(d, a, rows.z, rows.w, d);
    *low = *high = *(const float *)(page + groups * 512);
  } else {
    const uint4 *chunk = (const uint4 *)page + q * 64 + lane;
    uint4 w0 = chunk[0], w1 = chunk[32];
    us_mma_bf16(d, &w0.x, rows.x, rows.y, d), us_mma_bf16(d, &w1.x, rows.z, rows.w, d);
    *low = *high = 0x1p-64f;
  }
}

/* y[4 t + c] += routing weight * this warp's columns of a step; `page` is the first tile's, the next one `run` bytes on. */
template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_step(const uint8_t *page, uint32_t run, uint32_t groups, uint32_t q,
                                                           int lane, uint32_t tiles, float2 weight, uint4 rows, float *y) {
#pragma unroll
  for (int t = 0; t < US_DOWN_TILES; t++) {
    if (t >= tiles) continue;
    float sum[4], low, high;
    us_engine_in_order();
    us_down_group<FORMAT>(page + t * run, groups, q, lane, rows, sum, &low, &high);
    y[4 * t + 0] = __fmaf_rn(weight.x, low * sum[0], y[4 * t + 0]);
    y[4 * t + 1] = __fmaf_rn(weight.y, low * sum[1], y[4 * t + 1]);
    y[4 * t + 2] = __fmaf_rn(weight.x, high * sum[2], y[4 * t + 2]);
    y[4 * t + 3] = __fmaf_rn(weight.y, high * sum[3], y[4 * t + 3]);
  }
}

/* This lane's activations of a step: its token's pair among those behind the stage's weights, `before` of them of steps before. */
static __device__ __forceinline__ uint4 us_down_lane_rows(const uint8_t *pairs, uint32_t rows_bytes, uint32_t before, uint32_t mask,
                                                          uint32_t warp, uint32_t lane) {
  uint32_t token = lane / 4;
  uint4 rows = {0, 0, 0, 0};
  if (mask >> token & 1)
    rows = *(const uint4 *)(pairs + (before + __popc(mask & ((1u << token) - 1))) * (rows_bytes + US_DOWN_PAD) + warp * 64 +
                            lane % 4 * 16);
  return rows;
}

/* All active experts' share of three tiles: warp w has group w % groups of slice w / groups of every step. */
template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_experts(struct us_engine_block *b, const struct us_engine_op *op,
                                                              uint32_t tiles, float *y) {
  const struct us_engine_down *d = &op->down;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = d->w.groups;
  uint32_t offset = warp / groups * d->w.page_bytes, q = warp % groups;
  bool working = warp < d->step_slices * groups;
  struct us_down_plan p = us_down_plan(d, s->active.count);
#pragma unroll 1
  for (uint32_t i = 0, count; i < p.total; i += count) {
    count = us_down_stage(s, &p, i);
    us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
    const uint8_t *stage = s->ring[c.stage];
    uint32_t before = 0;
#pragma unroll
    for (uint32_t k = 0; k < 2; k++) {
      if (k >= count) continue;
      uint32_t slot = (i + k) / p.steps, mask = s->active.rows[slot];
      float2 weight = *(const float2 *)&s->active.weight[slot][lane % 4 * 2];
      if (working) {
        uint4 rows = us_down_lane_rows(stage + count * p.step_bytes, p.rows_bytes, before, mask, warp, lane);
        us_engine_down_step<FORMAT>(stage + k * p.step_bytes + offset, p.run, groups, q, lane, tiles, weight, rows, y);
      }
      before += __popc(mask);
    }
    us_engine_release(s, c, lane);
    us_engine_advance(&c);
  }
  b->stage = c.stage, b->phase = c.phase;
}

/* Add the warps' sums in order, and push the block's columns. */
static __device__ void us_engine_down_out(struct us_engine_block *b, const struct us_engine_down *d, uint32_t group,
                                          uint32_t tiles, const float *y) {
  float4 *sums = (float4 *)us_engine_scratch(b); /* (tile, warp, lane) */
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  us_engine_drain(b);
  us_engine_meet();
#pragma unroll
  for (int t = 0; t < US_DOWN_TILES; t++)
    sums[(t * US_ENGINE_COMPUTE_WARPS + warp) * 32 + lane] = make_float4(y[4 * t], y[4 * t + 1], y[4 * t + 2], y[4 * t + 3]);
  us_engine_meet();
  if (warp < tiles) {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int w = 0; w < US_ENGINE_COMPUTE_WARPS; w++) {
      float4 v = sums[(warp * US_ENGINE_COMPUTE_WARPS + w) * 32 + lane];
      sum.x = __fadd_rn(sum.x, v.x), sum.y = __fadd_rn(sum.y, v.y);
      sum.z = __fadd_rn(sum.z, v.z), sum.w = __fadd_rn(sum.w, v.w);
    }
    us_engine_push(b, d->exchange, b->rank->rank, (group * US_DOWN_TILES + warp) * 16, lane, sum);
  }
}

static __device__ __noinline__ void us_engine_down_compute(struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_down *d = &op->down;
  us_engine_wait_done(b, op->wait);
  uint32_t groups = us_engine_down_groups(d);
  for (uint32_t group = us_engine_first_item(b, op->shift); group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group);
    float y[4 * US_DOWN_TILES] = {};
    if (d->w.format == US_FORMAT_MXFP4) us_engine_down_experts<US_FORMAT_MXFP4>(b, op, tiles, y);
    if (d->w.format == US_FORMAT_FP8) us_engine_down_experts<US_FORMAT_FP8>(b, op, tiles, y);
    if (d->w.format == US_FORMAT_BF16) us_engine_down_experts<US_FORMAT_BF16>(b, op, tiles, y);
    us_engine_down_out(b, d, group, tiles, y);
  }
  us_engine_finish(b);
}

#endif
