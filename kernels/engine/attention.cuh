/* attention.cuh: attention of one layer for 8 token rows: rotate, append K and V, attend, operand.
 *
 *     case US_ENGINE_ATTENTION: us_engine_attention(b, op);         // all compute threads of all blocks of the rank
 *
 * Meaning as on the CPU (plan/tile_ops.c): queries and keys are normed (drafter) and rotated in FP32, keys and scaled values
 * rounded to bf16; a target's row appends its own and sees positions up to itself; a drafter's block sees the cache before it
 * and all of itself; the sink joins the denominator last. One hand-off: jobs that need new keys take them from the projection
 * with the same rounding, the row's last job writes them to the cache. Whoever comes to the end of the jobs folds the results of one
 * row and 16 heads, once they stand; nobody who waits there has a job left.
 *
 * Order of the sums: attention_fold.cuh; precision: attention_tile.cuh; rows that share keys: attention_shared.cuh; a row alone beyond
 * 4096 keys: attention_long.cuh. The rope table has one row a position, `rotary` floats: us_rope_table's cosines, then its sines.
 *
 * Bound: for a window of 128 latency and instructions: a rank of four reads 2 x 3 pages of 40 KB for 8 rows of a sequence, 16 jobs
 * run on 16 blocks. What does not depend on this layer's projection is done before the compute warps come here, by a warp of its own
 * (attention_ahead.cuh): rows, page offsets, jobs; first keys, values and rope rows are in L2 then, and the keys go to registers before
 * the projection is awaited. For long contexts HBM (one or two rows of a sequence) or tensor cores.
 *
 * Contents: results; folds; jobs.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_CUH
#define US_KERNELS_ENGINE_ATTENTION_CUH

#include "kernels/engine/attention_ahead.cuh"
#include "kernels/engine/attention_long.cuh"
#include "kernels/engine/attention_shared.cuh"

/* ---- results --------------------------------------------------------------------------------------------------------- */

/* Dims [dim, dim + 4) of a head of the rank into the operand. */
static __device__ __forceinline__ void us_attention_put(const struct us_attention_shared *sh, uint32_t row,
                                                        uint32_t column, float4 x) {
  const float unit = US_ENGINE_OPERAND_UNIT; /* a power of two: before or after rounding is the same */
  uint32_t *to = (uint32_t *)((uint8_t *)sh->a.operand + us_engine_operand_offset(row, column));
  us_store_gpu4(to, us_head_round(x.x * unit, x.y * unit)); /* a NaN of bf16 is 0x7fff: no word is absent */
  us_store_gpu4(to + 4, us_head_round(x.z * unit, x.w * unit));
}

/* The sink, the division, the operand. */
static __device__ __forceinline__ void us_attention_close(const struct us_attention_shared *sh, uint32_t V,
                                                          uint32_t head, uint32_t dim,
                                                          const struct us_attention_sum *x) {
  if (head >= sh->job.heads) return;
  struct us_attention_weights w = us_attention_weigh(x->m, sh->sink[sh->job.first_head + head]);
  float factor = __fdividef(w.a, fmaf(x->s, w.a, w.b));
  us_attention_put(sh, sh->job.row, (sh->job.first_head + head) * V + dim,
                   make_float4(x->o.x * factor, x->o.y * factor, x->o.z * factor, x->o.w * factor));
}

/* The units' results of four dims of a head, folded: leaves to groups, groups to segments, segments to the whole. Ids ascend; units
 * before and behind may have none. The leaves of one group become a group: nothing folded with x is x. */
