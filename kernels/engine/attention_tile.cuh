/* attention_tile.cuh: one leaf (64 keys) of one token row and KV head on the tensor cores, by a unit of 4 warps.
 *
 *     us_attention_load_keys<192>(shared, page, keys);         // may be long before the queries are known
 *     us_attention_leaf_sums<192, 128>(shared, keys, &sums);
 *
 * m16n8k16: the 16 rows are query heads that share the KV head (fewer: zero rows), the 8 columns keys (scores) or value dims.
 * Scores: a warp has 16 of the keys and all dims. Weights pass through shared memory. Values: a warp has a quarter of the dims
 * and all keys. The template arguments are Q and V where they are known when compiled, or 0: Q <= 192, V <= 128.
 *
 * Permuted order of the sums: lane (n, t) = (lane / 4, lane % 4) takes 16 contiguous bytes of a K row, dims 8t .. 8t + 7 of 32;
 * they count as columns 2t, 2t + 1, 2t + 8, 2t + 9 of two multiplies. Queries lie in shared memory in the same order, and so do
 * weights and the transposed values with keys for dims.
 *
 * Queries q and weights p are FP32 in the definition. Each is split into two bf16 terms, hi = bf16(x), lo = bf16(x - hi), and
 * multiplied twice: |x - hi - lo| <= 2^-18 |x| (while lo is normal). Products are exact; one multiply's sum is truncated to
 * 2^-22 of its largest term. So a score is off by at most (2^-18 + 4 Q / 32 * 2^-22) sum |q k| scale, under 2^-16 of that sum, and
 * ex2.approx adds 2^-22 to a weight.
 *
 * Bound of a leaf: 320 multiplies at Q = 192, V = 128, 80 a warp, and 24 + 8 loads of 16 bytes a lane from shared memory.
 *
 * Contents: keys and scores; weights; values; a leaf.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_TILE_CUH
#define US_KERNELS_ENGINE_ATTENTION_TILE_CUH

#include "kernels/engine/attention_ring.cuh"
#include "kernels/gpu/mma.cuh"

/* Groups of 32 dims of a key; tiles of 8 value dims of a warp. */
template <int QS, int VS> struct us_attention_size {
  static const int groups = QS ? QS / 32 : 6, tiles = VS ? VS / 32 : 4;
};
template <int QS>
static __device__ __forceinline__ uint32_t us_attention_Q(const struct us_attention_shared *sh) {
  return QS ? QS : sh->a.Q;
}
template <int VS>
static __device__ __forceinline__ uint32_t us_attention_V(const struct us_attention_shared *sh) {
  return VS ? VS : sh->a.V;
}

/* One thread's share of a leaf's result: query heads n, n + 8; dims 8 (tiles * warp + i) + 2t, + 1. */
template <int VS> struct us_attention_part { float m[2], s[2], o[us_attention_size<0, VS>::tiles][4]; };

static __device__ __forceinline__ uint32_t us_attention_warp(void) {
  return threadIdx.x / 32 % 4;
}
static __device__ __forceinline__ uint32_t us_attention_unit(void) {
  return threadIdx.x / US_ATTENTION_THREADS;
}

/* The threads of a unit meet. */
static __device__ __forceinline__ void us_attention_meet(void) {
  asm volatile("bar.sync %0, %1;" ::"r"(4 + us_attention_unit()), "n"(US_ATTENTION_THREADS) : "memory");
}

/* Index of one lane's operand of one multiply: 16 bytes; `low` term, `step` of the two that 32 columns are, lane (n, t). Swizzled so
 * that both the stores of weights and the loads of operands meet every bank once. In the 16 bytes: columns 8t + 4 step + {0, 1} of
 * heads n and n + 8, then columns + {2, 3} of both. */
static __device__ __forceinline__ uint32_t us_attention_operand_index(uint32_t group, uint32_t low,
                                                                      uint32_t step, uint32_t n, uint32_t t) {
  return ((group * 2 + low) * 2 + step) * 32 + n * 4 + (t ^ (n / 2 & 3));
}

/* One lane's operand. */
static __device__ __forceinline__ void us_attention_operand(const uint4 *from, uint32_t group, uint32_t low,
                                                            uint32_t step, uint32_t a[4]) {
  uint32_t lane = threadIdx.x % 32;
  uint4 x = from[us_attention_operand_index(group, low, step, lane / 4, lane % 4)];
  a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
}

