/* keys.cuh: a score and its id as one number, whose maximum is the best score's lowest id, between the blocks of all ranks.
 *
 *     best = max(best, us_engine_score_key(score, id));            // any order gives the same
 *     shared->best_key[warp][r] = us_engine_best_key(best);        // of each warp for each of the eight rows; 0: none
 *     us_engine_send_keys(b, number);                              // warp 0, once all warps have theirs
 *     us_engine_gather_keys(b, number, wanted);                    // all threads: shared->half of row r, two warps each
 *
 * SELECT sends these where nothing but the best score of a row counts: 16 bytes with their flag, as us_engine_best otherwise.
 */
#ifndef US_KERNELS_ENGINE_KEYS_CUH
#define US_KERNELS_ENGINE_KEYS_CUH

#include "kernels/engine/hop.cuh"

/* Ascending with the score, then descending with the id; zeros of either sign are alike; 0, the least, for NaN. */
static __device__ __forceinline__ uint64_t us_engine_score_key(float score, uint32_t id) {
  const uint32_t bits = us_float_bits(score + 0.0f), order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return score == score ? (uint64_t)order << 32 | (uint32_t)~id : 0;
}
/* The id; 0 where no score is above -Inf. */
static __device__ __forceinline__ int32_t us_engine_key_token(uint64_t key) {
  const uint32_t least = ~us_float_bits(-INFINITY);
  return (uint32_t)(key >> 32) > least ? (int32_t) ~(uint32_t)key : 0;
}

/* Whether the best score is neither infinity, nor all are NaN. */
static __device__ __forceinline__ bool us_engine_key_is_finite(uint64_t key) {
  const uint32_t least = ~us_float_bits(-INFINITY), most = us_float_bits(INFINITY) | 0x80000000u;
  return (uint32_t)(key >> 32) > least && (uint32_t)(key >> 32) < most;
}

/* Of a warp's lanes: the best scores, and of those the lowest id. */
static __device__ __forceinline__ uint64_t us_engine_best_key(uint64_t key) {
  const uint32_t score = (uint32_t)(key >> 32), best = __reduce_max_sync(0xffffffffu, score);
  return (uint64_t)best << 32 | __reduce_max_sync(0xffffffffu, score == best ? (uint32_t)key : 0);
}

/* Warp 0: the block's best keys to every rank, four lanes a row. */
static __device__ __forceinline__ void us_engine_send_keys(const struct us_engine_block *b, uint32_t number) {
  const uint32_t r = threadIdx.x % US_ENGINE_ROWS, part = threadIdx.x / US_ENGINE_ROWS;
  uint64_t key = 0;
#pragma unroll 1
  for (uint32_t w = part; w < US_ENGINE_COMPUTE_WARPS; w += 4)
    key = max(key, us_engine_select_shared()->best_key[w][r]);
  key = max(key, __shfl_xor_sync(0xffffffffu, key, 8));
  key = max(key, __shfl_xor_sync(0xffffffffu, key, 16));
  const struct us_engine_pair pair = {key, (uint64_t)us_engine_select_flag(b, number) << 32};
#pragma unroll 1
  for (uint32_t to = part; to < b->rank->ranks; to += 4)
    us_store_pair(us_engine_candidates(b, number, to) +
                      ((b->rank->rank * b->blocks + b->index) * US_ENGINE_ROWS + r) * 16,
                  pair);
}

/* Two warps a row: the best key of all blocks of all ranks, each warp's half. */
static __device__ __forceinline__ void us_engine_gather_keys(const struct us_engine_block *b, uint32_t number,
                                                             uint32_t wanted) {
  const uint32_t r = threadIdx.x / 64, n = b->rank->ranks * b->blocks;
  const uint8_t *from = us_engine_candidates(b, number, b->rank->rank) + r * 16;
  uint64_t best = 0;
  if (!(wanted >> r & 1)) return;
#pragma unroll 1
  for (uint32_t e = threadIdx.x % 64; e < n; e += 64 * US_ENGINE_BATCH) {
    struct us_engine_pair pair[US_ENGINE_BATCH];
    us_engine_await_pairs(b, from + e * 128, 64 * 128, (n - e + 63) / 64,
                          (uint64_t)us_engine_select_flag(b, number) << 32, 0xffffffffull << 32, pair);
#pragma unroll
    for (uint32_t i = 0; i < US_ENGINE_BATCH; i++)
      if (e + 64 * i < n) best = max(best, pair[i].low);
  }
  best = us_engine_best_key(best);
  if (threadIdx.x % 32 == 0) us_engine_select_shared()->half[threadIdx.x / 32] = best;
}

/* All threads have met since us_engine_gather_keys. */
static __device__ __forceinline__ uint64_t us_engine_gathered_key(uint32_t r) {
  const struct us_engine_select_shared *shared = us_engine_select_shared();
  return max(shared->half[2 * r], shared->half[2 * r + 1]);
}

#endif
