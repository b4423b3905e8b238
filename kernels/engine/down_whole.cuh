/* down_whole.cuh: the experts' down projection of whole MXFP4 pages (four groups of 32 columns), which the compute warps share out.
 *
 *     us_down_stages<false>(b, op, working, &sums);      // warps below `working`: every page of their place in a step is added to `sums`
 *
 * Warp tile * step_slices + slice has that page of every step, and adds to its columns' sums in the order of the experts.
 *
 * Bound: instructions, and what they wait for: 12 of 16 warps work where an expert's row is four pages, and a warp issues one instruction in
 * five cycles. So a page is loaded while the one before it is multiplied, and nothing that is looked up is moved from register to register.
 */
#ifndef US_KERNELS_ENGINE_DOWN_WHOLE_CUH
#define US_KERNELS_ENGINE_DOWN_WHOLE_CUH

#include "kernels/engine/down_stream.cuh"

#define US_DOWN_PAGE 1088 /* bytes of an MXFP4 page of four groups: codes, then scales */

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

/* Groups 2 pair and 2 pair + 1 of a page: sums d and d + 4. Written alternately; the assembler puts a group's two multiplies one behind the
 * other all the same, 24 cycles apart, and no barrier of the lanes between them keeps it from that. */
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

/* What a lane is told of a stage: its warp's pages, its column's activations; its two columns' weights and (SEVERAL) sums. */
struct us_down_lane_pages {
  uint4 pages;
  uint2 rows;
};
struct us_down_lane_columns {
  uint4 weight, sums;
};
static __device__ __forceinline__ void us_down_look(struct us_down_lane_pages *t, struct us_down_lane at,
                                                    uint32_t stage) {
  t->pages = us_shared_load16(at.pages + stage * at.apart);
  t->rows = us_shared_load8(at.rows + stage * at.apart);
}
template <bool SEVERAL>
static __device__ __forceinline__ void us_down_look_columns(struct us_down_lane_columns *t,
                                                            struct us_down_lane at, uint32_t stage) {
  uint32_t weight = at.weight + stage * at.apart;
  t->weight = us_shared_load16(weight);
  if (SEVERAL) t->sums = us_shared_load16(weight + sizeof(((struct us_down_told *)0)->weight));
}

/* All active experts' share of three tiles; the other warps sleep, and warp 0 arrives for them. `sums` adds a page's to those of its columns.
 * The next stage's first page is loaded behind this one's last: a warp is then done with the stage, and waits for nothing that it has not
 * asked for long before. The barrier of the lanes keeps the assembler from putting loads off until they are used: eight latencies one after
 * the other. Behind the last stage there is no next one. */
template <bool SEVERAL, class SUMS>
static __device__ __forceinline__ void us_down_stages(struct us_engine_block *b,
                                                      const struct us_engine_op *op, uint32_t working,
                                                      SUMS *sums) {
  struct us_engine_cursor c = {b->stage, b->phase};
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = op->down.step_slices;
  uint32_t tile = (warp >= slices) + (warp >= 2 * slices); /* of three */
  uint32_t base = us_engine_shared_base(b), full = base + (uint32_t)offsetof(struct us_engine_shared, full),
           empty = base + (uint32_t)offsetof(struct us_engine_shared, empty);
  struct us_down_lane look = us_down_lane<SEVERAL>(base, lane, tile);
  struct us_down_offsets at = us_down_offsets(lane, warp - tile * slices);
  uint32_t arrivals = warp ? 1 : 1 + US_ENGINE_COMPUTE_WARPS - working;
  struct us_down_lane_pages told;
  struct us_down_lane_columns columns;
  struct us_down_page page;
  bool last;
  us_engine_barrier_await(full + c.stage * 8, c.phase, US_ENGINE_WAIT_STAGE);
  us_down_look(&told, look, c.stage);
  us_down_look_columns<SEVERAL>(&columns, look, c.stage);
  us_down_load(&page, at, told.pages.x, told.rows.x);
#pragma unroll 1
  do {
    float acc[4] = {}, more[4] = {};
    bool two = told.pages.z & 2;
    last = told.pages.z & US_DOWN_LAST;
    us_down_page_sums(&page, acc);
    sums->add(acc, columns.weight.x, columns.weight.y, columns.sums.x, columns.sums.y);
    us_down_load(&page, at, told.pages.y, told.rows.y);
    __syncwarp();
    if (lane == 0) us_barrier_arrive_many(empty + c.stage * 8, arrivals);
    us_engine_advance(&c);
    if (!last) {
      us_engine_barrier_wait_at(b, full + c.stage * 8, c.phase, US_ENGINE_WAIT_STAGE);
      us_down_look(&told, look, c.stage);
    }
    if (two) {
      us_down_page_sums(&page, more);
      sums->add(more, columns.weight.z, columns.weight.w, columns.sums.z, columns.sums.w);
    }
    if (!last) {
      us_down_look_columns<SEVERAL>(&columns, look, c.stage);
      us_down_load(&page, at, told.pages.x, told.rows.x);
    }
  } while (!last);
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

#endif
