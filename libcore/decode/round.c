/* round.c: proposals and verification of one round. */
#include "decode/round.h"

enum us_verify_rule us_round_rule(const struct us_round_rules *rules, const struct us_request *request) {
  return request->sampling.temperature > 0.0f ? rules->rule : US_VERIFY_MATCH;
}

bool us_round_draws(const struct us_round_rules *rules, const struct us_request *request) {
  return !request->replay && us_round_rule(rules, request) != US_VERIFY_MATCH;
}

static float accept_rate(const struct us_round_rules *rules, uint32_t slot) {
  if (!rules->accept_count) return 1.0f;
  return rules->accept[slot < rules->accept_count ? slot : rules->accept_count - 1];
}

/* The recorded token, or at 1 - rate another one. Past the record's end any token serves: 0. */
static int32_t replayed_token(const struct us_round_rules *rules, const struct us_sequence *s,
                              uint32_t slot) {
  const struct us_replay *replay = &s->request->replay[s->sample];
  size_t at = s->output->ids.count + slot;
  int32_t token = at < replay->count ? replay->ids[at] : 0;
  struct us_noise noise = us_noise_round(s->request->seed, s->position, slot, s->sample, US_STREAM_CORRUPT);
  return us_noise_corrupt(noise, token, accept_rate(rules, slot), (uint32_t)rules->N);
}

/* Largest probability of the drafter at the temperature of the request (1 if greedy): how sure it is of its argmax. */
static float draft_confidence(const float *logits, size_t N, float temperature) {
  double inv = temperature > 0.0f ? 1.0 / (double)temperature : 1.0;
  float max = logits[us_sample_argmax(logits, N)];
  return us_sample_confidence(us_cut_mass(logits, N, max, inv, us_cut_everything()));
}

void us_round_propose(const struct us_round_rules *rules, const struct us_sequence *s,
                      const float *draft_logits, struct us_round *round) {
  const struct us_request *request = s->request;
  if (rules->adaptive) {
    float confidence[US_MAX_BLOCK];
    for (uint32_t i = 0; i < round->drafts; i++)
      confidence[i] = request->replay ? accept_rate(rules, i)
                                      : draft_confidence(draft_logits + i * rules->N, rules->N,
                                                         request->sampling.temperature);
    round->drafts = us_adaptive_length(rules->adaptive, confidence, round->drafts);
  }
  round->draft_logits = draft_logits;
  round->sampled = us_round_draws(rules, request);
  for (uint32_t i = 0; i < round->drafts; i++) {
    const float *row = draft_logits ? draft_logits + i * rules->N : NULL;
    if (request->replay)
      round->proposals[i] = replayed_token(rules, s, i);
    else if (round->sampled)
      round->proposals[i] =
          us_sample_token(row, rules->N, &request->sampling,
                          us_noise_round(request->seed, s->position, i, s->sample, US_STREAM_DRAFT));
    else
      round->proposals[i] = us_sample_argmax(row, rules->N);
  }
}

enum us_status us_round_broken(uint32_t position, struct us_err *err) {
  return us_err_set(err, US_ERR_CHECK, "the logits for position %u are not finite", position);
}

static enum us_status check_row(const float *logits, size_t N, uint32_t position, struct us_err *err) {
  float max = logits[us_sample_argmax(logits, N)];
  if (max > -INFINITY && max < INFINITY) return US_OK;
  return us_round_broken(position, err);
}

enum us_status us_round_draw(const struct us_request *request, uint32_t sample, uint32_t position,
                             const float *logits, size_t N, int32_t *ret_token, struct us_err *err) {
  if (check_row(logits, N, position, err) != US_OK) return US_ERR_CHECK;
  *ret_token =
      us_sample_token(logits, N, &request->sampling, us_noise_target(request->seed, position, sample));
  return US_OK;
}

/* Draw the target's token row by row; the first that differs from its proposal, or the one after all of them, ends it. */
static enum us_status verify_match(const struct us_round_rules *rules, const struct us_sequence *s,
                                   const float *logits, struct us_round *round, struct us_err *err) {
  for (uint32_t i = 0;; i++) {
    enum us_status status = us_round_draw(s->request, s->sample, s->position + 1 + i, logits + i * rules->N,
                                          rules->N, &round->committed[i], err);
    if (status != US_OK) return status;
    round->accepted = i;
    if (i == round->drafts || round->committed[i] != round->proposals[i]) return US_OK;
  }
}

enum us_status us_round_verify(const struct us_round_rules *rules, const struct us_sequence *s,
                               const float *logits, const struct us_round_scratch *scratch,
                               struct us_round *round, struct us_err *err) {
  const struct us_request *request = s->request;
  enum us_verify_rule rule = us_round_rule(rules, request);
  size_t N = rules->N;
  if (rule == US_VERIFY_MATCH || round->drafts == 0) return verify_match(rules, s, logits, round, err);
  double thresholds[US_MAX_BLOCK], uniforms[US_MAX_BLOCK];
  for (uint32_t i = 0; i <= round->drafts; i++) {
    enum us_status status = check_row(logits + i * N, N, s->position + 1 + i, err);
    if (status != US_OK) return status;
    us_sample_probs(logits + i * N, N, &request->sampling, scratch->p + i * N);
  }
  for (uint32_t i = 0; i < round->drafts; i++) {
    if (round->sampled)
      us_sample_probs(round->draft_logits + i * N, N, &request->sampling, scratch->q + i * N);
    uniforms[i] =
        us_noise_uniform(us_noise_round(request->seed, s->position, i, s->sample, US_STREAM_ACCEPT));
  }
  struct us_verify v = {.N = N,
                        .drafts = round->drafts,
                        .tokens = round->proposals,
                        .p = scratch->p,
                        .q = round->sampled ? scratch->q : NULL};
  us_verify_thresholds(rule, &v, thresholds);
  uint32_t accepted = us_verify_accepted(rule, thresholds, uniforms, round->drafts);
  us_verify_emission(rule, &v, accepted, scratch->weights);
  for (uint32_t i = 0; i < accepted; i++) round->committed[i] = round->proposals[i];
  round->committed[accepted] =
      us_sample_weights(scratch->weights, N,
                        us_noise_round(request->seed, s->position, accepted, s->sample, US_STREAM_RESIDUAL));
  round->accepted = accepted;
  return US_OK;
}
