/* attention_train_keys.cuh: dk and dv of GROUPS x 64 keys of one KV head a block; a group of four warps owns 64 keys.
 *
 * The block goes through all rows that may see its keys, head set after head set, ROWS rows at a time, three tiles of queries and
 * output gradients in shared memory. Scores are made transposed, so that p and ds leave the tensor cores as the row operands of
 * the sums: dv += p^T dout, dk += ds^T q, both in registers in the order of the rows. The tensor cores always have work queued:
 * dout v^T while p is made, dv while ds is made, dk and the next tile's scores while the group waits for others.
 *
 * Bound: wgmma, 4 Q + 4 V flops a score.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_KEYS_CUH
#define US_KERNELS_ATTENTION_TRAIN_KEYS_CUH

#include "kernels/attention_seq/attention_train_tile.cuh"

#define US_KEYS_STAGES 3

template <int Q, int V, int ROWS, int GROUPS> struct us_keys_layout {
  static constexpr uint32_t key = 64 * Q * 2, value = 64 * V * 2; /* of a group */
  static constexpr uint32_t query = ROWS * Q * 2, dout = ROWS * V * 2;
  static constexpr uint32_t values = GROUPS * key, queries = values + GROUPS * value,
                            douts = queries + US_KEYS_STAGES * query, notes = douts + US_KEYS_STAGES * dout;
  /* notes of a tile: (lse, delta) a row; begin, end, block begin, block end, each (ROWS); the unit's intersections */
  static constexpr uint32_t note_ranges = ROWS * 8, note_all = note_ranges + 4 * ROWS * 4,
                            note = note_all + 16;
  static constexpr uint32_t bytes = notes + US_KEYS_STAGES * note;
};

/* Where the block is: ROWS rows from row `first` of a unit on, of one part of the heads. */
struct us_keys_place {
  uint32_t part, unit, first;
};

template <int ROWS>
static __device__ __forceinline__ void us_keys_advance(struct us_keys_place *at, uint32_t begin,
                                                       uint32_t end) {
  at->first += ROWS;
  if (at->first < US_UNIT_ROWS) return;
  at->first = 0;
  if (++at->unit < end) return;
  at->unit = begin, at->part++;
}

/* Start copying a tile's rows and notes. */
template <int Q, int V, int ROWS, int GROUPS>
static __device__ __forceinline__ void us_load_place(const struct us_attention_job &job,
                                                     const struct us_keys_place &at, uint32_t g,
                                                     uint32_t shared, uint32_t stage) {
  using L = us_keys_layout<Q, V, ROWS, GROUPS>;
  constexpr int THREADS = GROUPS * 128, Q_CHUNKS = Q / 8, V_CHUNKS = V / 8;
  const struct us_attention_train &a = job.a;
  uint32_t first_head = (g * job.cut.parts + at.part) * job.cut.pack,
           to = shared + L::queries + stage * L::query;
#pragma unroll
  for (int j = 0; j < (ROWS * Q_CHUNKS + THREADS - 1) / THREADS; j++) {
    uint32_t i = threadIdx.x + j * THREADS, chunk = i % Q_CHUNKS;
    if (ROWS * Q_CHUNKS % THREADS && i >= ROWS * Q_CHUNKS) break;
    struct us_attention_row row = us_attention_row_of(job, at.unit, first_head, at.first + i / Q_CHUNKS);
    bool exists = row.exists && chunk * 8 < a.qk_dim;
    us_copy_16(to + us_chunk_at(ROWS, i / Q_CHUNKS, chunk),
               exists ? a.q + row.query * a.q_stride + a.q_offset[row.head] + chunk * 8 : a.q, exists);
  }
  to = shared + L::douts + stage * L::dout;
#pragma unroll
  for (int j = 0; j < (ROWS * V_CHUNKS + THREADS - 1) / THREADS; j++) {
    uint32_t i = threadIdx.x + j * THREADS, chunk = i % V_CHUNKS;
    if (ROWS * V_CHUNKS % THREADS && i >= ROWS * V_CHUNKS) break;
    struct us_attention_row row = us_attention_row_of(job, at.unit, first_head, at.first + i / V_CHUNKS);
    bool exists = row.exists && chunk * 8 < a.v_dim;
    const uint16_t *from = job.grads.dout + ((size_t)row.query * a.q_heads + row.head) * a.v_dim + chunk * 8;
    us_copy_16(to + us_chunk_at(ROWS, i / V_CHUNKS, chunk), exists ? from : job.grads.dout, exists);
  }
  to = shared + L::notes + stage * L::note;
  uint32_t r = threadIdx.x % ROWS, what = threadIdx.x / ROWS;
  struct us_attention_row row = us_attention_row_of(job, at.unit, first_head, at.first + r);
  uint32_t query = row.exists ? row.query : 0;
  if (what == 0) {
    us_copy_8(to + r * 8,
              (const float2 *)job.grads.scratch + (size_t)query * a.q_heads + (row.exists ? row.head : 0),
              row.exists);
    us_copy_4(to + L::note_ranges + r * 4, a.context_begin + query, row.exists);
    us_copy_4(to + L::note_ranges + (ROWS + r) * 4, a.context_end + query, row.exists);
  }
  if (what == 1 && a.block_begin) {
    us_copy_4(to + L::note_ranges + (2 * ROWS + r) * 4, a.block_begin + query, row.exists);
    us_copy_4(to + L::note_ranges + (3 * ROWS + r) * 4, a.block_end + query, row.exists);
  }
  if (threadIdx.x == 0) us_copy_16(to + L::note_all, &job.plan.unit[at.unit].all_context_begin, true);
}