static __device__ __forceinline__ struct us_attention_sum us_attention_fold_units(
    const struct us_attention_shared *sh, uint32_t V, uint32_t head, uint32_t dim) {
  struct us_attention_sum group = us_attention_nothing(), segment = group, total = group;
  uint32_t u = 0, id, next;
  while ((id = sh->leaf[u].id) == US_ENGINE_NONE && u + 1 < US_ATTENTION_UNITS) u++;
#pragma unroll 1
  for (;; id = next) {
    const float *sums = sh->sums[u];
    struct us_attention_sum item = {sums[16 * V + head], sums[16 * V + 16 + head],
                                    *(const float4 *)(sums + us_attention_sum_index(V, head, dim))};
    us_attention_fold(&group, &item);
    next = ++u < US_ATTENTION_UNITS ? sh->leaf[u].id : US_ENGINE_NONE;
    if (next / US_ATTENTION_GROUP == id / US_ATTENTION_GROUP) continue;
    us_attention_fold(&segment, &group), group = us_attention_nothing();
    if (next / US_ATTENTION_SEGMENT == id / US_ATTENTION_SEGMENT) continue;
    us_attention_fold(&total, &segment), segment = us_attention_nothing();
    if (next == US_ENGINE_NONE) return total;
  }
}

static __device__ __forceinline__ uint32_t *us_attention_counter(const struct us_attention_shared *sh,
                                                                 uint32_t row) {
  return sh->a.arrivals + row * sh->chunks + sh->job.chunk;
}

/* All compute threads: the job's pieces of its row, or of each row that shares it, stand in memory. */
static __device__ __forceinline__ void us_attention_arrive(const struct us_engine_block *b,
                                                           const struct us_attention_shared *sh) {
  uint32_t i = threadIdx.x, pieces = sh->job.piece_end - sh->job.piece;
  us_engine_meet();
  if (i >= sh->job.rows) return;
  us_engine_jitter(b);
  if (sh->job.rows > 1) pieces = us_attention_shared_pieces(sh, sh->row + sh->job.row + i);
  if (pieces) us_add_release(us_attention_counter(sh, sh->job.row + i), pieces);
}

/* A piece's sum of four dims of a head. */
template <int VS>
static __device__ __forceinline__ void us_attention_keep_piece(const struct us_attention_shared *sh,
                                                               uint32_t piece, struct us_attention_sum x) {
  uint32_t V = us_attention_V<VS>(sh), item = threadIdx.x, head = item / (V / 4), dim = item % (V / 4) * 4;
  if (head >= 16) return;
  float *to = us_attention_partial(sh, sh->row + sh->job.row, piece);
  __stcg((float4 *)to + item, x.o);
  if (dim == 0) to[16 * V + head] = x.m, to[16 * V + 16 + head] = x.s;
}

/* ---- folds ----------------------------------------------------------------------------------------------------------- */

/* Pieces' sums of some heads, so many pieces at a time, in the ring if it is ours. A piece: o (heads, V), then m and s of 16 heads. */
struct us_attention_pile {
  float4 *pieces;
  uint32_t heads, first, each, most; /* of the chunk; a piece's float4; pieces at a time */
};
#define US_ATTENTION_PILE      3  /* times `parts`: pieces in the units' sums */
#define US_ATTENTION_RING_PILE 16 /* and in the ring */
static_assert(US_ATTENTION_PILE * (16 * 128 * 4 + 16 * 128) <=
                  sizeof(float[US_ATTENTION_UNITS][16 * (128 + 2)]),
              "pieces, cut in 16 parts at most");
static_assert(US_ATTENTION_RING_PILE * (16 * 128 * 4 + 16 * 128) <= US_ENGINE_STAGES * US_ENGINE_STAGE_BYTES,
              "pieces in the ring");

/* A power of two. */
static __device__ __forceinline__ uint32_t us_attention_parts_log2(const struct us_attention_shared *sh) {
  return 31 - __clz((int)sh->parts);
}

static __device__ __forceinline__ struct us_attention_pile us_attention_pile_of(
    struct us_attention_shared *sh, uint32_t V, uint32_t part) {
  struct us_attention_pile x;
  x.heads = 16u >> us_attention_parts_log2(sh), x.first = part * x.heads, x.each = x.heads * (V / 4) + 8;
  x.most = (sh->ring ? US_ATTENTION_RING_PILE : US_ATTENTION_PILE) * sh->parts;
  x.pieces = (float4 *)(sh->ring ? us_attention_slot(0) : (uint8_t *)sh->sums);
  return x;
}

