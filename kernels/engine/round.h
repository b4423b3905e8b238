/* round.h: a sequence between two rounds: how it samples, which token ends it, its rows of the next round, its events.
 *
 *     us_engine_begin_round(&state, i, vocab);                    // host: the first round of an admitted sequence
 *     end = us_engine_end_of(sequence, token, position);          // ACCEPT, one slot a lane
 *     us_engine_set_rows(state, i, slot, vocab);
 *     while (us_engine_event_take(mailbox, n, &event)) n++;       // host, while a launch runs
 *
 * What ACCEPT (accept.cuh) does slot by slot and the host does for a new sequence is written once here.
 */
#ifndef US_KERNELS_ENGINE_ROUND_H
#define US_KERNELS_ENGINE_ROUND_H

#include "kernels/engine/engine.h"

/* Whether top-k, top-p or min-p leave out tokens: SELECT then needs whole rows. */
static US_HD bool us_engine_filters(const struct us_sampling *s, uint32_t vocab) {
  bool any = (s->top_k && s->top_k < vocab) || (s->top_p > 0.0f && s->top_p < 1.0f) || s->min_p > 0.0f;
  return s->temperature > 0.0f && any;
}

/* Whether a sequence's draws need the best score of each row and no more. */
static US_HD bool us_engine_is_simple(const struct us_engine_sequence *s, uint32_t vocab) {
  bool law = s->rule != US_VERIFY_MATCH && s->sampling.temperature > 0.0f;
  return !law && !s->logprobs && !us_engine_filters(&s->sampling, vocab);
}

/* Whether all draws of a state are so: us_engine_launch.unfiltered. */
static inline bool us_engine_all_simple(const struct us_engine_state *state, uint32_t vocab) {
  bool simple = !state->adaptive;
  for (uint32_t i = 0; i < US_ENGINE_SEQUENCES; i++)
    simple &= !state->sequence[i].active || us_engine_is_simple(&state->sequence[i], vocab);
  return simple;
}

/* How a sequence ends when `token` is committed at `position`: US_ENGINE_GOES_ON, STOP or LENGTH. */
static US_HD uint32_t us_engine_end_of(const struct us_engine_sequence *s, int32_t token, uint32_t position) {
  for (uint32_t i = 0; i < s->stop_count; i++)
    if (s->stop[i] == token) return US_ENGINE_STOP;
  return position >= s->limit ? US_ENGINE_LENGTH : US_ENGINE_GOES_ON;
}

/* Proposals of the round that starts at s->position. A round of n proposals commits up to n + 1 tokens. How many of a drafter's pay
 * is known when it has made them (us_engine_cut_drafts), of a replay's before. */
static US_HD uint32_t us_engine_drafts(const struct us_engine_state *state,
                                       const struct us_engine_sequence *s) {
  uint32_t left = s->limit - s->position, n = s->most_drafts < left - 1 ? s->most_drafts : left - 1;
  return state->adaptive && s->replay ? us_adaptive_length(&state->cost, s->accept, n) : n;
}

/* The drafter has made sequence i's proposals, and state->confidence says how sure it is: leave out the rows that do not pay. */
static US_HD void us_engine_cut_drafts(struct us_engine_state *state, uint32_t i) {
  struct us_engine_sequence *s = &state->sequence[i];
  const uint32_t first = i * state->block, before = s->drafts;
  if (!s->active || s->replay || !before) return;
  s->drafts = us_adaptive_length(&state->cost, state->confidence + first + 1, before);
  for (uint32_t slot = s->drafts + 1; slot <= before; slot++)
    state->target[first + slot].sequence = US_ENGINE_NONE;
}

/* What a replay proposes in a slot (1, 2, ...) of the round at s->position. */
static US_HD int32_t us_engine_replayed(const struct us_engine_sequence *s, uint32_t slot, uint32_t vocab) {
  uint32_t at = s->position + slot - s->replay_first;
  int32_t token = at < s->replay_count ? s->replay[at] : 0;
  struct us_noise noise = us_noise_round(s->seed, s->position, slot - 1, s->sample, US_STREAM_CORRUPT);
  return us_noise_corrupt(noise, token, s->accept[slot - 1], vocab);
}

