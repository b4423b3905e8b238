/* generate.c: the decode loop.
 *
 *   Checks of arguments | Memory | Prefill | Sequences: start and end | A round | Resident rounds | The loop
 */
#include "decode/generate.h"

#include "decode/round.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A prompt after prefill, shared by the samples that have not started yet. */
struct prompt {
  struct us_kv *kv, *draft_kv;
  float *logits;  /* (N) of the last prompt row: what every sample draws its first token from */
  uint32_t limit; /* tokens a sample may generate */
};

struct decoder {
  struct us_executor *ex;
  const struct us_request *requests;
  size_t n;
  const struct us_generate_options *options;
  struct us_result *results;
  struct us_generate_stats stats;
  struct us_err *err;

  struct us_round_rules rules;
  struct us_verify_cost cost;
  uint32_t block, batch;
  bool drafting; /* the drafter runs */
  bool resident; /* the executor runs whole rounds */
  size_t N, taps_width;

  struct us_sequence sequences[US_MAX_BATCH];
  struct us_round rounds[US_MAX_BATCH];
  uint32_t active;
  struct prompt prompt; /* of next_request, if its samples have begun to start */
  size_t next_request;  /* what starts next */
  uint32_t next_sample;
  uint32_t *samples_left; /* (n) of each request */

