/* linear.h: y = x W^T for a weight matrix in any format: R rows of x against a range of W's rows.
 *
 *     us_linear_pack(x, R, K, K, packed, us_linear_packed_width(K));          // once a row, not once a tile
 *     us_linear(&(struct us_linear_args){.w = &w, .x = packed, .x_stride = us_linear_packed_width(K),
 *                                        .y = y, .y_stride = N, .R = R, .begin = 0, .end = N});
 *
 * The canonical dot product, the same bits for every format of equal decoded values, every instruction set,
 * any R, and any cut of the output rows: weights are decoded to FP32 (us_matrix_decode_row); there are 16
 * FP32 lanes; in each group of 32 consecutive k, lane l takes k = 32g + 2l, then k = 32g + 2l + 1, each by
 * fmaf(w, x, lane); a last short group is padded with zeros (w = x = 0); after the last group the lanes are
 * summed by the tree l with l + 8, then + 4, + 2, + 1. The order suits both low-nibble-first codes and pairs
 * of bf16.
 */
#ifndef US_KERNELS_LINEAR_LINEAR_H
#define US_KERNELS_LINEAR_LINEAR_H

#include "formats/matrix.h"
#include "kernels/cpu/isa.h"

#define US_LINEAR_GROUP 32

struct us_linear_args {
  const struct us_matrix *w;  /* (N, K); MXFP4 needs K % 32 == 0 */
  const float *x;             /* packed rows, each us_linear_packed_width(K) long */
  size_t x_stride;            /* floats from one packed row to the next */
  const uint32_t *opt_x_rows; /* (R) which packed row output row r reads; NULL: row r */
  float *y;                   /* (R, end - begin) written: y[r * y_stride + n - begin] */
  size_t y_stride;
  size_t R;
  size_t begin, end; /* rows of W: the tile's output columns */
  enum us_isa isa;
};

/* Floats of a packed row: K rounded up to 32. */
static inline size_t us_linear_packed_width(size_t K) {
  return (K + US_LINEAR_GROUP - 1) / US_LINEAR_GROUP * US_LINEAR_GROUP;
}

/* Where value k of a row lies in its packed row: even k of a group of 32 first, then odd k. */
static inline size_t us_linear_packed_index(size_t k) {
  return k / US_LINEAR_GROUP * US_LINEAR_GROUP + (k & 1) * (US_LINEAR_GROUP / 2) + k % US_LINEAR_GROUP / 2;
}

/* Pack R rows (R, K) for us_linear; the padding is zeroed. x and packed must not overlap. */
void us_linear_pack(const float *x, size_t R, size_t K, size_t x_stride, float *packed, size_t packed_stride);

/* y = x W^T on the output rows [begin, end). No allocation, thread-safe. */
void us_linear(const struct us_linear_args *args);

#endif
