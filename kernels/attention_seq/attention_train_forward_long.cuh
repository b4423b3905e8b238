/* attention_train_forward_long.cuh: the forward pass where units see many keys: one group of four warps copies, GROUPS multiply.
 *
 * As attention_train_forward.cuh, but the groups wait for copies alone, not for each other: while one takes exponentials the tensor
 * cores work for another, and no multiplying warp computes addresses. With three tiles of a window that is all prologue, so windows
 * take the other kernel.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_FORWARD_LONG_CUH
#define US_KERNELS_ATTENTION_TRAIN_FORWARD_LONG_CUH

#include "kernels/attention_seq/attention_train_forward.cuh"
#include "kernels/attention_seq/attention_train_turn.cuh"

template <int Q, int V, int KEYS, int GROUPS, int STAGES> struct us_long_layout {
  static constexpr uint32_t unit = US_UNIT_ROWS * Q * 2, key = KEYS * Q * 2, value = KEYS * V * 2; /* bytes */
  static constexpr uint32_t keys = GROUPS * unit, values = keys + STAGES * key,
                            offsets = values + STAGES * value, query_full = offsets + 32 * 4,
                            key_full = query_full + 2 * 8, value_full = key_full + 2 * STAGES * 8,
                            bytes = value_full + 2 * STAGES * 8;
};

