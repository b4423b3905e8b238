/* experts_train.h: everything around the grouped products of a mixture-of-experts layer on the GPU: plan, rows, SwiGLU.
 *
 *     forward                                                backward, dx (R, D) FP32 the gradient of the residual stream
 *     us_router_train(..)          id, weight                us_experts_train_scatter_grad(&rows, dx, dy_slot)
 *     us_experts_train_plan(..)    start, row, pair, slot    us_grouped_grad_x(down, dy_slot -> da)
 *     us_experts_train_scatter(&rows, norm, x_slot)          us_experts_train_swiglu_grad(..)  a_w, dgate_up, dweight
 *     us_grouped_forward(gate_up, x_slot -> gate_up)         us_grouped_grad_w(down, dy_slot, a_w)
 *     us_experts_train_swiglu(S, F, gate_up, a)              us_grouped_grad_w(gate_up, dgate_up, x_slot)
 *     us_grouped_forward(down, a -> y_slot)                  us_grouped_grad_x(gate_up, dgate_up -> dx_slot)
 *     us_experts_train_combine(..)  residual                 us_router_train_grad(..)  dlogit
 *                                                            us_experts_train_gather_grad(..)  dnorm
 *
 * Slot s of S = R * K is one (row, expert) pair; the slots of an expert are contiguous and ascend by row. Backward never divides by
 * a weight: dy_slot is unweighted, d(weight) = a . (W_down^T dy), then da = weight * W_down^T dy (kernels/experts/experts_grad.c).
 *
 * All pointers are device memory, 16-byte aligned; D and F are multiples of 8, 1 <= K <= 32, E <= 1024. Every sum has an order
 * fixed by the shape. Calls return a cudaError_t: cudaErrorInvalidValue for sizes that break these rules.
 */
#ifndef US_KERNELS_EXPERTS_TRAIN_H
#define US_KERNELS_EXPERTS_TRAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
typedef struct CUstream_st *cudaStream_t;
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --- plan --- */

struct us_experts_train_plan {
  uint32_t R, E, K;
  const uint32_t *id; /* (R, K), below E, those of a row distinct */
  uint32_t *start;    /* (E + 1) written: first slot of each expert */
  uint32_t *row;      /* (R * K) written: row of a slot */
  uint32_t *pair;     /* (R * K) written: r * K + k of a slot */
  uint32_t *slot;     /* (R, K) written: slot of a row's k-th expert */
  uint64_t *opt_load; /* (E) how many rows an expert got is added */
  void *scratch;      /* us_experts_train_plan_scratch bytes */
};
size_t us_experts_train_plan_scratch(uint32_t R, uint32_t E);
int us_experts_train_plan(const struct us_experts_train_plan *plan, cudaStream_t stream);

/* --- rows to slots and back --- */

struct us_experts_train_rows {
  uint32_t R, D, K;
  const uint32_t *slot; /* (R, K) */
};

/* x_slot (S, D) bf16 = x (R, D) bf16 of each slot's row. */
int us_experts_train_scatter(const struct us_experts_train_rows *rows, const uint16_t *x, uint16_t *x_slot,
                             cudaStream_t stream);

/* The same from FP32, rounded once: dy_slot (S, D) bf16 = dx (R, D) of each slot's row. */
int us_experts_train_scatter_grad(const struct us_experts_train_rows *rows, const float *dx,
                                  uint16_t *dy_slot, cudaStream_t stream);

/* residual_out (R, D) FP32 = residual_in + sum over k, ascending, of weight[r, k] * y_slot[slot[r, k]]. out may be in. */
int us_experts_train_combine(const struct us_experts_train_rows *rows, const float *weight,
                             const uint16_t *y_slot, const float *residual_in, float *residual_out,
                             cudaStream_t stream);

/* dnorm (R, D) FP32 written = sum over k of dx_slot[slot[r, k]], then + dlogit[r, k] * w[id[r, k]], ascending k each. */
struct us_experts_train_router {
  const float *dlogit; /* (R, K) of us_router_train_grad */
  const uint32_t *id;  /* (R, K) */
  const float *w;      /* (E, D) */
};
int us_experts_train_gather_grad(const struct us_experts_train_rows *rows, const uint16_t *dx_slot,
                                 const struct us_experts_train_router *opt_router, float *dnorm,
                                 cudaStream_t stream);

/* --- SwiGLU --- */

/* a (S, F) bf16 = silu(gate) * up, rounded once; gate_up (S, 2F) bf16, gate first. */
int us_experts_train_swiglu(uint32_t S, uint32_t F, const uint16_t *gate_up, uint16_t *a,
                            cudaStream_t stream);

/* With a = what us_experts_train_swiglu gives for gate_up, and w the weight of the slot's pair:
 *   dweight[pair] = sum of a * da,  a_w = bf16(w * a),  dgate_up = bf16(gradient of SwiGLU for w * da). */
struct us_experts_train_swiglu_grad {
  uint32_t S, F;
  const uint16_t *gate_up; /* (S, 2F) */
  const uint16_t *da;      /* (S, F) unweighted: dy_slot W_down */
  const float *weight;     /* (R, K) */
  const uint32_t *pair;    /* (S) of the plan */
  uint16_t *a_w;           /* (S, F) written; may be da */
  uint16_t *dgate_up;      /* (S, 2F) written; may be gate_up */
  float *dweight;          /* (R, K) written */
};
int us_experts_train_swiglu_grad(const struct us_experts_train_swiglu_grad *grad, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
