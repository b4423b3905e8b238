/* wide_page.cuh: one page of weights times several row tiles' activations that lie in shared memory: each fragment of weights is decoded
 * once and multiplied with all of them.
 *
 *     float acc[US_WIDE_ROWS / HALVES][4 * HALVES] = {};                        // of row tile r: acc[r], as in page.cuh
 *     us_wide_page<US_FORMAT_FP8, 1>(page, groups, lane, rows, stride, count, acc);      // all lanes
 *
 * `rows` is the lane's first 16 bytes of the first row tile's activations, the next row tile's lie `stride` bytes on. Of `count` row tiles
 * the sums are those of us_page_multiply, addition by addition; the others' are the last one's again: a test would cost as much.
 *
 * Bound: shared memory. A fragment of FP8 is 256 bytes, and a row tile's activations for it another 256: of four row tiles 1.3 KB, ten
 * cycles of an SM, while a scheduler's four warps decode and multiply for ten.
 */
#ifndef US_KERNELS_ENGINE_WIDE_PAGE_CUH
#define US_KERNELS_ENGINE_WIDE_PAGE_CUH

#include "kernels/engine/page.cuh"

#define US_WIDE_ROWS 4 /* row tiles of a warp at once, at most; of pages with two halves 2 */

/* Group q's activations of each row tile. */
template <int ROWS>
static __device__ __forceinline__ void us_wide_load(const uint8_t *rows, uint32_t stride, uint32_t count,
                                                    int q, uint4 *b) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) b[r] = *(const uint4 *)(rows + min(r, count - 1) * stride + q * 512);
}

/* Every row tile's sums += fragment x its first (0) or second (1) sixteen columns. */
template <int ROWS, int STEP>
static __device__ __forceinline__ void us_wide_mma(float (*sum)[STEP], int at, const uint32_t *a,
                                                   const uint4 *b, int second) {
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    us_mma_bf16(sum[r] + at, a, second ? b[r].z : b[r].x, second ? b[r].w : b[r].y, sum[r] + at);
}

template <int HALVES>
static __device__ __forceinline__ void us_wide_page_fp8(const uint8_t *page, uint32_t groups, int lane,
                                                        const uint8_t *rows, uint32_t stride, uint32_t count,
                                                        float (*acc)[4 * HALVES]) {
  constexpr int ROWS = US_WIDE_ROWS / HALVES;
  const float *tail = (const float *)(page + groups * HALVES * 512);
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    float even[ROWS][4] = {}, odd[ROWS][4] = {};
#pragma unroll
    for (int q = 0; q < 4 / HALVES; q++) {
      if (q >= groups) continue;
      us_engine_in_order();
      uint4 b[ROWS], w = ((const uint4 *)page)[(q * HALVES + h) * 32 + lane];
      uint32_t a[4];
      us_wide_load<ROWS>(rows, stride, count, q, b);
      us_fp8_fragment(w.x, a), us_fp8_fragment(w.y, a + 2);
      us_wide_mma<ROWS, 4>(even, 0, a, b, 0);
      us_fp8_fragment(w.z, a), us_fp8_fragment(w.w, a + 2);
      us_wide_mma<ROWS, 4>(odd, 0, a, b, 1);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        acc[r][4 * h + c] = __fmaf_rn(tail[h], __fadd_rn(even[r][c], odd[r][c]), acc[r][4 * h + c]);
  }
}

template <int HALVES>
static __device__ __forceinline__ void us_wide_page_bf16(const uint8_t *page, uint32_t groups, int lane,
                                                         const uint8_t *rows, uint32_t stride, uint32_t count,
                                                         float (*acc)[4 * HALVES]) {
  constexpr int ROWS = US_WIDE_ROWS / HALVES;
#pragma unroll
  for (int q = 0; q < 2 / HALVES; q++) {
    if (q >= groups) continue;
    uint4 b[ROWS];
    us_wide_load<ROWS>(rows, stride, count, q, b);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      us_engine_in_order();
      const uint4 *chunk = (const uint4 *)page + (q * HALVES + h) * 64 + lane;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint4 w = chunk[32 * k];
        us_wide_mma<ROWS, 4 * HALVES>(acc, 4 * h, &w.x, b, k);
      }
    }
  }
}

static __device__ __forceinline__ void us_wide_page_f32(const uint8_t *page, int lane, const uint8_t *rows,
                                                        uint32_t stride, uint32_t count, float (*acc)[4]) {
  const uint4 *chunk = (const uint4 *)page + lane;
  uint4 b[US_WIDE_ROWS];
  us_wide_load<US_WIDE_ROWS>(rows, stride, count, 0, b);
#pragma unroll
  for (int k = 0; k < 2; k++) {
    uint32_t a[12];
    us_f32_fragments(chunk[2 * k * 32], chunk[(2 * k + 1) * 32], a);
#pragma unroll
    for (int i = 2; i >= 0; i--) us_wide_mma<US_WIDE_ROWS, 4>(acc, 0, a + 4 * i, b, k);
  }
}

template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_wide_page(const uint8_t *page, uint32_t groups, int lane,
                                                    const uint8_t *rows, uint32_t stride, uint32_t count,
                                                    float (*acc)[4 * HALVES]) {
  if constexpr (FORMAT == US_FORMAT_FP8)
    us_wide_page_fp8<HALVES>(page, groups, lane, rows, stride, count, acc);
  if constexpr (FORMAT == US_FORMAT_BF16)
    us_wide_page_bf16<HALVES>(page, groups, lane, rows, stride, count, acc);
  if constexpr (FORMAT == US_FORMAT_F32) us_wide_page_f32(page, lane, rows, stride, count, acc);
}

#endif
