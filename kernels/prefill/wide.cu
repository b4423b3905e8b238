/* wide.cu: projections: 128 weight rows x 128 rows a block, on the warpgroup's multiply of Hopper.
 *
 * Weights are decoded from pages into registers, rows come by the tensor copy engine in the swizzled order that wgmma reads. Two
 * warpgroups take turns: while one decodes and scales, the other multiplies.
 *
 * Bound: 128 columns of FP8 are 48 KB from L2 for 1024 cycles of multiplies, twice what L2 delivers to every processor at once.
 */
#include "kernels/gpu/launch.cuh"
#include "kernels/prefill/fragment.cuh"
#include "kernels/prefill/gemm_store.cuh"
#include "kernels/prefill/wgmma.cuh"

#define WARPS 8
#define SLOTS 4

/* A page's columns of the rows in shared memory: boxes of 64 columns (32 if a page has no more), each (rows, 128 or 64 bytes). */
template <int GROUPS, int TILES> struct rows_layout {
  static constexpr int columns = GROUPS * 32 < 64 ? 32 : 64, boxes = GROUPS * 32 / columns;
  static constexpr int swizzle = columns * 2; /* bytes: also of a box's row */
  static constexpr uint32_t box_bytes = TILES * 8 * swizzle, bytes = boxes * box_bytes;
  /* Of the i-th 16 columns. */
  static constexpr __host__ __device__ uint32_t offset(int i) {
    return i * 16 / columns * box_bytes + i * 16 % columns * 2;
  }
};

/* ---- loading ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap *map, uint32_t column,
                                                uint32_t row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
               "{%2, %3}], [%4];" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

/* One of the loading warps: pages by its lanes, rows by the first. */
template <int HALVES, int GROUPS, int TILES>
static __device__ void load(const struct gemm_args *a, const CUtensorMap *map, struct gemm_shared *s,
                            uint32_t ring, int lane) {
  using Rows = rows_layout<GROUPS, TILES>;
  constexpr int PAGES = SLOTS * 2 / HALVES;
  const uint32_t page_bytes = a->g.w.page_bytes;
  struct gemm_cursor c = {0, 0};
  uint32_t items = item_count(a);
  for (uint32_t i = blockIdx.x; i < items; i += gridDim.x) {
    struct gemm_item item = item_at<TILES * 8>(a, i, items);
    struct page_share pages = share_pages<HALVES, PAGES, PAGES>(a, &item, 0, lane);
    uint32_t column = item.part * a->part_slices * GROUPS * 32;
    for (uint32_t slice = 0; slice < a->part_slices; slice++, pages.from += page_bytes) {
      uint32_t full = us_shared_address(&s->full[c.stage]), at = ring + c.stage * a->stage_bytes;
      us_barrier_wait(us_shared_address(&s->empty[c.stage]), c.phase ^ 1);
      if (lane == 0) {
        us_barrier_expect(full, pages.lanes * page_bytes + Rows::bytes);
#pragma unroll
        for (int b = 0; b < Rows::boxes; b++, column += Rows::columns)
          load_box(at + b * Rows::box_bytes, map, column, item.first, full);
      }
      __syncwarp();
      if (lane < pages.lanes) us_bulk_load(at + Rows::bytes + pages.to, pages.from, page_bytes, full);
      advance(&c, a->stages);
    }
  }
}

/* ---- multiplying ------------------------------------------------------------------------------------------------- */