static US_HD struct us_engine_row us_engine_no_row(void) {
  struct us_engine_row row = {0, 0, US_ENGINE_NONE, 0};
  return row;
}

/* The three rows of one slot of sequence `i` for the round at its position. Tokens of target rows that the drafter proposes are
 * left to its SELECT. */
static US_HD void us_engine_set_rows(struct us_engine_state *state, uint32_t i, uint32_t slot,
                                     uint32_t vocab) {
  const struct us_engine_sequence *s = &state->sequence[i];
  struct us_engine_row none = us_engine_no_row(),
                       row = {slot ? US_ENGINE_MASK : s->anchor, s->position + slot, i, slot};
  struct us_engine_row context = {0, s->position - s->committed + slot, i, slot};
  uint32_t at = i * state->block + slot;
  bool there = s->active && slot <= s->drafts;
  state->context[at] = s->active && slot < s->committed ? context : none;
  state->draft[at] = there && s->drafts ? row : none;
  if (there && slot && s->replay) row.token = us_engine_replayed(s, slot, vocab);
  state->target[at] = there ? row : none;
}

/* The first round of a sequence whose other fields are set: its prompt is in the caches, so nothing is context yet. `replay` is
 * readable by the caller. */
static inline void us_engine_begin_round(struct us_engine_state *state, uint32_t i, uint32_t vocab) {
  struct us_engine_sequence *s = &state->sequence[i];
  s->committed = 0;
  s->drafts = us_engine_drafts(state, s);
  for (uint32_t slot = 0; slot < state->block; slot++) us_engine_set_rows(state, i, slot, vocab);
}

/* ---- events ------------------------------------------------------------------------------------------------------- */

/* Words before the tokens: id, round, facts, time. */
#define US_ENGINE_EVENT_HEAD 5

#define US_ENGINE_EVENT_LOGPROBS 0x8000u /* of the facts: as many log-probabilities follow the tokens */

static US_HD uint32_t us_engine_event_facts(uint32_t count, uint32_t finish, uint32_t accepted,
                                            uint32_t drafts) {
  return count | finish << 8 | accepted << 16 | drafts << 24;
}

/* Host: copy event `number` from the ring; false if it has not arrived whole. */
static inline bool us_engine_event_take(const struct us_engine_mailbox *mailbox, uint32_t number,
                                        struct us_engine_event *ret_event) {
  const volatile uint64_t *word = mailbox->event[number % US_ENGINE_EVENTS].word;
  uint32_t value[US_ENGINE_EVENT_WORDS], words = US_ENGINE_EVENT_HEAD;
  for (uint32_t i = 0; i < words; i++) {
    uint64_t w = word[i];
    if ((uint32_t)(w >> 32) != number + 1) return false;
    value[i] = (uint32_t)w;
    if (i == 2) words += (value[i] & US_ENGINE_EVENT_LOGPROBS ? 2 : 1) * (value[i] & 255);
  }
  struct us_engine_event *e = ret_event;
  e->id = value[0], e->round = value[1];
  e->count = value[2] & 255, e->finish = value[2] >> 8 & 127;
  e->has_logprobs = value[2] & US_ENGINE_EVENT_LOGPROBS;
  e->accepted = value[2] >> 16 & 255, e->drafts = value[2] >> 24;
  e->time = value[3] | (uint64_t)value[4] << 32;
  for (uint32_t i = 0; i < e->count; i++) {
    e->token[i] = (int32_t)value[US_ENGINE_EVENT_HEAD + i];
    if (e->has_logprobs) e->logprob[i] = us_float_from_bits(value[US_ENGINE_EVENT_HEAD + e->count + i]);
  }
  return true;
}

#endif
