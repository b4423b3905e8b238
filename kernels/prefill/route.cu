/* route.cu: logits to experts, and the rows of each expert.
 *
 * Bound: latency. A warp chooses for a row, its lanes hold E / 32 choices each. One block then groups: a bit a row in each
 * expert's set, so that a pair's place among its expert's is a count of bits, whatever order the threads run in.
 */
#include "base/philox.h"
#include "kernels/cpu/exp.h"
#include "kernels/prefill/prefill.h"

#define ROUTE_WARPS   4
#define GROUP_THREADS 1024
#define LANE_EXPERTS  (US_PREFILL_MAX_EXPERTS / 32)

/* ---- choosing ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float sigmoid(float logit) {
  return 1.0f / (1.0f + us_expf(-logit));
}

/* Orders (choice, lower id first) as unsigned integers; a NaN counts as -Inf, -0 as 0. Never 0. */
static __device__ __forceinline__ uint64_t choice_key(float choice, uint32_t e) {
  choice = isnan(choice) ? -INFINITY : choice + 0.0f;
  uint32_t bits = __float_as_uint(choice), ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)ordered << 32 | (0xffffffffu - e);
}

static __device__ __forceinline__ uint64_t warp_max(uint64_t x) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    uint64_t other = __shfl_xor_sync(0xffffffffu, x, step);
    x = other > x ? other : x;
  }
  return x;
}

static __device__ __forceinline__ float logit_of(const struct us_prefill_route *r, uint32_t row, uint32_t e) {
  float sum = r->logits[(size_t)row * r->stride + e];
  for (uint32_t p = 1; p < r->parts; p++) sum += r->logits[p * r->part + (size_t)row * r->stride + e];
  return sum;
}

/* What to choose by: of experts 32 i + lane, 0 where there is none. */
static __device__ __forceinline__ void choice_keys(const struct us_prefill_route *r, uint32_t row,
                                                   uint32_t lane, uint64_t *key) {
#pragma unroll
  for (int i = 0; i < LANE_EXPERTS; i++) {
    uint32_t e = i * 32 + lane;
    key[i] = 0;
    if (e < r->E)
      key[i] = choice_key(sigmoid(logit_of(r, row, e)) + (r->opt_bias ? r->opt_bias[e] : 0.0f), e);
  }
}

/* The same of random words: us_route_random in kernels/engine/route.cuh, sample 0. */
static __device__ __forceinline__ void random_keys(const struct us_prefill_route *r, uint32_t row,
                                                   uint32_t lane, uint64_t *key) {
  struct us_philox_key philox = us_philox_key(r->uniform_seed);
#pragma unroll
  for (int q = 0; q < LANE_EXPERTS / 4; q++) {
    uint32_t out[4];
    us_philox_quad(philox, r->position + row, 0, q * 32 + lane, US_STREAM_ROUTE | r->layer << 8, out);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t e = (4 * q + j) * 32 + lane;
      key[4 * q + j] = e < r->E ? (uint64_t)((out[j] >> 1) + 1) << 32 | (0xffffffffu - e) : 0;
    }
  }
}

/* Lane k holds the k-th chosen id, by falling choice. */
static __device__ __forceinline__ uint32_t choose(const struct us_prefill_route *r, uint32_t row,
                                                  uint32_t lane) {
  uint64_t key[LANE_EXPERTS];
  uint32_t mine = 0xffffffffu;
  if (r->uniform)
    random_keys(r, row, lane, key);
  else
    choice_keys(r, row, lane, key);
  for (uint32_t k = 0; k < r->top_k; k++) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) best = key[i] > best ? key[i] : best;
    best = warp_max(best);
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++)
      if (key[i] == best) key[i] = 0;
    if (lane == k) mine = 0xffffffffu - (uint32_t)best;
  }
  return mine;
}

static __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    prefill_choose(const __grid_constant__ struct us_prefill_route r) {
  uint32_t row = blockIdx.x * ROUTE_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= r.rows) return;
  uint32_t id = choose(&r, row, lane), rank = 0;
  for (uint32_t k = 0; k < r.top_k; k++) rank += __shfl_sync(0xffffffffu, id, k) < id;
  /* Lane k takes the k-th smallest id. */
  uint32_t sorted = id;
  for (uint32_t k = 0; k < r.top_k; k++) {
    uint32_t other = __shfl_sync(0xffffffffu, id, k), place = __shfl_sync(0xffffffffu, rank, k);
    if (place == lane) sorted = other;
  }
  float score = lane < r.top_k ? sigmoid(logit_of(&r, row, sorted)) : 0, sum = 0;
  for (uint32_t k = 0; k < r.top_k; k++) sum = sum + __shfl_sync(0xffffffffu, score, k);
  if (lane >= r.top_k) return;
  if (r.normalise) score = score / (sum + 1e-20f);
  r.ids[row * r.top_k + lane] = sorted;
  r.weights[row * r.top_k + lane] = score * r.scaling;
}

