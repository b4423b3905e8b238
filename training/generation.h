/* generation.h: many prompts continued by a model at once: what a drafter is distilled on.
 *
 *     struct us_continuation items[n];                        // prompt, max_tokens, seed, ids of each
 *     struct us_generation g = {.model = model, .items = items, .n = n, .sampling = {.temperature = 0.8f}, .cut_loops = true};
 *     us_learner_generate(learner, &g, &err);                 // count and finish of each (learner.h)
 *
 * Plain decoding: the token of a position is drawn as us_generate draws it, by Philox(seed; position), so an answer is a function of
 * prompt, seed and sampling, not of what runs beside it. On the CPU it is us_generate's, a batch of US_MAX_BATCH a thread. On GPUs
 * hundreds of sequences step together, and bf16 products sum in another order: where two tokens nearly tie, the other
 * may come; the bits also depend on the number of sequences at a time, which follows from the sizes of all items.
 */
#ifndef US_TRAINING_GENERATION_H
#define US_TRAINING_GENERATION_H

#include "base/pool.h"
#include "decode/generate.h"

struct us_continuation {
  const int32_t *prompt; /* (prompt_count) at least one */
  uint32_t prompt_count;
  uint32_t max_tokens; /* of the answer, at least 1; with the prompt at most the model's positions */
  uint64_t seed;
  int32_t *ids;   /* (max_tokens) written */
  uint32_t count; /* written */
  enum us_finish
      finish; /* written: STOP (the stop id is the last of the ids), LOOP, LENGTH; NONE: the time was over before */
};

struct us_generation {
  struct us_model *model; /* borrowed */
  struct us_continuation *items;
  size_t n;
  struct us_sampling sampling;
  const int32_t *stop_ids;
  size_t stop_id_count;      /* at most US_GENERATION_STOPS */
  bool cut_loops;            /* as decode/generate.h */
  double seconds;            /* from the call; 0: until all are answered */
  struct us_pool *pool;      /* host threads that decode the weights for a GPU; NULL: this one */
  uint32_t slots;            /* a GPU's sequences at a time; 0: by the sizes of all */
  bool stepwise;             /* a GPU reads prompts a token a step, not in packed passes: for tests */
  bool (*interrupted)(void); /* asked by any lane; NULL: never */
  void (*progress)(void *arg, size_t done, size_t all); /* by lane 0, of its part's share; NULL: silent */
  void *progress_arg;
};

#define US_GENERATION_STOPS 16

/* US_ERR_USAGE for what cannot be generated: an empty or too long prompt, an id outside of the vocabulary, too many stop ids, a
 * temperature or filter out of range. */
US_CHECKED enum us_status us_generation_check(const struct us_generation *g, struct us_err *err);

/* What the CPU's learner does: one executor a thread of the pool (NULL: this one). US_INTERRUPTED; what us_generate returns. */
US_CHECKED enum us_status us_generation_cpu(struct us_generation *g, struct us_pool *pool,
                                            struct us_err *err);

#endif
