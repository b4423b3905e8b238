/* wgmma.cuh: the warpgroup's multiply of Hopper: 64 weight rows from registers x 8 TILES rows from shared memory.
 *
 *     us_wgmma_fence();                                    // after the last change of a or d
 *     us_wgmma<16>(d, a, descriptor, false);               // d = a b; true: d += a b
 *     us_wgmma_wait(d);                                    // d may be read, a changed
 *
 * A warp's a and d are those of mma.m16n8k16, its 16 rows x 16 columns, and 16 rows x 8 for each tile of 8 (PTX ISA, wgmma).
 */
#ifndef US_KERNELS_PREFILL_WGMMA_CUH
#define US_KERNELS_PREFILL_WGMMA_CUH

#include <stdint.h>

/* Column operand of rows `swizzle` bytes long (128 or 64), as the tensor copy engine swizzles them: 8 rows after 8 rows. */
static __device__ __forceinline__ uint64_t us_wgmma_descriptor(uint32_t address, int swizzle) {
  return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)(8 * swizzle >> 4) << 32 |
         (uint64_t)(swizzle == 128 ? 1 : 2) << 62;
}

static __device__ __forceinline__ void us_wgmma_fence(void) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* The compiler must not move reads and writes of d across this. */
template <int TILES> static __device__ __forceinline__ void us_wgmma_hold(float (*d)[4]) {
#pragma unroll
  for (int t = 0; t < TILES; t++)
    asm volatile("" : "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])::"memory");
}

template <int TILES> static __device__ __forceinline__ void us_wgmma_wait(float (*d)[4]) {
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
  us_wgmma_hold<TILES>(d);
}

#define US_D4(t)  "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define US_D16(t) US_D4(t), US_D4(t + 1), US_D4(t + 2), US_D4(t + 3)

template <int TILES>
static __device__ __forceinline__ void us_wgmma(float (*d)[4], const uint32_t a[4], uint64_t b, bool add);

template <>
__device__ __forceinline__ void us_wgmma<4>(float (*d)[4], const uint32_t a[4], uint64_t b, bool add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, "
               "%19}, %20, p, 1, 1, 0; }"
               : US_D16(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

template <>
__device__ __forceinline__ void us_wgmma<16>(float (*d)[4], const uint32_t a[4], uint64_t b, bool add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "{%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
               : US_D16(0), US_D16(4), US_D16(8), US_D16(12)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

#undef US_D16
#undef US_D4

#endif
