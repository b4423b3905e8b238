/* cut.cuh: the cut that top-k, top-p or min-p makes in a row (struct us_cut, base/sample.h), found by up to 16 blocks.
 *
 *     cut = us_engine_cut_reach(f, &hop, within, 0.0f, top_k);     // the shortest prefix of so many tokens
 *     cut = us_engine_cut_reach(f, &hop, within, top_p, 0);        // of that share of the mass
 *     cut = us_engine_cut_min_p(f, &hop, within, min_p);
 *
 * Radix selection, 256 digits a pass and hop. The first digits are those of the distance from the largest logit, in steps of 1/8
 * (in units of T for masses), whose buckets are thin where the cut usually falls; then those of what is left of it, then those of
 * the key. As soon as 255 tokens or fewer have the digits found so far, they are gathered and sorted outright: two or three hops
 * for most rows, eight and the search for the nth of equal logits for the worst. NaN is left out: no cut keeps it from losing.
 *
 * A cut's `last` is what matters to the own piece: where many equal logits end in it, UINT32_MAX before the block with the last
 * kept token, 0 after it.
 *
 * Contents: digits; few tokens: sort them; many equal logits; the cuts.
 */
#ifndef US_KERNELS_ENGINE_CUT_CUH
#define US_KERNELS_ENGINE_CUT_CUH

#include "kernels/engine/hop.cuh"

/* ---- digits ------------------------------------------------------------------------------------------------------- */

/* What is looked for, and what is known: tokens inside `within` whose place and key have these leading bits. */
struct us_engine_reach {
  struct us_cut within;
  bool by_mass;
  float max, scale; /* of the distance from max, to steps of 1/8 */
  uint32_t place, place_mask;
  uint32_t key, key_mask;
};

static __device__ __forceinline__ float us_engine_logit_of_key(uint32_t key) {
  return us_float_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* 24 bits that rise with the logit: 8 of steps below the maximum, 16 of a step; 0 from 255 steps on. */
static __device__ __forceinline__ uint32_t us_engine_place(const struct us_engine_reach *r, float x) {
  float steps = (r->max - x) * r->scale;
  return steps < 255.0f ? 0xffffffu - (uint32_t)(steps * 65536.0f) : 0;
}

/* Which of the four tokens from `id` on are looked for, as bits. Without branches: the four run side by side. */
static __device__ __forceinline__ uint32_t us_engine_members(const struct us_engine_reach *r,
                                                             const float x[4], uint32_t id) {
  uint32_t mask = 0;
#pragma unroll
  for (uint32_t j = 0; j < 4; j++) {
    uint32_t key = us_sample_key(x[j]);
    uint32_t kept = (key > r->within.key) | ((key == r->within.key) & (id + j <= r->within.last));
    uint32_t known =
        ((us_engine_place(r, x[j]) & r->place_mask) == r->place) & ((key & r->key_mask) == r->key);
    mask |= (kept & known & (uint32_t)(x[j] == x[j])) << j;
  }
  return mask;
}

/* The digit of a pass: 0 to 2 of the place, 3 to 6 of the key. */
static __device__ __forceinline__ uint32_t us_engine_digit(const struct us_engine_reach *r, uint32_t pass,
                                                           float x) {
  if (pass < 3) return us_engine_place(r, x) >> (16 - 8 * pass) & 255;
  return us_sample_key(x) >> (24 - 8 * (pass - 3)) & 255;
}

/* Weights are below 2^41, a row has fewer than 2^18 tokens: sums of 14 bits fit a word. What weighs nothing does not count. */
static __device__ __forceinline__ void us_engine_add(struct us_engine_select_shared *shared, uint32_t digit,
                                                     uint64_t weight) {
  if (weight) atomicAdd(&shared->count[digit], 1u);
#pragma unroll
  for (uint32_t i = 0; i < 3; i++) {
    uint32_t bits = (uint32_t)(weight >> 14 * i) & 0x3fffu;
    if (bits) atomicAdd(&shared->mass[i][digit], bits);
  }
}

/* Counts and masses of this block by digit. Searched by count, most of a peaked row has digit 0 in the first pass: every thread
 * counts those for itself. */
static __device__ __forceinline__ void us_engine_measure(const struct us_engine_filter *f,
                                                         const struct us_engine_reach *r, uint32_t pass) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  uint32_t zeros = 0;
  us_engine_meet();
  if (threadIdx.x < 256)
    shared->count[threadIdx.x] = shared->mass[0][threadIdx.x] = shared->mass[1][threadIdx.x] =
        shared->mass[2][threadIdx.x] = 0;
  us_engine_meet();
  for (uint32_t base = f->piece.begin; base < f->piece.end; base += US_ENGINE_QUADS_STEP) {
    struct us_engine_quads quads;
    us_engine_quads_load(f, base, &quads);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_QUADS; i++) {
      uint32_t mask = us_engine_members(r, quads.x[i], us_engine_quad_id(base, i));
      if (!mask) continue;
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        uint32_t digit = us_engine_digit(r, pass, quads.x[i][j]), in = mask >> j & 1;
        if (r->by_mass) {
          if (in) us_engine_add(shared, digit, us_engine_weight(f, quads.x[i][j]));
        } else {
          zeros += in & (digit == 0);
          if (in & (digit != 0)) atomicAdd(&shared->count[digit], 1u);
        }
      }
    }
  }
  zeros = __reduce_add_sync(0xffffffffu, zeros);
  if (zeros && threadIdx.x % 32 == 0) atomicAdd(&shared->count[0], zeros);
  us_engine_meet();
}

