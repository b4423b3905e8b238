/* rmsnorm_grad.h: y = x / sqrt(mean(x^2) + eps) * gain over many rows, and its gradients.
 *
 *     us_rmsnorm_seq(&seq, &(struct us_rmsnorm_rows){.R = R, .D = D, .eps = 1e-5f}, x, gain, y, inverse);
 *     us_rmsnorm_grad(&seq, &rows, x, gain, inverse, dy, 1.0f, dx, dgain);
 *
 * A row may be one head of a longer row: item i of R * heads lies at (i / heads) * stride + (i % heads) * D, which is how
 * the drafter normalises q and k per head. y is rounded to bf16 (seq->rounding), the gradient passes straight through.
 */
#ifndef US_KERNELS_RMSNORM_GRAD_H
#define US_KERNELS_RMSNORM_GRAD_H

#include "kernels/seq/seq.h"

struct us_rmsnorm_rows {
  size_t R, D;
  size_t heads;  /* D-wide items a row; 0: 1 */
  size_t stride; /* floats between rows of x, y, dy, dx; 0: heads * D */
  float eps;
  bool keep_f32; /* do not round y even where seq rounds (q and k norms inside attention) */
};

/* inverse (R * heads): 1 / rms, saved for the gradient. y may be x. */
void us_rmsnorm_seq(struct us_seq *seq, const struct us_rmsnorm_rows *rows, const float *x, const float *gain,
                    float *y, float *inverse);

/* dx = gradient + beta * dx (beta 0 or 1; dx may be dy when beta is 0); dgain (D) is added to, NULL if frozen. */
void us_rmsnorm_grad(struct us_seq *seq, const struct us_rmsnorm_rows *rows, const float *x,
                     const float *gain, const float *inverse, const float *dy, float beta, float *dx,
                     float *dgain);

#endif
