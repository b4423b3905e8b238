/* constants.h: arrays that a geometry fixes, put on the device once: offsets of heads and tables of rotation. Internal.
 *
 *     struct us_cuda_heads heads = {.shape = &attention, .chunks = chunks, .positions = R, .q_offset = .., ...};
 *     us_cuda_heads_fill(cuda, &heads, &err);                        // waits
 */
#ifndef US_TRAINING_CUDA_CONSTANTS_H
#define US_TRAINING_CUDA_CONSTANTS_H

#include "model/shape.h"
#include "training/cuda/cuda.h"

struct us_cuda_heads {
  const struct us_attention_shape *shape;
  uint32_t chunks;                                      /* of fused projections */
  size_t positions;                                     /* rows of the table */
  uint32_t *q_offset, *k_offset, *v_offset, *qk_offset; /* device (H), (G), (G), (H + G) */
  float *table;                                         /* device (positions, rotary) */
};

US_CHECKED enum us_status us_cuda_heads_fill(struct us_cuda *cuda, const struct us_cuda_heads *heads,
                                             struct us_err *err);

/* Copy pageable host memory, and wait. */
US_CHECKED enum us_status us_cuda_copy_in(struct us_cuda *cuda, void *device, const void *host, size_t bytes,
                                          struct us_err *err);

#endif
