/* sample_train.cu: a block draws a row's token.
 *
 * Bound: bytes, 4 a logit; with noise a Philox quad every 4 logits, whose two logarithms most logits are spared by a bound. A filter
 * reads the row, from L1 and L2, four times for every cut: radix selection by 8 bits of the key, as us_cut_reach.
 */
#include "kernels/sample/sample_train.h"

#define THREADS 256
#define WARPS   (THREADS / 32)

struct shared {
  unsigned long long measure[256], mass[WARPS], target;
  uint32_t digit, reached, last;
  float score[WARPS], max[WARPS];
  uint32_t id[WARPS];
};

/* --- the likeliest --- */

struct best {
  float score, max; /* max: of the logits */
  uint32_t id;      /* of the score; the lowest among equals */
};

static __device__ __forceinline__ void take_better(struct best *best, float score, uint32_t id) {
  if (score > best->score || (score == best->score && id < best->id)) best->score = score, best->id = id;
}

/* Of the block, in all its threads. */
static __device__ struct best best_of_block(struct best best, struct shared *shared) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    best.max = fmaxf(best.max, __shfl_xor_sync(~0u, best.max, step));
    float score = __shfl_xor_sync(~0u, best.score, step);
    uint32_t id = __shfl_xor_sync(~0u, best.id, step);
    take_better(&best, score, id);
  }
  __syncthreads(); /* the last one's readers are done */
  if (threadIdx.x % 32 == 0) {
    shared->score[threadIdx.x / 32] = best.score, shared->id[threadIdx.x / 32] = best.id;
    shared->max[threadIdx.x / 32] = best.max;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    best.max = fmaxf(best.max, shared->max[w]);
    take_better(&best, shared->score[w], shared->id[w]);
  }
  return best;
}

/* Greedy without a temperature, else Gumbel-max over what the cut keeps. */
static __device__ struct best scan(const struct us_sample_train &s, const float *row, struct us_noise noise,
                                   float temperature, struct us_cut cut, struct shared *shared) {
  struct best best = {-INFINITY, -INFINITY, UINT32_MAX};
  const bool noisy = temperature > 0.0f;
  const float inv = noisy ? 1.0f / temperature : 1.0f;
  for (uint32_t q = threadIdx.x; q < s.N / 4; q += THREADS) {
    const float4 four = *(const float4 *)(row + 4 * q);
    const float x[4] = {four.x, four.y, four.z, four.w};
    uint32_t bits[4];
    if (noisy) us_philox_quad(noise.key, noise.position, noise.sample, q, noise.stream, bits);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) {
      float score = x[j];
      if (x[j] > best.max) best.max = x[j];
      if (noisy) {
        if (fmaf(x[j], inv, us_gumbel_bound(bits[j])) < best.score || !us_cut_keeps(cut, x[j], 4 * q + j))
          continue;
        score = fmaf(x[j], inv, us_gumbel_bits(bits[j]));
      }
      if (score > best.score) best.score = score, best.id = 4 * q + j;
    }
  }
  return best_of_block(best, shared);
}

/* --- filters: base/sample.h by a block --- */

static __device__ uint64_t mass_of(const float *row, uint32_t N, float max, double inv, struct us_cut cut,
                                   struct shared *shared) {
  unsigned long long mass = 0;
  for (uint32_t i = threadIdx.x; i < N; i += THREADS)
    if (us_cut_keeps(cut, row[i], i)) mass += us_sample_weight(row[i], max, inv);
#pragma unroll
  for (int step = 16; step; step /= 2) mass += __shfl_xor_sync(~0u, mass, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared->mass[threadIdx.x / 32] = mass;
  __syncthreads();
  mass = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) mass += shared->mass[w];
  return mass;
}

/* us_cut_nth: ids in runs of a block. */
static __device__ uint32_t nth_of(const float *row, uint32_t N, uint32_t key, uint64_t n,
                                  struct shared *shared) {
  for (uint32_t first = 0; first < N; first += THREADS) {
    uint32_t i = first + threadIdx.x;
    uint32_t found = __syncthreads_count(i < N && us_sample_key(row[i]) == key);
    if (n >= found) {
      n -= found;
      continue;
    }
    if (threadIdx.x == 0)
      for (uint32_t k = first; k < N; k++)
        if (us_sample_key(row[k]) == key && n-- == 0) {
          shared->last = k;
          break;
        }
    __syncthreads();
    return shared->last;
  }
  return UINT32_MAX;
}

/* The digit at which the measure reaches the target; false: nowhere. */
static __device__ void find_digit(struct shared *shared) {
  int b = 255;
  unsigned long long target = shared->target;
  while (b > 0 && shared->measure[b] < target) target -= shared->measure[b--];
  shared->reached = b > 0 || shared->measure[0] >= target;
  shared->target = target;
  shared->digit = (uint32_t)b;
}

