/* linear_gpu.h: y = x W^T on the device for up to 8 rows, weights streamed as pages.
 *
 *     struct us_pages pages = us_linear_pages(US_FORMAT_FP8, N, K);        // what to pack W into
 *     us_rows_pack_gpu(x, R, K, K, operand, unscale, stream);
 *     us_linear_gpu(&(struct us_linear_gpu){.pages = pages, .weights = w, .operand = operand, .unscale = unscale, .y = y},
 *                   stream);
 *
 * FP8, K = 6144 (qkv) or 4096 (a rank's share of o_proj). A row's result does not depend on the other rows or on the grid.
 */
#ifndef US_KERNELS_LINEAR_LINEAR_GPU_H
#define US_KERNELS_LINEAR_LINEAR_GPU_H

#include "kernels/gpu/rows_gpu.h"
#include "kernels/pages/pages.h"
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The layout us_linear_gpu streams: K in 16 slices, one a warp; .format NONE if it has no kernel for this. */
struct us_pages us_linear_pages(enum us_format format, uint32_t N, uint32_t K);

struct us_linear_gpu {
  struct us_pages pages;
  const void *weights;       /* us_pages_bytes(&pages) a matrix, 16-byte aligned */
  uint32_t matrices;         /* one after the other, without a stop between them; 1 for a plain product */
  const uint32_t *opt_index; /* (matrices) which of the packed matrices; NULL: in order */
  const void *operand;       /* us_rows_pack_gpu */
  const float *unscale;      /* (8) */
  float *y;                  /* (matrices, 8, N) written */
  bool resident;             /* measure only: multiply the first pages again and again; y is meaningless */
};

cudaError_t us_linear_gpu(const struct us_linear_gpu *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