/* One hop: totals of all parts. */
static __device__ __forceinline__ void us_engine_add_parts(const struct us_engine_filter *f, bool by_mass,
                                                           uint32_t hop) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t word = threadIdx.x % 256, half = threadIdx.x / 256, first = half * US_ENGINE_BATCH;
  if (!half) {
    uint64_t mass = shared->mass[0][word] + ((uint64_t)shared->mass[1][word] << 14) +
                    ((uint64_t)shared->mass[2][word] << 28);
    if (!by_mass) mass = shared->count[word];
    us_engine_hop_put(f, hop, word, mass, shared->count[word]);
  }
  struct us_engine_pair pair[US_ENGINE_BATCH];
  uint32_t n = f->parts > first ? f->parts - first : 0, count = 0;
  us_engine_await_pairs(f->b, us_engine_hop_at(f, hop, first, word), US_ENGINE_HOP_WORDS * 16, n,
                        us_engine_hop_flag(f, hop), US_ENGINE_HOP_FLAG, pair);
  uint64_t mass = 0;
#pragma unroll
  for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
    if (i < n) mass += pair[i].low, count += (uint32_t)(pair[i].high & ~US_ENGINE_HOP_FLAG);
  shared->total_mass[half][word] = mass;
  shared->total_count[half][word] = count;
  us_engine_meet();
}

/* Warp 0: the largest digit from which on the total reaches the target, and what is left of the target. A top_p asks for that
 * share of the whole instead. */
static __device__ __forceinline__ void us_engine_find_digit(double top_p, uint64_t target) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t lane = threadIdx.x, all = 0xffffffffu;
  const uint64_t *a = shared->total_mass[0], *c = shared->total_mass[1];
  uint64_t own = 0, sum;
  for (uint32_t i = 0; i < 8; i++) own += a[255 - 8 * lane - i] + c[255 - 8 * lane - i];
  sum = own;
  for (uint32_t d = 1; d < 32; d *= 2) {
    uint64_t o = __shfl_up_sync(all, sum, d);
    if (lane >= d) sum += o;
  }
  uint64_t mass = __shfl_sync(all, sum, 31), before = sum - own;
  if (top_p > 0.0) {
    target = (uint64_t)((double)mass * top_p);
    if (!target) target = 1;
  }
  if (lane == 0 && mass < target) shared->digit = US_ENGINE_NONE;
  if (before >= target || sum < target) return;
  uint32_t digit = 255 - 8 * lane;
  for (uint64_t m; before + (m = a[digit] + c[digit]) < target; digit--) before += m;
  shared->digit = digit;
  shared->inside = shared->total_count[0][digit] + shared->total_count[1][digit];
  shared->target = target - before;
}

