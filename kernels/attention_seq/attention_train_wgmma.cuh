/* attention_train_wgmma.cuh: the warpgroup's multiplies that attention needs, and tiles in shared memory that feed them.
 *
 *     us_wg_fence();                                                  // after other writes of accumulators or row registers
 *     us_wg_products<Q, 64>(s, rows, 64, keys);                       // s (64, 64) = rows (64, Q) keys (64, Q)^T
 *     us_wg_commit();
 *     us_wg_wait<0>();
 *     us_wg_hold<8>(s);                                               // s may be read
 *     us_wg_add<V>(out, p, values, KEYS, 0);                          // out (64, V) += p (64, 16) values (16, V)
 *
 * A tile of R rows x C columns lies as panels of 64 columns, each R rows of 128 bytes whose 16-byte chunks are permuted by
 * the row (chunk ^ row % 8), which is what the 128-byte swizzle of the descriptors means. The same bytes serve as an operand with
 * its columns as K (scores) and, transposed, with its rows as K (sums over keys): only the descriptor differs.
 * Accumulators: d[n][0], d[n][1]: row lane / 4 of the warp's 16, columns 8 n + 2 (lane % 4) and + 1; d[n][2], d[n][3]: row + 8
 * (PTX ISA, wgmma). Tiles start at multiples of 1024 bytes.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_WGMMA_CUH
#define US_KERNELS_ATTENTION_TRAIN_WGMMA_CUH

#include <stdint.h>

static __device__ __forceinline__ void us_wg_fence(void) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void us_wg_commit(void) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most N of the committed groups are still under way. */
template <int N> static __device__ __forceinline__ void us_wg_wait(void) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* The compiler must not move reads and writes of d across this. */
template <int TILES> static __device__ __forceinline__ void us_wg_hold(float (*d)[4]) {
#pragma unroll
  for (int t = 0; t < TILES; t++)
    asm volatile("" : "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])::"memory");
}

/* All of d is 0. */
template <int TILES> static __device__ __forceinline__ void us_wg_zero(float (*d)[4]) {
#pragma unroll
  for (int t = 0; t < TILES; t++) d[t][0] = d[t][1] = d[t][2] = d[t][3] = 0;
}

/* Rows 1024 bytes apart every 8. panel: bytes from one panel to the next, of meaning only for the transposed operand. */
static __device__ __forceinline__ uint64_t us_wg_descriptor(uint32_t address, uint32_t panel) {
  uint32_t low = (address >> 4 & 0x3fff) | panel >> 4 << 16;
  return (uint64_t)(1024u >> 4 | 1u << 30) << 32 | low;
}

/* ---- instructions ------------------------------------------------------------------------------------------------ */

#define US_D4(C, t)  C(d[t][0]), C(d[t][1]), C(d[t][2]), C(d[t][3])
#define US_D8(C, t)  US_D4(C, t), US_D4(C, t + 1)
#define US_D16(C, t) US_D8(C, t), US_D8(C, t + 2)
#define US_D32(C, t) US_D16(C, t), US_D16(C, t + 4)
#define US_SET       "=f"
#define US_ADD       "+f"
#define US_L16       "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define US_L24       US_L16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define US_L32       US_L24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define US_L40       US_L32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define US_L48       US_L40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define US_L64       US_L48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* d = a b^T, or d += with ADD; a (64, 16), b (N, 16) in shared memory, K along their columns. A first step must not read d: what
 * else wrote it would have to wait for multiplies under way. */
template <int N, bool ADD>
static __device__ __forceinline__ void us_wg_shared(float (*d)[4], uint64_t a, uint64_t b);

#define US_SHARED(ADD, N, LIST, A, B, P, ...)                                                                \
  template <> __device__ __forceinline__ void us_wg_shared<N, ADD>(float(*d)[4], uint64_t a, uint64_t b) {   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N           \
                 "k16.f32.bf16.bf16 " LIST "}, %" #A ", %" #B ", p, 1, 1, 0, 0; }"                           \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b), "n"((int)ADD));                                                           \
  }
#define US_SHARED_BOTH(ADD, C)                                                                               \
  US_SHARED(ADD, 32, US_L16, 16, 17, 18, US_D16(C, 0))                                                       \
  US_SHARED(ADD, 48, US_L24, 24, 25, 26, US_D16(C, 0), US_D8(C, 4))                                          \
  US_SHARED(ADD, 64, US_L32, 32, 33, 34, US_D32(C, 0))                                                       \
  US_SHARED(ADD, 80, US_L40, 40, 41, 42, US_D32(C, 0), US_D8(C, 8))                                          \
  US_SHARED(ADD, 128, US_L64, 64, 65, 66, US_D32(C, 0), US_D32(C, 8))
US_SHARED_BOTH(false, US_SET)
US_SHARED_BOTH(true, US_ADD)

/* d += a b; a (64, 16) in registers, b (16, N) in shared memory, K along its rows. */
template <int N>
static __device__ __forceinline__ void us_wg_registers(float (*d)[4], const uint32_t a[4], uint64_t b);

#define US_REGISTERS(N, LIST, A0, A1, A2, A3, B, P, ...)                                                     \
  template <>                                                                                                \
  __device__ __forceinline__ void us_wg_registers<N>(float(*d)[4], const uint32_t a[4], uint64_t b) {        \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N           \
                 "k16.f32.bf16.bf16 " LIST "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B               \
                 ", p, 1, 1, 1; }"                                                                           \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));                              \
  }
US_REGISTERS(64, US_L32, 32, 33, 34, 35, 36, 37, US_D32(US_ADD, 0))
US_REGISTERS(128, US_L64, 64, 65, 66, 67, 68, 69, US_D32(US_ADD, 0), US_D32(US_ADD, 8))

#undef US_SHARED
#undef US_SHARED_BOTH
#undef US_REGISTERS

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* d (64, N) = rows (64, C) columns (N, C)^T; row_count, N: rows of the tiles that the operands are in (panels). */
template <int C, int N>
static __device__ __forceinline__ void us_wg_products(float (*d)[4], uint32_t rows, uint32_t row_count,
                                                      uint32_t columns) {
  uint64_t a = us_wg_descriptor(rows, 16), b = us_wg_descriptor(columns, 16);
  us_wg_shared<N, false>(d, a, b);
#pragma unroll
  for (int k = 1; k < C / 16; k++)
    us_wg_shared<N, true>(d, a + (k / 4 * row_count * 128 + k % 4 * 32) / 16,
                          b + (k / 4 * N * 128 + k % 4 * 32) / 16);
}

/* d (64, C) += a (64, 16) tile rows [16 step, 16 step + 16); count: the tile's rows. */
template <int C>
static __device__ __forceinline__ void us_wg_add(float (*d)[4], const uint32_t a[4], uint32_t tile,
                                                 uint32_t count, int step) {
  uint64_t b = us_wg_descriptor(tile, count * 128) + step * 2048 / 16;
  if constexpr (C <= 128) us_wg_registers<C>(d, a, b);
  if constexpr (C == 192) {
    us_wg_registers<128>(d, a, b);
    us_wg_registers<64>(d + 16, a, b + 2 * count * 128 / 16);
  }
}

/* Two FP32 values to one register of two bf16, rounded to nearest even. */
static __device__ __forceinline__ uint32_t us_wg_pack(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

/* Accumulators (64, 16 STEPS) as row operands. */
template <int STEPS>
static __device__ __forceinline__ void us_wg_pack_rows(const float (*d)[4], uint32_t (*a)[4]) {
#pragma unroll
  for (int k = 0; k < STEPS; k++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float *from = &d[2 * k + r / 2][r % 2 * 2];
      a[k][r] = us_wg_pack(from[0], from[1]);
    }
}

#endif