/* Index of a float of a unit's o: columns of 8 swizzled so that a warp's stores meet every bank once. */
static __device__ __forceinline__ uint32_t us_attention_sum_index(uint32_t V, uint32_t head, uint32_t dim) {
  uint32_t swizzle = V % 32 ? 0 : head & 3;
  return head * V + ((dim / 8) ^ swizzle) * 8 + dim % 8;
}

/* Two values as hi and lo bf16 pairs. */
static __device__ __forceinline__ void us_attention_split(float x, float y, uint32_t *hi, uint32_t *lo) {
  *hi = us_head_round(x, y);
  *lo = us_head_round(x - __uint_as_float(*hi << 16), y - __uint_as_float(*hi & 0xffff0000u));
}

/* ---- keys and scores ------------------------------------------------------------------------------------------------- */

/* The leaf's page, or any that can be read: what is read there is nobody's, since new keys and values take its place or the row does
 * not see it. (A load under a condition would need zeros in its registers before.) */
static __device__ __forceinline__ const uint8_t *us_attention_readable(const struct us_attention_shared *sh,
                                                                       const struct us_attention_leaf *leaf) {
  const struct us_engine_rank *rank = us_engine_rank_of((const struct us_engine_block *)0);
  return leaf->page ? leaf->page : sh->a.draft ? rank->draft_pool : rank->kv_pool;
}

/* This thread's part of the 64 keys: rows 16 warp + 8 j + n. */
template <int QS>
static __device__ __forceinline__ void us_attention_load_keys(
    const struct us_attention_shared *sh, const uint8_t *page,
    uint4 keys[2][us_attention_size<QS, 0>::groups]) {
  uint32_t lane = threadIdx.x % 32, Q = us_attention_Q<QS>(sh), next = us_engine_k_stride(Q) * 16;
  const uint8_t *from =
      page + us_head_key_offset(Q, sh->job.g, 16 * us_attention_warp() + lane / 4) + lane % 4 * 16;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int i = 0; i < us_attention_size<QS, 0>::groups; i++)
      if (QS || 32 * i < Q) keys[j][i] = __ldcg((const uint4 *)(from + j * next + i * 64));
}

/* New keys take the place of what the cache held. */
template <int QS>
static __device__ __forceinline__ void us_attention_mend_keys(
    const struct us_attention_shared *sh, const struct us_attention_leaf *leaf,
    uint4 keys[2][us_attention_size<QS, 0>::groups]) {
  uint32_t lane = threadIdx.x % 32, Q = us_attention_Q<QS>(sh), pieces = us_engine_k_stride(Q) / 8;
  uint32_t fresh = sh->row[sh->job.row].fresh;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t slot = 16 * us_attention_warp() + 8 * j + lane / 4, index = leaf->base + slot - fresh;
    if (slot >= leaf->end || index >= US_ATTENTION_FRESH) continue;
    const uint4 *from = sh->key + index * pieces + lane % 4;
#pragma unroll
    for (int i = 0; i < us_attention_size<QS, 0>::groups; i++)
      if (QS || 32 * i < Q) keys[j][i] = from[i * 4];
  }
}

/* Dot products of the 16 query heads with this warp's keys: score[j][e]: head n + 8 (e / 2), key 16 warp + 8 j + 2 t + e % 2. */
template <int QS>
static __device__ __forceinline__ void us_attention_scores(
    const struct us_attention_shared *sh, const uint4 keys[2][us_attention_size<QS, 0>::groups],
    float score[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll
  for (int i = 0; i < us_attention_size<QS, 0>::groups; i++) {
    if (!QS && 32 * i >= us_attention_Q<QS>(sh)) continue; /* never staged, never loaded */
#pragma unroll
    for (int low = 1; low >= 0; low--) {
      uint32_t a[4], b[4];
      us_attention_operand(sh->q, i, low, 0, a), us_attention_operand(sh->q, i, low, 1, b);
#pragma unroll
      for (int j = 0; j < 2; j++) us_mma_bf16(score[j], a, keys[j][i].x, keys[j][i].y, score[j]);
#pragma unroll
      for (int j = 0; j < 2; j++) us_mma_bf16(score[j], b, keys[j][i].z, keys[j][i].w, score[j]);
    }
  }
}

/* ---- weights --------------------------------------------------------------------------------------------------------- */

/* Hide what the row does not see, and find the largest score of each head in the leaf, times `factor`. */
static __device__ __forceinline__ void us_attention_largest(struct us_attention_shared *sh,
                                                            const struct us_attention_leaf *leaf,
                                                            float factor, float score[2][4], float m[2]) {
  uint32_t lane = threadIdx.x % 32, warp = us_attention_warp(), unit = us_attention_unit();
  uint32_t begin = leaf->begin, seen = leaf->end - begin, slot = 16 * warp + lane % 4 * 2 - begin;
  if (seen < 64)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (slot + (8 * j + e % 2) >= seen) score[j][e] = -CUDART_INF_F; /* before `begin`: large */
#pragma unroll
  for (int h = 0; h < 2; h++) {
    m[h] = fmaxf(fmaxf(score[0][2 * h], score[0][2 * h + 1]), fmaxf(score[1][2 * h], score[1][2 * h + 1]));
    m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
    m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
    if (lane % 4 == 0) sh->max[unit][lane / 4 + 8 * h][warp] = m[h];
  }
  us_attention_meet();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float4 of = *(const float4 *)sh->max[unit][lane / 4 + 8 * h];
    m[h] = fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w)) * factor;
  }
}

