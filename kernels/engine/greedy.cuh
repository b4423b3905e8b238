/* greedy.cuh: the likeliest token of each of the eight rows, where that is all that any of them wants.
 *
 *     if (!us_engine_choose_greedy(b, s, mail)) ...                // SELECT of simple rows (us_engine_is_simple); false: one draws with noise
 *
 * What select.cuh does for any row, in a fraction of its 50 KB of code and with one look at what the rows want instead of three: a round
 * has two SELECTs, and where it takes half a millisecond they count.
 *
 * Bound: latency. The rows' sequences, two loads behind one another, the logits, and one store and one load between blocks.
 */
#ifndef US_KERNELS_ENGINE_GREEDY_CUH
#define US_KERNELS_ENGINE_GREEDY_CUH

#include "kernels/engine/keys.cuh"
#include "kernels/engine/wishes.cuh"

/* The rows that want a token, as bits, the same in every warp of every rank; *ret_noisy: those that do not take the likeliest. */
static __device__ __forceinline__ uint32_t us_engine_greedy_rows(const struct us_engine_block *b,
                                                                 const struct us_engine_select *s,
                                                                 uint32_t *ret_noisy) {
  const struct us_engine_state *state = b->rank->state;
  const uint32_t at = us_engine_select_row(s, threadIdx.x % US_ENGINE_ROWS);
  const struct us_engine_row *row =
      (s->draft ? state->draft : state->target) + (at == US_ENGINE_NONE ? 0 : at);
  const uint32_t sequence = at == US_ENGINE_NONE ? US_ENGINE_NONE : row->sequence, slot = row->slot;
  const struct us_engine_sequence *q = &state->sequence[sequence == US_ENGINE_NONE ? 0 : sequence];
  const bool replayed = q->replay != NULL, warm = !s->draft && q->sampling.temperature > 0.0f;
  const bool wanted = sequence != US_ENGINE_NONE && (!s->draft || (slot && !replayed));
  *ret_noisy = __ballot_sync(0xffffffffu, wanted && warm) & 255;
  return __ballot_sync(0xffffffffu, wanted) & 255;
}

/* Two warps a row: the best of this block's piece of it, and of the other rows none. */
static __device__ __forceinline__ void us_engine_scan_greedy(const struct us_engine_block *b,
                                                             const struct us_engine_select *s,
                                                             uint32_t wanted) {
  const uint32_t r = threadIdx.x / 64, lane = threadIdx.x % 32;
  const struct us_engine_piece piece = us_engine_piece_of(b, s, s->logits + (size_t)r * s->stride);
  uint64_t best = 0;
#pragma unroll 1
  for (uint32_t q = piece.begin + threadIdx.x % 64; wanted >> r & 1 && q < piece.end; q += 64) {
    float x[4];
    us_engine_quad(&piece, q, x);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) best = max(best, us_engine_score_key(x[j], 4 * q + j));
  }
  best = us_engine_best_key(best);
  if (lane < US_ENGINE_ROWS)
    us_engine_select_shared()->best_key[threadIdx.x / 32][lane] = lane == r ? best : 0;
}

/* Block 0, thread r: the row's token. */
static __device__ __forceinline__ void us_engine_take_greedy(const struct us_engine_block *b,
                                                             const struct us_engine_select *s, uint32_t r) {
  struct us_engine_state *state = b->rank->state;
  const uint32_t at = us_engine_select_row(s, r);
  const uint64_t key = us_engine_gathered_key(r);
  if (s->draft)
    state->proposal[at] = state->target[at].token = us_engine_key_token(key);
  else
    state->drawn[at] = us_engine_key_is_finite(key) ? us_engine_key_token(key) : -1;
}

namespace us_rare {
static __device__ __noinline__ bool us_engine_choose_greedy(const struct us_engine_block *b,
                                                            const struct us_engine_select *s, uint4 mail) {
  uint32_t noisy;
  const uint32_t wanted = us_engine_greedy_rows(b, s, &noisy);
  if (noisy) return false;
  us_engine_scan_greedy(b, s, wanted);
  us_engine_jitter(b);
  us_engine_meet();
  if (threadIdx.x < 32) us_engine_send_keys(b, s->number);
  if (us_engine_is_mailman(b, s)) us_engine_send_wishes(b, s, mail);
  if (b->index) return true;
  us_engine_gather_keys(b, s->number, wanted);
  if (!s->draft && threadIdx.x == US_ENGINE_COMPUTE - 1) us_engine_take_wishes(b, s);
  us_engine_meet();
  if (threadIdx.x < US_ENGINE_ROWS && wanted >> threadIdx.x & 1) us_engine_take_greedy(b, s, threadIdx.x);
  return true;
}
} // namespace us_rare
using us_rare::us_engine_choose_greedy;

#endif
