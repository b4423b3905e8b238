/* down.cuh: the experts' down projection: y[row] = sum over its experts, ascending, of routing weight * down h.
 *
 * Bound: bytes of weights from HBM. A block owns 48 output columns (three tiles of 16) and goes through all active experts, its
 * sums in registers: 6144 / 48 = 128 blocks. A warp takes one group of 32 inner columns of all three tiles, so that one load of
 * activations serves three multiplies; activations come from L2 four steps ahead. A step is what 16 warps multiply at once:
 * step_slices pages of each tile. Rows that are not routed to an expert have zero activations and weight 0.
 */
#ifndef US_KERNELS_ENGINE_DOWN_CUH
#define US_KERNELS_ENGINE_DOWN_CUH

#include "kernels/engine/gemm.cuh"

#define US_DOWN_TILES 3
#define US_DOWN_AHEAD 4 /* steps whose activations are under way */

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

static __device__ __noinline__ void us_engine_down_stream(struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_down local = op->down, *d = &local;
  struct us_engine_shared *s = b->shared;
  struct us_engine_cursor c = {b->stage, b->phase};
  us_engine_wait_routed(b);
  uint32_t groups = us_engine_down_groups(d), total = s->active.count * d->steps, run = d->step_slices * d->w.page_bytes;
  for (uint32_t group = us_engine_first_item(b, op->shift); group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group), bytes = tiles * run;
    const uint8_t *mine = d->w.pages + (size_t)group * US_DOWN_TILES * d->w.slices * d->w.page_bytes;
    for (uint32_t step = 0; step < total; step += d->stage_steps) {
      uint32_t count = total - step < d->stage_steps ? total - step : d->stage_steps;
      uint32_t full = us_engine_take(b, s, c, count * bytes);
      for (uint32_t k = 0; k < count; k++) {
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

/* A warp's place in a step. */
struct us_down_lane {
  uint32_t slice, group; /* of the step; in the page */
  uint32_t columns;      /* group of 32 inner columns in step 0 of an expert */
  int lane;
  bool working;
};

/* Activations of step i: this lane's token and columns of its expert's pair; zero if the row is not routed to it. */
static __device__ __forceinline__ uint4 us_engine_down_rows(const struct us_engine_shared *s, const struct us_engine_down *d,
                                                            const struct us_down_lane *at, uint32_t i, uint32_t total) {
  uint4 zero = {0, 0, 0, 0};
  if (!at->working || i >= total) return zero;
  uint32_t slot = d->steps == 1 ? i : i / d->steps, step = d->steps == 1 ? 0 : i % d->steps;
  int pair = s->active.pair[slot][at->lane / 4];
  if (pair < 0) return zero;
  uint32_t group = step * d->step_slices * d->w.groups + at->columns;
  return __ldcg((const uint4 *)((const uint8_t *)d->pairs + (size_t)pair * us_engine_pair_bytes(d->F) + group * 64) +
                at->lane % 4);
}

/* d (16 rows x 8 tokens) = one group of 32 columns of a 16-row page; low, high: the scales of rows r and r + 8. */
template <int FORMAT>
static __device__ __forceinline__ void us_down_group(const uint8_t *page, uint32_t groups, const struct us_down_lane *at,
                                                     uint4 rows, float d[4], float *low, float *high) {
  uint32_t q = at->group, a[4];
  int lane = at->lane;
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

/* y[4 t + c] += routing weight * step i. */
template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_step(const struct us_engine_shared *s, const struct us_engine_down *d,
                                                           const struct us_down_lane *at, const uint8_t *step_pages,
                                                           uint32_t tiles, uint32_t i, uint4 rows, float *y) {
  uint32_t run = d->step_slices * d->w.page_bytes;
  float2 weight = *(const float2 *)&s->active.weight[d->steps == 1 ? i : i / d->steps][at->lane % 4 * 2];
  const uint8_t *page = step_pages + at->slice * d->w.page_bytes;
#pragma unroll
  for (int t = 0; t < US_DOWN_TILES; t++) {
    if (t >= tiles) continue;
    float sum[4], low, high;
    us_down_group<FORMAT>(page + t * run, d->w.groups, at, rows, sum, &low, &high);
    y[4 * t + 0] = __fmaf_rn(weight.x, low * sum[0], y[4 * t + 0]);
    y[4 * t + 1] = __fmaf_rn(weight.y, low * sum[1], y[4 * t + 1]);
    y[4 * t + 2] = __fmaf_rn(weight.x, high * sum[2], y[4 * t + 2]);
    y[4 * t + 3] = __fmaf_rn(weight.y, high * sum[3], y[4 * t + 3]);
  }
}

template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_experts(struct us_engine_block *b, const struct us_engine_op *op,
                                                              uint32_t tiles, float *y) {
  const struct us_engine_down local = op->down, *d = &local; /* barriers would make the compiler load it again and again */
  struct us_engine_shared *s = b->shared;
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, groups = d->w.groups, total = s->active.count * d->steps;
  uint32_t run = d->step_slices * d->w.page_bytes, stage_steps = d->stage_steps, in_stage = 0;
  struct us_down_lane at = {warp / groups, warp % groups, warp, (int)(threadIdx.x % 32), warp < d->step_slices * groups};
  uint4 rows[US_DOWN_AHEAD];
#pragma unroll
  for (int k = 0; k < US_DOWN_AHEAD; k++) rows[k] = us_engine_down_rows(s, d, &at, k, total);
  for (uint32_t i = 0; i < total; i += US_DOWN_AHEAD) {
#pragma unroll
    for (int k = 0; k < US_DOWN_AHEAD; k++) {
      if (i + k >= total) continue;
      if (in_stage == 0) us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
      uint4 now = rows[k];
      rows[k] = us_engine_down_rows(s, d, &at, i + k + US_DOWN_AHEAD, total);
      if (at.working)
        us_engine_down_step<FORMAT>(s, d, &at, s->ring[c.stage] + in_stage * US_DOWN_TILES * run, tiles, i + k, now, y);
      if (++in_stage == stage_steps || i + k + 1 == total) {
        us_engine_release(s, c, at.lane);
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

static __device__ __forceinline__ void us_engine_down_compute(struct us_engine_block *b, const struct us_engine_op *op) {
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
