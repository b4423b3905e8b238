/* device.c: opening GPUs, waiting for them, and reading the watchdog's table. */
#include "device/device.h"

#include "plan/program.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum us_status us_cuda_status(int code, const char *what, struct us_err *err) {
  if (code == cudaSuccess) return US_OK;
  (void)cudaGetLastError(); /* told here: the next kernel that asks for an error must not find this one */
  enum us_status status = code == cudaErrorMemoryAllocation ? US_ERR_MEMORY : US_ERR_DEVICE;
  return us_err_set(err, status, "%s: %s", what, cudaGetErrorString((cudaError_t)code));
}

enum us_status us_device_upload(void *to, const void *from, size_t bytes, const char *what,
                                struct us_err *err) {
  cudaError_t code = cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
  if (code == cudaSuccess) code = cudaStreamSynchronize(NULL);
  return us_cuda_status((int)code, what, err);
}

void us_devices_use(const struct us_devices *devices, uint32_t gpu) {
  (void)cudaSetDevice(devices->ordinal[gpu]); /* it was current before: us_devices_open checked it */
}

enum us_status us_devices_memory(const struct us_devices *devices, uint32_t gpu, uint64_t *ret_free,
                                 uint64_t *ret_total, struct us_err *err) {
  size_t free_bytes = 0, total = 0;
  us_devices_use(devices, gpu);
  enum us_status status = us_cuda_status(cudaMemGetInfo(&free_bytes, &total), "memory of the GPU", err);
  *ret_free = free_bytes, *ret_total = total;
  return status;
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

static enum us_status check_counts(int first, uint32_t gpus, uint32_t ranks, struct us_err *err) {
  int found = 0;
  cudaError_t code = cudaGetDeviceCount(&found);
  if (code != cudaSuccess || found == 0)
    return us_err_set(err, US_ERR_DEVICE, "no GPU%s%s%s", code == cudaSuccess ? "" : " (",
                      code == cudaSuccess ? "" : cudaGetErrorString(code), code == cudaSuccess ? "" : ")");
  if (first < 0 || first >= found || gpus > (uint32_t)(found - first))
    return us_err_set(err, US_ERR_DEVICE, "%u GPU%s from %d on %s asked for; there %s %d", gpus,
                      gpus == 1 ? "" : "s", first, gpus == 1 ? "is" : "are", found == 1 ? "is" : "are",
                      found);
  bool power = ranks && ranks <= US_ENGINE_MAX_RANKS && (ranks & (ranks - 1)) == 0;
  if (!power || !gpus || ranks % gpus)
    return us_err_set(err, US_ERR_USAGE, "%u ranks on %u GPUs: 1, 2, 4 or 8, the same number on every GPU",
                      ranks, gpus);
  return US_OK;
}

static enum us_status open_gpu(struct us_devices *devices, uint32_t gpu, struct us_err *err) {
  struct cudaDeviceProp properties;
  int ordinal = devices->ordinal[gpu], blocks = 0;
  enum us_status status = us_cuda_status(cudaSetDevice(ordinal), "opening the GPU", err);
  if (status == US_OK)
    status = us_cuda_status(cudaGetDeviceProperties(&properties, ordinal), "properties of the GPU", err);
  if (status != US_OK) return status;
  snprintf(devices->name[gpu], sizeof devices->name[gpu], "%.63s", properties.name);
  if (properties.major != 9 || properties.minor != 0)
    return us_err_set(err, US_ERR_DEVICE, "%s has compute capability %d.%d; the kernels are made for 9.0",
                      properties.name, properties.major, properties.minor);
  blocks = us_engine_blocks(devices->ranks / devices->gpus);
  if (blocks <= 0) return us_cuda_status(-blocks, "blocks of the engine", err);
  devices->blocks[gpu] = (uint32_t)blocks;
  status = us_cuda_status(cudaStreamCreateWithFlags(&devices->stream[gpu], cudaStreamNonBlocking),
                          "making a stream", err);
  size_t bytes = (size_t)blocks * US_ENGINE_ROLES * sizeof(struct us_engine_stuck);
  void *stuck = NULL;
  if (status == US_OK)
    status = us_cuda_status(cudaHostAlloc(&stuck, bytes, cudaHostAllocMapped | cudaHostAllocPortable),
                            "the watchdog's table", err);
  if (status == US_OK) memset(stuck, 0, bytes);
  devices->stuck[gpu] = stuck;
  return status;
}

/* Every GPU reads and writes the others' memory: partial sums, candidates and embedding rows cross directly. */
static enum us_status open_peers(const struct us_devices *devices, struct us_err *err) {
  for (uint32_t a = 0; a < devices->gpus; a++) {
    us_devices_use(devices, a);
    for (uint32_t b = 0; b < devices->gpus; b++) {
      int can = 0;
      if (a == b) continue;
      enum us_status status = us_cuda_status(
          cudaDeviceCanAccessPeer(&can, devices->ordinal[a], devices->ordinal[b]), "peers", err);
      if (status != US_OK) return status;
      if (!can)
        return us_err_set(err, US_ERR_DEVICE,
                          "GPU %d cannot access the memory of GPU %d (no NVLink or PCIe peer access)",
                          devices->ordinal[a], devices->ordinal[b]);
      cudaError_t code = cudaDeviceEnablePeerAccess(devices->ordinal[b], 0);
      if (code == cudaErrorPeerAccessAlreadyEnabled) {
        (void)cudaGetLastError();
        code = cudaSuccess;
      }
      status = us_cuda_status(code, "enabling peer access", err);
      if (status != US_OK) return status;
    }
  }
  return US_OK;
}

enum us_status us_devices_open(int first, uint32_t gpus, uint32_t ranks, struct us_devices **ret_devices,
                               struct us_err *err) {
  *ret_devices = NULL;
  enum us_status status = check_counts(first, gpus, ranks, err);
  if (status != US_OK) return status;
  struct us_devices *devices = calloc(1, sizeof *devices);
  if (!devices) return us_err_memory(err, "the GPUs", sizeof *devices);
  devices->gpus = gpus, devices->ranks = ranks;
  for (uint32_t gpu = 0; status == US_OK && gpu < gpus; gpu++) {
    devices->ordinal[gpu] = first + (int)gpu;
    status = open_gpu(devices, gpu, err);
    if (status != US_OK) us_err_prefix(err, "GPU %d", first + (int)gpu);
  }
  if (status == US_OK) status = open_peers(devices, err);
  if (status != US_OK) {
    us_devices_close(devices);
    return status;
  }
  *ret_devices = devices;
  return US_OK;
}

void us_devices_close(struct us_devices *devices) {
  if (!devices) return;
  for (uint32_t gpu = 0; gpu < devices->gpus; gpu++) {
    us_devices_use(devices, gpu);
    if (devices->stream[gpu]) (void)cudaStreamDestroy(devices->stream[gpu]);
    if (devices->stuck[gpu]) (void)cudaFreeHost(devices->stuck[gpu]);
  }
  free(devices);
}

/* ---- waiting, and the watchdog's table --------------------------------------------------------------------------- */

static const char *wait_name(uint32_t what) {
  static const char *const names[] = {[US_ENGINE_WAIT_NOTHING] = "nothing",
                                      [US_ENGINE_WAIT_DONE] = "an operation to be done",
                                      [US_ENGINE_WAIT_STAGE] = "weights",
                                      [US_ENGINE_WAIT_FREE] = "a free stage of the ring",
                                      [US_ENGINE_WAIT_SUMS] = "partial sums of a block",
                                      [US_ENGINE_WAIT_EXCHANGE] = "a rank's partial sums",
                                      [US_ENGINE_WAIT_NORM] = "a block's sum of squares",
                                      [US_ENGINE_WAIT_ROUTE] = "the active experts",
                                      [US_ENGINE_WAIT_SELECT] = "a candidate token"};
  return what < sizeof names / sizeof *names && names[what] ? names[what] : "something unknown";
}

/* "o_proj of layer 2", or the number of an operation that is not in the list. */
static void op_text(uint32_t index, const struct us_engine_op *ops, uint32_t op_count, char *text,
                    size_t bytes) {
  if (index >= op_count) {
    snprintf(text, bytes, "operation %u", index);
    return;
  }
  const struct us_engine_op *op = &ops[index];
  const char *name = op->task_op < US_TASK_OP_COUNT ? us_task_op_name((enum us_task_op)op->task_op)
                                                    : us_engine_kind_name((enum us_engine_kind)op->kind);
  if (op->layer == US_LAYER_NONE)
    snprintf(text, bytes, "%s (operation %u)", name, index);
  else
    snprintf(text, bytes, "%s of layer %u (operation %u)", name, op->layer, index);
}

void us_engine_stuck_text(const struct us_engine_stuck *stuck, uint32_t block, uint32_t role,
                          const struct us_engine_op *ops, uint32_t op_count, char *text, size_t bytes) {
  static const char *const roles[US_ENGINE_ROLES] = {"compute", "stream", "epilogue"};
  char where[96], other[96] = "";
  op_text(stuck->op, ops, op_count, where, sizeof where);
  if (stuck->what == US_ENGINE_WAIT_DONE) op_text(stuck->index, ops, op_count, other, sizeof other);
  snprintf(text, bytes, "SM %u %s, in %s, waits for %s%s%s: has %llu, wants %llu (round %u, index %u)", block,
           roles[role % US_ENGINE_ROLES], where, wait_name(stuck->what), other[0] ? ", " : "", other,
           (unsigned long long)stuck->have, (unsigned long long)stuck->want, stuck->round, stuck->index);
}

/* Every role that waits, a line each; the first into `first`. Returns how many. */
static uint32_t tell_stuck(const struct us_devices *devices, uint32_t gpu, const struct us_engine_op *ops,
                           uint32_t op_count, char *first, size_t bytes) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < devices->blocks[gpu] * US_ENGINE_ROLES; i++) {
    const struct us_engine_stuck *stuck = &devices->stuck[gpu][i];
    char text[320], line[352];
    if (stuck->what == US_ENGINE_WAIT_NOTHING) continue;
    us_engine_stuck_text(stuck, i / US_ENGINE_ROLES, i % US_ENGINE_ROLES, ops, op_count, text, sizeof text);
    snprintf(line, sizeof line, "GPU %d %s", devices->ordinal[gpu], text);
    if (!count++ && !first[0]) snprintf(first, bytes, "%s", line);
    if (devices->say) devices->say(devices->arg, line);
  }
  return count;
}

enum us_status us_devices_sync(struct us_devices *devices, const struct us_engine_op *ops, uint32_t op_count,
                               struct us_err *err) {
  cudaError_t failed = cudaSuccess;
  uint32_t stuck = 0;
  char first[352] = "";
  for (uint32_t gpu = 0; gpu < devices->gpus; gpu++) {
    us_devices_use(devices, gpu);
    cudaError_t code = cudaStreamSynchronize(devices->stream[gpu]);
    if (failed == cudaSuccess) failed = code;
  }
  if (failed == cudaSuccess) return US_OK;
  for (uint32_t gpu = 0; gpu < devices->gpus; gpu++)
    stuck += tell_stuck(devices, gpu, ops, op_count, first, sizeof first);
  if (!stuck) return us_cuda_status((int)failed, "the engine", err);
  return us_err_set(err, US_ERR_DEVICE, "the engine hangs, %u roles wait; the first: %s", stuck, first);
}
