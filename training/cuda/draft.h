/* draft.h: forward and backward of a DFlash drafter for many blocks at once, and its loss, on a GPU.
 *
 *     us_cuda_draft_create(cuda, &draft_shape, &params, embed, rows, blocks, &draft, &err);
 *     us_cuda_model_forward(target, &batch, &(struct us_cuda_taps){..., .out = draft->taps}, &err);
 *     us_cuda_draft_forward(draft, R, position, &blocks, &err);
 *     us_cuda_draft_loss_add(loss, draft, &blocks, &(struct us_cuda_draft_teacher){.head = target->head}, true, &err);
 *     us_cuda_draft_backward(draft, &err);                           // adds to params->grad
 *     us_cuda_draft_loss_collect(loss, &tally, &err);                // waits; sums of all adds since the last collect
 *
 * The graph of training/draft_train.h and draft_loss.h with the storage of model.h.
 */
#ifndef US_TRAINING_CUDA_DRAFT_H
#define US_TRAINING_CUDA_DRAFT_H

#include "training/cuda/cuda.h"
#include "training/cuda/params.h"
#include "training/draft_loss.h"

struct us_cuda_draft {
  struct us_cuda *cuda; /* borrowed */
  struct us_draft_shape shape;
  struct us_cuda_params *params; /* borrowed */
  const uint16_t *embed;         /* device (N, D) the target's compute weights, borrowed */
  size_t capacity;               /* largest R */
  size_t blocks_capacity;
  size_t R, blocks; /* of the last forward pass */
  uint16_t *taps;   /* device (capacity, taps * D): features of the target's rows, filled by the caller */
  uint16_t *hidden; /* device (blocks * B, D) after the final norm and what a Markov head adds to it */
  float *dhidden;   /* device (blocks * B, D) its gradient, consumed by backward */
  struct us_cuda_draft_state *state;
};

/* Device bytes that create takes beside the parameters. */
size_t us_cuda_draft_bytes(const struct us_draft_shape *shape, size_t capacity, size_t blocks);

/* Room for passes of up to `capacity` context rows and `blocks` blocks. */
US_CHECKED enum us_status us_cuda_draft_create(struct us_cuda *cuda, const struct us_draft_shape *shape,
                                               struct us_cuda_params *params, const uint16_t *embed,
                                               size_t capacity, size_t blocks,
                                               struct us_cuda_draft **ret_draft, struct us_err *err);
void us_cuda_draft_free(struct us_cuda_draft *draft);

/* Fill draft->hidden from draft->taps.
 *   position  (R) host, inside their documents
 *   blocks    host, aimed at R rows; may be reused when the loss has been added */
US_CHECKED enum us_status us_cuda_draft_forward(struct us_cuda_draft *draft, size_t R,
                                                const uint32_t *position,
                                                const struct us_draft_blocks *blocks, struct us_err *err);
US_CHECKED enum us_status us_cuda_draft_backward(struct us_cuda_draft *draft, struct us_err *err);

/* The target's side of the loss, device memory. */
struct us_cuda_draft_teacher {
  const uint16_t *head;     /* (N, D) frozen */
  const uint16_t *hidden;   /* (R, D) normed rows: KL's teachers; NULL: cross-entropy */
  const uint16_t *own_head; /* (N, D) frozen, that the drafter's rows go through; NULL: the target's */
};

struct us_cuda_draft_loss {
  struct us_cuda *cuda;
  struct us_draft_loss options; /* kind, weights, gamma, alpha; the rest is not used */
  struct us_cuda_draft_loss_state *state;
};

/* Room for `blocks` blocks an add. Kind, weights, gamma, alpha and survived are taken from `options`. */
US_CHECKED enum us_status us_cuda_draft_loss_create(struct us_cuda *cuda, const struct us_draft_shape *shape,
                                                    const struct us_draft_loss *options, size_t blocks,
                                                    struct us_cuda_draft_loss **ret_loss, struct us_err *err);
void us_cuda_draft_loss_free(struct us_cuda_draft_loss *loss);

/* Queue the loss of the blocks of draft's last forward pass, and with `gradient` fill draft->dhidden with the gradient of
 * sum w_nj loss_nj: the caller divides by the tally's weight when the whole step is in. */
US_CHECKED enum us_status us_cuda_draft_loss_add(struct us_cuda_draft_loss *loss, struct us_cuda_draft *draft,
                                                 const struct us_draft_blocks *blocks,
                                                 const struct us_cuda_draft_teacher *teacher, bool gradient,
                                                 struct us_err *err);

/* Wait; the sums of all adds since the last collect. */
US_CHECKED enum us_status us_cuda_draft_loss_collect(struct us_cuda_draft_loss *loss,
                                                     struct us_draft_tally *ret_tally, struct us_err *err);

#endif
