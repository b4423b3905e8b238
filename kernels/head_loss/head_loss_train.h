/* head_loss_train.h: softmax, loss and gradient of the logits for a chunk of rows on the GPU.
 *
 *     cuBLAS: logits (rows, N) FP32 = hidden (rows, D) head^T
 *     us_head_loss_train(&(struct us_head_loss_train){.rows = rows, .N = N, .logits = logits, .stride = N, .label = label + first,
 *                                                     .scale = 1.0f / R, .opt_dlogits = (uint16_t *)logits, .dlogits_stride = 2 * N,
 *                                                     .opt_total = total, .opt_counted = counted, .scratch = scratch}, stream);
 *     cuBLAS: dhidden = dlogits head, dhead += dlogits^T hidden          // dlogits bf16, leading dimension 2 N
 *
 * As head_loss.h: cross-entropy against labels, or KL(teacher || student) against a second chunk of logits. Logits are FP32: in
 * bf16 a logit of 16 errs by up to 2^-5, three percent of its probability, and at the vocabularies that fit registers (32 K)
 * a chunk of 32 MB stays in L2 between product and loss, so that the wider values cost no HBM traffic. dlogits are bf16, in
 * the same memory if wanted. Pointers are device memory; a call returns a cudaError_t. Sums have a fixed order.
 */
#ifndef US_KERNELS_HEAD_LOSS_TRAIN_H
#define US_KERNELS_HEAD_LOSS_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* N, stride, teacher_stride and dlogits_stride are multiples of 4, pointers to logits are 16-byte aligned. */
struct us_head_loss_train {
  size_t rows, N;
  const float *logits; /* (rows, N) */
  size_t stride;       /* floats between rows */
  const int32_t *
      label; /* (rows); negative: no label. CE skips the row; KL uses labels for statistics alone; may be NULL */
  const float *weight;      /* (rows), 0 skips the row; NULL: all 1 */
  const float *opt_teacher; /* (rows, N) the teacher's logits; NULL: cross-entropy */
  size_t teacher_stride;
  float scale;

  uint16_t *
      opt_dlogits; /* (rows, N) bf16 = scale * weight * (softmax - target), zeros in skipped rows; may be the memory of
                            logits if dlogits_stride is 2 * stride; NULL: no gradient */
  size_t dlogits_stride;  /* bf16 values between rows */
  float *opt_row_loss;    /* (rows) unweighted, 0 where skipped */
  float *opt_row_logprob; /* (rows) log-probability of the label, 0 without a label */
  uint8_t *opt_row_hit;   /* (rows) 1 where the largest logit (ties to the lowest id) is the label */
  double *opt_total;      /* (1) added to: sum of weight * loss * scale, rows in order */
  uint64_t *opt_counted;  /* (1) added to: rows with a loss */
  void *scratch;          /* us_head_loss_train_scratch(rows) bytes; needed with opt_total or opt_counted */
};
size_t us_head_loss_train_scratch(size_t rows);
int us_head_loss_train(const struct us_head_loss_train *loss, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
