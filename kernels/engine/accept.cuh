/* accept.cuh: the end of a round: which proposals survive, what is committed, the rows of the next round.
 *
 * Verification by match (decode/verify.h): a proposal survives while it equals the token that the target drew. By law (REJECT, BLOCK)
 * it survives while a uniform is below what laws.cuh found, and the slot behind it emits from its residual. Block 0 of every rank
 * decides the same from its own copy of the state, a warp a sequence, a lane a slot; rank 0's tells the host. The other blocks need
 * to know whether a further round follows: they add themselves to the operation's count only after block 0 has.
 */
#ifndef US_KERNELS_ENGINE_ACCEPT_CUH
#define US_KERNELS_ENGINE_ACCEPT_CUH

#include "kernels/engine/laws.cuh"

/* What a round did to a sequence; the same in all lanes but `token` and `logprob`. */
struct us_engine_outcome {
  int32_t token; /* committed in the lane's slot, if it is one that is */
  float logprob;
  uint32_t accepted, count, finish;
};

/* ---- by law -------------------------------------------------------------------------------------------------------------- */

/* One warp: how many proposals survive, and the token of each slot up to the one behind them. *ret_broken: the first row that is not
 * finite, or 32. */
static __device__ void us_engine_verify_by_law(const struct us_engine_state *state, uint32_t i,
                                               struct us_engine_outcome *o, uint32_t *ret_broken) {
  const struct us_engine_laws *laws = us_engine_laws();
  const struct us_engine_sequence *s = &state->sequence[i];
  const uint32_t lane = threadIdx.x % 32, all = 0xffffffffu, at = i * state->block + lane;
  const bool proposal = lane < s->drafts, row = lane <= s->drafts;
  const struct us_noise noise = us_noise_round(s->seed, s->position, lane, s->sample, US_STREAM_ACCEPT);
  double h = proposal ? laws->after[at] : 0.0;
  if (s->rule == US_VERIFY_BLOCK && lane + 1 < s->drafts)
    h = us_verify_h(h, (double)laws->emission[at + 1].mass * 0x1p-62);
  uint32_t kept = __ballot_sync(all, proposal && us_noise_uniform(noise) < h);
  uint32_t broken = __ballot_sync(all, row && !us_engine_finite(state->law[at].max));
  *ret_broken = broken ? (uint32_t)__ffs((int)broken) - 1 : 32;
  o->accepted =
      s->rule == US_VERIFY_BLOCK ? 32 - (uint32_t)__clz((int)kept) : (uint32_t)__ffs((int)~kept) - 1;
  o->token = proposal ? __ldcg(&state->target[at + 1].token) : -1;
  if (lane != o->accepted) return;
  const struct us_engine_emission *e = &laws->emission[at];
  o->token = (int32_t)e->id[e->score[0] > -INFINITY ? 0 : 1];
}

/* One warp: log-probabilities of the tokens. */
static __device__ void us_engine_logprobs(const struct us_engine_state *state, uint32_t i, bool by_law,
                                          struct us_engine_outcome *o) {
  const struct us_engine_laws *laws = us_engine_laws();
  const uint32_t lane = threadIdx.x % 32, at = i * state->block + lane;
  if (lane >= o->count) return;
  const struct us_engine_emission *e = &laws->emission[at];
  const float own = us_float_from_bits((uint32_t)laws->mass[at][US_ENGINE_LOGIT_BITS]),
              logit = by_law && lane == o->accepted ? e->logit[e->score[0] > -INFINITY ? 0 : 1] : own;
  o->logprob = us_sample_logprob_of(logit, state->law[at].max, laws->mass[at][US_ENGINE_MASS_ONE]);
}

/* ---- a sequence ---------------------------------------------------------------------------------------------------------- */

/* One warp. The rows that count are the survivors' and the one after them; rows behind it may hold anything. */
template <bool LAWS>
static __device__ struct us_engine_outcome us_engine_verify(const struct us_engine_state *state, uint32_t i) {
  const struct us_engine_sequence *s = &state->sequence[i];
  const uint32_t lane = threadIdx.x % 32, all = 0xffffffffu, first = i * state->block;
  const bool by_law = LAWS && us_engine_by_law(s) && s->drafts > 0;
  struct us_engine_outcome o;
  uint32_t first_broken = 32;
  o.logprob = 0.0f;
  o.token = lane <= s->drafts ? __ldcg(state->drawn + first + lane) : -1;
  bool same = lane < s->drafts && o.token == __ldcg(&state->target[first + lane + 1].token);
  o.accepted = (uint32_t)__ffs((int)~__ballot_sync(all, same)) - 1;
  if (by_law) us_engine_verify_by_law(state, i, &o, &first_broken);
  bool broken = by_law ? first_broken < 32 : __shfl_sync(all, o.token, (int)o.accepted) < 0;
  if (by_law && broken)
    o.accepted = first_broken; /* a law that is not there is told, whatever survives before it */
  uint32_t end = US_ENGINE_GOES_ON;
  if (lane <= o.accepted && !broken) end = us_engine_end_of(s, o.token, s->position + 1 + lane);
  uint32_t ends = __ballot_sync(all, end != US_ENGINE_GOES_ON);
  o.count = broken ? o.accepted : ends ? (uint32_t)__ffs((int)ends) : o.accepted + 1;
  o.finish = __shfl_sync(all, end, ends ? __ffs((int)ends) - 1 : 0);
  if (broken) o.finish = US_ENGINE_BROKEN;
  if (o.finish == US_ENGINE_GOES_ON && state->cancel >> i & 1) o.finish = US_ENGINE_CANCELLED;
  if (LAWS && s->logprobs) us_engine_logprobs(state, i, by_law, &o);
  return o;
}

