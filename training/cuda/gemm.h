/* gemm.h: dense products over rows by cublasLt: bf16 operands, FP32 sums, and what is added in the epilogue.
 *
 *     struct us_cuda_linear d = {.R = R, .N = N, .K = K};
 *     us_cuda_linear(cuda, &d, x, w, y);                    // y = bf16(x W^T)
 *     us_cuda_linear_add(cuda, &d, x, w, residual, out);    // out = residual + x W^T, FP32; out may be residual
 *     us_cuda_linear_grad_x(cuda, &d, dy, w, dx);           // dx = bf16(dy W)
 *     us_cuda_linear_grad_w(cuda, &d, dy, x, dw);           // dw += dy^T x, FP32
 *
 * The algorithm of a product is the library's first choice for its shape, types and strides, looked up once and kept:
 * choosing by the clock would give other sums from run to run. Failures are kept in the context (us_cuda_did).
 */
#ifndef US_TRAINING_CUDA_GEMM_H
#define US_TRAINING_CUDA_GEMM_H

#include "training/cuda/cuda.h"

/* Rows are 16-byte aligned: strides are multiples of 8 values, of 4 in FP32. */
struct us_cuda_linear {
  size_t R, N, K;            /* x (R, K), w (N, K), y (R, N) */
  size_t x_stride, y_stride; /* values between rows of x, dx and of y, dy; 0: K and N */
};

void us_cuda_linear(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *x,
                    const uint16_t *w, uint16_t *y);
void us_cuda_linear_f32(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *x,
                        const uint16_t *w, float *y);
void us_cuda_linear_add(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *x,
                        const uint16_t *w, const float *residual, float *out);

void us_cuda_linear_grad_x(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *dy,
                           const uint16_t *w, uint16_t *dx);

/* dx = dy W + beta dx, beta 0 or 1. */
void us_cuda_linear_grad_x_f32(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *dy,
                               const uint16_t *w, float beta, float *dx);

/* dw (N, K) += dy^T x; a NULL dw (frozen) does nothing. */
void us_cuda_linear_grad_w(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *dy,
                           const uint16_t *x, float *dw);

/* Storage of the choices; the context owns it. */
US_CHECKED enum us_status us_cuda_plans_create(struct us_cuda_plans **ret_plans, struct us_err *err);
void us_cuda_plans_free(struct us_cuda_plans *plans);

#endif