/* All compute threads: pieces from the k-th on, a warp a piece. */
static __device__ __forceinline__ void us_attention_load_pieces(const struct us_attention_shared *sh,
                                                                uint32_t V, const struct us_attention_pile *x,
                                                                uint32_t k) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t lane = threadIdx.x % 32, n = row->pieces - k < x->most ? row->pieces - k : x->most;
#pragma unroll 1
  for (uint32_t i = threadIdx.x / 32; i < n; i += US_ENGINE_COMPUTE_WARPS) {
    const float *from = us_attention_partial(sh, row, k + i);
    float4 *to = x->pieces + i * x->each;
#pragma unroll 1
    for (uint32_t at = lane; at < x->each - 8; at += 32)
      us_attention_copy(to + at, from + x->first * V + at * 4);
    if (lane < 8) us_attention_copy(to + x->each - 8 + lane, from + 16 * V + lane * 4);
  }
  us_attention_copied_all();
}

/* One thread: fold `f` is the job, and its row's pieces stand (they are read from L2). */
static __device__ __forceinline__ void us_attention_await_pieces(const struct us_engine_block *b,
                                                                 struct us_attention_shared *sh,
                                                                 uint32_t fold) {
  uint32_t rows = sh->folds, parts = sh->parts, have;
  for (; fold >= sh->chunks; fold -= sh->chunks) rows &= rows - 1;
  us_attention_set_chunk(sh, __ffs((int)rows) - 1, fold);
  struct us_engine_watch watch = {0, 0};
  uint32_t *counter = us_attention_counter(sh, sh->job.row), want = sh->row[sh->job.row].pieces;
  while ((have = us_load_relaxed(counter)) < want)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, want);
  if (atomicAdd(counter, 1) + 1 == want + parts) *counter = 0; /* all parts have seen it */
}

/* Fold `f`: some heads of a row and chunk that is cut in pieces: wait for them (whoever has them comes to no fold before), close.
 * Segments are the tree's last level: they add up as the groups of one segment would. */
template <int VS> static __device__ __forceinline__ void us_attention_fold_row(uint32_t f) {
  const struct us_engine_block *b = us_engine_self();
  struct us_attention_shared *sh = us_attention_shared_of();
  uint32_t V = us_attention_V<VS>(sh), head = threadIdx.x / (V / 4), dim = threadIdx.x % (V / 4) * 4;
  if (threadIdx.x == 0) us_attention_await_pieces(b, sh, f >> us_attention_parts_log2(sh));
  us_engine_meet();
  const struct us_attention_row *row = sh->row + sh->job.row;
  struct us_attention_pile pile = us_attention_pile_of(sh, V, f & (sh->parts - 1));
  struct us_attention_sum total = us_attention_nothing(), segment = total;
  uint32_t pieces = row->pieces, left = 0;
  const float4 *piece = pile.pieces;
#pragma unroll 1
  for (uint32_t k = 0;; k++, left--, piece += pile.each) {
    if (left == 0 && k < pieces) {
      if (k) us_engine_meet();
      us_attention_load_pieces(sh, V, &pile, k);
      us_engine_meet();
      left = pile.most, piece = pile.pieces;
    }
    bool groups = row->cut == US_ATTENTION_GROUPS;
    if (k == pieces || (k && groups && us_attention_piece_leaf(sh, row, k) % US_ATTENTION_SEGMENT == 0)) {
      us_attention_fold(&total, &segment), segment = us_attention_nothing();
      if (k == pieces) break;
    }
    const float *ms = (const float *)(piece + pile.each - 8) + pile.first + head;
    if (head >= pile.heads) continue;
    struct us_attention_sum x = {ms[0], ms[16], piece[threadIdx.x]};
    us_attention_fold(&segment, &x);
  }
  if (head < pile.heads) us_attention_close(sh, V, pile.first + head, dim, &total);
}
static __device__ __noinline__ void us_attention_fold_usual(uint32_t f) {
  us_attention_fold_row<128>(f);
}
namespace us_rare {
static __device__ __noinline__ void attention_fold(uint32_t f) {
  us_attention_fold_row<0>(f);
}
} // namespace us_rare

