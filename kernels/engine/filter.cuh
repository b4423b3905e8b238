/* filter.cuh: the draw of a row that top-k, top-p or min-p filters: us_sample_token (base/sample.h) over whole rows of logits.
 *
 *     if (us_engine_filters_here(b, rows)) us_engine_filter_rows(b, op, rows, flag);       // SELECT, after its gather
 *
 * Every rank has the rows whole (us_engine_rank.logits_all) and computes them all: no further exchange between GPUs. Within a rank
 * up to 16 blocks share a row (hop.cuh) and find its cuts together (cut.cuh).
 *
 * Bound: latency. A hop is a store and a load between blocks, 2 us; a look at the own piece is 5 loads a thread. What is the same
 * for all threads lies in shared memory: on their stacks it would not fit the first-level cache.
 */
#ifndef US_KERNELS_ENGINE_FILTER_CUH
#define US_KERNELS_ENGINE_FILTER_CUH

#include "kernels/engine/cut.cuh"

/* us_sample_gumbel over what the cut keeps; the token in the first 16 threads. The last hop of a row. */
static __device__ __forceinline__ uint32_t us_engine_filter_draw(const struct us_engine_filter *f,
                                                                 struct us_cut cut, struct us_noise noise,
                                                                 uint32_t max_id) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  struct us_engine_best best = us_engine_best_none();
  for (uint32_t base = f->piece.begin; base < f->piece.end; base += US_ENGINE_QUADS_STEP) {
    struct us_engine_quads quads;
    us_engine_quads_load(f, base, &quads);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_QUADS; i++) {
      const float *x = quads.x[i];
      uint32_t bits[4], id = us_engine_quad_id(base, i), kept = 0;
#pragma unroll
      for (uint32_t j = 0; j < 4; j++)
        kept |= (uint32_t)(x[j] == x[j] && us_cut_keeps(cut, x[j], id + j)) << j;
      if (!kept) continue;
      us_philox_quad(noise.key, noise.position, noise.sample, id / 4, noise.stream, bits);
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        if (!(kept >> j & 1) || fmaf(x[j], f->inv_float, us_gumbel_bound(bits[j])) < best.score) continue;
        float score = fmaf(x[j], f->inv_float, us_gumbel_bits(bits[j]));
        if (score > best.score) best.score = score, best.id = id + j;
      }
    }
  }
  best = us_engine_best_of_lanes(best, 1);
  if (threadIdx.x % 32 == 0) shared->best[threadIdx.x / 32] = best;
  us_engine_meet();
  if (threadIdx.x == 0) {
    for (uint32_t w = 1; w < US_ENGINE_COMPUTE_WARPS; w++) us_engine_best_add(&best, shared->best[w]);
    us_engine_hop_put(f, US_ENGINE_HOP_LAST, 0, us_float_bits(best.score) | (uint64_t)best.id << 32, 0);
  }
  uint64_t word = us_engine_hop_words(f, US_ENGINE_HOP_LAST);
  best = us_engine_best_none();
  if (threadIdx.x < f->parts)
    best.score = us_float_from_bits((uint32_t)word), best.id = (uint32_t)(word >> 32);
  best = us_engine_best_of_lanes(best, 1);
  return best.score > -INFINITY ? best.id : max_id;
}

/* What a row is drawn with: proposals with noise of their round. */
static __device__ __forceinline__ struct us_noise us_engine_noise_of(const struct us_engine_sequence *s,
                                                                     const struct us_engine_row *row,
                                                                     bool draft) {
  if (!draft) return us_noise_target(s->seed, row->position + 1, s->sample);
  return us_noise_round(s->seed, row->position - row->slot, row->slot - 1, s->sample, US_STREAM_DRAFT);
}

/* Where the token that row r drew is told to the rank's other blocks, when a Markov head's next slot waits for it. */
static __device__ __forceinline__ uint8_t *us_engine_drawn_place(const struct us_engine_block *b,
                                                                 const struct us_engine_select *select,
                                                                 uint32_t r) {
  return us_engine_candidates(b, select->number, b->rank->rank) + b->rank->ranks * b->blocks * 128 + r * 16;
}
static __device__ int32_t us_engine_drawn_token(const struct us_engine_block *b,
                                                const struct us_engine_select *select, uint32_t r) {
  struct us_engine_pair pair[US_ENGINE_BATCH];
  us_engine_await_pairs(b, us_engine_drawn_place(b, select, r), 0, 1,
                        (uint64_t)us_engine_select_flag(b, select->number) << 32, 0xffffffffull << 32, pair);
  return (int32_t)(uint32_t)pair[0].low;
}

