/* arrivals.c: serving a recorded load: prompts as they arrive, rounds of whoever is there.
 *
 * Contents: places; prompts; rounds; the load.
 */
#include "device/arrivals.h"

#include "base/philox.h"
#include "decode/generate.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* One of the requests that run together. */
struct place {
  bool taken;
  const struct us_arrival *arrival;
  struct us_kv *kv, *draft_kv;
  int32_t anchor;
  uint32_t position, limit; /* of the anchor; of the last token */
  uint64_t time;            /* of the GPU's clock, when its last round was over; 0: none yet */
};

struct server {
  struct us_executor *ex;
  const struct us_arrivals_options *options;
  struct us_arrivals_result *result;
  const struct us_arrival *arrivals;
  size_t n, next, done; /* arrivals that have been taken; that have ended */
  double begun;
  bool drafting, broken;
  struct place places[US_ENGINE_SEQUENCES];
  struct place *running[US_ENGINE_SEQUENCES]; /* of the rounds that run */
  uint32_t taken;
  struct us_bench_sample *first, *whole, *token; /* (n), (n), grows */
  size_t token_count, token_capacity;
};

static double wall(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double since_begin(const struct server *s) {
  return wall() - s->begun;
}

/* ---- places -------------------------------------------------------------------------------------------------------- */

static bool somebody_waits(const struct server *s) {
  return s->next < s->n && s->taken < s->options->batch && s->arrivals[s->next].seconds <= since_begin(s);
}

static void leave(struct server *s, struct place *p) {
  us_kv_free(p->kv), us_kv_free(p->draft_kv);
  *p = (struct place){0};
  s->taken--;
}

static void finish(struct server *s, struct place *p) {
  s->whole[s->done++] = (struct us_bench_sample){since_begin(s) - p->arrival->seconds, 1};
  s->result->prompt_tokens += p->arrival->prompt_tokens;
  s->result->output_tokens += p->arrival->output_tokens;
  leave(s, p);
}

/* ---- prompts ------------------------------------------------------------------------------------------------------- */

/* Rows [begin, end) of the prompt of arrival `index`; logits of the last row if they are wanted. */
static enum us_status run_chunk(struct server *s, struct place *p, uint32_t begin, uint32_t end,
                                float *opt_logits, struct us_err *err) {
  struct us_row rows[US_PREFILL_CHUNK];
  uint8_t want[US_PREFILL_CHUNK] = {0};
  uint32_t R = end - begin, vocab = s->ex->model->shape.vocab;
  for (uint32_t i = 0; i < R; i++) {
    uint32_t words[4];
    us_philox_quad(us_philox_key(s->options->seed), begin + i, (uint32_t)(p->arrival - s->arrivals), 2,
                   US_STREAM_INIT, words);
    rows[i] = (struct us_row){
        .token = (int32_t)us_uniform_index(words[0], vocab), .position = begin + i, .kv = p->kv};
  }
  want[R - 1] = opt_logits != NULL;
  struct us_pass pass = {.rows = rows,
                         .R = R,
                         .logits = opt_logits,
                         .want_logits = want,
                         .prefill = true,
                         .draft_kv = s->drafting ? p->draft_kv : NULL};
  enum us_status status = us_kv_reserve(p->kv, begin, R, err);
  if (status == US_OK && s->drafting) status = us_kv_reserve(p->draft_kv, begin, R, err);
  return status == US_OK ? s->ex->ops->forward(s->ex, &pass, err) : status;
}

static int32_t largest(const float *logits, uint32_t n) {
  uint32_t best = 0;
  for (uint32_t i = 1; i < n; i++)
    if (logits[i] > logits[best]) best = i;
  return (int32_t)best;
}

/* The next arrival's prompt, up to its first token. */
static enum us_status enter(struct server *s, struct place *p, struct us_err *err) {
  const struct us_arrival *a = &s->arrivals[s->next];
  uint32_t vocab = s->ex->model->shape.vocab, positions = us_arrivals_positions(a, 1);
  struct us_kv_spec spec = us_kv_spec_of(&s->ex->model->shape);
  float *logits = malloc((size_t)US_PREFILL_CHUNK * vocab * sizeof *logits);
  *p = (struct place){.taken = true, .arrival = a, .position = a->prompt_tokens};
  s->taken++, s->next++;
  enum us_status status =
      logits ? us_kv_create_in(s->ex->kv_memory, &spec, positions, US_KV_BF16, &p->kv, err)
             : us_err_memory(err, "logits", (size_t)US_PREFILL_CHUNK * vocab * sizeof *logits);
  if (status == US_OK && s->drafting) {
    spec = us_kv_spec_of_draft(&s->ex->draft->shape);
    status = us_kv_create_in(s->ex->draft_kv_memory, &spec, positions, US_KV_BF16, &p->draft_kv, err);
  }
  for (uint32_t begin = 0, end; status == US_OK && begin < a->prompt_tokens; begin = end) {
    end = (begin / US_PREFILL_CHUNK + 1) * US_PREFILL_CHUNK;
    if (end > a->prompt_tokens) end = a->prompt_tokens;
    status = run_chunk(s, p, begin, end, end == a->prompt_tokens ? logits : NULL, err);
    if (status == US_OK && end == a->prompt_tokens)
      p->anchor = largest(logits + (size_t)(end - begin - 1) * vocab, vocab);
  }
  free(logits);
  if (status != US_OK) return status;
  p->limit = p->position + a->output_tokens - 1; /* the first token of the answer stands at `position` */
  s->first[s->next - 1] = (struct us_bench_sample){since_begin(s) - a->seconds, 1};
  if (s->taken > s->result->most_together) s->result->most_together = s->taken;
  if (a->output_tokens == 1) finish(s, p);
  return US_OK;
}

static enum us_status enter_all(struct server *s, struct us_err *err) {
  enum us_status status = US_OK;
  for (uint32_t i = 0; status == US_OK && i < s->options->batch && somebody_waits(s); i++)
    if (!s->places[i].taken) status = enter(s, &s->places[i], err);
  return status;
}

/* ---- rounds -------------------------------------------------------------------------------------------------------- */

static void count_tokens(struct server *s, struct place *p, const struct us_rounds_report *r) {
  s->result->steps++;
  if (p->time && r->count && s->token_count < s->token_capacity)
    s->token[s->token_count++] =
        (struct us_bench_sample){1e-9 * (double)(r->time - p->time) / r->count, r->count};
  p->time = r->time;
}

/* The rounds end, so that somebody may enter: the request goes on in the next ones. */
static bool hear(void *arg, const struct us_rounds_report *r) {
  struct server *s = arg;
  struct place *p = s->running[r->sequence];
  s->broken |= r->broken;
  count_tokens(s, p, r);
  if (r->count) p->position += r->count, p->anchor = r->tokens[r->count - 1];
  return !somebody_waits(s);
}

static enum us_status run_rounds(struct server *s, struct us_err *err) {
  const struct us_arrivals_options *o = s->options;
  struct us_rounds_sequence sequences[US_ENGINE_SEQUENCES];
  struct us_rounds rounds = {.sequences = sequences,
                             .batch = o->batch,
                             .block = o->block,
                             .drafting = s->drafting,
                             .on_round = hear,
                             .interrupted = o->interrupted,
                             .arg = s};
  for (uint32_t i = 0; i < o->batch; i++) {
    struct place *p = &s->places[i];
    if (!p->taken) continue;
    s->running[rounds.n] = p;
    sequences[rounds.n++] =
        (struct us_rounds_sequence){.kv = p->kv,
                                    .draft_kv = p->draft_kv,
                                    .anchor = p->anchor,
                                    .position = p->position,
                                    .limit = p->limit,
                                    .drafts = s->drafting ? o->block - 1 : 0,
                                    .seed = o->seed + (uint64_t)(p->arrival - s->arrivals)};
  }
  enum us_status status = s->ex->ops->rounds(s->ex, &rounds, err);
  if (status == US_OK && s->broken)
    status = us_err_set(err, US_ERR_CHECK, "the logits of a round are not finite");
  for (uint32_t i = 0; status == US_OK && i < o->batch; i++)
    if (s->places[i].taken && s->places[i].position >= s->places[i].limit) finish(s, &s->places[i]);
  return status;
}

/* ---- the load ------------------------------------------------------------------------------------------------------ */

static void wait_for_next(const struct server *s) {
  double left = s->arrivals[s->next].seconds - since_begin(s);
  struct timespec pause = {.tv_nsec = left > 0.01 ? 10000000 : left > 0 ? (long)(left * 1e9) : 0};
  nanosleep(&pause, NULL);
}

static enum us_status serve(struct server *s, struct us_err *err) {
  enum us_status status = US_OK;
  s->begun = wall();
  while (status == US_OK && s->done < s->n) {
    if (s->options->interrupted && s->options->interrupted())
      return us_err_set(err, US_INTERRUPTED, "interrupted");
    status = enter_all(s, err);
    if (status == US_OK && s->taken)
      status = run_rounds(s, err);
    else if (status == US_OK && s->next < s->n)
      wait_for_next(s);
  }
  return status;
}

static void summarise(struct server *s) {
  struct us_arrivals_result *r = s->result;
  r->requests = s->n;
  r->seconds = since_begin(s);
  r->first_token = us_bench_spread_of(s->first, s->n);
  r->token = us_bench_spread_of(s->token, s->token_count);
  r->request = us_bench_spread_of(s->whole, s->n);
}

static enum us_status check(const struct server *s, struct us_err *err) {
  const struct us_arrivals_options *o = s->options;
  uint32_t most = us_arrivals_positions(s->arrivals, s->n),
           room = s->ex->kv_memory ? s->ex->kv_memory->max_positions : 0;
  if (!s->ex->ops->rounds) return us_err_set(err, US_ERR_USAGE, "%s is not an executor on GPUs", s->ex->name);
  if (room && most > room)
    return us_err_set(err, US_ERR_USAGE, "a request needs %u positions; the caches have %u", most, room);
  if (s->drafting && !s->ex->makes_context)
    return us_err_set(err, US_ERR_USAGE, "%s makes no context of prompts", s->ex->name);
  return us_bench_check(s->ex, o->batch, o->block, false, err);
}

enum us_status us_arrivals_serve(struct us_executor *ex, const struct us_arrival *arrivals, size_t n,
                                 const struct us_arrivals_options *options,
                                 struct us_arrivals_result *ret_result, struct us_err *err) {
  struct server *s = calloc(1, sizeof *s);
  *ret_result = (struct us_arrivals_result){0};
  if (!s) return us_err_memory(err, "the load", sizeof *s);
  *s = (struct server){.ex = ex,
                       .options = options,
                       .result = ret_result,
                       .arrivals = arrivals,
                       .n = n,
                       .drafting = ex->draft && options->block > 1};
  for (size_t i = 0; i < n; i++) s->token_capacity += arrivals[i].output_tokens;
  s->first = calloc(n, sizeof *s->first), s->whole = calloc(n, sizeof *s->whole);
  s->token = calloc(s->token_capacity + 1, sizeof *s->token);
  enum us_status status = check(s, err);
  if (status == US_OK && (!s->first || !s->whole || !s->token))
    status = us_err_memory(err, "the times of a load", s->token_capacity * sizeof *s->token);
  if (status == US_OK) status = serve(s, err);
  if (status == US_OK) summarise(s);
  for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++)
    if (s->places[i].taken) leave(s, &s->places[i]);
  free(s->first), free(s->whole), free(s->token), free(s);
  return status;
}
