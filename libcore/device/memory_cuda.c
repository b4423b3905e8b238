/* memory_cuda.c: buffers in the current GPU's memory. */
#include "device/device.h"
#include "device/memory.h"
#include "device/schedule.h"

#include <cuda_runtime_api.h>

static enum us_status cuda_alloc(void *arg, uint64_t bytes, void **ret_memory, struct us_err *err) {
  *ret_memory = NULL;
  return us_cuda_status((int)cudaMalloc(ret_memory, bytes ? bytes : 1), "buffers of a schedule", err);
}

static void cuda_free(void *arg, void *memory) {
  (void)cudaFree(memory);
}

static enum us_status cuda_upload(void *arg, void *to, const void *from, uint64_t bytes, struct us_err *err) {
  return us_device_upload(to, from, bytes, "filling a buffer", err);
}

/* The streams of an engine do not wait for the default stream. */
static enum us_status cuda_fill(void *arg, void *to, uint8_t byte, uint64_t bytes, struct us_err *err) {
  enum us_status status = us_cuda_status((int)cudaMemset(to, byte, bytes), "filling a buffer", err);
  if (status != US_OK) return status;
  return us_cuda_status((int)cudaStreamSynchronize(NULL), "filling a buffer", err);
}

const struct us_device_memory_ops us_device_memory_cuda = {cuda_alloc, cuda_free, cuda_upload, cuda_fill,
                                                           NULL};

enum us_status us_device_schedule_create(const struct us_device_weights *weights,
                                         const struct us_device_schedule_options *options,
                                         struct us_device_schedule **ret_schedule, struct us_err *err) {
  return us_device_schedule_create_in(weights, options, &us_device_memory_cuda, ret_schedule, err);
}
