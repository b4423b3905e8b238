/* oscillation_train.h: weights whose codes go to and fro, watched and fixed on the GPU; one launch for all tensors.
 *
 *     struct us_watched_span span = {.offset = p->offset, .n = 65536};                                  // of at most US_WATCHED_SPAN
 *     us_oscillation_train(&(struct us_oscillation_train){.spans = spans, .count = count, .rule = rule, .before = rounded,
 *                                                         .after = rounded_anew, .value = value, .share = share,
 *                                                         .mean = mean, .turn = turn}, stream);
 *
 * What one weight does is kernels/optim/oscillation.h: the same bits as on the CPU. Pointers are device memory; a call returns a
 * cudaError_t.
 */
#ifndef US_KERNELS_OSCILLATION_TRAIN_H
#define US_KERNELS_OSCILLATION_TRAIN_H

#include "kernels/gpu/stream.h"
#include "kernels/optim/oscillation.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define US_WATCHED_SPAN 65536 /* values a span at most: larger tensors are several spans */

struct us_watched_span {
  uint64_t offset; /* a multiple of 4 */
  uint32_t n;
};

struct us_oscillation_train {
  const struct us_watched_span *spans;
  size_t count;
  struct us_oscillation_rule rule;
  const float *before,
      *after; /* the arenas, 16-byte aligned: masters rounded before the step's update, and after it */
  float *value;
  float *share, *mean, *turn;
};
int us_oscillation_train(const struct us_oscillation_train *watch, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