/* A row that does not exist: zeros. */
template <int VS>
static __device__ __forceinline__ void us_attention_close_absent(const struct us_attention_shared *sh) {
  uint32_t V = us_attention_V<VS>(sh), head = threadIdx.x / (V / 4), dim = threadIdx.x % (V / 4) * 4;
  if (head < sh->job.heads)
    us_attention_put(sh, sh->job.row, (sh->job.first_head + head) * V + dim, make_float4(0, 0, 0, 0));
}

/* ---- jobs ------------------------------------------------------------------------------------------------------------ */

/* All compute threads: wait for the operation's input without a call, so that keys under way stay in registers, without an acquire,
 * which would empty the first-level cache (the projection is read from L2), and without anything that would have to be kept until then. */
static __device__ __forceinline__ void us_attention_wait(const struct us_attention_shared *sh) {
  if (threadIdx.x == 0) {
    const struct us_engine_block *b = us_engine_view((const struct us_engine_block *)0);
    struct us_engine_watch watch = {0, 0};
    uint32_t have, want = sh->want;
    uint64_t begin = us_engine_span_begin(b);
    while ((int32_t)((have = us_load_relaxed(sh->input)) - want) < 0)
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, want);
    us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
  }
  us_engine_meet();
}

/* A leaf a unit: this thread's four dims of a head. The keys are on their way before the operation's input is awaited, if it is. */
template <int QS, int VS>
static __device__ __forceinline__ struct us_attention_sum us_attention_units_sum(
    struct us_attention_shared *sh, bool wait) {
  const struct us_attention_leaf *leaf = sh->leaf + us_attention_unit();
  uint4 keys[2][us_attention_size<QS, 0>::groups];
  us_attention_load_keys<QS>(sh, us_attention_readable(sh, leaf), keys);
  if (wait) us_attention_wait(sh);
  us_attention_stage<QS, VS>(sh);
  us_engine_meet();
  struct us_attention_part<VS> part;
  if (leaf->id != US_ENGINE_NONE && leaf->id == sh->job.own) us_attention_append<QS, VS>(sh, leaf->page);
  us_attention_leaf_sums<QS, VS>(sh, keys, &part); /* of no leaf: nobody reads them */
  us_engine_meet();
  us_attention_keep_part<VS>(sh, &part);
  us_engine_meet();
  uint32_t V = us_attention_V<VS>(sh), head = threadIdx.x / (V / 4), dim = threadIdx.x % (V / 4) * 4;
  return head < 16 ? us_attention_fold_units(sh, V, head, dim) : us_attention_nothing();
}

/* A job that is a leaf a unit. Out of line, as the other kinds of jobs are: each has the registers to itself. It finds again what it
 * needs, since what is kept over a call or a barrier of many registers lies in local memory. */
template <int QS, int VS> static __device__ __forceinline__ void us_attention_run_units(bool wait) {
  struct us_attention_shared *sh = us_attention_shared_of();
  struct us_attention_sum sum = us_attention_units_sum<QS, VS>(sh, wait);
  uint32_t V = us_attention_V<VS>(sh);
  if (sh->row[sh->job.row].cut == US_ATTENTION_WHOLE)
    us_attention_close(sh, V, threadIdx.x / (V / 4), threadIdx.x % (V / 4) * 4, &sum);
  else
    us_attention_keep_piece<VS>(sh, sh->job.piece, sum);
}
static __device__ __noinline__ void us_attention_units_usual(bool wait) {
  us_attention_run_units<192, 128>(wait);
}
namespace us_rare {
template <int QS, int VS> static __device__ __noinline__ void attention_units(bool wait) {
  us_attention_run_units<QS, VS>(wait);
}
} // namespace us_rare

