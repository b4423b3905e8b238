/* residual.h: the residual stream: h += y, FP32, never rounded.
 *
 *     us_residual_add(h, y, R * D);
 */
#ifndef US_KERNELS_RESIDUAL_RESIDUAL_H
#define US_KERNELS_RESIDUAL_RESIDUAL_H

#include <stddef.h>

/* h (n) += y (n), one rounding a value. */
void us_residual_add(float *h, const float *y, size_t n);

#endif
