/* filter.cuh: top-k, top-p and min-p of rows whose logits every rank has whole; the draw over what they keep.
 *
 * The cut of a row (struct us_cut, base/sample.h) comes from integer counts and masses, so it may be found in any order: up to 16
 * blocks share a row, each with a piece of the vocabulary. A radix pass adds up 256 counts over the blocks in one hop: every
 * block stores its counts as 16-byte words that carry their own flag, and reads the others'. All of a row's blocks then know the
 * next digit. Every rank computes every row: no further exchange between GPUs.
 *
 * A cut's `last` is what matters to the own piece: UINT32_MAX before the block that holds the last kept token, 0 after it.
 */
#ifndef US_KERNELS_ENGINE_FILTER_CUH
#define US_KERNELS_ENGINE_FILTER_CUH

#include "kernels/engine/candidate.cuh"

/* ---- shared memory of SELECT -------------------------------------------------------------------------------------------------- */

struct us_engine_select_shared {
  struct us_engine_best best[US_ENGINE_COMPUTE_WARPS];
  struct us_engine_best gathered[US_ENGINE_COMPUTE_WARPS][US_ENGINE_ROWS];
  uint64_t measure[256];  /* of this block */
  uint64_t total[2][256]; /* of the row's blocks, by halves of them */
  uint64_t target;        /* of the next digit */
  uint32_t digit;         /* US_ENGINE_NONE: the whole set does not reach the target */
  uint32_t counts[US_ENGINE_COMPUTE_WARPS];
  uint32_t last;
  uint32_t least; /* smallest key that min-p keeps */
};
static_assert(sizeof(struct us_engine_select_shared) <= US_ENGINE_VECTOR_BYTES, "scratch of SELECT");

/* ---- blocks that share a row -------------------------------------------------------------------------------------------------- */

/* One row of one block. Threads hold the same. */
struct us_engine_filter {
  const struct us_engine_block *b;
  struct us_engine_select_shared *shared;
  struct us_engine_piece piece;
  uint32_t vocab, part, parts;
  uint8_t *area; /* (slots, parts, words) pairs */
  uint64_t flag; /* of the next hop */
  uint32_t slot;
  float max, inv_float;
  double inv_temperature;
};

static __device__ __forceinline__ uint32_t us_engine_filter_parts(uint32_t blocks) {
  uint32_t parts = blocks / US_ENGINE_ROWS;
  return parts > US_ENGINE_HOP_PARTS ? US_ENGINE_HOP_PARTS : parts ? parts : 1;
}
/* Groups of blocks: group g takes rows g, g + groups, ... */
static __device__ __forceinline__ uint32_t us_engine_filter_groups(uint32_t blocks) {
  uint32_t groups = blocks / us_engine_filter_parts(blocks);
  return groups < US_ENGINE_ROWS ? groups : US_ENGINE_ROWS;
}
static __device__ __forceinline__ bool us_engine_filters_here(const struct us_engine_block *b,
                                                              uint32_t rows) {
  return rows && b->index / us_engine_filter_parts(b->blocks) < us_engine_filter_groups(b->blocks);
}

static __device__ __forceinline__ uint8_t *us_engine_hop_at(const struct us_engine_filter *f, uint32_t part,
                                                            uint32_t word) {
  return f->area + ((size_t)(f->slot * US_ENGINE_HOP_PARTS + part) * US_ENGINE_HOP_WORDS + word) * 16;
}
static __device__ __forceinline__ void us_engine_hop_put(const struct us_engine_filter *f, uint32_t word,
                                                         uint64_t value) {
  us_store_pair(us_engine_hop_at(f, f->part, word), {value, f->flag});
}
/* Consecutive hops use different slots. A block that is two hops ahead has read the others' hop between, which they wrote after
 * they had read the one before; so the slot is free. */
static __device__ __forceinline__ void us_engine_hop_next(struct us_engine_filter *f) {
  f->flag++;
  f->slot ^= 1;
}

/* Threads p < parts get the word of part p; the others 0. One hop. */
static __device__ uint64_t us_engine_hop_words(struct us_engine_filter *f) {
  struct us_engine_pair pair[US_ENGINE_BATCH];
  pair[0].low = 0;
  if (threadIdx.x < f->parts)
    us_engine_await_pairs(f->b, us_engine_hop_at(f, threadIdx.x, 0), 0, 1, f->flag, ~0ull, pair);
  us_engine_hop_next(f);
  return pair[0].low;
}

/* ---- radix selection ----------------------------------------------------------------------------------------------------------- */

/* All lanes: add `weight` (below 2^41) to measure[digit] of those that are in. Of equal digits one lane adds the sum: neighbours
 * in the first pass mostly agree. */
