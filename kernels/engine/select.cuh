/* select.cuh: logits of all ranks to one token a row, the one that us_sample_token (base/sample.h) draws.
 *
 * Every block looks at its piece of the rank's vocabulary and sends its best candidate of each row to every rank; block 0 of
 * every rank waits for all of them and takes the best. Scores are not sums, so any cut gives the same token; ties go to the
 * lowest id. A candidate is 16 bytes that carry their own flag, stored and loaded whole: no fence, no counter, one hop. Rows that
 * top-k, top-p or min-p filter go on in filter.cuh; their logits travel to every rank before the candidates do.
 *
 * Bound: latency. 8 x 38,144 logits are 1.2 MB of L2 and one Philox quad a thread; the rest is one store and one load between
 * blocks (GPUs).
 */
#ifndef US_KERNELS_ENGINE_SELECT_CUH
#define US_KERNELS_ENGINE_SELECT_CUH

#include "kernels/engine/filter.cuh"
#include "kernels/engine/greedy.cuh"
#include "kernels/engine/slots.cuh"
#include "kernels/engine/sums.cuh"

/* What one of the eight rows wants. */
struct us_engine_draw {
  bool wanted, noisy, filtered; /* noisy: the score is logit / temperature + Gumbel noise; else the logit */
  bool simple;                  /* us_engine_is_simple */
  float inv_temperature;
  struct us_noise noise;
};

/* Everything is loaded at once, wanted or not: two loads one after the other, not five. */
static __device__ struct us_engine_draw us_engine_draw_of(const struct us_engine_block *b,
                                                          const struct us_engine_select *s, uint32_t r) {
  const struct us_engine_state *state = b->rank->state;
  const uint32_t at = us_engine_select_row(s, r);
  const struct us_engine_row row = (s->draft ? state->draft : state->target)[at == US_ENGINE_NONE ? 0 : at];
  const bool there = at != US_ENGINE_NONE && row.sequence != US_ENGINE_NONE;
  const struct us_engine_sequence *q = &state->sequence[there ? row.sequence : 0];
  const struct us_sampling sampling = q->sampling;
  const bool replayed = q->replay != NULL, sampled = q->rule != US_VERIFY_MATCH && !replayed && row.slot;
  const bool warm = there && (!s->draft || sampled) && sampling.temperature > 0.0f;
  struct us_engine_draw draw;
  draw.simple = us_engine_is_simple(q, s->vocab);
  draw.wanted = there && (!s->draft || (row.slot && !replayed));
  draw.filtered = warm && us_engine_filters(&sampling, s->vocab);
  draw.noisy = warm && !draw.filtered;
  draw.inv_temperature = 1.0f / sampling.temperature;
  draw.noise = us_engine_noise_of(q, &row, s->draft);
  return draw;
}

/* ---- candidates ---------------------------------------------------------------------------------------------------------- */

/* The best token of the piece, and its largest logit, for one row: two warps. */
static __device__ struct us_engine_best us_engine_scan(const struct us_engine_piece *piece,
                                                       const struct us_engine_draw *draw) {
  struct us_engine_best best = us_engine_best_none();
  for (uint32_t q = piece->begin + threadIdx.x % 64; q < piece->end; q += 64) {
    float x[4];
    uint32_t bits[4];
    us_engine_quad(piece, q, x);
    if (draw->noisy)
      us_philox_quad(draw->noise.key, draw->noise.position, draw->noise.sample, q, draw->noise.stream, bits);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
      float score = x[j];
      if (x[j] > best.max) best.max = x[j], best.max_id = 4 * q + j;
      if (draw->noisy) {
        if (fmaf(x[j], draw->inv_temperature, us_gumbel_bound(bits[j])) < best.score) continue;
        score = fmaf(x[j], draw->inv_temperature, us_gumbel_bits(bits[j]));
      }
      if (score > best.score) best.score = score, best.id = 4 * q + j;
    }
  }
  return us_engine_best_of_lanes(best, 1);
}