  struct us_row *rows; /* (max rows) */
  float *logits;       /* (max rows, N) */
  float *draft_logits; /* (batch, block - 1, N) */
  float *taps;         /* (max rows, taps_width) */
  uint32_t *routed;    /* (L, batch * block, K) */
  uint8_t *seen;       /* (E) */
  uint8_t want[US_PREFILL_CHUNK];
  struct us_round_scratch scratch;
  double started;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

const char *us_finish_name(enum us_finish finish) {
  static const char *const names[] = {"none", "stop", "string", "length", "loop", "cancelled"};
  return names[finish];
}

double us_decode_stats_length(const struct us_decode_stats *stats) {
  return stats->rounds ? (double)stats->committed / (double)stats->rounds : 0.0;
}

void us_result_release(struct us_result *result) {
  for (uint32_t i = 0; result->outputs && i < result->samples; i++) {
    us_ids_release(&result->outputs[i].ids);
    us_buffer_release(&result->outputs[i].text);
    free(result->outputs[i].logprobs);
  }
  free(result->outputs);
  memset(result, 0, sizeof *result);
}

/* Checks of arguments */

static uint32_t samples_of(const struct us_request *request) {
  return request->samples ? request->samples : 1;
}

static enum us_status check_ids(const int32_t *ids, size_t n, size_t N, const char *what,
                                struct us_err *err) {
  for (size_t i = 0; i < n; i++)
    if (ids[i] < 0 || (size_t)ids[i] >= N)
      return us_err_set(err, US_ERR_USAGE, "%s token %zu: id %d is outside the vocabulary of %zu", what, i,
                        (int)ids[i], N);
  return US_OK;
}

static enum us_status check_sampling(const struct us_sampling *s, struct us_err *err) {
  if (!(s->temperature >= 0.0f && s->temperature <= 1e6f))
    return us_err_set(err, US_ERR_USAGE, "temperature %g is not in [0, 1e6]", (double)s->temperature);
  if (s->temperature > 0.0f && s->temperature < 1e-3f)
    return us_err_set(err, US_ERR_USAGE, "temperature %g is below 0.001; 0 is greedy",
                      (double)s->temperature);
  if (!(s->top_p >= 0.0f && s->top_p <= 1.0f))
    return us_err_set(err, US_ERR_USAGE, "top-p %g is not in [0, 1]", (double)s->top_p);
  if (!(s->min_p >= 0.0f && s->min_p <= 1.0f))
    return us_err_set(err, US_ERR_USAGE, "min-p %g is not in [0, 1]", (double)s->min_p);
  return US_OK;
}

static enum us_status check_request(const struct decoder *d, const struct us_request *r, struct us_err *err) {
  uint32_t positions = d->ex->model->shape.max_positions;
  if (!r->prompt_count) return us_err_set(err, US_ERR_USAGE, "the prompt has no tokens");
  if (r->prompt_count > INT32_MAX || (positions && r->prompt_count >= positions))
    return us_err_set(err, US_ERR_USAGE, "a prompt of %zu tokens does not fit the model's %u positions",
                      r->prompt_count, (unsigned)positions);
  if (!r->max_tokens || r->max_tokens > INT32_MAX)
    return us_err_set(err, US_ERR_USAGE, "max tokens %u is not in [1, %d]", (unsigned)r->max_tokens,
                      INT32_MAX);
  if (samples_of(r) > US_MAX_SAMPLES)
    return us_err_set(err, US_ERR_USAGE, "%u samples are more than %d", (unsigned)r->samples, US_MAX_SAMPLES);
  if (r->stop_string_count && !d->options->tokenizer)
    return us_err_set(err, US_ERR_USAGE, "stop strings need a tokenizer");
  for (size_t i = 0; i < r->stop_string_count; i++)
    if (!r->stop_strings[i][0]) return us_err_set(err, US_ERR_USAGE, "a stop string is empty");
  enum us_status status = check_sampling(&r->sampling, err);
  if (status == US_OK) status = check_ids(r->prompt, r->prompt_count, d->N, "prompt", err);
  for (uint32_t i = 0; status == US_OK && r->replay && i < samples_of(r); i++)
    status = check_ids(r->replay[i].ids, r->replay[i].count, d->N, "replayed", err);
  return status;
}

static enum us_status check_options(struct decoder *d, struct us_err *err) {
  const struct us_generate_options *o = d->options;
  const struct us_draft *draft = d->ex->draft;
  uint32_t most = draft ? draft->shape.block : US_MAX_BLOCK;
  if (o->block > most)
    return us_err_set(err, US_ERR_USAGE, "block %u is more than %s %u", (unsigned)o->block,
                      draft ? "the drafter's" : "the largest,", (unsigned)most);
  if (o->batch > US_MAX_BATCH)
    return us_err_set(err, US_ERR_USAGE, "batch %u is more than %d", (unsigned)o->batch, US_MAX_BATCH);
  bool replay = false;
  for (size_t i = 0; i < d->n; i++) replay |= d->requests[i].replay != NULL;
  if (!draft && !replay && o->block > 1)
    return us_err_set(err, US_ERR_USAGE, "block %u needs a drafter", (unsigned)o->block);
  for (size_t i = 0; i < o->accept_count; i++)
    if (!(o->accept[i] >= 0.0f && o->accept[i] <= 1.0f))
      return us_err_set(err, US_ERR_USAGE, "acceptance rate %g is not in [0, 1]", (double)o->accept[i]);
  d->batch = o->batch ? o->batch : 1;
  d->block = o->block ? o->block : draft || replay ? most : 1;
  d->drafting = draft && d->block > 1;
  return US_OK;
}

/* Memory */

static enum us_status take(struct decoder *d, void *ret_pointer, size_t count, size_t size,
                           const char *what) {
  void *memory = NULL;
  if (count && size > SIZE_MAX / count) return us_err_memory(d->err, what, SIZE_MAX);
  if (count && !(memory = malloc(count * size))) return us_err_memory(d->err, what, count * size);
  memcpy(ret_pointer, &memory, sizeof memory);
  return US_OK;
}

static enum us_status take_buffers(struct decoder *d) {
  const struct us_shape *shape = &d->ex->model->shape;
  size_t longest = 0, drafts = d->block - 1, rows = (size_t)d->batch * d->block;
  bool laws = false;
  for (size_t i = 0; i < d->n; i++) {
    if (d->requests[i].prompt_count > longest) longest = d->requests[i].prompt_count;
    laws |= drafts && us_round_rule(&d->rules, &d->requests[i]) != US_VERIFY_MATCH;
  }
  size_t chunk = longest < US_PREFILL_CHUNK ? longest : US_PREFILL_CHUNK, most = chunk > rows ? chunk : rows;
  enum us_status status = take(d, &d->rows, most, sizeof *d->rows, "rows");
  /* Of a prefill chunk only the last row is written, so only its pages of this become resident. */
  if (status == US_OK) status = take(d, &d->logits, most, d->N * sizeof(float), "logits");
  if (status == US_OK) status = take(d, &d->prompt.logits, d->N, sizeof(float), "logits");
  if (status == US_OK && d->drafting)
    status = take(d, &d->draft_logits, d->batch * drafts, d->N * sizeof(float), "draft logits");
  if (status == US_OK && d->drafting) status = take(d, &d->taps, most, d->taps_width * sizeof(float), "taps");
  if (status == US_OK && shape->experts && shape->top_k) {
    status = take(d, &d->routed, shape->layers * rows, shape->top_k * sizeof(uint32_t), "routing");
    if (status == US_OK) status = take(d, &d->seen, shape->experts, 1, "routing");
  }
  if (status == US_OK && laws)
    status = take(d, &d->scratch.p, d->block, d->N * sizeof(double), "probabilities");
  if (status == US_OK && laws)
    status = take(d, &d->scratch.q, drafts, d->N * sizeof(double), "probabilities");
  if (status == US_OK && laws) status = take(d, &d->scratch.weights, d->N, sizeof(double), "probabilities");
  return status;
}

static void drop_caches(struct us_kv **kv, struct us_kv **draft_kv) {
  us_kv_free(*kv);
  us_kv_free(*draft_kv);
  *kv = *draft_kv = NULL;
}

static void release(struct decoder *d) {
  for (uint32_t i = 0; i < d->active; i++) drop_caches(&d->sequences[i].kv, &d->sequences[i].draft_kv);
  drop_caches(&d->prompt.kv, &d->prompt.draft_kv);
  void *owned[] = {d->rows, d->logits,    d->prompt.logits, d->draft_logits,    d->taps,        d->routed,
                   d->seen, d->scratch.p, d->scratch.q,     d->scratch.weights, d->samples_left};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

/* Prefill */

static enum us_status create_caches(struct decoder *d, const struct us_request *r) {
  const struct us_shape *shape = &d->ex->model->shape;
  enum us_kv_type type = d->ex->rounding == US_ROUND_BF16 ? US_KV_BF16 : US_KV_F32;
  uint32_t room = shape->max_positions ? shape->max_positions - (uint32_t)r->prompt_count : r->max_tokens;
  d->prompt.limit = r->max_tokens < room ? r->max_tokens : room;
  uint32_t positions = (uint32_t)r->prompt_count + d->prompt.limit + d->block;
  struct us_kv_spec spec = us_kv_spec_of(shape);
  enum us_status status = us_kv_create_in(d->ex->kv_memory, &spec, positions, type, &d->prompt.kv, d->err);
  if (status != US_OK || !d->drafting) return status;
  spec = us_kv_spec_of_draft(&d->ex->draft->shape);
  return us_kv_create_in(d->ex->draft_kv_memory, &spec, positions, type, &d->prompt.draft_kv, d->err);
}

/* Taps (R, taps_width) of committed tokens at [position, position + R) become context of the drafter. */
static enum us_status append_context(struct decoder *d, struct us_kv *draft_kv, uint32_t position, size_t R,
                                     const float *taps) {
  enum us_status status = us_kv_reserve(draft_kv, position, (uint32_t)R, d->err);
  if (status != US_OK) return status;
  struct us_draft_context context = {.kv = draft_kv, .position = position, .R = R, .taps = taps};
  return d->ex->ops->draft_context(d->ex, &context, d->err);
}

static enum us_status prefill_chunk(struct decoder *d, const struct us_request *r, size_t begin, size_t end) {
  size_t R = end - begin;
  bool last = end == r->prompt_count, with_pass = d->drafting && d->ex->makes_context;
  enum us_status status = us_kv_reserve(d->prompt.kv, (uint32_t)begin, (uint32_t)R, d->err);
  if (status != US_OK) return status;
  for (size_t i = 0; i < R; i++) {
    d->rows[i] =
        (struct us_row){.token = r->prompt[begin + i], .position = (uint32_t)(begin + i), .kv = d->prompt.kv};
    d->want[i] = last && i + 1 == R;
  }
  struct us_pass pass = {.rows = d->rows,
                         .R = R,
                         .logits = last ? d->logits : NULL,
                         .want_logits = d->want,
                         .taps = d->drafting && !with_pass ? d->taps : NULL,
                         .prefill = true,
                         .draft_kv = with_pass ? d->prompt.draft_kv : NULL};
  status = d->ex->ops->forward(d->ex, &pass, d->err);
  if (status == US_OK && pass.taps)
    status = append_context(d, d->prompt.draft_kv, (uint32_t)begin, R, d->taps);
  if (status == US_OK && last) memcpy(d->prompt.logits, d->logits + (R - 1) * d->N, d->N * sizeof(float));
  return status;
}

static enum us_status check_interrupt(const struct decoder *d) {
  if (d->options->interrupted && d->options->interrupted())
    return us_err_set(d->err, US_INTERRUPTED, "interrupted");
  return US_OK;
}

static enum us_status prefill(struct decoder *d, const struct us_request *r) {
  double begun = now();
  enum us_status status = create_caches(d, r);
  for (size_t begin = 0; status == US_OK && begin < r->prompt_count;) {
    size_t end = (begin / US_PREFILL_CHUNK + 1) * US_PREFILL_CHUNK;
    if (end > r->prompt_count) end = r->prompt_count;
    status = check_interrupt(d);
    if (status == US_OK) status = prefill_chunk(d, r, begin, end);
    begin = end;
  }
  d->stats.prompt_tokens += r->prompt_count;
  d->stats.prefill_seconds += now() - begun;
  return status;
}

/* Sequences: start and end */

/* The last sample of a prompt takes its caches, the others fork them. */
static enum us_status take_caches(struct decoder *d, struct us_sequence *s, bool last) {
  struct prompt *p = &d->prompt;
  if (last) {
    s->kv = p->kv, s->draft_kv = p->draft_kv;
    p->kv = p->draft_kv = NULL;
    return US_OK;
  }
  enum us_status status = us_kv_fork(p->kv, &s->kv, d->err);
  if (status == US_OK && p->draft_kv) status = us_kv_fork(p->draft_kv, &s->draft_kv, d->err);
  return status;
}

static enum us_status commit(struct decoder *d, struct us_sequence *s, int32_t token, float logprob) {
  d->stats.generated_tokens++;
  return us_sequence_commit(s, d->options->tokenizer, token, logprob, d->err);
}

/* 0 where nobody asked for it. */
static float logprob_of(const struct decoder *d, const struct us_sequence *s, int32_t token,
                        const float *logits) {
  return s->request->logprobs ? us_sample_logprob(logits, d->N, token) : 0.0f;
}

static void choose_best(struct us_result *result) {
  for (uint32_t i = 1; i < result->samples; i++)
    if (result->outputs[i].mean_logprob > result->outputs[result->best].mean_logprob) result->best = i;
}

static enum us_status end_sequence(struct decoder *d, uint32_t slot) {
  struct us_sequence *s = &d->sequences[slot];
  s->output->stats.seconds = now() - s->first_token;
  drop_caches(&s->kv, &s->draft_kv);
  struct us_result *result = &d->results[s->request_index];
  size_t request = s->request_index;
  d->sequences[slot] = d->sequences[--d->active];
  if (--d->samples_left[request]) return US_OK;
  if (d->requests[request].logprobs) choose_best(result);
  if (!d->options->on_result) return US_OK;
  return d->options->on_result(d->options->arg, request, result, d->err);
}

/* Start the next sample: prefill if it is its request's first, then draw and commit the token after the prompt. */
static enum us_status start_sequence(struct decoder *d) {
  const struct us_request *r = &d->requests[d->next_request];
  if (d->next_sample == 0) {
    enum us_status status = prefill(d, r);
    if (status != US_OK) return status;
  }
  struct us_sequence *s = &d->sequences[d->active++];
  *s = (struct us_sequence){.request = r,
                            .output = &d->results[d->next_request].outputs[d->next_sample],
                            .request_index = d->next_request,
                            .sample = d->next_sample,
                            .limit = d->prompt.limit,
                            .position = (uint32_t)r->prompt_count};
  if (++d->next_sample == samples_of(r)) d->next_request++, d->next_sample = 0;
  enum us_status status = take_caches(d, s, d->next_sample == 0);
  if (status == US_OK)
    status = us_round_draw(r, s->sample, s->position, d->prompt.logits, d->N, &s->anchor, d->err);
  if (status == US_OK) status = commit(d, s, s->anchor, logprob_of(d, s, s->anchor, d->prompt.logits));
  if (status != US_OK) return status;
  s->first_token = now();
  s->output->stats.first_token_seconds = s->first_token - d->started;
  us_sequence_send(s, d->options);
  return s->output->finish != US_FINISH_NONE ? end_sequence(d, d->active - 1) : US_OK;
}

/* A round */

static enum us_status propose(struct decoder *d, uint32_t slot) {
  struct us_sequence *s = &d->sequences[slot];
  struct us_round *round = &d->rounds[slot];
  uint32_t left =
      s->limit - (uint32_t)s->output->ids.count; /* a round of n drafts commits up to n + 1 tokens */
  round->drafts = d->block - 1 < left - 1 ? d->block - 1 : left - 1;
  if (!d->drafting && !s->request->replay) round->drafts = 0;
  float *logits = NULL;
  if (d->drafting && round->drafts) {
    logits = d->draft_logits + (size_t)slot * (d->block - 1) * d->N;
    struct us_draft_draw draw = {&s->request->sampling, s->request->seed, s->sample};
    struct us_draft_pass pass = {.kv = s->draft_kv,
                                 .anchor = s->anchor,
                                 .position = s->position,
                                 .block = round->drafts + 1,
                                 .logits = logits,
                                 .opt_draw = us_round_draws(&d->rules, s->request) ? &draw : NULL};
    enum us_status status = us_kv_reserve(s->draft_kv, s->position, round->drafts + 1, d->err);
    if (status == US_OK) status = d->ex->ops->draft(d->ex, &pass, d->err);
    if (status != US_OK) return status;
  }
  if (round->drafts) us_round_propose(&d->rules, s, logits, round);
  return US_OK;
}

static void count_experts(struct decoder *d, size_t R) {
  const struct us_shape *shape = &d->ex->model->shape;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const uint32_t *chosen = d->routed + l * R * shape->top_k;
    if (!shape->moe_layer[l]) continue;
    memset(d->seen, 0, shape->experts);
    for (size_t i = 0; i < R * shape->top_k; i++)
      if (chosen[i] < shape->experts && !d->seen[chosen[i]]++) d->stats.distinct_experts++;
    d->stats.expert_layers++;
  }
}

/* One target pass over all sequences' anchors and proposals. */
static enum us_status verify_pass(struct decoder *d) {
  size_t R = 0;
  for (uint32_t i = 0; i < d->active; i++) {
    const struct us_sequence *s = &d->sequences[i];
    const struct us_round *round = &d->rounds[i];
    enum us_status status = us_kv_reserve(s->kv, s->position, round->drafts + 1, d->err);
    if (status != US_OK) return status;
    d->rows[R++] = (struct us_row){.token = s->anchor, .position = s->position, .kv = s->kv};
    for (uint32_t j = 0; j < round->drafts; j++)
      d->rows[R++] =
          (struct us_row){.token = round->proposals[j], .position = s->position + 1 + j, .kv = s->kv};
  }
  struct us_pass pass = {.rows = d->rows,
                         .R = R,
                         .logits = d->logits,
                         .taps = d->drafting ? d->taps : NULL,
                         .routed = d->routed};
  enum us_status status = d->ex->ops->forward(d->ex, &pass, d->err);
  if (status != US_OK) return status;
  if (d->routed) count_experts(d, R);
  d->stats.passes++;
  d->stats.rows += R;
  return US_OK;
}

static void count_round(struct us_decode_stats *stats, const struct us_round *round, uint32_t committed) {
  stats->rounds++;
  stats->committed += committed;
  stats->histogram[round->accepted]++;
  for (uint32_t i = 0; i < round->drafts; i++) stats->offered[i]++;
  for (uint32_t i = 0; i < round->accepted; i++) stats->accepted[i]++;
}

/* Commit tokens (count) of a round until the sequence ends. opt_logprobs (count). */
static enum us_status commit_round(struct decoder *d, struct us_sequence *s, const struct us_round *round,
                                   const int32_t *tokens, uint32_t count, const float *opt_logprobs) {
  enum us_status status = US_OK;
  uint32_t committed = 0;
  while (status == US_OK && committed < count && s->output->finish == US_FINISH_NONE) {
    status = commit(d, s, tokens[committed], opt_logprobs ? opt_logprobs[committed] : 0.0f);
    committed++;
  }
  if (status != US_OK) return status;
  count_round(&s->output->stats, round, committed);
  count_round(&d->stats.decode, round, committed);
  us_sequence_send(s, d->options);
  return US_OK;
}

/* Decide on a sequence's rows (drafts + 1), commit, and hand the committed rows' taps to the drafter. */
static enum us_status finish_round(struct decoder *d, uint32_t slot, size_t first_row) {
  struct us_sequence *s = &d->sequences[slot];
  struct us_round *round = &d->rounds[slot];
  const float *logits = d->logits + first_row * d->N;
  float logprobs[US_MAX_BLOCK] = {0};
  enum us_status status = us_round_verify(&d->rules, s, logits, &d->scratch, round, d->err);
  for (uint32_t i = 0; status == US_OK && i <= round->accepted; i++)
    logprobs[i] = logprob_of(d, s, round->committed[i], logits + i * d->N);
  if (status == US_OK) status = commit_round(d, s, round, round->committed, round->accepted + 1, logprobs);
  if (status != US_OK || s->output->finish != US_FINISH_NONE) return status;
  if (d->drafting) {
    status =
        append_context(d, s->draft_kv, s->position, round->accepted + 1, d->taps + first_row * d->taps_width);
    if (status != US_OK) return status;
  }
  s->position += round->accepted + 1;
  s->anchor = round->committed[round->accepted];
  return US_OK;
}

static enum us_status end_finished(struct decoder *d) {
  enum us_status status = US_OK;
  for (uint32_t i = d->active; status == US_OK && i-- > 0;)
    if (d->sequences[i].output->finish != US_FINISH_NONE) status = end_sequence(d, i);
  return status;
}

static enum us_status step(struct decoder *d) {
  double begun = now();
  enum us_status status = check_interrupt(d);
  for (uint32_t i = 0; status == US_OK && i < d->active; i++) status = propose(d, i);
  double drafted = now();
  if (status == US_OK) status = verify_pass(d);
  d->stats.draft_seconds += drafted - begun;
  d->stats.verify_seconds += now() - drafted;
  size_t row = 0;
  for (uint32_t i = 0; status == US_OK && i < d->active; i++) {
    size_t rows = d->rounds[i].drafts + 1;
    status = finish_round(d, i, row);
    row += rows;
  }
  if (status == US_OK) status = end_finished(d);
  d->stats.decode.seconds += now() - begun;
  return status;
}

/* Resident rounds */

static struct us_rounds_sequence resident_sequence(const struct decoder *d, const struct us_sequence *s) {
  const struct us_request *r = s->request;
  const struct us_replay *replay = r->replay ? &r->replay[s->sample] : NULL;
  struct us_rounds_sequence sequence = {.kv = s->kv,
                                        .draft_kv = s->draft_kv,
                                        .anchor = s->anchor,
                                        .position = s->position,
                                        .limit = s->position + s->limit - (uint32_t)s->output->ids.count,
                                        .drafts = d->drafting || replay ? d->block - 1 : 0,
                                        .sampling = r->sampling,
                                        .seed = r->seed,
                                        .sample = s->sample,
                                        .stop_ids = r->stop_ids,
                                        .stop_id_count = r->stop_id_count,
                                        .accept = d->options->accept,
                                        .accept_count = d->options->accept_count,
                                        .rule = us_round_rule(&d->rules, r),
                                        .logprobs = r->logprobs};
  if (!replay) return sequence;
  sequence.replay = replay->ids, sequence.replay_count = replay->count;
  sequence.replay_first = (uint32_t)r->prompt_count;
  return sequence;
}

struct resident {
  struct decoder *d;
  enum us_status status; /* of what was done with the reports */
  uint64_t round;        /* of the last report, UINT64_MAX before the first */
};

static bool take_report(void *arg, const struct us_rounds_report *r) {
  struct resident *run = arg;
  struct decoder *d = run->d;
  struct us_sequence *s = &d->sequences[r->sequence];
  struct us_round round = {.drafts = r->drafts, .accepted = r->accepted};
  if (run->status != US_OK || s->output->finish != US_FINISH_NONE) return false;
  d->stats.passes += r->round != run->round;
  d->stats.rows += r->drafts + 1;
  run->round = r->round;
  if (r->broken)
    run->status = us_round_broken(s->position + 1 + r->count, d->err);
  else
    run->status = commit_round(d, s, &round, r->tokens, r->count, r->logprobs);
  if (run->status != US_OK || s->output->finish != US_FINISH_NONE) return false;
  s->position += r->count;
  s->anchor = r->tokens[r->count - 1];
  return true;
}

/* Rounds until a sequence has ended. */
static enum us_status step_resident(struct decoder *d) {
  double begun = now();
  struct us_rounds_sequence sequences[US_MAX_BATCH];
  struct resident run = {.d = d, .round = UINT64_MAX};
  struct us_rounds rounds = {.sequences = sequences,
                             .n = d->active,
                             .batch = d->batch,
                             .block = d->block,
                             .drafting = d->drafting,
                             .adaptive = d->rules.adaptive,
                             .on_round = take_report,
                             .interrupted = d->options->interrupted,
                             .arg = &run};
  for (uint32_t i = 0; i < d->active; i++) sequences[i] = resident_sequence(d, &d->sequences[i]);
  enum us_status status = d->ex->ops->rounds(d->ex, &rounds, d->err);
  if (status == US_OK) status = run.status;
  d->stats.expert_layers += rounds.expert_layers;
  d->stats.distinct_experts += rounds.experts;
  if (status == US_OK) status = end_finished(d);
  d->stats.verify_seconds += now() - begun;
  d->stats.decode.seconds += now() - begun;
  return status;
}

/* The loop */

static enum us_status prepare(struct decoder *d) {
  d->N = d->ex->model->shape.vocab;
  enum us_status status = check_options(d, d->err);
  for (size_t i = 0; status == US_OK && i < d->n; i++) {
    status = check_request(d, &d->requests[i], d->err);
    if (status != US_OK && d->n > 1) return us_err_prefix(d->err, "request %zu", i);
  }
  if (status != US_OK) return status;
  if (d->drafting) d->taps_width = (size_t)d->ex->draft->shape.taps * d->ex->model->shape.hidden;
  if (d->options->adaptive) d->cost = us_verify_cost_of(d->ex->model, d->drafting ? d->ex->draft : NULL);
  d->rules = (struct us_round_rules){.rule = d->options->rule,
                                     .N = d->N,
                                     .adaptive = d->options->adaptive ? &d->cost : NULL,
                                     .accept = d->options->accept,
                                     .accept_count = d->options->accept_count};
  d->resident = d->ex->ops->rounds != NULL;
  status = take(d, &d->samples_left, d->n, sizeof *d->samples_left, "requests");
  if (status != US_OK) return status;
  for (size_t i = 0; i < d->n; i++) {
    struct us_result *result = &d->results[i];
    result->outputs = calloc(samples_of(&d->requests[i]), sizeof *result->outputs);
    if (!result->outputs)
      return us_err_memory(d->err, "outputs", samples_of(&d->requests[i]) * sizeof *result->outputs);
    result->samples = d->samples_left[i] = samples_of(&d->requests[i]);
  }
  return take_buffers(d);
}

enum us_status us_generate(struct us_executor *ex, const struct us_request *requests, size_t n,
                           const struct us_generate_options *options, struct us_result *ret_results,
                           struct us_generate_stats *opt_stats, struct us_err *err) {
  memset(ret_results, 0, n * sizeof *ret_results);
  struct decoder *d = calloc(1, sizeof *d);
  if (!d) return us_err_memory(err, "decoder", sizeof *d);
  d->ex = ex, d->requests = requests, d->n = n, d->options = options, d->results = ret_results, d->err = err;
  d->started = now();
  enum us_status status = prepare(d);
  while (status == US_OK && (d->active || d->next_request < n)) {
    while (status == US_OK && d->active < d->batch && d->next_request < n) status = start_sequence(d);
    if (status == US_OK && d->active) status = d->resident ? step_resident(d) : step(d);
  }
  d->stats.seconds = now() - d->started;
  d->stats.decode.first_token_seconds =
      n && ret_results[0].outputs ? ret_results[0].outputs[0].stats.first_token_seconds : 0;
  if (opt_stats) *opt_stats = d->stats;
  for (size_t i = 0; i < n; i++) {
    if (status != US_OK) us_result_release(&ret_results[i]);
  }
  release(d);
  free(d);
  return status;
}
