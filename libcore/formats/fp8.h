/* fp8.h: FP8 E4M3 weights with one scale a block of 128 x 128, as DeepSeek and MiMo publish them.
 *
 *     float scale = us_fp8_block_scale(amax, US_FP8_SCALE_F32);
 *     uint8_t code = us_fp8_from_f32(w / scale);
 *     float w_back = us_fp8_to_f32(code) * scale;      // FP32-rounded: what every engine multiplies by
 *
 * E4M3 "fn": bias 7, no Inf, NaN is 0x7f and 0xff, largest value 448, subnormals in steps of 2^-9. The scalar
 * functions are compiled for host and device. No function allocates.
 */
#ifndef US_FORMATS_FP8_H
#define US_FORMATS_FP8_H

#include "base/err.h"
#include "formats/bf16.h"

#ifdef __cplusplus
extern "C" {
#endif

#define US_FP8_BLOCK 128
#define US_FP8_MAX   448.0f

enum us_fp8_scale {
  US_FP8_SCALE_F32,   /* amax / 448, rounded to FP32 */
  US_FP8_SCALE_UE8M0, /* the smallest power of two that is not below amax / 448 */
  US_FP8_SCALE_COUNT
};

/* "f32", "ue8m0"; NULL outside the enum. */
const char *us_fp8_scale_name(enum us_fp8_scale kind);

/* Sets *ret_kind; US_ERR_USAGE lists the names if this is none of them. */
US_CHECKED enum us_status us_fp8_scale_parse(const char *name, enum us_fp8_scale *ret_kind,
                                             struct us_err *err);

/* The nearest code: ties to even, saturating at 448. NaN gives 0x7f with its sign. */
static US_HD uint8_t us_fp8_from_f32(float x) {
  uint32_t bits = us_f32_bits(x), magnitude = bits & 0x7fffffffu, sign = bits >> 31 << 7;
  float clipped = us_f32_from_bits(magnitude < 0x43e00000u ? magnitude : 0x43e00000u); /* 448 */
  uint32_t c = us_f32_bits(clipped);
  uint32_t normal = ((c + 0x7ffffu + (c >> 20 & 1u)) >> 20) - (120u << 3);
  uint32_t subnormal = us_f32_bits(clipped + 16384.0f) - 0x46800000u; /* 2^14 has a unit of 2^-9 */
  uint32_t code = c < 0x3c800000u ? subnormal : normal;               /* 2^-6 */
  return (uint8_t)(sign | (magnitude > 0x7f800000u ? 0x7fu : code));
}

/* The value of a code, exact; 0x7f and 0xff give NaN. */
static US_HD float us_fp8_to_f32(uint8_t code) {
  uint32_t magnitude = code & 0x7fu, sign = (uint32_t)(code & 0x80u) << 24;
  uint32_t normal = (magnitude << 20) + (120u << 23);
  uint32_t subnormal = us_f32_bits((float)magnitude * 0x1p-9f);
  uint32_t bits = magnitude < 8 ? subnormal : normal;
  return us_f32_from_bits(sign | (magnitude == 0x7f ? 0x7fc00000u : bits));
}

/* Scale of a block whose largest magnitude is amax (finite, >= 0). Never below 2^-126, so that no scale is
 * zero or subnormal: an all-zero block has scale 2^-126 and codes 0. (DeepSeek's clamp of amax to 1e-4
 * belongs to its activations; on weights it would only waste codes.) */
static US_HD float us_fp8_block_scale(float amax, enum us_fp8_scale kind) {
  float scale = amax / US_FP8_MAX;
  uint32_t bits = us_f32_bits(scale);
  if (bits < 0x00800000u) return 0x1p-126f;
  /* Rounding cannot hide the ceil: an amax beside 448 * 2^k never has a quotient that rounds onto 2^k. */
  uint32_t up = (bits & 0x7fffffu) != 0;
  if (kind == US_FP8_SCALE_UE8M0) return us_f32_from_bits((bits & 0x7f800000u) + (up << 23));
  return scale;
}

/* Rows of the scale grid of a matrix of `rows` rows: ceil(chunk_rows / 128) a chunk, where the grid restarts
 * after every chunk_rows rows (fused qkv); 0 means one chunk. */
static US_HD size_t us_fp8_scale_rows(size_t rows, size_t chunk_rows) {
  if (!chunk_rows || rows <= chunk_rows) return (rows + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  size_t per_chunk = (chunk_rows + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  return rows / chunk_rows * per_chunk + (rows % chunk_rows + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
}

/* Encode one block of rows x cols (at most 128 x 128) that starts at `values` and has `stride` values a row.
 *   codes  (rows, code_stride)  written
 *   scale  written
 * A NaN or Inf is US_ERR_INPUT; its place in the block is left in *opt_bad_row and *opt_bad_col. */
US_CHECKED enum us_status us_fp8_encode_block(const float *values, size_t stride, size_t rows, size_t cols,
                                              enum us_fp8_scale kind, uint8_t *codes, size_t code_stride,
                                              float *scale, size_t *opt_bad_row, size_t *opt_bad_col);

/* Encode a matrix (rows, cols): codes (rows, cols), scales (us_fp8_scale_rows, ceil(cols/128)). Partial
 * blocks at the edges have their own scale. NaN or Inf is US_ERR_INPUT and names row and column. */
US_CHECKED enum us_status us_fp8_encode(const float *values, size_t rows, size_t cols, size_t chunk_rows,
                                        enum us_fp8_scale kind, uint8_t *codes, float *scales,
                                        struct us_err *err);

/* Decode n codes of one row whose scales are scales[0 .. ceil(n/128)): the FP32-rounded product code * scale.
 */
void us_fp8_decode(const uint8_t *codes, const float *scales, size_t n, float *values);

/* US_ERR_INPUT naming row and column of a NaN code, of a value that overflows FP32, or of a scale that is
 * not finite and positive. (A ue8m0 scale can round a weight of 3.3e38 and more up to 2^128.) */
US_CHECKED enum us_status us_fp8_check(const uint8_t *codes, const float *scales, size_t rows, size_t cols,
                                       size_t chunk_rows, struct us_err *err);

#ifdef __cplusplus
}
#endif
#endif
