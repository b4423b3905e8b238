/* learner_stub.c: what a build without CUDA says. */
#include "training/cuda/learner.h"

enum us_status us_learner_create_cuda(const struct us_learner_cuda_options *options,
                                      struct us_learner **ret_learner, struct us_err *err) {
  *ret_learner = NULL;
  return us_err_set(err, US_ERR_DEVICE, "this build has no CUDA");
}
