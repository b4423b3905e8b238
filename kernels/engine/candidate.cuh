/* candidate.cuh: what SELECT looks at and passes between blocks: pieces of a row, best tokens, 16 bytes that travel whole.
 *
 *     us_store_pair(place, {value, flag});                                     // one store, on any GPU
 *     us_engine_await_pairs(b, place, stride, n, flag, ~0ull, pairs);          // loads until all n carry the flag
 *     us_engine_quad(&piece, q, x);                                            // logits of ids 4q .. 4q + 3
 *     us_engine_best_add(&best, other);                                        // any order gives the same
 *
 * PTX ISA 8.3: b128 loads and stores are single accesses, so a value and its flag arrive together: no fence, no counter.
 */
#ifndef US_KERNELS_ENGINE_CANDIDATE_CUH
#define US_KERNELS_ENGINE_CANDIDATE_CUH

#include "kernels/engine/block.cuh"
#include "kernels/engine/round.h"

#define US_ENGINE_BATCH 8 /* loads in flight a thread */

/* ---- 16 bytes that travel whole ---------------------------------------------------------------------------------------------- */

struct us_engine_pair {
  uint64_t low, high;
};
static __device__ __forceinline__ struct us_engine_pair us_load_pair(const void *p) {
  struct us_engine_pair v;
  asm volatile("{ .reg .b128 v; ld.relaxed.sys.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
               : "=l"(v.low), "=l"(v.high)
               : "l"(p)
               : "memory");
  return v;
}
static __device__ __forceinline__ void us_store_pair(void *p, struct us_engine_pair v) {
  asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.sys.global.b128 [%0], v; }" ::"l"(p),
               "l"(v.low), "l"(v.high)
               : "memory");
}

/* One thread: up to US_ENGINE_BATCH pairs, `stride` bytes apart, of which n (or all) exist, once `high & mask` of each is `flag`. */
static __device__ __forceinline__ void us_engine_await_pairs(const struct us_engine_block *b,
                                                             const uint8_t *from, uint32_t stride, uint32_t n,
                                                             uint64_t flag, uint64_t mask,
                                                             struct us_engine_pair *pair) {
  struct us_engine_watch watch = {0, 0};
  for (;;) {
    uint32_t missing = US_ENGINE_NONE;
    uint64_t have = 0;
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
      if (i < n) pair[i] = us_load_pair(from + (size_t)i * stride);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
      if (i < n && (pair[i].high & mask) != flag) missing = i, have = pair[i].high;
    if (missing == US_ENGINE_NONE) return;
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_SELECT, missing, have, flag);
  }
}

/* ---- candidates ---------------------------------------------------------------------------------------------------------------- */

/* The best score with the lowest id, and the largest logit. A score of -Inf is nobody's: then the largest logit's token wins. */
struct us_engine_best {
  float score;
  uint32_t id;
  float max;
  uint32_t max_id;
};
static __device__ __forceinline__ struct us_engine_best us_engine_best_none(void) {
  return {-INFINITY, US_ENGINE_NONE, -INFINITY, US_ENGINE_NONE};
}
static __device__ __forceinline__ void us_engine_best_add(struct us_engine_best *best,
                                                          struct us_engine_best o) {
  if (o.max > best->max || (o.max == best->max && o.max_id < best->max_id))
    best->max = o.max, best->max_id = o.max_id;
  if (o.score > best->score || (o.score == best->score && o.id < best->id))
    best->score = o.score, best->id = o.id;
  if (best->score == -INFINITY) best->id = best->max_id;
}
/* Over lanes `from`, 2 from, ... 16 apart. */
static __device__ __forceinline__ struct us_engine_best us_engine_best_of_lanes(struct us_engine_best best,
                                                                                int from) {
  for (int lanes = 16; lanes >= from; lanes /= 2) {
    struct us_engine_best o = {
        __shfl_xor_sync(0xffffffffu, best.score, lanes), __shfl_xor_sync(0xffffffffu, best.id, lanes),
        __shfl_xor_sync(0xffffffffu, best.max, lanes), __shfl_xor_sync(0xffffffffu, best.max_id, lanes)};
    us_engine_best_add(&best, o);
  }
  return best;
}

/* Quads [begin, end) of a row's logits of ids [first, past). */
struct us_engine_piece {
  const float *logits; /* of id `first` */
  uint32_t first, past, begin, end;
};

/* This block's piece of the share, in quads of 4 ids. */
static __device__ struct us_engine_piece us_engine_piece_of(const struct us_engine_block *b,
                                                            const struct us_engine_select *s,
                                                            const float *logits) {
  struct us_engine_piece piece = {logits, s->first, s->first + s->count, 0, 0};
  uint32_t from = s->first / 4, quads = (s->first + s->count + 3) / 4 - from;
  piece.begin = from + quads * b->index / b->blocks; /* below 2^32: 2^20 quads at most */
  piece.end = from + quads * (b->index + 1) / b->blocks;
  return piece;
}

/* The four logits of quad q; NaN, which never wins, for ids that are not there. */
static __device__ __forceinline__ void us_engine_quad(const struct us_engine_piece *piece, uint32_t q,
                                                      float x[4]) {
  const float *p = piece->logits + ((int64_t)4 * q - piece->first);
  if (4 * q >= piece->first && 4 * q + 4 <= piece->past && (uintptr_t)p % 16 == 0) {
    float4 v = __ldcg((const float4 *)p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    return;
  }
#pragma unroll
  for (uint32_t j = 0; j < 4; j++)
    x[j] = 4 * q + j >= piece->first && 4 * q + j < piece->past ? __ldcg(p + j)
                                                                : us_float_from_bits(0x7fc00000u);
}

/* Candidates in a rank's buffer: (ranks, blocks, 8) of place `number`, then 8 of the mailbox, or of a Markov head's slot the tokens that
 * filtered rows drew. What they carry differs from what the place held before. */
static __device__ __forceinline__ uint8_t *us_engine_candidates(const struct us_engine_block *b,
                                                                uint32_t number, uint32_t rank) {
  return (uint8_t *)b->rank->select[rank] + US_ENGINE_HOP_BYTES +
         number * us_engine_candidate_bytes(b->rank->ranks, b->blocks);
}
static __device__ __forceinline__ uint32_t us_engine_select_flag(const struct us_engine_block *b,
                                                                 uint32_t number) {
  return b->rank->state->round * US_ENGINE_SELECTS + number + 1;
}

static __device__ __forceinline__ bool us_engine_finite(float max) {
  return max > -INFINITY && max < INFINITY;
}

#endif
