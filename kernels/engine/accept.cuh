/* accept.cuh: the end of a round: which proposals survive, what is committed, the rows of the next round.
 *
 * Verification by match (decode/verify.h): a proposal survives while it equals the token that the target drew. Block 0 of every
 * rank decides the same from its own copy of the state, a warp a sequence, a lane a slot; rank 0's tells the host. The other
 * blocks need to know whether a further round follows: they add themselves to the operation's count only after block 0 has.
 */
#ifndef US_KERNELS_ENGINE_ACCEPT_CUH
#define US_KERNELS_ENGINE_ACCEPT_CUH

#include "kernels/engine/block.cuh"
#include "kernels/engine/round.h"

/* What a round did to a sequence; the same in all lanes but `token`. */
struct us_engine_outcome {
  int32_t token; /* drawn in the lane's slot */
  uint32_t accepted, count, finish;
};

/* One warp. The rows that count are the survivors' and the one after them; rows behind it may hold anything. */
static __device__ struct us_engine_outcome us_engine_verify(const struct us_engine_state *state, uint32_t i) {
  const struct us_engine_sequence *s = &state->sequence[i];
  const uint32_t lane = threadIdx.x % 32, all = 0xffffffffu, first = i * state->block;
  struct us_engine_outcome o;
  o.token = lane <= s->drafts ? __ldcg(state->drawn + first + lane) : -1;
  bool same = lane < s->drafts && o.token == __ldcg(&state->target[first + lane + 1].token);
  o.accepted = (uint32_t)__ffs((int)~__ballot_sync(all, same)) - 1;
  bool broken = __shfl_sync(all, o.token, (int)o.accepted) < 0;
  uint32_t end = US_ENGINE_GOES_ON;
  if (lane <= o.accepted && !broken) end = us_engine_end_of(s, o.token, s->position + 1 + lane);
  uint32_t ends = __ballot_sync(all, end != US_ENGINE_GOES_ON);
  o.count = broken ? o.accepted : ends ? (uint32_t)__ffs((int)ends) : o.accepted + 1;
  o.finish = __shfl_sync(all, end, ends ? __ffs((int)ends) - 1 : 0);
  if (broken) o.finish = US_ENGINE_BROKEN;
  if (o.finish == US_ENGINE_GOES_ON && state->cancel >> i & 1) o.finish = US_ENGINE_CANCELLED;
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
                   : lane == 2 ? us_engine_event_facts(o->count, o->finish, o->accepted, s->drafts)
                   : lane == 3 ? (uint32_t)time
                   : lane == 4 ? (uint32_t)(time >> 32)
                               : token;
  if (lane >= US_ENGINE_EVENT_HEAD + o->count) return;
  uint64_t *word = b->rank->mailbox->event[number % US_ENGINE_EVENTS].word;
  us_store_flagged(word + lane, (uint64_t)(number + 1) << 32 | value);
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
    s->drafts = us_engine_drafts(s);
  }
  __syncwarp();
  if (lane < state->block) us_engine_set_rows(state, i, lane, vocab);
}

/* Block 0: the round's end for all sequences. */
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
      struct us_engine_outcome o = us_engine_verify(state, warp);
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
  us_engine_shared_of(b)->stop = state->stop = ended || !active || state->park;
}

/* One thread of another block: block 0 is the first to finish, the others follow. */
static __device__ void us_engine_follow(const struct us_engine_block *b) {
  struct us_engine_watch watch = {0, 0};
  uint32_t before = b->round * b->blocks, have;
  while ((have = us_load_acquire(b->rank->done + b->op_index)) == before)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, before + 1);
  us_engine_shared_of(b)->stop = __ldcg(&b->rank->state->stop);
}

static __device__ void us_engine_accept(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_wait_done(b, op->wait);
  if (b->index == 0)
    us_engine_decide(b, op->accept.vocab);
  else if (threadIdx.x == 0)
    us_engine_follow(b);
  us_engine_finish(b);
}

#endif
