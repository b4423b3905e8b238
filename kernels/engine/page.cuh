/* page.cuh: one page of weights times the activations that a compute warp keeps in registers.
 *
 *     float acc[4 * HALVES] = {};                                          // element c of half h: acc[4 h + c]
 *     struct us_page_at at = us_page_at<US_FORMAT_FP8, 1>(page, groups, lane);
 *     us_page_multiply<US_FORMAT_FP8, 1>(at, groups, rows, acc);           // acc += page x rows; all lanes
 *
 * Bound: instructions. What costs here is decoding: a word of MXFP4 is 8 instructions for one multiply of 16 columns, and a scheduler's
 * pipe for logic takes one in two cycles. Registers are as scarce: 48 hold activations.
 */
#ifndef US_KERNELS_ENGINE_PAGE_CUH
#define US_KERNELS_ENGINE_PAGE_CUH

#include "kernels/engine/block.cuh"
#include "kernels/gpu/mma.cuh"

/* Groups of 32 columns a page, and stages a tile and part: their product, at most US_ENGINE_GROUPS, is in registers. */
template <int FORMAT, int HALVES> struct us_engine_page_groups {
  static constexpr int most = US_ENGINE_PAGE_GROUPS(FORMAT, HALVES),
                       subs = US_ENGINE_MAX_SUBS(FORMAT, HALVES);
};

/* Where a lane's words of a page begin, and its scales: addresses in shared memory. */
struct us_page_at {
  uint32_t words, scales;
};
template <int FORMAT, int HALVES>
static __device__ __forceinline__ struct us_page_at us_page_at(uint32_t page, uint32_t groups,
                                                               uint32_t lane) {
  uint32_t words = page + lane * 16;
  if (FORMAT == US_FORMAT_MXFP4 && HALVES == 2) return {words, page + groups * 512 + lane / 4 * 16};
  if (FORMAT == US_FORMAT_MXFP4) return {words, page + (groups + 1) / 2 * 512 + lane / 4 * 8};
  return {words, page + groups * HALVES * 512}; /* FP8; the others have none */
}

/* An ordinary load, which may be moved where it is best. */
template <class T> static __device__ __forceinline__ T us_page_load(uint32_t address) {
  return *(const T *)__cvta_shared_to_generic(address);
}

/* Keeps the compiler from loading the codes of later groups early: four warps a scheduler hide the latency, and the registers
 * are needed for the activations. */
static __device__ __forceinline__ void us_engine_in_order(void) {
  asm volatile("" ::: "memory");
}

/* The float of stored scale byte j of `bytes`, j known when compiled. */
static __device__ __forceinline__ float us_scale_at(uint32_t bytes, int j) {
  uint32_t shifted = j < 3 ? bytes << (23 - 8 * j) : bytes >> 1;
  return __uint_as_float(shifted & 0x7f800000u);
}

/* Four sums of a half: acc += scale of their row * d. */
static __device__ __forceinline__ void us_page_scale(const float d[4], uint32_t low_bytes,
                                                     uint32_t high_bytes, int q, float *acc) {
  float low = us_scale_at(low_bytes, q), high = us_scale_at(high_bytes, q);
  acc[0] = __fmaf_rn(low, d[0], acc[0]), acc[1] = __fmaf_rn(low, d[1], acc[1]);
  acc[2] = __fmaf_rn(high, d[2], acc[2]), acc[3] = __fmaf_rn(high, d[3], acc[3]);
}

/* One group of both halves of a page. The halves' multiplies alternate, so that none waits for the one before it. */
static __device__ __forceinline__ void us_group_multiply_mxfp4(uint4 word, uint4 b, float d[8]) {
  const float zero[4] = {0, 0, 0, 0};
  uint32_t a[4], c[4];
  us_mxfp4_fragment(word.x, a), us_mma_bf16(d, a, b.x, b.y, zero);
  us_mxfp4_fragment(word.z, c), us_mma_bf16(d + 4, c, b.x, b.y, zero);
  us_mxfp4_fragment(word.y, a), us_mma_bf16(d, a, b.z, b.w, d);
  us_mxfp4_fragment(word.w, c), us_mma_bf16(d + 4, c, b.z, b.w, d + 4);
}

/* acc[4 h + c] += page x b: element c of us_mma_bf16's d for half h. `groups` of the page exist. A group's sums are scaled while the
 * next one's are multiplied. */
static __device__ __forceinline__ void us_page_multiply_mxfp4_two(struct us_page_at page, uint32_t groups,
                                                                  const uint4 *b, float *acc) {
  uint4 scales = us_page_load<uint4>(page.scales);
  float before[8];
#pragma unroll
  for (int q = 0; q < 4; q++) {
    if (q >= groups) continue; /* a break would keep the loop from unrolling, and the rows out of registers */
    us_engine_in_order();
    float d[8];
    us_group_multiply_mxfp4(us_page_load<uint4>(page.words + q * 512), b[q], d);
    if (q) {
      us_page_scale(before, scales.x, scales.y, q - 1, acc);
      us_page_scale(before + 4, scales.z, scales.w, q - 1, acc + 4);
    }
    if (q + 1 == groups) {
      us_page_scale(d, scales.x, scales.y, q, acc);
      us_page_scale(d + 4, scales.z, scales.w, q, acc + 4);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) before[i] = d[i];
  }
}

