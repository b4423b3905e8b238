/* gemm.cu: up to 2048 rows times weight pages on tensor cores.
 *
 * Weights are the 16-row operand, straight from pages; rows are the 8-column operand, gathered 16 bytes at a time into core
 * matrices. A warp owns 32 weight rows and all rows of the tile, so a fragment is decoded once for them all. A loading warpgroup
 * keeps a ring of pages and rows ahead, across tiles; K runs in ascending order in one warp, so nothing depends on the tiling.
 *
 * Bound. Projections (128 rows a tile): mma.sync, which reaches 62 % of the chip's bf16 peak; a group of 32 columns costs a warp
 * 64 mma, 16 ldmatrix, 128 FFMA for the scales and about 70 instructions to decode, so neither decoding nor scaling binds.
 * Experts (about 11 rows each in a chunk of 512): bytes of weights; a group of 16 rows costs about 110 issue slots for 544 bytes
 * of MXFP4, 4.6 TB/s at full issue. Figures: docs/perf.md.
 */
#include "formats/bf16.h"
#include "kernels/cpu/exp.h"
#include "kernels/gpu/async.cuh"
#include "kernels/prefill/fragment.cuh"
#include "kernels/prefill/prefill.h"

#define LOADERS       4 /* warps */
#define MAX_STAGES    8
#define SHARED_BYTES  (227 * 1024)
#define PATCH_STRIDE  36 /* floats of a token's 32 outputs in shared memory: 8 tokens hit different banks */
#define PATCH_BYTES   (8 * PATCH_STRIDE * 4)
#define GROUP_BYTES   512 /* 8 rows x 32 columns of activations */

struct gemm_args {
  struct us_prefill_gemm g;
  struct us_prefill_groups groups;
  uint32_t row_tiles;   /* 0: on the device, groups.tile_count */
  uint32_t blocks;      /* of weight rows */
  uint32_t part_slices;
  uint32_t stages, slot_bytes, stage_bytes;
};

/* A block's piece of work: rows x one block of weight rows x one part of K. */
struct gemm_item {
  uint32_t expert, first, rows, part, block;
};

struct gemm_shared {
  uint64_t full[MAX_STAGES], empty[MAX_STAGES];
};

/* Place in the ring. */
struct gemm_cursor {
  uint32_t stage, phase;
};

static __device__ __forceinline__ void advance(struct gemm_cursor *c, uint32_t stages) {
  if (++c->stage == stages) c->stage = 0, c->phase ^= 1;
}

static __device__ __forceinline__ uint32_t item_count(const struct gemm_args *a) {
  uint32_t tiles = a->g.opt_experts ? __ldg(a->groups.tile_count) : a->row_tiles;
  return tiles * a->blocks * a->g.parts;
}

/* Projections: row tiles of the same weights run side by side and share them in L2. Experts: blocks of the same rows. */
template <int TOKENS>
static __device__ __forceinline__ struct gemm_item item_at(const struct gemm_args *a, uint32_t i) {
  struct gemm_item item;
  if (a->g.opt_experts) {
    struct us_prefill_tile tile = a->groups.tiles[i / a->blocks];
    item.expert = tile.expert, item.first = tile.first, item.rows = tile.rows;
    item.part = 0, item.block = i % a->blocks;
    return item;
  }
  uint32_t rest = i / a->row_tiles, left;
  item.expert = 0, item.first = i % a->row_tiles * TOKENS, left = a->g.rows - item.first;
  item.rows = left < TOKENS ? left : TOKENS;
  item.block = rest % a->blocks, item.part = rest / a->blocks;
  return item;
}

/* ---- loading ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void copy_16(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* LOADERS warps, each its share: the pages of each warp's 32 rows, one slice after the other, and the rows as core matrices,
 * tile of 8 after tile; lane: row lane % 8, columns lane / 8 * 8 of a group. */
