/* slots.cuh: the slots of a drafter with a Markov head, one after the other, where the best score of a row decides.
 *
 *     us_engine_choose_best_slots(b, s);          // SELECT of a list whose rows are simple (us_engine_is_simple)
 *
 * A slot is one hop: each block adds what the tokens before give to its piece of the logits, sends its best id of each row to every rank,
 * and takes the best of all blocks itself, so that no second hop tells it the token.
 *
 * Bound: latency. Store and load between blocks a microsecond and a half, the token's row of `before` another half, three barriers. A slot
 * that ran through what SELECT does for any row, some 50 KB of code that looks up five times what a row wants, took 16 us.
 */
#ifndef US_KERNELS_ENGINE_SLOTS_CUH
#define US_KERNELS_ENGINE_SLOTS_CUH

#include "kernels/engine/keys.cuh"
#include "kernels/engine/markov.cuh"

/* Rows of the slot that the drafter proposes for, as bits. */
static __device__ __forceinline__ uint32_t us_engine_proposing(const struct us_engine_block *b,
                                                               const struct us_engine_select *s,
                                                               uint32_t slot) {
  const struct us_engine_state *state = b->rank->state;
  const uint32_t at = s->row + threadIdx.x % US_ENGINE_ROWS * s->step + slot - 1;
  const uint32_t sequence = at < s->rows ? state->draft[at].sequence : US_ENGINE_NONE;
  const bool there = sequence != US_ENGINE_NONE && !state->sequence[sequence].replay;
  return __ballot_sync(0xffffffffu, there) & 255;
}

/* This block's piece of a row: the head's part is added, the best key of each warp's ids kept. */
static __device__ __forceinline__ void us_engine_add_and_scan(const struct us_engine_select *s,
                                                              const struct us_engine_piece *piece,
                                                              float *logits, uint32_t r) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  uint64_t best = 0;
#pragma unroll 1
  for (uint32_t id = piece->begin + threadIdx.x; id < piece->end; id += US_ENGINE_COMPUTE) {
    const uint32_t i = id - s->first;
    const float x =
        __ldcg(logits + i) + us_engine_markov_dot((const uint4 *)(s->after + (size_t)i * s->markov),
                                                  shared->before[r], s->markov / 32);
    const uint64_t key = us_engine_score_key(x, id);
    __stcg(logits + i, x);
    best = key > best ? key : best;
  }
  best = us_engine_best_key(best);
  if (threadIdx.x % 32 == 0) shared->best_key[threadIdx.x / 32][r] = best;
}

/* Thread r: the row's token stands before the next slot; block 0 proposes it. */
static __device__ __forceinline__ void us_engine_propose(const struct us_engine_block *b,
                                                         const struct us_engine_select *s, uint32_t slot,
                                                         uint32_t r) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  struct us_engine_state *state = b->rank->state;
  const uint32_t at = s->row + r * s->step + slot - 1;
  const int32_t token = us_engine_key_token(us_engine_gathered_key(r));
  shared->token[r] = token;
  if (b->index == 0) state->proposal[at] = state->target[at].token = token;
}

namespace us_rare {
static __device__ __noinline__ void us_engine_choose_best_slots(const struct us_engine_block *b,
                                                                const struct us_engine_select *s) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t row_floats = s->stride / s->step;
  struct us_engine_piece piece = us_engine_piece_of(b, s, s->logits);
  piece.begin = max(4 * piece.begin, piece.first), piece.end = min(4 * piece.end, piece.past);
  if (threadIdx.x < US_ENGINE_ROWS) shared->token[threadIdx.x] = us_engine_anchor(b, s, threadIdx.x);
  for (uint32_t slot = 1; slot <= s->slots; slot++) {
    const uint32_t wanted = us_engine_proposing(b, s, slot), number = s->number + slot - 1;
    float *logits = s->logits + (size_t)(slot - 1) * row_floats;
    if (!wanted) return; /* nor any after it, on any rank */
    us_engine_meet();
    us_engine_fetch_before(s, wanted);
    us_engine_meet();
#pragma unroll 1
    for (uint32_t r = 0; r < US_ENGINE_ROWS; r++)
      if (wanted >> r & 1) us_engine_add_and_scan(s, &piece, logits + (size_t)r * s->stride, r);
    us_engine_jitter(b);
    us_engine_meet();
    if (threadIdx.x < 32) us_engine_send_keys(b, number);
    us_engine_gather_keys(b, number, wanted);
    us_engine_meet();
    if (threadIdx.x < US_ENGINE_ROWS && wanted >> threadIdx.x & 1) us_engine_propose(b, s, slot, threadIdx.x);
  }
}
} // namespace us_rare
using us_rare::us_engine_choose_best_slots;

#endif
