/* axpy_ref.c: y += a x in plain C, and the choice of an implementation. */
#include "kernels/cpu/axpy.h"

#include <math.h>

void us_axpy_plain(float a, const float *x, size_t n, float *y) {
  for (size_t i = 0; i < n; i++) y[i] = fmaf(a, x[i], y[i]);
}

void us_axpy(float a, const float *x, size_t n, float *y, enum us_isa isa) {
#if defined(__x86_64__)
  enum us_isa resolved = us_isa_resolve(isa);
  if (resolved == US_ISA_AVX512) {
    us_axpy_avx512(a, x, n, y);
    return;
  }
  if (resolved == US_ISA_AVX2) {
    us_axpy_avx2(a, x, n, y);
    return;
  }
#endif
  us_axpy_plain(a, x, n, y);
}
