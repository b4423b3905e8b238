/* matrix.h: a weight matrix as it is stored: y = W x, W of shape (N, K), row-major along K.
 *
 *     struct us_matrix w = {.format = US_FORMAT_MXFP4, .rows = N, .cols = K, .data = codes, .scales = scales};
 *     float row[K];
 *     us_matrix_decode_row(&w, 7, row);                   // the exact FP32 values that every engine multiplies by
 *
 * A us_matrix owns nothing: data and scales point into a mapped checkpoint or into an arena.
 */
#ifndef US_FORMATS_MATRIX_H
#define US_FORMATS_MATRIX_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum us_format {
  US_FORMAT_NONE = 0,
  US_FORMAT_F32,
  US_FORMAT_BF16,
  US_FORMAT_FP8,   /* E4M3, one f32 scale (multiplied) a block of 128 x 128 */
  US_FORMAT_MXFP4, /* E2M1, one E8M0 scale a group of 32 along K */
  US_FORMAT_COUNT
};

#define US_FP8_BLOCK   128
#define US_MXFP4_GROUP 32

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
static inline size_t us_matrix_scale_row(const struct us_matrix *w, size_t row) {
  if (!w->scale_chunk_rows) return row / US_FP8_BLOCK;
  size_t chunk = row / w->scale_chunk_rows, within = row % w->scale_chunk_rows;
  return chunk * ((w->scale_chunk_rows + US_FP8_BLOCK - 1) / US_FP8_BLOCK) + within / US_FP8_BLOCK;
}

/* Bytes of codes and of scales that reading the whole matrix once streams. */
size_t us_matrix_data_bytes(enum us_format format, size_t rows, size_t cols);
size_t us_matrix_scale_bytes(enum us_format format, size_t rows, size_t cols, size_t scale_chunk_rows);

/* Decode one row (K) or all rows (N, K) to the FP32 values that the kernels multiply by: MXFP4 code * 2^(byte-127) is
 * exact; FP8 is the FP32-rounded product code * scale. */
void us_matrix_decode_row(const struct us_matrix *w, size_t row, float *values);
void us_matrix_decode(const struct us_matrix *w, float *values);

#endif
