/* gptq_train.h: GPTQ on the GPU: what matrices' inputs are and have lost, factors of their moments, corrections, aims.
 *
 *     us_gptq_train_inputs(&inputs, stream);                  // rows of x, and of what the original's are more
 *     us_grouped_grad_w(&group, x, x, g.moments, K * K, stream);     // sums over rows: grouped_gemm.h
 *     us_quant_train(&(struct us_quant_train){..., .opt_scale = g.scale}, stream);     // after the correction
 *     struct us_gptq_train g = {.groups = E, .N = 2 * F, .K = D, ...};
 *     us_gptq_train_factor(&g, stream);                       // moments become L
 *     us_gptq_train_correct(&g, 0.8f, 0.8f, stream);
 *     us_gptq_train_round(&g, stream);                        // value becomes the aims
 *
 * The formulas and names are those of training/gptq.h; sums are FP32 in another order than the CPU's, the same bits every run. All
 * matrices of a part of a layer go together: `groups` of equal size, each with moments of its own.
 *
 * Pointers are device memory, 16-byte aligned; K and N are multiples of 8. Calls return a cudaError_t: cudaErrorInvalidValue for
 * sizes that break these rules, cudaErrorUnknown where cuBLAS refused a product. Nothing is allocated, nothing waits.
 */
#ifndef US_KERNELS_GPTQ_TRAIN_H
#define US_KERNELS_GPTQ_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cublasContext;

/* --- inputs --- */

/* x = bf16(w * to), lost = bf16(w * from - x), row by row; row r comes from row opt_row[r] and has weight opt_weight[opt_pair[r]].
 * x and lost may be what they come from where there is no opt_row. */
struct us_gptq_train_inputs {
  uint32_t rows, cols;                /* of x and lost; cols a multiple of 8 */
  const uint32_t *opt_row, *opt_pair; /* (rows) of the plan of experts; NULL: row r itself, weight 1 */
  const float *opt_weight;            /* with opt_pair */
  const uint16_t *from, *to;          /* the original's, and the rounded model's */
  uint16_t *x, *lost;                 /* (rows, cols) */
};
int us_gptq_train_inputs(const struct us_gptq_train_inputs *inputs, cudaStream_t stream);

/* lost = bf16(share * (from - to)) of the residual streams. */
struct us_gptq_train_stream {
  uint32_t rows, cols;
  const uint32_t *opt_row; /* (rows) as above */
  float share;
  const float *from, *to;
  uint16_t *lost; /* (rows, cols) */
};
int us_gptq_train_stream(const struct us_gptq_train_stream *lost, cudaStream_t stream);

/* --- matrices --- */

struct us_gptq_train {
  uint32_t groups, N, K;
  float *value;    /* group g's matrix (N, K) at value + g * stride */
  uint64_t stride; /* a multiple of 8 */
  const uint8_t
      *format; /* (groups, N) enum us_format of each row: what is neither MXFP4 nor FP8 stays as it is */
  const float *scale;           /* [(g * stride + i) / 8] of value i of group g: us_quant_train's opt_scale */
  float *moments;               /* (groups, K, K) sum of x x^T, then L */
  const float *crossed;         /* (groups, K, K) sum of lost x^T */
  const float *opt_made_up;     /* (groups, N, K) sum of stream x^T */
  uint32_t *at;                 /* (groups, K) written by factor */
  float *scratch;               /* us_gptq_train_scratch floats */
  struct cublasContext *cublas; /* cublasHandle_t on the stream */
};
size_t us_gptq_train_scratch(uint32_t groups, uint32_t N, uint32_t K);

int us_gptq_train_factor(const struct us_gptq_train *gptq, cudaStream_t stream);

/* value += (of_inputs * value crossed + of_stream * made_up) (L L^T)^-1 */
int us_gptq_train_correct(const struct us_gptq_train *gptq, float of_inputs, float of_stream,
                          cudaStream_t stream);

int us_gptq_train_round(const struct us_gptq_train *gptq, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
