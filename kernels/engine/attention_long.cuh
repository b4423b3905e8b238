/* attention_long.cuh: a row alone over many segments: its keys go through the ring, and units of 4 warps go on by themselves.
 *
 *     us_attention_run_long<192, 128>(wait);       // all compute threads, the job is set, the ring is theirs
 *
 * Unit u has the u-th group of every segment of the job, leaf after leaf. Each warp copies what it alone reads: 16 of a leaf's keys,
 * a quarter of the value dims; so data needs no barrier, and the next keys are under way before the scores are weights. The unit
 * meets twice a leaf, for maxima and for weights. A segment's sum passes from unit to unit, fold after fold, thread to thread;
 * the last one stores it. The tree is attention_fold.cuh's.
 *
 * Bound: HBM: 160 KB a block are in the ring or on their way there; two barriers of 128 threads and 80 multiplies a warp and leaf beside
 * 2200 cycles of an SM's share of HBM a leaf.
 *
 * Contents: a warp's own keys and values; a leaf; sums; a job.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_LONG_CUH
#define US_KERNELS_ENGINE_ATTENTION_LONG_CUH

#include "kernels/engine/attention_ahead.cuh"
#include "kernels/engine/attention_stage.cuh"

struct
    us_attention_handed { /* behind the units' slots: a segment's sum so far, as threads of a unit hold it */
  float4 o[4][US_ATTENTION_THREADS];
  float4 ms[4][8]; /* by warp and lane / 4: m of heads n, n + 8, s of them */
};
static_assert(US_ATTENTION_UNITS * US_ATTENTION_SLOT + sizeof(struct us_attention_handed) <=
                  US_ENGINE_STAGES * US_ENGINE_STAGE_BYTES,
              "sums that pass from unit to unit");

static __device__ __forceinline__ struct us_attention_handed *us_attention_handed_of(void) {
  return (struct us_attention_handed *)us_attention_slot(US_ATTENTION_UNITS);
}

/* ---- a warp's own keys and values ------------------------------------------------------------------------------------ */

template <int QS>
static __device__ __forceinline__ void us_attention_copy_own_keys(const struct us_attention_shared *sh,
                                                                  const uint8_t *page) {
  uint32_t Q = us_attention_Q<QS>(sh), pieces = us_engine_k_stride(Q) / 8, i = threadIdx.x % 32,
           first = 16 * us_attention_warp();
  const uint4 *from = (const uint4 *)(page + us_head_key_offset(Q, sh->job.g, first));
  uint4 *to = (uint4 *)us_attention_slot(us_attention_unit()) + first * pieces;
  asm volatile("" : "+r"(i));
  if (QS % 64 || !QS) {
#pragma unroll 1
    for (; i < 16 * pieces; i += 32)
      us_attention_copy(to + us_attention_at(pieces, i / pieces, i % pieces), from + i);
    return;
  }
  to += us_attention_at(pieces, i / 8, i % 8), from += i / 8 * pieces + i % 8;
#pragma unroll
  for (uint32_t row = 0; row < 16; row += 4)
#pragma unroll
    for (uint32_t line = 0; line < (QS ? QS : 64) / 64; line++)
      us_attention_copy(to + row * pieces + line * 8, from + row * pieces + line * 8);
}

template <int QS, int VS>
static __device__ __forceinline__ void us_attention_copy_own_values(const struct us_attention_shared *sh,
                                                                    const uint8_t *page) {
  uint32_t Q = us_attention_Q<QS>(sh), V = us_attention_V<VS>(sh), i = threadIdx.x % 32,
           first = 32 * us_attention_warp();
  asm volatile("" : "+r"(i));
  const uint4 *from = (const uint4 *)(page + us_head_value_offset(sh->a.G, Q, V, sh->job.g, first)) + i;
  uint4 *to = (uint4 *)(us_attention_slot(us_attention_unit()) + US_ATTENTION_VALUES) + first * 8 +
              us_attention_at(8, i / 8, i % 8);
#pragma unroll
  for (uint32_t row = 0; row < 32; row += 4)
    if (VS || first + row + i / 8 < V) us_attention_copy(to + row * 8, from + row * 8);
}

