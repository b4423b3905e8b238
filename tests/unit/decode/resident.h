/* resident.h: the hash executor (fake.h) with resident rounds: the engine's state, its rows and its decisions
 * (kernels/engine/round.h), worked through on the CPU, so that what the GPU does to a round is compared with generate.c's own.
 *
 *     struct fake fake;
 *     resident_init(&fake, vocab, block);         // fake_init, and ops->rounds
 */
#ifndef US_TESTS_RESIDENT_H
#define US_TESTS_RESIDENT_H

#include "decode/verify.h"
#include "fake.h"
#include "kernels/engine/round.h"

#define RESIDENT_TAPS (FAKE_TAPS * FAKE_HIDDEN)

struct resident_run {
  struct fake *fake;
  struct us_rounds *rounds;
  struct us_engine_state state;
  float *logits;                                  /* (rows, N) of the last target pass */
  float *draft_logits;                            /* (rows, N), a slot's by its row */
  float taps[US_ENGINE_MAX_ROWS * RESIDENT_TAPS]; /* of the last target pass */
  uint32_t cancel;                                /* bits: takes effect a round later, as it may on a GPU */
};

/* Rows of a pass that exist, in the order of the table; returns how many. */
static inline uint32_t resident_rows(const struct us_engine_row *table, uint32_t *rows) {
  uint32_t n = 0;
  for (uint32_t i = 0; i < US_ENGINE_MAX_ROWS; i++)
    if (table[i].sequence != US_ENGINE_NONE) rows[n++] = i;
  return n;
}

