/* draft_loss.h: the loss of a drafter's blocks: cross-entropy or KL a slot, weighted by slot, and what it tells.
 *
 *     struct us_draft_loss loss;
 *     us_draft_loss_init(&loss, capacity, B, D, &err);
 *     loss.kind = US_DRAFT_CE, loss.weights = US_DRAFT_DPACE, loss.alpha = 0.5f;
 *     us_draft_loss(&seq, &loss, &blocks, hidden, head, D, N, NULL, NULL, dhidden);     // sums in loss.sum grow
 *     double length = us_draft_tally_length(&loss.sum);
 *     us_draft_loss_release(&loss);
 *
 * Over the labelled rows (block n, slot j) of a step:  L = sum w_nj loss_nj / sum w_nj.  The gradient written is that of
 * sum w_nj loss_nj; the caller divides by loss.sum.weight when the whole step is in. Weights take no gradient.
 *   uniform  w_j = 1
 *   exp      w_j = exp(-(j - 1) / gamma)                                           (DFlash)
 *   dpace    w_j = sum_{m >= j} prod_{i <= m} q_i,  q_i = (1 - alpha) p_i + alpha  (D-PACE, arXiv 2605.18810, eq. 7-8)
 * with p_i the drafter's probability of slot i's label and m running over the block's labelled slots: slot j's share of the
 * expected accepted length.
 */
#ifndef US_TRAINING_DRAFT_LOSS_H
#define US_TRAINING_DRAFT_LOSS_H

#include "training/draft_blocks.h"

enum us_draft_loss_kind { US_DRAFT_CE, US_DRAFT_KL };
enum us_draft_weights { US_DRAFT_EXP, US_DRAFT_DPACE, US_DRAFT_UNIFORM };

/* Sums over blocks; slot j at index j, 1 to B - 1. */
struct us_draft_tally {
  double loss, weight;                             /* sum of w * loss, of w */
  uint64_t rows[US_MAX_BLOCK], hits[US_MAX_BLOCK]; /* labelled; largest logit is the label */
  uint64_t blocks;                                 /* with a label in every slot ... */
  uint64_t accepted;                               /* ... and how many slots before their first miss */
};

struct us_draft_loss {
  enum us_draft_loss_kind kind;
  enum us_draft_weights weights;
  float gamma, alpha;
  struct us_draft_tally sum;
  uint8_t *
      survived; /* NULL, or where a tally writes the slots before a block's first miss; it moves on behind them */

  size_t capacity; /* labelled rows */
  uint32_t *row, *teacher_row;
  int32_t *label;
  float *x, *dx; /* (rows, D) */
  float *loss, *logprob, *weight;
  uint8_t *hit;
};

/* Room for `blocks` blocks of B rows. */
US_CHECKED enum us_status us_draft_loss_init(struct us_draft_loss *loss, size_t blocks, uint32_t B, size_t D,
                                             struct us_err *err);
void us_draft_loss_release(struct us_draft_loss *loss);

/* Add the blocks to loss->sum.
 *   hidden   (blocks * B, D) after the drafter's final norm
 *   head     (N, D) that the drafter's rows go through, frozen: the target's, or its own
 *   teacher  (R, D) the target's normed rows; KL only: slot j's teacher is the row before its position
 *   teacher_head  (N, D) the target's; KL only
 *   dhidden  (blocks * B, D) written; NULL: no gradient */
void us_draft_loss(struct us_seq *seq, struct us_draft_loss *loss, const struct us_draft_blocks *blocks,
                   const float *hidden, const float *head, size_t D, size_t N, const float *teacher,
                   const float *teacher_head, float *dhidden);

/* Weights of slots 1 .. n of one block (into weight[0 .. n-1]); logprob (n) of their labels, used by dpace. */
void us_draft_slot_weights(const struct us_draft_loss *loss, const float *logprob, uint32_t n, float *weight);

/* Add n blocks of B rows with `labels` labelled slots each to loss->sum, from loss->loss, logprob and hit of the labelled rows
 * in order; loss->weight is written. */
void us_draft_loss_tally(struct us_draft_loss *loss, size_t n, uint32_t B, const uint32_t *labels);

/* Mean loss; share of hits of a slot; simulated acceptance length: 1 + slots before the first miss. NAN without rows. */
double us_draft_tally_loss(const struct us_draft_tally *tally);
double us_draft_tally_accuracy(const struct us_draft_tally *tally, uint32_t slot);
double us_draft_tally_length(const struct us_draft_tally *tally);

void us_draft_tally_add(struct us_draft_tally *sum, const struct us_draft_tally *more);

#endif
