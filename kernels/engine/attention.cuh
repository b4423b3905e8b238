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
 * Order of the sums: attention_fold.cuh; precision: attention_tile.cuh; rows that share keys: attention_shared.cuh. The rope table has
 * one row a position, `rotary` floats: us_rope_table's cosines, then its sines.
 *
 * Bound: for a window of 128 latency and instructions: a rank of four reads 2 x 3 pages of 40 KB for 8 rows of a sequence, 16 jobs
 * run on 16 blocks. What does not depend on this layer's projection is fetched before it is done: rows, page offsets, half of the
 * first keys (registers), the rest, values and rope rows (L2). For long contexts HBM (one or two rows of a sequence) or tensor cores.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_CUH
#define US_KERNELS_ENGINE_ATTENTION_CUH

#include "kernels/engine/attention_shared.cuh"

/* ---- results --------------------------------------------------------------------------------------------------------- */

/* Dims [dim, dim + 4) of a head of the rank into the operand. */
static __device__ __forceinline__ void us_attention_put(const struct us_attention_shared *sh, uint32_t row,
                                                        uint32_t column, float4 x) {
  const float unit = US_ENGINE_OPERAND_UNIT; /* a power of two: before or after rounding is the same */
  uint8_t *to = (uint8_t *)sh->a.operand + us_engine_operand_offset(row, column);
  ((uint32_t *)to)[0] = us_head_round(x.x * unit, x.y * unit);
  ((uint32_t *)to)[4] = us_head_round(x.z * unit, x.w * unit);
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

/* The units' results of four dims of a head, folded: a tree, but for those of one group a chain is the same. */
static __device__ __forceinline__ struct us_attention_sum us_attention_fold_units(
    const struct us_attention_shared *sh, uint32_t V, uint32_t head, uint32_t dim) {
  struct us_attention_tree tree = us_attention_tree_begin();
  bool whole = sh->row[sh->job.row].cut == US_ATTENTION_WHOLE;
#pragma unroll 1
  for (uint32_t u = 0; u < US_ATTENTION_UNITS; u++) {
    uint32_t id = sh->leaf[u].id;
    if (id == US_ENGINE_NONE) continue;
    const float *sums = sh->sums[u];
    struct us_attention_sum item = {sums[16 * V + head], sums[16 * V + 16 + head],
                                    *(const float4 *)(sums + us_attention_sum_index(V, head, dim))};
    if (whole)
      us_attention_tree_add(&tree, id, &item);
    else
      us_attention_fold(&tree.group, &item);
  }
  return whole ? us_attention_tree_end(&tree) : tree.group;
}

/* The item-th four dims of the chunk in a piece; nothing past the last. */
static __device__ __forceinline__ struct us_attention_sum us_attention_load_piece(
    const struct us_attention_shared *sh, uint32_t V, uint32_t piece, uint32_t head, uint32_t item) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  if (piece >= row->pieces) return us_attention_nothing();
  const float *from = us_attention_partial(sh, row, piece);
  struct us_attention_sum x = {__ldcg(from + 16 * V + head), __ldcg(from + 16 * V + 16 + head),
                               __ldcg((const float4 *)from + item)};
  return x;
}

#define US_ATTENTION_AHEAD 6 /* pieces whose loads are under way together */

/* All pieces of the row and chunk, folded. */
static __device__ __forceinline__ struct us_attention_sum us_attention_fold_pieces(
    const struct us_attention_shared *sh, uint32_t V, uint32_t head, uint32_t item) {
  struct us_attention_tree tree = us_attention_tree_begin();
  struct us_attention_sum x[US_ATTENTION_AHEAD];
#pragma unroll
  for (uint32_t i = 0; i < US_ATTENTION_AHEAD; i++) x[i] = us_attention_load_piece(sh, V, i, head, item);
#pragma unroll 1
  for (uint32_t k = 0; k < sh->row[sh->job.row].pieces; k += US_ATTENTION_AHEAD) {
#pragma unroll
    for (uint32_t i = 0; i < US_ATTENTION_AHEAD; i++) {
      if (k + i < sh->row[sh->job.row].pieces)
        us_attention_tree_add(&tree, us_attention_piece_leaf(sh, sh->row + sh->job.row, k + i), &x[i]);
      x[i] = us_attention_load_piece(sh, V, k + i + US_ATTENTION_AHEAD, head, item);
    }
  }
  return us_attention_tree_end(&tree);
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

/* Fold `f` of the rows that are cut in pieces: wait for them (whoever has them comes to no fold before), close the row and chunk. */
template <int VS>
static __device__ __forceinline__ void us_attention_fold_row(const struct us_engine_block *b,
                                                             struct us_attention_shared *sh, uint32_t f) {
  uint32_t V = us_attention_V<VS>(sh), item = threadIdx.x, head = item / (V / 4), dim = item % (V / 4) * 4;
  if (threadIdx.x == 0) {
    uint32_t rows = sh->folds;
    for (uint32_t i = f / sh->chunks; i; i--) rows &= rows - 1;
    us_attention_set_chunk(sh, __ffs((int)rows) - 1, f % sh->chunks);
    struct us_engine_watch watch = {0, 0};
    uint32_t *counter = us_attention_counter(sh, sh->job.row), want = sh->row[sh->job.row].pieces, have;
    while ((have = us_load_acquire(counter)) != want)
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, want);
    *counter = 0;
  }
  us_engine_meet();
  if (head >= 16) return;
  struct us_attention_sum x = us_attention_fold_pieces(sh, V, head, item);
  us_attention_close(sh, V, head, dim, &x);
}

