/* gemm.h: C = alpha op(A) op(B) + beta C in FP32, the same bits on every machine and for every cut of C.
 *
 *     us_gemm(&(struct us_gemm){.M = rows, .N = N, .K = D, .a = x, .a_row = D, .a_col = 1,
 *                               .b = w, .b_row = 1, .b_col = D, .c = y, .c_row = N, .alpha = 1});    // y = x w^T
 *
 * Element (i, j) is summed over k in ascending order, each product by fma into one FP32 sum, which starts at 0 and is
 * added to C every 256 k. So it depends neither on M, N, threads nor instruction set, and its error stays below
 * (256 + K / 256) 2^-24 of the sum of magnitudes. One thread; no allocation.
 *
 * Why not OpenBLAS: Debian 12's (0.3.21) takes a processor it does not know, Emerald Rapids for one, for a Prescott and
 * runs at a tenth of the speed; and its bits differ between machines. Measured against its SkylakeX kernels: docs/perf.md.
 */
#ifndef US_KERNELS_GEMM_H
#define US_KERNELS_GEMM_H

#include "kernels/cpu/isa.h"
#include <stddef.h>

#define US_GEMM_DEPTH 256 /* k summed before C is touched */

struct us_gemm {
  size_t M, N, K;
  const float *a; /* element (i, k) at a[i * a_row + k * a_col] */
  size_t a_row, a_col;
  const float *b; /* element (k, j) at b[k * b_row + j * b_col]; b_row or b_col is 1 */
  size_t b_row, b_col;
  float *c; /* element (i, j) at c[i * c_row + j] */
  size_t c_row;
  float alpha, beta; /* beta 0 does not read C */
  enum us_isa isa;
};

void us_gemm(const struct us_gemm *args);

#endif
