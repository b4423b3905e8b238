/* down.cuh: the experts' down projection: y[row] = sum over its experts, ascending, of routing weight * down h.
 *
 * Bound: bytes of weights from HBM. A block owns 48 output columns (three tiles of 16) and goes through all active experts, its
 * sums in registers: 6144 / 48 = 128 blocks. A step is what the warps multiply at once: step_slices pages of each tile; a
 * warp takes a page of a tile (MXFP4, four groups) or one group of 32 inner columns of all three tiles. Never a share of the experts: the
 * order of a row's sum would then depend on what other rows chose. A stage of the ring holds one or two steps and behind them the
 * activations of the rows that use their experts, which are copied there too: weights by the streaming thread as soon as the stage is free,
 * activations by one of the epilogue's once they have been computed. Rows that are not routed to an expert have zero activations and weight 0.
 */
#ifndef US_KERNELS_ENGINE_DOWN_CUH
#define US_KERNELS_ENGINE_DOWN_CUH

#include "kernels/engine/down_stream.cuh"

/* ---- compute warps -------------------------------------------------------------------------------------------------- */

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

/* Where things of the active list lie in shared memory for this lane: its token's pair, its two columns' routing weights. */
struct us_down_lane {
  uint32_t pair, weight;
};
static __device__ __forceinline__ struct us_down_lane us_down_lane(uint32_t base, uint32_t lane) {
  uint32_t active = base + (uint32_t)offsetof(struct us_engine_shared, active);
  struct us_down_lane at;
  at.pair = active + (uint32_t)offsetof(struct us_engine_active, pair) + lane / 4 * 2;
  at.weight = active + (uint32_t)offsetof(struct us_engine_active, weight) + lane % 4 * 8;
  return at;
}

/* Where this lane's activations of a step lie: behind the weights, or zeros. Offsets in shared memory. */
static __device__ __forceinline__ uint32_t us_down_lane_rows(uint32_t pair_at, uint32_t rows,
                                                             uint32_t stride) {
  int pair = us_shared_load_s16(pair_at);
  return pair < 0 ? (uint32_t)offsetof(struct us_engine_shared, scratch) : rows + pair * stride;
}
static __device__ __forceinline__ float2 us_down_weight(uint32_t address) {
  uint2 w = us_shared_load8(address);
  return make_float2(__uint_as_float(w.x), __uint_as_float(w.y));
}

/* What a warp needs of one whole MXFP4 page of four groups: loaded at once, since a chain of loads is what the loop waits for. */
struct us_down_page {
  uint4 code[2], rows[4];
  uint2 scales;
  float2 weight;
};
static __device__ __forceinline__ void us_down_load_page(struct us_down_page *p, uint32_t page, uint32_t rows,
                                                         int lane) {
  p->code[0] = us_shared_load16(page + lane * 16), p->code[1] = us_shared_load16(page + 512 + lane * 16);
  p->scales = us_shared_load8(page + 1024 + lane / 4 * 8);
#pragma unroll
  for (int q = 0; q < 4; q++) p->rows[q] = us_shared_load16(rows + q * 64);
}
static __device__ __forceinline__ void us_down_load(struct us_down_page *p, uint32_t page, uint32_t rows,
                                                    uint32_t weight, int lane) {
  us_down_load_page(p, page, rows, lane);
  p->weight = us_down_weight(weight);
}

/* acc += the page's columns. A group's sums are scaled while the next one's are multiplied. */
static __device__ __forceinline__ void us_down_page_sums(const struct us_down_page *p, float *acc) {
  const float zero[4] = {0, 0, 0, 0};
  float before[4];
#pragma unroll
  for (int q = 0; q < 4; q++) {
    uint4 w = p->code[q / 2], rows = p->rows[q];
    uint32_t a[4];
    float d[4];
    us_mxfp4_fragment(q % 2 ? w.z : w.x, a), us_mma_bf16(d, a, rows.x, rows.y, zero);
    us_mxfp4_fragment(q % 2 ? w.w : w.y, a), us_mma_bf16(d, a, rows.z, rows.w, d);
    if (q) us_page_scale(before, p->scales.x, p->scales.y, q - 1, acc);
#pragma unroll
    for (int i = 0; i < 4; i++) before[i] = d[i];
  }
  us_page_scale(before, p->scales.x, p->scales.y, 3, acc);
}