static __device__ __forceinline__ void us_engine_add_digit(uint64_t *measure, bool in, uint32_t digit,
                                                           uint64_t weight) {
  const uint32_t all = 0xffffffffu;
  uint32_t pending = __ballot_sync(all, in);
  while (pending) {
    int leader = __ffs((int)pending) - 1;
    uint32_t same = __shfl_sync(all, digit, leader);
    bool mine = in && digit == same;
    uint32_t low = __reduce_add_sync(all, mine ? (uint32_t)weight & 0x3ffffffu : 0);
    uint32_t high = __reduce_add_sync(all, mine ? (uint32_t)(weight >> 26) : 0);
    if ((int)(threadIdx.x % 32) == leader)
      atomicAdd((unsigned long long *)measure + same, (unsigned long long)(((uint64_t)high << 26) + low));
    pending &= ~__ballot_sync(all, mine);
  }
}

/* us_sample_weight, which is 0 from 28.5 below the maximum on. */
static __device__ __forceinline__ uint64_t us_engine_weight(const struct us_engine_filter *f, float x) {
  if ((x - f->max) * f->inv_float < -30.0f) return 0;
  return us_sample_weight(x, f->max, f->inv_temperature);
}

/* shared->measure: of this block's tokens inside `within` whose key begins with `key`, by the 8 bits at `shift`. */
static __device__ void us_engine_measure(const struct us_engine_filter *f, struct us_cut within, bool by_mass,
                                         uint32_t key, uint32_t shift) {
  uint32_t above = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
  us_engine_meet();
  if (threadIdx.x < 256) f->shared->measure[threadIdx.x] = 0;
  us_engine_meet();
  for (uint32_t base = f->piece.begin; base < f->piece.end; base += US_ENGINE_COMPUTE) {
    uint32_t q = base + threadIdx.x;
    float x[4];
    us_engine_quad(&f->piece, q < f->piece.end ? q : f->piece.begin, x);
    for (uint32_t j = 0; j < 4; j++) {
      uint32_t k = us_sample_key(x[j]), id = 4 * q + j;
      bool in = q < f->piece.end && id < f->vocab && (k & above) == key && us_cut_keeps(within, x[j], id);
      uint64_t weight = !in ? 0 : by_mass ? us_engine_weight(f, x[j]) : 1;
      us_engine_add_digit(f->shared->measure, in && weight, k >> shift & 255, weight);
    }
  }
  us_engine_meet();
}

/* One hop: shared->total = the sum of all parts' measures. */
static __device__ void us_engine_add_parts(struct us_engine_filter *f) {
  const uint32_t word = threadIdx.x % 256, half = threadIdx.x / 256, first = half * US_ENGINE_BATCH;
  if (!half) us_engine_hop_put(f, word, f->shared->measure[word]);
  struct us_engine_pair pair[US_ENGINE_BATCH];
  uint32_t n = f->parts > first ? f->parts - first : 0;
  us_engine_await_pairs(f->b, us_engine_hop_at(f, first, word), US_ENGINE_HOP_WORDS * 16, n, f->flag, ~0ull,
                        pair);
  uint64_t sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
    if (i < n) sum += pair[i].low;
  f->shared->total[half][word] = sum;
  us_engine_hop_next(f);
  us_engine_meet();
}

/* Warp 0: the largest digit from which on the total reaches the target, and what is left of the target. A top_p asks for that
 * share of the whole instead. */
static __device__ void us_engine_find_digit(const struct us_engine_filter *f, double top_p, uint64_t target) {
  const uint32_t lane = threadIdx.x, all = 0xffffffffu;
  const uint64_t *a = f->shared->total[0], *c = f->shared->total[1];
  uint64_t own = 0, before, sum;
  for (uint32_t i = 0; i < 8; i++) own += a[255 - 8 * lane - i] + c[255 - 8 * lane - i];
  sum = own;
  for (uint32_t d = 1; d < 32; d *= 2) {
    uint64_t o = __shfl_up_sync(all, sum, d);
    if (lane >= d) sum += o;
  }
  uint64_t mass = __shfl_sync(all, sum, 31);
  if (top_p > 0.0) {
    target = (uint64_t)((double)mass * top_p);
    if (!target) target = 1;
  }
  if (lane == 0 && mass < target) f->shared->digit = US_ENGINE_NONE;
  before = sum - own;
  if (before >= target || sum < target) return;
  uint32_t digit = 255 - 8 * lane;
  for (uint64_t m; before + (m = a[digit] + c[digit]) < target; digit--) before += m;
  f->shared->digit = digit;
  f->shared->target = target - before;
}

