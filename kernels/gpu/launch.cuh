/* launch.cuh: what the host asks before it launches: how many multiprocessors there are, a tensor as the copy engine wants it described.
 *
 *     uint32_t processors;
 *     cudaError_t status = us_processors(&processors);
 *     struct us_tensor rows = {x, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, {K, R}, {K * 2}, {64, 128}, CU_TENSOR_MAP_SWIZZLE_128B};
 *     if (status == cudaSuccess) status = us_tensor_describe(&rows, &map);
 *
 * The driver's function is looked up where it is needed, so that nothing links libcuda and programs start without a GPU.
 */
#ifndef US_KERNELS_GPU_LAUNCH_CUH
#define US_KERNELS_GPU_LAUNCH_CUH

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

/* Of the current device. */
static inline cudaError_t us_processors(uint32_t *ret_count) {
  int device, count = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  *ret_count = (uint32_t)count;
  return status;
}

/* Two or three dimensions, the innermost first; what lies outside of them reads as zeros. */
struct us_tensor {
  const void *at; /* 16-byte aligned */
  CUtensorMapDataType type;
  cuuint32_t rank;
  cuuint64_t size[3],
      stride[2];     /* stride: bytes from one index to the next, of all dimensions but the innermost */
  cuuint32_t box[3]; /* values of one copy */
  CUtensorMapSwizzle swizzle;
};

static inline cudaError_t us_tensor_describe(const struct us_tensor *t, CUtensorMap *ret_map) {
  typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                      const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                      const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void *entry = NULL;
  cudaDriverEntryPointQueryResult found;
  cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess) return status;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint32_t step[3] = {1, 1, 1};
  CUresult result =
      ((encode_function)entry)(ret_map, t->type, t->rank, (void *)t->at, t->size, t->stride, t->box, step,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, t->swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif
