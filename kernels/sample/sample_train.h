/* sample_train.h: rows of logits to tokens on the GPU, the ones that us_sample_token (base/sample.h) draws.
 *
 *     struct us_sample_train s = {.R = R, .N = N, .logits = logits, .stride = N, .row = rows, .sampling = {.temperature = 0.8f},
 *                                 .token = token};
 *     us_sample_train(&s, stream);
 *
 * Scores are no sums and masses are integers, so the token is that of the host for the same logits, bit for bit, whatever the
 * block does in which order. A row whose largest logit is not finite gives -1. Pointers are device memory, logits 16-byte aligned;
 * N and stride are multiples of 4. A call returns a cudaError_t: cudaErrorInvalidValue for sizes that break these rules.
 */
#ifndef US_KERNELS_SAMPLE_TRAIN_H
#define US_KERNELS_SAMPLE_TRAIN_H

#include "base/sample.h"
#include "kernels/gpu/stream.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The noise of a row's draw: us_noise_target(seed, position, 0). */
struct us_sample_row {
  uint64_t seed;
  uint32_t position; /* of the token that is drawn */
  uint32_t wanted;   /* 0: the row's token is left alone */
};

struct us_sample_train {
  uint32_t R, N;
  const float *logits; /* (R, N) */
  size_t stride;       /* values between rows */
  const struct us_sample_row *row;
  struct us_sampling sampling; /* of all rows */
  int32_t *token;              /* (R) written where wanted */
};
int us_sample_train(const struct us_sample_train *sample, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
