/* gptq_embed.h: us_gptq_embed_moments on a GPU. Internal to GPTQ. */
#ifndef US_TRAINING_CUDA_GPTQ_EMBED_H
#define US_TRAINING_CUDA_GPTQ_EMBED_H

#include "training/cuda/params.h"
#include "training/gptq.h"

/* moments: device (D, D), zeros. Waits. */
US_CHECKED enum us_status us_cuda_gptq_embed_moments(struct us_cuda *cuda, const struct us_gptq *gptq,
                                                     const struct us_shape *shape,
                                                     struct us_cuda_params *original, float *moments,
                                                     struct us_err *err);

#endif
