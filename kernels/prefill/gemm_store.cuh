/* gemm_store.cuh: 16 outputs x 8 rows of a warp, from tensor-core order to rows of the result.
 *
 * Through the warp's patch of shared memory, so that a row's outputs leave side by side: 64 bytes of FP32, 32 of bf16.
 */
#ifndef US_KERNELS_PREFILL_GEMM_STORE_CUH
#define US_KERNELS_PREFILL_GEMM_STORE_CUH

#include "formats/bf16.h"
#include "kernels/cpu/exp.h"
#include "kernels/prefill/gemm_ring.cuh"

#define PATCH_STRIDE 20 /* floats of a row's 16 outputs */

/* Row of the result of row lane / 4 of a tile of 8; past the last one: any. */
static __device__ __forceinline__ uint32_t row_of(const struct gemm_args *a, const struct gemm_item *item,
                                                  int tile, int lane) {
  uint32_t r = tile * 8 + lane / 4, slot = item->first + (r < item->rows ? r : 0);
  return a->g.opt_scatter ? __ldg(a->g.opt_scatter + slot) : slot;
}

/* acc: outputs lane / 4 and + 8 of rows 2 (lane % 4) and + 1. column: of the first output; row: row_of. */
static __device__ __forceinline__ void store_sums(const struct gemm_args *a, const struct gemm_item *item,
                                                  int tile, uint32_t row, uint32_t column, float undo,
                                                  int lane, float *patch, const float acc[4]) {
  const struct us_prefill_rows *out = &a->g.out;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < 4; c++)
    patch[(lane % 4 * 2 + c % 2) * PATCH_STRIDE + c / 2 * 8 + lane / 4] = acc[c] * undo;
  __syncwarp();
  uint32_t at = column + lane % 4 * 4;
  if (tile * 8 + lane / 4 >= item->rows || at >= a->g.valid) return;
  float4 v = *(const float4 *)(patch + lane / 4 * PATCH_STRIDE + lane % 4 * 4);
  float *to = out->base[0];
  if (out->per_rank < a->g.rows) to = out->base[row / out->per_rank], row %= out->per_rank;
  to += (size_t)row * out->stride + item->part * out->part + out->first + at;
  if (at + 4 <= a->g.valid) {
    *(float4 *)to = v;
    return;
  }
  to[0] = v.x;
  if (at + 1 < a->g.valid) to[1] = v.y;
  if (at + 2 < a->g.valid) to[2] = v.z;
}

static __device__ __forceinline__ uint16_t operand_bits(float x) {
  return us_bf16_from_f32(us_bf16_round(x) * US_ENGINE_OPERAND_UNIT);
}

/* silu(gate) * up. column: of the first gate among gates and ups. */
static __device__ __forceinline__ void store_gated(const struct gemm_args *a, const struct gemm_item *item,
                                                   int tile, uint32_t column, float undo, int lane,
                                                   float *patch, const float gate[4], const float up[4]) {
  uint16_t *inner = (uint16_t *)patch; /* (8, 24): rows 48 bytes apart */
  __syncwarp();
#pragma unroll
  for (int c = 0; c < 4; c++) {
    float g = gate[c] * undo, value = g / (1.0f + us_expf(-g)) * (up[c] * undo);
    inner[(lane % 4 * 2 + c % 2) * 24 + c / 2 * 8 + lane / 4] = operand_bits(value);
  }
  __syncwarp();
  uint32_t r = tile * 8 + lane / 4, at = column / 2 + lane % 4 * 4;
  if (r >= item->rows || at >= a->g.valid / 2) return;
  uint2 v = *(const uint2 *)(inner + lane / 4 * 24 + lane % 4 * 4);
  *(uint2 *)(a->g.opt_swiglu + (size_t)(item->first + r) * a->g.swiglu_stride + at) = v;
}

#endif
