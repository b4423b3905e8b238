/* attention_train_queries.cuh: dq of GROUPS units of one set of heads a block, going through the keys as the forward pass does.
 *
 * Scores are multiplied again; p = exp(scale q.k - lse) needs no maximum. dq is summed in registers, key tile after key tile; a
 * tile's ds k is multiplied while the next tile's p and ds are made, so that three tiles of keys are held, and two of values.
 *
 * Bound: wgmma, 4 Q + 2 V flops a score.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_QUERIES_CUH
#define US_KERNELS_ATTENTION_TRAIN_QUERIES_CUH

#include "kernels/attention_seq/attention_train_tile.cuh"

#define US_QUERIES_STAGES 3 /* of keys; two of values */

template <int Q, int V, int KEYS, int GROUPS> struct us_queries_layout {
  static constexpr uint32_t query = US_UNIT_ROWS * Q * 2, dout = US_UNIT_ROWS * V * 2; /* a unit's */
  static constexpr uint32_t key = KEYS * Q * 2, value = KEYS * V * 2;
  static constexpr uint32_t douts = GROUPS * query, keys = douts + GROUPS * dout,
                            values = keys + US_QUERIES_STAGES * key, offsets = values + 2 * value,
                            bytes = offsets + 32 * 4;
};

/* Scores to weights, and weights times dout v^T to ds. of_row: lse in powers of two and delta of this thread's two rows. */
template <int KEYS>
static __device__ __forceinline__ void us_queries_weigh(float (*s)[4], const float2 of_row[2],
                                                        float unit_scale) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) s[n][c] = us_exp2(fmaf(s[n][c], unit_scale, -of_row[c / 2].x));
}
template <int KEYS>
static __device__ __forceinline__ void us_queries_subtract(float (*s)[4], const float (*dp)[4],
                                                           const float2 of_row[2]) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) s[n][c] *= dp[n][c] - of_row[c / 2].y;
}

/* Start copying a unit's queries and output gradients. */
template <int Q, int V>
static __device__ __forceinline__ void us_queries_load(const struct us_attention_job &job,
                                                       const struct us_attention_here &h, uint32_t queries,
                                                       uint32_t dout) {
  const struct us_attention_train &a = job.a;
  us_load_rows<Q, US_UNIT_ROWS, 128>(queries, a.q, a.q_stride, a.qk_dim, h.offset, job, h.unit, 0,
                                     threadIdx.x % 128);
  us_load_rows<V, US_UNIT_ROWS, 128>(dout, job.grads.dout, (size_t)a.q_heads * a.v_dim, a.v_dim,
                                     h.offset + 16, job, h.unit, 0, threadIdx.x % 128);
}

