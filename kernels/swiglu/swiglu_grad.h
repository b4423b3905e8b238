/* swiglu_grad.h: a = silu(gate) * up over many rows, unclamped, and its gradient.
 *
 *     us_swiglu_seq(&seq, R, F, gate_up, a);               // gate_up (R, 2F): gate first
 *     us_swiglu_grad(&seq, R, F, gate_up, da, d_gate_up);  // d_gate_up may be gate_up
 */
#ifndef US_KERNELS_SWIGLU_GRAD_H
#define US_KERNELS_SWIGLU_GRAD_H

#include "kernels/seq/seq.h"

/* a (R, F), rounded to bf16 where seq rounds. */
void us_swiglu_seq(struct us_seq *seq, size_t R, size_t F, const float *gate_up, float *a);
void us_swiglu_grad(struct us_seq *seq, size_t R, size_t F, const float *gate_up, const float *da,
                    float *d_gate_up);

/* One block of rows on the calling thread, for operations that fuse it. */
void us_swiglu_rows(const struct us_seq *seq, size_t R, size_t F, const float *gate_up, float *a);
void us_swiglu_grad_rows(size_t R, size_t F, const float *gate_up, const float *da, float *d_gate_up);

#endif
