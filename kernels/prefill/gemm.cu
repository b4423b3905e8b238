/* gemm.cu: up to 2048 rows times weight pages on tensor cores: the choice of a kernel, and the narrow one.
 *
 * Weights are the 16-row operand, straight from pages; rows the 8-column operand. A loading warpgroup keeps a ring of both ahead,
 * across items. K runs in ascending order in one accumulator: the tensor cores, which truncate, only add within a page (MXFP4, FP32:
 * a group of 32 columns), the rest is added in FP32.
 *
 * Narrow: 16 warps of 32 weight rows, mma.sync; for experts (about 11 rows each in a chunk of 512), FP32 weights and odd pages. A row
 * comes 16 bytes at a time as core matrices (8 rows x 8 columns, 128 bytes and 16 of padding, so that consecutive columns of a row
 * hit different banks). Bound: about 80 issue slots, 84 of the integer pipe, for 544 bytes of MXFP4 and 16 rows: 6 TB/s at full issue.
 * Figures: docs/perf.md.
 */
#include "kernels/gpu/launch.cuh"
#include "kernels/prefill/fragment.cuh"
#include "kernels/prefill/gemm_store.cuh"

#define CORE_BYTES  144 /* of a core matrix */
#define GROUP_BYTES (4 * CORE_BYTES)

/* ---- loading ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void copy_16(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* Lane of a copy: 16 bytes of a row, a row's side by side; `each` rows a copy. */
struct row_share {
  uint32_t each, row, chunk;
};
static __device__ __forceinline__ struct row_share share_rows(uint32_t groups, int lane) {
  uint32_t chunks = groups * 4, each = groups == 1 ? 8 : groups == 2 ? 4 : 2;
  struct row_share s = {each, lane / chunks, lane % chunks};
  return s;
}

