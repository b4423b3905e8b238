/* context.c: opening a GPU for training, and its memory. */
#include "training/cuda/cuda.h"

#include "device/device.h"
#include "training/cuda/gemm.h"

#include <stdio.h>
#include <stdlib.h>

/* What the library wants on Hopper for any of its algorithms. */
#define WORKSPACE_BYTES ((size_t)32 << 20)

/* Dense bf16 of an H100 or H200 as published: 989.4 TFLOP/s on 132 SMs. */
#define PEAK_OF_AN_SM (989.4e12 / 132.0)

static enum us_status blas_status(int code, const char *what, struct us_err *err) {
  if (code == CUBLAS_STATUS_SUCCESS) return US_OK;
  return us_err_set(err, US_ERR_DEVICE, "%s: %s", what, cublasGetStatusString((cublasStatus_t)code));
}

static enum us_status open_device(struct us_cuda *cuda, struct us_err *err) {
  int found = 0;
  struct cudaDeviceProp properties;
  cudaError_t code = cudaGetDeviceCount(&found);
  if (code != cudaSuccess || cuda->ordinal < 0 || cuda->ordinal >= found)
    return us_err_set(err, US_ERR_DEVICE, "no GPU %d; there are %d", cuda->ordinal,
                      code == cudaSuccess ? found : 0);
  enum us_status status = us_cuda_status(cudaSetDevice(cuda->ordinal), "opening the GPU", err);
  if (status == US_OK)
    status =
        us_cuda_status(cudaGetDeviceProperties(&properties, cuda->ordinal), "properties of the GPU", err);
  if (status != US_OK) return status;
  snprintf(cuda->name, sizeof cuda->name, "%.63s", properties.name);
  if (properties.major != 9 || properties.minor != 0)
    return us_err_set(err, US_ERR_DEVICE, "%s has compute capability %d.%d; the kernels are made for 9.0",
                      properties.name, properties.major, properties.minor);
  cuda->processors = (uint32_t)properties.multiProcessorCount;
  cuda->peak = PEAK_OF_AN_SM * cuda->processors;
  return us_cuda_status(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking), "making a stream",
                        err);
}

static enum us_status open_blas(struct us_cuda *cuda, struct us_err *err) {
  enum us_status status = us_cuda_take(cuda, WORKSPACE_BYTES, "cuBLAS workspace", &cuda->workspace, err);
  cuda->workspace_bytes = WORKSPACE_BYTES;
  if (status == US_OK) status = blas_status(cublasCreate(&cuda->blas), "cuBLAS", err);
  if (status == US_OK)
    status = blas_status(cublasSetStream(cuda->blas, cuda->stream), "cuBLAS's stream", err);
  if (status == US_OK)
    status = blas_status(cublasSetWorkspace(cuda->blas, cuda->workspace, cuda->workspace_bytes),
                         "cuBLAS's workspace", err);
  if (status == US_OK) status = blas_status(cublasLtCreate(&cuda->lt), "cublasLt", err);
  if (status == US_OK) status = us_cuda_plans_create(&cuda->plans, err);
  return status;
}

enum us_status us_cuda_open(int ordinal, struct us_cuda **ret_cuda, struct us_err *err) {
  *ret_cuda = NULL;
  struct us_cuda *cuda = calloc(1, sizeof *cuda);
  if (!cuda) return us_err_memory(err, "context of a GPU", sizeof *cuda);
  cuda->ordinal = ordinal;
  enum us_status status = open_device(cuda, err);
  if (status == US_OK) status = open_blas(cuda, err);
  if (status != US_OK) {
    us_cuda_close(cuda);
    return status;
  }
  *ret_cuda = cuda;
  return US_OK;
}

void us_cuda_close(struct us_cuda *cuda) {
  if (!cuda) return;
  if (cuda->stream) (void)cudaStreamSynchronize(cuda->stream);
  us_cuda_plans_free(cuda->plans);
  if (cuda->lt) (void)cublasLtDestroy(cuda->lt);
  if (cuda->blas) (void)cublasDestroy(cuda->blas);
  us_cuda_give(cuda->workspace);
  if (cuda->stream) (void)cudaStreamDestroy(cuda->stream);
  free(cuda);
}

void us_cuda_use(const struct us_cuda *cuda) {
  (void)cudaSetDevice(cuda->ordinal); /* it was current before: us_cuda_open checked it */
}

enum us_status us_cuda_take(struct us_cuda *cuda, size_t bytes, const char *what, void **ret_memory,
                            struct us_err *err) {
  *ret_memory = NULL;
  us_cuda_use(cuda);
  cudaError_t code = cudaMalloc(ret_memory, bytes ? bytes : 1);
  if (code == cudaErrorMemoryAllocation) {
    size_t available = 0, total = 0;
    (void)cudaGetLastError(); /* the failure is reported here and must not come up again */
    (void)cudaMemGetInfo(&available, &total);
    return us_err_set(err, US_ERR_MEMORY, "%s: %zu MiB of device memory wanted, %zu of %zu MiB are free",
                      what, bytes >> 20, available >> 20, total >> 20);
  }
  if (code != cudaSuccess) return us_cuda_status(code, what, err);
  return us_cuda_status(cudaMemsetAsync(*ret_memory, 0, bytes ? bytes : 1, cuda->stream), what, err);
}

void us_cuda_give(void *memory) {
  if (memory) (void)cudaFree(memory);
}

enum us_status us_cuda_take_pinned(size_t bytes, const char *what, void **ret_memory, struct us_err *err) {
  *ret_memory = NULL;
  return us_cuda_status(cudaHostAlloc(ret_memory, bytes ? bytes : 1, cudaHostAllocDefault), what, err);
}

void us_cuda_give_pinned(void *memory) {
  if (memory) (void)cudaFreeHost(memory);
}

enum us_status us_cuda_failed(struct us_cuda *cuda, struct us_err *err) {
  int code = cuda->failure;
  cuda->failure = 0;
  return us_cuda_status(code, code ? cuda->failed_at : "", err);
}

enum us_status us_cuda_sync(struct us_cuda *cuda, struct us_err *err) {
  us_cuda_use(cuda);
  us_cuda_did(cuda, cudaStreamSynchronize(cuda->stream), "waiting for the GPU");
  return us_cuda_failed(cuda, err);
}

void us_cuda_upload(struct us_cuda *cuda, void *device, const void *pinned, size_t bytes) {
  us_cuda_did(cuda, cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, cuda->stream), "upload");
}

void us_cuda_download(struct us_cuda *cuda, void *pinned, const void *device, size_t bytes) {
  us_cuda_did(cuda, cudaMemcpyAsync(pinned, device, bytes, cudaMemcpyDeviceToHost, cuda->stream), "download");
}
