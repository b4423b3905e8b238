/* responses.h: a model's own answers as training text: prompts from token shards or given ones, continued by the model itself.
 *
 *     struct us_responses_options options = {.count = 1000, .length = 512, .sampling = {.temperature = 0.8f}, .seed = 1};
 *     us_responses_generate(learner, model, shards, US_PART_TRAIN, &options, &responses, &err);
 *     us_responses_window(&responses, i, &window);                // window.loss marks the answer
 *     us_responses_release(&responses);
 *
 * A prompt is drawn by Philox(seed; index): of a dialogue its beginning up to the start of a marked run (an answer, one of
 * those in the first half of `length`, else what precedes the first); of plain text prompt_min to prompt_max tokens, in one of four cases the first of
 * the document, else from anywhere in it. Given prompts take turns. The answer ends at a stop id, at `length` tokens in all, or
 * once it repeats itself (decode/generate.h: cut_loops). What is generated depends on the arguments alone, not on threads,
 * unless a time limit ends it.
 */
#ifndef US_TRAINING_RESPONSES_H
#define US_TRAINING_RESPONSES_H

#include "decode/run.h"
#include "decode/sample.h"
#include "model/model.h"
#include "training/learner.h"
#include "training/shards.h"

/* Prompts as token ids: prompt i is ids[start[i]] .. ids[start[i + 1] - 1], at least one. */
struct us_responses_prompts {
  const int32_t *ids;
  const size_t *start; /* (n + 1) */
  size_t n;            /* at least 1 */
};

struct us_responses_options {
  size_t count;  /* answers */
  size_t length; /* tokens kept, prompt included: of a longer given prompt its end */
  const struct us_responses_prompts *prompts; /* instead of the shards'; NULL */
  uint32_t max_tokens;             /* of an answer; 0: what `length` leaves, to given prompts half of it */
  uint32_t prompt_min, prompt_max; /* 0: 8 and 64 */
  int32_t first;                   /* without shards: the one token of every prompt */
  const int32_t *stop_ids;         /* (stop_id_count) that end an answer; NULL with none */
  size_t stop_id_count;            /* at most US_GENERATION_STOPS */
  double seconds;                  /* keep what is answered until then; 0: all `count` */
  struct us_sampling sampling;
  uint64_t seed;
  struct us_pool *pool;                                 /* as us_generation's */
  bool (*interrupted)(void);                            /* NULL: never */
  void (*progress)(void *arg, size_t done, size_t all); /* called by the calling thread; NULL: silent */
  void *progress_arg;
};

struct us_responses {
  size_t n, tokens; /* of answers, which may be fewer than wanted with a time limit */
  int32_t *ids;     /* prompt and answer, one behind the other, `length` slots each */
  uint32_t *prompt; /* (n) tokens of the prompt */
  uint32_t *total;  /* (n) tokens of both */
  uint8_t *finish;  /* (n) enum us_finish */
  size_t length;
};

/* shards may be NULL: every prompt is options->first. US_ERR_INPUT when the part has no document of two tokens; what us_learner_generate
 * returns: US_ERR_USAGE for a prompt that does not fit the model with max_tokens behind it. */
US_CHECKED enum us_status us_responses_generate(struct us_learner *learner, struct us_model *model,
                                                const struct us_shards *shards, enum us_part part,
                                                const struct us_responses_options *options,
                                                struct us_responses *ret_responses, struct us_err *err);
void us_responses_release(struct us_responses *responses);

/* Room for n, none there yet; and one put at place `at`: as much of the answer as fits `length` with a token of prompt, before it the
 * end of the prompt. Both may lie where they go. */
US_CHECKED enum us_status us_responses_init(struct us_responses *responses, size_t n, size_t length,
                                            struct us_err *err);
void us_responses_keep(struct us_responses *responses, size_t at, const int32_t *prompt, size_t prompt_count,
                       const int32_t *answer, size_t count);

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
