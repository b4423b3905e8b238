/* learner.h: CUDA GPUs as a learner (training/learner.h): this process's lanes, and the other processes of a run.
 *
 *     struct us_ranks ranks;
 *     us_ranks_discover(getenv_of, NULL, &ranks, &err);
 *     us_learner_create_cuda(&(struct us_learner_cuda_options){.first = 0, .gpus = 4, .ranks = &ranks}, &learner, &err);
 */
#ifndef US_TRAINING_CUDA_LEARNER_H
#define US_TRAINING_CUDA_LEARNER_H

#include "training/learner.h"
#include "training/ranks.h"

struct us_learner_cuda_options {
  int first;     /* GPU of --device cuda:N */
  uint32_t gpus; /* of this process */
  const int
      *opt_ordinals; /* (gpus) the GPU of each lane, which may be one for several; NULL: from first on */
  const struct us_ranks *ranks; /* borrowed while opening; NULL: this process alone */
};

/* Opens the GPUs and, in a run of several processes, waits for the others. US_ERR_DEVICE: no GPU, too few, not compute capability
 * 9.0, or a build without CUDA; US_ERR_IO when a process does not come. */
US_CHECKED enum us_status us_learner_create_cuda(const struct us_learner_cuda_options *options,
                                                 struct us_learner **ret_learner, struct us_err *err);

#endif