/* Filtered rows: the piece's logits to every rank. */
static __device__ void us_engine_spread(const struct us_engine_block *b, const struct us_engine_select *s,
                                        uint32_t rows) {
  for (uint32_t r = 0; r < US_ENGINE_ROWS; r++) {
    if (!(rows >> r & 1)) continue;
    struct us_engine_piece piece = us_engine_piece_of(b, s, s->logits + (size_t)r * s->stride);
    uint32_t last = 4 * piece.end < piece.past ? 4 * piece.end : piece.past;
    for (uint32_t id = max(4 * piece.begin, piece.first) + threadIdx.x; id < last; id += US_ENGINE_COMPUTE) {
      float x = __ldcg(piece.logits + id - piece.first);
      for (uint32_t to = 0; to < b->rank->ranks; to++)
        b->rank->logits_all[to][(size_t)us_engine_select_row(s, r) * s->vocab + id] = x;
    }
  }
}

/* Warp 0: the block's candidates to every rank, 128 bytes each. `fenced`: what other threads stored comes first. */
static __device__ void us_engine_send(const struct us_engine_block *b, const struct us_engine_select *s,
                                      const struct us_engine_best *best, bool fenced) {
  const uint32_t r = threadIdx.x % US_ENGINE_ROWS, ranks = b->rank->ranks;
  struct us_engine_best o = best[2 * r];
  us_engine_best_add(&o, best[2 * r + 1]);
  struct us_engine_pair pair = {us_float_bits(o.score) | (uint64_t)o.id << 32,
                                us_float_bits(o.max) | (uint64_t)us_engine_select_flag(b, s->number) << 32};
  if (fenced) __threadfence_system();
  for (uint32_t to = threadIdx.x / US_ENGINE_ROWS; to < ranks; to += 32 / US_ENGINE_ROWS)
    us_store_pair(us_engine_candidates(b, s->number, to) +
                      ((b->rank->rank * b->blocks + b->index) * US_ENGINE_ROWS + r) * 16,
                  pair);
}

/* All candidates of the `wanted` rows (bits) have arrived; the best of each row, in threads' view that look for it: 64 a row. */
static __device__ void us_engine_gather(const struct us_engine_block *b, const struct us_engine_select *s,
                                        uint32_t wanted, struct us_engine_select_shared *shared) {
  const uint32_t r = threadIdx.x % US_ENGINE_ROWS, n = b->rank->ranks * b->blocks,
                 flag = us_engine_select_flag(b, s->number);
  const uint8_t *from = us_engine_candidates(b, s->number, b->rank->rank) + r * 16;
  struct us_engine_best best = us_engine_best_none();
  for (uint32_t e = threadIdx.x / US_ENGINE_ROWS; e < n && wanted >> r & 1; e += 64 * US_ENGINE_BATCH) {
    struct us_engine_pair pair[US_ENGINE_BATCH];
    us_engine_await_pairs(b, from + e * 128, 64 * 128, (n - e + 63) / 64, (uint64_t)flag << 32,
                          0xffffffffull << 32, pair);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_BATCH; i++) {
      if (e + 64 * i >= n) continue;
      struct us_engine_best o = {us_float_from_bits((uint32_t)pair[i].low), (uint32_t)(pair[i].low >> 32),
                                 us_float_from_bits((uint32_t)pair[i].high), (uint32_t)(pair[i].low >> 32)};
      us_engine_best_add(&best, o);
    }
  }
  best = us_engine_best_of_lanes(best, US_ENGINE_ROWS);
  if (threadIdx.x % 32 < US_ENGINE_ROWS) shared->gathered[threadIdx.x / 32][r] = best;
  us_engine_meet();
  if (threadIdx.x >= US_ENGINE_ROWS) return;
  for (uint32_t w = 1; w < US_ENGINE_COMPUTE_WARPS; w++)
    us_engine_best_add(&shared->gathered[0][r], shared->gathered[w][r]);
}

/* ---- what a row gets --------------------------------------------------------------------------------------------------------- */

/* Block 0, thread r: the row's token, unless it is filtered. */
static __device__ void us_engine_take(const struct us_engine_block *b, const struct us_engine_select *s,
                                      const struct us_engine_best *best, uint32_t r) {
  struct us_engine_state *state = b->rank->state;
  struct us_engine_draw draw = us_engine_draw_of(b, s, r);
  uint32_t at = us_engine_select_row(s, r);
  if (!draw.wanted) return;
  if (!draw.simple) {
    struct us_engine_law *law = &(s->draft ? state->draft_law : state->law)[at];
    law->max = best->max;
    if (!draw.filtered) law->key = 0, law->last = UINT32_MAX;
  }
  if (s->draft) {
    if (draw.filtered && us_engine_finite(best->max)) return;
    int32_t token = best->max > -INFINITY ? (int32_t)best->id : 0;
    state->proposal[at] = token;
    state->target[at].token = token;
  } else if (!us_engine_finite(best->max)) {
    state->drawn[at] = -1;
  } else if (!draw.filtered) {
    state->drawn[at] = (int32_t)best->id;
  }
}

