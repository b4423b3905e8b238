/* cuda.h: one GPU that trains: its stream, its product library, memory, and errors that wait until somebody asks.
 *
 *     struct us_cuda *cuda;
 *     us_cuda_open(0, &cuda, &err);
 *     us_cuda_take(cuda, bytes, "activations", &memory, &err);      // device memory; us_cuda_give(memory)
 *     us_cuda_did(cuda, us_rmsnorm_train(&norm, cuda->stream), "norm");   // operations: the first failure is kept
 *     us_cuda_failed(cuda, &err);                                    // asked once a pass
 *     us_cuda_close(cuda);
 *
 * Everything of a GPU's training is ordered on one stream, so that operations need no synchronisation and reuse buffers.
 * One host thread drives a GPU; us_cuda_use makes it current where a thread drives several.
 */
#ifndef US_TRAINING_CUDA_CUDA_H
#define US_TRAINING_CUDA_CUDA_H

#include "base/err.h"
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct us_cuda_plans;

struct us_cuda {
  int ordinal;
  char name[64];
  uint32_t processors;         /* SMs */
  double peak;                 /* dense bf16 operations a second, for MFU */
  cudaStream_t stream;         /* everything is ordered on it */
  cublasHandle_t blas;         /* on the stream, with the workspace below: Muon's batched products */
  cublasLtHandle_t lt;         /* gemm.h */
  void *workspace;             /* of both */
  size_t workspace_bytes;      /* 32 MB */
  struct us_cuda_plans *plans; /* gemm.c: products seen so far */
  int failure;                 /* first cudaError_t that us_cuda_did was given; 0: none */
  const char *failed_at;       /* and what it was */
  void (*opt_trace)(void *arg, const char *what); /* called behind every operation queued: for measurements */
  void *trace_arg;
};

/* US_ERR_DEVICE: no such GPU, or not one of compute capability 9.0. */
US_CHECKED enum us_status us_cuda_open(int ordinal, struct us_cuda **ret_cuda, struct us_err *err);
void us_cuda_close(struct us_cuda *cuda); /* waits; NULL is allowed */
void us_cuda_use(const struct us_cuda *cuda);

/* Device memory, 256-byte aligned and zeroed; US_ERR_MEMORY says how much was wanted and how much is free. */
US_CHECKED enum us_status us_cuda_take(struct us_cuda *cuda, size_t bytes, const char *what,
                                       void **ret_memory, struct us_err *err);
void us_cuda_give(void *memory); /* NULL is allowed */

/* Host memory that copies run from and to without waiting. */
US_CHECKED enum us_status us_cuda_take_pinned(size_t bytes, const char *what, void **ret_memory,
                                              struct us_err *err);
void us_cuda_give_pinned(void *memory);

/* Say what was queued, and remember the first operation that failed. `code` is a cudaError_t, `what` a literal. */
static inline void us_cuda_did(struct us_cuda *cuda, int code, const char *what) {
  if (cuda->opt_trace) cuda->opt_trace(cuda->trace_arg, what);
  if (!code || cuda->failure) return;
  cuda->failure = code;
  cuda->failed_at = what;
}

/* US_ERR_DEVICE with the failure kept, which is forgotten; US_OK if there was none. Does not wait. */
US_CHECKED enum us_status us_cuda_failed(struct us_cuda *cuda, struct us_err *err);

/* Wait for the stream; then as us_cuda_failed. */
US_CHECKED enum us_status us_cuda_sync(struct us_cuda *cuda, struct us_err *err);

/* A fixed number of bytes copied to or from the device on the stream; the host's side is pinned. */
void us_cuda_upload(struct us_cuda *cuda, void *device, const void *pinned, size_t bytes);
void us_cuda_download(struct us_cuda *cuda, void *pinned, const void *device, size_t bytes);

#endif
