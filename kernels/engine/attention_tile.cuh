/* attention_tile.cuh: one leaf (64 keys) of one token row and KV head on the tensor cores, by a unit of 4 warps.
 *
 *     us_attention_load_keys<KG, 0, KG>(&pages, page, keys);                    // may be long before the queries are known
 *     us_attention_leaf<KG, VT>(shared, row, &pages, &leaf, keys, &sums);       // after the queries stand in shared memory
 *
 * m16n8k16: the 16 rows are query heads that share the KV head (fewer: zero rows), the 8 columns keys (scores) or value dims.
 * Scores: a warp has 16 of the keys and all dims. Weights pass through shared memory. Values: a warp has a quarter of the dims
 * and all keys.
 *
 * Permuted order of the sums: lane (n, t) = (lane / 4, lane % 4) takes 16 contiguous bytes of a K row, dims 8t .. 8t + 7 of 32;
 * they count as columns 2t, 2t + 1, 2t + 8, 2t + 9 of two multiplies. Queries lie in shared memory in the same order, and so do
 * weights and the transposed values with keys for dims.
 *
 * Queries q and weights p are FP32 in the definition. Each is split into two bf16 terms, hi = bf16(x), lo = bf16(x - hi), and
 * multiplied twice: |x - hi - lo| <= 2^-18 |x| (while lo is normal). Products are exact; one multiply's sum is truncated to
 * 2^-22 of its largest term. So a score is off by at most (2^-18 + 2 Q / 16 * 2^-22) sum |q k| scale, under 2^-16 of that sum, and
 * ex2.approx adds 2^-22 to a weight.
 *
 * Bound of a leaf: 320 multiplies at Q = 192, V = 128 (2 us of one SM sub-core's tensor unit), and as many cycles for reading
 * queries from shared memory (once a warp).
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_TILE_CUH
#define US_KERNELS_ENGINE_ATTENTION_TILE_CUH

#include "kernels/engine/attention_fold.cuh"
#include "kernels/engine/attention_head.cuh"
#include "kernels/gpu/mma.cuh"

#define US_ATTENTION_UNITS        4
#define US_ATTENTION_THREADS      128 /* of a unit */
#define US_ATTENTION_FRESH        16  /* new keys, at most: rows of a sequence in a pass */
#define US_ATTENTION_FRESH_PIECES 3   /* 8 positions each, at multiples of 8, that new keys may touch */

/* What a row sees, and how its keys are cut. */
struct us_attention_row {
  const uint64_t *table; /* of the layer's pages */
  uint64_t own;          /* target: the page that holds its position */
  uint32_t sequence, position;
  uint32_t begin, end; /* positions seen outside a drafter's block */
  uint32_t fresh,
      fresh_row; /* position and row of the pass of the first new key: keys from there on come from qkv */
  uint32_t fresh_count; /* of this row's: target: up to itself, draft: the block */
  uint32_t first, last; /* leaves: [first, last] */
  uint32_t pieces;      /* jobs a chunk: groups, segments or everything, and the block's leaf */
  uint32_t first_job;
  uint8_t cut;        /* enum us_attention_cut */
  bool leaves, block; /* keys outside the block are seen; there is a block */
};
enum us_attention_cut { US_ATTENTION_WHOLE, US_ATTENTION_GROUPS, US_ATTENTION_SEGMENTS };

/* Position of the first new value in shared memory: pieces of 8 line up with the slots of a page, or of a block. */
static __device__ __forceinline__ uint32_t us_attention_origin(const struct us_attention_row *row) {
  return row->block ? row->fresh : row->fresh / 8 * 8;
}

/* Leaves [begin, end) of a unit; none if equal. */
struct us_attention_leaves {
  uint32_t begin, end;
};

/* The job that a block is at: a row, a chunk of 16 query heads, a piece of the row's keys. */
struct us_attention_job {
  uint32_t row, chunk, piece;
  uint32_t g, first_head, heads; /* of the chunk */
  uint32_t new_keys;             /* that the piece holds: 0 or all of the row's */
  bool appends;                  /* writes the row's key and value to the cache */
  struct us_head_pages pages;
  struct us_attention_leaves leaves[US_ATTENTION_UNITS];
};

