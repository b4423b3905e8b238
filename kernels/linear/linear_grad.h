/* linear_grad.h: y = x W^T over many rows, and its gradients.
 *
 *     us_linear_seq(&seq, &(struct us_linear){.R = R, .N = N, .K = K}, x, w, y);
 *     us_linear_grad_x(&seq, &dims, dy, w, 0.0f, dx);      // dx = dy W
 *     us_linear_grad_w(&seq, &dims, dy, x, dw);            // dw += dy^T x
 *
 * W (N, K) is FP32 in memory: the rounded or fake-quantised weights of a us_param. Products are FP32 sgemm.
 */
#ifndef US_KERNELS_LINEAR_GRAD_H
#define US_KERNELS_LINEAR_GRAD_H

#include "kernels/seq/seq.h"

struct us_linear {
  size_t R, N, K;
  size_t x_stride, y_stride; /* floats between rows of x, dx and of y, dy; 0: K and N */
};

/* y (R, N) = x (R, K) w^T, w (N, K). */
void us_linear_seq(struct us_seq *seq, const struct us_linear *dims, const float *x, const float *w,
                   float *y);

/* dx (R, K) = dy (R, N) w + beta * dx; beta 0 or 1. */
void us_linear_grad_x(struct us_seq *seq, const struct us_linear *dims, const float *dy, const float *w,
                      float beta, float *dx);

/* dw (N, K) += dy^T x, summed over rows in blocks fixed by the shape. */
void us_linear_grad_w(struct us_seq *seq, const struct us_linear *dims, const float *dy, const float *x,
                      float *dw);

#endif
