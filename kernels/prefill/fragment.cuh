/* fragment.cuh: 32 weight rows x 32 columns of a page in shared memory as tensor-core fragments, in all formats.
 *
 *     us_prefill_tail<FORMAT, HALVES>(pages, page_bytes, groups, lane, tail);       // once a page
 *     us_prefill_load<FORMAT, HALVES>(pages, page_bytes, g, sub, lane, tail, &f);   // sub < subs of group g
 *     us_prefill_multiply<FORMAT>(f, b + 4 / subs * sub, acc);                      // 8 rows
 *
 * `pages`: one page of 32 rows (HALVES 2), or two of 16 rows, page_bytes apart (HALVES 1). Layout: kernels/pages/pages.h.
 */
#ifndef US_KERNELS_PREFILL_FRAGMENT_CUH
#define US_KERNELS_PREFILL_FRAGMENT_CUH

#include "formats/matrix.h"
#include "kernels/gpu/mma.cuh"

template <int FORMAT> struct us_prefill_format {
  static constexpr int terms = FORMAT == US_FORMAT_F32 ? 3 : 1; /* bf16 values that a weight is the sum of */
  static constexpr int subs =
      FORMAT == US_FORMAT_F32 ? 2 : 1; /* pieces of a group that fill the registers one by one */
  static constexpr bool scaled = FORMAT == US_FORMAT_MXFP4 || FORMAT == US_FORMAT_FP8;
  static constexpr float undo = scaled ? 1.0f : 0x1p-64f; /* what is left of the operand's unit */
};

/* Groups of a page, at most: 2 KB of codes. */
template <int FORMAT, int HALVES> struct us_prefill_most {
  static constexpr int groups = FORMAT == US_FORMAT_MXFP4 ? 4
                                : FORMAT == US_FORMAT_F32 ? 1
                                                          : (FORMAT == US_FORMAT_FP8 ? 4 : 2) / HALVES;
};

template <int FORMAT> struct us_prefill_fragment {
  static constexpr int steps = 2 / us_prefill_format<FORMAT>::subs; /* of 16 columns */
  uint32_t a[us_prefill_format<FORMAT>::terms][2][steps][4]; /* term, half of 16 rows, step, register */
  float scale[2][2];                                         /* half, row lane / 4 or + 8 */
};

static __device__ __forceinline__ uint32_t us_prefill_chunks(uint32_t halves, uint32_t groups) { /* MXFP4 */
  return (groups * halves + 1) / 2;
}

/* A page's scales: MXFP4: the bytes of rows lane / 4 and + 8 of both halves; FP8: both halves' floats. */
template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_prefill_tail(const uint8_t *pages, uint32_t page_bytes,
                                                       uint32_t groups, int lane, uint32_t tail[4]) {
  if (FORMAT == US_FORMAT_MXFP4 && HALVES == 2) {
    uint4 words = ((const uint4 *)(pages + us_prefill_chunks(2, groups) * 512))[lane / 4];
    tail[0] = words.x, tail[1] = words.y, tail[2] = words.z, tail[3] = words.w;
  }
  if (FORMAT == US_FORMAT_MXFP4 && HALVES == 1)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint2 words = ((const uint2 *)(pages + h * page_bytes + us_prefill_chunks(1, groups) * 512))[lane / 4];
      tail[2 * h] = words.x, tail[2 * h + 1] = words.y;
    }
  if (FORMAT == US_FORMAT_FP8)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint8_t *page = HALVES == 2 ? pages : pages + h * page_bytes;
      tail[h] = ((const uint32_t *)(page + groups * HALVES * 512))[HALVES == 2 ? h : 0];
    }
}

/* Two FP32 weights of one register: three bf16 terms each, whose sum they are. */
static __device__ __forceinline__ void us_prefill_split(uint32_t low, uint32_t high, int h, int reg,
                                                        us_prefill_fragment<US_FORMAT_F32> *f) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    f->a[i][h][0][reg] = __byte_perm(low, high, 0x7632);
    low = __float_as_uint(__uint_as_float(low) - __uint_as_float(low & 0xffff0000u));
    high = __float_as_uint(__uint_as_float(high) - __uint_as_float(high & 0xffff0000u));
  }
}

/* The float of stored MXFP4 scale byte g of `bytes`, g known when compiled. */
static __device__ __forceinline__ float us_prefill_scale(uint32_t bytes, int g) {
  return __uint_as_float((g < 3 ? bytes << (23 - 8 * g) : bytes >> 1) & 0x7f800000u);
}

template <int HALVES>
static __device__ __forceinline__ void us_prefill_load_mxfp4(const uint8_t *pages, uint32_t page_bytes, int g,
                                                             int lane, const uint32_t tail[4],
                                                             us_prefill_fragment<US_FORMAT_MXFP4> *f) {
  uint32_t word[4];
  if (HALVES == 2) {
    uint4 words = ((const uint4 *)pages)[g * 32 + lane];
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
  } else {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint2 words = ((const uint2 *)(pages + h * page_bytes))[(g / 2 * 32 + lane) * 2 + g % 2];
      word[2 * h] = words.x, word[2 * h + 1] = words.y;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    us_mxfp4_fragment(word[i], f->a[0][i / 2][i % 2]);
    f->scale[i / 2][i % 2] = us_prefill_scale(tail[i], g);
  }
}