struct us_attention_shared {
  uint4 q[6 * 2 * 2 * 32]; /* by us_attention_operand_index: groups of 32 dims */
  union {
    struct {
      uint4 p[US_ATTENTION_UNITS][2 * 2 * 2 * 32]; /* weights: keys for dims */
      uint16_t key[US_ATTENTION_FRESH * 192];      /* new keys, rotated: (fresh_count, k_stride) */
      uint4 value
          [128 *
           US_ATTENTION_FRESH_PIECES]; /* (V, 24) from us_attention_origin on, zero where no new key is */
    };
    float sums[US_ATTENTION_UNITS]
              [16 * (128 + 2)]; /* of each unit: o by us_attention_sum_index, then m, then s */
  };
  float max[US_ATTENTION_UNITS][4][16], sum[US_ATTENTION_UNITS][4][16]; /* by warp of the unit */
  struct us_engine_attention a;
  struct us_attention_row row[US_ENGINE_ROWS];
  struct us_attention_job job;
  float sink[128];   /* (H) times log2 e; -Inf: none */
  uint32_t near[40]; /* sequences of rows 8 * tile - 16 ... + 23 of the pass */
  uint32_t chunks;   /* of 16 query heads */
  uint32_t jobs;
  uint32_t ready; /* the input was done when thread 0 looked */
  uint32_t last;  /* this block was the last of a row and chunk */
};
static_assert(sizeof(struct us_attention_shared) <= US_ENGINE_VECTOR_BYTES, "shared memory of attention");

/* Where a tile of 64 keys lies and which of its slots a row sees. */
struct us_attention_leaf {
  const uint8_t *page; /* NULL: a drafter's block */
  uint32_t base;       /* position of slot 0 */
  uint32_t begin, end;
};

/* One thread's share of a leaf's result: query heads n, n + 8; dims 8 (VT warp + i) + 2t, + 1. */
template <int VT> struct us_attention_part { float m[2], s[2], o[VT][4]; };

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

/* Index of a float of a unit's o: columns of 8 swizzled for the same reason. */
static __device__ __forceinline__ uint32_t us_attention_sum_index(uint32_t V, uint32_t head, uint32_t dim) {
  uint32_t swizzle = V % 32 ? 0 : head & 3;
  return head * V + ((dim / 8) ^ swizzle) * 8 + dim % 8;
}

/* Two values as hi and lo bf16 pairs. */
static __device__ __forceinline__ void us_attention_split(float x, float y, uint32_t *hi, uint32_t *lo) {
  __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  __nv_bfloat162 l = __floats2bfloat162_rn(x - __bfloat162float(h.x), y - __bfloat162float(h.y));
  memcpy(hi, &h, 4), memcpy(lo, &l, 4);
}

/* ---- keys and scores ---------------------------------------------------------------------------------------------------- */

/* This thread's part of the 64 keys: rows 16 warp + 8 j + n, groups [BEGIN, END) of 32 dims; zeros for no page and for dims that
 * do not exist. */
template <int KG, int BEGIN, int END>
static __device__ __forceinline__ void us_attention_load_keys(const struct us_head_pages *p,
                                                              const uint8_t *page, uint4 keys[2][KG]) {
  uint32_t lane = threadIdx.x % 32, slot = 16 * us_attention_warp() + lane / 4;
  uint32_t groups = page ? p->k_stride / 64 : 0, next = 8 * p->k_stride;
  const uint8_t *from = page + p->k_offset + slot * p->k_stride + lane % 4 * 16;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int g = BEGIN; g < END; g++)
      keys[j][g] = g < groups ? __ldcg((const uint4 *)(from + j * next + g * 64)) : make_uint4(0, 0, 0, 0);
}

/* New keys take the place of what the cache held. */
template <int KG>
static __device__ __forceinline__ void us_attention_mend_keys(const struct us_attention_shared *sh,
                                                              const struct us_attention_leaf *leaf,
                                                              uint4 keys[2][KG]) {
  uint32_t lane = threadIdx.x % 32, groups = sh->job.pages.k_stride / 64, first = sh->row[sh->job.row].fresh;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t slot = 16 * us_attention_warp() + 8 * j + lane / 4;
    if (slot >= leaf->end || leaf->base + slot < first) continue;
    const uint4 *from = (const uint4 *)sh->key + (leaf->base + slot - first) * groups * 4 + lane % 4;
#pragma unroll
    for (int g = 0; g < KG; g++)
      if (g < groups) keys[j][g] = from[g * 4];
  }
}

