/* attention_stage.cuh: what a job needs in shared memory before its units begin: queries, new keys and values; and the cache.
 *
 *     us_attention_fetch_early(shared, page);        // before the projection is done
 *     us_attention_stage(shared, tile);              // after it; then a barrier
 *     if (shared->job.appends) us_attention_append(shared);
 *
 * All compute threads. Bound: one latency of L2: every load is under way before the first is used.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_STAGE_CUH
#define US_KERNELS_ENGINE_ATTENTION_STAGE_CUH

#include "kernels/engine/attention_plan.cuh"

static __device__ __forceinline__ void us_attention_fetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* Ask for what will be needed: keys and values of the unit's first leaf, rope rows of the new positions, norms. */
static __device__ __forceinline__ void us_attention_fetch_early(const struct us_attention_shared *sh,
                                                                const uint8_t *page) {
  const struct us_engine_attention *a = &sh->a;
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t i = threadIdx.x, of_unit = i % US_ATTENTION_THREADS, lines = row->fresh_count * a->rotary / 32 + 1;
  for (uint32_t line = of_unit; page && line < sh->job.pages.k_stride / 2; line += US_ATTENTION_THREADS)
    us_attention_fetch(page + sh->job.pages.k_offset + line * 128);
  if (page && of_unit < a->V) us_attention_fetch(page + sh->job.pages.v_offset + of_unit * 128);
  if (i < lines) us_attention_fetch(a->rope + (size_t)row->fresh * a->rotary + i * 32);
  if (a->q_norm && i * 32 < a->Q) us_attention_fetch(a->q_norm + i * 32);
  if (a->k_norm && i * 32 < a->Q) us_attention_fetch(a->k_norm + i * 32);
}

/* Half-warp `index`: query head `index` of the chunk, or behind the 16 heads new key index - 16. `tile`: the row tile's first
 * row in the pass. */
static __device__ __forceinline__ struct us_head us_attention_head(const struct us_attention_shared *sh,
                                                                   uint32_t tile, uint32_t index) {
  const struct us_engine_attention *a = &sh->a;
  const struct us_attention_row *row = sh->row + sh->job.row;
  bool query = index < 16;
  uint32_t position = query ? row->position : row->fresh + index - 16;
  uint32_t at = query ? (sh->job.first_head + index) * a->Q : (a->H + sh->job.g) * a->Q;
  int of_tile = query ? (int)sh->job.row : (int)(row->fresh_row + index - 16 - tile);
  struct us_head h;
  h.values = a->qkv + (ptrdiff_t)of_tile * (ptrdiff_t)a->qkv_rows + at;
  h.norm = query ? a->q_norm : a->k_norm;
  h.rope = a->rope + (size_t)position * a->rotary;
  h.Q = a->Q, h.rotary = a->rotary, h.eps = a->eps;
  return h;
}

/* A finished head into shared memory: a query split in two terms, a key rounded; dims up to a multiple of 32. */
static __device__ __forceinline__ void us_attention_keep_head(struct us_attention_shared *sh, uint32_t index,
                                                              uint32_t stride,
                                                              const float x[US_HEAD_VALUES]) {
  uint32_t lane = threadIdx.x % 16,
           in = lane % 4 / 2 * 4 + index / 8 * 2 + lane % 2; /* place in a lane's 16 bytes */
  uint16_t *query = (uint16_t *)sh->q + in, *key = sh->key + (index - 16) * stride + lane;
#pragma unroll
  for (uint32_t i = 0; i < US_HEAD_VALUES; i++) {
    if (lane + 16 * i >= stride) continue;
    uint16_t hi = us_head_bf16(x[i]);
    if (index >= 16) {
      key[16 * i] = hi;
      continue;
    }
    uint32_t at = us_attention_operand_index(i / 2, 0, lane % 8 / 4, index % 8, i % 2 * 2 + lane / 8) * 8;
    query[at] = hi, query[at + 2 * 32 * 8] = us_head_bf16(x[i] - us_bf16_to_f32(hi));
  }
}

