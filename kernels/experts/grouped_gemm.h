/* grouped_gemm.h: products of bf16 rows with one matrix a group, on the tensor cores of Hopper: forward and both gradients.
 *
 *     struct us_grouped g = {.start = plan.start, .groups = E, .rows = R * K, .N = 2 * F, .K = D};
 *     us_grouped_forward(&g, x_slot, w, w_stride, gate_up, stream);      // gate_up (rows, N) = x_slot (rows, K) W_e^T
 *     us_grouped_grad_x(&g, dgate_up, w, w_stride, dx_slot, stream);     // dx_slot (rows, K) = dgate_up (rows, N) W_e
 *     us_grouped_grad_w(&g, dgate_up, x_slot, dw, dw_stride, stream);    // dW_e (N, K) += dgate_up^T x_slot of the group's rows
 *
 * W_e (N, K) is row-major at w + e * w_stride. Rows [start[e], start[e + 1]) are of group e; groups may be empty. `start` lies
 * on the device and nothing waits for it; `rows` is its last value, known to the host. Without `start` there is one group.
 *
 * Sums are FP32 in the tensor cores, in ascending order of the summed index, 16 at a time; outputs are rounded once. A row of
 * y or dx depends on its own row of operands alone, a matrix dW_e on its group's rows alone: NaN and Inf spread no further.
 * The same sizes and `start` give the same bits every time. Nothing is allocated.
 *
 * All pointers are device memory, 16-byte aligned. N and K are multiples of 16, strides multiples of 8 (floats: 4).
 * Every call returns a cudaError_t: cudaErrorInvalidValue for sizes that break these rules.
 */
#ifndef US_KERNELS_GROUPED_GEMM_H
#define US_KERNELS_GROUPED_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
typedef struct CUstream_st *cudaStream_t;
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define US_GROUPED_MOST_GROUPS 1024

/* How the two warpgroups of a block share the work. TURNS: a tile each, one multiplies while the other stores (tiles of 128 to 192
 * columns, not for grad_w). TOGETHER: half a tile each; also what CHOSEN means beside a given tile. */
enum us_grouped_schedule { US_GROUPED_CHOSEN, US_GROUPED_TURNS, US_GROUPED_TOGETHER };

struct us_grouped {
  const uint32_t *start; /* (groups + 1) on the device; NULL: one group of all rows */
  uint32_t groups;       /* at most US_GROUPED_MOST_GROUPS */
  uint32_t rows;         /* of all groups together */
  uint32_t N, K;
  uint32_t tile;   /* columns of an output tile: 128, 160, 192 or 256; 0: tile and schedule by the shape */
  uint32_t blocks; /* 1, or 2 that share a column operand; 0: by the shape */
  enum us_grouped_schedule schedule;
};

/* y (rows, N) bf16 = x (rows, K) bf16 W_e^T. */
int us_grouped_forward(const struct us_grouped *grouped, const uint16_t *x, const uint16_t *w,
                       uint64_t w_stride, uint16_t *y, cudaStream_t stream);

/* The same, with W_e gates above ups (N = 2 F), and in the same pass a (rows, F) bf16 = silu(gate) * up from the rounded gates and
 * ups: the bits of us_experts_train_swiglu. opt_y NULL: a alone is kept. */
int us_grouped_forward_swiglu(const struct us_grouped *grouped, const uint16_t *x, const uint16_t *w,
                              uint64_t w_stride, uint16_t *opt_y, uint16_t *a, cudaStream_t stream);

/* The same as us_grouped_forward with y in FP32. */
int us_grouped_forward_f32(const struct us_grouped *grouped, const uint16_t *x, const uint16_t *w,
                           uint64_t w_stride, float *y, cudaStream_t stream);

/* dx (rows, K) bf16 = dy (rows, N) bf16 W_e. */
int us_grouped_grad_x(const struct us_grouped *grouped, const uint16_t *dy, const uint16_t *w,
                      uint64_t w_stride, uint16_t *dx, cudaStream_t stream);

/* dW_e (N, K) FP32 at dw + e * dw_stride += dy^T x over the group's rows. An empty group's is left alone. */
int us_grouped_grad_w(const struct us_grouped *grouped, const uint16_t *dy, const uint16_t *x, float *dw,
                      uint64_t dw_stride, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
