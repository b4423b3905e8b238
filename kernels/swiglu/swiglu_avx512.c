/* swiglu_avx512.c: swiglu_simd.h compiled for avx512. */
#include "kernels/swiglu/swiglu_simd.h"

void us_swiglu_avx512(const struct us_swiglu_args *args) {
  swiglu_any(args);
}
