/* rmsnorm.h: y = x / sqrt(mean(x^2) + eps) * w.
 *
 *     us_rmsnorm(&(struct us_rmsnorm_args){.x = h, .x_stride = D, .weight = w, .y = n, .y_stride = D, .R = R,
 * .D = D, .eps = 1e-5f, .round_bf16 = true});
 *
 * FP32 inside, one rounding to bf16 at the end. The sum of squares has 16 lanes, lane k % 16 taking fmaf(x,
 * x, lane) in ascending k, then the tree of linear.h; scale = 1 / sqrtf(sum / D + eps); y = (x * scale) * w.
 * (Hugging Face rounds x * scale to bf16 before the weight as well; the difference is in the derived bf16
 * bound.)
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
