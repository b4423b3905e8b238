/* attention_shared.cuh: a job that rows of a sequence share: every leaf is read once, into the ring, for all of them.
 *
 *     us_attention_run_shared<192, 128>(wait);     // all compute threads, the job is set, the ring is theirs
 *
 * A pair of warps has a row: of the scores each has 32 of the keys, of the values half of the dims. Operands, their order and the tree are
 * those of a row alone (attention_tile.cuh, attention_fold.cuh), so the bits are. A thread's sums of a group stay in registers, those
 * of the piece in `partial` (L2), a group at a time.
 *
 * Bound: tensor cores, 320 multiplies a row and leaf: for 8 rows 2.7 us a leaf of 40 KB, under way meanwhile.
 *
 * Contents: staging; a leaf; a job.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_SHARED_CUH
#define US_KERNELS_ENGINE_ATTENTION_SHARED_CUH

#include "kernels/engine/attention_stage.cuh"

struct us_attention_room { /* the ring */
  uint4 q[US_ENGINE_ROWS][6 * 2 * 2 * 32];
  uint8_t leaf[US_ATTENTION_SLOT];
  uint4 p[US_ENGINE_ROWS][2 * 2 * 2 * 32];
  float max[US_ENGINE_ROWS][16][2], sum[US_ENGINE_ROWS][16][2]; /* by head and warp of the pair */
};
static_assert(sizeof(struct us_attention_room) <= US_ENGINE_STAGES * US_ENGINE_STAGE_BYTES, "shared jobs");

static __device__ __forceinline__ struct us_attention_room *us_attention_room_of(void) {
  return (struct us_attention_room *)us_engine_shared_of((const struct us_engine_block *)0)->ring[0];
}
static __device__ __forceinline__ void us_attention_pair_meet(void) {
  asm volatile("bar.sync %0, 64;" ::"r"(4 + threadIdx.x / 64) : "memory");
}

/* What a warp's row sees of a leaf: begin == end: nothing. */
struct us_attention_view {
  uint32_t begin, end;
};
static __device__ __forceinline__ uint32_t us_attention_base(const struct us_attention_row *row,
                                                             uint32_t id) {
  return id == US_ATTENTION_BLOCK ? row->fresh : id * 64;
}
static __device__ __forceinline__ struct us_attention_view us_attention_view(
    const struct us_attention_shared *sh, const struct us_attention_row *row, bool exists, uint32_t id) {
  struct us_attention_view view = {0, 0};
  bool block = id == US_ATTENTION_BLOCK;
  if (!exists || (!block && (id < row->first || id >= row->first + row->leaves))) return view;
  uint32_t base = us_attention_base(row, id), end = (block ? row->fresh + row->count : row->end) - base;
  view.begin = row->begin > base ? row->begin - base : 0, view.end = end < 64 ? end : 64;
  return view;
}

/* ---- staging --------------------------------------------------------------------------------------------------------- */

