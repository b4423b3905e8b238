/* down.cuh: the experts' down projection: y[row] = sum over its experts, ascending, of routing weight * down h.
 *
 * Bound: bytes of weights from HBM. A block owns 48 output columns (three tiles of 16) and goes through all active experts, its
 * sums in registers: 6144 / 48 = 128 blocks. A step is what the warps multiply at once: step_slices pages of each tile; a
 * warp takes a page of a tile (MXFP4, four groups) or one group of 32 inner columns of all three tiles. Never a share of the experts: the
 * order of a row's sum would then depend on what other rows chose. A stage of the ring holds one or two steps and behind them the
 * activations of the rows that use their experts, which are copied there too: weights by the streaming thread as soon as the stage is free,
 * activations by the epilogue's warps once they have been computed. Rows that are not routed to an expert have zero activations and weight 0.
 *
 * Contents: one step; pages of any kind, and the operation. Whole MXFP4 pages: down_whole.cuh.
 */
#ifndef US_KERNELS_ENGINE_DOWN_CUH
#define US_KERNELS_ENGINE_DOWN_CUH

#include "kernels/engine/down_whole.cuh"

/* ---- one step ----------------------------------------------------------------------------------------------------- */

/* d (16 rows x 8 tokens) = group q of 32 columns of a 16-row page; low, high: the scales of rows r and r + 8. */
template <int FORMAT>
static __device__ __forceinline__ void us_down_group(const uint8_t *page, uint32_t groups, uint32_t q,
                                                     int lane, uint4 rows, float d[4], float *low,
                                                     float *high) {
  uint32_t a[4];
  d[0] = d[1] = d[2] = d[3] = 0;
  if (FORMAT == US_FORMAT_MXFP4) {
    uint2 w = ((const uint2 *)page)[(q / 2 * 32 + lane) * 2 + q % 2];
    uint2 scales = ((const uint2 *)(page + (groups + 1) / 2 * 512))[lane / 4];
    us_mxfp4_fragment(w.x, a), us_mma_bf16(d, a, rows.x, rows.y, d);
    us_mxfp4_fragment(w.y, a), us_mma_bf16(d, a, rows.z, rows.w, d);
    *low = __uint_as_float((scales.x >> 8 * q & 255u) << 23),
    *high = __uint_as_float((scales.y >> 8 * q & 255u) << 23);
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
static __device__ __forceinline__ void us_engine_down_step(const uint8_t *page, uint32_t run, uint32_t groups,
                                                           uint32_t q, int lane, uint32_t tiles,
                                                           float2 weight, uint4 rows, float *y) {
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

/* ---- pages of any kind, and the operation ------------------------------------------------------------------------- */

/* All active experts' share of three tiles, pages of any kind: warp w has group w % groups of slice w / groups of every step. */
template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_experts(struct us_engine_block *b,
                                                              const struct us_engine_op *op, uint32_t tiles,
                                                              float *y) {
  const struct us_engine_down *d = &op->down;
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = us_engine_shared_base(b),
           groups = d->w.groups, count;
  uint32_t q = warp % groups, offset = warp / groups * d->w.page_bytes, inner = warp * 64 + lane % 4 * 16;
  bool working = warp < d->step_slices * groups;
  struct us_down_lane look = us_down_lane<false>(base, lane, 0);
#pragma unroll 1
  do {
    us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
    uint32_t told = c.stage * look.apart;
    uint4 pages = us_shared_load16(look.pages + told), weight = us_shared_load16(look.weight + told);
    uint2 rows = us_shared_load8(look.rows + told);
    uint32_t apart = us_shared_load4(look.pages + told + 16) - pages.x; /* of tiles */
    count = pages.z;
#pragma unroll 1
    for (uint32_t k = 0; working && k < (count & 3); k++) {
      const uint8_t *page = s->ring[0] + ((k ? pages.y : pages.x) - base + offset);
      us_engine_down_step<FORMAT>(
          page, apart, groups, q, lane, tiles,
          make_float2(__uint_as_float(k ? weight.z : weight.x), __uint_as_float(k ? weight.w : weight.y)),
          us_shared_load16((k ? rows.y : rows.x) + inner), y);
    }
    us_engine_release(s, c.stage);
    us_engine_advance(&c);
  } while (!(count & US_DOWN_LAST));
  b->stage = c.stage, b->phase = c.phase;
}

/* Add the warps' sums in order, and push the block's columns. whole: a tile's sums are those of `slices` warps. */
static __device__ void us_engine_down_out(struct us_engine_block *b, const struct us_engine_down *d,
                                          uint32_t group, uint32_t tiles, bool whole, bool first,
                                          const float *y) {
  float4 *sums = whole ? us_down_room()->sums[0] : (float4 *)us_engine_scratch(b); /* (tile, warp, lane) */
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32,
           each = whole ? d->step_slices : US_ENGINE_COMPUTE_WARPS;
  if (!whole) us_engine_drain(b);
  if (!whole || !first) us_engine_meet(); /* nobody reads what lies there */
#pragma unroll
  for (int t = 0; t < US_DOWN_TILES; t++)
    if (!whole || !t)
      sums[(t * US_ENGINE_COMPUTE_WARPS + warp) * 32 + lane] =
          make_float4(y[4 * t], y[4 * t + 1], y[4 * t + 2], y[4 * t + 3]);
  us_engine_meet();
  if (warp < tiles) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (uint32_t w = 0; w < each; w++) {
      float4 v = sums[(warp * each + w) * 32 + lane];
      sum.x = __fadd_rn(sum.x, v.x), sum.y = __fadd_rn(sum.y, v.y);
      sum.z = __fadd_rn(sum.z, v.z), sum.w = __fadd_rn(sum.w, v.w);
    }
    us_engine_push(b, d->exchange, us_engine_rank_of(b)->rank, (group * US_DOWN_TILES + warp) * 16, lane,
                   sum);
  }
}

static __device__ __noinline__ void us_engine_down_compute(void) {
  struct us_engine_block *b = us_engine_self();
  const struct us_engine_op *op = us_engine_fetched_op(b);
  const struct us_engine_down *d = &op->down;
  us_engine_jitter(b); /* the epilogue warps may have been here for long */
  /* nothing since the last barrier of a vector operation has touched scratch but the epilogue warps, which tell of stages there */
  if (threadIdx.x < US_DOWN_ZEROS / 16)
    ((uint4 *)us_down_room()->zeros)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  uint32_t groups = us_engine_down_groups(d), first = us_engine_first_item(b, op->shift);
  if (first < groups && us_engine_shared_of(b)->active.count)
    us_engine_meet(); /* the last stage is full when the warps that bring activations have waited */
  else
    us_engine_wait_done(b, op->wait);
  bool whole = d->w.format == US_FORMAT_MXFP4 && d->w.groups == 4;
  for (uint32_t group = first; group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group);
    float y[4 * US_DOWN_TILES] = {};
    uint32_t working = tiles * d->step_slices, warp = threadIdx.x / 32;
    if (us_engine_shared_of(b)->active.count && !(whole && warp >= working)) {
      if (whole) {
        float4 sums = us_engine_down_whole(working);
        y[0] = sums.x, y[1] = sums.y, y[2] = sums.z, y[3] = sums.w;
      } else if (d->w.format == US_FORMAT_MXFP4)
        us_engine_down_experts<US_FORMAT_MXFP4>(b, op, tiles, y);
      else if (d->w.format == US_FORMAT_FP8)
        us_engine_down_experts<US_FORMAT_FP8>(b, op, tiles, y);
      else
        us_engine_down_experts<US_FORMAT_BF16>(b, op, tiles, y);
    }
    us_engine_down_out(b, d, group, tiles, whole, group == first, y);
  }
  if (first < groups) { /* warps that slept: warp 0 changes its place again behind the next barrier only */
    const struct us_engine_block *worked = &us_engine_shared_of(b)->warp[0];
    b->stage = worked->stage, b->phase = worked->phase;
  }
  us_engine_finish(b);
}

#endif