/* Exclusive sum over the 512 threads; *ret_total: over all. */
static __device__ uint32_t us_engine_count_before(struct us_engine_select_shared *shared, uint32_t count,
                                                  uint32_t *ret_total) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, all = 0xffffffffu;
  uint32_t sum = count, before = 0, total = 0;
  for (uint32_t d = 1; d < 32; d *= 2) {
    uint32_t o = __shfl_up_sync(all, sum, d);
    if (lane >= d) sum += o;
  }
  us_engine_meet();
  if (lane == 31) shared->counts[warp] = sum;
  us_engine_meet();
  for (uint32_t w = 0; w < US_ENGINE_COMPUTE_WARPS; w++) {
    if (w < warp) before += shared->counts[w];
    total += shared->counts[w];
  }
  *ret_total = total;
  return before + sum - count;
}

/* The id of the nth (from 0) token of the row with this key, as the own piece needs to know it: us_cut_nth. One hop. */
static __device__ uint32_t us_engine_cut_nth(struct us_engine_filter *f, uint32_t key, uint64_t n) {
  const struct us_engine_piece *piece = &f->piece;
  uint32_t past = 4 * piece->end < f->vocab ? 4 * piece->end : f->vocab, first = 4 * piece->begin;
  uint32_t chunk = (past - first + US_ENGINE_COMPUTE - 1) / US_ENGINE_COMPUTE, count = 0, total;
  uint32_t from = first + threadIdx.x * chunk, to = from + chunk < past ? from + chunk : past;
  for (uint32_t id = from; id < to; id++) count += us_sample_key(__ldcg(piece->logits + id)) == key;
  uint32_t before = us_engine_count_before(f->shared, count, &total), outside;
  if (threadIdx.x == 0) us_engine_hop_put(f, 0, total);
  uint32_t others = (uint32_t)us_engine_hop_words(f);
  us_engine_count_before(f->shared, threadIdx.x < f->part ? others : 0, &outside);
  if (threadIdx.x == 0) f->shared->last = n < outside ? 0 : UINT32_MAX;
  us_engine_meet();
  uint64_t skip = n - outside - before;
  if (n >= (uint64_t)outside + before && skip < count)
    for (uint32_t id = from; id < to; id++)
      if (us_sample_key(__ldcg(piece->logits + id)) == key && skip-- == 0) f->shared->last = id;
  us_engine_meet();
  return f->shared->last;
}

/* us_cut_reach; with top_p the target is that share of the mass within. */
static __device__ struct us_cut us_engine_cut_reach(struct us_engine_filter *f, struct us_cut within,
                                                    float top_p, uint64_t target) {
  const bool by_mass = top_p > 0.0f;
  uint32_t key = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    us_engine_measure(f, within, by_mass, key, (uint32_t)shift);
    us_engine_add_parts(f);
    if (threadIdx.x < 32) us_engine_find_digit(f, shift == 24 ? (double)top_p : 0.0, target);
    us_engine_meet();
    if (f->shared->digit == US_ENGINE_NONE) return within;
    target = f->shared->target;
    key |= f->shared->digit << shift;
  }
  uint64_t each = 1;
  if (by_mass) each = us_engine_weight(f, us_float_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key));
  return {key, us_engine_cut_nth(f, key, each ? (target + each - 1) / each - 1 : 0)};
}

/* us_cut_min_p. One hop. */
static __device__ struct us_cut us_engine_cut_min_p(struct us_engine_filter *f, struct us_cut within,
                                                    float min_p) {
  uint64_t least = (uint64_t)((double)min_p * 0x1p40);
  uint32_t key = us_sample_key(f->max);
  for (uint32_t q = f->piece.begin + threadIdx.x; q < f->piece.end; q += US_ENGINE_COMPUTE) {
    float x[4];
    us_engine_quad(&f->piece, q, x);
    for (uint32_t j = 0; j < 4; j++) {
      uint32_t k = us_sample_key(x[j]);
      if (4 * q + j < f->vocab && k < key && us_engine_weight(f, x[j]) >= least) key = k;
    }
  }
  us_engine_meet();
  if (threadIdx.x == 0) f->shared->least = key;
  us_engine_meet();
  atomicMin(&f->shared->least, key);
  us_engine_meet();
  if (threadIdx.x == 0) us_engine_hop_put(f, 0, f->shared->least);
  key = (uint32_t)us_engine_hop_words(f);
  if (threadIdx.x < f->parts) atomicMin(&f->shared->least, key);
  us_engine_meet();
  key = f->shared->least;
  if (key < within.key || (key == within.key && within.last != UINT32_MAX)) return within;
  return {key, UINT32_MAX};
}

/* ---- the draw ------------------------------------------------------------------------------------------------------------------- */