/* Queries of all rows, and the new keys and values that the last of them sees. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_stage_shared(struct us_attention_shared *sh) {
  const struct us_attention_row *last = sh->row + sh->job.row + sh->job.rows - 1;
  uint32_t lane = threadIdx.x % 16, rows = sh->job.rows, new_keys = sh->job.new_keys;
  float4 v = us_attention_load_new<QS, VS>(sh, last);
  us_attention_clear_new(sh);
#pragma unroll 1
  for (uint32_t index = threadIdx.x / 16; index / 2 * 2 < rows * 16 + new_keys;
       index += US_ENGINE_COMPUTE / 16) {
    bool query = index < rows * 16,
         exists = query ? index % 16 < sh->job.heads : index - rows * 16 < new_keys;
    uint32_t r = query ? index / 16 : 0, of = query ? index % 16 : 16 + (exists ? index - rows * 16 : 0);
    struct us_head h =
        us_attention_head<QS>(sh, query ? sh->row + sh->job.row + r : last, query && !exists ? 0 : of);
    float2 x[US_HEAD_PAIRS];
    us_head_load<QS>(&h, lane, x);
    us_head_finish<QS>(&h, lane, x);
    if (!exists)
#pragma unroll
      for (uint32_t i = 0; i < us_head_count<QS>::pairs; i++) x[i] = make_float2(0, 0);
    if (query || exists) us_attention_keep_head<QS>(sh, us_attention_room_of()->q[r], of, x);
  }
  us_engine_meet();
  us_attention_keep_new<VS>(sh, last, v);
}

/* All compute threads: new keys take the place of what the cache held. */
template <int QS>
static __device__ __forceinline__ void us_attention_patch_keys(const struct us_attention_shared *sh,
                                                               const struct us_attention_row *last,
                                                               uint32_t base) {
  uint32_t pieces = us_engine_k_stride(us_attention_Q<QS>(sh)) / 8;
  uint4 *leaf = (uint4 *)us_attention_room_of()->leaf;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < last->count * pieces; i += US_ENGINE_COMPUTE) {
    uint32_t slot = last->fresh + i / pieces - base; /* large before the leaf */
    if (slot < 64) leaf[us_attention_at(pieces, slot, i % pieces)] = sh->key[i];
  }
}
template <int VS>
static __device__ __forceinline__ void us_attention_patch_values(const struct us_attention_shared *sh,
                                                                 const struct us_attention_row *last,
                                                                 uint32_t base) {
  uint32_t dim = threadIdx.x % 128, origin = us_attention_origin(sh, last);
  if (dim >= us_attention_V<VS>(sh)) return;
  const uint16_t *from = (const uint16_t *)(sh->value + dim * US_ATTENTION_FRESH_PIECES);
  uint8_t *leaf = us_attention_room_of()->leaf + US_ATTENTION_VALUES;
#pragma unroll 1
  for (uint32_t i = threadIdx.x / 128; i < last->count; i += US_ENGINE_COMPUTE / 128) {
    uint32_t slot = last->fresh + i - base;
    if (slot < 64)
      ((uint16_t *)((uint4 *)leaf + us_attention_at(8, dim, slot / 8)))[slot % 8] =
          from[last->fresh + i - origin];
  }
}

/* A pair of warps: its row's own key and value into the page. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_append_shared(const struct us_attention_shared *sh,
                                                                  const struct us_attention_row *row,
                                                                  uint8_t *page) {
  uint32_t slot = row->position % 64, Q = us_attention_Q<QS>(sh), V = us_attention_V<VS>(sh);
  uint32_t pieces = us_engine_k_stride(Q) / 8, thread = threadIdx.x % 64,
           at = row->position - us_attention_origin(sh, row);
  if (thread < pieces)
    ((uint4 *)(page + us_head_key_offset(Q, sh->job.g, slot)))[thread] =
        sh->key[(row->position - row->fresh) * pieces + thread];
#pragma unroll 1
  for (uint32_t dim = thread; dim < V; dim += 64)
    ((uint16_t *)(page + us_head_value_offset(sh->a.G, Q, V, sh->job.g, dim)))[slot] =
        ((const uint16_t *)(sh->value + dim * US_ATTENTION_FRESH_PIECES))[at];
}

/* ---- a leaf ---------------------------------------------------------------------------------------------------------- */

/* As us_attention_scores: score[j][e]: head n + 8 (e / 2), key 32 half + 8 j + 2 t + e % 2. */
template <int QS>
static __device__ __forceinline__ void us_attention_scores_shared(const struct us_attention_shared *sh,
                                                                  const uint4 *q, float score[4][4]) {
  uint32_t lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2,
           pieces = us_engine_k_stride(us_attention_Q<QS>(sh)) / 8;
  asm volatile("" : "+r"(lane)); /* what follows from it is not worth registers between leaves */
  struct us_attention_pieces from =
      us_attention_pieces_of(us_attention_room_of()->leaf, pieces, 32 * half + lane / 4, lane % 4);
#pragma unroll
  for (int j = 0; j < 4; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll 1 /* registers: the group's sums stay in them */
  for (int i = 0; i < us_attention_size<QS, 0>::groups; i++) {
    if (!QS && 32 * i >= us_attention_Q<QS>(sh)) break;
    uint4 key[4];
    const uint4 *at = from.even + 4 * i;
    from.even = from.odd, from.odd = at - 4 * i;
#pragma unroll
    for (int j = 0; j < 4; j++) key[j] = at[8 * j * pieces];
#pragma unroll
    for (int low = 1; low >= 0; low--) {
      uint32_t a[4];
      us_attention_operand(q, i, low, 0, a);
#pragma unroll
      for (int j = 0; j < 4; j++) us_mma_bf16(score[j], a, key[j].x, key[j].y, score[j]);
      us_attention_operand(q, i, low, 1, a);
#pragma unroll
      for (int j = 0; j < 4; j++) us_mma_bf16(score[j], a, key[j].z, key[j].w, score[j]);
    }
  }
}

/* Hide, and find the largest; one meeting of the pair. */
static __device__ __forceinline__ void us_attention_largest_shared(struct us_attention_view view,
                                                                   float factor, float score[4][4],
                                                                   float m[2]) {
  uint32_t lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2;
  float(*max)[2] = us_attention_room_of()->max[threadIdx.x / 64];
  if (view.begin > 0 || view.end < 64)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        uint32_t slot = 32 * half + 8 * j + lane % 4 * 2 + e % 2;
        if (slot < view.begin || slot >= view.end) score[j][e] = -CUDART_INF_F;
      }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    m[h] = -CUDART_INF_F;
#pragma unroll
    for (int j = 0; j < 4; j++) m[h] = fmaxf(m[h], fmaxf(score[j][2 * h], score[j][2 * h + 1]));
    m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
    m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
    if (lane % 4 == 0) max[lane / 4 + 8 * h][half] = m[h];
  }
  us_attention_pair_meet();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float2 of = *(const float2 *)max[lane / 4 + 8 * h];
    m[h] = fmaxf(of.x, of.y) * factor;
  }
}

