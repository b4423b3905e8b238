/* responses.c: prompts from shards or given ones, answered by the model. */
#include "training/responses.h"

#include "base/philox.h"

#include <stdlib.h>
#include <string.h>

/* --- prompts --- */

#define MANY_STARTS 256

static double uniform(struct us_philox_key key, uint64_t index, uint32_t what) {
  uint32_t word[4];
  us_philox_quad(key, (uint32_t)index, (uint32_t)(index >> 32), what, US_STREAM_SHUFFLE, word);
  return (double)(((uint64_t)word[0] << 32 | word[1]) >> 11) * 0x1p-53;
}

/* Tokens of a window that make a prompt, the window moved to where they begin; 0: it cannot be one. */
static size_t prompt_of(const struct us_shards *shards, enum us_part part, size_t begin, size_t end,
                        const struct us_responses_options *o, double where, double how_long,
                        struct us_window *w) {
  size_t start[MANY_STARTS], starts = 0, most = o->length / 2;
  us_shards_copy(shards, part, begin, w);
  size_t n = end - begin < w->n ? end - begin : w->n;
  for (size_t i = 1; i < n && i <= most && starts < MANY_STARTS; i++)
    if (w->loss[i] && !w->loss[i - 1]) start[starts++] = i;
  if (starts) return start[(size_t)(how_long * (double)starts)];
  size_t answer = end - begin; /* an answer further on: the last tokens before it */
  for (size_t i = n; i-- > 1;)
    if (w->loss[i] && !w->loss[i - 1]) answer = i;
  if (answer < end - begin) {
    us_shards_copy(shards, part, begin + answer - most, w);
    return most;
  }
  if (!w->loss[0] || n < 2) return 0;
  size_t low = o->prompt_min ? o->prompt_min : 8, high = o->prompt_max ? o->prompt_max : 64;
  if (high > most) high = most;
  if (low > high) low = high;
  size_t length = low + (size_t)(how_long * (double)(high - low + 1));
  if (end - begin <= length) return n - 1;
  /* Files begin alike; what follows them does not. */
  if (where >= 0.25)
    us_shards_copy(shards, part, begin + (size_t)(where * (double)(end - begin - length)), w);
  return length;
}

static enum us_status choose_prompts(const struct us_shards *shards, enum us_part part,
                                     const struct us_responses_options *o, struct us_responses *r,
                                     struct us_err *err) {
  struct us_window window;
  struct us_philox_key key = us_philox_key(o->seed);
  if (o->prompts) {
    r->n = o->count;
    return US_OK;
  }
  if (!shards) {
    for (; r->n < o->count; r->n++) {
      r->ids[r->n * r->length] = o->first;
      r->prompt[r->n] = r->total[r->n] = 1;
    }
    return US_OK;
  }
  size_t documents = us_shards_documents(shards, part), tries = 0;
  enum us_status status = us_window_init(&window, o->length, err);
  if (status != US_OK) return status;
  for (uint64_t draw = 0; r->n < o->count && documents && tries < 1000; draw++, tries++) {
    size_t begin, end;
    us_shards_document(shards, part, (size_t)(uniform(key, draw, 0) * (double)documents), &begin, &end);
    size_t length =
        prompt_of(shards, part, begin, end, o, uniform(key, draw, 2), uniform(key, draw, 1), &window);
    if (!length) continue;
    memcpy(r->ids + r->n * r->length, window.ids, length * sizeof *r->ids);
    r->prompt[r->n] = r->total[r->n] = (uint32_t)length;
    r->n++;
    tries = 0;
  }
  us_window_release(&window);
  if (r->n < o->count)
    return us_err_set(err, US_ERR_INPUT, "the shards hold no document that could be a prompt");
  return US_OK;
}

/* --- answers --- */

/* Tokens of an answer that were generated, to be placed behind the prompt's end; of a given prompt, which may be long. */
static uint32_t most_tokens(const struct us_responses_options *o, uint32_t prompt) {
  uint32_t room = (uint32_t)(o->prompts ? o->length / 2 : o->length - prompt);
  return o->max_tokens && (o->prompts || o->max_tokens < room) ? o->max_tokens : room;
}

/* Answers go to where they stay, those to given prompts to `apart` (count, max_tokens). */
static void fill_item(const struct us_responses_options *o, const struct us_responses *r, size_t i,
                      int32_t *apart, struct us_continuation *item) {
  int32_t *kept = r->ids + i * r->length;
  *item = (struct us_continuation){.prompt = kept,
                                   .prompt_count = r->prompt[i],
                                   .max_tokens = most_tokens(o, r->prompt[i]),
                                   .seed = o->seed + 0x9E3779B97F4A7C15u * (i + 1),
                                   .ids = kept + r->prompt[i]};
  if (!o->prompts) return;
  const size_t *start = o->prompts->start + i % o->prompts->n;
  item->prompt = o->prompts->ids + start[0];
  item->prompt_count = (uint32_t)(start[1] - start[0]);
  item->ids = apart + i * item->max_tokens;
}