#define US_ATTENTION_STAGE_VALUES                                                                            \
  (US_ATTENTION_FRESH_PIECES * 8 / 4) /* a thread: a dim, every fourth position */

/* New values of this thread, 0 where there is none. */
static __device__ __forceinline__ void us_attention_load_new(const struct us_attention_shared *sh,
                                                             uint32_t tile,
                                                             float v[US_ATTENTION_STAGE_VALUES]) {
  const struct us_engine_attention *a = &sh->a;
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t dim = threadIdx.x % 128, before = row->fresh - us_attention_origin(row);
  const float *from = a->qkv + (int)(row->fresh_row - tile) * (ptrdiff_t)a->qkv_rows + (a->H + a->G) * a->Q +
                      sh->job.g * a->V + dim;
#pragma unroll
  for (uint32_t i = 0; i < US_ATTENTION_STAGE_VALUES; i++) {
    uint32_t index = threadIdx.x / 128 + 4 * i - before; /* wraps below the first */
    v[i] = index < sh->job.new_keys && dim < a->V ? __ldcg(from + index * (ptrdiff_t)a->qkv_rows) : 0.0f;
  }
}

static __device__ __forceinline__ void us_attention_keep_new(struct us_attention_shared *sh,
                                                             const float v[US_ATTENTION_STAGE_VALUES]) {
  uint32_t dim = threadIdx.x % 128;
  uint16_t *to = (uint16_t *)(sh->value + dim * US_ATTENTION_FRESH_PIECES) + threadIdx.x / 128;
#pragma unroll
  for (uint32_t i = 0; i < US_ATTENTION_STAGE_VALUES; i++) to[4 * i] = us_head_bf16(v[i] * sh->a.value_scale);
}

/* The chunk's queries and, if the piece holds any, new keys and values into shared memory. `tile`: the row tile's first row. */
static __device__ __forceinline__ void us_attention_stage(struct us_attention_shared *sh, uint32_t tile) {
  uint32_t count = 16 + sh->job.new_keys, stride = us_engine_k_stride(sh->a.Q);
  float v[US_ATTENTION_STAGE_VALUES];
  us_attention_load_new(sh, tile, v);
#pragma unroll 1
  for (uint32_t pair = threadIdx.x / 32 * 2; pair < count; pair += US_ENGINE_COMPUTE / 16) {
    uint32_t index = pair + threadIdx.x / 16 % 2;
    bool exists = index < count && (index >= 16 || index < sh->job.heads);
    float x[US_HEAD_VALUES];
    struct us_head h = us_attention_head(sh, tile, exists ? index : 0);
    us_head_load(&h, threadIdx.x % 16, x);
    us_head_finish(&h, threadIdx.x % 16, x);
#pragma unroll
    for (uint32_t i = 0; i < US_HEAD_VALUES; i++) x[i] = exists ? x[i] : 0.0f;
    if (index < count) us_attention_keep_head(sh, index, stride, x);
  }
  if (count > 16) us_attention_keep_new(sh, v);
}

/* The row's own key and value into its page. */
static __device__ __forceinline__ void us_attention_append(const struct us_attention_shared *sh) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  const struct us_head_pages *pages = &sh->job.pages;
  uint32_t slot = row->position % 64, pieces = pages->k_stride / 16, i = threadIdx.x,
           dim = i - 256; /* halves of the block */
  uint8_t *page = (uint8_t *)pages->pool + row->own;
  const uint16_t *value = (const uint16_t *)sh->value + row->position - us_attention_origin(row);
  if (i < pieces)
    ((uint4 *)(page + pages->k_offset + slot * pages->k_stride))[i] =
        ((const uint4 *)sh->key)[(row->position - row->fresh) * pieces + i];
  if (dim < sh->a.V)
    ((uint16_t *)(page + pages->v_offset))[dim * 64 + slot] = value[dim * (US_ATTENTION_FRESH_PIECES * 8)];
}

#endif
