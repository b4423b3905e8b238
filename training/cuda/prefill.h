/* prefill.h: prompts of a generation read in packed passes over the model, whose keys and values go to the slots' caches.
 *
 *     struct us_cuda_prefill p = {.cuda = cuda, .slots = &slots, .kept = caches, .items = items};
 *     us_cuda_prefill_open(&p, &shape, params, longest_prompt, &err);
 *     us_cuda_prefill_queue(&p, index, token, &err);       // as of some moment; slots that wait get their prompts
 *     us_cuda_prefill_close(&p);
 *
 * A pass has the same number of rows whatever the prompts are, and every prompt begins at a multiple of US_CUDA_PREFILL_ALIGN, so that the
 * bits of a prompt's keys and values depend neither on the pass's other prompts nor on when it is read. A prompt's last token is
 * left to the step that draws what follows it.
 */
#ifndef US_TRAINING_CUDA_PREFILL_H
#define US_TRAINING_CUDA_PREFILL_H

#include "kernels/slots/slots_train.h"
#include "training/cuda/model.h"
#include "training/cuda/staging.h"
#include "training/generation.h"
#include "training/rows.h"

#define US_CUDA_PREFILL_ROWS  8192 /* of a pass, or more where a prompt is longer */
#define US_CUDA_PREFILL_ALIGN 64   /* keys of a tile of attention, and a multiple of a tile's queries */
#define US_CUDA_PREFILL_LEAST 16   /* tokens of a prompt that is worth waiting for a pass */

/* Keys and values of a layer: (slots, G, capacity, dim). */
struct us_cuda_kept {
  uint16_t *k, *v;
  uint32_t capacity; /* positions */
};

struct us_cuda_prefill {
  struct us_cuda *cuda;
  const struct us_slots *slots;        /* their sequences are the items */
  const struct us_cuda_kept *kept;     /* (L) */
  const struct us_continuation *items; /* host */
  struct us_cuda_model *model;         /* the rest is set by open */
  struct us_cuda_staging staging;
  struct us_rows rows;  /* the pass that is being packed */
  int32_t *row_slot;    /* (R) */
  uint32_t *row_end;    /* (R) */
  int32_t *device_slot; /* the same on the device */
  uint32_t *device_end;
  int32_t *read; /* (slots) the sequence whose prompt the slot got last, or -1 */
  size_t capacity, used;
  void *memory;
};

US_CHECKED enum us_status us_cuda_prefill_open(struct us_cuda_prefill *prefill, const struct us_shape *shape,
                                               struct us_cuda_params *params, uint32_t longest,
                                               struct us_err *err);
void us_cuda_prefill_close(struct us_cuda_prefill *prefill); /* the stream is done */

/* index and token: the slots' (host), perhaps of a while ago. */
US_CHECKED enum us_status us_cuda_prefill_queue(struct us_cuda_prefill *prefill, const int32_t *index,
                                                const int32_t *token, struct us_err *err);

#endif
