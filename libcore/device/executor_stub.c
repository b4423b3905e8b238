/* executor_stub.c: what a build without CUDA says. */
#include "device/executor.h"

static enum us_status no_cuda(struct us_executor **ret_executor, struct us_err *err) {
  *ret_executor = NULL;
  return us_err_set(err, US_ERR_DEVICE, "this build has no CUDA");
}

enum us_status us_executor_create_cuda(const struct us_model *model, const struct us_draft *opt_draft,
                                       const struct us_executor_cuda_options *options,
                                       struct us_executor **ret_executor, struct us_err *err) {
  return no_cuda(ret_executor, err);
}

enum us_status us_executor_create_synthetic(const struct us_shape *shape,
                                            const struct us_draft_shape *opt_draft, uint64_t seed,
                                            const struct us_executor_cuda_options *options,
                                            struct us_executor **ret_executor, struct us_err *err) {
  return no_cuda(ret_executor, err);
}

bool us_executor_cuda_parts(const struct us_executor *executor, struct us_executor_cuda_parts *ret_parts) {
  return false;
}
