/* router_train.h: the router on the GPU, forward and backward, for training: kernels/router/router_grad.h on device memory.
 *
 *     struct us_router_train r = {.R = R, .D = D, .E = E, .K = K, .normalise = true, .scaling = 1, .x = norm, .w = w,
 *                                 .opt_bias = bias, .scores = scores, .id = id, .weight = weight, .scratch = scratch};
 *     us_router_train(&r, stream);                           // scores, id, weight
 *     struct us_router_train_grad g = {.R = R, .., .start = plan.start, .pair = plan.pair, .dlogit = dlogit};
 *     us_router_train_grad(&g, stream);                      // dlogit; opt_dw += dlogit^T x
 *     us_experts_train_gather_grad(..)                       // adds dlogit w to the gradient of x (experts_train.h)
 *     us_router_train_lesson(&lesson, stream);               // gradient of all logits towards another router's scores
 *
 * Logits are x (bf16) times w (FP32): w is taken apart into three bf16 terms that add up to it exactly but for its last bits
 * (24 of 24 where the exponent allows), each multiplied on the tensor cores and summed in FP32. The gradient of the logits is
 * zero but for the K chosen, so it is kept as (R, K) and multiplied as a sparse matrix, in FP32.
 *
 * All pointers are device memory, 16-byte aligned; D is a multiple of 16, 1 <= K <= E <= 1024, K <= 32. Every call returns a
 * cudaError_t: cudaErrorInvalidValue for sizes that break these rules. Every sum's order is fixed by the shape and the plan.
 */
#ifndef US_KERNELS_ROUTER_TRAIN_H
#define US_KERNELS_ROUTER_TRAIN_H

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

struct us_router_train {
  uint32_t R, D, E, K;
  bool normalise;
  float scaling;
  const uint16_t *x;     /* (R, D) bf16 */
  const float *w;        /* (E, D) */
  const float *opt_bias; /* (E), steers the choice alone */
  float *scores;         /* (R, E) written: sigmoid of the logits */
  uint32_t *id;  /* (R, K) written: the K largest of scores + bias, ties to the lowest id, ascending */
  float *weight; /* (R, K) written */
  void *scratch; /* us_router_train_scratch bytes, free again when the call's work is done */
  const uint32_t *opt_chosen; /* (R, K) the experts that rows visit, whatever their scores; NULL: the best */
};
size_t us_router_train_scratch(uint32_t R, uint32_t D, uint32_t E);
int us_router_train(const struct us_router_train *router, cudaStream_t stream);

struct us_router_train_grad {
  uint32_t R, D, E, K;
  bool normalise;
  float scaling;
  const float *scores;  /* (R, E) as written by the forward */
  const uint32_t *id;   /* (R, K) */
  const float *dweight; /* (R, K) */
  const uint16_t *x;    /* (R, D) bf16 */
  const uint32_t
      *start; /* (E + 1), pair (R * K): the plan of the same ids (kernels/experts/experts_train.h) */
  const uint32_t *pair;
  float *dlogit; /* (R, K) written: gradient of the chosen experts' logits */
  float *opt_dw; /* (E, D) added to; NULL: frozen */
  void *scratch; /* us_router_train_grad_scratch bytes */
};
size_t us_router_train_grad_scratch(uint32_t D, uint32_t E);
int us_router_train_grad(const struct us_router_train_grad *grad, cudaStream_t stream);

/* us_router_teacher's part of the gradient, which no expert's logit is without: for two dense products. */
struct us_router_train_lesson {
  uint32_t R, E, K;
  const float *scores;     /* (R, E) */
  const float *opt_theirs; /* (R, E); NULL: `target` everywhere */
  float target;
  const float *opt_weight; /* (R); NULL: all 1 */
  float scale;
  float margin,
      margin_scale;   /* logits, above 0; 0: no margin, and neither id nor opt_bias nor scratch are touched */
  const uint32_t *id; /* (R, K) ascending */
  const float *opt_bias; /* (E) that the choice was made with; NULL: 0 */
  uint16_t *dlogit;      /* (R, E) bf16, written */
  void *scratch;         /* us_router_train_lesson_scratch bytes */
};
size_t us_router_train_lesson_scratch(uint32_t E);
int us_router_train_lesson(const struct us_router_train_lesson *lesson, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