/* New keys take the place of what the cache held; the warp's own. */
template <int QS>
static __device__ __forceinline__ void us_attention_patch_own_keys(const struct us_attention_shared *sh,
                                                                   const struct us_attention_leaf *leaf) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t pieces = us_engine_k_stride(us_attention_Q<QS>(sh)) / 8;
  uint4 *slot = (uint4 *)us_attention_slot(us_attention_unit());
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < row->count * pieces; i += 32) {
    uint32_t at = row->fresh + i / pieces - leaf->base; /* large before the leaf */
    if (at / 16 == us_attention_warp()) slot[us_attention_at(pieces, at, i % pieces)] = sh->key[i];
  }
  __syncwarp();
}
template <int VS>
static __device__ __forceinline__ void us_attention_patch_own_values(const struct us_attention_shared *sh,
                                                                     const struct us_attention_leaf *leaf) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t dim = 32 * us_attention_warp() + threadIdx.x % 32, origin = us_attention_origin(sh, row);
  const uint16_t *from = (const uint16_t *)(sh->value + dim * US_ATTENTION_FRESH_PIECES);
  uint4 *slot = (uint4 *)(us_attention_slot(us_attention_unit()) + US_ATTENTION_VALUES);
#pragma unroll 1
  for (uint32_t i = 0; i < row->count; i++) {
    uint32_t at = row->fresh + i - leaf->base;
    if (at < 64 && dim < us_attention_V<VS>(sh))
      ((uint16_t *)(slot + us_attention_at(8, dim, at / 8)))[at % 8] = from[row->fresh + i - origin];
  }
  __syncwarp();
}

/* ---- a leaf ---------------------------------------------------------------------------------------------------------- */

/* As us_attention_scores, the keys from the unit's slot. */
template <int QS>
static __device__ __forceinline__ void us_attention_scores_long(const struct us_attention_shared *sh,
                                                                float score[2][4]) {
  uint32_t lane = threadIdx.x % 32, pieces = us_engine_k_stride(us_attention_Q<QS>(sh)) / 8;
  struct us_attention_pieces from = us_attention_pieces_of(us_attention_slot(us_attention_unit()), pieces,
                                                           16 * us_attention_warp() + lane / 4, lane % 4);
#pragma unroll
  for (int j = 0; j < 2; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0;
#pragma unroll
  for (int i = 0; i < us_attention_size<QS, 0>::groups; i++) {
    if (!QS && 32 * i >= us_attention_Q<QS>(sh)) continue;
    uint4 key[2];
#pragma unroll
    for (int j = 0; j < 2; j++) key[j] = us_attention_piece_at(from, i, 8 * j * pieces);
#pragma unroll
    for (int low = 1; low >= 0; low--) {
      uint32_t a[4], c[4];
      us_attention_operand(sh->q, i, low, 0, a), us_attention_operand(sh->q, i, low, 1, c);
#pragma unroll
      for (int j = 0; j < 2; j++) us_mma_bf16(score[j], a, key[j].x, key[j].y, score[j]);
#pragma unroll
      for (int j = 0; j < 2; j++) us_mma_bf16(score[j], c, key[j].z, key[j].w, score[j]);
    }
  }
}

/* The warp's values from the unit's slot; 0 where the row does not see them. */
template <int VS>
static __device__ __forceinline__ void us_attention_values_long(
    const struct us_attention_shared *sh, const struct us_attention_leaf *leaf,
    uint4 value[2][us_attention_size<0, VS>::tiles]) {
  const int tiles = us_attention_size<0, VS>::tiles;
  uint32_t lane = threadIdx.x % 32, first = 8 * tiles * us_attention_warp() + lane / 4;
  struct us_attention_pieces from = us_attention_pieces_of(
      us_attention_slot(us_attention_unit()) + US_ATTENTION_VALUES, 8, first, lane % 4);
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      value[c][i] = make_uint4(0, 0, 0, 0);
      if (VS || first + 8 * i < us_attention_V<VS>(sh)) value[c][i] = us_attention_piece_at(from, c, 64 * i);
    }
  if (leaf->begin == 0 && leaf->end == 64) return;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    uint32_t seen = us_attention_slots(32 * c + lane % 4 * 8, leaf->begin, leaf->end), keep[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
      keep[e] = (seen >> 2 * e & 1) * 0xffffu | (seen >> (2 * e + 1) & 1) * 0xffff0000u;
#pragma unroll
    for (int i = 0; i < tiles; i++) {
      uint4 *v = value[c] + i;
      v->x &= keep[0], v->y &= keep[1], v->z &= keep[2], v->w &= keep[3];
    }
  }
}