/* acc += a half of a page x the tile's rows. All warps of a warpgroup. */
template <int FORMAT, int HALVES, int TILES>
static __device__ __forceinline__ void multiply_half(const uint8_t *pages, uint32_t page_bytes, int h,
                                                     uint32_t rows, int lane, float acc[TILES][4]) {
  constexpr int GROUPS = us_prefill_most<FORMAT, HALVES>::groups;
  using Rows = rows_layout<GROUPS, TILES>;
  constexpr int CHAIN = FORMAT == US_FORMAT_MXFP4 ? 2 : 2 * GROUPS; /* multiplies that share a scale */
  uint64_t b = us_wgmma_descriptor(rows, Rows::swizzle);
  uint32_t a[2 * GROUPS][4], scale[2];
  float d[TILES][4];
  us_prefill_load_half<FORMAT, HALVES>(pages, page_bytes, h, lane, a, scale);
#pragma unroll
  for (int first = 0; first < 2 * GROUPS; first += CHAIN) {
    us_wgmma_hold<TILES>(d);
    us_wgmma_fence();
#pragma unroll
    for (int i = first; i < first + CHAIN; i++)
      us_wgmma<TILES>(d, a[i], b + (Rows::offset(i) >> 4), i > first);
    us_wgmma_wait<TILES>(d);
    float low = __uint_as_float(scale[0]), high = __uint_as_float(scale[1]);
    if (FORMAT == US_FORMAT_MXFP4)
      low = us_prefill_scale(scale[0], first / 2), high = us_prefill_scale(scale[1], first / 2);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        acc[t][c] = us_prefill_format<FORMAT>::scaled ? __fmaf_rn(c < 2 ? low : high, d[t][c], acc[t][c])
                                                      : __fadd_rn(acc[t][c], d[t][c]);
  }
}

/* Gates are the first warpgroup's, ups the second's: a warp hands its ups to the warp with the gates of the same rows. */
template <int TILES>
static __device__ __forceinline__ void store_halves(const struct gemm_args *a, const struct gemm_item *item,
                                                    uint32_t column, float undo, int warp, int lane,
                                                    uint8_t *patches, const float acc[TILES][4]) {
  uint32_t tiles = (item->rows + 7) / 8;
  float4 *ups = (float4 *)(patches + (warp % 4 + 4) * PATCH_BYTES); /* (2, 32): by turns */
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    if (t >= tiles) break;
    if (warp >= 4) ups[t % 2 * 32 + lane] = make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
    asm volatile("bar.sync %0, 64;" ::"r"(1 + warp % 4) : "memory");
    if (warp >= 4) continue;
    float4 v = ups[t % 2 * 32 + lane];
    const float up[4] = {v.x, v.y, v.z, v.w};
    store_gated(a, item, t, column, undo, lane, (float *)(patches + warp * PATCH_BYTES), acc[t], up);
  }
}

