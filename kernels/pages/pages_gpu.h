/* pages_gpu.h: packing weights into pages on the device, and making synthetic ones there.
 *
 *     us_synthetic_gpu(US_FORMAT_MXFP4, inits, E, F, D, 0, codes, scales, stream);   // E matrices (F, D), row-major
 *     us_pages_pack_gpu(&pages, sources, E, out, stream);                           // each to us_pages_bytes(&pages)
 *
 * The bytes are those of us_matrix_encode(us_init_quad(...)) and us_pages_pack on the CPU.
 */
#ifndef US_KERNELS_PAGES_PAGES_GPU_H
#define US_KERNELS_PAGES_PAGES_GPU_H

#include "base/init.h"
#include "kernels/pages/pages.h"
#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Pack `count` matrices of one layout. sources (count) lie on the device and point to device memory; the caller has passed
 * each through us_pages_source_check, and its scales through us_pages_scales_check. */
cudaError_t us_pages_pack_gpu(const struct us_pages *pages, const struct us_pages_source *sources,
                              uint32_t count, void *out, cudaStream_t stream);

/* `count` random matrices (rows, cols), inits on the device, one after the other: data of us_matrix_data_bytes each, scales
 * of us_matrix_scale_bytes each (NULL where there are none). MXFP4 scales by the MSE rule, FP8 scales in FP32 with the grid
 * restarting every scale_chunk_rows (0: never). MXFP4 wants cols a multiple of 32, the others of 4. */
cudaError_t us_synthetic_gpu(enum us_format format, const struct us_init *inits, uint32_t count,
                             uint32_t rows, uint32_t cols, uint32_t scale_chunk_rows, void *data,
                             void *scales, cudaStream_t stream);

/* A window of random tensors of one shape: rows [first_row, first_row + window_rows), columns likewise. */
struct us_synthetic {
  enum us_format format;
  uint32_t rows, cols;       /* of a whole tensor */
  uint32_t scale_chunk_rows; /* FP8: its grid of scales restarts after so many rows; 0: never */
  uint32_t first_row, window_rows, first_col, window_cols;
  uint32_t scale_rows; /* FP8: write a scale for every so many rows of the window, that of their first */
  uint64_t data_stride, scale_stride; /* bytes from one tensor's window to the next one's */
};

/* The same for windows: codes and MXFP4 scales are those of a matrix (window_rows, window_cols), FP8 scales (ceil(window_rows /
 * scale_rows), ceil(window_cols / 128)). Columns start at multiples of 32 (MXFP4), 128 (FP8) or 4. */
cudaError_t us_synthetic_window_gpu(const struct us_synthetic *synthetic, const struct us_init *inits,
                                    uint32_t count, void *data, void *scales, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