/* Dot products of the 16 query heads with this warp's keys: score[j][e]: head n + 8 (e / 2), key 16 warp + 8 j + 2 t + e % 2. */
template <int KG>
static __device__ __forceinline__ void us_attention_scores(const struct us_attention_shared *sh,
                                                           const uint4 keys[2][KG], float score[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll
  for (int g = 0; g < KG; g++) {
    if (g >= (int)(sh->job.pages.k_stride / 64))
      continue; /* never staged: zero keys times whatever lies there is not zero */
#pragma unroll
    for (int low = 1; low >= 0; low--) {
      uint32_t a[4], b[4];
      us_attention_operand(sh->q, g, low, 0, a), us_attention_operand(sh->q, g, low, 1, b);
#pragma unroll
      for (int j = 0; j < 2; j++) us_mma_bf16(score[j], a, keys[j][g].x, keys[j][g].y, score[j]);
#pragma unroll
      for (int j = 0; j < 2; j++) us_mma_bf16(score[j], b, keys[j][g].z, keys[j][g].w, score[j]);
    }
  }
}

/* ---- weights -------------------------------------------------------------------------------------------------------------- */

/* Scale, hide what the row does not see, and find the largest score of each head in the leaf. */
static __device__ __forceinline__ void us_attention_largest(struct us_attention_shared *sh,
                                                            const struct us_attention_leaf *leaf,
                                                            float factor, float score[2][4], float m[2]) {
  uint32_t lane = threadIdx.x % 32, warp = us_attention_warp(), unit = us_attention_unit();
  m[0] = m[1] = -CUDART_INF_F;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      uint32_t slot = 16 * warp + 8 * j + lane % 4 * 2 + e % 2;
      score[j][e] = slot >= leaf->begin && slot < leaf->end ? score[j][e] * factor : -CUDART_INF_F;
      m[e / 2] = fmaxf(m[e / 2], score[j][e]);
    }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
    m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
    if (lane % 4 == 0) sh->max[unit][warp][lane / 4 + 8 * h] = m[h];
  }
  us_attention_meet();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t head = lane / 4 + 8 * h;
    m[h] = fmaxf(fmaxf(sh->max[unit][0][head], sh->max[unit][1][head]),
                 fmaxf(sh->max[unit][2][head], sh->max[unit][3][head]));
  }
}

/* Weights into shared memory, and their sum of each head. */
static __device__ __forceinline__ void us_attention_weights(struct us_attention_shared *sh,
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
      float x = us_attention_exp2(score[j][2 * h] - m[h]), y = us_attention_exp2(score[j][2 * h + 1] - m[h]);
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
    if (t == 0) sh->sum[unit][warp][n + 8 * h] = s[h];
  }
  us_attention_meet();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t head = n + 8 * h;
    s[h] =
        (sh->sum[unit][0][head] + sh->sum[unit][1][head]) + (sh->sum[unit][2][head] + sh->sum[unit][3][head]);
  }
}

/* ---- values --------------------------------------------------------------------------------------------------------------- */

/* value[i][c][e]: dim 8 (VT warp + i) + n, slots 32 c + 8 t + 2 e, + 1. */
template <int VT>
static __device__ __forceinline__ void us_attention_load_values(const struct us_head_pages *p,
                                                                const uint8_t *page, uint32_t V,
                                                                uint32_t value[VT][2][4]) {
  uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < VT; i++) {
    uint32_t dim = 8 * (VT * us_attention_warp() + i) + lane / 4;
    const uint8_t *from = page + p->v_offset + dim * 128 + lane % 4 * 16;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      uint4 v = page && dim < V ? __ldcg((const uint4 *)(from + c * 64)) : make_uint4(0, 0, 0, 0);
      value[i][c][0] = v.x, value[i][c][1] = v.y, value[i][c][2] = v.z, value[i][c][3] = v.w;
    }
  }
}

/* The bits of `word` (two slots) that lie in slots [begin, end). */
static __device__ __forceinline__ uint32_t us_attention_slots(uint32_t slot, uint32_t begin, uint32_t end) {
  return (slot >= begin && slot < end ? 0xffffu : 0) |
         (slot + 1 >= begin && slot + 1 < end ? 0xffff0000u : 0);
}

/* Slots that the row does not see become 0 (0 times Inf would be NaN), new values take their place. */
template <int VT>
static __device__ __forceinline__ void us_attention_mend_values(const struct us_attention_shared *sh,
                                                                const struct us_attention_leaf *leaf,
                                                                uint32_t value[VT][2][4]) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t lane = threadIdx.x % 32, old = row->fresh > leaf->base ? row->fresh - leaf->base : 0;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    uint32_t slot = 32 * c + lane % 4 * 8, piece = (leaf->base + slot - us_attention_origin(row)) / 8,
             keep[4], take[4];
    bool fresh = leaf->base + slot >= us_attention_origin(row) && piece < US_ATTENTION_FRESH_PIECES;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      take[e] = us_attention_slots(slot + 2 * e, leaf->begin > old ? leaf->begin : old, leaf->end);
      keep[e] = us_attention_slots(slot + 2 * e, leaf->begin, leaf->end) & ~take[e];
    }
