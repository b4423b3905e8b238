/* rmsnorm_avx2.c: rmsnorm_simd.h compiled for avx2. */
#include "kernels/rmsnorm/rmsnorm_simd.h"

void us_rmsnorm_avx2(const struct us_rmsnorm_args *args) {
  rmsnorm_any(args);
}