/* us_sample_gumbel over what the cut keeps: thread 0 of part 0 has the token. The last hop of a row. */
static __device__ uint32_t us_engine_filter_draw(struct us_engine_filter *f, struct us_cut cut,
                                                 struct us_noise noise, uint32_t max_id) {
  struct us_engine_best best = us_engine_best_none();
  for (uint32_t q = f->piece.begin + threadIdx.x; q < f->piece.end; q += US_ENGINE_COMPUTE) {
    float x[4];
    uint32_t bits[4], kept = 0;
    us_engine_quad(&f->piece, q, x);
    for (uint32_t j = 0; j < 4; j++) kept |= (uint32_t)us_cut_keeps(cut, x[j], 4 * q + j) << j;
    if (!kept) continue;
    us_philox_quad(noise.key, noise.position, noise.sample, q, noise.stream, bits);
    for (uint32_t j = 0; j < 4; j++) {
      float score = fmaf(x[j], f->inv_float, us_gumbel_bits(bits[j]));
      if (kept >> j & 1 && score > best.score) best.score = score, best.id = 4 * q + j;
    }
  }
  best = us_engine_best_of_lanes(best, 1);
  if (threadIdx.x % 32 == 0) f->shared->best[threadIdx.x / 32] = best;
  us_engine_meet();
  f->slot = US_ENGINE_HOP_SLOTS - 1; /* its own, so that the next row may begin with slot 0 */
  if (threadIdx.x == 0) {
    for (uint32_t w = 1; w < US_ENGINE_COMPUTE_WARPS; w++) us_engine_best_add(&best, f->shared->best[w]);
    us_engine_hop_put(f, 0, us_float_bits(best.score) | (uint64_t)best.id << 32);
  }
  uint64_t word = us_engine_hop_words(f);
  best = us_engine_best_none();
  if (threadIdx.x < f->parts)
    best.score = us_float_from_bits((uint32_t)word), best.id = (uint32_t)(word >> 32);
  best = us_engine_best_of_lanes(best, 1);
  return best.score > -INFINITY ? best.id : max_id;
}

/* One row: `best` is its largest logit. */
static __device__ void us_engine_filter_row(struct us_engine_filter *f, const struct us_engine_row *row,
                                            const struct us_engine_sequence *s, uint32_t max_id,
                                            int32_t *ret_drawn) {
  const struct us_sampling *sampling = &s->sampling;
  struct us_cut cut = us_cut_everything();
  f->inv_temperature = 1.0 / (double)sampling->temperature;
  f->inv_float = 1.0f / sampling->temperature;
  f->slot = 0;
  if (sampling->top_k && sampling->top_k < f->vocab) cut = us_engine_cut_reach(f, cut, 0.0f, sampling->top_k);
  if (sampling->top_p > 0.0f && sampling->top_p < 1.0f) cut = us_engine_cut_reach(f, cut, sampling->top_p, 0);
  if (sampling->min_p > 0.0f) cut = us_engine_cut_min_p(f, cut, sampling->min_p);
  struct us_noise noise = us_noise_target(s->seed, row->position + 1, s->sample);
  uint32_t token = us_engine_filter_draw(f, cut, noise, max_id);
  if (f->part == 0 && threadIdx.x == 0) *ret_drawn = (int32_t)token;
}

/* The filtered rows (bits) that this block shares in, after us_engine_gather. */
static __device__ __noinline__ void us_engine_filter_rows(const struct us_engine_block *b,
                                                          const struct us_engine_op *op, uint32_t rows,
                                                          uint32_t flag,
                                                          struct us_engine_select_shared *shared) {
  const struct us_engine_select *s = &op->select;
  const uint32_t ranks = b->rank->ranks, parts = us_engine_filter_parts(b->blocks),
                 quads = (s->vocab + 3) / 4;
  const uint32_t group = b->index / parts, groups = us_engine_filter_groups(b->blocks);
  struct us_engine_filter f = {};
  f.b = b, f.shared = shared, f.vocab = s->vocab, f.part = b->index % parts, f.parts = parts;
  f.area = (uint8_t *)b->rank->select[b->rank->rank] + group * (US_ENGINE_HOP_BYTES / US_ENGINE_ROWS);
  f.piece = {NULL, 0, s->vocab, (uint32_t)((uint64_t)quads * f.part / parts),
             (uint32_t)((uint64_t)quads * (f.part + 1) / parts)};
  if (ranks > 1) __threadfence_system();
  us_engine_meet();
  for (uint32_t r = group; r < US_ENGINE_ROWS; r += groups) {
    uint32_t at = op->row_tile * US_ENGINE_ROWS + r;
    const struct us_engine_row *row = &b->rank->state->target[at];
    struct us_engine_best best = shared->gathered[0][r];
    if (!(rows >> r & 1) || !us_engine_finite(best.max)) continue;
    f.piece.logits = ranks > 1 ? b->rank->logits_all[b->rank->rank] + (size_t)at * s->vocab
                               : s->logits + (size_t)r * s->stride;
    f.max = best.max;
    f.flag = (uint64_t)flag << 32 | r << 8;
    us_engine_filter_row(&f, row, &b->rank->state->sequence[row->sequence], best.max_id,
                         b->rank->state->drawn + at);
  }
}

#endif