/* The drafter's SELECT: how sure it is of each row, and after the last how many proposals pay. All blocks. */
namespace us_rare {
static __device__ __noinline__ void us_engine_be_sure(const struct us_engine_block *b,
                                                      const struct us_engine_select *s) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  struct us_engine_state *state = b->rank->state;
  const struct us_engine_sums place = {s->number, US_ENGINE_MASSES + US_ENGINE_EMISSION, US_ENGINE_SURE};
  const uint32_t r = threadIdx.x / 64, at = us_engine_select_row(s, r);
  struct us_engine_piece piece = us_engine_piece_of(b, s, s->logits + (size_t)r * s->stride);
  const struct us_engine_draw draw = us_engine_draw_of(b, s, r);
  const float temperature =
      draw.wanted ? state->sequence[state->draft[at].sequence].sampling.temperature : 0.0f;
  const double inv = temperature > 0.0f ? 1.0 / (double)temperature : 1.0;
  uint64_t mass = 0;
  if (threadIdx.x < US_ENGINE_ROWS) shared->sums[threadIdx.x] = 0;
  us_engine_meet();
  const float max = shared->gathered[0][r].max;
  const bool looks = draw.wanted && us_engine_finite(max);
  for (uint32_t q = piece.begin + threadIdx.x % 64; looks && q < piece.end; q += 64) {
    float x[4];
    us_engine_quad(&piece, q, x);
    for (uint32_t j = 0; j < 4; j++) mass += us_sample_weight(x[j], max, inv);
  }
  for (int lanes = 16; lanes; lanes /= 2) mass += __shfl_xor_sync(0xffffffffu, mass, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd((unsigned long long *)&shared->sums[r], (unsigned long long)mass);
  us_engine_meet();
  us_engine_sums_put(b, &place, shared->sums, NULL);
  if (b->index) return;
  if (threadIdx.x / 32 < US_ENGINE_ROWS) {
    const uint32_t row = us_engine_select_row(s, threadIdx.x / 32);
    mass = us_engine_sums_total(b, &place, threadIdx.x / 32);
    if (threadIdx.x % 32 == 0 && row != US_ENGINE_NONE) state->confidence[row] = us_sample_confidence(mass);
  }
  us_engine_meet();
  if (s->last && threadIdx.x < US_ENGINE_SEQUENCES) us_engine_cut_drafts(state, threadIdx.x);
}
} // namespace us_rare
using us_rare::us_engine_be_sure;

/* ---- rows, and slots ------------------------------------------------------------------------------------------------------ */

/* One of the eight rows each: those that filters apply to; those that want a token. As bits, the same in every warp of every rank. */
static __device__ uint32_t us_engine_filtered_rows(const struct us_engine_block *b,
                                                   const struct us_engine_select *s) {
  return __ballot_sync(0xffffffffu, us_engine_draw_of(b, s, threadIdx.x % US_ENGINE_ROWS).filtered) & 255;
}
static __device__ uint32_t us_engine_wanted_rows(const struct us_engine_block *b,
                                                 const struct us_engine_select *s) {
  return __ballot_sync(0xffffffffu, us_engine_draw_of(b, s, threadIdx.x % US_ENGINE_ROWS).wanted) & 255;
}

/* A token for each of the eight rows, in block 0's state. `everywhere`: the best of every row in all blocks' shared memory, too. FILTERS:
 * rows may need more than their best score (us_engine_is_simple); a kernel without them spares its streaming loops the registers that a
 * long chain of calls takes. us_engine_launch.unfiltered asks for it. */
