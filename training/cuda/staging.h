/* staging.h: host arrays on their way to the device: packed into pinned memory, copied on the stream, nobody waits.
 *
 *     us_cuda_staging_create(cuda, bytes, &staging, &err);
 *     us_cuda_staging_begin(&staging, &err);           // waits only for the copies of the pass before the last
 *     int32_t *t = us_cuda_staging_put(&staging, device_token, R * sizeof *t);    // fill t, then
 *     us_cuda_staging_send(&staging);                  // the copies, in the order of the puts
 *     us_cuda_staging_free(&staging);
 */
#ifndef US_TRAINING_CUDA_STAGING_H
#define US_TRAINING_CUDA_STAGING_H

#include "training/cuda/cuda.h"

#define US_CUDA_STAGING_SLOTS 2
#define US_CUDA_STAGING_PUTS  16

struct us_cuda_staging {
  struct us_cuda *cuda;
  size_t bytes; /* of a slot */
  char *memory; /* pinned (slots, bytes) */
  cudaEvent_t sent[US_CUDA_STAGING_SLOTS];
  unsigned slot, puts;
  size_t used;
  struct {
    void *device;
    const void *host;
    size_t bytes;
  } put[US_CUDA_STAGING_PUTS];
};

/* bytes: of one pass, with each array rounded up to 64. */
US_CHECKED enum us_status us_cuda_staging_create(struct us_cuda *cuda, size_t bytes,
                                                 struct us_cuda_staging *staging, struct us_err *err);
void us_cuda_staging_free(struct us_cuda_staging *staging);

US_CHECKED enum us_status us_cuda_staging_begin(struct us_cuda_staging *staging, struct us_err *err);

/* Where to write an array that goes to `device`. Sizes together must fit the slot, at most US_CUDA_STAGING_PUTS of them. */
void *us_cuda_staging_put(struct us_cuda_staging *staging, void *device, size_t bytes);
/* The last array turned out to be shorter. */
void us_cuda_staging_shorten(struct us_cuda_staging *staging, size_t bytes);
void us_cuda_staging_send(struct us_cuda_staging *staging);

#endif
