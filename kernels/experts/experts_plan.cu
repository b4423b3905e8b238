/* experts_plan.cu: slots of (row, expert) pairs by expert, then row: a counting sort whose order no thread decides.
 *
 * A block counts 256 rows; one block turns counts into places; then a row's rank among its block's rows of an expert is the
 * number of bits before its own in the expert's mask. Integer atomics only: the result is the same every time. 131072 pairs
 * are 2 MB of traffic: bound by three launches.
 */
#include "kernels/experts/experts_train.h"

#define ROWS         256 /* of a block: a thread each */
#define MASKS        (ROWS / 32)
#define MOST_EXPERTS 1024
#define MOST_CHOSEN  32

struct plan_args {
  struct us_experts_train_plan p;
  uint32_t *counts; /* (blocks, E): rows of a block that chose an expert, then those of the blocks before */
  uint32_t blocks;
};

static __global__ void __launch_bounds__(ROWS) count_rows(const struct plan_args a) {
  extern __shared__ uint32_t count[];
  const uint32_t E = a.p.E, K = a.p.K, r = blockIdx.x * ROWS + threadIdx.x;
  for (uint32_t e = threadIdx.x; e < E; e += ROWS) count[e] = 0;
  __syncthreads();
  if (r < a.p.R)
    for (uint32_t k = 0; k < K; k++) atomicAdd(count + a.p.id[(uint64_t)r * K + k], 1);
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < E; e += ROWS) a.counts[blockIdx.x * E + e] = count[e];
}

static __device__ __forceinline__ uint32_t scan_warp(uint32_t value, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    uint32_t below = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

/* One block of 32 warps: a warp an expert at a time, then the first warp adds up the experts. */
static __global__ void __launch_bounds__(1024) place_experts(const struct plan_args a) {
  __shared__ uint32_t total[MOST_EXPERTS];
  const uint32_t E = a.p.E, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t e = warp; e < E; e += 32) {
    uint32_t before = 0;
    for (uint32_t first = 0; first < a.blocks; first += 32) {
      uint32_t b = first + lane, own = b < a.blocks ? a.counts[b * E + e] : 0, sum = scan_warp(own, lane);
      if (b < a.blocks) a.counts[b * E + e] = before + sum - own;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) total[e] = before;
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < E && a.p.opt_load; e += 1024) a.p.opt_load[e] += total[e];
  if (warp) return;
  uint32_t before = 0;
  for (uint32_t first = 0; first < E; first += 32) {
    uint32_t e = first + lane, own = e < E ? total[e] : 0, sum = scan_warp(own, lane);
    if (e < E) a.p.start[e] = before + sum - own;
    before += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) a.p.start[E] = before;
}

static __global__ void __launch_bounds__(ROWS) place_rows(const struct plan_args a) {
  extern __shared__ uint32_t mask[]; /* (E, MASKS) */
  const uint32_t E = a.p.E, K = a.p.K, t = threadIdx.x, r = blockIdx.x * ROWS + t;
  for (uint32_t i = t; i < E * MASKS; i += ROWS) mask[i] = 0;
  __syncthreads();
  if (r < a.p.R)
    for (uint32_t k = 0; k < K; k++)
      atomicOr(mask + a.p.id[(uint64_t)r * K + k] * MASKS + t / 32, 1u << t % 32);
  __syncthreads();
  if (r >= a.p.R) return;
  for (uint32_t k = 0; k < K; k++) {
    uint32_t pair = r * K + k, e = a.p.id[pair], slot = a.p.start[e] + a.counts[blockIdx.x * E + e];
    for (uint32_t i = 0; i < t / 32; i++) slot += __popc(mask[e * MASKS + i]);
    slot += __popc(mask[e * MASKS + t / 32] & ((1u << t % 32) - 1));
    a.p.slot[pair] = slot;
    a.p.row[slot] = r;
    a.p.pair[slot] = pair;
  }
}

size_t us_experts_train_plan_scratch(uint32_t R, uint32_t E) {
  return ((size_t)R + ROWS - 1) / ROWS * E * sizeof(uint32_t);
}

int us_experts_train_plan(const struct us_experts_train_plan *plan, cudaStream_t stream) {
  const struct us_experts_train_plan *p = plan;
  if (!p->E || p->E > MOST_EXPERTS || !p->K || p->K > p->E || p->K > MOST_CHOSEN ||
      (uint64_t)p->R * p->K > INT32_MAX)
    return cudaErrorInvalidValue;
  struct plan_args a = {*p, (uint32_t *)p->scratch, (p->R + ROWS - 1) / ROWS};
  if (a.blocks) count_rows<<<a.blocks, ROWS, p->E * sizeof(uint32_t), stream>>>(a);
  place_experts<<<1, 1024, 0, stream>>>(a);
  if (a.blocks) place_rows<<<a.blocks, ROWS, p->E * MASKS * sizeof(uint32_t), stream>>>(a);
  return cudaGetLastError();
}