/* Weights into shared memory, and their sum of each head. */
static __device__ __forceinline__ void us_attention_weights(struct us_attention_shared *sh, float factor,
                                                            const float score[2][4], const float m[2],
                                                            float s[2]) {
  uint32_t lane = threadIdx.x % 32, n = lane / 4, t = lane % 4, warp = us_attention_warp(),
           unit = us_attention_unit();
  s[0] = s[1] = 0;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t hi[2], lo[2], piece = 2 * warp + j; /* of 8 keys */
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = us_attention_exp2(fmaf(score[j][2 * h], factor, -m[h]));
      float y = us_attention_exp2(fmaf(score[j][2 * h + 1], factor, -m[h]));
      us_attention_split(x, y, &hi[h], &lo[h]);
      s[h] += x + y;
    }
    uint2 *to =
        (uint2 *)(sh->p[unit] + us_attention_operand_index(piece / 4, 0, t / 2, n, piece % 4)) + t % 2;
    to[0] = make_uint2(hi[0], hi[1]), to[2 * 32 * 2] = make_uint2(lo[0], lo[1]);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    s[h] += __shfl_xor_sync(0xffffffffu, s[h], 1);
    s[h] += __shfl_xor_sync(0xffffffffu, s[h], 2);
    if (t == 0) sh->sum[unit][n + 8 * h][warp] = s[h];
  }
  us_attention_meet();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float4 of = *(const float4 *)sh->sum[unit][n + 8 * h];
    s[h] = (of.x + of.y) + (of.z + of.w);
  }
}

/* ---- values ---------------------------------------------------------------------------------------------------------- */

/* value[c][i]: dim 8 (tiles * warp + i) + n, slots 32 c + 8 t to + 7. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_load_values(
    const struct us_attention_shared *sh, const uint8_t *page,
    uint4 value[2][us_attention_size<0, VS>::tiles]) {
  const int tiles = us_attention_size<0, VS>::tiles;
  uint32_t lane = threadIdx.x % 32, V = us_attention_V<VS>(sh),
           first = 8 * tiles * us_attention_warp() + lane / 4;
  const uint8_t *from =
      page + us_head_value_offset(sh->a.G, us_attention_Q<QS>(sh), V, sh->job.g, first) + lane % 4 * 16;
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int i = 0; i < tiles; i++)
      if (VS || first + 8 * i < V) value[c][i] = __ldcg((const uint4 *)(from + i * 1024 + c * 64));
}

/* Bits of the 8 slots from `slot` on that lie in [begin, end). */
static __device__ __forceinline__ uint32_t us_attention_slots(uint32_t slot, uint32_t begin, uint32_t end) {
  uint32_t from = begin > slot ? begin - slot : 0, to = end > slot ? end - slot : 0;
  return from < 8 ? ((1u << (to < 8 ? to : 8)) - 1) & ~((1u << from) - 1) : 0;
}