#pragma unroll
    for (int i = 0; i < VT; i++) {
      uint32_t dim = 8 * (VT * us_attention_warp() + i) + lane / 4, *v = value[i][c];
      uint4 x = fresh && dim < sh->a.V ? sh->value[dim * US_ATTENTION_FRESH_PIECES + piece]
                                       : make_uint4(0, 0, 0, 0);
      v[0] = (v[0] & keep[0]) | (x.x & take[0]), v[1] = (v[1] & keep[1]) | (x.y & take[1]);
      v[2] = (v[2] & keep[2]) | (x.z & take[2]), v[3] = (v[3] & keep[3]) | (x.w & take[3]);
    }
  }
}

/* o = weights times values. */
template <int VT>
static __device__ __forceinline__ void us_attention_attend(const struct us_attention_shared *sh,
                                                           const uint32_t value[VT][2][4], float o[VT][4]) {
#pragma unroll
  for (int i = 0; i < VT; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int low = 1; low >= 0; low--)
#pragma unroll
      for (int step = 0; step < 2; step++) {
        uint32_t a[4];
        us_attention_operand(sh->p[us_attention_unit()], c, low, step, a);
#pragma unroll
        for (int i = 0; i < VT; i++)
          us_mma_bf16(o[i], a, value[i][c][2 * step], value[i][c][2 * step + 1], o[i]);
      }
}

/* ---- a leaf --------------------------------------------------------------------------------------------------------------- */

/* All threads of a unit. */
template <int KG, int VT>
static __device__ __forceinline__ void us_attention_leaf_sums(struct us_attention_shared *sh,
                                                              const struct us_attention_leaf *leaf,
                                                              uint4 keys[2][KG],
                                                              struct us_attention_part<VT> *out) {
  uint32_t value[VT][2][4];
  bool fresh = leaf->base + leaf->end > sh->row[sh->job.row].fresh;
  float score[2][4];
  if (fresh) us_attention_mend_keys<KG>(sh, leaf, keys);
  us_attention_scores<KG>(sh, keys, score);
  us_attention_load_values<VT>(&sh->job.pages, leaf->page, sh->a.V, value);
  us_attention_largest(sh, leaf, sh->a.scale * US_ATTENTION_LOG2E, score, out->m);
  us_attention_weights(sh, score, out->m, out->s);
  if (fresh || leaf->begin || leaf->end < 64) us_attention_mend_values<VT>(sh, leaf, value);
  us_attention_attend<VT>(sh, value, out->o);
}

/* part = fold(part, next), element by element as us_attention_fold. */
template <int VT>
static __device__ __forceinline__ void us_attention_fold_part(struct us_attention_part<VT> *part,
                                                              const struct us_attention_part<VT> *next) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    struct us_attention_weights w = us_attention_weigh(part->m[h], next->m[h]);
    part->m[h] = w.m, part->s[h] = fmaf(next->s[h], w.b, part->s[h] * w.a);
#pragma unroll
    for (int i = 0; i < VT; i++)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++) part->o[i][e] = fmaf(next->o[i][e], w.b, part->o[i][e] * w.a);
  }
}

/* A unit's result into shared memory, where other threads fold it. */
template <int VT>
static __device__ __forceinline__ void us_attention_keep_part(struct us_attention_shared *sh,
                                                              const struct us_attention_part<VT> *part) {
  uint32_t lane = threadIdx.x % 32, warp = us_attention_warp(), V = sh->a.V;
  float *sums = sh->sums[us_attention_unit()];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t head = lane / 4 + 8 * h;
#pragma unroll
    for (int i = 0; i < VT; i++) {
      uint32_t dim = 8 * (VT * warp + i) + lane % 4 * 2;
      if (dim < V)
        *(float2 *)(sums + us_attention_sum_index(V, head, dim)) =
            make_float2(part->o[i][2 * h], part->o[i][2 * h + 1]);
    }
    if (warp == 0 && lane % 4 == 0) sums[16 * V + head] = part->m[h], sums[16 * V + 16 + head] = part->s[h];
  }
}

#endif
