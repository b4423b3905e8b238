/* draft_train.h: forward and backward of a DFlash drafter for many blocks at once.
 *
 *     struct us_draft_train *train;
 *     us_draft_train_create(&draft_shape, &draft_params, embed, &seq, rows, blocks, &train, &err);
 *     us_draft_train_forward(train, taps, R, position, &blocks, &err);     // taps of the frozen target: us_train_taps
 *     ... train->dhidden from train->hidden ...                            // draft_loss.h
 *     us_draft_train_backward(train, &err);                                // adds to the gradients in draft_params
 *
 * Operations and rounding points are those of us_draft_forward_context and us_draft_forward_block, so the logits of a
 * block are what decoding drafts at its anchor, up to the order of sums; a row with a Markov head's part is rounded once, after
 * the addition, where decoding adds logits. Gradients reach the drafter's tensors alone, its mask vector included: none goes to
 * the target's embedding, head or features.
 *
 * Memory: (2 QKV + 4 D + H V + 3 F) floats a block row and layer, 2 QKV a context row and layer, QKV = H Q + G Q + G V.
 */
#ifndef US_TRAINING_DRAFT_TRAIN_H
#define US_TRAINING_DRAFT_TRAIN_H

#include "training/draft_blocks.h"
#include "training/params.h"

struct us_draft_train {
  struct us_draft_shape shape;
  struct us_params *params; /* borrowed */
  struct us_seq *seq;       /* borrowed */
  const float *embed;       /* (N, D) the target's, borrowed */
  size_t capacity;          /* largest R */
  size_t blocks_capacity;
  const struct us_draft_blocks *blocks; /* of the last forward pass */
  size_t R;
  float *hidden;  /* (blocks * B, D) after the final norm and what a Markov head adds to it */
  float *dhidden; /* (blocks * B, D) its gradient, consumed by backward */
  struct us_draft_train_state *state;
};

/* Room for passes of up to `capacity` context rows and `blocks` blocks. */
US_CHECKED enum us_status us_draft_train_create(const struct us_draft_shape *shape, struct us_params *params,
                                                const float *embed, struct us_seq *seq, size_t capacity,
                                                size_t blocks, struct us_draft_train **ret_train,
                                                struct us_err *err);
void us_draft_train_free(struct us_draft_train *train);

/* Fill train->hidden.
 *   taps      (R, taps * D) features of the target's rows
 *   position  (R) inside their documents
 *   blocks    aimed at R rows; must live until backward
 * US_ERR_USAGE for a pass that does not fit; US_ERR_MEMORY when scratch ran out. */
US_CHECKED enum us_status us_draft_train_forward(struct us_draft_train *train, const float *taps, size_t R,
                                                 const uint32_t *position,
                                                 const struct us_draft_blocks *blocks, struct us_err *err);

/* Gradients of all trainable tensors, from train->dhidden. */
US_CHECKED enum us_status us_draft_train_backward(struct us_draft_train *train, struct us_err *err);

/* Floating-point operations of training one block, its share of `context` new rows not counted; and of one context row. */
double us_draft_train_block_flops(const struct us_draft_shape *shape, double keys);
double us_draft_train_context_flops(const struct us_draft_shape *shape);

#endif