/* Weights into shared memory, and their sums of 16 keys each, added in pairs as four warps would. */
static __device__ __forceinline__ void us_attention_weights_shared(float factor, const float score[4][4],
                                                                   const float m[2]) {
  struct us_attention_room *room = us_attention_room_of();
  uint32_t lane = threadIdx.x % 32, n = lane / 4, t = lane % 4, half = threadIdx.x / 32 % 2,
           row = threadIdx.x / 64;
  float s[2][2]; /* 16 keys, head */
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t hi[2], lo[2], piece = 4 * half + j;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = us_attention_exp2(fmaf(score[j][2 * h], factor, -m[h]));
      float y = us_attention_exp2(fmaf(score[j][2 * h + 1], factor, -m[h]));
      us_attention_split(x, y, &hi[h], &lo[h]);
      s[j / 2][h] = j % 2 ? s[j / 2][h] + (x + y) : x + y;
    }
    uint2 *to =
        (uint2 *)(room->p[row] + us_attention_operand_index(piece / 4, 0, t / 2, n, piece % 4)) + t % 2;
    to[0] = make_uint2(hi[0], hi[1]), to[2 * 32 * 2] = make_uint2(lo[0], lo[1]);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      s[k][h] += __shfl_xor_sync(0xffffffffu, s[k][h], 1);
      s[k][h] += __shfl_xor_sync(0xffffffffu, s[k][h], 2);
    }
    if (t == 0) room->sum[row][n + 8 * h][half] = s[0][h] + s[1][h];
  }
}

/* A thread's sums of a row: heads n, n + 8; dims 8 (8 half + i) + 2t, + 1. */
struct us_attention_mine {
  float m[2], s[2], o[8][4];
};

static __device__ __forceinline__ void us_attention_mine_begin(struct us_attention_mine *x) {
#pragma unroll
  for (int h = 0; h < 2; h++) x->m[h] = -CUDART_INF_F, x->s[h] = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) x->o[i][0] = x->o[i][1] = x->o[i][2] = x->o[i][3] = 0;
}

/* Weights times values, four tiles of 8 dims from tile 8 half + `first` on. */
template <int VS>
static __device__ __forceinline__ void us_attention_attend_shared(const struct us_attention_shared *sh,
                                                                  struct us_attention_view view, int first,
                                                                  float o[4][4]) {
  const struct us_attention_room *room = us_attention_room_of();
  uint32_t lane = threadIdx.x % 32, dim = 64 * (threadIdx.x / 32 % 2) + 8 * first + lane / 4,
           row = threadIdx.x / 64;
  bool edge = view.begin > 0 || view.end < 64;
  asm volatile("" : "+r"(lane), "+r"(dim));
  struct us_attention_pieces from =
      us_attention_pieces_of(room->leaf + US_ATTENTION_VALUES, 8, dim, lane % 4);
#pragma unroll
  for (int i = 0; i < 4; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
#pragma unroll 1
  for (int c = 0; c < 2; c++) {
    uint4 v[4];
    const uint4 *at = c ? from.odd + 4 : from.even;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      v[i] = make_uint4(0, 0, 0, 0);
      if (VS || dim + 8 * i < us_attention_V<VS>(sh)) v[i] = at[64 * i];
    }
    if (edge) {
      uint32_t seen = us_attention_slots(32 * c + lane % 4 * 8, view.begin, view.end), keep[4];
#pragma unroll
      for (int e = 0; e < 4; e++)
        keep[e] = (seen >> 2 * e & 1) * 0xffffu | (seen >> (2 * e + 1) & 1) * 0xffff0000u;
#pragma unroll
      for (int i = 0; i < 4; i++) v[i].x &= keep[0], v[i].y &= keep[1], v[i].z &= keep[2], v[i].w &= keep[3];
    }
#pragma unroll
    for (int low = 1; low >= 0; low--) {
      uint32_t a[4];
      us_attention_operand(room->p[row], c, low, 0, a);
#pragma unroll
      for (int i = 0; i < 4; i++) us_mma_bf16(o[i], a, v[i].x, v[i].y, o[i]);
      us_attention_operand(room->p[row], c, low, 1, a);
#pragma unroll
      for (int i = 0; i < 4; i++) us_mma_bf16(o[i], a, v[i].z, v[i].w, o[i]);
    }
  }
}