/* One warp of rank 0: a lane a word, no fence. */
static __device__ void us_engine_emit(const struct us_engine_block *b, const struct us_engine_sequence *s,
                                      const struct us_engine_outcome *o, uint32_t number) {
  const uint32_t lane = threadIdx.x % 32;
  uint64_t time = us_engine_now();
  uint32_t token = (uint32_t)__shfl_sync(0xffffffffu, o->token, (int)(lane - US_ENGINE_EVENT_HEAD) & 31);
  uint32_t value = lane == 0   ? s->id
                   : lane == 1 ? b->rank->state->round
                   : lane == 2 ? us_engine_event_facts(o->count, o->finish, o->accepted, s->drafts) |
                                     (s->logprobs ? US_ENGINE_EVENT_LOGPROBS : 0)
                   : lane == 3 ? (uint32_t)time
                   : lane == 4 ? (uint32_t)(time >> 32)
                               : token;
  uint64_t *word = b->rank->mailbox->event[number % US_ENGINE_EVENTS].word;
  const uint64_t flag = (uint64_t)(number + 1) << 32;
  if (lane < US_ENGINE_EVENT_HEAD + o->count) us_store_flagged(word + lane, flag | value);
  if (s->logprobs && lane < o->count)
    us_store_flagged(word + US_ENGINE_EVENT_HEAD + o->count + lane, flag | us_float_bits(o->logprob));
}

/* One warp: the sequence after the round, and its rows of the next. */
static __device__ void us_engine_advance(struct us_engine_state *state, uint32_t i,
                                         const struct us_engine_outcome *o, uint32_t vocab) {
  struct us_engine_sequence *s = &state->sequence[i];
  const uint32_t lane = threadIdx.x % 32;
  int32_t anchor = __shfl_sync(0xffffffffu, o->token, (int)o->accepted);
  if (lane == 0 && o->finish != US_ENGINE_GOES_ON) s->active = 0;
  if (lane == 0 && o->finish == US_ENGINE_GOES_ON) {
    s->committed = o->accepted + 1;
    s->position += s->committed;
    s->anchor = anchor;
    s->drafts = us_engine_drafts(state, s);
  }
  __syncwarp();
  if (lane < state->block) us_engine_set_rows(state, i, lane, vocab);
}

/* Block 0: the round's end for all sequences. */
template <bool LAWS>
static __device__ void us_engine_decide(const struct us_engine_block *b, uint32_t vocab) {
  struct us_engine_state *state = b->rank->state;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, all = 0xffffffffu;
  uint32_t *finish = (uint32_t *)us_engine_shared_of(b)->row; /* (sequences) */
  uint32_t active =
      __ballot_sync(all, lane < US_ENGINE_SEQUENCES && state->sequence[lane % US_ENGINE_SEQUENCES].active);
  us_engine_meet();
  if (warp < US_ENGINE_SEQUENCES) {
    uint32_t finished = US_ENGINE_GOES_ON;
    if (active >> warp & 1) {
      struct us_engine_outcome o = us_engine_verify<LAWS>(state, warp);
      uint32_t before = (uint32_t)__popc(active & ((1u << warp) - 1));
      if (b->rank->rank == 0) us_engine_emit(b, &state->sequence[warp], &o, state->events + before);
      us_engine_advance(state, warp, &o, vocab);
      finished = o.finish;
    }
    if (lane == 0) finish[warp] = finished;
  }
  us_engine_meet();
  if (warp) return;
  uint32_t ended = __ballot_sync(all, lane < US_ENGINE_SEQUENCES && finish[lane % US_ENGINE_SEQUENCES]);
  if (lane) return;
  state->live = (uint32_t)__popc(active & ~ended);
  state->events += (uint32_t)__popc(active);
  state->round++;
  us_engine_shared_of(b)->stop[b->round & 1] = state->stop = ended || !active || state->park;
}

/* One thread of another block: block 0 is the first to finish, the others follow. */
static __device__ void us_engine_follow(const struct us_engine_block *b) {
  struct us_engine_watch watch = {0, 0};
  uint32_t before = b->round * b->blocks, have;
  while ((have = us_load_acquire(b->rank->done + b->op_index)) == before)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, before + 1);
  us_engine_shared_of(b)->stop[b->round & 1] = __ldcg(&b->rank->state->stop);
}

/* LAWS: as FILTERS of SELECT. */
template <bool LAWS>
static __device__ void us_engine_accept(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_wait_done(b, op->wait);
  const uint32_t asked = LAWS ? us_engine_has_laws(b) : 0;
  if (asked) us_engine_weigh(b, &op->accept, asked);
  if (b->index == 0)
    us_engine_decide<LAWS>(b, op->accept.vocab);
  else if (threadIdx.x == 0)
    us_engine_follow(b);
  us_engine_finish(b);
}

#endif