/* y += routing weight * the page's columns. */
static __device__ __forceinline__ void us_down_multiply(const struct us_down_page *p, float *y) {
  float acc[4] = {};
  us_down_page_sums(p, acc);
  y[0] = __fmaf_rn(p->weight.x, acc[0], y[0]), y[1] = __fmaf_rn(p->weight.y, acc[1], y[1]);
  y[2] = __fmaf_rn(p->weight.x, acc[2], y[2]), y[3] = __fmaf_rn(p->weight.y, acc[3], y[3]);
}

/* A warp has loaded all that it needs of a stage, which is free then, before it has been multiplied. The barrier of the lanes also keeps
 * the assembler from putting loads off until they are used: eight latencies one after the other. */
static __device__ __forceinline__ void us_down_release(const struct us_engine_shared *s, uint32_t stage,
                                                       uint32_t lane, uint32_t arrivals) {
  __syncwarp();
  if (lane == 0) us_barrier_arrive_many(us_shared_address(&s->empty[stage]), arrivals);
}

/* All active experts' share of three tiles, if pages are MXFP4 of four groups: warp tile * step_slices + slice, of `working` warps,
 * has that page of every step. The others sleep: instructions are what this loop is short of. */
static __device__ __noinline__ float4 us_engine_down_whole(struct us_engine_block *b,
                                                           const struct us_engine_op *op, uint32_t working) {
  const struct us_engine_down *d = &op->down;
  float y[4] = {};
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = us_engine_shared_base(b),
           slices = d->step_slices;
  uint32_t page = base + warp * d->w.page_bytes, inner = base + warp % slices * 256 + lane % 4 * 16;
  uint32_t run = slices * d->w.page_bytes, apart = warp / slices * run;
  uint32_t arrivals = warp ? 1 : 1 + US_ENGINE_COMPUTE_WARPS - working, count;
  struct us_down_lane at = us_down_lane(base, lane);
#pragma unroll 1
  do {
    us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
    uint4 tell = us_shared_load16(base + (uint32_t)offsetof(struct us_engine_shared, down) + c.stage * 16);
    uint32_t slot = tell.x & 0xffffu, next = tell.x >> 16, from = page + c.stage * US_ENGINE_STAGE_BYTES;
    count = tell.y;
    bool joined = count & US_DOWN_JOINED;
    uint32_t stride = slices * (joined ? 512 : 256) + US_DOWN_PAD;
    if (joined) from += apart;
    uint32_t rows = inner + us_down_lane_rows(at.pair + slot * 16, tell.z, stride);
    struct us_down_page p;
    us_down_load(&p, from, rows, at.weight + slot * 32, lane);
    if (count & 2) {
      uint32_t rows2 = inner + us_down_lane_rows(at.pair + next * 16, tell.w, stride);
      __syncwarp();
      us_down_multiply(&p, y);
      us_down_load(&p, from + (joined ? run : US_DOWN_TILES * run), rows2, at.weight + next * 32, lane);
    }
    us_down_release(s, c.stage, lane, arrivals);
    us_down_multiply(&p, y);
    us_engine_advance(&c);
  } while (!(count & US_DOWN_LAST));
  b->stage = c.stage, b->phase = c.phase;
  return make_float4(y[0], y[1], y[2], y[3]);
}

/* All active experts' share of three tiles, pages of any kind: warp w has group w % groups of slice w / groups of every step. */
template <int FORMAT>
static __device__ __forceinline__ void us_engine_down_experts(struct us_engine_block *b,
                                                              const struct us_engine_op *op, uint32_t tiles,
                                                              float *y) {
  const struct us_engine_down *d = &op->down;
  struct us_engine_shared *s = us_engine_shared_of(b);
  const uint8_t *ring = s->ring[0];
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, base = us_engine_shared_base(b),
           groups = d->w.groups;
  uint32_t run = d->step_slices * d->w.page_bytes, rows_bytes = d->step_slices * groups * 64, count;
  uint32_t q = warp % groups, offset = warp / groups * d->w.page_bytes, inner = warp * 64 + lane % 4 * 16;
  bool working = warp < d->step_slices * groups;
  struct us_down_lane at = us_down_lane(base, lane);
#pragma unroll 1
  do {
    us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
    uint4 tell = us_shared_load16(base + (uint32_t)offsetof(struct us_engine_shared, down) + c.stage * 16);
    count = tell.y;
    bool joined = count & US_DOWN_JOINED;
    uint32_t stride = (joined ? 2 : 1) * rows_bytes + US_DOWN_PAD;
#pragma unroll 1
    for (uint32_t k = 0; working && k < (count & 3); k++) {
      uint32_t slot = k ? tell.x >> 16 : tell.x & 0xffffu;
      float2 weight = us_down_weight(at.weight + slot * 32);
      uint4 rows = us_shared_load16(base + inner +
                                    us_down_lane_rows(at.pair + slot * 16, k ? tell.w : tell.z, stride));
      const uint8_t *page =
          ring + c.stage * US_ENGINE_STAGE_BYTES + k * (joined ? run : US_DOWN_TILES * run) + offset;
      us_engine_down_step<FORMAT>(page, joined ? 2 * run : run, groups, q, lane, tiles, weight, rows, y);
    }
    us_engine_release(s, c, lane);
    us_engine_advance(&c);
  } while (!(count & US_DOWN_LAST));
  b->stage = c.stage, b->phase = c.phase;
}

