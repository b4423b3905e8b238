/* linear_avx512.c: y = x W^T with AVX-512. Few rows: 4 output rows at once; 8 rows: 3 x 8 accumulators, 6 registers of
 * weights and two for x fill the 32 registers. */
#define LINEAR_OUTS       4
#define LINEAR_WIDE_OUTS  3
#define LINEAR_WIDE_BATCH 8
#include "kernels/linear/linear_simd.h"

void us_linear_avx512(const struct us_linear_args *args) {
  linear_any(args);
}
