/* responses.h: a model's own answers as training text: prompts from token shards, continued by the model itself.
 *
 *     struct us_responses_options options = {.count = 1000, .length = 512, .sampling = {.temperature = 0.8f}, .seed = 1};
 *     us_responses_generate(model, shards, US_PART_TRAIN, &options, pool, &responses, &err);
 *     us_responses_window(&responses, i, &window);                // window.loss marks the answer
 *     us_responses_release(&responses);
 *
 * A prompt is drawn by Philox(seed; index): of a dialogue its beginning up to the start of a marked run (an answer, one of
 * those in the first half of `length`, else what precedes the first); of plain text prompt_min to prompt_max tokens, in one of four cases the first of
 * the document, else from anywhere in it. The answer ends at a stop token, at `length` tokens in all, or once it repeats
 * itself (decode/generate.h: cut_loops). What is generated depends on the arguments alone, not on threads.
 */
#ifndef US_TRAINING_RESPONSES_H
#define US_TRAINING_RESPONSES_H

#include "decode/run.h"
#include "decode/sample.h"
#include "model/model.h"
#include "training/shards.h"

#include "base/pool.h"

struct us_responses_options {
  size_t count;                    /* answers */
  size_t length;                   /* tokens, prompt included */
  uint32_t prompt_min, prompt_max; /* 0: 8 and 64 */
  int32_t first;                   /* without shards: the one token of every prompt */
  struct us_sampling sampling;
  uint64_t seed;
  bool (*interrupted)(void);                            /* NULL: never */
  void (*progress)(void *arg, size_t done, size_t all); /* called by the calling thread; NULL: silent */
  void *progress_arg;
};

struct us_responses {
  size_t n, tokens; /* of answers */
  int32_t *ids;     /* prompt and answer, one behind the other, `length` slots each */
  uint32_t *prompt; /* (n) tokens of the prompt */
  uint32_t *total;  /* (n) tokens of both */
  size_t length;
};

/* shards may be NULL: every prompt is options->first. US_ERR_INPUT when the part has no document of two tokens; US_INTERRUPTED; what us_generate returns. */
US_CHECKED enum us_status us_responses_generate(struct us_model *model, const struct us_shards *shards,
                                                enum us_part part, const struct us_responses_options *options,
                                                struct us_pool *pool, struct us_responses *ret_responses,
                                                struct us_err *err);
void us_responses_release(struct us_responses *responses);

/* Which entries of a recorded run: one of `every` is held out, the others are not. */
struct us_responses_part {
  size_t length; /* tokens kept of an entry: as much of the answer as fits, before it the end of the prompt */
  size_t every;  /* at least 2 */
  bool heldout;
  uint32_t vocab; /* of the target */
};

/* Answers that the target gave elsewhere (us-serve, on a GPU). US_ERR_INPUT for an id outside of the vocabulary, or no answer. */
US_CHECKED enum us_status us_responses_read(const struct us_run *run, const struct us_responses_part *part,
                                            struct us_responses *ret_responses, struct us_err *err);

/* Fill the window, whose length must be at least responses->length. */
void us_responses_window(const struct us_responses *responses, size_t i, struct us_window *window);

#endif
