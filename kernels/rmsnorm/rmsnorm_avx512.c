/* rmsnorm_avx512.c: rmsnorm_simd.h compiled for avx512. */
#include "kernels/rmsnorm/rmsnorm_simd.h"

void us_rmsnorm_avx512(const struct us_rmsnorm_args *args) {
  rmsnorm_any(args);
}