/* ---- grouping ---------------------------------------------------------------------------------------------------- */

struct group_shared {
  uint32_t begin[US_PREFILL_MAX_EXPERTS], tiles[US_PREFILL_MAX_EXPERTS]; /* sums of those before */
  uint32_t warp_pairs[32], warp_tiles[32];
  uint32_t bits[]; /* (E, words): rows of each expert */
};

static __device__ __forceinline__ uint32_t warp_before(uint32_t x,
                                                       uint32_t lane) { /* sum of the lanes before */
  uint32_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - x;
}

/* Thread e: where its expert's slots and tiles begin. */
static __device__ __forceinline__ void place_experts(struct group_shared *s, uint32_t count, uint32_t tiles) {
  uint32_t e = threadIdx.x, warp = e / 32, lane = e % 32;
  uint32_t begin = warp_before(count, lane), first = warp_before(tiles, lane);
  if (lane == 31) s->warp_pairs[warp] = begin + count, s->warp_tiles[warp] = first + tiles;
  __syncthreads();
  for (uint32_t w = 0; w < warp; w++) begin += s->warp_pairs[w], first += s->warp_tiles[w];
  s->begin[e] = begin, s->tiles[e] = first;
}

static __global__ void __launch_bounds__(GROUP_THREADS)
    prefill_group(const uint32_t *ids, uint32_t rows, uint32_t top_k, uint32_t E,
                  struct us_prefill_groups g) {
  extern __shared__ uint8_t raw[];
  struct group_shared *s = (struct group_shared *)raw;
  uint32_t words = (rows + 31) / 32, pairs = rows * top_k, e = threadIdx.x, count = 0;
  for (uint32_t i = threadIdx.x; i < E * words; i += GROUP_THREADS) s->bits[i] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < pairs; i += GROUP_THREADS) {
    uint32_t row = i / top_k;
    atomicOr(&s->bits[ids[i] * words + row / 32], 1u << row % 32);
  }
  __syncthreads();
  for (uint32_t w = 0; e < E && w < words; w++) count += __popc(s->bits[e * words + w]);
  uint32_t tiles = (count + US_PREFILL_EXPERT_ROWS - 1) / US_PREFILL_EXPERT_ROWS;
  place_experts(s, count, tiles);
  for (uint32_t t = 0; t < tiles; t++) {
    uint32_t first = t * US_PREFILL_EXPERT_ROWS, left = count - first;
    struct us_prefill_tile tile = {e, s->begin[e] + first,
                                   left < US_PREFILL_EXPERT_ROWS ? left : US_PREFILL_EXPERT_ROWS};
    g.tiles[s->tiles[e] + t] = tile;
  }
  if (e == GROUP_THREADS - 1) *g.tile_count = s->tiles[e] + tiles;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < pairs; i += GROUP_THREADS) {
    uint32_t row = i / top_k, expert = ids[i], slot = s->begin[expert];
    const uint32_t *bits = s->bits + expert * words;
    for (uint32_t w = 0; w < row / 32; w++) slot += __popc(bits[w]);
    slot += __popc(bits[row / 32] & ((1u << row % 32) - 1));
    g.row[slot] = row, g.pair[slot] = i;
  }
}

int us_prefill_route(const struct us_prefill_route *route, cudaStream_t stream) {
  const struct us_prefill_route *r = route;
  if (r->E > US_PREFILL_MAX_EXPERTS || !r->top_k || r->top_k > US_ENGINE_MAX_TOPK || r->top_k > r->E)
    return cudaErrorInvalidValue;
  if (!r->rows) return cudaSuccess;
  size_t bytes = sizeof(struct group_shared) + (size_t)r->E * ((r->rows + 31) / 32) * 4;
  cudaError_t status =
      cudaFuncSetAttribute(prefill_group, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  prefill_choose<<<(r->rows + ROUTE_WARPS - 1) / ROUTE_WARPS, ROUTE_WARPS * 32, 0, stream>>>(*r);
  prefill_group<<<1, GROUP_THREADS, bytes, stream>>>(r->ids, r->rows, r->top_k, r->E, r->groups);
  return cudaGetLastError();
}