/* A row that does not exist: zeros. */
template <int VS>
static __device__ __forceinline__ void us_attention_close_absent(const struct us_attention_shared *sh) {
  uint32_t V = us_attention_V<VS>(sh), head = threadIdx.x / (V / 4), dim = threadIdx.x % (V / 4) * 4;
  if (head < sh->job.heads)
    us_attention_put(sh, sh->job.row, (sh->job.first_head + head) * V + dim, make_float4(0, 0, 0, 0));
}

/* ---- jobs ------------------------------------------------------------------------------------------------------------ */

#define US_ATTENTION_TRIES 2048 /* about a millisecond */

/* All compute threads: wait for the operation's input without a call, so that keys under way stay in registers. false: it did
 * not come soon; us_engine_wait_done is the way then. */
static __device__ __forceinline__ bool us_attention_wait(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh) {
  if (threadIdx.x == 0) {
    uint32_t want = us_engine_target(b, op->wait), tries = 0;
    uint64_t begin = us_engine_span_begin(b);
    bool ready = !want || op->wait == US_ENGINE_NONE;
    for (; !ready && tries < US_ATTENTION_TRIES; tries++)
      ready = (int32_t)(us_load_acquire(b->rank->done + op->wait) - want) >= 0;
    us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
    sh->ready = ready;
  }
  us_engine_meet();
  return sh->ready;
}

/* The unit's first leaf into its slot in the ring. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_fill_slot(const struct us_attention_shared *sh,
                                                              const uint8_t *page) {
  uint8_t *slot = us_attention_slot(us_attention_unit());
  uint32_t i = threadIdx.x % US_ATTENTION_THREADS;
  if (page) us_attention_copy_keys<QS, US_ATTENTION_THREADS>(sh, slot, page, i);
  us_attention_commit();
  if (page) us_attention_copy_values<QS, VS, US_ATTENTION_THREADS>(sh, slot, page, i);
  us_attention_commit();
}

/* The step in shared memory: `sum`: the job's so far, of this thread's four dims of a head. The keys are on their way before the
 * operation's input is awaited, if it is: in the ring, or half of them to registers and the rest to L2. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_step(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh, bool first,
                                                         bool wait, bool ring, struct us_attention_sum *sum) {
  const int groups = us_attention_size<QS, 0>::groups, half = groups / 2;
  const struct us_attention_leaf *leaf = sh->leaf + us_attention_unit();
  uint4 keys[2][groups];
#pragma unroll /* or what one of two ways loads would take registers everywhere */
  for (int i = 0; i < 2 * groups; i++) keys[i / groups][i % groups] = make_uint4(0, 0, 0, 0);
  if (!ring) us_attention_load_keys<QS, 0, half>(sh, leaf->page, keys);
  if (first) {
    if (ring) us_attention_fill_slot<QS, VS>(sh, leaf->page);
    if (leaf->page && !ring) us_attention_fetch_page<QS, VS>(sh, leaf->page);
    us_attention_fetch_rows(sh);
  }
  if (wait && !us_attention_wait(b, op, sh)) {
    us_engine_wait_done(b, op->wait);
    if (!ring) us_attention_load_keys<QS, 0, half>(sh, leaf->page, keys);
  }
  if (first || sh->job.new_keys) us_attention_stage<QS, VS>(sh);
  if (ring)
    us_attention_turn_keys<QS>(sh, leaf->next, keys);
  else
    us_attention_load_keys<QS, half, groups>(sh, leaf->page, keys);
  us_engine_meet();
  struct us_attention_part<VS> part = {};
  if (leaf->id != US_ENGINE_NONE) {
    if (leaf->id == sh->job.own) us_attention_append<QS, VS>(sh, leaf->page);
    us_attention_leaf_sums<QS, VS>(sh, ring, keys, &part);
  } else if (ring) {
    us_attention_next_values<QS, VS>(sh, leaf->next);
  }
  us_engine_meet();
  if (leaf->id != US_ENGINE_NONE) us_attention_keep_part<VS>(sh, &part);
  if (leaf->next && !ring) us_attention_fetch_page<QS, VS>(sh, leaf->next);
  us_engine_meet();
  uint32_t V = us_attention_V<VS>(sh), head = threadIdx.x / (V / 4), dim = threadIdx.x % (V / 4) * 4;
  if (head >= 16) return;
  struct us_attention_sum x = us_attention_fold_units(sh, V, head, dim);
  us_attention_fold(sum, &x);
}

