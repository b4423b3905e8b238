/* attention_train_forward.cuh: out and lse of GROUPS units of one set of heads a block; a group of four warps owns a unit.
 *
 * Keys come in tiles of KEYS, two tiles of keys and two of values in shared memory. While the tensor cores add one tile's
 * p v, the group takes the exponentials of the next tile's scores (Shah et al., FlashAttention-3, 2024, section 3.2); other
 * groups of the SM fill what waiting is left.
 *
 * Bound: wgmma, 2 Q + 2 V flops a score; from L2 come 2 (Q + V) bytes a key and block, so that blocks of few rows wait for L2
 * (5 TB/s): 64 GROUPS flops a byte.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_FORWARD_CUH
#define US_KERNELS_ATTENTION_TRAIN_FORWARD_CUH

#include "kernels/attention_seq/attention_train_tile.cuh"

template <int Q, int V, int KEYS, int GROUPS> struct us_forward_layout {
  static constexpr uint32_t unit = US_UNIT_ROWS * Q * 2; /* bytes of a unit's queries */
  static constexpr uint32_t key = KEYS * Q * 2, value = KEYS * V * 2;
  static constexpr uint32_t keys = GROUPS * unit, values = keys + 2 * key, offsets = values + 2 * value,
                            bytes = offsets + 32 * 4;
};

/* A group's state: rows lane / 4 and + 8 of each warp's 16. */
template <int V> struct us_forward_state {
  float out[V / 8][4];
  float max[2], sum[2]; /* largest score; sum of this thread's columns */
};

/* Scores to weights relative to a maximum; factor: what older sums shrink by. The maximum follows only when it would be 8 powers of
 * two behind, so that sums seldom shrink; weights up to 2^8 lose nothing. unit: scale in powers of two. */
template <int KEYS, int V>
static __device__ __forceinline__ void us_weigh_scores(struct us_forward_state<V> *x, float (*s)[4],
                                                       float unit, float factor[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float most = x->max[i], sum = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    if (!((most - x->max[i]) * unit > 8)) most = x->max[i];
    float base = most == -INFINITY ? 0.0f : most * unit;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float *score = &s[n][2 * i + c];
        *score = us_exp2(fmaf(*score, unit, -base)); /* 0 for -Inf */
        sum += *score;
      }
    factor[i] = most == x->max[i] ? 1.0f : us_exp2(fmaf(x->max[i], unit, -base));
    x->sum[i] = fmaf(x->sum[i], factor[i], sum);
    x->max[i] = most;
  }
}

