/* rmsnorm_train.h: y = x / sqrt(mean(x^2) + eps) * gain over many rows on the GPU, and its gradients.
 *
 *     struct us_rmsnorm_train norm = {.R = R, .D = D, .eps = 1e-5f, .x = residual, .gain = gain, .y = y, .inverse = inverse};
 *     us_rmsnorm_train(&norm, stream);
 *     us_rmsnorm_train_grad(&(struct us_rmsnorm_train_grad){.norm = norm, .dy = dy, .dx = dx, .add = true, .opt_dgain = dgain,
 *                                                           .scratch = scratch}, stream);
 *
 * As rmsnorm_grad.h, with the row in FP32 (the residual stream) or in bf16 (a head of the drafter's q and k). All pointers
 * are device memory; a call returns a cudaError_t, cudaErrorInvalidValue for sizes the rules below do not allow. Sums have an
 * order that D and R * heads fix: the same bits in every run.
 */
#ifndef US_KERNELS_RMSNORM_TRAIN_H
#define US_KERNELS_RMSNORM_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Item i of R * heads lies at (i / heads) * stride + (i % heads) * D of x and y (and of dx and dy). D and stride are
 * multiples of 4; D <= 8192; pointers are 16-byte aligned (8 for bf16). */
struct us_rmsnorm_train {
  size_t R, D;
  size_t heads;  /* D-wide items a row; 0: 1 */
  size_t stride; /* values between rows of x, y, dy, dx; 0: heads * D */
  float eps;
  const float *x;         /* FP32 rows, or ... */
  const uint16_t *x_bf16; /* ... bf16 rows: exactly one is given */
  const float *gain;      /* (D) */
  uint16_t *y;            /* bf16; may be x_bf16 */
  float *inverse;         /* (R * heads) 1 / rms, written; NULL if no gradient will be taken */
  const float *opt_add;   /* FP32 rows laid out as y, added to it before it is rounded */
  uint16_t *opt_tap;      /* also bf16(x): row r at opt_tap + r * tap_stride (heads must be 1) */
  size_t tap_stride;
};
int us_rmsnorm_train(const struct us_rmsnorm_train *norm, cudaStream_t stream);

/* norm.y, norm.opt_add and norm.opt_tap are not used; norm.inverse is read. */
struct us_rmsnorm_train_grad {
  struct us_rmsnorm_train norm;
  const float *dy;         /* FP32, or ... */
  const uint16_t *dy_bf16; /* ... bf16: exactly one is given */
  float *dx;               /* FP32, or ... */
  uint16_t *dx_bf16;       /* ... bf16: exactly one is given; may be dy or dy_bf16 */
  bool add;                /* add to dx (FP32 alone) instead of writing it */
  uint16_t *
      opt_dx_copy; /* bf16 of the new dx, with dx's strides: the operand of the next product (FP32 dx alone) */
  float *opt_dgain; /* (D) added to; NULL: frozen */
  void *scratch;    /* us_rmsnorm_train_scratch bytes; not read without opt_dgain */
};
size_t us_rmsnorm_train_scratch(size_t R, size_t heads, size_t D);
int us_rmsnorm_train_grad(const struct us_rmsnorm_train_grad *grad, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