/* ---- few tokens: sort them ---------------------------------------------------------------------------------------- */

/* shared->member: this block's tokens, in any order. */
static __device__ __forceinline__ void us_engine_collect(const struct us_engine_filter *f,
                                                         const struct us_engine_reach *r) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  if (threadIdx.x == 0) shared->members = 0;
  us_engine_meet();
  for (uint32_t base = f->piece.begin; base < f->piece.end; base += US_ENGINE_QUADS_STEP) {
    struct us_engine_quads quads;
    us_engine_quads_load(f, base, &quads);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_QUADS; i++) {
      uint32_t id = us_engine_quad_id(base, i), mask = us_engine_members(r, quads.x[i], id);
      if (!mask) continue;
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        if (!(mask >> j & 1) || (r->by_mass && !us_engine_weight(f, quads.x[i][j]))) continue;
        shared->member[atomicAdd(&shared->members, 1u)] =
            (uint64_t)us_sample_key(quads.x[i][j]) << 32 | (uint32_t) ~(id + j);
      }
    }
  }
  us_engine_meet();
}

/* One hop: thread t < total gets the t-th token of all blocks; the others 0, below any token. */
static __device__ __forceinline__ uint64_t us_engine_share_members(const struct us_engine_filter *f,
                                                                   uint32_t hop, uint32_t total) {
  const struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t t = threadIdx.x;
  if (t < shared->members) us_engine_hop_put(f, hop, t + 1, shared->member[t], 0);
  if (t == 0) us_engine_hop_put(f, hop, 0, shared->members, 0);
  uint32_t count = t % 32 < f->parts ? (uint32_t)us_engine_hop_get(f, hop, t % 32, 0) : 0, part = 0, word = t;
  for (uint32_t p = 0; p < f->parts; p++) {
    uint32_t n = __shfl_sync(0xffffffffu, count, (int)p);
    if (part == p && word >= n) part++, word -= n;
  }
  return t < total ? us_engine_hop_get(f, hop, part, word + 1) : 0;
}

/* The cut among the last `total` tokens: the one at which the sum in (logit descending, id ascending) reaches the target. */
static __device__ __forceinline__ struct us_cut us_engine_cut_sorted(const struct us_engine_filter *f,
                                                                     uint32_t hop,
                                                                     const struct us_engine_reach *r,
                                                                     uint32_t total, uint64_t target) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const uint32_t t = threadIdx.x;
  us_engine_collect(f, r);
  uint64_t member = us_engine_share_members(f, hop, total), before = 0, weight = 0;
  uint32_t key = (uint32_t)(member >> 32);
  if (t < total) {
    weight = r->by_mass ? us_engine_weight(f, us_engine_logit_of_key(key)) : 1;
    shared->member[t] = member, shared->weight[t] = weight;
  }
  us_engine_meet();
  for (uint32_t i = 0; t < total && i < total; i++)
    if (shared->member[i] > member) before += shared->weight[i];
  if (t < total && before < target && before + weight >= target)
    shared->key = key, shared->last = ~(uint32_t)member;
  us_engine_meet();
  return {shared->key, shared->last};
}