/* The job in shared memory. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_run_sized(const struct us_attention_shared *sh,
                                                              bool wait) {
  if (sh->job.rows > 1)
    us_attention_run_shared<QS, VS>(wait);
  else if (sh->job.leaf != US_ENGINE_NONE)
    us_attention_run_long<QS, VS>(wait);
  else if (QS == 192 && VS == 128)
    us_attention_units_usual(wait);
  else
    us_rare::attention_units<QS, VS>(wait);
}
static __device__ __forceinline__ void us_attention_run(const struct us_attention_shared *sh, bool wait) {
  if (sh->row[sh->job.row].sequence == US_ENGINE_NONE) {
    const struct us_engine_block *b = us_engine_self();
    if (wait) us_engine_wait_done(b, us_engine_fetched_op(b)->wait);
    us_attention_close_absent<0>(sh);
    return;
  }
  if (sh->a.Q == 192 && sh->a.V == 128)
    us_attention_run_sized<192, 128>(sh, wait);
  else if (sh->a.Q == 128 && sh->a.V == 128)
    us_attention_run_sized<128, 128>(sh, wait);
  else
    us_attention_run_sized<0, 0>(sh, wait);
  if (sh->row[sh->job.row].cut != US_ATTENTION_WHOLE) us_attention_arrive(us_engine_self(), sh);
}

/* All compute threads of a block that has nothing to do here: the input stands, as later operations may rely on. It looks seldom: 132
 * SMs that read one word wait for each other, and those with a job wait for them. */
static __device__ __forceinline__ void us_attention_wait_idle(const struct us_attention_shared *sh) {
  uint32_t have, want = sh->want;
  if (threadIdx.x == 0 && want) {
    const struct us_engine_block *b = us_engine_view((const struct us_engine_block *)0);
    struct us_engine_watch watch = {0, 0};
    uint64_t begin = us_engine_span_begin(b);
    while ((int32_t)((have = us_load_relaxed(sh->input)) - want) < 0) {
      __nanosleep(500);
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, want);
    }
    us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
  }
  us_engine_meet();
}

/* This block's jobs, the first of them set, and folds. early: op->wait was not awaited yet. */
static __device__ __forceinline__ void us_attention_jobs(struct us_attention_shared *sh, uint32_t first,
                                                         bool early) {
  uint32_t j = first;
  bool ready = !sh->unset;
#pragma unroll 1
  for (; j < sh->jobs; j += us_engine_self()->blocks, early = ready = false) {
    if (!ready) {
      us_engine_meet(); /* shared memory of the job before */
      if (threadIdx.x < 32) us_attention_set_job(j, false);
      us_engine_meet();
    }
    us_attention_run(sh, early);
  }
  uint32_t end = sh->jobs + __popc(sh->folds) * sh->chunks * sh->parts;
  if (early && j >= end) us_attention_wait_idle(sh);
#pragma unroll 1
  for (; j < end; j += us_engine_self()->blocks) {
    us_engine_meet();
    if (sh->a.V == 128)
      us_attention_fold_usual(j - sh->jobs);
    else
      us_rare::attention_fold(j - sh->jobs);
  }
}

/* The operation: a block without a job waits all the same, so that what it does next may rely on what stood before. Whoever folds
 * learns it from those whose pieces it waits for. */
static __device__ __noinline__ void us_engine_attention(struct us_engine_block *,
                                                        const struct us_engine_op *) {
  struct us_attention_shared *sh = us_attention_shared_of();
  us_attention_await_plan(us_engine_self());
  us_engine_drain((const struct us_engine_block *)0);
  bool early = sh->a.ready != US_ENGINE_NONE, ring = us_engine_attention_is_long(&sh->a) && sh->ring;
  if (!early) us_engine_wait_done(us_engine_self(), us_engine_fetched_op(us_engine_self())->wait);
  if (ring) us_attention_take_ring(us_engine_self());
  us_attention_jobs(sh, us_attention_first(us_engine_self(), us_engine_fetched_op(us_engine_self())), early);
  if (ring) us_attention_give_ring(us_engine_self());
  us_engine_finish((const struct us_engine_block *)0);
}

#endif