template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_prefill_load(const uint8_t *pages, uint32_t page_bytes, int g,
                                                       int sub, int lane, const uint32_t tail[4],
                                                       us_prefill_fragment<FORMAT> *f) {
  if constexpr (FORMAT == US_FORMAT_MXFP4) us_prefill_load_mxfp4<HALVES>(pages, page_bytes, g, lane, tail, f);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint8_t *page = HALVES == 2 ? pages : pages + h * page_bytes;
    int part = HALVES == 2 ? 2 * g + h : g; /* group and half in the page */
    if constexpr (FORMAT == US_FORMAT_FP8) {
      uint4 w = ((const uint4 *)page)[part * 32 + lane];
      us_fp8_fragment(w.x, f->a[0][h][0]), us_fp8_fragment(w.y, f->a[0][h][0] + 2);
      us_fp8_fragment(w.z, f->a[0][h][1]), us_fp8_fragment(w.w, f->a[0][h][1] + 2);
      f->scale[h][0] = f->scale[h][1] = __uint_as_float(tail[h]);
    }
    const uint4 *chunk = (const uint4 *)page + lane;
    if constexpr (FORMAT == US_FORMAT_BF16)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint4 w = chunk[(2 * part + k) * 32];
        uint32_t *a = f->a[0][h][k];
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
      }
    if constexpr (FORMAT == US_FORMAT_F32) {
      uint4 w0 = chunk[(4 * part + 2 * sub) * 32], w1 = chunk[(4 * part + 2 * sub + 1) * 32];
      us_prefill_split(w0.x, w0.y, h, 0, f), us_prefill_split(w0.z, w0.w, h, 1, f);
      us_prefill_split(w1.x, w1.y, h, 2, f), us_prefill_split(w1.z, w1.w, h, 3, f);
    }
  }
}

/* One 16-row half of a full page: all its columns, 16 at a time, and its scales: of rows lane / 4 and + 8 in each group (MXFP4), of
 * the page (FP8). */
template <int FORMAT, int HALVES>
static __device__ __forceinline__ void us_prefill_load_half(const uint8_t *pages, uint32_t page_bytes, int h,
                                                            int lane, uint32_t (*a)[4], uint32_t scale[2]) {
  constexpr int GROUPS = us_prefill_most<FORMAT, HALVES>::groups;
  const uint8_t *page = HALVES == 2 ? pages : pages + h * page_bytes;
  const int first = HALVES == 2 ? h : 0; /* half of this page */
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    if constexpr (FORMAT == US_FORMAT_MXFP4) {
      uint4 words = ((const uint4 *)page)[(HALVES == 2 ? g : g / 2) * 32 + lane];
      bool second = HALVES == 2 ? first : g % 2;
      us_mxfp4_fragment(second ? words.z : words.x, a[2 * g]),
          us_mxfp4_fragment(second ? words.w : words.y, a[2 * g + 1]);
    }
    if constexpr (FORMAT == US_FORMAT_FP8) {
      uint4 w = ((const uint4 *)page)[(g * HALVES + first) * 32 + lane];
      us_fp8_fragment(w.x, a[2 * g]), us_fp8_fragment(w.y, a[2 * g] + 2);
      us_fp8_fragment(w.z, a[2 * g + 1]), us_fp8_fragment(w.w, a[2 * g + 1] + 2);
    }
    if constexpr (FORMAT == US_FORMAT_BF16)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        uint4 w = ((const uint4 *)page)[((g * HALVES + first) * 2 + k) * 32 + lane];
        a[2 * g + k][0] = w.x, a[2 * g + k][1] = w.y, a[2 * g + k][2] = w.z, a[2 * g + k][3] = w.w;
      }
  }
  if constexpr (FORMAT == US_FORMAT_MXFP4) {
    uint2 words =
        ((const uint2 *)(page + us_prefill_chunks(HALVES, GROUPS) * 512))[lane / 4 * HALVES + first];
    scale[0] = words.x, scale[1] = words.y;
  }
  if constexpr (FORMAT == US_FORMAT_FP8)
    scale[0] = scale[1] = ((const uint32_t *)(page + GROUPS * HALVES * 512))[first];
}

/* acc[half] += the piece's product with 8 rows; b as ldmatrix gives it: columns 0..7, 8..15, .. of the piece. The tensor cores
 * truncate their sums, so they only add within a group; groups are added in FP32, rounded to nearest. */
template <int FORMAT>
static __device__ __forceinline__ void us_prefill_multiply(const us_prefill_fragment<FORMAT> &f,
                                                           const uint32_t *b, float acc[2][4]) {
  using Format = us_prefill_format<FORMAT>;
  constexpr int STEPS = us_prefill_fragment<FORMAT>::steps;
  const float zero[4] = {0, 0, 0, 0};
  float d[2][4];
#pragma unroll
  for (int i = Format::terms - 1; i >= 0; i--)
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        us_mma_bf16(d[h], f.a[i][h][k], b[2 * k], b[2 * k + 1],
                    i == Format::terms - 1 && k == 0 ? zero : d[h]);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      acc[h][c] =
          Format::scaled ? __fmaf_rn(f.scale[h][c / 2], d[h][c], acc[h][c]) : __fadd_rn(acc[h][c], d[h][c]);
}

/* Four 8 x 8 matrices, one after the other in 512 bytes: lane holds of each, row lane / 4, columns 2 (lane % 4) and + 1. */
static __device__ __forceinline__ void us_load_matrices(uint32_t address, uint32_t r[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

#endif
