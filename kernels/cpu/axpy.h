/* axpy.h: y += a x by fma, the same bits on every instruction set.
 *
 *     us_axpy(weight, expert_output, n, y, isa);
 */
#ifndef US_KERNELS_CPU_AXPY_H
#define US_KERNELS_CPU_AXPY_H

#include "kernels/cpu/isa.h"
#include <stddef.h>

/* y[i] = fmaf(a, x[i], y[i]) for i < n. */
void us_axpy(float a, const float *x, size_t n, float *y, enum us_isa isa);

/* The implementations behind it. */
void us_axpy_plain(float a, const float *x, size_t n, float *y);
void us_axpy_avx2(float a, const float *x, size_t n, float *y);
void us_axpy_avx512(float a, const float *x, size_t n, float *y);

#endif