/* p of rows that do not see a key is 0. ranges: of the tile's notes; key: of the thread's first row. */
template <int ROWS>
static __device__ __forceinline__ void us_mask_columns(float (*p)[4], const uint8_t *ranges, uint32_t key,
                                                       bool blocks, uint32_t lane) {
  const uint32_t *range = (const uint32_t *)ranges + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < ROWS / 8; n++) {
    uint2 begin = *(const uint2 *)(range + n * 8), end = *(const uint2 *)(range + ROWS + n * 8);
    uint2 block = make_uint2(0, 0), block_end = block;
    if (blocks)
      block = *(const uint2 *)(range + 2 * ROWS + n * 8),
      block_end = *(const uint2 *)(range + 3 * ROWS + n * 8);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t k = key + 8 * i;
      bool low = k - begin.x < end.x - begin.x || k - block.x < block_end.x - block.x,
           high = k - begin.y < end.y - begin.y || k - block.y < block_end.y - block.y;
      if (!low) p[n][2 * i] = 0;
      if (!high) p[n][2 * i + 1] = 0;
    }
  }
}

/* A warp stores its 16 rows of a staged tile of keys. */
template <int C>
static __device__ __forceinline__ void us_store_keys(uint32_t tile, uint16_t *head, size_t stride,
                                                     uint32_t dim, uint32_t first, uint32_t keys,
                                                     uint32_t warp, uint32_t lane) {
  constexpr int CHUNKS = C / 8;
#pragma unroll 4
  for (int j = 0; j < 16 * CHUNKS / 32; j++) {
    uint32_t i = lane + j * 32, r = warp * 16 + i / CHUNKS, chunk = i % CHUNKS;
    uint4 v = us_staged(tile, r, chunk);
    if (first + r < keys && chunk * 8 < dim) *(uint4 *)(head + (first + r) * stride + chunk * 8) = v;
  }
}

/* Units [begin, end) that may see a key of the block's tiles; begin above end: none. */
struct us_keys_units {
  uint32_t begin, end;
};
template <int GROUPS>
static __device__ __forceinline__ struct us_keys_units us_keys_units_of(const struct us_attention_job &job,
                                                                        uint32_t first_tile) {
  struct us_keys_units u = {UINT32_MAX, 0};
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    if (first_tile + i >= job.cut.key_tiles) break;
    uint2 units = job.plan.seen_by[first_tile + i];
    if (units.x < units.y) u.begin = min(u.begin, units.x), u.end = max(u.end, units.y);
  }
  return u;
}

/* Scores to weights, and weights times dout v^T to ds. of_rows: lse and delta of this thread's first two rows. */
template <int ROWS>
static __device__ __forceinline__ void us_keys_weigh(float (*s)[4], const float4 *of_rows, float unit_scale) {
#pragma unroll
  for (int n = 0; n < ROWS / 8; n++) {
    float4 r = of_rows[n * 4];
#pragma unroll
    for (int c = 0; c < 4; c++) s[n][c] = us_exp2(fmaf(s[n][c], unit_scale, c % 2 ? -r.z : -r.x));
  }
}
template <int ROWS>
static __device__ __forceinline__ void us_keys_subtract(float (*s)[4], const float (*dp)[4],
                                                        const float4 *of_rows) {
#pragma unroll
  for (int n = 0; n < ROWS / 8; n++) {
    float4 r = of_rows[n * 4];
#pragma unroll
    for (int c = 0; c < 4; c++) s[n][c] *= dp[n][c] - (c % 2 ? r.w : r.y);
  }
}