template <int HALVES, int WARPS, int GROUPS, int TILES>
static __device__ void load(const struct gemm_args *a, struct gemm_shared *s, uint32_t ring, int loader, int lane) {
  constexpr uint32_t PAGES = WARPS * 2 / HALVES, MINE = PAGES / LOADERS, MINE_TILES = TILES / LOADERS;
  const struct us_engine_matrix w = a->g.w;
  const uint32_t groups = w.groups, rows_at = ring + WARPS * a->slot_bytes + lane * 16;
  struct gemm_cursor c = {0, 0};
  uint32_t items = item_count(a);
  for (uint32_t i = blockIdx.x; i < items; i += gridDim.x) {
    struct gemm_item item = item_at<TILES * 8>(a, i);
    uint32_t place = loader * MINE + lane, tile = item.block * PAGES + place, left = w.tiles - item.block * PAGES;
    uint32_t pages = left <= loader * MINE ? 0 : left - loader * MINE < MINE ? left - loader * MINE : MINE;
    const uint8_t *from = w.pages + item.expert * w.matrix_bytes +
                          ((uint64_t)tile * w.slices + item.part * a->part_slices) * w.page_bytes;
    uint32_t to = HALVES == 2 ? ring + place * a->slot_bytes : ring + place / 2 * a->slot_bytes + place % 2 * w.page_bytes;
    uint32_t row[MINE_TILES]; /* bytes from x */
    const uint8_t *x = (const uint8_t *)a->g.x;
#pragma unroll
    for (int t = 0; t < MINE_TILES; t++) {
      uint32_t r = (t * LOADERS + loader) * 8 + lane % 8, slot = item.first + (r < item.rows ? r : item.rows - 1);
      if (a->g.opt_gather) slot = __ldg(a->g.opt_gather + slot);
      row[t] = (slot * a->g.x_stride + item.part * a->part_slices * groups * 32 + lane / 8 * 8) * 2;
    }
    for (uint32_t slice = 0; slice < a->part_slices; slice++, from += w.page_bytes, x += groups * 64) {
      uint32_t full = us_shared_address(&s->full[c.stage]), offset = c.stage * a->stage_bytes;
      us_barrier_wait(us_shared_address(&s->empty[c.stage]), c.phase ^ 1);
      if (lane == 0) us_barrier_expect(full, pages * w.page_bytes);
      __syncwarp();
      if (lane < pages) us_bulk_load(to + offset, from, w.page_bytes, full);
#pragma unroll
      for (int t = 0; t < MINE_TILES; t++) {
        uint32_t at = t * LOADERS + loader;
        if (at * 8 >= item.rows) break;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
          if (g < groups) copy_16(rows_at + offset + (at * GROUPS + g) * GROUP_BYTES, x + row[t] + g * 64);
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
static __device__ __forceinline__ void multiply(const uint8_t *pages, uint32_t page_bytes, uint32_t groups, uint32_t rows,
                                                int lane, float (*acc)[2][4]) {
  constexpr int STEP = TILES % 2 ? 1 : 2; /* tiles whose multiplies overlap */
  constexpr int GROUPS = us_prefill_most<FORMAT, HALVES>::groups, SUBS = us_prefill_format<FORMAT>::subs;
  uint32_t tail[4];
  if (FULL) groups = GROUPS;
  us_prefill_tail<FORMAT, HALVES>(pages, page_bytes, groups, lane, tail);
#pragma unroll
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
          us_load_matrices(rows + ((t + j) * GROUPS + g) * GROUP_BYTES + lane * 16, b[j]);
#pragma unroll
        for (int j = 0; j < STEP; j++) us_prefill_multiply<FORMAT>(f, b[j] + 4 / SUBS * sub, acc[t + j]);
      }
    }
  }
}

template <int FORMAT, int HALVES, bool FULL, int TILES>
static __device__ __forceinline__ void multiply_some(const uint8_t *pages, uint32_t page_bytes, uint32_t groups,
                                                     uint32_t rows, uint32_t tiles, int lane, float (*acc)[2][4]) {
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

static __device__ __forceinline__ uint16_t operand_bits(float x) {
  return us_bf16_from_f32(us_bf16_round(x) * US_ENGINE_OPERAND_UNIT);
}

static __device__ __forceinline__ float swiglu(float gate, float up) {
  return gate / (1.0f + us_expf(-gate)) * up;
}

/* 32 outputs x 8 rows of a warp, through its patch of shared memory so that a row's outputs leave side by side. */
static __device__ __forceinline__ void store_patch(const struct gemm_args *a, const struct gemm_item *item, int tile,
                                                   uint32_t column, float undo, int lane, float *patch,
                                                   const float acc[2][4]) {
  const struct us_prefill_rows *out = &a->g.out;
  __syncwarp();
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      patch[(lane % 4 * 2 + c % 2) * PATCH_STRIDE + h * 16 + c / 2 * 8 + lane / 4] = acc[h][c] * undo;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t r = tile * 8 + j * 4 + lane / 8, at = column + lane % 8 * 4;
    if (r >= item->rows || at >= a->g.valid) continue;
    uint32_t slot = item->first + r, row = a->g.opt_scatter ? __ldg(a->g.opt_scatter + slot) : slot;
    float4 v = *(const float4 *)(patch + (j * 4 + lane / 8) * PATCH_STRIDE + lane % 8 * 4);
    float *to = out->base[row / out->per_rank] + (size_t)(row % out->per_rank) * out->stride +
                item->part * out->part + out->first + at;
    if (at + 4 <= a->g.valid) {
      *(float4 *)to = v;
    } else {
      to[0] = v.x;
      if (at + 1 < a->g.valid) to[1] = v.y;
      if (at + 2 < a->g.valid) to[2] = v.z;
    }
  }
}

/* The same of silu(gate) * up: 16 outputs. */
static __device__ __forceinline__ void store_swiglu(const struct gemm_args *a, const struct gemm_item *item, int tile,
                                                    uint32_t column, float undo, int lane, float *patch,
                                                    const float acc[2][4]) {
  uint16_t *inner = (uint16_t *)patch; /* (8, 24): rows 48 bytes apart */
  __syncwarp();
#pragma unroll
  for (int c = 0; c < 4; c++)
    inner[(lane % 4 * 2 + c % 2) * 24 + c / 2 * 8 + lane / 4] = operand_bits(swiglu(acc[0][c] * undo, acc[1][c] * undo));
  __syncwarp();
  uint32_t r = tile * 8 + lane / 4, at = column / 2 + lane % 4 * 4;
  if (r >= item->rows || at >= a->g.valid / 2) return;
  uint2 v = *(const uint2 *)(inner + lane / 4 * 24 + lane % 4 * 4);
  *(uint2 *)(a->g.opt_swiglu + (size_t)(item->first + r) * a->g.swiglu_stride + at) = v;
}

template <int FORMAT, int HALVES, bool FULL, int WARPS, int TILES>
static __device__ void consume(const struct gemm_args *a, struct gemm_shared *s, const uint8_t *pages, uint32_t rows,
                               float *patch, int warp, int lane) {
  constexpr float undo = us_prefill_format<FORMAT>::undo;
  const struct us_engine_matrix w = a->g.w;
  struct gemm_cursor c = {0, 0};
  uint32_t items = item_count(a);
  pages += warp * a->slot_bytes;
  for (uint32_t i = blockIdx.x; i < items; i += gridDim.x) {
    struct gemm_item item = item_at<TILES * 8>(a, i);
    uint32_t tiles = (item.rows + 7) / 8, column = (item.block * WARPS + warp) * 32;
    bool working = column < w.tiles * 16 * HALVES;
    float acc[TILES][2][4] = {};
    for (uint32_t slice = 0; slice < a->part_slices; slice++) {
      us_barrier_wait(us_shared_address(&s->full[c.stage]), c.phase);
      uint32_t offset = c.stage * a->stage_bytes;
      if (working)
        multiply_some<FORMAT, HALVES, FULL, TILES>(pages + offset, w.page_bytes, w.groups, rows + offset, tiles, lane, acc);
      __syncwarp();
      if (lane == 0) us_barrier_arrive(us_shared_address(&s->empty[c.stage]));
      advance(&c, a->stages);
    }
    if (!working) continue;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      if (t >= tiles) break;
      if (a->g.opt_swiglu)
        store_swiglu(a, &item, t, column, undo, lane, patch, acc[t]);
      else
        store_patch(a, &item, t, column, undo, lane, patch, acc[t]);
    }
  }
}

