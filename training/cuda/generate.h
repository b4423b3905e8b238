/* generate.h: one GPU's share of a generation (training/generation.h): hundreds of sequences a step, a CUDA graph a few steps.
 *
 *     struct us_cuda_generate g = {.cuda = cuda, .params = params, .generation = generation, .first = begin, .n = end - begin, .leads = true};
 *     us_cuda_generate(&g, &err);
 *
 * A step is one row a slot through the model: the operations of model.h with attention over kept keys and values
 * (kernels/attention_seq/attention_decode.h), the head, a draw a row (kernels/sample) and what comes next (kernels/slots). No step waits for
 * the host, which looks every eight steps, or 32 where all prompts are short, at how many sequences have ended, the clock, whether somebody
 * interrupted, and which slots wait for their prompts (prefill.h).
 */
#ifndef US_TRAINING_CUDA_GENERATE_H
#define US_TRAINING_CUDA_GENERATE_H

#include "training/cuda/params.h"
#include "training/generation.h"

struct us_cuda_generate {
  struct us_cuda *cuda;
  struct us_cuda_params *params; /* of the generation's model; frozen will do */
  struct us_generation *generation;
  size_t first, n; /* of its items: the share */
  bool leads;      /* tells the progress */
};

/* Sequences at a time: generation->slots, else at most 4,096 and as many as keep keys and values below 32 GiB; by all items, so
 * that the bits do not depend on how many GPUs share them. Multiples of 8. */
uint32_t us_cuda_generate_slots(const struct us_generation *generation);

/* The items are checked. US_ERR_USAGE for a shape that the kernels do not take, US_ERR_MEMORY, US_ERR_CHECK for logits that are not finite,
 * US_INTERRUPTED. */
US_CHECKED enum us_status us_cuda_generate(const struct us_cuda_generate *generate, struct us_err *err);

#endif