/* Add the warps' sums in order, and push the block's columns. whole: a tile's sums are those of `slices` warps. */
static __device__ void us_engine_down_out(struct us_engine_block *b, const struct us_engine_down *d,
                                          uint32_t group, uint32_t tiles, bool whole, const float *y) {
  float4 *sums = (float4 *)us_engine_scratch(b); /* (tile, warp, lane) */
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32,
           each = whole ? d->step_slices : US_ENGINE_COMPUTE_WARPS;
  us_engine_drain(b);
  us_engine_meet();
  const struct us_engine_block *worked = &us_engine_shared_of(b)->warp[0];
  b->stage = worked->stage, b->phase = worked->phase; /* warps that slept */
#pragma unroll
  for (int t = 0; t < US_DOWN_TILES; t++)
    if (!whole || !t)
      sums[(t * US_ENGINE_COMPUTE_WARPS + warp) * 32 + lane] =
          make_float4(y[4 * t], y[4 * t + 1], y[4 * t + 2], y[4 * t + 3]);
  us_engine_meet();
  if (warp < tiles) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (uint32_t w = 0; w < each; w++) {
      float4 v = sums[(warp * each + w) * 32 + lane];
      sum.x = __fadd_rn(sum.x, v.x), sum.y = __fadd_rn(sum.y, v.y);
      sum.z = __fadd_rn(sum.z, v.z), sum.w = __fadd_rn(sum.w, v.w);
    }
    us_engine_push(b, d->exchange, b->rank->rank, (group * US_DOWN_TILES + warp) * 16, lane, sum);
  }
}

static __device__ __noinline__ void us_engine_down_compute(struct us_engine_block *b,
                                                           const struct us_engine_op *op) {
  const struct us_engine_down *d = &op->down;
  /* What rows have of an expert they do not use; nothing since the last barrier of a vector operation has touched it. */
  if (threadIdx.x < US_DOWN_ZEROS / 16)
    ((uint4 *)us_engine_shared_of(b)->scratch)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  uint32_t groups = us_engine_down_groups(d), first = us_engine_first_item(b, op->shift);
  if (first < groups && us_engine_shared_of(b)->active.count)
    us_engine_meet(); /* the last stage is full when the pairs' thread has waited */
  else
    us_engine_wait_done(b, op->wait);
  bool whole = d->w.format == US_FORMAT_MXFP4 && d->w.groups == 4;
  for (uint32_t group = first; group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group);
    float y[4 * US_DOWN_TILES] = {};
    uint32_t working = tiles * d->step_slices, warp = threadIdx.x / 32;
    if (us_engine_shared_of(b)->active.count && !(whole && warp >= working)) {
      if (whole) {
        float4 sums = us_engine_down_whole(b, op, working);
        y[0] = sums.x, y[1] = sums.y, y[2] = sums.z, y[3] = sums.w;
      } else if (d->w.format == US_FORMAT_MXFP4)
        us_engine_down_experts<US_FORMAT_MXFP4>(b, op, tiles, y);
      else if (d->w.format == US_FORMAT_FP8)
        us_engine_down_experts<US_FORMAT_FP8>(b, op, tiles, y);
      else
        us_engine_down_experts<US_FORMAT_BF16>(b, op, tiles, y);
    }
    us_engine_down_out(b, d, group, tiles, whole, y);
  }
  us_engine_finish(b);
}

#endif