/* Warp: 16 weight rows, half warp / 4 of slot warp % 4. */
template <int FORMAT, int HALVES, int TILES>
static __device__ void consume(const struct gemm_args *a, struct gemm_shared *s, const uint8_t *ring,
                               uint8_t *patches, int warp, int lane) {
  constexpr float undo = us_prefill_format<FORMAT>::undo;
  using Rows = rows_layout<us_prefill_most<FORMAT, HALVES>::groups, TILES>;
  const struct us_engine_matrix w = a->g.w;
  const uint8_t *pages = ring + Rows::bytes + warp % 4 * a->slot_bytes;
  const uint32_t rows = us_shared_address(ring);
  float *patch = (float *)(patches + warp * PATCH_BYTES);
  struct gemm_cursor c = {0, 0};
  uint32_t items = item_count(a);
  for (uint32_t i = blockIdx.x; i < items; i += gridDim.x) {
    struct gemm_item item = item_at<TILES * 8>(a, i, items);
    uint32_t tiles = (item.rows + 7) / 8, column = (item.block * 4 + warp % 4) * 32;
    float acc[TILES][4] = {};
    for (uint32_t slice = 0; slice < a->part_slices; slice++) {
      us_barrier_wait(us_shared_address(&s->full[c.stage]), c.phase);
      uint32_t offset = c.stage * a->stage_bytes;
      multiply_half<FORMAT, HALVES, TILES>(pages + offset, w.page_bytes, warp / 4, rows + offset, lane, acc);
      release(s, &c, a->stages, lane);
    }
    if (a->g.opt_swiglu) {
      store_halves<TILES>(a, &item, column, undo, warp, lane, patches, acc);
      continue;
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
      if (t < tiles && column < w.tiles * 16 * HALVES)
        store_sums(a, &item, t, row_of(a, &item, t, lane), column + warp / 4 * 16, undo, lane, patch, acc[t]);
  }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* Shared memory: [stages: rows, pages][warps' patches]; swizzled rows want 1024-byte alignment. */
template <int FORMAT, int HALVES, int TILES>
static __global__ void __launch_bounds__((WARPS + LOADERS) * 32, 1)
    prefill_wide(const __grid_constant__ struct gemm_args a, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ struct gemm_shared s;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  init_ring(&s, a.stages, 1, WARPS);
  if (warp >= WARPS) {
    set_registers<72, false>();
    if (warp == WARPS)
      load<HALVES, us_prefill_most<FORMAT, HALVES>::groups, TILES>(&a, &map, &s, us_shared_address(ring),
                                                                   lane);
  } else {
    set_registers<216, true>();
    consume<FORMAT, HALVES, TILES>(&a, &s, ring, ring + a.stages * a.stage_bytes, warp, lane);
  }
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

/* The rows as the copy engine wants them described; rows past the last read as zeros. */
static cudaError_t describe_rows(const struct us_prefill_gemm *g, uint32_t columns, uint32_t tile_rows,
                                 CUtensorMap *map) {
  struct us_tensor rows = {g->x,
                           CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                           2,
                           {g->w.slices * g->w.groups * 32u, g->rows},
                           {(cuuint64_t)g->x_stride * 2},
                           {columns, tile_rows},
                           columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B};
  return us_tensor_describe(&rows, map);
}

template <int FORMAT, int HALVES, int TILES>
static cudaError_t launch(struct gemm_args *a, cudaStream_t stream) {
  using Rows = rows_layout<us_prefill_most<FORMAT, HALVES>::groups, TILES>;
  auto kernel = prefill_wide<FORMAT, HALVES, TILES>;
  const struct us_engine_matrix *w = &a->g.w;
  a->slot_bytes = (w->page_bytes * (2 / HALVES) + 127) / 128 * 128;
  a->stage_bytes = (Rows::bytes + SLOTS * a->slot_bytes + 1023) / 1024 * 1024;
  a->stages = (SHARED_BYTES - WARPS * PATCH_BYTES - sizeof(struct gemm_shared)) / a->stage_bytes;
  if (a->stages > MAX_STAGES) a->stages = MAX_STAGES;
  a->row_tiles = (a->g.rows + TILES * 8 - 1) / (TILES * 8);
  a->blocks = (w->tiles * HALVES + SLOTS * 2 - 1) / (SLOTS * 2);
  uint32_t bytes = WARPS * PATCH_BYTES + a->stages * a->stage_bytes, grid,
           items = a->row_tiles * a->blocks * a->g.parts;
  CUtensorMap map;
  cudaError_t status = us_processors(&grid);
  if (status == cudaSuccess && items) status = describe_rows(&a->g, Rows::columns, TILES * 8, &map);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess || !items) return status;
  if (items < grid) grid = items;
  kernel<<<grid, (WARPS + LOADERS) * 32, bytes, stream>>>(*a, map);
  return cudaGetLastError();
}

template <int FORMAT, int HALVES> static cudaError_t choose(struct gemm_args *a, cudaStream_t stream) {
  return a->g.rows <= 32 ? launch<FORMAT, HALVES, 4>(a, stream) : launch<FORMAT, HALVES, 16>(a, stream);
}

cudaError_t us_prefill_wide(struct gemm_args *a, cudaStream_t stream) {
  bool two = a->g.w.halves == 2;
  switch (a->g.w.format) {
  case US_FORMAT_MXFP4:
    return two ? choose<US_FORMAT_MXFP4, 2>(a, stream) : choose<US_FORMAT_MXFP4, 1>(a, stream);
  case US_FORMAT_FP8:
    return two ? choose<US_FORMAT_FP8, 2>(a, stream) : choose<US_FORMAT_FP8, 1>(a, stream);
  case US_FORMAT_BF16:
    return two ? choose<US_FORMAT_BF16, 2>(a, stream) : choose<US_FORMAT_BF16, 1>(a, stream);
  }
  return cudaErrorInvalidValue;
}
