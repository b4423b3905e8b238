/* grouped_wgmma.cuh: the warpgroup's multiply of Hopper with both operands in shared memory, and the copies that bring them.
 *
 *     us_wgmma_fence();
 *     us_wgmma_shared<32, 0, 1>(d, a, b, add);              // d (64 x 256) = or += a b; b lies column after column
 *     us_wgmma_commit(); us_wgmma_wait_for<1>();            // all but the last batch are done
 *
 * d is laid out as by us_wgmma (kernels/prefill/wgmma.cuh). Operands are boxes of the tensor copy engine with rows of 128 swizzled
 * bytes: 64 values of the summed index a row (along), or 64 of the other one (across: the transpose bit). PTX ISA, wgmma.
 */
#ifndef US_KERNELS_GROUPED_WGMMA_CUH
#define US_KERNELS_GROUPED_WGMMA_CUH

#include "kernels/gpu/async.cuh"
#include "kernels/prefill/wgmma.cuh"

#include <cuda.h>

/* ---- operands ---------------------------------------------------------------------------------------------------- */

/* 64 values of the summed index a row: 8 rows after 8 rows, 1024 bytes. The next 16 values: + 32 bytes. */
static __device__ __forceinline__ uint64_t us_wgmma_along(uint32_t address) {
  return us_wgmma_descriptor(address, 128);
}

/* A row an index of the sum: boxes of 64 values, `box` bytes each; 8 rows are 1024 bytes. The next 16 rows: + 2048 bytes. */
static __device__ __forceinline__ uint64_t us_wgmma_across(uint32_t address, uint32_t box) {
  return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(box >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

static __device__ __forceinline__ void us_wgmma_commit(void) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LEFT> static __device__ __forceinline__ void us_wgmma_wait_for(void) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/* ---- multiplying ------------------------------------------------------------------------------------------------- */

#define US_D4(t)  "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define US_D16(t) US_D4(t), US_D4(t + 1), US_D4(t + 2), US_D4(t + 3)
#define US_D32(t) US_D16(t), US_D16(t + 4)
#define US_R0                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                   \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define US_R32                                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                         \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define US_R64                                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                         \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define US_R96                                                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "             \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define US_R64_80 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define US_C(...) __VA_ARGS__
#define US_WGMMA_SHARED(COLUMNS, REGISTERS, ADD, REST, D)                                                    \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS        \
               "k16.f32.bf16.bf16 {" REGISTERS "}, " REST "; }"                                              \
               : D                                                                                           \
               : "l"(a), "l"(b), "r"((int)add), "n"(ACROSS_A), "n"(ACROSS_B))

/* 8 TILES columns. */
template <int TILES, int ACROSS_A, int ACROSS_B>
static __device__ __forceinline__ void us_wgmma_shared(float (*d)[4], uint64_t a, uint64_t b, bool add) {
  static_assert(TILES == 16 || TILES == 20 || TILES == 24 || TILES == 32, "columns of a tile");
  if constexpr (TILES == 16)
    US_WGMMA_SHARED("128", US_R0 ", " US_R32, "%66", "%64, %65, p, 1, 1, %67, %68",
                    US_C(US_D32(0), US_D32(8)));
  if constexpr (TILES == 20)
    US_WGMMA_SHARED("160", US_R0 ", " US_R32 ", " US_R64_80, "%82", "%80, %81, p, 1, 1, %83, %84",
                    US_C(US_D32(0), US_D32(8), US_D16(16)));
  if constexpr (TILES == 24)
    US_WGMMA_SHARED("192", US_R0 ", " US_R32 ", " US_R64, "%98", "%96, %97, p, 1, 1, %99, %100",
                    US_C(US_D32(0), US_D32(8), US_D32(16)));
  if constexpr (TILES == 32)
    US_WGMMA_SHARED("256", US_R0 ", " US_R32 ", " US_R64 ", " US_R96, "%130",
                    "%128, %129, p, 1, 1, %131, %132", US_C(US_D32(0), US_D32(8), US_D32(16), US_D32(24)));
}

#undef US_WGMMA_SHARED
#undef US_C
#undef US_R0
#undef US_R32
#undef US_R64
#undef US_R96
#undef US_R64_80
#undef US_D32
#undef US_D16
#undef US_D4

/* ---- copies ------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ void us_load_box(uint32_t to, const CUtensorMap *map, uint32_t column,
                                                   uint32_t row, uint32_t matrix, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
               "{%2, %3, %4}], [%5];" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
               : "memory");
}

/* Into every block of the cluster that `blocks` has a bit for, at the same place; each one's barrier is told. */
static __device__ __forceinline__ void us_load_box_shared(uint32_t to, const CUtensorMap *map,
                                                          uint32_t column, uint32_t row, uint32_t matrix,
                                                          uint32_t barrier, uint16_t blocks) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::"
               "cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "h"(blocks)
               : "memory");
}

/* What threads wrote to shared memory is seen by the copy engine and the tensor cores. */
static __device__ __forceinline__ void us_async_fence(void) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* From shared memory, what lies in the tensor; then us_bulk_commit. */
static __device__ __forceinline__ void us_store_box(const CUtensorMap *map, uint32_t column, uint32_t row,
                                                    uint32_t matrix, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
      "r"(column), "r"(row), "r"(matrix), "r"(from)
      : "memory");
}

static __device__ __forceinline__ void us_bulk_commit(void) {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* The thread's stores but the last LEFT groups have read shared memory. */
template <int LEFT> static __device__ __forceinline__ void us_bulk_wait_read(void) {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

/* ---- clusters ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t us_cluster_rank(void) {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

static __device__ __forceinline__ void us_cluster_sync(void) {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

/* Arrive at the barrier that lies at the same place in another block of the cluster. What a warp has read is in its registers by then,
 * so it publishes nothing: a release for the whole cluster would wait for its stores to memory, a microsecond a stage. */
static __device__ __forceinline__ void us_barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
               "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
               "r"(rank)
               : "memory");
}

#endif
