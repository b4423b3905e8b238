/* adamw_train.h: AdamW over spans of an arena on the GPU, one launch for all tensors.
 *
 *     struct us_adamw_span span = {.offset = p->offset, .n = 65536, .rate_scale = 1, .decay = 0.1};   // of at most
 *     us_adamw_train(&(struct us_adamw_train){.spans = spans, .count = count, .value = value, .grad = grad,   // US_ADAMW_SPAN
 *                                             .moment1 = m, .moment2 = v, .step = step, .rate = 3e-4, .beta1 = .9,
 *                                             .beta2 = .95, .epsilon = 1e-8}, stream);
 *
 * The formula and its roundings are those of us_adamw_update (training/optim.h): the same bits as on the CPU. Pointers are device
 * memory; a call returns a cudaError_t.
 */
#ifndef US_KERNELS_ADAMW_TRAIN_H
#define US_KERNELS_ADAMW_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define US_ADAMW_SPAN 65536 /* values a span at most: larger tensors are several spans */

struct us_adamw_span {
  uint64_t offset; /* a multiple of 4 */
  uint32_t n;
  float rate_scale;
  double decay; /* 0 for a vector */
};

struct us_adamw_train {
  const struct us_adamw_span *spans;
  size_t count;
  float *value; /* the arenas, 16-byte aligned */
  const float *grad;
  float *moment1, *moment2;
  uint64_t step; /* 1 at the first step */
  double rate, beta1, beta2, epsilon;
  const float *opt_factor; /* (1) device: gradients are multiplied by it first (clipping); NULL: 1 */
};
int us_adamw_train(const struct us_adamw_train *adamw, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
