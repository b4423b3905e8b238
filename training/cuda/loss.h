/* loss.h: output head, softmax and loss over many rows on a GPU, a chunk of logits at a time.
 *
 *     us_cuda_loss_create(cuda, rows, D, N, teacher_D, &loss, &err);
 *     us_cuda_loss_add(loss, &(struct us_cuda_head_loss){.R = R, .x = model->hidden, .head = model->head, .label = labels,
 *                            .scale = 1.0f / n, .dx = model->dhidden, .dhead = model->head_grad}, &err);    // queued
 *     us_cuda_loss_collect(loss, &total, &counted, &err);            // waits; sums since the last collect
 *     loss->row_loss[r]                                    // with .rows: host, of the last add; valid after collect
 *
 * The formulas of kernels/head_loss/head_loss.h; losses are summed in double in the order of the rows, on the device.
 */
#ifndef US_TRAINING_CUDA_LOSS_H
#define US_TRAINING_CUDA_LOSS_H

#include "training/cuda/cuda.h"

/* Where the teacher's logits come from. Device memory. */
struct us_cuda_head_teacher {
  const uint16_t *x; /* (rows, D) normed rows */
  size_t D;
  const uint16_t *head; /* (N, D) */
};

struct us_cuda_head_loss {
  size_t R;
  const uint16_t *x;    /* device (R, D) rows after the final norm */
  const uint16_t *head; /* device (N, D) */
  const int32_t *
      label; /* host (R); -1: none. CE skips it; with a teacher labels serve the statistics; may be NULL then */
  const float *weight;                            /* host (R), 0 skips the row; NULL: all 1 */
  const struct us_cuda_head_teacher *opt_teacher; /* row r is the student's row r; NULL: cross-entropy */
  float scale;
  float *dx;    /* device (R, D) written; NULL: no gradients at all */
  float *dhead; /* device (N, D) added to; NULL: frozen head */
  bool rows;    /* bring row_loss, row_logprob and row_hit to the host */
};

struct us_cuda_loss {
  struct us_cuda *cuda;
  size_t capacity, D, N;
  size_t chunk;                        /* rows whose logits exist at once; may be lowered */
  const float *weight;                 /* device (R) of the last add; NULL if it had none */
  const float *row_loss, *row_logprob; /* host (R): as us_head_loss's, of the last add with .rows */
  const uint8_t *row_hit;
  struct us_cuda_loss_state *state;
};

/* Device bytes that create takes. */
size_t us_cuda_loss_bytes(size_t capacity, size_t D, size_t N, size_t teacher_D);

/* Room for `capacity` rows an add; teacher_D 0: cross-entropy alone. */
US_CHECKED enum us_status us_cuda_loss_create(struct us_cuda *cuda, size_t capacity, size_t D, size_t N,
                                              size_t teacher_D, struct us_cuda_loss **ret_loss,
                                              struct us_err *err);
void us_cuda_loss_free(struct us_cuda_loss *loss);

/* Queue one micro-batch. Labels and weights may be reused when the call returns. */
US_CHECKED enum us_status us_cuda_loss_add(struct us_cuda_loss *loss, const struct us_cuda_head_loss *args,
                                           struct us_err *err);

/* Wait; total = sum of weight * loss * scale and counted = rows with a loss, of all adds since the last collect. */
US_CHECKED enum us_status us_cuda_loss_collect(struct us_cuda_loss *loss, double *ret_total,
                                               size_t *ret_counted, struct us_err *err);

#endif
