/* linear_avx2.c: y = x W^T with AVX2 and fma; of 16 registers, 2 x 2 accumulators of two registers each take half. */
#define LINEAR_OUTS       2
#define LINEAR_WIDE_OUTS  2
#define LINEAR_WIDE_BATCH 2
#include "kernels/linear/linear_simd.h"

void us_linear_avx2(const struct us_linear_args *args) {
  linear_any(args);
}
