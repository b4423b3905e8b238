/* swiglu_avx2.c: swiglu_simd.h compiled for avx2. */
#include "kernels/swiglu/swiglu_simd.h"

void us_swiglu_avx2(const struct us_swiglu_args *args) {
  swiglu_any(args);
}