/* Slots that the row does not see become 0 (0 times Inf would be NaN), new values take their place. `value`: of slots 32 c on. */
template <int VS>
static __device__ __forceinline__ void us_attention_mend_values(
    const struct us_attention_shared *sh, const struct us_attention_leaf *leaf, uint32_t c,
    uint4 value[us_attention_size<0, VS>::tiles]) {
  const int tiles = us_attention_size<0, VS>::tiles;
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t lane = threadIdx.x % 32, first = 8 * tiles * us_attention_warp() + lane / 4;
  uint32_t base = leaf->base, end = leaf->end, fresh = row->fresh, slot = 32 * c + lane % 4 * 8, keep[4];
  uint32_t cached = fresh > base ? fresh - base : 0; /* slots */
  if (cached > end) cached = end;
  uint32_t seen = us_attention_slots(slot, leaf->begin, cached);
  uint32_t piece = (base + slot - us_attention_origin(sh, row)) / 8; /* large if before */
  if (cached == end) piece = US_ATTENTION_FRESH_PIECES;
#pragma unroll
  for (int e = 0; e < 4; e++)
    keep[e] = (seen >> 2 * e & 1) * 0xffffu | (seen >> (2 * e + 1) & 1) * 0xffff0000u;
#pragma unroll
  for (int i = 0; i < tiles; i++) {
    uint4 x = make_uint4(0, 0, 0, 0), *v = value + i;
    if (piece < US_ATTENTION_FRESH_PIECES && (VS || first + 8 * i < sh->a.V))
      x = sh->value[(first + 8 * i) * US_ATTENTION_FRESH_PIECES + piece];
    v->x = (v->x & keep[0]) | x.x, v->y = (v->y & keep[1]) | x.y;
    v->z = (v->z & keep[2]) | x.z, v->w = (v->w & keep[3]) | x.w;
  }
}

template <int VS>
static __device__ __forceinline__ void us_attention_clear_sums(float o[us_attention_size<0, VS>::tiles][4]) {
#pragma unroll
  for (int i = 0; i < us_attention_size<0, VS>::tiles; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
}

/* o += weights times values, of slots 32 c to + 31. */
template <int VS>
static __device__ __forceinline__ void us_attention_attend(const struct us_attention_shared *sh, uint32_t c,
                                                           const uint4 value[us_attention_size<0, VS>::tiles],
                                                           float o[us_attention_size<0, VS>::tiles][4]) {
  const int tiles = us_attention_size<0, VS>::tiles;
#pragma unroll
  for (int low = 1; low >= 0; low--) {
    uint32_t a[4];
    us_attention_operand(sh->p[us_attention_unit()], c, low, 0, a);
#pragma unroll
    for (int i = 0; i < tiles; i++) us_mma_bf16(o[i], a, value[i].x, value[i].y, o[i]);
    us_attention_operand(sh->p[us_attention_unit()], c, low, 1, a);
#pragma unroll
    for (int i = 0; i < tiles; i++) us_mma_bf16(o[i], a, value[i].z, value[i].w, o[i]);
  }
}

/* ---- a leaf ---------------------------------------------------------------------------------------------------------- */

/* All threads of a unit. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_leaf_sums(struct us_attention_shared *sh,
                                                              uint4 keys[2][us_attention_size<QS, 0>::groups],
                                                              struct us_attention_part<VS> *out) {
  uint4 value[2][us_attention_size<0, VS>::tiles];
  const struct us_attention_leaf *leaf = sh->leaf + us_attention_unit();
  float score[2][4], factor = sh->a.scale * US_ATTENTION_LOG2E;
  us_attention_mend_keys<QS>(sh, leaf, keys);
  us_attention_scores<QS>(sh, keys, score);
  us_attention_load_values<QS, VS>(sh, us_attention_readable(sh, leaf), value);
  us_attention_largest(sh, leaf, factor, score, out->m);
  us_attention_weights(sh, factor, score, out->m, out->s);
  us_attention_clear_sums<VS>(out->o);
#pragma unroll 1 /* once a layer: the code costs more than moving registers */
  for (uint32_t c = 0; c < 2; c++) {
    us_attention_mend_values<VS>(sh, leaf, c, value[0]);
    us_attention_attend<VS>(sh, c, value[0], out->o);
#pragma unroll
    for (int i = 0; i < us_attention_size<0, VS>::tiles; i++) value[0][i] = value[1][i];
  }
}

/* A unit's result into shared memory, where other threads fold it. */
template <int VS>
static __device__ __forceinline__ void us_attention_keep_part(struct us_attention_shared *sh,
                                                              const struct us_attention_part<VS> *part) {
  const int tiles = us_attention_size<0, VS>::tiles;
  uint32_t lane = threadIdx.x % 32, warp = us_attention_warp(), V = us_attention_V<VS>(sh);
  float *sums = sh->sums[us_attention_unit()];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t head = lane / 4 + 8 * h;
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      uint32_t dim = 8 * (tiles * warp + i) + lane % 4 * 2;
      if (VS || dim < V)
        *(float2 *)(sums + us_attention_sum_index(V, head, dim)) =
            make_float2(part->o[i][2 * h], part->o[i][2 * h + 1]);
    }
    if (warp == 0 && lane % 4 == 0) sums[16 * V + head] = part->m[h], sums[16 * V + 16 + head] = part->s[h];
  }
}

#endif