template <uint32_t REGISTERS, bool MORE> static __device__ __forceinline__ void set_registers(void) {
  if (MORE)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Shared memory: [warps' patches][stages, each: pages of the warps, rows]. The loading warpgroup gives registers to the
 * others: a block starts with 168 a thread for 3 warpgroups, 96 for 5, and no more can be had: 2 x 216 + 72, 4 x 104 + 64. */
template <int FORMAT, int HALVES, bool FULL, int WARPS, int TILES>
static __global__ void __launch_bounds__((WARPS + LOADERS) * 32, 1) prefill_gemm(const __grid_constant__ struct gemm_args a) {
  extern __shared__ __align__(128) uint8_t raw[];
  __shared__ struct gemm_shared s;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t *pages = raw + WARPS * PATCH_BYTES;
  uint32_t ring = us_shared_address(pages), rows = ring + WARPS * a.slot_bytes;
  if (threadIdx.x == 0)
    for (uint32_t i = 0; i < a.stages; i++) {
      us_barrier_init(us_shared_address(&s.full[i]), LOADERS * 33); /* expected bytes, and 32 lanes of rows */
      us_barrier_init(us_shared_address(&s.empty[i]), WARPS);
    }
  us_barrier_init_fence();
  __syncthreads();
  if (warp >= WARPS) {
    set_registers<WARPS == 8 ? 72 : 64, false>();
    load<HALVES, WARPS, us_prefill_most<FORMAT, HALVES>::groups, TILES>(&a, &s, ring, warp - WARPS, lane);
  } else {
    set_registers<WARPS == 8 ? 216 : 104, true>();
    consume<FORMAT, HALVES, FULL, WARPS, TILES>(&a, &s, pages, rows, (float *)(raw + warp * PATCH_BYTES), warp, lane);
  }
}

/* ---- launch ------------------------------------------------------------------------------------------------------ */

static cudaError_t processors(uint32_t *ret_count) {
  int device, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  *ret_count = (uint32_t)count;
  return status;
}

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
  cudaError_t status = processors(&grid);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  uint32_t items = a->row_tiles * a->blocks * a->g.parts;
  if (!a->g.opt_experts && items < grid) grid = items;
  if (grid) kernel<<<grid, (WARPS + LOADERS) * 32, bytes, stream>>>(*a);
  return cudaGetLastError();
}

/* Few rows an expert or in all: more warps with fewer rows each. FP32's three terms leave room for 64 rows. The sums are the same. */
template <int FORMAT, int HALVES, bool FULL> static cudaError_t choose(struct gemm_args *a, cudaStream_t stream) {
  if constexpr (FULL)
    if (!a->g.opt_experts && a->g.rows > US_PREFILL_EXPERT_ROWS)
      return launch<FORMAT, HALVES, FULL, 8, FORMAT == US_FORMAT_F32 ? 8 : 16>(a, stream);
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
  return g->out.base[0] && g->out.per_rank && g->out.stride % 4 == 0 && g->out.first % 4 == 0 && g->out.part % 4 == 0;
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

/* 512 rows are 4 tiles: a part for every 32 blocks of weight rows at most, so that 132 processors have work. */
uint32_t us_prefill_parts(const struct us_engine_matrix *w) {
  uint32_t blocks = (w->tiles * w->halves + 15) / 16, most = blocks < 32 ? 32 / blocks : 1, parts = 1;
  for (uint32_t p = 1; p <= most && p <= w->slices; p++)
    if (w->slices % p == 0) parts = p;
  return parts;
}