/* One leaf of the unit, whose keys and values are on their way; then the next one's are. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_leaf_long(struct us_attention_shared *sh, uint32_t id,
                                                              const uint8_t *page, const uint8_t *next,
                                                              struct us_attention_part<VS> *out) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  struct us_attention_leaf leaf;
  float score[2][4], factor = sh->a.scale * US_ATTENTION_LOG2E;
  uint4 value[2][us_attention_size<0, VS>::tiles];
  leaf.base = id * 64;
  leaf.begin = row->begin > leaf.base ? row->begin - leaf.base : 0;
  leaf.end = row->end - leaf.base < 64 ? row->end - leaf.base : 64;
  bool fresh = leaf.base + leaf.end > row->fresh;
  us_attention_copied<1>();
  __syncwarp();
  if (fresh) us_attention_patch_own_keys<QS>(sh, &leaf);
  us_attention_scores_long<QS>(sh, score);
  __syncwarp();
  if (next) us_attention_copy_own_keys<QS>(sh, next);
  us_attention_commit();
  us_attention_largest(sh, &leaf, factor, score, out->m);
  us_attention_copied<1>();
  us_attention_weights(sh, factor, score, out->m, out->s);
  if (fresh) us_attention_patch_own_values<VS>(sh, &leaf);
  us_attention_values_long<VS>(sh, &leaf, value);
  us_attention_clear_sums<VS>(out->o);
#pragma unroll
  for (uint32_t c = 0; c < 2; c++) us_attention_attend<VS>(sh, c, value[c], out->o);
  __syncwarp();
  if (next) us_attention_copy_own_values<QS, VS>(sh, next);
  us_attention_commit();
  if (id == sh->job.own) us_attention_append<QS, VS>(sh, page);
}

/* ---- sums ------------------------------------------------------------------------------------------------------------ */

template <int VS>
static __device__ __forceinline__ void us_attention_part_begin(struct us_attention_part<VS> *x) {
#pragma unroll
  for (int h = 0; h < 2; h++) x->m[h] = -CUDART_INF_F, x->s[h] = 0;
#pragma unroll
  for (int i = 0; i < us_attention_size<0, VS>::tiles; i++)
    x->o[i][0] = x->o[i][1] = x->o[i][2] = x->o[i][3] = 0;
}

/* a = fold(a, b). */
template <int VS>
static __device__ __forceinline__ void us_attention_part_fold(struct us_attention_part<VS> *a,
                                                              const struct us_attention_part<VS> *b) {
  struct us_attention_weights w[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    w[h] = us_attention_weigh(a->m[h], b->m[h]);
    a->m[h] = w[h].m, a->s[h] = fmaf(b->s[h], w[h].b, a->s[h] * w[h].a);
  }
#pragma unroll
  for (int i = 0; i < us_attention_size<0, VS>::tiles; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) a->o[i][e] = fmaf(b->o[i][e], w[e / 2].b, a->o[i][e] * w[e / 2].a);
}

/* A segment's sum as the last unit has it. */
template <int VS>
static __device__ __forceinline__ void us_attention_keep_long(const struct us_attention_shared *sh,
                                                              uint32_t piece,
                                                              const struct us_attention_part<VS> *x) {
  uint32_t V = us_attention_V<VS>(sh), lane = threadIdx.x % 32, warp = us_attention_warp();
  float *to = us_attention_partial(sh, sh->row + sh->job.row, piece);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t head = lane / 4 + 8 * h;
    if (warp == 0 && lane % 4 == 0)
      __stcg(to + 16 * V + head, x->m[h]), __stcg(to + 16 * V + 16 + head, x->s[h]);
#pragma unroll
    for (int i = 0; i < us_attention_size<0, VS>::tiles; i++) {
      uint32_t dim = 32 * warp + 8 * i + lane % 4 * 2;
      if (VS || dim < V)
        __stcg((float2 *)(to + head * V + dim), make_float2(x->o[i][2 * h], x->o[i][2 * h + 1]));
    }
  }
}

static __device__ __forceinline__ void us_attention_await_hand(const uint32_t *turn, uint32_t want) {
  const struct us_engine_block *b = us_engine_self();
  struct us_engine_watch watch = {0, 0};
  uint32_t have;
  if (threadIdx.x % 32 == 0)
    while ((have = us_attention_look(turn)) != want)
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_SUMS, b->op_index, have, want);
  __syncwarp();
}

