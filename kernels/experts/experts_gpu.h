/* experts_gpu.h: the routed experts of MoE layers on the device, 8 rows, MXFP4 weights streamed as pages.
 *
 *     us_experts_inner_gpu(&args, stream);     // h[pair] = silu(gate x) * up x, bf16, for every routed (row, expert) pair
 *     us_experts_outer_gpu(&args, stream);     // y[row] = sum over its experts, ascending, of weight * down h
 *
 * One call runs `passes` layers back to back over the same rows: what an engine does without the other operations, and what
 * the kernel lab measures. Every active expert multiplies all 8 rows; what a row is not routed to is left out by selection,
 * so an Inf in one row cannot reach another. A row's result does not depend on the others: the order of every sum is fixed.
 *
 * A rank's share: inner columns of every expert (us_share_of). D = 6144, F = 512 (2048 over four ranks).
 */
#ifndef US_KERNELS_EXPERTS_EXPERTS_GPU_H
#define US_KERNELS_EXPERTS_EXPERTS_GPU_H

#include "kernels/gpu/rows_gpu.h"
#include "kernels/pages/pages.h"
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#define US_EXPERTS_MAX_ACTIVE 64 /* 8 rows x 8 experts */

/* Layouts: gate and up interleaved (2F, D); down (D, F). .format NONE if there is no kernel for this shape. */
struct us_pages us_experts_inner_pages(enum us_format format, uint32_t D, uint32_t F);
struct us_pages us_experts_outer_pages(enum us_format format, uint32_t D, uint32_t F);

struct us_experts_gpu {
  struct us_pages inner_pages, outer_pages;
  const void *inner_weights, *outer_weights; /* matrices one after the other: any (layer, expert) numbering */
  uint32_t passes;
  uint32_t total; /* active experts of all passes: begin[passes] */
  const uint32_t
      *begin; /* (passes + 1) first of each pass in `matrix`; at most US_EXPERTS_MAX_ACTIVE a pass */
  const uint32_t *matrix;     /* (total) which packed matrix; ascending expert id in each pass */
  const int32_t *pair;        /* (total, 8) index in 0..pairs-1 of the row's pair, -1: row not routed here */
  uint32_t pairs;             /* pairs a pass, at most 64 */
  const float *pair_weight;   /* (passes, pairs) routing weights */
  const int32_t *global_pair; /* (total, 8) pass * pairs + pair, or -1 */
  const void *operand;        /* x: us_rows_pack_gpu */
  const float *unscale;       /* (8) */
  uint16_t *inner;            /* (passes * pairs, F) bf16: written by inner, read by outer */
  float *y;                   /* (passes, 8, D) written by outer */
  bool resident;              /* measure only, see us_linear_gpu */
};

cudaError_t us_experts_inner_gpu(const struct us_experts_gpu *args, cudaStream_t stream);
cudaError_t us_experts_outer_gpu(const struct us_experts_gpu *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