/* The same of a page of one half. */
static __device__ __forceinline__ void us_page_multiply_mxfp4_one(struct us_page_at page, uint32_t groups,
                                                                  const uint4 *b, float *acc) {
  const float zero[4] = {0, 0, 0, 0};
  uint2 scales = us_page_load<uint2>(page.scales);
#pragma unroll
  for (int q = 0; q < 4; q++) {
    if (q >= groups) continue;
    us_engine_in_order();
    uint2 word = us_page_load<uint2>(page.words + q / 2 * 512 + q % 2 * 8);
    uint32_t a[4];
    float d[4];
    us_mxfp4_fragment(word.x, a), us_mma_bf16(d, a, b[q].x, b[q].y, zero);
    us_mxfp4_fragment(word.y, a), us_mma_bf16(d, a, b[q].z, b[q].w, d);
    us_page_scale(d, scales.x, scales.y, q, acc);
  }
}

/* The page's columns share a scale a half. */
template <int HALVES>
static __device__ __forceinline__ void us_page_multiply_fp8(struct us_page_at page, uint32_t groups,
                                                            const uint4 *b, float *acc) {
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
    float scale = us_page_load<float>(page.scales + 4 * h);
#pragma unroll
    for (int q = 0; q < 4 / HALVES; q++) {
      if (q >= groups) continue;
      us_engine_in_order();
      uint4 w = us_page_load<uint4>(page.words + (q * HALVES + h) * 512);
      uint32_t a[4];
      us_fp8_fragment(w.x, a), us_fp8_fragment(w.y, a + 2);
      us_mma_bf16(even, a, b[q].x, b[q].y, even);
      us_fp8_fragment(w.z, a), us_fp8_fragment(w.w, a + 2);
      us_mma_bf16(odd, a, b[q].z, b[q].w, odd);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) acc[4 * h + c] = __fmaf_rn(scale, __fadd_rn(even[c], odd[c]), acc[4 * h + c]);
  }
}

template <int HALVES>
static __device__ __forceinline__ void us_page_multiply_bf16(struct us_page_at page, uint32_t groups,
                                                             const uint4 *b, float *acc) {
#pragma unroll
  for (int q = 0; q < 2 / HALVES; q++) {
    if (q >= groups) continue;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      us_engine_in_order();
      uint32_t chunk = page.words + (q * HALVES + h) * 1024;
      uint4 w0 = us_page_load<uint4>(chunk), w1 = us_page_load<uint4>(chunk + 512);
      us_mma_bf16(acc + 4 * h, &w0.x, b[q].x, b[q].y, acc + 4 * h);
      us_mma_bf16(acc + 4 * h, &w1.x, b[q].z, b[q].w, acc + 4 * h);
    }
  }
}

/* Register i of a 16 x 16 fragment holds two FP32 weights: three bf16 terms each, exactly. */
static __device__ __forceinline__ void us_split_f32(uint32_t low, uint32_t high, uint32_t *terms) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    terms[4 * i] = __byte_perm(low, high, 0x7632);
    low = __float_as_uint(__uint_as_float(low) - __uint_as_float(low & 0xffff0000u));
    high = __float_as_uint(__uint_as_float(high) - __uint_as_float(high & 0xffff0000u));
  }
}

/* A 16 x 16 fragment: terms[4 i], for the i-th terms. */
static __device__ __forceinline__ void us_f32_fragments(uint4 w0, uint4 w1, uint32_t *terms) {
  us_split_f32(w0.x, w0.y, terms), us_split_f32(w0.z, w0.w, terms + 1);
  us_split_f32(w1.x, w1.y, terms + 2), us_split_f32(w1.z, w1.w, terms + 3);
}

static __device__ __forceinline__ void us_page_multiply_f32(struct us_page_at page, const uint4 *b,
                                                            float *acc) {
#pragma unroll 1 /* small code: it runs once a layer */
  for (int k = 0; k < 2; k++) {
    uint32_t a[12];
    uint32_t chunk = page.words + k * 1024;
    us_f32_fragments(us_page_load<uint4>(chunk), us_page_load<uint4>(chunk + 512), a);
#pragma unroll
    for (int i = 2; i >= 0; i--) us_mma_bf16(acc, a + 4 * i, k ? b->z : b->x, k ? b->w : b->y, acc);
  }
}

template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_page_multiply(struct us_page_at page, uint32_t groups,
                                                        const uint4 *b, float *acc) {
  if (FORMAT == US_FORMAT_MXFP4 && HALVES == 2) us_page_multiply_mxfp4_two(page, groups, b, acc);
  if (FORMAT == US_FORMAT_MXFP4 && HALVES == 1) us_page_multiply_mxfp4_one(page, groups, b, acc);
  if (FORMAT == US_FORMAT_FP8) us_page_multiply_fp8<HALVES>(page, groups, b, acc);
  if (FORMAT == US_FORMAT_BF16) us_page_multiply_bf16<HALVES>(page, groups, b, acc);
  if (FORMAT == US_FORMAT_F32) us_page_multiply_f32(page, b, acc);
}

/* What undoes the operand's 2^64 where the weights' format has not. */
static __device__ __forceinline__ float us_engine_undo(uint32_t format) {
  return format == US_FORMAT_MXFP4 || format == US_FORMAT_FP8 ? 1.0f : 0x1p-64f;
}

#endif
