/* generation.c: prompts continued on the CPU: one executor a thread, requests in chunks of a batch. */
#include "training/generation.h"

#include <string.h>
#include <time.h>

/* --- what is refused --- */

static enum us_status check_ids(const int32_t *ids, size_t n, uint32_t vocab, struct us_err *err) {
  for (size_t i = 0; i < n; i++)
    if (ids[i] < 0 || (uint32_t)ids[i] >= vocab)
      return us_err_set(err, US_ERR_USAGE, "token %d is outside the vocabulary of %u", ids[i], vocab);
  return US_OK;
}

static enum us_status check_item(const struct us_generation *g, const struct us_continuation *item,
                                 struct us_err *err) {
  uint32_t positions = g->model->shape.max_positions;
  if (!item->prompt_count || !item->max_tokens)
    return us_err_set(err, US_ERR_USAGE, "a prompt of %u tokens and an answer of %u", item->prompt_count,
                      item->max_tokens);
  if (positions && (uint64_t)item->prompt_count + item->max_tokens > positions)
    return us_err_set(err, US_ERR_USAGE,
                      "a prompt of %u tokens and an answer of %u do not fit the model's %u positions",
                      item->prompt_count, item->max_tokens, positions);
  return check_ids(item->prompt, item->prompt_count, g->model->shape.vocab, err);
}

enum us_status us_generation_check(const struct us_generation *g, struct us_err *err) {
  const struct us_sampling *s = &g->sampling;
  if (!(s->temperature == 0.0f || (s->temperature >= 1e-3f && s->temperature <= 1e6f)))
    return us_err_set(err, US_ERR_USAGE, "temperature %g is neither 0 nor in [0.001, 1e6]",
                      (double)s->temperature);
  if (!(s->top_p >= 0.0f && s->top_p <= 1.0f && s->min_p >= 0.0f && s->min_p <= 1.0f))
    return us_err_set(err, US_ERR_USAGE, "top-p %g or min-p %g is not in [0, 1]", (double)s->top_p,
                      (double)s->min_p);
  if (g->stop_id_count > US_GENERATION_STOPS)
    return us_err_set(err, US_ERR_USAGE, "%zu stop ids are more than %d", g->stop_id_count,
                      US_GENERATION_STOPS);
  for (size_t i = 0; i < g->n; i++)
    if (check_item(g, &g->items[i], err) != US_OK) return us_err_prefix(err, "prompt %zu", i);
  return US_OK;
}

/* --- answers --- */

struct job {
  struct us_generation *g;
  double end;        /* when no further answer is begun; 0: never */
  size_t next, done; /* shared by the threads */
  int failed;
  struct us_err err; /* of the first failure; written by its thread alone */
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct us_request request_of(const struct us_generation *g, const struct us_continuation *item) {
  return (struct us_request){.prompt = item->prompt,
                             .prompt_count = item->prompt_count,
                             .sampling = g->sampling,
                             .seed = item->seed,
                             .samples = 1,
                             .max_tokens = item->max_tokens,
                             .stop_ids = g->stop_ids,
                             .stop_id_count = g->stop_id_count,
                             .cut_loops = g->cut_loops};
}

static void take_result(struct us_continuation *item, struct us_result *result) {
  const struct us_output *output = &result->outputs[0];
  item->count = (uint32_t)output->ids.count;
  item->finish = output->finish;
  memcpy(item->ids, output->ids.ids, item->count * sizeof *item->ids);
  us_result_release(result);
}

static enum us_status answer_chunk(struct us_generation *g, struct us_executor *ex,
                                   struct us_continuation *items, size_t n, struct us_err *err) {
  struct us_request requests[US_MAX_BATCH];
  struct us_result results[US_MAX_BATCH];
  struct us_generate_options options = {.block = 1, .batch = US_MAX_BATCH, .interrupted = g->interrupted};
  for (size_t i = 0; i < n; i++) requests[i] = request_of(g, &items[i]);
  enum us_status status = us_generate(ex, requests, n, &options, results, NULL, err);
  for (size_t i = 0; i < n && status == US_OK; i++) take_result(&items[i], &results[i]);
  return status;
}

static void answer(void *arg, int worker, int workers) {
  struct job *job = arg;
  struct us_generation *g = job->g;
  struct us_executor *ex = NULL;
  struct us_err err = {0};
  enum us_status status = us_executor_create_reference(g->model, NULL, NULL, US_ROUND_BF16, &ex, &err);
  while (status == US_OK && !__atomic_load_n(&job->failed, __ATOMIC_RELAXED)) {
    if (job->end > 0.0 && now() >= job->end) break;
    size_t first = __atomic_fetch_add(&job->next, US_MAX_BATCH, __ATOMIC_RELAXED);
    if (first >= g->n) break;
    size_t n = g->n - first < US_MAX_BATCH ? g->n - first : US_MAX_BATCH;
    status = answer_chunk(g, ex, g->items + first, n, &err);
    size_t done = __atomic_add_fetch(&job->done, n, __ATOMIC_RELAXED);
    if (!worker && g->progress) g->progress(g->progress_arg, done, g->n);
  }
  if (status != US_OK && !__atomic_exchange_n(&job->failed, 1, __ATOMIC_RELAXED)) job->err = err;
  if (ex) ex->ops->free(ex);
}

enum us_status us_generation_cpu(struct us_generation *g, struct us_pool *pool, struct us_err *err) {
  struct job job = {.g = g, .end = g->seconds > 0.0 ? now() + g->seconds : 0.0};
  for (size_t i = 0; i < g->n; i++) g->items[i].count = 0, g->items[i].finish = US_FINISH_NONE;
  us_pool_run(pool, answer, &job);
  return job.failed ? us_err_set(err, job.err.status, "%s", job.err.message) : US_OK;
}
