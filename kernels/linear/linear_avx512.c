/* linear_avx512.c: y = x W^T with AVX-512; 4 x 4 accumulators leave 16 registers for weights and tables. */
#define LINEAR_OUTS  4
#define LINEAR_BATCH 4
#include "kernels/linear/linear_simd.h"

void us_linear_avx512(const struct us_linear_args *args) {
  linear_any(args);
}
