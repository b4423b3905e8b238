/* head_pass.h: chunks of logits from product to gradient, all on the device: what loss.c and draft_loss.c share. Internal. */
#ifndef US_TRAINING_CUDA_HEAD_PASS_H
#define US_TRAINING_CUDA_HEAD_PASS_H

#include "training/cuda/loss.h"

/* Device pointers; fields as in us_head_loss_train. */
struct us_cuda_head_pass {
  size_t R, D, N;
  const uint16_t *x, *head; /* (R, D), (N, D) */
  const int32_t *label;
  const float *opt_weight;
  const struct us_cuda_head_teacher *opt_teacher;
  float scale;
  float *opt_dx, *opt_dhead;
  float *opt_row_loss, *opt_row_logprob;
  uint8_t *opt_row_hit;
  double *opt_total;
  uint64_t *opt_counted;
  float *logits, *teacher_logits; /* (chunk, N) */
  size_t chunk;
  void *scratch; /* us_head_loss_train_scratch(chunk) */
};

/* Rows whose logits are kept at once, for up to R rows of N. */
size_t us_cuda_head_chunk(size_t R, size_t N);

/* Queue the products and losses of all rows. Failures stay in the context. */
void us_cuda_head_pass(struct us_cuda *cuda, const struct us_cuda_head_pass *pass);

#endif
