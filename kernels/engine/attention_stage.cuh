/* attention_stage.cuh: what a job needs in shared memory before its units begin: queries, new keys and values; and the cache.
 *
 *     us_attention_stage<192, 128>(shared);                // when the projection is done; then a barrier
 *     us_attention_append<192, 128>(shared, page);         // one unit: the row's own key and value
 *
 * Bound: one latency of L2, every load under way before the first is used, and instructions: half a warp has a query head or a new
 * key, a warp a new value.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_STAGE_CUH
#define US_KERNELS_ENGINE_ATTENTION_STAGE_CUH

#include "kernels/engine/attention_tile.cuh"

/* ---- queries and keys ------------------------------------------------------------------------------------------------ */

/* Half-warp `index`: query head `index` of the chunk, or behind the 16 heads new key index - 16. */
template <int QS>
static __device__ __forceinline__ struct us_head us_attention_head(const struct us_attention_shared *sh,
                                                                   const struct us_attention_row *row,
                                                                   uint32_t index) {
  const struct us_engine_attention *a = &sh->a;
  bool query = index < 16;
  uint32_t Q = us_attention_Q<QS>(sh), in = index - 16, position = query ? row->position : row->fresh + in;
  uint32_t at = (query ? sh->job.first_head + index : a->H + sh->job.g) * Q;
  int32_t of_tile = query ? (int32_t)(row - sh->row) : row->fresh_row + (int32_t)in;
  struct us_head h;
  h.values = a->qkv + of_tile * (int32_t)a->qkv_rows + at;
  h.norm = query ? a->q_norm : a->k_norm;
  h.rope = a->rope + (size_t)position * a->rotary;
  h.Q = Q, h.rotary = a->rotary, h.eps = a->eps;
  return h;
}

/* A finished head into shared memory (queries: `q`): a query split in two terms, a key rounded; dims up to a multiple of 32. */
template <int QS>
static __device__ __forceinline__ void us_attention_keep_head(struct us_attention_shared *sh, uint4 *q,
                                                              uint32_t index, const float2 x[US_HEAD_PAIRS]) {
  uint32_t lane = threadIdx.x % 16, Q = us_attention_Q<QS>(sh), n = index % 8;
  bool query = index < 16;
  uint32_t *to = query ? (uint32_t *)(q + us_attention_operand_index(0, 0, lane % 4 / 2, n, lane / 4)) +
                             lane % 2 * 2 + index / 8
                       : (uint32_t *)sh->key + (index - 16) * (us_engine_k_stride(Q) / 2) + lane;
#pragma unroll
  for (uint32_t i = 0; i < us_head_count<QS>::pairs; i++, to += query ? 512 : 16) {
    uint32_t hi, lo;
    us_attention_split(x[i].x, x[i].y, &hi, &lo);
    if (query)
      to[0] = hi, to[256] = lo;
    else if (QS || 32 * i < Q)
      to[0] = hi;
  }
}

/* ---- values ---------------------------------------------------------------------------------------------------------- */

static_assert(US_ATTENTION_FRESH <= US_ENGINE_COMPUTE_WARPS, "a warp has a new value");

/* The warp's new value, dims 4 lane to + 3, of those that the job sees; another where it has none. The address does not depend on
 * what is loaded: all loads are under way together. */
template <int QS, int VS>
static __device__ __forceinline__ float4 us_attention_load_new(const struct us_attention_shared *sh,
                                                               const struct us_attention_row *row) {
  const struct us_engine_attention *a = &sh->a;
  uint32_t index = threadIdx.x / 32, dim = threadIdx.x % 32 * 4, V = us_attention_V<VS>(sh);
  int32_t of_tile = row->fresh_row + (int32_t)(index < sh->job.new_keys ? index : 0);
  const float *from = a->qkv + of_tile * (int32_t)a->qkv_rows + (a->H + a->G) * us_attention_Q<QS>(sh) +
                      sh->job.g * V + (VS == 128 || dim < V ? dim : 0);
  if (QS % 4 == 0 && QS) return __ldcg((const float4 *)from);
  return make_float4(__ldcg(from), __ldcg(from + 1), __ldcg(from + 2), __ldcg(from + 3));
}

/* 0 where no new value is seen. */
static __device__ __forceinline__ void us_attention_clear_new(struct us_attention_shared *sh) {
  if (threadIdx.x < sizeof sh->value / sizeof sh->value[0]) sh->value[threadIdx.x] = make_uint4(0, 0, 0, 0);
}

/* Behind a barrier after that: those that the row sees. */
template <int VS>
static __device__ __forceinline__ void us_attention_keep_new(struct us_attention_shared *sh,
                                                             const struct us_attention_row *row, float4 v) {
  uint32_t index = threadIdx.x / 32, dim = threadIdx.x % 32 * 4, fresh = row->fresh;
  if (index >= sh->job.new_keys || fresh + index < row->begin || dim >= us_attention_V<VS>(sh)) return;
  uint16_t *to = (uint16_t *)(sh->value + dim * US_ATTENTION_FRESH_PIECES) + fresh -
                 us_attention_origin(sh, row) + index;
  const uint32_t next = US_ATTENTION_FRESH_PIECES * 8; /* dim */
  float scale = sh->a.value_scale;
  to[0] = (uint16_t)us_head_round(v.x * scale, 0), to[next] = (uint16_t)us_head_round(v.y * scale, 0);
  to[2 * next] = (uint16_t)us_head_round(v.z * scale, 0),
         to[3 * next] = (uint16_t)us_head_round(v.w * scale, 0);
}

/* ---- a job ----------------------------------------------------------------------------------------------------------- */

/* The chunk's queries and `new_keys` new keys and values into shared memory. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_stage(struct us_attention_shared *sh) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t index = threadIdx.x / 16, lane = threadIdx.x % 16, count = 16 + sh->job.new_keys;
  bool exists = index < count && (index >= 16 || index < sh->job.heads);
  struct us_head h = us_attention_head<QS>(sh, row, exists ? index : 0);
  float2 x[US_HEAD_PAIRS];
  float4 v = us_attention_load_new<QS, VS>(sh, row);
  us_head_load<QS>(&h, lane, x);
  struct us_head_rope rope = us_head_load_rope(&h, lane);
  us_attention_clear_new(sh);
  us_engine_meet(); /* all loads are on their way */
  us_attention_keep_new<VS>(sh, row, v);
  if (index / 2 * 2 < count) {
    us_head_turn<QS>(&h, &rope, lane, x);
    if (index < count) /* a head that does not exist: the first one's again, for nobody */
      us_attention_keep_head<QS>(sh, sh->q, index, x);
  }
}

/* One unit: the row's own key and value into its page. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_append(const struct us_attention_shared *sh,
                                                           const uint8_t *page) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t i = threadIdx.x % US_ATTENTION_THREADS, slot = row->position % 64, Q = us_attention_Q<QS>(sh);
  uint32_t V = us_attention_V<VS>(sh), pieces = us_engine_k_stride(Q) / 8;
  const uint16_t *value = (const uint16_t *)(sh->value + i * US_ATTENTION_FRESH_PIECES) + row->position;
  if (i < pieces)
    ((uint4 *)(page + us_head_key_offset(Q, sh->job.g, slot)))[i] =
        sh->key[(row->position - row->fresh) * pieces + i];
  if (i < V)
    ((uint16_t *)(page + us_head_value_offset(sh->a.G, Q, V, sh->job.g, i)))[slot] =
        *(value - us_attention_origin(sh, row));
}

#endif
