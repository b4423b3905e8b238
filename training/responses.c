/* responses.c: prompts from shards, answered by the model: one executor a thread, requests in chunks of a batch.
 *
 * Contents: prompts; answers; access.
 */
#include "training/responses.h"

#include "base/philox.h"
#include "decode/generate.h"

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

struct answer_job {
  struct us_model *model;
  const struct us_responses_options *options;
  struct us_responses *responses;
  size_t next, done; /* shared by the threads */
  int failed;
  struct us_err err; /* of the first failure; written by its thread alone */
};

static void fill_request(const struct answer_job *job, size_t i, struct us_request *request) {
  const struct us_responses *r = job->responses;
  const struct us_shape *shape = &job->model->shape;
  *request = (struct us_request){.prompt = r->ids + i * r->length,
                                 .prompt_count = r->prompt[i],
                                 .sampling = job->options->sampling,
                                 .seed = job->options->seed + 0x9E3779B97F4A7C15u * (i + 1),
                                 .samples = 1,
                                 .max_tokens = (uint32_t)(r->length - r->prompt[i]),
                                 .stop_ids = (const int32_t *)shape->stop_ids,
                                 .stop_id_count = shape->stop_count,
                                 .cut_loops = true};
}

static enum us_status answer_chunk(struct answer_job *job, struct us_executor *ex, size_t first, size_t n,
                                   struct us_err *err) {
  struct us_request requests[US_MAX_BATCH];
  struct us_result results[US_MAX_BATCH];
  struct us_responses *r = job->responses;
  struct us_generate_options options = {
      .block = 1, .batch = US_MAX_BATCH, .interrupted = job->options->interrupted};
  for (size_t i = 0; i < n; i++) fill_request(job, first + i, &requests[i]);
  enum us_status status = us_generate(ex, requests, n, &options, results, NULL, err);
  if (status != US_OK) return status;
  for (size_t i = 0; i < n; i++) {
    const struct us_ids *ids = &results[i].outputs[0].ids;
    size_t room = r->length - r->prompt[first + i], count = ids->count < room ? ids->count : room;
    memcpy(r->ids + (first + i) * r->length + r->prompt[first + i], ids->ids, count * sizeof *r->ids);
    r->total[first + i] = r->prompt[first + i] + (uint32_t)count;
    us_result_release(&results[i]);
  }
  return US_OK;
}

static void answer(void *arg, int worker, int workers) {
  struct answer_job *job = arg;
  struct us_executor *ex = NULL;
  struct us_err err = {0};
  size_t count = job->options->count;
  enum us_status status = us_executor_create_reference(job->model, NULL, NULL, US_ROUND_BF16, &ex, &err);
  while (status == US_OK && !__atomic_load_n(&job->failed, __ATOMIC_RELAXED)) {
    size_t first = __atomic_fetch_add(&job->next, US_MAX_BATCH, __ATOMIC_RELAXED);
    if (first >= count) break;
    size_t n = count - first < US_MAX_BATCH ? count - first : US_MAX_BATCH;
    status = answer_chunk(job, ex, first, n, &err);
    size_t done = __atomic_add_fetch(&job->done, n, __ATOMIC_RELAXED);
    if (!worker && job->options->progress) job->options->progress(job->options->progress_arg, done, count);
  }
  if (status != US_OK && !__atomic_exchange_n(&job->failed, 1, __ATOMIC_RELAXED)) job->err = err;
  if (ex) ex->ops->free(ex);
}

enum us_status us_responses_generate(struct us_model *model, const struct us_shards *shards,
                                     enum us_part part, const struct us_responses_options *options,
                                     struct us_pool *pool, struct us_responses *ret_responses,
                                     struct us_err *err) {
  struct us_responses *r = ret_responses;
  *r = (struct us_responses){.length = options->length};
  if (!options->count || options->length < 4 || options->length > model->shape.max_positions)
    return us_err_set(err, US_ERR_USAGE,
                      "%zu answers of %zu tokens; a model of %u positions takes 4 to as many", options->count,
                      options->length, model->shape.max_positions);
  r->ids = calloc(options->count, options->length * sizeof *r->ids);
  r->prompt = calloc(options->count, sizeof *r->prompt);
  r->total = calloc(options->count, sizeof *r->total);
  enum us_status status = US_OK;
  if (!r->ids || !r->prompt || !r->total)
    status = us_err_memory(err, "answers", options->count * options->length * sizeof *r->ids);
  if (status == US_OK) status = choose_prompts(shards, part, options, r, err);
  struct answer_job job = {.model = model, .options = options, .responses = r};
  if (status == US_OK) {
    us_pool_run(pool, answer, &job);
    if (job.failed) status = us_err_set(err, job.err.status, "%s", job.err.message);
  }
  for (size_t i = 0; i < r->n && status == US_OK; i++) r->tokens += r->total[i] - r->prompt[i];
  if (status != US_OK) us_responses_release(r);
  return status;
}

/* --- access --- */

void us_responses_release(struct us_responses *responses) {
  free(responses->ids);
  free(responses->prompt);
  free(responses->total);
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