void us_responses_keep(struct us_responses *r, size_t at, const int32_t *prompt, size_t prompt_count,
                       const int32_t *answer, size_t count) {
  if (count > r->length - 1) count = r->length - 1;
  if (prompt_count > r->length - count)
    prompt += prompt_count - (r->length - count), prompt_count = r->length - count;
  int32_t *ids = r->ids + at * r->length;
  memmove(ids, prompt, prompt_count * sizeof *ids);
  memmove(ids + prompt_count, answer, count * sizeof *ids);
  r->prompt[at] = (uint32_t)prompt_count;
  r->total[at] = (uint32_t)(prompt_count + count);
  r->tokens += count;
}

/* What was answered in time, one behind the other. */
static void keep_finished(const struct us_generation *g, struct us_responses *r) {
  r->n = 0;
  for (size_t i = 0; i < g->n; i++) {
    const struct us_continuation *item = &g->items[i];
    if (item->finish == US_FINISH_NONE) continue;
    us_responses_keep(r, r->n, item->prompt, item->prompt_count, item->ids, item->count);
    r->finish[r->n++] = (uint8_t)item->finish;
  }
}

static enum us_status answer(struct us_learner *learner, struct us_model *model,
                             const struct us_responses_options *o, struct us_responses *r,
                             struct us_err *err) {
  size_t apart = o->prompts ? r->n * most_tokens(o, 0) : 0;
  struct us_generation g = {.model = model,
                            .items = calloc(r->n, sizeof *g.items),
                            .n = r->n,
                            .sampling = o->sampling,
                            .stop_ids = o->stop_ids,
                            .stop_id_count = o->stop_id_count,
                            .cut_loops = true,
                            .seconds = o->seconds,
                            .pool = o->pool,
                            .interrupted = o->interrupted,
                            .progress = o->progress,
                            .progress_arg = o->progress_arg};
  int32_t *ids = malloc((apart + 1) * sizeof *ids);
  enum us_status status =
      g.items && ids ? US_OK : us_err_memory(err, "answers", apart * sizeof *ids + r->n * sizeof *g.items);
  for (size_t i = 0; i < r->n && status == US_OK; i++) fill_item(o, r, i, ids, &g.items[i]);
  if (status == US_OK) status = us_learner_generate(learner, &g, err);
  if (status == US_OK) keep_finished(&g, r);
  if (status == US_OK && !r->n)
    status = us_err_set(err, US_ERR_INPUT, "no answer was finished in %g s", o->seconds);
  free(g.items);
  free(ids);
  return status;
}

enum us_status us_responses_init(struct us_responses *r, size_t n, size_t length, struct us_err *err) {
  *r = (struct us_responses){.length = length};
  r->ids = calloc(n + 1, length * sizeof *r->ids);
  r->prompt = calloc(n + 1, sizeof *r->prompt);
  r->total = calloc(n + 1, sizeof *r->total);
  r->finish = calloc(n + 1, sizeof *r->finish);
  if (r->ids && r->prompt && r->total && r->finish) return US_OK;
  us_responses_release(r);
  return us_err_memory(err, "answers", n * length * sizeof *r->ids);
}

enum us_status us_responses_generate(struct us_learner *learner, struct us_model *model,
                                     const struct us_shards *shards, enum us_part part,
                                     const struct us_responses_options *options,
                                     struct us_responses *ret_responses, struct us_err *err) {
  *ret_responses = (struct us_responses){.length = options->length};
  if (!options->count || options->length < 4 || options->length > model->shape.max_positions)
    return us_err_set(err, US_ERR_USAGE,
                      "%zu answers of %zu tokens; a model of %u positions takes 4 to as many", options->count,
                      options->length, model->shape.max_positions);
  enum us_status status = us_responses_init(ret_responses, options->count, options->length, err);
  if (status == US_OK) status = choose_prompts(shards, part, options, ret_responses, err);
  if (status == US_OK) status = answer(learner, model, options, ret_responses, err);
  if (status != US_OK) us_responses_release(ret_responses);
  return status;
}

/* --- access --- */

void us_responses_release(struct us_responses *responses) {
  free(responses->ids);
  free(responses->prompt);
  free(responses->total);
  free(responses->finish);
  *responses = (struct us_responses){0};
}

void us_responses_window(const struct us_responses *r, size_t i, struct us_window *window) {
  size_t n = r->total[i];
  window->n = n;
  memcpy(window->ids, r->ids + i * r->length, n * sizeof *window->ids);
  memset(window->document, 0, n * sizeof *window->document);
  memset(window->loss, 1, n);
  memset(window->loss, 0, r->prompt[i]);
}
