/* rmsnorm.h: y = x / sqrt(mean(x^2) + eps) * w.
 *
 *     struct us_rmsnorm_args args = {.x = h, .x_stride = D, .weight = w, .y = n, .y_stride = D,
 *                                    .R = R, .D = D, .eps = 1e-5f, .round_bf16 = true};
 *     us_rmsnorm(&args);
 *
 * FP32 inside, one rounding to bf16 at the end. The sum of squares has 16 lanes, lane k % 16 taking
 * fmaf(x, x, lane) in ascending k, then the tree of linear.h; scale = 1 / sqrtf(sum / D + eps);
 * y = (x * scale) * w. (In bf16 Hugging Face rounds x * scale before the weight as well.)
 */
#ifndef US_KERNELS_RMSNORM_RMSNORM_H
#define US_KERNELS_RMSNORM_RMSNORM_H

#include "kernels/cpu/isa.h"
#include <stddef.h>

struct us_rmsnorm_args {
  const float *x; /* (R, D) */
  size_t x_stride;
  const float *weight; /* (D) */
  float *y;            /* (R, D); may be x */
  size_t y_stride;
  size_t R, D;
  float eps;
  bool round_bf16;
  enum us_isa isa;
};

void us_rmsnorm(const struct us_rmsnorm_args *args);

#endif