/* A warp: the unit's group of the k-th segment of the job, or none (`any`), joins what the unit before has; the last unit stores. */
template <int VS>
static __device__ __forceinline__ void us_attention_hand_on(struct us_attention_shared *sh, uint32_t k,
                                                            bool any, struct us_attention_part<VS> *group) {
  const int tiles = us_attention_size<0, VS>::tiles;
  struct us_attention_handed *hand = us_attention_handed_of();
  uint32_t unit = us_attention_unit(), warp = us_attention_warp(), lane = threadIdx.x % 32,
           i = threadIdx.x % US_ATTENTION_THREADS, want = k * US_ATTENTION_UNITS + unit;
  us_attention_await_hand(sh->turn + warp, want);
  if (unit) {
    struct us_attention_part<VS> had;
    float4 ms = hand->ms[warp][lane / 4];
    had.m[0] = ms.x, had.m[1] = ms.y, had.s[0] = ms.z, had.s[1] = ms.w;
#pragma unroll
    for (int t = 0; t < tiles; t++) {
      float4 o = hand->o[t][i];
      had.o[t][0] = o.x, had.o[t][1] = o.y, had.o[t][2] = o.z, had.o[t][3] = o.w;
    }
    if (any) us_attention_part_fold<VS>(&had, group);
    *group = had;
  }
  if (unit + 1 == US_ATTENTION_UNITS) {
    us_attention_keep_long<VS>(sh, sh->job.piece + k, group);
  } else {
    __syncwarp(); /* all lanes have read m and s */
#pragma unroll
    for (int t = 0; t < tiles; t++)
      hand->o[t][i] = make_float4(group->o[t][0], group->o[t][1], group->o[t][2], group->o[t][3]);
    if (lane % 4 == 0)
      hand->ms[warp][lane / 4] = make_float4(group->m[0], group->m[1], group->s[0], group->s[1]);
  }
  __syncwarp();
  if (lane == 0)
    asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(us_shared_address(sh->turn + warp)),
                 "r"(want + 1)
                 : "memory");
}

/* ---- a job ----------------------------------------------------------------------------------------------------------- */

/* The unit's i-th leaf of the job. */
static __device__ __forceinline__ uint32_t us_attention_long_leaf(const struct us_attention_shared *sh,
                                                                  uint32_t i) {
  return sh->job.leaf + us_attention_unit() * US_ATTENTION_GROUP +
         i / US_ATTENTION_GROUP * US_ATTENTION_SEGMENT + i % US_ATTENTION_GROUP;
}
/* Where it lies; NULL: there is none. */
static __device__ __forceinline__ const uint8_t *us_attention_long_page(const struct us_engine_block *b,
                                                                        const struct us_attention_shared *sh,
                                                                        uint32_t i) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t id = us_attention_long_leaf(sh, i);
  if (id < row->first || id >= sh->job.leaf_end) return (const uint8_t *)0;
  return us_attention_page(b, sh, row, id);
}

/* The job; then its pieces stand in memory. A lane holds the page of every 32nd leaf, and of the one after that. */
namespace us_rare {
template <int QS, int VS> static __device__ __noinline__ void us_attention_run_long(bool wait) {
  const struct us_engine_block *b = us_engine_self();
  struct us_attention_shared *sh = (struct us_attention_shared *)us_engine_scratch(b);
  uint32_t lane = threadIdx.x % 32, segments = sh->job.piece_end - sh->job.piece;
  const uint8_t *pages = us_attention_long_page(b, sh, lane),
                *later = us_attention_long_page(b, sh, lane + 32);
  const uint8_t *page = (const uint8_t *)__shfl_sync(0xffffffffu, (uint64_t)pages, 0);
  if (page) us_attention_copy_own_keys<QS>(sh, page);
  us_attention_commit();
  if (page) us_attention_copy_own_values<QS, VS>(sh, page);
  us_attention_commit();
  if (wait) us_engine_wait_done(b, us_engine_fetched_op(b)->wait);
  us_attention_stage<QS, VS>(sh);
  us_engine_meet();
#pragma unroll 1
  for (uint32_t k = 0; k < segments; k++) {
    struct us_attention_part<VS> group;
    bool any = false;
    us_attention_part_begin<VS>(&group);
#pragma unroll 1
    for (uint32_t i = k * US_ATTENTION_GROUP; i < (k + 1) * US_ATTENTION_GROUP; i++) {
      if ((i + 1) % 32 == 0) pages = later, later = us_attention_long_page(b, sh, i + 33 + lane);
      const uint8_t *next = (const uint8_t *)__shfl_sync(0xffffffffu, (uint64_t)pages, (int)((i + 1) % 32));
      if (page) {
        struct us_attention_part<VS> part;
        us_attention_leaf_long<QS, VS>(sh, us_attention_long_leaf(sh, i), page, next, &part);
        us_attention_part_fold<VS>(&group, &part);
        any = true;
      } else {
        if (next) us_attention_copy_own_keys<QS>(sh, next);
        us_attention_commit();
        if (next) us_attention_copy_own_values<QS, VS>(sh, next);
        us_attention_commit();
      }
      page = next;
    }
    us_attention_hand_on<VS>(sh, k, any, &group);
  }
}
} // namespace us_rare
using us_rare::us_attention_run_long;

#endif