/* The leaf's values, folded into the group's sums. */
template <int VS>
static __device__ __forceinline__ void us_attention_fold_leaf(const struct us_attention_shared *sh,
                                                              struct us_attention_view view, const float m[2],
                                                              struct us_attention_mine *group) {
  const struct us_attention_room *room = us_attention_room_of();
  struct us_attention_weights w[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float2 of = *(const float2 *)room->sum[threadIdx.x / 64][threadIdx.x % 32 / 4 + 8 * h];
    w[h] = us_attention_weigh(group->m[h], m[h]);
    group->m[h] = w[h].m, group->s[h] = fmaf(of.x + of.y, w[h].b, group->s[h] * w[h].a);
  }
#pragma unroll
  for (int first = 0; first < 8; first += 4) {
    float o[4][4];
    us_attention_attend_shared<VS>(sh, view, first, o);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        group->o[first + i][e] = fmaf(o[i][e], w[e / 2].b, group->o[first + i][e] * w[e / 2].a);
  }
}

/* The group's sums into the piece's, which lie in `to`; `begun`: they are not nothing. */
template <int VS>
static __device__ __forceinline__ void us_attention_close_group(const struct us_attention_shared *sh,
                                                                float *to, bool begun,
                                                                struct us_attention_mine *group) {
  uint32_t lane = threadIdx.x % 32, n = lane / 4, t = lane % 4, half = threadIdx.x / 32 % 2,
           V = us_attention_V<VS>(sh);
  asm volatile("" : "+r"(n), "+r"(t), "+r"(half));
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t head = n + 8 * h;
    float *m = to + 16 * V + head, *s = m + 16, *o = to + head * V + 64 * half + 2 * t;
    float had_m = -CUDART_INF_F, had_s = 0;
    float2 had[8];
    if (begun) had_m = __ldcg(m), had_s = __ldcg(s);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      had[i] = make_float2(0, 0);
      if (begun && (VS || 64 * half + 8 * i < V)) had[i] = __ldcg((const float2 *)(o + 8 * i));
    }
    struct us_attention_weights w = us_attention_weigh(had_m, group->m[h]);
    us_attention_pair_meet(); /* both have read m and s */
    if (half == 0 && t == 0) __stcg(m, w.m), __stcg(s, fmaf(group->s[h], w.b, had_s * w.a));
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (VS || 64 * half + 8 * i < V)
        __stcg((float2 *)(o + 8 * i), make_float2(fmaf(group->o[i][2 * h], w.b, had[i].x * w.a),
                                                  fmaf(group->o[i][2 * h + 1], w.b, had[i].y * w.a)));
  }
  us_attention_pair_meet();
  us_attention_mine_begin(group);
}

/* ---- a job ----------------------------------------------------------------------------------------------------------- */

/* Pieces of a row that the job has. */
static __device__ __forceinline__ uint32_t us_attention_shared_pieces(const struct us_attention_shared *sh,
                                                                      const struct us_attention_row *row) {
  uint32_t begin = sh->job.piece, end = sh->job.piece_end;
  if (sh->job.leaf == US_ATTENTION_BLOCK) return 1;
  begin = begin < row->first_piece ? row->first_piece : begin;
  end = end > row->last_piece + 1 ? row->last_piece + 1 : end;
  return end > begin ? end - begin : 0;
}

