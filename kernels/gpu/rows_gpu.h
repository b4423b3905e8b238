/* rows_gpu.h: token rows on the device as the tensor cores' operand (rows.cuh).
 *
 *     us_rows_pack_gpu(x, R, K, K, operand, unscale, stream);   // operand: us_rows_bytes(K) bytes, unscale: 8 floats
 */
#ifndef US_KERNELS_GPU_ROWS_GPU_H
#define US_KERNELS_GPU_ROWS_GPU_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

static inline size_t us_rows_bytes(size_t K) {
  return K / 32 * 512;
}

/* x (R, K) FP32 on the device, R at most 8, K a multiple of 32; rows from R on become 0. unscale[r] undoes the row's power of
 * two. Returns the launch's status. */
cudaError_t us_rows_pack_gpu(const float *x, uint32_t R, uint32_t K, size_t x_stride, void *operand,
                             float *unscale, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
