/* down.cuh: the experts' down projection: y[row] = sum over its experts, ascending, of routing weight * down h.
 *
 * Bound: bytes of weights from HBM. A block owns 48 output columns (three tiles of 16) and goes through all active experts, its
 * sums in registers: 6144 / 48 = 128 blocks. A step is what the warps multiply at once: step_slices pages of each tile; a
 * warp takes a page of a tile (MXFP4, four groups) or one group of 32 inner columns of all three tiles. Never a share of the experts: the
 * order of a row's sum would then depend on what other rows chose. A stage of the ring holds one or two steps and behind them the
 * activations of the rows that use their experts, which are copied there too: weights by the streaming thread as soon as the stage is free,
 * activations by the epilogue's warps once they have been computed. Rows that are not routed to an expert have zero activations and weight 0.
 *
 * Contents: one step; whole MXFP4 pages; pages of any kind, and the operation.
 */
#ifndef US_KERNELS_ENGINE_DOWN_CUH
#define US_KERNELS_ENGINE_DOWN_CUH

#include "kernels/engine/down_stream.cuh"

#define US_DOWN_PAGE 1088 /* bytes of an MXFP4 page of four groups: codes, then scales */

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

/* Where a lane looks in a stage for what it is told, from the ring's beginning on: the activations of its column of the operand, the routing
 * weights of its two columns of the sums, its warp's pages. Addresses in shared memory. */
struct us_down_lane {
  uint32_t rows, weight, pages;
};
static __device__ __forceinline__ struct us_down_lane us_down_lane(uint32_t ring, uint32_t lane,
                                                                   uint32_t tile) {
  uint32_t told = ring + US_ENGINE_DOWN_BYTES;
  struct us_down_lane at = {told + (uint32_t)offsetof(struct us_down_told, rows) + lane / 4 * 8,
                            told + (uint32_t)offsetof(struct us_down_told, weight) + lane % 4 * 16,
                            told + (uint32_t)offsetof(struct us_down_told, tile) + tile * 16};
  return at;
}

/* ---- whole MXFP4 pages -------------------------------------------------------------------------------------------- */

/* What a warp needs of one whole MXFP4 page of four groups: loaded at once, since a chain of loads is what the loop waits for. */
struct us_down_page {
  uint4 code[2], rows[4];
  float scale[4][2]; /* of a group: rows r and r + 8 */
};
/* Where this lane's share of a page lies, from the step's first page on, and that of its column's activations. */
struct us_down_offsets {
  uint32_t code, scale, rows;
};
static __device__ __forceinline__ struct us_down_offsets us_down_offsets(uint32_t lane, uint32_t slice) {
  struct us_down_offsets at = {slice * US_DOWN_PAGE + lane * 16, slice * US_DOWN_PAGE + 1024 + lane / 4 * 8,
                               slice * 256 + lane % 4 * 16};
  return at;
}
static __device__ __forceinline__ void us_down_load(struct us_down_page *p, struct us_down_offsets at,
                                                    uint32_t page, uint32_t rows) {
  p->code[0] = us_shared_load16(page + at.code), p->code[1] = us_shared_load16(page + at.code + 512);
  uint2 scales = us_shared_load8(page + at.scale);
#pragma unroll
  for (int q = 0; q < 4; q++) {
    p->rows[q] = us_shared_load16(rows + at.rows + q * 64);
    p->scale[q][0] = us_scale_at(scales.x, q), p->scale[q][1] = us_scale_at(scales.y, q);
  }
}

/* Groups 2 pair and 2 pair + 1 of a page: sums d and d + 4. Their multiplies alternate, so that none waits for the one before it. */
static __device__ __forceinline__ void us_down_pair_sums(const struct us_down_page *p, int pair, float d[8]) {
  const float zero[4] = {0, 0, 0, 0};
  uint4 w = p->code[pair], even = p->rows[2 * pair], odd = p->rows[2 * pair + 1];
  uint32_t a[4], c[4];
  us_mxfp4_fragment(w.x, a), us_mma_bf16(d, a, even.x, even.y, zero);
  us_mxfp4_fragment(w.z, c), us_mma_bf16(d + 4, c, odd.x, odd.y, zero);
  us_mxfp4_fragment(w.y, a), us_mma_bf16(d, a, even.z, even.w, d);
  us_mxfp4_fragment(w.w, c), us_mma_bf16(d + 4, c, odd.z, odd.w, d + 4);
}

/* acc += the page's columns. */
static __device__ __forceinline__ void us_down_page_sums(const struct us_down_page *p, float *acc) {
  float first[8], second[8];
  us_down_pair_sums(p, 0, first);
  us_down_pair_sums(p, 1, second);
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      acc[i] = __fmaf_rn(p->scale[q][i / 2], (q < 2 ? first : second)[q % 2 * 4 + i], acc[i]);
}

/* What a lane is told of a stage: its warp's pages, its column's activations, its two columns' weights and (SEVERAL) sums. */
struct us_down_lane_told {
  uint4 pages, weight, sums;
  uint2 rows;
};
template <bool SEVERAL>
static __device__ __forceinline__ void us_down_look(struct us_down_lane_told *t, struct us_down_lane at,
                                                    uint32_t stage) {
  stage *= US_ENGINE_STAGE_BYTES;
  t->pages = us_shared_load16(at.pages + stage), t->rows = us_shared_load8(at.rows + stage);
  t->weight = us_shared_load16(at.weight + stage);
  if (SEVERAL) t->sums = us_shared_load16(at.weight + stage + sizeof(((struct us_down_told *)0)->weight));
}

/* All active experts' share of three tiles, if pages are MXFP4 of four groups: warp tile * step_slices + slice, of `working` warps,
 * has that page of every step. The others sleep: instructions are what this loop is short of. `sums` adds a page's to those of its columns.
 * A page is loaded while the one before it is multiplied, the next stage's first behind the stage's last: a warp is then
 * done with the stage, and waits for nothing that it has not asked for long before. The barrier of the lanes keeps the assembler from
 * putting loads off until they are used: eight latencies one after the other. */
template <bool SEVERAL, class SUMS>
static __device__ __forceinline__ void us_down_stages(struct us_engine_block *b,
                                                      const struct us_engine_op *op, uint32_t working,
                                                      SUMS *sums) {
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = op->down.step_slices;
  uint32_t tile = (warp >= slices) + (warp >= 2 * slices); /* of three */
  uint32_t base = us_engine_shared_base(b), full = base + (uint32_t)offsetof(struct us_engine_shared, full),
           empty = base + (uint32_t)offsetof(struct us_engine_shared, empty);
  struct us_down_lane look = us_down_lane(base, lane, tile);
  struct us_down_offsets at = us_down_offsets(lane, warp - tile * slices);
  uint32_t arrivals = warp ? 1 : 1 + US_ENGINE_COMPUTE_WARPS - working;
  struct us_down_lane_told told;
  struct us_down_page page;
  bool last;
  us_engine_barrier_await(full + c.stage * 8, c.phase, US_ENGINE_WAIT_STAGE);
  us_down_look<SEVERAL>(&told, look, c.stage);
  us_down_load(&page, at, told.pages.x, told.rows.x);
#pragma unroll 1
  do {
    float acc[4] = {};
    bool two = told.pages.z & 2;
    uint4 weight = told.weight, places = told.sums;
    last = told.pages.z & US_DOWN_LAST;
    us_down_page_sums(&page, acc);
    sums->add(acc, weight.x, weight.y, places.x, places.y);
    us_down_load(&page, at, told.pages.y, told.rows.y);
    __syncwarp();
    if (lane == 0) us_barrier_arrive_many(empty + c.stage * 8, arrivals);
    if (!last) { /* behind the last stage a page of it is loaded again, for nothing; what it told is no more */
      us_engine_advance(&c);
      us_engine_barrier_wait_at(b, full + c.stage * 8, c.phase, US_ENGINE_WAIT_STAGE);
      us_down_look<SEVERAL>(&told, look, c.stage);
    }
    if (two) {
      float more[4] = {};
      us_down_page_sums(&page, more);
      sums->add(more, weight.z, weight.w, places.z, places.w);
      us_down_load(&page, at, told.pages.x, told.rows.x);
    } else
      us_down_load(&page, at, told.pages.x, told.rows.x);
  } while (!last);
  us_engine_advance(&c);
  b->stage = c.stage, b->phase = c.phase;
}

/* Sums of one row tile, in registers: y += routing weight * the page's. */
struct us_down_registers {
  float y[4];
  __device__ __forceinline__ void add(const float *acc, uint32_t even, uint32_t odd, uint32_t, uint32_t) {
    y[0] = __fmaf_rn(__uint_as_float(even), acc[0], y[0]),
    y[1] = __fmaf_rn(__uint_as_float(odd), acc[1], y[1]);
    y[2] = __fmaf_rn(__uint_as_float(even), acc[2], y[2]),
    y[3] = __fmaf_rn(__uint_as_float(odd), acc[3], y[3]);
  }
};
static __device__ __noinline__ float4 us_engine_down_whole(uint32_t working) {
  struct us_engine_block *b = us_engine_self();
  struct us_down_registers sums = {};
  us_down_stages<false>(b, us_engine_fetched_op(b), working, &sums);
  return make_float4(sums.y[0], sums.y[1], sums.y[2], sums.y[3]);
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
  struct us_down_lane told = us_down_lane(base, lane, 0);
#pragma unroll 1
  do {
    us_engine_barrier_wait(b, &s->full[c.stage], c.phase, US_ENGINE_WAIT_STAGE);
    uint32_t stage = c.stage * US_ENGINE_STAGE_BYTES;
    uint4 pages = us_shared_load16(told.pages + stage), weight = us_shared_load16(told.weight + stage);
    uint2 rows = us_shared_load8(told.rows + stage);
    uint32_t apart = us_shared_load8(told.pages + stage + 16).x - pages.x; /* of tiles */
    count = pages.z;
#pragma unroll 1
    for (uint32_t k = 0; working && k < (count & 3); k++) {
      const uint8_t *page = s->ring[0] + ((k ? pages.y : pages.x) - base + offset);
      us_engine_down_step<FORMAT>(
          page, apart, groups, q, lane, tiles,
          make_float2(__uint_as_float(k ? weight.z : weight.x), __uint_as_float(k ? weight.w : weight.y)),
          us_shared_load16((k ? rows.y : rows.x) + inner), y);
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
  /* What rows have of an expert they do not use; nothing since the last barrier of a vector operation has touched it. */
  if (threadIdx.x < US_DOWN_ZEROS / 16)
    ((uint4 *)us_engine_shared_of(b)->scratch)[threadIdx.x] = make_uint4(0, 0, 0, 0);
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
    us_engine_down_out(b, d, group, tiles, whole, y);
  }
  us_engine_finish(b);
}

#endif
