/* quant_train.h: masters to compute weights on the GPU (bf16, MXFP4, FP8), and passes over a whole arena.
 *
 *     size_t n = us_quant_train_tiles(&encoding, offset, rows, cols, NULL);     // on the host, once a tensor: count, then fill
 *     ... all tensors' tiles in one array on the device ...
 *     us_quant_train(&(struct us_quant_train){.tiles = tiles, .count = count, .value = value, .opt_rounded = rounded,
 *                                             .opt_compute = compute, .opt_bad = bad}, stream);
 *
 * rounded is us_matrix_fake_quant of the masters, bit for bit (the same inline codecs); compute is rounded in bf16. One launch
 * serves all tensors. Pointers are device memory unless said; a call returns a cudaError_t. Sums have a fixed order.
 */
#ifndef US_KERNELS_QUANT_TRAIN_H
#define US_KERNELS_QUANT_TRAIN_H

#include "formats/matrix.h"
#include "kernels/gpu/stream.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A piece of a tensor that a block rounds: FP8 one scale block (128 x 128 at most), else a run of values. */
struct us_quant_tile {
  uint64_t offset; /* of the first value in the arenas */
  uint32_t rows, cols, stride;
  uint8_t format, scale_rule, fp8_scale, unused; /* enum us_format, us_scale_rule, us_fp8_scale */
};

/* On the host: tiles of a tensor (rows, cols) at `offset` of the arenas; a vector is (1, n). F32 is copied. Returns how many;
 * opt_tiles NULL: only counts. The encoding must pass us_matrix_encoding_check. Offset is a multiple of 16. */
size_t us_quant_train_tiles(const struct us_matrix_encoding *encoding, uint64_t offset, size_t rows,
                            size_t cols, struct us_quant_tile *opt_tiles);

struct us_quant_train {
  const struct us_quant_tile *tiles;
  size_t count;
  const float *value;    /* the arenas, 16-byte aligned */
  float *opt_rounded;    /* may be value */
  uint16_t *opt_compute; /* bf16 */
  uint64_t *opt_bad; /* (1) lowered to the arena index of the first NaN or Inf: set it to UINT64_MAX before */
  float *
      opt_scale; /* [(i - scale_base) / 8]: the scale of value i of MXFP4 and FP8; FP8's strides are multiples of 8 */
  uint64_t scale_base;
};
int us_quant_train(const struct us_quant_train *quant, cudaStream_t stream);

/* bf16(x) of n values. */
int us_bf16_train(size_t n, const float *x, uint16_t *out, cudaStream_t stream);

/* x *= *factor (device), n values; nothing is written if it is 1. */
int us_scale_train(size_t n, const float *factor, float *x, cudaStream_t stream);

/* *sum (double) = sum of x^2 over n values, in an order that n fixes. scratch: us_sum_squares_train_scratch bytes. */
size_t us_sum_squares_train_scratch(void);
int us_sum_squares_train(size_t n, const float *x, double *sum, void *scratch, cudaStream_t stream);

/* *factor = (float)(limit / sqrt(*sum)) if that norm is above limit > 0, else 1: what us_params_clip multiplies by. */
int us_clip_factor_train(const double *sum, double limit, float *factor, cudaStream_t stream);

/* *index is lowered to the first i with x[i] NaN or Inf: set it to UINT64_MAX before. */
int us_nonfinite_train(size_t n, const float *x, uint64_t *index, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
