/* down.cuh: the experts' down projection: y[row] = sum over its experts, ascending, of routing weight * down h.
 *
 * Bound: bytes of weights from HBM. A block owns 48 output columns (three tiles of 16) and goes through all active experts, its
 * sums in registers: 6144 / 48 = 128 blocks. A warp takes one group of 32 inner columns of all three tiles, so that one load of
 * activations serves three multiplies; activations come from L2 two steps ahead (a step takes as long as a load). A step is what 16 warps multiply at once:
 * step_slices pages of each tile. Rows that are not routed to an expert have zero activations and weight 0.
 */
#ifndef US_KERNELS_ENGINE_DOWN_CUH
#define US_KERNELS_ENGINE_DOWN_CUH

#include "kernels/engine/gemm.cuh"

#define US_DOWN_TILES 3
#define US_DOWN_AHEAD 2 /* steps whose activations are under way */

/* Blocks' shares: groups of three tiles. */
static __device__ __forceinline__ uint32_t us_engine_down_groups(const struct us_engine_down *d) {
  return (d->w.tiles + US_DOWN_TILES - 1) / US_DOWN_TILES;
}
static __device__ __forceinline__ uint32_t us_engine_down_tiles(const struct us_engine_down *d, uint32_t group) {
  uint32_t left = d->w.tiles - group * US_DOWN_TILES;
  return left < US_DOWN_TILES ? left : US_DOWN_TILES;
}

/* ---- streaming ------------------------------------------------------------------------------------------------------ */

/* Copy one step: contiguous if a step is a whole tile row of pages, else tile by tile. */
static __device__ __forceinline__ void us_engine_down_copy(const struct us_engine_down *d, const uint8_t *from, uint32_t tiles,
                                                           uint32_t to, uint32_t full) {
  uint32_t run = d->step_slices * d->w.page_bytes;
  if (d->steps == 1) {
    us_bulk_load(to, from, tiles * run, full);
    return;
  }
  for (uint32_t t = 0; t < tiles; t++)
    us_bulk_load(to + t * run, from + (size_t)t * d->w.slices * d->w.page_bytes, run, full);
}

static __device__ __forceinline__ void us_engine_down_stream(struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_down local = op->down, *d = &local;
  struct us_engine_shared *s = b->shared;
  struct us_engine_cursor c = {b->stage, b->phase};
  bool copies = us_engine_copies(b);
  us_engine_wait_routed(b);
  uint32_t groups = us_engine_down_groups(d), total = s->active.count * d->steps, run = d->step_slices * d->w.page_bytes;
  for (uint32_t group = us_engine_first_item(b, op->shift); group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group), bytes = tiles * run;
    const uint8_t *mine = d->w.pages + (size_t)group * US_DOWN_TILES * d->w.slices * d->w.page_bytes;
    for (uint32_t step = 0; step < total; step += d->stage_steps) {
      uint32_t count = total - step < d->stage_steps ? total - step : d->stage_steps;
      uint32_t full = us_engine_take(b, s, c, copies ? count * bytes : 0);
      for (uint32_t k = 0; copies && k < count; k++) {
        uint32_t slot = (step + k) / d->steps, part = (step + k) % d->steps;
        us_engine_down_copy(d, mine + s->active.expert[slot] * d->w.matrix_bytes + (size_t)part * run, tiles,
                            us_shared_address(s->ring[c.stage]) + k * US_DOWN_TILES * run, full);
      }
      us_engine_advance(&c);
    }
  }
  b->stage = c.stage, b->phase = c.phase;
}

/* ---- compute warps -------------------------------------------------------------------------------------------------- */

/* A lane's way through the activations: its token's pair of every active expert, ahead of the multiplies. */
struct us_down_rows {
  const uint8_t *from;     /* its columns of pair 0, step 0 */
  uint32_t pair_bytes, step_bytes;
  uint32_t slot, step;     /* of the next load */
};

/* The next step's activations; zero if the row is not routed to the expert, or there is none. */
static __device__ __forceinline__ uint4 us_engine_down_rows(const struct us_engine_shared *s, struct us_down_rows *r,
                                                            uint32_t steps, uint32_t token) {
  uint4 rows = {0, 0, 0, 0};
  if (r->slot >= s->active.count) return rows;
  int pair = s->active.pair[r->slot][token];
  if (pair >= 0) rows = __ldcg((const uint4 *)(r->from + pair * r->pair_bytes + r->step * r->step_bytes));
  if (++r->step == steps) r->step = 0, r->slot++;
  return rows;
}

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

/* All active experts' share of three tiles: warp w has group w % groups of slice w / groups of every step. */
template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_experts(struct us_engine_block *b, const struct us_engine_op *op,
                                                              uint32_t tiles, float *y) {
  const struct us_engine_down *d = &op->down;
  struct us_engine_shared *s = b->shared;
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = d->w.groups, steps = d->steps;
  uint32_t run = d->step_slices * d->w.page_bytes, stage_steps = d->stage_steps, in_stage = 0;
  uint32_t offset = warp / groups * d->w.page_bytes, q = warp % groups, total = s->active.count * steps, slot = 0, step = 0;
  bool working = warp < d->step_slices * groups;
  struct us_down_rows next = {(const uint8_t *)d->pairs + warp * 64 + lane % 4 * 16, us_engine_pair_bytes(d->F),
                              d->step_slices * groups * 64, working ? 0 : US_ENGINE_NONE, 0};
  uint4 rows[US_DOWN_AHEAD];
#pragma unroll
  for (int k = 0; k < US_DOWN_AHEAD; k++) rows[k] = us_engine_down_rows(s, &next, steps, lane / 4);
#pragma unroll 1
  for (uint32_t i = 0; i < total; i += US_DOWN_AHEAD) {
#pragma unroll
    for (int k = 0; k < US_DOWN_AHEAD; k++) {
      if (i + k >= total) continue;
      if (in_stage == 0) us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
      uint4 now = rows[k];
      rows[k] = us_engine_down_rows(s, &next, steps, lane / 4);
      float2 weight = *(const float2 *)&s->active.weight[slot][lane % 4 * 2];
      if (working)
        us_engine_down_step<FORMAT>(s->ring[c.stage] + in_stage * US_DOWN_TILES * run + offset, run, groups, q, lane, tiles,
                                    weight, now, y);
      if (++step == steps) step = 0, slot++;
      if (++in_stage == stage_steps || i + k + 1 == total) {
        us_engine_release(s, c, lane);
        us_engine_advance(&c);
        in_stage = 0;
      }
    }
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