/* Older sums shrink, if one of the warp's rows asks for it. */
template <int V>
static __device__ __forceinline__ void us_shrink_sums(struct us_forward_state<V> *x, const float factor[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
  for (int n = 0; n < V / 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) x->out[n][c] *= factor[c / 2];
}

/* Denominator with the sink, lse, and what the sums are multiplied with. */
template <int V>
static __device__ __forceinline__ void us_finish_rows(const struct us_attention_job &job,
                                                      struct us_forward_state<V> *x,
                                                      const struct us_attention_row row[2], float unit,
                                                      uint32_t lane, float factor[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    bool none = x->max[i] == -INFINITY;
    float sum = x->sum[i], most = none ? 0.0f : x->max[i] * unit;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float keep = 1;
    if (job.a.sink) {
      float sink = (row[i].exists ? job.a.sink[row[i].head] : 0) * US_TRAIN_LOG2E;
      float base = none ? sink : fmaxf(most, sink);
      keep = none ? 0 : exp2f(most - base), sum = fmaf(sum, keep, exp2f(sink - base)), most = base;
    }
    factor[i] = sum > 0 ? keep / sum : 0;
    if (row[i].exists && lane % 4 == 0)
      job.a.lse[(size_t)row[i].query * job.a.q_heads + row[i].head] =
          sum > 0 ? (most + log2f(sum)) * US_TRAIN_LN2 : 0;
  }
}

template <int Q, int V, int KEYS, int GROUPS, int BLOCKS>
static __global__ void __launch_bounds__(GROUPS * 128, BLOCKS)
    us_attention_forward(const __grid_constant__ struct us_attention_job job) {
  using L = us_forward_layout<Q, V, KEYS, GROUPS>;
  constexpr int THREADS = GROUPS * 128;
  extern __shared__ __align__(1024) uint8_t us_train_shared[];
  const struct us_attention_train &a = job.a;
  struct us_attention_here h = us_attention_here_of<GROUPS>(job, us_train_shared, L::offsets);
  struct us_attention_walk walk = us_attention_walk_of<KEYS, GROUPS>(job, h.first_unit);
  struct us_attention_unit plan = job.plan.unit[min(h.unit, job.cut.units - 1)];
  const uint16_t *k = a.k + a.k_offset[h.g], *v = a.v + a.v_offset[h.g];
  __syncthreads();

  struct us_forward_state<V> x;
  us_wg_zero<V / 8>(x.out);
#pragma unroll
  for (int i = 0; i < 2; i++) x.max[i] = -INFINITY, x.sum[i] = 0;
  float unit_scale = a.scale * US_TRAIN_LOG2E, factor[2];
  uint32_t queries = h.shared + h.group * L::unit;

  auto load_keys = [&](uint32_t t) {
    struct us_attention_tile tile = us_attention_tile_of<KEYS>(walk, t);
    us_load_keys<Q, KEYS, THREADS>(h.shared + L::keys + t % 2 * L::key, k, a.k_stride, a.qk_dim, tile.first,
                                   tile.end, threadIdx.x);
  };
  auto load_values = [&](uint32_t t) {
    struct us_attention_tile tile = us_attention_tile_of<KEYS>(walk, t);
    us_load_keys<V, KEYS, THREADS>(h.shared + L::values + t % 2 * L::value, v, a.v_stride, a.v_dim,
                                   tile.first, tile.end, threadIdx.x);
  };

  if (walk.tiles) {
    us_load_rows<Q, US_UNIT_ROWS, 128>(queries, a.q, a.q_stride, a.qk_dim, h.offset, job, h.unit, 0,
                                       threadIdx.x % 128);
    load_keys(0);
    us_copy_commit();
    load_values(0);
    if (walk.tiles > 1) load_keys(1);
    us_copy_commit();
    struct us_attention_seen seen = us_attention_seen_of(job, h.row, walk.context_tiles == 0);

    float s[KEYS / 8][4];
    uint32_t p[KEYS / 16][4];
    auto weigh = [&](uint32_t t) {
      uint32_t first = us_attention_tile_of<KEYS>(walk, t).first;
      us_wg_hold<KEYS / 8>(s);
      if (!us_all_see<KEYS>(plan, first, t >= walk.context_tiles))
        us_mask_keys<KEYS>(s, seen, first, h.lane, -INFINITY);
      us_weigh_scores<KEYS, V>(&x, s, unit_scale, factor);
    };
    us_copy_wait<1>();
    __syncthreads();
    us_wg_fence();
    us_wg_products<Q, KEYS>(s, queries, US_UNIT_ROWS, h.shared + L::keys);
    us_wg_commit();
    us_wg_wait<0>();
    weigh(0);
    us_wg_pack_rows<KEYS / 16>(s, p);

    for (uint32_t t = 0; t + 1 < walk.tiles; t++) {
      us_copy_wait<0>(); /* values t, keys t + 1 */
      __syncthreads();   /* and nobody reads keys t or values t - 1 any more */
      if (t + 2 < walk.tiles) load_keys(t + 2);
      load_values(t + 1);
      us_copy_commit();
      us_wg_fence();
      us_wg_products<Q, KEYS>(s, queries, US_UNIT_ROWS, h.shared + L::keys + (t + 1) % 2 * L::key);
      us_wg_commit();
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++)
        us_wg_add<V>(x.out, p[j], h.shared + L::values + t % 2 * L::value, KEYS, j);
      us_wg_commit();
      if (t + 1 == walk.context_tiles) seen = us_attention_seen_of(job, h.row, 1);
      us_wg_wait<1>();
      weigh(t + 1);
      us_wg_wait<0>();
      us_wg_hold<V / 8>(x.out);
      us_shrink_sums<V>(&x, factor);
      us_wg_pack_rows<KEYS / 16>(s, p);
    }

    us_copy_wait<0>();
    __syncthreads();
    us_wg_fence();
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
      us_wg_add<V>(x.out, p[j], h.shared + L::values + (walk.tiles - 1) % 2 * L::value, KEYS, j);
    us_wg_commit();
    us_wg_wait<0>();
    us_wg_hold<V / 8>(x.out);
  }

  us_finish_rows<V>(job, &x, h.row, unit_scale, h.lane, factor);
  us_stage_rows<V>(queries, x.out, factor, h.warp,
                   h.lane); /* a h.warp's own rows, which no multiply reads any more */
  __syncwarp();
  us_store_rows<V>(queries, a.out, (size_t)a.q_heads * a.v_dim, a.v_dim, h.offset + 16, job, h.unit, h.warp,
                   h.lane);
}

template <int Q, int V, int KEYS, int GROUPS, int BLOCKS>
static cudaError_t us_launch_forward(const struct us_attention_job *job, cudaStream_t stream) {
  auto kernel = us_attention_forward<Q, V, KEYS, GROUPS, BLOCKS>;
  constexpr uint32_t bytes = us_forward_layout<Q, V, KEYS, GROUPS>::bytes;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  dim3 grid((job->cut.units + GROUPS - 1) / GROUPS, job->a.kv_heads * job->cut.parts);
  kernel<<<grid, GROUPS * 128, bytes, stream>>>(*job);
  return cudaGetLastError();
}

#endif