/* LOADERS warps, each its share: pages of SLOTS x 32 weight rows, one slice after the other, and tiles of 8 rows. */
template <int HALVES, int SLOTS, int GROUPS, int TILES>
static __device__ void load(const struct gemm_args *a, struct gemm_shared *s, uint32_t ring, int loader,
                            int lane) {
  constexpr int PAGES = SLOTS * 2 / HALVES, MINE = PAGES / LOADERS, MINE_TILES = TILES / LOADERS,
                COPIES = GROUPS == 1 ? 1 : 4;
  const uint32_t page_bytes = a->g.w.page_bytes, groups = a->g.w.groups;
  const struct row_share share = share_rows(groups, lane);
  const uint32_t rows_at = ring + SLOTS * a->slot_bytes + share.chunk * CORE_BYTES;
  struct gemm_cursor c = {0, 0};
  uint32_t items = item_count(a);
  struct gemm_item next = item_at<TILES * 8>(a, blockIdx.x, items);
  for (uint32_t i = blockIdx.x; i < items; i += gridDim.x) {
    struct gemm_item item = next;
    struct page_share pages = share_pages<HALVES, PAGES, MINE>(a, &item, loader, lane);
    const uint8_t *x = (const uint8_t *)a->g.x + item.part * a->part_slices * groups * 64 + share.chunk * 16;
    uint32_t row[MINE_TILES][COPIES]; /* bytes from x */
#pragma unroll
    for (int t = 0; t < MINE_TILES; t++)
#pragma unroll
      for (int k = 0; k < COPIES; k++) {
        uint32_t r = (t * LOADERS + loader) * 8 + k * share.each + share.row;
        uint32_t slot = item.first + (r < item.rows ? r : item.rows - 1);
        row[t][k] = (a->g.opt_gather ? __ldg(a->g.opt_gather + slot) : slot) * a->g.x_stride * 2;
      }
    next = item_at<TILES * 8>(a, i + gridDim.x, items);
    for (uint32_t slice = 0; slice < a->part_slices; slice++, pages.from += page_bytes, x += groups * 64) {
      uint32_t full = us_shared_address(&s->full[c.stage]), offset = c.stage * a->stage_bytes;
      us_barrier_wait(us_shared_address(&s->empty[c.stage]), c.phase ^ 1);
      if (lane == 0) us_barrier_expect(full, pages.lanes * page_bytes);
      __syncwarp();
      if (lane < pages.lanes) us_bulk_load(ring + offset + pages.to, pages.from, page_bytes, full);
#pragma unroll
      for (int t = 0; t < MINE_TILES; t++) {
        uint32_t tile = t * LOADERS + loader, to = rows_at + offset + tile * GROUPS * GROUP_BYTES;
        if (tile * 8 >= item.rows) break;
#pragma unroll
        for (int k = 0; k < COPIES; k++) {
          uint32_t r = k * share.each + share.row;
          if (share.row < share.each && r < 8) copy_16(to + r * 16, x + row[t][k]);
        }
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
      advance(&c, a->stages);
    }
  }
}

/* ---- multiplying ------------------------------------------------------------------------------------------------- */

/* One page of 32 rows times the first TILES x 8 rows. FULL: a page has as many groups as it can, so that no branch stands between
 * its multiplies. */
template <int FORMAT, int HALVES, bool FULL, int TILES>
static __device__ __forceinline__ void multiply(const uint8_t *pages, uint32_t page_bytes, uint32_t groups,
                                                uint32_t rows, int lane, float (*acc)[2][4]) {
  constexpr int STEP = TILES % 2 ? 1 : 2; /* tiles whose multiplies overlap */
  constexpr int GROUPS = us_prefill_most<FORMAT, HALVES>::groups, SUBS = us_prefill_format<FORMAT>::subs;
  uint32_t tail[4];
  if (FULL) groups = GROUPS;
  us_prefill_tail<FORMAT, HALVES>(pages, page_bytes, groups, lane, tail);
  constexpr int UNROLL = TILES > 4 ? 1 : GROUPS; /* a group of 16 tiles is 5 KB of code already */
#pragma unroll UNROLL
  for (int g = 0; g < GROUPS; g++) {
    if (!FULL && g >= groups) break;
#pragma unroll
    for (int sub = 0; sub < SUBS; sub++) {
      us_prefill_fragment<FORMAT> f;
      us_prefill_load<FORMAT, HALVES>(pages, page_bytes, g, sub, lane, tail, &f);
#pragma unroll
      for (int t = 0; t < TILES; t += STEP) {
        uint32_t b[STEP][4];
#pragma unroll
        for (int j = 0; j < STEP; j++)
          us_load_matrices(
              rows + ((t + j) * GROUPS + g) * GROUP_BYTES + lane / 8 * CORE_BYTES + lane % 8 * 16, b[j]);
#pragma unroll
        for (int j = 0; j < STEP; j++) us_prefill_multiply<FORMAT>(f, b[j] + 4 / SUBS * sub, acc[t + j]);
      }
    }
  }
}

template <int FORMAT, int HALVES, bool FULL, int TILES>
static __device__ __forceinline__ void multiply_some(const uint8_t *pages, uint32_t page_bytes,
                                                     uint32_t groups, uint32_t rows, uint32_t tiles, int lane,
                                                     float (*acc)[2][4]) {
  if constexpr (TILES > 4) {
    if (tiles > TILES / 2)
      multiply<FORMAT, HALVES, FULL, TILES>(pages, page_bytes, groups, rows, lane, acc);
    else
      multiply<FORMAT, HALVES, FULL, TILES / 2>(pages, page_bytes, groups, rows, lane, acc);
  } else {
    if (tiles == 1)
      multiply<FORMAT, HALVES, FULL, 1>(pages, page_bytes, groups, rows, lane, acc);
    else if (tiles == 2)
      multiply<FORMAT, HALVES, FULL, 2>(pages, page_bytes, groups, rows, lane, acc);
    else
      multiply<FORMAT, HALVES, FULL, 4>(pages, page_bytes, groups, rows, lane, acc);
  }
}

template <int FORMAT, int HALVES, bool FULL, int WARPS, int TILES>
static __device__ void consume(const struct gemm_args *a, struct gemm_shared *s, const uint8_t *pages,
                               uint32_t rows, float *patch, int warp, int lane) {
  constexpr float undo = us_prefill_format<FORMAT>::undo;
  const struct us_engine_matrix w = a->g.w;
  struct gemm_cursor c = {0, 0};
  uint32_t items = item_count(a);
  struct gemm_item next = item_at<TILES * 8>(a, blockIdx.x, items);
  pages += warp * a->slot_bytes;
  for (uint32_t i = blockIdx.x; i < items; i += gridDim.x) {
    struct gemm_item item = next;
    uint32_t tiles = (item.rows + 7) / 8, column = (item.block * WARPS + warp) * 32, row[TILES];
    bool working = column < w.tiles * 16 * HALVES;
    float acc[TILES][2][4] = {};
    next = item_at<TILES * 8>(a, i + gridDim.x, items);
#pragma unroll
    for (int t = 0; t < TILES; t++) row[t] = row_of(a, &item, t, lane);
    for (uint32_t slice = 0; slice < a->part_slices; slice++) {
      us_barrier_wait(us_shared_address(&s->full[c.stage]), c.phase);
      uint32_t offset = c.stage * a->stage_bytes;
      if (working)
        multiply_some<FORMAT, HALVES, FULL, TILES>(pages + offset, w.page_bytes, w.groups, rows + offset,
                                                   tiles, lane, acc);
      release(s, &c, a->stages, lane);
    }
    if (!working) continue;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      if (t >= tiles) break;
      if (a->g.opt_swiglu) {
        store_gated(a, &item, t, column, undo, lane, patch, acc[t][0], acc[t][1]);
      } else {
        store_sums(a, &item, t, row[t], column, undo, lane, patch, acc[t][0]);
        store_sums(a, &item, t, row[t], column + 16, undo, lane, patch, acc[t][1]);
      }
    }
  }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

/* Shared memory: [warps' patches][stages: pages, rows]. Registers: 2 x 216 + 72, or 4 x 104 + 64. */
template <int FORMAT, int HALVES, bool FULL, int WARPS, int TILES>
static __global__ void __launch_bounds__((WARPS + LOADERS) * 32, 1)
    prefill_gemm(const __grid_constant__ struct gemm_args a) {
  extern __shared__ __align__(128) uint8_t raw[];
  __shared__ struct gemm_shared s;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t *pages = raw + WARPS * PATCH_BYTES;
  uint32_t ring = us_shared_address(pages), rows = ring + WARPS * a.slot_bytes;
  init_ring(&s, a.stages, LOADERS * 33, WARPS); /* full: expected bytes, and 32 lanes of rows */
  if (warp >= WARPS) {
    set_registers<WARPS == 8 ? 72 : 64, false>();
    load<HALVES, WARPS, us_prefill_most<FORMAT, HALVES>::groups, TILES>(&a, &s, ring, warp - WARPS, lane);
  } else {
    set_registers<WARPS == 8 ? 216 : 104, true>();
    consume<FORMAT, HALVES, FULL, WARPS, TILES>(&a, &s, pages, rows, (float *)(raw + warp * PATCH_BYTES),
                                                warp, lane);
  }
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

template <int FORMAT, int HALVES, bool FULL, int WARPS, int TILES>
static cudaError_t launch(struct gemm_args *a, cudaStream_t stream) {
  auto kernel = prefill_gemm<FORMAT, HALVES, FULL, WARPS, TILES>;
  const struct us_engine_matrix *w = &a->g.w;
  constexpr uint32_t GROUPS = us_prefill_most<FORMAT, HALVES>::groups;
  if (!w->groups) return cudaErrorInvalidValue;
  a->slot_bytes = (w->page_bytes * (2 / HALVES) + 127) / 128 * 128;
  a->stage_bytes = WARPS * a->slot_bytes + TILES * GROUPS * GROUP_BYTES;
  a->stages = (SHARED_BYTES - WARPS * PATCH_BYTES - sizeof(struct gemm_shared)) / a->stage_bytes;
  if (a->stages > MAX_STAGES) a->stages = MAX_STAGES;
  a->row_tiles = (a->g.rows + TILES * 8 - 1) / (TILES * 8);
  a->blocks = (w->tiles * HALVES + WARPS * 2 - 1) / (WARPS * 2);
  uint32_t bytes = WARPS * PATCH_BYTES + a->stages * a->stage_bytes, grid;
  cudaError_t status = us_processors(&grid);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  uint32_t items = a->row_tiles * a->blocks * a->g.parts;
  if (!a->g.opt_experts && items < grid) grid = items;
  if (grid) kernel<<<grid, (WARPS + LOADERS) * 32, bytes, stream>>>(*a);
  return cudaGetLastError();
}

/* What a matrix is multiplied by decides which bits it gives, so the number of rows has no say in it. */
template <int FORMAT, int HALVES, bool FULL>
static cudaError_t choose(struct gemm_args *a, cudaStream_t stream) {
  if constexpr (FORMAT == US_FORMAT_F32) { /* three terms leave room for 64 rows */
    if (a->g.rows > US_PREFILL_EXPERT_ROWS) return launch<FORMAT, HALVES, FULL, 8, 8>(a, stream);
  } else if (FULL && !a->g.opt_experts) {
    return us_prefill_wide(a, stream);
  }
  return launch<FORMAT, HALVES, FULL, 16, US_PREFILL_EXPERT_ROWS / 8>(a, stream);
}

template <int FORMAT, int HALVES> static cudaError_t choose_full(struct gemm_args *a, cudaStream_t stream) {
  constexpr int GROUPS = us_prefill_most<FORMAT, HALVES>::groups;
  if constexpr (GROUPS > 1)
    if (a->g.w.groups < GROUPS) return choose<FORMAT, HALVES, false>(a, stream);
  return a->g.w.groups == GROUPS ? choose<FORMAT, HALVES, true>(a, stream) : cudaErrorInvalidValue;
}

static bool valid(const struct us_prefill_gemm *g) {
  const struct us_engine_matrix *w = &g->w;
  bool two = w->halves == 2, swiglu = g->opt_swiglu != NULL;
  if (w->halves != 1 && !two) return false;
  if (!g->parts || w->slices % g->parts || g->x_stride % 8) return false;
  if (g->opt_experts && g->parts != 1) return false;
  if (g->valid > w->tiles * 16u * w->halves) return false;
  if (swiglu) return two && g->parts == 1 && g->swiglu_stride % 4 == 0 && g->valid % 8 == 0;
  return g->out.base[0] && g->out.per_rank && g->out.stride % 4 == 0 && g->out.first % 4 == 0 &&
         g->out.part % 4 == 0;
}

int us_prefill_gemm(const struct us_prefill_gemm *gemm, cudaStream_t stream) {
  if (!valid(gemm)) return cudaErrorInvalidValue;
  struct gemm_args a = {};
  a.g = *gemm;
  if (gemm->opt_experts) a.groups = *gemm->opt_experts;
  a.part_slices = gemm->w.slices / gemm->parts;
  bool two = gemm->w.halves == 2;
  switch (gemm->w.format) {
  case US_FORMAT_MXFP4:
    return two ? choose_full<US_FORMAT_MXFP4, 2>(&a, stream) : choose_full<US_FORMAT_MXFP4, 1>(&a, stream);
  case US_FORMAT_FP8:
    return two ? choose_full<US_FORMAT_FP8, 2>(&a, stream) : choose_full<US_FORMAT_FP8, 1>(&a, stream);
  case US_FORMAT_BF16:
    return two ? choose_full<US_FORMAT_BF16, 2>(&a, stream) : choose_full<US_FORMAT_BF16, 1>(&a, stream);
  case US_FORMAT_F32:
    return two ? cudaErrorInvalidValue : choose_full<US_FORMAT_F32, 1>(&a, stream);
  }
  return cudaErrorInvalidValue;
}

/* 512 rows are 4 tiles: up to 32 blocks of 128 weight rows and parts, so that 132 processors have work. */
uint32_t us_prefill_parts(const struct us_engine_matrix *w) {
  uint32_t blocks = (w->tiles * w->halves + 7) / 8, most = blocks < 32 ? 32 / blocks : 1, parts = 1;
  for (uint32_t p = 1; p <= most && p <= w->slices; p++)
    if (w->slices % p == 0) parts = p;
  return parts;
}