/* shared->filter: row r of the eight. One thread. */
static __device__ __forceinline__ void us_engine_filter_begin(const struct us_engine_block *b,
                                                              const struct us_engine_select *select,
                                                              const struct us_sampling *sampling,
                                                              uint32_t flag, uint32_t r) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  struct us_engine_filter *f = &shared->filter;
  const uint32_t parts = us_engine_filter_parts(b->blocks), part = b->index % parts,
                 quads = (select->vocab + 3) / 4;
  const float *all =
      b->rank->logits_all[b->rank->rank] + (size_t)us_engine_select_row(select, r) * select->vocab;
  f->b = b, f->vocab = select->vocab, f->part = part, f->parts = parts;
  f->piece.logits = b->rank->ranks > 1 ? all : select->logits + (size_t)r * select->stride;
  f->piece.first = 0, f->piece.past = select->vocab;
  f->piece.begin = (uint32_t)((uint64_t)quads * part / parts),
  f->piece.end = (uint32_t)((uint64_t)quads * (part + 1) / parts);
  f->area =
      (uint8_t *)b->rank->select[b->rank->rank] + b->index / parts * (US_ENGINE_HOP_BYTES / US_ENGINE_ROWS);
  f->flag = (uint64_t)flag << 8 | r << 5;
  f->max = shared->gathered[0][r].max;
  f->inv_float = 1.0f / sampling->temperature;
  f->inv_temperature = 1.0 / (double)sampling->temperature;
}

/* The cut as all tokens of the row see it: its last token lies in one part's own piece, or nowhere. One hop. */
static __device__ __forceinline__ uint32_t us_engine_cut_whole(const struct us_engine_filter *f, uint32_t hop,
                                                               struct us_cut cut) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t quads = (f->vocab + 3) / 4, part = threadIdx.x;
  us_engine_meet(); /* all have taken the cut from shared->last */
  if (threadIdx.x == 0) us_engine_hop_put(f, hop, 0, cut.last, 0), shared->last = UINT32_MAX;
  us_engine_meet();
  uint64_t last = us_engine_hop_words(f, hop);
  bool own = part < f->parts && last / 4 >= (uint64_t)quads * part / f->parts &&
             last / 4 < (uint64_t)quads * (part + 1) / f->parts;
  if (own) shared->last = (uint32_t)last;
  us_engine_meet();
  return shared->last;
}

/* The filtered rows (bits) that this block shares in, after us_engine_gather. */
namespace us_rare {
static __device__ __noinline__ void us_engine_filter_rows(const struct us_engine_block *b,
                                                          const struct us_engine_select *select,
                                                          uint32_t rows, uint32_t flag) {
  const struct us_engine_select_shared *shared = us_engine_select_shared();
  const struct us_engine_filter *f = &shared->filter;
  const uint32_t groups = us_engine_filter_groups(b->blocks);
  if (b->rank->ranks > 1 || select->slots)
    __threadfence_system(); /* the logits behind the candidates' flags */
  us_engine_meet();
  for (uint32_t r = b->index / us_engine_filter_parts(b->blocks); r < US_ENGINE_ROWS; r += groups) {
    if (!(rows >> r & 1) || !us_engine_finite(shared->gathered[0][r].max)) continue;
    struct us_engine_state *state = b->rank->state;
    const uint32_t at = us_engine_select_row(select, r);
    const struct us_engine_row *row = &(select->draft ? state->draft : state->target)[at];
    const struct us_engine_sequence *s = &state->sequence[row->sequence];
    const struct us_sampling sampling = s->sampling;
    const struct us_noise noise = us_engine_noise_of(s, row, select->draft);
    const bool published = s->rule != US_VERIFY_MATCH;
    struct us_cut cut = us_cut_everything();
    uint32_t hop = 0;
    us_engine_meet();
    if (threadIdx.x == 0) us_engine_filter_begin(b, select, &sampling, flag, r);
    us_engine_meet();
    for (uint32_t mass = 0; mass < 2; mass++) {
      bool on =
          mass ? sampling.top_p > 0.0f && sampling.top_p < 1.0f : sampling.top_k && sampling.top_k < f->vocab;
      if (on)
        cut = us_engine_cut_reach(f, &hop, cut, mass ? sampling.top_p : 0.0f, mass ? 0 : sampling.top_k);
    }
    if (sampling.min_p > 0.0f) cut = us_engine_cut_min_p(f, &hop, cut, sampling.min_p);
    uint32_t last = published ? us_engine_cut_whole(f, hop++, cut) : 0;
    uint32_t token = us_engine_filter_draw(f, cut, noise, shared->gathered[0][r].id);
    if (f->part || threadIdx.x) continue;
    struct us_engine_law *law = &(select->draft ? state->draft_law : state->law)[at];
    law->key = cut.key, law->last = last;
    if (select->draft)
      state->proposal[at] = state->target[at].token = (int32_t)token;
    else
      state->drawn[at] = (int32_t)token;
    if (select->slots) us_store_pair(us_engine_drawn_place(b, select, r), {token, (uint64_t)flag << 32});
  }
}
} // namespace us_rare
using us_rare::us_engine_filter_rows;

#endif