template <int Q, int V, int ROWS, int GROUPS, int BLOCKS>
static __global__ void __launch_bounds__(GROUPS * 128, BLOCKS)
    us_attention_keys(const __grid_constant__ struct us_attention_job job) {
  using L = us_keys_layout<Q, V, ROWS, GROUPS>;
  constexpr int THREADS = GROUPS * 128;
  extern __shared__ __align__(1024) uint8_t us_train_shared[];
  const struct us_attention_train &a = job.a;
  uint32_t shared = us_shared_address(us_train_shared), lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4,
           group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), g = blockIdx.y,
           first_tile = blockIdx.x * GROUPS;
  struct us_keys_units units = us_keys_units_of<GROUPS>(job, first_tile);
  uint32_t begin = units.begin, end = units.end;
  uint32_t first_key = (first_tile + group) * US_KEY_TILE, key = first_key + warp * 16 + lane / 4;
  uint32_t keys = shared + group * L::key, values = shared + L::values + group * L::value;
  float dk[Q / 8][4], dv[V / 8][4];
  us_wg_zero<Q / 8>(dk);
  us_wg_zero<V / 8>(dv);
  float unit_scale = a.scale * US_TRAIN_LOG2E;

  struct us_keys_place next = {0, begin, 0};
  uint32_t tiles = begin < end ? (end - begin) * job.cut.parts * (US_UNIT_ROWS / ROWS) : 0;
  float s[ROWS / 8][4], dp[ROWS / 8][4];
  auto load = [&](uint32_t t) { /* in turn */
                                us_load_place<Q, V, ROWS, GROUPS>(job, next, g, shared, t % US_KEYS_STAGES);
                                us_keys_advance<ROWS>(&next, begin, end);
  };
  auto multiply = [&](uint32_t t) {
    us_wg_fence();
    us_wg_products<Q, ROWS>(s, keys, 64, shared + L::queries + t % US_KEYS_STAGES * L::query);
    us_wg_commit();
    us_wg_products<V, ROWS>(dp, values, 64, shared + L::douts + t % US_KEYS_STAGES * L::dout);
    us_wg_commit();
  };

  if (tiles) {
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      uint32_t from = (first_tile + i) * US_KEY_TILE;
      us_load_keys<Q, 64, THREADS>(shared + i * L::key, a.k + a.k_offset[g], a.k_stride, a.qk_dim, from,
                                   a.keys, threadIdx.x);
      us_load_keys<V, 64, THREADS>(shared + L::values + i * L::value, a.v + a.v_offset[g], a.v_stride,
                                   a.v_dim, from, a.keys, threadIdx.x);
    }
    load(0);
    us_copy_commit();
    if (tiles > 1) load(1);
    us_copy_commit();
    us_copy_wait<1>();
    __syncthreads();
    us_wg_hold<Q / 8>(dk); /* the zeros are written now, not among the multiplies */
    us_wg_hold<V / 8>(dv);
    multiply(0);
    for (uint32_t t = 0;; t++) {
      uint32_t stage = t % US_KEYS_STAGES;
      uint32_t queries = shared + L::queries + stage * L::query, dout = shared + L::douts + stage * L::dout;
      const uint8_t *note = us_train_shared + L::notes + stage * L::note;
      uint4 all = *(const uint4 *)(note + L::note_all);
      bool unmasked =
          (all.x <= first_key && first_key + 64 <= all.y) || (all.z <= first_key && first_key + 64 <= all.w);
      const float4 *of_rows = (const float4 *)note + lane % 4; /* lse, delta of two rows */
      us_wg_wait<1>();                                         /* the scores, and dk of the tile before */
      us_wg_hold<ROWS / 8>(s);
      us_keys_weigh<ROWS>(s, of_rows, unit_scale);
      if (!unmasked) us_mask_columns<ROWS>(s, note + L::note_ranges, key, a.block_begin != NULL, lane);
      uint32_t p[ROWS / 16][4], ds[ROWS / 16][4];
      us_wg_pack_rows<ROWS / 16>(s, p);
      us_wg_fence();
#pragma unroll
      for (int j = 0; j < ROWS / 16; j++) us_wg_add<V>(dv, p[j], dout, ROWS, j);
      us_wg_commit();
      us_wg_wait<1>();
      us_wg_hold<ROWS / 8>(dp);
      us_keys_subtract<ROWS>(s, dp, of_rows);
      us_wg_pack_rows<ROWS / 16>(s, ds);
      us_wg_fence();
#pragma unroll
      for (int j = 0; j < ROWS / 16; j++) us_wg_add<Q>(dk, ds[j], queries, ROWS, j);
      us_wg_commit();
      if (t + 1 == tiles) break;
      us_copy_wait<0>();
      __syncthreads(); /* the next tile is here, and nobody reads the one before this any more */
      if (t + 2 < tiles) load(t + 2);
      us_copy_commit();
      multiply(t + 1);
    }
    us_wg_wait<0>();
    us_wg_hold<V / 8>(dv);
    us_wg_hold<Q / 8>(dk);
  }

  const float scale[2] = {a.scale, a.scale}, one[2] = {1, 1};
  us_group_barrier(group);
  us_stage_rows<Q>(keys, dk, scale, warp, lane);
  us_stage_rows<V>(values, dv, one, warp, lane);
  __syncwarp();
  us_store_keys<Q>(keys, job.grads.dk + a.k_offset[g], a.k_stride, a.qk_dim, first_key, a.keys, warp, lane);
  us_store_keys<V>(values, job.grads.dv + a.v_offset[g], a.v_stride, a.v_dim, first_key, a.keys, warp, lane);
}

template <int Q, int V, int ROWS, int GROUPS, int BLOCKS>
static cudaError_t us_launch_keys(const struct us_attention_job *job, cudaStream_t stream) {
  auto kernel = us_attention_keys<Q, V, ROWS, GROUPS, BLOCKS>;
  constexpr uint32_t bytes = us_keys_layout<Q, V, ROWS, GROUPS>::bytes;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3((job->cut.key_tiles + GROUPS - 1) / GROUPS, job->a.kv_heads), GROUPS * 128, bytes, stream>>>(
      *job);
  return cudaGetLastError();
}

#endif
