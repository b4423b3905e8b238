/* measure_stub.c: what a build without CUDA says to those who want to measure on a GPU. */
#include "device/bench.h"
#include "device/profile_device.h"

enum us_status us_bench_device(const struct us_executor *ex, struct us_bench_device *ret_device,
                               struct us_err *err) {
  return us_err_set(err, US_ERR_DEVICE, "this build has no CUDA");
}

enum us_status us_bench_run(struct us_executor *ex, const struct us_bench_options *options,
                            struct us_bench_result *ret_result, struct us_err *err) {
  return us_err_set(err, US_ERR_DEVICE, "this build has no CUDA");
}

enum us_status us_device_profile_run(struct us_executor *ex, const struct us_device_profile_options *options,
                                     struct us_device_profile_result *ret_result, struct us_trace *trace,
                                     struct us_err *err) {
  return us_err_set(err, US_ERR_DEVICE, "this build has no CUDA");
}
