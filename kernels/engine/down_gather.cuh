/* down_gather.cuh: the experts' down projection of several row tiles: one way through the experts for up to 64 rows.
 *
 *     us_engine_down_gathered(b, op);       // compute warps, for us_engine_down_compute
 *
 * As down.cuh, whose streaming it shares: a block owns 48 columns and goes through all slots of the list in order. Sums of 64 rows do
 * not fit registers, whose places are known when compiled: every warp keeps those of its page's 16 columns in shared memory, 4 KB,
 * and adds to those of the slot's rows, 1.8 of 8 columns in the mean. The same additions in the same order as of one row tile. Pages are
 * MXFP4 of four groups.
 */
#ifndef US_KERNELS_ENGINE_DOWN_GATHER_CUH
#define US_KERNELS_ENGINE_DOWN_GATHER_CUH

#include "kernels/engine/down.cuh"

#define US_GATHER_ROWS      (US_ENGINE_GATHERED * US_ENGINE_ROWS)
#define US_GATHER_ROW_BYTES 64 /* a row's 16 columns of a warp */
#define US_GATHER_WARP      (US_GATHER_ROWS * US_GATHER_ROW_BYTES)
#define US_GATHER_WARPS     (4 * US_DOWN_TILES) /* a step has four pages of a tile at most */
static_assert(US_GATHER_WARPS * US_GATHER_WARP <= US_ENGINE_VECTOR_BYTES, "sums in shared memory");

static __device__ __forceinline__ float us_gather_load(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
static __device__ __forceinline__ void us_gather_store(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

static __device__ __forceinline__ void us_gather_zero(const struct us_engine_block *b) {
  uint4 *sums = (uint4 *)us_engine_scratch(b);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < US_GATHER_WARPS * US_GATHER_WARP / 16; i += US_ENGINE_COMPUTE)
    sums[i] = make_uint4(0, 0, 0, 0);
}

/* Sums in shared memory of a warp's page's columns: row += routing weight * the page's, if a column is a row's. The warp meets
 * first: another lane may have stored the row's sums. */
struct us_gather_sums {
  uint32_t base;
  __device__ __forceinline__ void column(uint32_t offset, uint32_t bits, float low, float high) {
    if (offset == US_ENGINE_NONE) return;
    float weight = __uint_as_float(bits);
    uint32_t at = base + offset;
    float y = us_gather_load(at), z = us_gather_load(at ^ 32);
    us_gather_store(at, __fmaf_rn(weight, low, y));
    us_gather_store(at ^ 32, __fmaf_rn(weight, high, z));
  }
  __device__ __forceinline__ void add(const float *acc, uint32_t even, uint32_t odd, uint32_t even_at,
                                      uint32_t odd_at) {
    __syncwarp();
    column(even_at, even, acc[0], acc[2]);
    if (__any_sync(0xffffffffu, odd_at != US_ENGINE_NONE)) column(odd_at, odd, acc[1], acc[3]);
  }
};

/* Add the warps' sums in order, and push the block's columns of all row tiles. */
static __device__ __forceinline__ void us_gather_out(struct us_engine_block *b, const struct us_engine_op *op,
                                                     uint32_t group, uint32_t tiles) {
  const struct us_engine_down *d = &op->down;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = d->step_slices;
  uint32_t base = us_engine_shared_base(b) + (uint32_t)offsetof(struct us_engine_shared, partial);
  us_engine_meet();
  const struct us_engine_block *worked = &us_engine_shared_of(b)->warp[0];
  b->stage = worked->stage, b->phase = worked->phase; /* warps that slept */
#pragma unroll 1
  for (uint32_t i = warp; i < tiles * op->row_tiles; i += US_ENGINE_COMPUTE_WARPS) {
    uint32_t tile = i % tiles, rows = i / tiles, token = rows * US_ENGINE_ROWS + lane % 4 * 2;
    uint32_t even = base + tile * slices * US_GATHER_WARP + us_down_sums_offset(token) + lane / 4 * 4,
             odd = base + tile * slices * US_GATHER_WARP + us_down_sums_offset(token + 1) + lane / 4 * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (uint32_t w = 0; w < slices; w++, even += US_GATHER_WARP, odd += US_GATHER_WARP) {
      sum.x = __fadd_rn(sum.x, us_gather_load(even)), sum.y = __fadd_rn(sum.y, us_gather_load(odd));
      sum.z = __fadd_rn(sum.z, us_gather_load(even ^ 32)), sum.w = __fadd_rn(sum.w, us_gather_load(odd ^ 32));
    }
    us_engine_push(b, d->exchange + rows, b->rank->rank, (group * US_DOWN_TILES + tile) * 16, lane, sum);
  }
}

static __device__ __noinline__ void us_engine_down_gathered(struct us_engine_block *b,
                                                            const struct us_engine_op *op) {
  const struct us_engine_down *d = &op->down;
  uint32_t groups = us_engine_down_groups(d), warp = threadIdx.x / 32;
  uint32_t first = us_engine_first_item(b, op->shift);
  us_engine_drain(b);
  us_gather_zero(b);
  us_engine_wait_done(b, op->wait);
  for (uint32_t group = first; group < groups; group += b->blocks) {
    uint32_t tiles = us_engine_down_tiles(d, group), working = tiles * d->step_slices;
    if (group != first) us_gather_zero(b), us_engine_meet();
    if (us_engine_shared_of(b)->active.count && warp < working) {
      struct us_gather_sums sums = {us_shared_address(us_engine_scratch(b)) + warp * US_GATHER_WARP +
                                    threadIdx.x % 32 / 4 * 4};
      us_down_stages<true>(b, op, working, &sums);
    }
    us_gather_out(b, op, group, tiles);
    us_engine_meet();
  }
  us_engine_finish(b);
}

#endif
