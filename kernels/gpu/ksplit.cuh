/* ksplit.cuh: 8 token rows times streamed weight pages, K split over the warps of a block.
 *
 * Bound: bytes of pages from HBM. A warp keeps its K slice of the activations in registers for the whole launch and has its
 * own ring of pages in shared memory: lane 0 issues the next bulk copy when the warp is done with a page, no producer warp
 * and no "empty" barrier. Tiles (16 or 32 weight rows) go round robin over the blocks and across matrices without a stop.
 * The warps' partial sums meet in shared memory and are added in warp order, whatever the grid: a fixed order per shape.
 */
#ifndef US_KERNELS_GPU_KSPLIT_CUH
#define US_KERNELS_GPU_KSPLIT_CUH

#include "kernels/gpu/async.cuh"
#include "kernels/gpu/mma.cuh"
#include "kernels/gpu/rows.cuh"
#include "kernels/pages/pages.h"

/* What a launch streams: `matrices` times `tiles` tiles of W pages. */
struct us_ksplit_work {
  const uint8_t *pages;
  uint64_t matrix_bytes;     /* from one matrix to the next */
  const uint32_t *opt_index; /* which matrix is the i-th; NULL: the i-th */
  uint32_t matrices, tiles;
  const uint4 *rows; /* activations, rows.cuh: [K / 32][32 lanes] */
};

/* A tile: its place in the work list, and where its pages are. */
struct us_ksplit_cursor {
  uint32_t matrix, tile;
};

__device__ __forceinline__ void us_ksplit_advance(struct us_ksplit_cursor *c, uint32_t tiles, uint32_t step) {
  c->tile += step;
  while (c->tile >= tiles) c->tile -= tiles, c->matrix++;
}

/* Pages of MXFP4: HALVES x 16 rows, GROUPS x 32 columns. acc[4 h + c] as us_mma_f16's d, in units of
 * US_PAGES_MXFP4_UNIT * US_PAGES_SCALE_UNIT. */
template <int HALVES, int GROUPS> struct us_mxfp4_page {
  static constexpr int rows = HALVES, groups = GROUPS;
  static constexpr int code_bytes = HALVES * GROUPS * 256, bytes = code_bytes + HALVES * GROUPS * 16;
  static_assert(HALVES == 2 && GROUPS % 4 == 0, "a chunk is one group of both halves");

  template <int J> static __device__ __forceinline__ void group(uint4 w, uint4 b, uint4 scales, float *acc) {
    const float zero[4] = {0, 0, 0, 0};
    float d0[4], d1[4];
    uint32_t a[4];
    us_mxfp4_fragment(w.x, a);
    us_mma_f16(d0, a, b.x, b.y, zero);
    us_mxfp4_fragment(w.z, a);
    us_mma_f16(d1, a, b.x, b.y, zero);
    us_mxfp4_fragment(w.y, a);
    us_mma_f16(d0, a, b.z, b.w, d0);
    us_mxfp4_fragment(w.w, a);
    us_mma_f16(d1, a, b.z, b.w, d1);
    float s0 = us_scale_float<J>(scales.x), s1 = us_scale_float<J>(scales.y);
    float s2 = us_scale_float<J>(scales.z), s3 = us_scale_float<J>(scales.w);
    acc[0] = __fmaf_rn(s0, d0[0], acc[0]), acc[1] = __fmaf_rn(s0, d0[1], acc[1]);
    acc[2] = __fmaf_rn(s1, d0[2], acc[2]), acc[3] = __fmaf_rn(s1, d0[3], acc[3]);
    acc[4] = __fmaf_rn(s2, d1[0], acc[4]), acc[5] = __fmaf_rn(s2, d1[1], acc[5]);
    acc[6] = __fmaf_rn(s3, d1[2], acc[6]), acc[7] = __fmaf_rn(s3, d1[3], acc[7]);
  }

  static __device__ __forceinline__ void multiply(const uint8_t *page, int lane, const uint4 *b, float *acc) {
    const uint4 *codes = (const uint4 *)page + lane;
    const uint4 *tail = (const uint4 *)(page + code_bytes) + lane / 4 * (GROUPS / 4);
#pragma unroll
    for (int q = 0; q < GROUPS / 4; q++) {
      uint4 scales = tail[q];
      group<0>(codes[(4 * q + 0) * 32], b[4 * q + 0], scales, acc);
      group<1>(codes[(4 * q + 1) * 32], b[4 * q + 1], scales, acc);
      group<2>(codes[(4 * q + 2) * 32], b[4 * q + 2], scales, acc);
      group<3>(codes[(4 * q + 3) * 32], b[4 * q + 3], scales, acc);
    }
  }
};

/* Pages of FP8: 16 rows, GROUPS x 32 columns, a float scale for every 128. In units of US_PAGES_FP8_UNIT. */
template <int GROUPS> struct us_fp8_page {
  static constexpr int rows = 1, groups = GROUPS;
  static constexpr int code_bytes = GROUPS * 512, bytes = code_bytes + (GROUPS / 4 * 4 + 15) / 16 * 16;
  static_assert(GROUPS % 4 == 0, "whole blocks of 128 columns");

  static __device__ __forceinline__ void multiply(const uint8_t *page, int lane, const uint4 *b, float *acc) {
    const uint4 *codes = (const uint4 *)page + lane;
    const float *tail = (const float *)(page + code_bytes);
#pragma unroll
    for (int q = 0; q < GROUPS / 4; q++) {
      float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#pragma unroll
      for (int g = 4 * q; g < 4 * q + 4; g++) {
        uint4 w = codes[g * 32];
        uint32_t a[4];
        us_fp8_fragment(w.x, a);
        us_fp8_fragment(w.y, a + 2);
        us_mma_f16(even, a, b[g].x, b[g].y, even);
        us_fp8_fragment(w.z, a);
        us_fp8_fragment(w.w, a + 2);
        us_mma_f16(odd, a, b[g].z, b[g].w, odd);
      }
#pragma unroll
      for (int c = 0; c < 4; c++) acc[c] = __fmaf_rn(tail[q], __fadd_rn(even[c], odd[c]), acc[c]);
    }
  }
};