template <bool FILTERS>
static __device__ __forceinline__ void us_engine_choose(const struct us_engine_block *b,
                                                        const struct us_engine_select *s, bool everywhere,
                                                        uint32_t wanted, uint4 mail) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t filtered = us_engine_filtered_rows(b, s), r = threadIdx.x / 64;
  const bool sure = FILTERS && s->draft && b->rank->state->adaptive;
  if (!FILTERS && filtered) __trap(); /* the host asked for the wrong kernel */
  const bool spread = FILTERS && filtered && b->rank->ranks > 1;
  const bool fenced =
      spread || (FILTERS && filtered && s->slots); /* a head's part of the logits is of this operation */
  if (spread) us_engine_spread(b, s, filtered);
  struct us_engine_draw draw = us_engine_draw_of(b, s, r);
  struct us_engine_piece piece = us_engine_piece_of(b, s, s->logits + (size_t)r * s->stride);
  struct us_engine_best best = draw.wanted ? us_engine_scan(&piece, &draw) : us_engine_best_none();
  if (threadIdx.x % 32 == 0) shared->best[threadIdx.x / 32] = best;
  us_engine_meet();
  if (threadIdx.x < 32) us_engine_send(b, s, shared->best, fenced);
  if (us_engine_is_mailman(b, s)) us_engine_send_wishes(b, s, mail);
  if (b->index == 0 || everywhere || us_engine_filters_here(b, filtered) || sure) {
    us_engine_gather(b, s, wanted, shared);
    if (b->index == 0 && !s->draft && threadIdx.x == US_ENGINE_COMPUTE - 1) us_engine_take_wishes(b, s);
    if (b->index == 0 && threadIdx.x < US_ENGINE_ROWS)
      us_engine_take(b, s, &shared->gathered[0][threadIdx.x], threadIdx.x);
  }
  if (FILTERS && us_engine_filters_here(b, filtered))
    us_engine_filter_rows(b, s, filtered, us_engine_select_flag(b, s->number));
  if (sure) us_engine_be_sure(b, s);
}

/* Thread r: the token that us_engine_choose has found for row r, in every block: a filtered row's comes from the block that drew it. */
static __device__ int32_t us_engine_learn(const struct us_engine_block *b, const struct us_engine_select *s,
                                          uint32_t r) {
  const struct us_engine_best *best = &us_engine_select_shared()->gathered[0][r];
  const struct us_engine_draw draw = us_engine_draw_of(b, s, r);
  if (!draw.wanted) return 0;
  if (draw.filtered && us_engine_finite(best->max)) return us_engine_drawn_token(b, s, r);
  return best->max > -INFINITY ? (int32_t)best->id : 0;
}

/* A Markov head's slots, one after the other, whatever their rows want: every block learns each slot's tokens before it goes on to the
 * next. Where best scores decide, slots.cuh does the same with a third of the code. */
namespace us_rare {
static __device__ __noinline__ void us_engine_choose_slots(const struct us_engine_block *b,
                                                           const struct us_engine_select *op) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  struct us_engine_select *s = &shared->slot;
  const uint32_t r = threadIdx.x;
  if (r == 0) *s = *op;
  if (r < US_ENGINE_ROWS) shared->token[r] = us_engine_anchor(b, op, r);
  for (uint32_t slot = 1; slot <= op->slots; slot++) {
    us_engine_meet();
    const uint32_t wanted = us_engine_wanted_rows(b, s);
    us_engine_add_markov(b, s, us_engine_piece_of(b, s, s->logits), wanted);
    us_engine_jitter(b);
    us_engine_choose<true>(b, s, true, wanted, make_uint4(0, 0, 0, 0));
    if (r < US_ENGINE_ROWS) shared->token[r] = us_engine_learn(b, s, r);
    us_engine_meet(); /* all are done with this slot */
    if (r == 0) s->row++, s->number++, s->logits += op->stride / op->step, s->last = slot + 1 == op->slots;
  }
}
} // namespace us_rare
using us_rare::us_engine_choose_slots;

/* ---- the operation ------------------------------------------------------------------------------------------------------- */

template <bool FILTERS>
static __device__ void us_engine_select(const struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_select *s = &op->select;
  uint4 mail = us_engine_is_mailman(b, s) ? us_load_system16(b->rank->mailbox) : make_uint4(0, 0, 0, 0);
  us_engine_wait_done(b, op->wait);
  us_engine_drain(b);
  if (s->slots && FILTERS)
    us_engine_choose_slots(b, s);
  else if (s->slots)
    us_engine_choose_best_slots(b, s);
  else if (FILTERS || !us_engine_choose_greedy(b, s, mail))
    us_engine_choose<FILTERS>(b, s, false, 255, mail);
  us_engine_finish(b);
}

#endif
