/* swiglu_train.h: a = silu(gate) * up over many bf16 rows on the GPU, and its gradient.
 *
 *     us_swiglu_train(R, F, gate_up, a, stream);                    // gate_up (R, 2F): gate first
 *     us_swiglu_train_grad(R, F, gate_up, da, d_gate_up, NULL, stream);   // d_gate_up may be gate_up
 *
 * Computed in FP32 as swiglu_grad.h does, from bf16 and rounded to bf16 once: the same bits as the CPU on the same inputs.
 * F is a multiple of 8, pointers are device memory, 16-byte aligned; a call returns a cudaError_t.
 */
#ifndef US_KERNELS_SWIGLU_TRAIN_H
#define US_KERNELS_SWIGLU_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* a (R, F) written. */
int us_swiglu_train(size_t R, size_t F, const uint16_t *gate_up, uint16_t *a, cudaStream_t stream);

/* da (R, F); d_gate_up (R, 2F) written; opt_a (R, F) is the forward's a again, for RECOMPUTE; NULL if not wanted. */
int us_swiglu_train_grad(size_t R, size_t F, const uint16_t *gate_up, const uint16_t *da, uint16_t *d_gate_up,
                         uint16_t *opt_a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