/* ---- many equal logits -------------------------------------------------------------------------------------------- */

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
static __device__ __forceinline__ uint32_t us_engine_cut_nth(const struct us_engine_filter *f, uint32_t hop,
                                                             uint32_t key, uint64_t n) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  const struct us_engine_piece *piece = &f->piece;
  uint32_t past = 4 * piece->end < f->vocab ? 4 * piece->end : f->vocab, first = 4 * piece->begin;
  uint32_t chunk = (past - first + US_ENGINE_COMPUTE - 1) / US_ENGINE_COMPUTE, count = 0, total;
  uint32_t from = first + threadIdx.x * chunk, to = from + chunk < past ? from + chunk : past;
  for (uint32_t id = from; id < to; id++) count += us_sample_key(__ldcg(piece->logits + id)) == key;
  uint32_t before = us_engine_count_before(shared, count, &total), outside;
  if (threadIdx.x == 0) us_engine_hop_put(f, hop, 0, total, 0);
  uint32_t others = (uint32_t)us_engine_hop_words(f, hop);
  us_engine_count_before(shared, threadIdx.x < f->part ? others : 0, &outside);
  if (threadIdx.x == 0) shared->last = n < outside ? 0 : UINT32_MAX;
  us_engine_meet();
  uint64_t skip = n - outside - before;
  if (n >= (uint64_t)outside + before && skip < count)
    for (uint32_t id = from; id < to; id++)
      if (us_sample_key(__ldcg(piece->logits + id)) == key && skip-- == 0) shared->last = id;
  us_engine_meet();
  return shared->last;
}

/* ---- the cuts ----------------------------------------------------------------------------------------------------- */

/* us_cut_reach; with top_p the target is that share of the mass within. */
static __device__ __forceinline__ struct us_cut us_engine_cut_reach(const struct us_engine_filter *f,
                                                                    uint32_t *hop, struct us_cut within,
                                                                    float top_p, uint64_t target) {
  const struct us_engine_select_shared *shared = us_engine_select_shared();
  const bool by_mass = top_p > 0.0f;
  struct us_engine_reach r = {within, by_mass, f->max, 8.0f * (by_mass ? f->inv_float : 1.0f), 0, 0, 0, 0};
  for (uint32_t pass = 0; pass < 7; pass++) {
    us_engine_measure(f, &r, pass);
    us_engine_add_parts(f, by_mass, (*hop)++);
    if (threadIdx.x < 32) us_engine_find_digit(pass ? 0.0 : (double)top_p, target);
    us_engine_meet();
    const uint32_t digit = shared->digit, inside = shared->inside;
    if (digit == US_ENGINE_NONE) return within;
    target = shared->target;
    if (pass < 3)
      r.place |= digit << (16 - 8 * pass), r.place_mask |= 255u << (16 - 8 * pass);
    else
      r.key |= digit << (48 - 8 * pass), r.key_mask |= 255u << (48 - 8 * pass);
    if (inside <= US_ENGINE_MEMBERS) return us_engine_cut_sorted(f, (*hop)++, &r, inside, target);
  }
  uint64_t each = by_mass ? us_engine_weight(f, us_engine_logit_of_key(r.key)) : 1;
  return {r.key, us_engine_cut_nth(f, (*hop)++, r.key, (target + each - 1) / each - 1)};
}

/* us_cut_min_p. One hop. */
static __device__ __forceinline__ struct us_cut us_engine_cut_min_p(const struct us_engine_filter *f,
                                                                    uint32_t *hop, struct us_cut within,
                                                                    float min_p) {
  struct us_engine_select_shared *shared = us_engine_select_shared();
  uint64_t least = (uint64_t)((double)min_p * 0x1p40);
  uint32_t key = us_sample_key(f->max);
  for (uint32_t base = f->piece.begin; base < f->piece.end; base += US_ENGINE_QUADS_STEP) {
    struct us_engine_quads quads;
    us_engine_quads_load(f, base, &quads);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_QUADS; i++)
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        float x = quads.x[i][j];
        uint32_t k = us_sample_key(x);
        if ((x == x) & (k < key) && us_engine_weight(f, x) >= least) key = k;
      }
  }
  us_engine_meet();
  if (threadIdx.x == 0) shared->key = key;
  us_engine_meet();
  atomicMin(&shared->key, key);
  us_engine_meet();
  if (threadIdx.x == 0) us_engine_hop_put(f, *hop, 0, shared->key, 0);
  key = (uint32_t)us_engine_hop_words(f, (*hop)++);
  if (threadIdx.x < f->parts) atomicMin(&shared->key, key);
  us_engine_meet();
  key = shared->key;
  if (key < within.key || (key == within.key && within.last != UINT32_MAX)) return within;
  return {key, UINT32_MAX};
}

#endif
