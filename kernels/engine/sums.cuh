/* sums.cuh: what every block of every rank knows of eight rows, told to all: a word of 64 bits a row and column, 16 bytes that carry
 * their flag.
 *
 *     us_engine_sums_put(b, &place, value, extra);                 // threads < 8 * columns, this block's words, to every rank
 *     sum = us_engine_sums_total(b, &place, item);                 // one warp: over all blocks; item: row * columns + column
 *
 * Sums are of integers, so the number of blocks does not matter. A place is used once a round: when a block stores again, every rank
 * has passed the target's SELECT between, and so has read (select.cuh).
 */
#ifndef US_KERNELS_ENGINE_SUMS_CUH
#define US_KERNELS_ENGINE_SUMS_CUH

#include "kernels/engine/candidate.cuh"

struct us_engine_sums {
  uint32_t number; /* MASSES and EMISSION: a row tile; SURE: of the drafter's SELECTs, from 0 */
  uint32_t before; /* words a row of its places before this one: MASSES, then EMISSION, then SURE */
  uint32_t columns;
};

static __device__ __forceinline__ uint8_t *us_engine_sums_at(const struct us_engine_block *b,
                                                             const struct us_engine_sums *p, uint32_t rank) {
  const uint32_t n = b->rank->ranks * b->blocks;
  return (uint8_t *)b->rank->select[rank] + US_ENGINE_HOP_BYTES +
         b->rank->selects * us_engine_candidate_bytes(b->rank->ranks, b->blocks) +
         p->number * us_engine_sums_bytes(b->rank->ranks, b->blocks) +
         (size_t)n * US_ENGINE_ROWS * p->before * 16;
}

static __device__ __forceinline__ uint64_t us_engine_sums_flag(const struct us_engine_block *b) {
  return (uint64_t)(b->rank->state->round + 1) << 32;
}

/* value, extra: of all items, in shared memory. */
static __device__ __forceinline__ void us_engine_sums_put(const struct us_engine_block *b,
                                                          const struct us_engine_sums *p,
                                                          const uint64_t *value, const uint32_t *opt_extra) {
  const uint32_t items = US_ENGINE_ROWS * p->columns, item = threadIdx.x;
  if (item >= items) return;
  struct us_engine_pair pair = {value[item], us_engine_sums_flag(b) | (opt_extra ? opt_extra[item] : 0)};
  for (uint32_t to = 0; to < b->rank->ranks; to++)
    us_store_pair(us_engine_sums_at(b, p, to) +
                      ((size_t)(b->rank->rank * b->blocks + b->index) * items + item) * 16,
                  pair);
}

/* One warp: this lane's share of the blocks, from `e` on, 32 apart; n of them exist. */
static __device__ __forceinline__ uint32_t us_engine_sums_take(const struct us_engine_block *b,
                                                               const struct us_engine_sums *p, uint32_t item,
                                                               uint32_t e, struct us_engine_pair *pair) {
  const uint32_t blocks = b->rank->ranks * b->blocks, items = US_ENGINE_ROWS * p->columns,
                 left = e < blocks ? (blocks - e + 31) / 32 : 0,
                 n = left < US_ENGINE_BATCH ? left : US_ENGINE_BATCH;
  us_engine_await_pairs(b, us_engine_sums_at(b, p, b->rank->rank) + ((size_t)e * items + item) * 16,
                        32 * items * 16, n, us_engine_sums_flag(b), 0xffffffffull << 32, pair);
  return n;
}

/* One warp, all its lanes. */
static __device__ __forceinline__ uint64_t us_engine_sums_total(const struct us_engine_block *b,
                                                                const struct us_engine_sums *p,
                                                                uint32_t item) {
  uint64_t sum = 0;
  for (uint32_t e = threadIdx.x % 32; e < b->rank->ranks * b->blocks; e += 32 * US_ENGINE_BATCH) {
    struct us_engine_pair pair[US_ENGINE_BATCH];
    uint32_t n = us_engine_sums_take(b, p, item, e, pair);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
      if (i < n) sum += pair[i].low;
  }
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

#endif
