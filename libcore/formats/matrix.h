/* matrix.h: a weight matrix as it is stored: y = W x, W of shape (N, K), row-major along K.
 *
 *     struct us_matrix w = {
 *         .format = US_FORMAT_MXFP4, .rows = N, .cols = K, .data = codes, .scales = scales};
 *     us_matrix_decode_row(&w, 7, row);       // (K) the exact FP32 values that every engine multiplies by
 *
 * A us_matrix owns nothing: data and scales point into a mapped checkpoint or into an arena.
 */
#ifndef US_FORMATS_MATRIX_H
#define US_FORMATS_MATRIX_H

#include "base/err.h"
#include "formats/fp8.h"
#include "formats/mxfp4.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum us_format {
  US_FORMAT_NONE = 0,
  US_FORMAT_F32,
  US_FORMAT_BF16,
  US_FORMAT_FP8,   /* E4M3, one f32 scale (multiplied) a block of 128 x 128 */
  US_FORMAT_MXFP4, /* E2M1, one E8M0 scale a group of 32 along K */
  US_FORMAT_COUNT
};

struct us_matrix {
  enum us_format format;
  size_t rows, cols;       /* N, K */
  const void *data;        /* F32, BF16: (N, K); FP8: (N, K) bytes; MXFP4: (N, K/2) bytes, low nibble first */
  const void *scales;      /* FP8: f32 (scale_rows, ceil(K/128)); MXFP4: u8 (N, K/32); else NULL */
  size_t scale_chunk_rows; /* FP8: the scale grid restarts after so many rows (fused qkv chunks); 0: never */
};

/* "f32", "bf16", "fp8", "mxfp4"; "none" for US_FORMAT_NONE. */
const char *us_format_name(enum us_format format);

/* The format of that name; US_FORMAT_NONE if there is none. */
enum us_format us_format_parse(const char *name);

/* Rows of the FP8 scale grid: ceil(chunk/128) a chunk. */
size_t us_matrix_scale_rows(const struct us_matrix *w);

/* Index of the scale row that covers weight row `row` of an FP8 matrix. */
static US_HD size_t us_matrix_scale_row(const struct us_matrix *w, size_t row) {
  if (!w->scale_chunk_rows) return row / US_FP8_BLOCK;
  size_t chunk = row / w->scale_chunk_rows, within = row % w->scale_chunk_rows;
  return chunk * ((w->scale_chunk_rows + US_FP8_BLOCK - 1) / US_FP8_BLOCK) + within / US_FP8_BLOCK;
}

/* Bytes of codes and of scales that reading the whole matrix once streams. */
size_t us_matrix_data_bytes(enum us_format format, size_t rows, size_t cols);
size_t us_matrix_scale_bytes(enum us_format format, size_t rows, size_t cols, size_t scale_chunk_rows);

/* Decode one row (K) or all rows (N, K) to the FP32 values that the kernels multiply by: MXFP4 code *
 * 2^(byte-127) is exact; FP8 is the FP32-rounded product code * scale. */
void us_matrix_decode_row(const struct us_matrix *w, size_t row, float *values);
void us_matrix_decode(const struct us_matrix *w, float *values);

/* How a matrix is to be stored: what fake-quantization and export share. {.format = US_FORMAT_MXFP4} alone
 * means the defaults: scale rule MSE, FP8 scales in FP32, one scale grid. */
struct us_matrix_encoding {
  enum us_format format;
  enum us_scale_rule scale_rule; /* MXFP4 */
  enum us_fp8_scale fp8_scale;   /* FP8 */
  size_t scale_chunk_rows;       /* FP8 */
};

/* Whether a matrix of this shape can have this encoding: US_ERR_USAGE otherwise (MXFP4 wants K a multiple of
 * 32). */
US_CHECKED enum us_status us_matrix_encoding_check(const struct us_matrix_encoding *encoding, size_t cols,
                                                   struct us_err *err);

/* Encode (N, K) FP32 values into buffers of us_matrix_data_bytes and us_matrix_scale_bytes (scales may be
 * NULL where there are none). NaN or Inf is US_ERR_INPUT and names row and column. Threads may share a matrix
 * by rows, cut at multiples of us_matrix_row_grain, each calling this on its part. */
US_CHECKED enum us_status us_matrix_encode(const float *values, size_t rows, size_t cols,
                                           const struct us_matrix_encoding *encoding, void *data,
                                           void *scales, struct us_err *err);

/* Rows may be cut at multiples of this many: 1, or for FP8 128 (scale_chunk_rows if the grid restarts). */
size_t us_matrix_row_grain(const struct us_matrix_encoding *encoding);

/* decode(encode(values)) by the same code, a piece at a time, without allocating: what training multiplies by
 * is what the exported file decodes to, bit for bit. `out` (N, K) may be `values`. Same errors as
 * us_matrix_encode. */
US_CHECKED enum us_status us_matrix_fake_quant(const float *values, size_t rows, size_t cols,
                                               const struct us_matrix_encoding *encoding, float *out,
                                               struct us_err *err);

/* Read every weight once: NaN or Inf values or codes, scale byte 255, scales that are not finite and positive
 * are US_ERR_INPUT and name the row and the column or block. */
US_CHECKED enum us_status us_matrix_check(const struct us_matrix *w, struct us_err *err);

#ifdef __cplusplus
}
#endif
#endif
