/* axpy_avx512.c: y += a x, 16 lanes at a time. */
#include "kernels/cpu/axpy.h"
#include "kernels/cpu/vec16.h"

void us_axpy_avx512(float a, const float *x, size_t n, float *y) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    vec16_store(y + i, vec16_fma(vec16_set1(a), vec16_load(x + i), vec16_load(y + i)));
  for (; i < n; i++) y[i] = fmaf(a, x[i], y[i]);
}