/* The job in shared memory, step after step. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_run(const struct us_engine_block *b,
                                                        const struct us_engine_op *op,
                                                        struct us_attention_shared *sh, bool wait) {
  struct us_attention_sum sum = us_attention_nothing();
  if (sh->job.rows > 1) {
    us_attention_run_shared<QS, VS>(b, op, sh, wait);
    us_attention_arrive(b, sh);
    return;
  }
  if (sh->row[sh->job.row].sequence == US_ENGINE_NONE) {
    if (wait) us_engine_wait_done(b, op->wait);
    us_attention_close_absent<VS>(sh);
    return;
  }
  bool cut = sh->row[sh->job.row].cut != US_ATTENTION_WHOLE;
  bool ring = sh->job.steps > 1; /* more than a step's first keys are worth waiting for */
#pragma unroll 1
  for (bool first = true;; first = false) {
    us_attention_step<QS, VS>(b, op, sh, first, wait && first, ring, &sum);
    uint32_t done = sh->job.step + 1;
    if (cut && (done == sh->job.steps || done % US_ATTENTION_SEGMENT_STEPS == 0)) {
      us_attention_keep_piece<VS>(sh, sh->job.piece + (done - 1) / US_ATTENTION_SEGMENT_STEPS, sum);
      sum = us_attention_nothing();
    }
    if (done == sh->job.steps) break;
    us_engine_meet();
    if (threadIdx.x < 32) us_attention_set_step(b, sh, sh->job.step + 1);
    us_engine_meet();
  }
  uint32_t V = us_attention_V<VS>(sh);
  if (cut)
    us_attention_arrive(b, sh);
  else
    us_attention_close(sh, V, threadIdx.x / (V / 4), threadIdx.x % (V / 4) * 4, &sum);
}

/* This block's first job. */
static __device__ __forceinline__ uint32_t us_attention_first(const struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  return (b->index + b->blocks - op->shift % b->blocks) % b->blocks;
}

/* This block's jobs, the first of them set, and folds. early: op->wait was not awaited yet. */
template <int QS, int VS>
static __device__ __forceinline__ void us_attention_jobs(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh, uint32_t first,
                                                         bool early) {
  uint32_t j = first;
#pragma unroll 1
  for (; j < sh->jobs; j += b->blocks) {
    if (j != first) {
      us_engine_meet(); /* shared memory of the job before */
      if (threadIdx.x < 32) us_attention_set_job(b, sh, j);
      us_engine_meet();
    }
    us_attention_run<QS, VS>(b, op, sh, early && j == first);
  }
  if (early && first >= sh->jobs) us_engine_wait_done(b, op->wait);
#pragma unroll 1
  for (; j < sh->jobs + __popc(sh->folds) * sh->chunks; j += b->blocks) {
    us_engine_meet();
    us_attention_fold_row<VS>(b, sh, j - sh->jobs);
  }
}

/* The operation: a block without a job waits all the same, so that what it does next may rely on what stood before. */
static __device__ __noinline__ void us_engine_attention(struct us_engine_block *b,
                                                        const struct us_engine_op *op) {
  struct us_attention_shared *sh = (struct us_attention_shared *)us_engine_scratch(b);
  uint32_t first = us_attention_first(b, op);
  bool early = op->attention.ready != US_ENGINE_NONE, ring = us_engine_attention_is_long(&op->attention);
  us_engine_wait_done(b, early ? op->attention.ready : op->wait);
  us_engine_drain(b);
  if (ring) us_attention_take_ring(b);
  us_attention_plan(b, op, sh, first);
  if (sh->a.Q == 192 && sh->a.V == 128)
    us_attention_jobs<192, 128>(b, op, sh, first, early);
  else if (sh->a.Q == 128 && sh->a.V == 128)
    us_attention_jobs<128, 128>(b, op, sh, first, early);
  else
    us_attention_jobs<0, 0>(b, op, sh, first, early);
  if (ring) us_attention_give_ring(b);
  us_engine_finish(b);
}

#endif