static __device__ struct us_cut reach(const float *row, uint32_t N, float max, double inv,
                                      struct us_cut within, bool by_mass, uint64_t target,
                                      struct shared *shared) {
  uint32_t key = 0;
  __syncthreads();
  if (threadIdx.x == 0) shared->target = target;
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t above = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    shared->measure[threadIdx.x] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < N; i += THREADS) {
      uint32_t k = us_sample_key(row[i]);
      if ((k & above) != key || !us_cut_keeps(within, row[i], i)) continue;
      atomicAdd(&shared->measure[k >> shift & 255], by_mass ? us_sample_weight(row[i], max, inv) : 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) find_digit(shared);
    __syncthreads();
    if (!shared->reached) return within; /* the whole set does not reach it */
    key |= shared->digit << shift;
  }
  uint64_t each = 1, left = shared->target;
  if (by_mass) {
    uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    each = us_sample_weight(us_float_from_bits(bits), max, inv);
  }
  return {key, nth_of(row, N, key, each ? (left + each - 1) / each - 1 : 0, shared)};
}

/* us_cut_min_p: the smallest key among those heavy enough. */
static __device__ struct us_cut least(const float *row, uint32_t N, float max, double inv,
                                      struct us_cut within, float min_p, struct shared *shared) {
  const uint64_t weight = (uint64_t)((double)min_p * 0x1p40);
  uint32_t key = us_sample_key(max);
  for (uint32_t i = threadIdx.x; i < N; i += THREADS) {
    uint32_t k = us_sample_key(row[i]);
    if (k < key && us_sample_weight(row[i], max, inv) >= weight) key = k;
  }
  key = __reduce_min_sync(~0u, key);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared->id[threadIdx.x / 32] = key;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) key = min(key, shared->id[w]);
  if (key < within.key || (key == within.key && within.last != UINT32_MAX)) return within;
  return {key, UINT32_MAX};
}

static __device__ struct us_cut cut_of(const float *row, uint32_t N, const struct us_sampling &s, float max,
                                       struct shared *shared) {
  struct us_cut cut = us_cut_everything();
  const double inv = 1.0 / (double)s.temperature;
  if (s.top_k && s.top_k < N) cut = reach(row, N, max, inv, cut, false, s.top_k, shared);
  if (s.top_p > 0.0f && s.top_p < 1.0f) {
    uint64_t mass = mass_of(row, N, max, inv, cut, shared);
    uint64_t target = (uint64_t)((double)mass * (double)s.top_p);
    cut = reach(row, N, max, inv, cut, true, target ? target : 1, shared);
  }
  if (s.min_p > 0.0f) cut = least(row, N, max, inv, cut, s.min_p, shared);
  return cut;
}

/* --- rows --- */

template <bool FILTERS>
static __global__ void __launch_bounds__(THREADS)
    draw_rows(const __grid_constant__ struct us_sample_train s) {
  __shared__ struct shared shared;
  const struct us_sample_row draw = s.row[blockIdx.x];
  const float *row = s.logits + blockIdx.x * s.stride;
  if (!draw.wanted) return;
  const struct us_noise noise = us_noise_target(draw.seed, draw.position, 0);
  struct us_cut cut = us_cut_everything();
  struct best best = scan(s, row, noise, FILTERS ? 0.0f : s.sampling.temperature, cut, &shared);
  const bool finite = best.max > -INFINITY && best.max < INFINITY;
  if (FILTERS && finite) {
    cut = cut_of(row, s.N, s.sampling, best.max, &shared);
    best = scan(s, row, noise, s.sampling.temperature, cut, &shared);
  }
  if (threadIdx.x == 0) s.token[blockIdx.x] = finite ? (int32_t)best.id : -1;
}

int us_sample_train(const struct us_sample_train *sample, cudaStream_t stream) {
  const struct us_sampling *s = &sample->sampling;
  if (!sample->N || sample->N % 4 || sample->stride % 4 || sample->stride < sample->N)
    return cudaErrorInvalidValue;
  if (!sample->R) return cudaSuccess;
  bool filters = s->temperature > 0.0f && ((s->top_k && s->top_k < sample->N) ||
                                           (s->top_p > 0.0f && s->top_p < 1.0f) || s->min_p > 0.0f);
  if (filters)
    draw_rows<true><<<sample->R, THREADS, 0, stream>>>(*sample);
  else
    draw_rows<false><<<sample->R, THREADS, 0, stream>>>(*sample);
  return cudaGetLastError();
}