/* Taps of the rows that were committed become context; they exist as rows of the last target pass. */
static inline enum us_status resident_context(struct resident_run *run, struct us_err *err) {
  uint32_t rows[US_ENGINE_MAX_ROWS], n = resident_rows(run->state.context, rows);
  for (uint32_t i = 0; run->rounds->drafting && i < n; i++) {
    const struct us_engine_row *row = &run->state.context[rows[i]];
    struct us_draft_context context = {.kv = run->rounds->sequences[row->sequence].draft_kv,
                                       .position = row->position,
                                       .R = 1,
                                       .taps = run->taps + rows[i] * RESIDENT_TAPS};
    enum us_status status = us_kv_reserve(context.kv, row->position, 1, err);
    if (status == US_OK) status = fake_draft_context(&run->fake->ex, &context, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* What SELECT does behind the drafter's pass. */
static inline enum us_status resident_draft(struct resident_run *run, uint32_t i, struct us_err *err) {
  struct us_engine_state *state = &run->state;
  const struct us_engine_row *first = &state->draft[i * state->block];
  uint32_t N = run->fake->model.shape.vocab, count = 0;
  while (count < state->block && first[count].sequence != US_ENGINE_NONE) count++;
  if (!run->rounds->drafting || !count) return US_OK;
  const struct us_engine_sequence *s = &state->sequence[i];
  float *logits = run->draft_logits + (i * state->block + 1) * N;
  struct us_draft_pass pass = {.kv = run->rounds->sequences[i].draft_kv,
                               .anchor = first->token,
                               .position = first->position,
                               .block = count,
                               .logits = logits};
  enum us_status status = us_kv_reserve(pass.kv, pass.position, count, err);
  if (status == US_OK) status = fake_draft(&run->fake->ex, &pass, err);
  bool law = s->rule != US_VERIFY_MATCH && s->sampling.temperature > 0.0f;
  double inv = s->sampling.temperature > 0.0f ? 1.0 / (double)s->sampling.temperature : 1.0;
  for (uint32_t j = 1; status == US_OK && j < count && !s->replay; j++) {
    const float *x = logits + (j - 1) * N;
    int32_t top = us_sample_argmax(x, N);
    struct us_noise noise = us_noise_round(s->seed, s->position, j - 1, s->sample, US_STREAM_DRAFT);
    state->target[i * state->block + j].token = law ? us_sample_token(x, N, &s->sampling, noise) : top;
    state->confidence[i * state->block + j] =
        us_sample_confidence(us_cut_mass(x, N, x[top], inv, us_cut_everything()));
  }
  if (status == US_OK && state->adaptive) us_engine_cut_drafts(state, i);
  return status;
}

static inline void resident_count_experts(struct resident_run *run, const uint32_t *routed, uint32_t R) {
  bool seen[FAKE_EXPERTS] = {false};
  for (uint32_t i = 0; i < R * FAKE_TOP_K; i++) {
    uint32_t e = routed[R * FAKE_TOP_K + i]; /* of layer 1 */
    run->rounds->experts += !seen[e];
    seen[e] = true;
  }
  run->rounds->expert_layers++;
}

static inline enum us_status resident_target(struct resident_run *run, struct us_err *err) {
  struct us_engine_state *state = &run->state;
  uint32_t rows[US_ENGINE_MAX_ROWS], R = resident_rows(state->target, rows), N = run->fake->model.shape.vocab;
  uint32_t routed[2 * US_ENGINE_MAX_ROWS * FAKE_TOP_K];
  float taps[US_ENGINE_MAX_ROWS * RESIDENT_TAPS];
  struct us_row table[US_ENGINE_MAX_ROWS];
  enum us_status status = US_OK;
  for (uint32_t r = 0; status == US_OK && r < R; r++) {
    const struct us_engine_row *row = &state->target[rows[r]];
    struct us_kv *kv = run->rounds->sequences[row->sequence].kv;
    table[r] = (struct us_row){.token = row->token, .position = row->position, .kv = kv};
    status = us_kv_reserve(kv, row->position, 1, err);
  }
  struct us_pass pass = {.rows = table, .R = R, .logits = run->logits, .taps = taps, .routed = routed};
  if (status == US_OK) status = fake_forward(&run->fake->ex, &pass, err);
  for (uint32_t r = 0; status == US_OK && r < R; r++) {
    const struct us_engine_row *row = &state->target[rows[r]];
    const struct us_engine_sequence *s = &state->sequence[row->sequence];
    const float *x = run->logits + r * N;
    struct us_noise noise = us_noise_target(s->seed, row->position + 1, s->sample);
    state->drawn[rows[r]] =
        isfinite(x[us_sample_argmax(x, N)]) ? us_sample_token(x, N, &s->sampling, noise) : -1;
    memcpy(run->taps + rows[r] * RESIDENT_TAPS, taps + r * RESIDENT_TAPS, RESIDENT_TAPS * sizeof *taps);
  }
  if (status == US_OK) resident_count_experts(run, routed, R);
  return status;
}

/* Rules REJECT and BLOCK: `tokens` become the survivors and what is emitted behind them. Returns how many survive. */
static inline uint32_t resident_by_law(const struct resident_run *run, uint32_t i, const float *logits,
                                       const int32_t *proposals, int32_t *tokens) {
  const struct us_engine_state *state = &run->state;
  const struct us_engine_sequence *s = &state->sequence[i];
  size_t N = run->fake->model.shape.vocab, n = s->drafts;
  double *p = calloc((2 * n + 2) * N, sizeof *p), *q = p + (n + 1) * N, *weights = p + (2 * n + 1) * N;
  double h[US_MAX_BLOCK], u[US_MAX_BLOCK];
  for (uint32_t j = 0; j <= n; j++) us_sample_probs(logits + j * N, N, &s->sampling, p + j * N);
  for (uint32_t j = 0; j < n; j++) {
    us_sample_probs(run->draft_logits + (i * state->block + 1 + j) * N, N, &s->sampling, q + j * N);
    u[j] = us_noise_uniform(us_noise_round(s->seed, s->position, j, s->sample, US_STREAM_ACCEPT));
  }
  struct us_verify v = {
      .N = N, .drafts = (uint32_t)n, .tokens = proposals, .p = p, .q = s->replay ? NULL : q};
  us_verify_thresholds((enum us_verify_rule)s->rule, &v, h);
  uint32_t accepted = us_verify_accepted((enum us_verify_rule)s->rule, h, u, s->drafts);
  us_verify_emission((enum us_verify_rule)s->rule, &v, accepted, weights);
  memcpy(tokens, proposals, accepted * sizeof *tokens);
  tokens[accepted] = us_sample_weights(
      weights, N, us_noise_round(s->seed, s->position, accepted, s->sample, US_STREAM_RESIDUAL));
  free(p);
  return accepted;
}

/* What ACCEPT does to one sequence, whose logits are given; returns whether it ended. */
static inline bool resident_accept(struct resident_run *run, uint32_t i, const float *logits,
                                   uint32_t cancel) {
  struct us_engine_state *state = &run->state;
  struct us_engine_sequence *s = &state->sequence[i];
  int32_t *drawn = state->drawn + i * state->block;
  int32_t proposals[US_MAX_BLOCK];
  float logprobs[US_MAX_BLOCK];
  size_t N = run->fake->model.shape.vocab;
  for (uint32_t j = 0; j < s->drafts; j++) proposals[j] = state->target[i * state->block + 1 + j].token;
  struct us_rounds_report report = {
      .sequence = i, .round = state->round, .tokens = drawn, .drafts = s->drafts};
  bool law = s->rule != US_VERIFY_MATCH && s->sampling.temperature > 0.0f && s->drafts;
  report.accepted = us_verify_match(proposals, drawn, s->drafts);
  if (law) report.accepted = resident_by_law(run, i, logits, proposals, drawn);
  report.count = report.accepted;
  report.broken = drawn[report.accepted] < 0;
  for (uint32_t j = 0; s->logprobs && !report.broken && j <= report.accepted; j++)
    logprobs[j] = us_sample_logprob(logits + j * N, N, drawn[j]);
  if (s->logprobs) report.logprobs = logprobs;
  uint32_t end = cancel >> i & 1;
  if (report.broken)
    end = 1;
  else
    report.count++;
  for (uint32_t j = 0; !report.broken && j < report.count; j++)
    if (us_engine_end_of(s, drawn[j], s->position + 1 + j)) end = 1, report.count = j + 1;
  if (!run->rounds->on_round(run->rounds->arg, &report)) run->cancel |= 1u << i;
  s->active = !end;
  if (s->active) {
    s->committed = report.accepted + 1;
    s->position += s->committed;
    s->anchor = drawn[report.accepted];
    s->drafts = us_engine_drafts(state, s);
  }
  for (uint32_t slot = 0; slot < state->block; slot++)
    us_engine_set_rows(state, i, slot, run->fake->model.shape.vocab);
  return end;
}

static inline void resident_admit(struct resident_run *run, uint32_t i) {
  const struct us_rounds_sequence *from = &run->rounds->sequences[i];
  struct us_engine_sequence *s = &run->state.sequence[i];
  *s = (struct us_engine_sequence){.active = 1,
                                   .anchor = from->anchor,
                                   .position = from->position,
                                   .limit = from->limit,
                                   .sample = from->sample,
                                   .seed = from->seed,
                                   .sampling = from->sampling,
                                   .most_drafts = from->drafts,
                                   .rule = from->rule,
                                   .logprobs = from->logprobs,
                                   .replay = from->replay,
                                   .replay_first = from->replay_first,
                                   .replay_count = (uint32_t)from->replay_count};
  for (; s->stop_count < from->stop_id_count && s->stop_count < 16; s->stop_count++)
    s->stop[s->stop_count] = from->stop_ids[s->stop_count];
  for (uint32_t j = 0; j < 16; j++)
    s->accept[j] =
        !from->accept_count ? 1.0f : from->accept[j < from->accept_count ? j : from->accept_count - 1];
  us_engine_begin_round(&run->state, i, run->fake->model.shape.vocab);
}

static inline enum us_status resident_round(struct resident_run *run, bool *ret_ended, struct us_err *err) {
  if (run->rounds->interrupted && run->rounds->interrupted())
    return us_err_set(err, US_INTERRUPTED, "interrupted");
  enum us_status status = resident_context(run, err);
  for (uint32_t i = 0; status == US_OK && i < run->rounds->n; i++) status = resident_draft(run, i, err);
  if (status == US_OK) status = resident_target(run, err);
  uint32_t cancel = run->cancel, N = run->fake->model.shape.vocab;
  const float *logits = run->logits; /* rows that exist lie side by side */
  for (uint32_t i = 0; status == US_OK && i < run->rounds->n; i++) {
    uint32_t rows = run->state.sequence[i].drafts + 1;
    *ret_ended |= resident_accept(run, i, logits, cancel);
    logits += rows * N;
  }
  run->state.round++;
  return status;
}

static inline enum us_status resident_rounds(struct us_executor *ex, struct us_rounds *rounds,
                                             struct us_err *err) {
  struct resident_run *run = calloc(1, sizeof *run);
  run->fake = (struct fake *)(void *)ex;
  run->rounds = rounds;
  run->fake->resident_calls++;
  run->logits = malloc(US_ENGINE_MAX_ROWS * run->fake->model.shape.vocab * sizeof(float));
  run->draft_logits = calloc(US_ENGINE_MAX_ROWS * run->fake->model.shape.vocab, sizeof(float));
  run->state.adaptive = rounds->adaptive != NULL;
  if (rounds->adaptive) run->state.cost = *rounds->adaptive;
  run->state.block = rounds->block;
  for (uint32_t r = 0; r < US_ENGINE_MAX_ROWS; r++)
    run->state.target[r] = run->state.draft[r] = run->state.context[r] = us_engine_no_row();
  for (uint32_t i = 0; i < rounds->n; i++) resident_admit(run, i);
  enum us_status status = US_OK;
  for (bool ended = false; status == US_OK && !ended;) status = resident_round(run, &ended, err);
  if (status == US_OK) status = resident_context(run, err);
  free(run->logits), free(run->draft_logits);
  free(run);
  return status;
}

static inline void resident_init(struct fake *f, uint32_t vocab, uint32_t block) {
  static const struct us_executor_ops ops = {.forward = fake_forward,
                                             .draft_context = fake_draft_context,
                                             .draft = fake_draft,
                                             .free = fake_free,
                                             .rounds = resident_rounds};
  fake_init(f, vocab, block);
  f->ex.ops = &ops;
}

#endif
