/* head_loss.h: output head, softmax and loss in chunks of rows: (rows x vocabulary) never exists for more than a chunk.
 *
 *     struct us_head_loss loss = {.R = R, .D = D, .N = N, .x = hidden, .head = head, .label = labels, .scale = 1.0f / R,
 *                                 .dx = dx, .dhead = dhead};
 *     us_head_loss(&seq, &loss);                            // loss.total, and the gradients in the same pass
 *
 * Cross-entropy against labels, or KL(teacher || student) at T = 1 against the logits of a second head:
 *   loss = sum_r weight_r * loss_r * scale;  dlogits = scale * weight_r * (softmax - target)
 * Since the gradient of the logits needs nothing from later rows, loss and gradients are taken from one product.
 */
#ifndef US_KERNELS_HEAD_LOSS_H
#define US_KERNELS_HEAD_LOSS_H

#include "kernels/seq/seq.h"

/* Where the teacher's logits come from: its normed hidden rows and its head. */
struct us_head_teacher {
  const float *x; /* (rows, D) */
  size_t D;
  const float *head;   /* (N, D) */
  const uint32_t *row; /* (R) teacher row of each student row; NULL: the same index */
};

struct us_head_loss {
  size_t R, D, N;
  const float *x;    /* (R, D) rows after the final norm */
  const float *head; /* (N, D) */
  const int32_t *
      label; /* (R); -1: row without a label. CE skips it; KL uses labels only for the statistics; may be NULL */
  const float *weight;                   /* (R), 0 skips the row; NULL: all 1 */
  const struct us_head_teacher *teacher; /* NULL: cross-entropy */
  float scale;

  float *dx;    /* (R, D) written; NULL: no gradients at all (then dhead is ignored) */
  float *dhead; /* (N, D) added to; NULL: frozen head */

  float *row_loss;    /* (R) written, unweighted, 0 where skipped; NULL if not wanted */
  float *row_logprob; /* (R) log-probability of the label, 0 without a label; NULL if not wanted */
  uint8_t
      *row_hit; /* (R) 1 where the largest logit (ties to the lowest id) is the label; NULL if not wanted */

  double total;   /* result: sum of weight * loss * scale */
  size_t counted; /* result: rows with a loss */
};

void us_head_loss(struct us_seq *seq, struct us_head_loss *loss);

#endif