template <int Q, int V, int KEYS, int GROUPS, int BLOCKS>
static __global__ void __launch_bounds__(GROUPS * 128, BLOCKS)
    us_attention_queries(const __grid_constant__ struct us_attention_job job) {
  using L = us_queries_layout<Q, V, KEYS, GROUPS>;
  constexpr int THREADS = GROUPS * 128;
  extern __shared__ __align__(1024) uint8_t us_train_shared[];
  const struct us_attention_train &a = job.a;
  struct us_attention_here h = us_attention_here_of<GROUPS>(job, us_train_shared, L::offsets);
  struct us_attention_walk walk = us_attention_walk_of<KEYS, GROUPS>(job, h.first_unit);
  struct us_attention_unit plan = job.plan.unit[min(h.unit, job.cut.units - 1)];
  const uint16_t *k = a.k + a.k_offset[h.g], *v = a.v + a.v_offset[h.g];
  float2 of_row[2]; /* lse in powers of two, delta */
#pragma unroll
  for (int i = 0; i < 2; i++) {
    of_row[i] = make_float2(0, 0);
    if (h.row[i].exists)
      of_row[i] = ((const float2 *)job.grads.scratch)[(size_t)h.row[i].query * a.q_heads + h.row[i].head];
  }
  __syncthreads();

  float dq[Q / 8][4];
  us_wg_zero<Q / 8>(dq);
  float unit_scale = a.scale * US_TRAIN_LOG2E;
  uint32_t queries = h.shared + h.group * L::query, dout = h.shared + L::douts + h.group * L::dout;
  auto load = [&](uint32_t t) {
    struct us_attention_tile tile = us_attention_tile_of<KEYS>(walk, t);
    us_load_keys<Q, KEYS, THREADS>(h.shared + L::keys + t % US_QUERIES_STAGES * L::key, k, a.k_stride,
                                   a.qk_dim, tile.first, tile.end, threadIdx.x);
    us_load_keys<V, KEYS, THREADS>(h.shared + L::values + t % 2 * L::value, v, a.v_stride, a.v_dim,
                                   tile.first, tile.end, threadIdx.x);
  };
  float s[KEYS / 8][4], dp[KEYS / 8][4];
  uint32_t ds[KEYS / 16][4];
  auto multiply = [&](uint32_t t) {
    us_wg_fence();
    us_wg_products<Q, KEYS>(s, queries, US_UNIT_ROWS, h.shared + L::keys + t % US_QUERIES_STAGES * L::key);
    us_wg_commit();
    us_wg_products<V, KEYS>(dp, dout, US_UNIT_ROWS, h.shared + L::values + t % 2 * L::value);
    us_wg_commit();
  };
  struct us_attention_seen seen = {{0, 0}, {0, 0}};
  auto weigh = [&](uint32_t t) {
    uint32_t first = us_attention_tile_of<KEYS>(walk, t).first;
    us_wg_hold<KEYS / 8>(s);
    us_queries_weigh<KEYS>(s, of_row, unit_scale);
    if (!us_all_see<KEYS>(plan, first, t >= walk.context_tiles))
      us_mask_keys<KEYS>(s, seen, first, h.lane, 0);
  };
  auto subtract = [&]() {
    us_wg_hold<KEYS / 8>(dp);
    us_queries_subtract<KEYS>(s, dp, of_row);
  };
  auto add = [&](uint32_t t) {
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
      us_wg_add<Q>(dq, ds[j], h.shared + L::keys + t % US_QUERIES_STAGES * L::key, KEYS, j);
    us_wg_commit();
  };

  if (walk.tiles) {
    us_queries_load<Q, V>(job, h, queries, dout);
    load(0);
    us_copy_commit();
    if (walk.tiles > 1) load(1);
    us_copy_commit();
    seen = us_attention_seen_of(job, h.row, walk.context_tiles == 0);
    us_copy_wait<1>();
    __syncthreads();
    multiply(0);
    us_wg_wait<1>();
    weigh(0);
    us_wg_wait<0>();
    subtract();
    us_wg_pack_rows<KEYS / 16>(s, ds);
    for (uint32_t t = 0; t + 1 < walk.tiles; t++) {
      us_copy_wait<0>();
      __syncthreads(); /* tile t + 1 is here, and nobody reads keys t - 1 or values t any more */
      if (t + 2 < walk.tiles) load(t + 2);
      us_copy_commit();
      multiply(t + 1);
      add(t);
      if (t + 1 == walk.context_tiles) seen = us_attention_seen_of(job, h.row, 1);
      us_wg_wait<2>();
      weigh(t + 1);
      us_wg_wait<1>();
      subtract();
      us_wg_wait<0>();
      us_wg_hold<Q / 8>(dq);
      us_wg_pack_rows<KEYS / 16>(s, ds);
    }
    us_wg_fence();
    add(walk.tiles - 1);
    us_wg_wait<0>();
    us_wg_hold<Q / 8>(dq);
  }

  const float factor[2] = {a.scale, a.scale};
  us_group_barrier(h.group);
  us_stage_rows<Q>(queries, dq, factor, h.warp, h.lane);
  __syncwarp();
  us_store_rows<Q>(queries, job.grads.dq, a.q_stride, a.qk_dim, h.offset, job, h.unit, h.warp, h.lane);
}

template <int Q, int V, int KEYS, int GROUPS, int BLOCKS>
static cudaError_t us_launch_queries(const struct us_attention_job *job, cudaStream_t stream) {
  auto kernel = us_attention_queries<Q, V, KEYS, GROUPS, BLOCKS>;
  constexpr uint32_t bytes = us_queries_layout<Q, V, KEYS, GROUPS>::bytes;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  dim3 grid((job->cut.units + GROUPS - 1) / GROUPS, job->a.kv_heads * job->cut.parts);
  kernel<<<grid, GROUPS * 128, bytes, stream>>>(*job);
  return cudaGetLastError();
}

#endif