/* Partial sums of a warp in shared memory: the second half starts 16 banks after the first, so that the reader's lanes,
 * which take both halves of an element side by side, hit 32 different banks. */
#define US_KSPLIT_HALF 144

template <class Page, int WARPS> struct us_ksplit_shared {
  static constexpr int partial_floats = Page::rows * US_KSPLIT_HALF;
  static constexpr int partial_bytes = WARPS * partial_floats * 4;
  static constexpr int bytes(int stages) { return partial_bytes + WARPS * stages * Page::bytes; }
};

/* Sum of the warps' partials of element `index` of half `half`, in warp order. */
template <class Page, int WARPS>
__device__ __forceinline__ float us_ksplit_sum(const float *partial, int half, int index) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++)
    sum = __fadd_rn(
        sum, partial[w * us_ksplit_shared<Page, WARPS>::partial_floats + half * US_KSPLIT_HALF + index]);
  return sum;
}

/* The kernel. Epilogue, called by whole warps: float undo(token) once; int prepare(token, cursor) before a tile, so that what
 * it reads from memory is there in time; void store(value, half, row, token, cursor, prepared) with the sum times undo.
 * Threads 2i and 2i + 1 hold both halves of one element if there are two. RESIDENT reads the first pages again and again: how fast the
 * SM multiplies what already is in shared memory (the results are meaningless). */
template <class Page, int WARPS, int STAGES, class Epilogue, bool RESIDENT>
__global__ void __launch_bounds__(WARPS * 32, 1) us_ksplit(struct us_ksplit_work work, Epilogue epilogue) {
  using Shared = us_ksplit_shared<Page, WARPS>;
  static_assert(WARPS * 32 >= Page::rows * 128, "one thread an output");
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(8) uint64_t full[WARPS][STAGES];
  float *partial = (float *)shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t *ring = shared + Shared::partial_bytes + (size_t)warp * STAGES * Page::bytes;
  uint32_t ring_address = us_shared_address(ring), barrier = us_shared_address(full[warp]);
  if (lane == 0)
    for (int s = 0; s < STAGES; s++) us_barrier_init(barrier + 8 * s, 1);
  us_barrier_init_fence();
  __syncthreads();

  uint4 b[Page::groups];
#pragma unroll
  for (int g = 0; g < Page::groups; g++) b[g] = work.rows[(warp * Page::groups + g) * 32 + lane];

  /* The address of the next page to fetch is known one issue ahead: its index load is off the critical path. */
  struct us_ksplit_cursor next = {0, 0}, at = {0, 0};
  us_ksplit_advance(&next, work.tiles, blockIdx.x);
  us_ksplit_advance(&at, work.tiles, blockIdx.x);
  const uint8_t *source = NULL;
  auto locate = [&]() {
    if (next.matrix >= work.matrices) return;
    uint32_t matrix = work.opt_index ? __ldg(work.opt_index + next.matrix) : next.matrix;
    source = work.pages + matrix * work.matrix_bytes + (uint64_t)(next.tile * WARPS + warp) * Page::bytes;
  };
  auto issue = [&](int s, bool fetch) {
    if (next.matrix >= work.matrices) return;
    if (fetch) {
      us_barrier_expect(barrier + 8 * s, Page::bytes);
      us_bulk_load(ring_address + s * Page::bytes, source, Page::bytes, barrier + 8 * s);
    } else {
      us_barrier_arrive(barrier + 8 * s);
    }
    us_ksplit_advance(&next, work.tiles, gridDim.x);
    if (fetch) locate();
  };
  if (lane == 0) {
    locate();
    for (int s = 0; s < STAGES; s++) issue(s, true);
  }

  int half = threadIdx.x % Page::rows, index = threadIdx.x / Page::rows, stage = 0;
  int row = index / 16 + index % 4 / 2 * 8, token = index / 4 % 4 * 2 + index % 2;
  float undo = epilogue.undo(token);
  uint32_t phase = 0;
  for (; at.matrix < work.matrices; us_ksplit_advance(&at, work.tiles, gridDim.x)) {
    float acc[4 * Page::rows] = {};
    int prepared = epilogue.prepare(token, at);
    us_barrier_wait(barrier + 8 * stage, phase);
    Page::multiply(ring + stage * Page::bytes, lane, b, acc);
    __syncwarp();
    if (lane == 0) issue(stage, !RESIDENT);
    if (++stage == STAGES) stage = 0, phase ^= 1;

    float4 *mine = (float4 *)(partial + warp * Shared::partial_floats);
#pragma unroll
    for (int h = 0; h < Page::rows; h++)
      mine[h * (US_KSPLIT_HALF / 4) + lane] =
          make_float4(acc[4 * h], acc[4 * h + 1], acc[4 * h + 2], acc[4 * h + 3]);
    __syncthreads();
    float sum = index < 128 ? us_ksplit_sum<Page, WARPS>(partial, half, index) : 0;
    __syncthreads();
    if (index < 128) epilogue.store(sum * undo, half, row, token, at, prepared);
  }
}

#endif