/* The copying group: the queries, then keys and values of tile after tile. */
template <int Q, int V, int KEYS, int GROUPS, int STAGES>
static __device__ __forceinline__ void us_long_copy(const struct us_attention_job &job, uint32_t first_unit,
                                                    uint32_t shared, const uint32_t *offset) {
  using L = us_long_layout<Q, V, KEYS, GROUPS, STAGES>;
  const struct us_attention_train &a = job.a;
  uint32_t g = blockIdx.y / job.cut.parts, thread = threadIdx.x % 128;
  const uint16_t *k = a.k + a.k_offset[g], *v = a.v + a.v_offset[g];
  struct us_attention_walk walk = us_attention_walk_of<KEYS, GROUPS>(job, first_unit);
#pragma unroll 1
  for (uint32_t i = 0; i < GROUPS; i++)
    us_load_rows<Q, US_UNIT_ROWS, 128>(shared + i * L::unit, a.q, a.q_stride, a.qk_dim, offset, job,
                                       first_unit + i, 0, thread);
  us_turn_copied(shared + L::query_full);
  us_turn<STAGES> turn(1);
#pragma unroll 1
  for (uint32_t t = 0; t < walk.tiles; t++, turn.advance()) {
    struct us_attention_tile tile = us_attention_tile_of<KEYS>(walk, t);
    uint32_t full = shared + L::key_full + turn.stage * 8;
    us_barrier_wait(full + STAGES * 8, turn.parity);
    us_load_keys<Q, KEYS, 128>(shared + L::keys + turn.stage * L::key, k, a.k_stride, a.qk_dim, tile.first,
                               tile.end, thread);
    us_turn_copied(full);
    full = shared + L::value_full + turn.stage * 8;
    us_barrier_wait(full + STAGES * 8, turn.parity);
    us_load_keys<V, KEYS, 128>(shared + L::values + turn.stage * L::value, v, a.v_stride, a.v_dim, tile.first,
                               tile.end, thread);
    us_turn_copied(full);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/* A multiplying group: out of its unit's rows, not divided yet. */
template <int Q, int V, int KEYS, int GROUPS, int STAGES>
static __device__ __forceinline__ void us_long_multiply(const struct us_attention_job &job,
                                                        uint32_t first_unit, uint32_t group, uint32_t shared,
                                                        const struct us_attention_row row[2],
                                                        float unit_scale, struct us_forward_state<V> *x) {
  using L = us_long_layout<Q, V, KEYS, GROUPS, STAGES>;
  uint32_t lane = threadIdx.x % 32, queries = shared + group * L::unit;
  struct us_attention_walk walk = us_attention_walk_of<KEYS, GROUPS>(job, first_unit);
  struct us_attention_unit plan = job.plan.unit[min(first_unit + group, job.cut.units - 1)];
  struct us_attention_seen seen = us_attention_seen_of(job, row, walk.context_tiles == 0);
  float s[KEYS / 8][4], factor[2];
  uint32_t p[KEYS / 16][4];
  us_turn<STAGES> key(0), value(0);
  auto multiply = [&]() {
    us_turn_wait(shared + L::key_full, key);
    us_wg_fence();
    us_wg_products<Q, KEYS>(s, queries, US_UNIT_ROWS, shared + L::keys + key.stage * L::key);
    us_wg_commit();
  };
  auto weigh = [&](uint32_t t) {
    us_wg_hold<KEYS / 8>(s);
    us_turn_release(shared + L::key_full + STAGES * 8, key.stage, lane);
    key.advance();
    uint32_t first = us_attention_tile_of<KEYS>(walk, t).first;
    if (!us_all_see<KEYS>(plan, first, t >= walk.context_tiles))
      us_mask_keys<KEYS>(s, seen, first, lane, -INFINITY);
    us_weigh_scores<KEYS, V>(x, s, unit_scale, factor);
  };
  auto add = [&]() {
    us_turn_wait(shared + L::value_full, value);
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
      us_wg_add<V>(x->out, p[j], shared + L::values + value.stage * L::value, KEYS, j);
    us_wg_commit();
  };
  auto added = [&]() {
    us_wg_wait<0>();
    us_wg_hold<V / 8>(x->out);
    us_turn_release(shared + L::value_full + STAGES * 8, value.stage, lane);
    value.advance();
  };
  us_barrier_wait(shared + L::query_full, 0);
  if (!walk.tiles) return;
  multiply();
  us_wg_wait<0>();
  weigh(0);
  us_wg_pack_rows<KEYS / 16>(s, p);
#pragma unroll 1
  for (uint32_t t = 1; t < walk.tiles; t++) {
    multiply();
    add();
    if (t == walk.context_tiles) seen = us_attention_seen_of(job, row, 1);
    us_wg_wait<1>();
    weigh(t);
    added();
    us_shrink_sums<V>(x, factor);
    us_wg_pack_rows<KEYS / 16>(s, p);
  }
  us_wg_fence();
  add();
  added();
}

template <int Q, int V, int KEYS, int GROUPS, int STAGES>
static __global__ void __launch_bounds__(GROUPS * 128 + 128, 1)
    us_attention_forward_long(const __grid_constant__ struct us_attention_job job) {
  using L = us_long_layout<Q, V, KEYS, GROUPS, STAGES>;
  extern __shared__ __align__(1024) uint8_t us_train_shared[];
  const struct us_attention_train &a = job.a;
  struct us_attention_here h = us_attention_here_of<GROUPS>(job, us_train_shared, L::offsets);
  us_turn_init<GROUPS>(h.shared + L::query_full, 1);
  us_turn_init<GROUPS>(h.shared + L::key_full, STAGES);
  us_turn_init<GROUPS>(h.shared + L::value_full, STAGES);
  __syncthreads();
  us_turn_registers<GROUPS>(h.group == GROUPS);
  if (h.group == GROUPS) {
    us_long_copy<Q, V, KEYS, GROUPS, STAGES>(job, h.first_unit, h.shared, h.offset);
    return;
  }
  struct us_forward_state<V> x;
#pragma unroll
  for (int i = 0; i < 2; i++) x.max[i] = -INFINITY, x.sum[i] = 0;
  us_wg_zero<V / 8>(x.out);
  float unit_scale = a.scale * US_TRAIN_LOG2E, factor[2];
  us_long_multiply<Q, V, KEYS, GROUPS, STAGES>(job, h.first_unit, h.group, h.shared, h.row, unit_scale, &x);
  us_finish_rows<V>(job, &x, h.row, unit_scale, h.lane, factor);
  uint32_t queries = h.shared + h.group * L::unit;
  us_group_barrier(h.group); /* nobody reads the unit's queries any more */
  us_stage_rows<V>(queries, x.out, factor, h.warp, h.lane);
  __syncwarp();
  us_store_rows<V>(queries, a.out, (size_t)a.q_heads * a.v_dim, a.v_dim, h.offset + 16, job, h.unit, h.warp,
                   h.lane);
}

template <int Q, int V, int KEYS, int GROUPS, int STAGES>
static cudaError_t us_launch_forward_long(const struct us_attention_job *job, cudaStream_t stream) {
  auto kernel = us_attention_forward_long<Q, V, KEYS, GROUPS, STAGES>;
  constexpr uint32_t bytes = us_long_layout<Q, V, KEYS, GROUPS, STAGES>::bytes;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  dim3 grid((job->cut.units + GROUPS - 1) / GROUPS, job->a.kv_heads * job->cut.parts);
  kernel<<<grid, GROUPS * 128 + 128, bytes, stream>>>(*job);
  return cudaGetLastError();
}

#endif