/* The partial result that a leaf belongs to. */
static __device__ __forceinline__ float *us_attention_shared_partial(const struct us_attention_shared *sh,
                                                                     const struct us_attention_row *row,
                                                                     uint32_t id) {
  return us_attention_partial(
      sh, row, id == US_ATTENTION_BLOCK ? row->pieces - 1 : id / US_ATTENTION_SEGMENT - row->first_piece);
}

/* One leaf, whose keys are on their way. Returns whether the warp's row sees some of it. */
template <int QS, int VS>
static __device__ __forceinline__ bool us_attention_leaf_shared(struct us_attention_shared *sh, uint32_t id,
                                                                const struct us_attention_row *row,
                                                                bool exists, const uint8_t *page,
                                                                const uint8_t *next,
                                                                struct us_attention_mine *group) {
  const struct us_attention_row *last = sh->row + sh->job.row + sh->job.rows - 1;
  uint8_t *slot = us_attention_room_of()->leaf;
  struct us_attention_view view = us_attention_view(sh, row, exists, id);
  bool sees = view.begin < view.end;
  uint32_t base = us_attention_base(last, id);
  bool fresh = base + 64 > last->fresh && base < last->fresh + last->count;
  float score[4][4] = {}, m[2] = {}, factor = sh->a.scale * US_ATTENTION_LOG2E;
  us_attention_copied_all();
  us_engine_meet();
  if (page) us_attention_copy_values<QS, VS, US_ENGINE_COMPUTE>(sh, slot, page, threadIdx.x);
  if (fresh) {
    us_attention_patch_keys<QS>(sh, last, base);
    us_engine_meet();
  }
  if (sees) {
    us_attention_scores_shared<QS>(sh, us_attention_room_of()->q[threadIdx.x / 64], score);
    us_attention_largest_shared(view, factor, score, m);
    us_attention_weights_shared(factor, score, m);
  }
  us_attention_copied_all();
  us_engine_meet();
  if (next) us_attention_copy_keys<QS, US_ENGINE_COMPUTE>(sh, slot, next, threadIdx.x);
  if (fresh) {
    us_attention_patch_values<VS>(sh, last, base);
    us_engine_meet();
    if (sees && sh->job.own != US_ENGINE_NONE && id == row->position / 64)
      us_attention_append_shared<QS, VS>(sh, row, (uint8_t *)page);
  }
  if (sees) us_attention_fold_leaf<VS>(sh, view, m, group);
  return sees;
}

/* The job; then its rows' pieces stand in memory. */
namespace us_rare {
template <int QS, int VS> static __device__ __noinline__ void us_attention_run_shared(bool wait) {
  const struct us_engine_block *b = us_engine_self();
  struct us_attention_shared *sh = (struct us_attention_shared *)us_engine_scratch(b);
  uint32_t pair = threadIdx.x / 64, count = sh->job.leaf_end - sh->job.leaf;
  bool exists = pair < sh->job.rows, begun = false, any = false; /* in the piece, in the group */
  const struct us_attention_row *row = sh->row + sh->job.row + (exists ? pair : 0);
  const uint64_t *pages = us_attention_pages(sh);
  struct us_attention_mine group;
  us_attention_mine_begin(&group);
  if (pages[0])
    us_attention_copy_keys<QS, US_ENGINE_COMPUTE>(sh, us_attention_room_of()->leaf, (const uint8_t *)pages[0],
                                                  threadIdx.x);
  if (wait) us_engine_wait_done(b, us_engine_fetched_op(b)->wait);
  us_attention_stage_shared<QS, VS>(sh);
#pragma unroll 1
  for (uint32_t i = 0;; i++) {
    uint32_t id = sh->job.leaf + i;
    if (any && (i == count || id % US_ATTENTION_GROUP == 0)) {
      us_attention_close_group<VS>(sh, us_attention_shared_partial(sh, row, id - 1), begun, &group);
      begun = true, any = false;
    }
    if (id % US_ATTENTION_SEGMENT == 0) begun = false;
    if (i == count) break;
    if (us_attention_leaf_shared<QS, VS>(sh, id, row, exists, (const uint8_t *)pages[i],
                                         i + 1 < count ? (const uint8_t *)pages[i + 1] : (const uint8_t *)0,
                                         &group))
      any = true;
  }
  us_engine_meet();
}
} // namespace us_rare
using us_rare::us_attention_run_shared;

#endif
