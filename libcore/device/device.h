/* device.h: the GPUs that one engine runs on: opening them, waiting for them, and what they say when they hang.
 *
 *     struct us_devices *devices;
 *     us_devices_open(0, 4, 4, &devices, &err);               // GPUs 0..3, one rank each; peer access is on
 *     us_devices_use(devices, gpu);                           // make it current before CUDA calls
 *     ... launch on devices->stream[gpu] of every GPU ...
 *     us_devices_sync(devices, ops, op_count, &err);          // US_ERR_DEVICE: says where the engine waits
 *     us_devices_close(devices);
 *
 * One host thread drives all GPUs. Several ranks may share a GPU (tests): rank r lives on GPU r / (ranks / gpus).
 */
#ifndef US_DEVICE_DEVICE_H
#define US_DEVICE_DEVICE_H

#include "base/err.h"
#include "kernels/engine/engine.h"

struct us_devices {
  uint32_t gpus, ranks;
  int ordinal[US_ENGINE_MAX_RANKS];                   /* (gpus) CUDA devices */
  cudaStream_t stream[US_ENGINE_MAX_RANKS];           /* (gpus) everything of an engine is ordered on it */
  uint32_t blocks[US_ENGINE_MAX_RANKS];               /* (gpus) of a launch */
  struct us_engine_stuck *stuck[US_ENGINE_MAX_RANKS]; /* (gpus) mapped: (blocks, US_ENGINE_ROLES) */
  char name[US_ENGINE_MAX_RANKS][64];
  void (*say)(void *arg,
              const char *line); /* one line for people: reports, where a hung engine waits; may be NULL */
  void *arg;
};

/* Open GPUs first .. first + gpus - 1. `ranks` is 1, 2, 4 or 8 and a multiple of gpus. US_ERR_DEVICE: no such GPU, one that
 * the kernels were not made for, or GPUs that cannot reach each other's memory. */
US_CHECKED enum us_status us_devices_open(int first, uint32_t gpus, uint32_t ranks,
                                          struct us_devices **ret_devices, struct us_err *err);
void us_devices_close(struct us_devices *devices); /* NULL is allowed */

static inline uint32_t us_devices_gpu(const struct us_devices *devices, uint32_t rank) {
  return rank / (devices->ranks / devices->gpus);
}
void us_devices_use(const struct us_devices *devices, uint32_t gpu);

/* Free and whole memory of a GPU, bytes. */
US_CHECKED enum us_status us_devices_memory(const struct us_devices *devices, uint32_t gpu,
                                            uint64_t *ret_free, uint64_t *ret_total, struct us_err *err);

/* `code` is a cudaError_t: US_OK for 0; else "what: reason", US_ERR_MEMORY if memory ran out, US_ERR_DEVICE otherwise. */
US_CHECKED enum us_status us_cuda_status(int code, const char *what, struct us_err *err);

/* Bytes from pageable memory to the current GPU, there when this returns: cudaMemcpy returns when they are staged, and the streams
 * of an engine do not wait for the default stream. */
US_CHECKED enum us_status us_device_upload(void *to, const void *from, size_t bytes, const char *what,
                                           struct us_err *err);

/* Wait for every stream. If the engine's watchdog stopped a launch of `ops` (the host's copy of the list), US_ERR_DEVICE names
 * the first wait, and every role that waits gets a line through `say`. */
US_CHECKED enum us_status us_devices_sync(struct us_devices *devices, const struct us_engine_op *ops,
                                          uint32_t op_count, struct us_err *err);

/* What a stuck role waits for, as us_devices_sync words it: "SM 3 epilogue waits for a rank's sums in o_proj of layer 2
 * (round 0, index 1): 5 of 132". For tests and other users of the table. */
void us_engine_stuck_text(const struct us_engine_stuck *stuck, uint32_t block, uint32_t role,
                          const struct us_engine_op *ops, uint32_t op_count, char *text, size_t bytes);

#endif
