/* attention.cuh: attention of one layer for 8 token rows: rotate, append K and V, attend, operand.
 *
 *     case US_ENGINE_ATTENTION: us_engine_attention(b, op);         // all compute threads of all blocks of the rank
 *
 * Meaning as on the CPU (plan/tile_ops.c): queries and keys are normed (drafter) and rotated in FP32, keys and scaled values
 * rounded to bf16; a target's row appends its own and sees positions up to itself; a drafter's block sees the cache before it
 * and all of itself; the sink joins the denominator last. One hand-off: jobs that need new keys take them from the projection
 * with the same rounding, the row's last job writes them to the cache, and the job that finishes last for a row and 16 heads
 * folds the others' results. No block waits for another.
 *
 * Order of the sums: attention_fold.cuh; precision: attention_tile.cuh. The rope table has one row a position, `rotary` floats:
 * us_rope_table's cosines, then its sines.
 *
 * Bound: latency. For 8 rows of one sequence in a window of 128 a rank of four reads 2 x 3 pages of 40 KB; 16 jobs run on 16
 * blocks, each two thirds tensor and shared-memory time of its 3 leaves. What does not depend on this layer's projection is
 * fetched before it is done: rows, page offsets, the first keys (registers), values and rope rows (L2). Long contexts: a row
 * reads its keys by itself, so L2 moves 8 times what HBM does.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_CUH
#define US_KERNELS_ENGINE_ATTENTION_CUH

#include "kernels/engine/attention_stage.cuh"

/* ---- results ------------------------------------------------------------------------------------------------------- */

/* Dims [dim, dim + 4) of a head of the chunk into the operand. */
static __device__ __forceinline__ void us_attention_put(const struct us_attention_shared *sh, uint32_t head,
                                                        uint32_t dim, const float out[4]) {
#pragma unroll
  for (uint32_t i = 0; i < 4; i += 2) {
    uint32_t low = us_bf16_from_f32(us_bf16_round(out[i]) * US_ENGINE_OPERAND_UNIT);
    uint32_t high = us_bf16_from_f32(us_bf16_round(out[i + 1]) * US_ENGINE_OPERAND_UNIT);
    uint32_t at = us_engine_operand_offset(sh->job.row, (sh->job.first_head + head) * sh->a.V + dim + i);
    *(uint32_t *)((uint8_t *)sh->a.operand + at) = low | high << 16;
  }
}

/* The sink, one division a value, the operand. */
static __device__ __forceinline__ void us_attention_close(const struct us_attention_shared *sh, uint32_t head,
                                                          uint32_t dim, const struct us_attention_sum *x) {
  if (head >= sh->job.heads) return;
  struct us_attention_weights w = us_attention_weigh(x->m, sh->sink[sh->job.first_head + head]);
  float factor = __fdividef(w.a, fmaf(x->s, w.a, w.b));
  const float out[4] = {x->o.x * factor, x->o.y * factor, x->o.z * factor, x->o.w * factor};
  us_attention_put(sh, head, dim, out);
}

/* A row that does not exist: zeros. */
static __device__ __forceinline__ void us_attention_close_absent(const struct us_attention_shared *sh) {
  const float zero[4] = {0, 0, 0, 0};
  uint32_t quads = sh->a.V / 4, head = threadIdx.x / quads;
  if (head < sh->job.heads) us_attention_put(sh, head, threadIdx.x % quads * 4, zero);
}

/* The units' results of four dims of a head, folded. */
static __device__ __forceinline__ struct us_attention_sum us_attention_fold_units(
    const struct us_attention_shared *sh, uint32_t head, uint32_t dim) {
  uint32_t V = sh->a.V;
  struct us_attention_tree tree = us_attention_tree_begin();
#pragma unroll 1
  for (uint32_t u = 0; u < US_ATTENTION_UNITS; u++) {
    struct us_attention_leaves l = sh->job.leaves[u];
    if (l.begin == l.end) continue;
    const float *sums = sh->sums[u];
    struct us_attention_sum item = {sums[16 * V + head], sums[16 * V + 16 + head],
                                    *(const float4 *)(sums + us_attention_sum_index(V, head, dim))};
    us_attention_tree_add(&tree, l.begin, &item);
  }
  return us_attention_tree_end(&tree);
}

/* Where a piece of the job's row and chunk lies. */
static __device__ __forceinline__ float *us_attention_partial(const struct us_attention_shared *sh,
                                                              uint32_t piece) {
  uint32_t job = sh->row[sh->job.row].first_job + piece * sh->chunks + sh->job.chunk;
  return sh->a.partial + (size_t)job * us_engine_attention_piece(sh->a.V);
}

/* The item-th four dims of the chunk in a piece. */
static __device__ __forceinline__ struct us_attention_sum us_attention_load_piece(
    const struct us_attention_shared *sh, uint32_t piece, uint32_t head, uint32_t item) {
  if (piece >= sh->row[sh->job.row].pieces) return us_attention_nothing();
  const float *from = us_attention_partial(sh, piece);
  struct us_attention_sum x = {__ldcg(from + 16 * sh->a.V + head), __ldcg(from + 16 * sh->a.V + 16 + head),
                               __ldcg((const float4 *)from + item)};
  return x;
}

#define US_ATTENTION_AHEAD 4 /* pieces whose loads are under way together */

/* All pieces of the row and chunk, folded. */
static __device__ __forceinline__ struct us_attention_sum us_attention_fold_pieces(
    const struct us_attention_shared *sh, uint32_t head, uint32_t item) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  struct us_attention_tree tree = us_attention_tree_begin();
  struct us_attention_sum x[US_ATTENTION_AHEAD];
#pragma unroll
  for (uint32_t i = 0; i < US_ATTENTION_AHEAD; i++) x[i] = us_attention_load_piece(sh, i, head, item);
#pragma unroll 1
  for (uint32_t k = 0; k < row->pieces; k++) {
    us_attention_tree_add(&tree, us_attention_piece_leaf(row, k), &x[0]);
#pragma unroll
    for (uint32_t i = 0; i + 1 < US_ATTENTION_AHEAD; i++) x[i] = x[i + 1];
    x[US_ATTENTION_AHEAD - 1] = us_attention_load_piece(sh, k + US_ATTENTION_AHEAD, head, item);
  }
  return us_attention_tree_end(&tree);
}

/* Thread 0: whether all other pieces of the row and chunk stand in memory. */
static __device__ __forceinline__ bool us_attention_arrive(const struct us_attention_shared *sh) {
  uint32_t *counter = sh->a.arrivals + sh->job.row * sh->chunks + sh->job.chunk, before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  if (before + 1 != sh->row[sh->job.row].pieces) return false;
  *counter = 0;
  return true;
}

/* Fold the units; close the row and chunk, or leave the piece and, as the last to do so, close. */
static __device__ __forceinline__ void us_attention_result(const struct us_engine_block *b,
                                                           struct us_attention_shared *sh) {
  uint32_t V = sh->a.V, item = threadIdx.x, head = item / (V / 4), dim = item % (V / 4) * 4;
  bool mine = head < 16, whole = sh->row[sh->job.row].pieces == 1;
  if (mine) {
    struct us_attention_sum x = us_attention_fold_units(sh, head, dim);
    if (whole) {
      us_attention_close(sh, head, dim, &x);
    } else {
      float *to = us_attention_partial(sh, sh->job.piece);
      __stcg((float4 *)to + item, x.o);
      if (dim == 0) to[16 * V + head] = x.m, to[16 * V + 16 + head] = x.s;
    }
  }
  if (whole) return;
  us_engine_meet();
  if (threadIdx.x == 0) {
    us_engine_jitter(b);
    sh->last = us_attention_arrive(sh);
  }
  us_engine_meet();
  if (!sh->last || !mine) return;
  struct us_attention_sum x = us_attention_fold_pieces(sh, head, item);
  us_attention_close(sh, head, dim, &x);
}

/* ---- jobs ------------------------------------------------------------------------------------------------------------ */

/* A unit's leaves, one after the other; `leaf` and `keys` are the first's. */
template <int KG, int VT>
static __device__ __forceinline__ void us_attention_unit_sums(struct us_attention_shared *sh,
                                                              struct us_attention_leaves l,
                                                              struct us_attention_leaf leaf,
                                                              uint4 keys[2][KG],
                                                              struct us_attention_part<VT> *part) {
  us_attention_leaf_sums<KG, VT>(sh, &leaf, keys, part);
#pragma unroll 1
  for (uint32_t i = l.begin + 1; i < l.end; i++) {
    struct us_attention_part<VT> next;
    leaf = us_attention_leaf_of(sh->row + sh->job.row, &sh->job.pages, i);
    us_attention_load_keys<KG, 0, KG>(&sh->job.pages, leaf.page, keys);
    us_attention_leaf_sums<KG, VT>(sh, &leaf, keys, &next);
    us_attention_fold_part<VT>(part, &next);
  }
}

#define US_ATTENTION_TRIES 2048 /* about a millisecond */

/* All compute threads: wait for the operation's input without a call, so that keys under way stay in registers. false: it did
 * not come soon, or somebody wants to see the wait; us_engine_wait_done is the way then. */
static __device__ __forceinline__ bool us_attention_wait(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh) {
  if (threadIdx.x == 0) {
    uint32_t want = us_engine_target(b, op->wait), tries = b->launch->profile.spans ? US_ATTENTION_TRIES : 0;
    bool ready = !want || op->wait == US_ENGINE_NONE;
    for (; !ready && tries < US_ATTENTION_TRIES; tries++)
      ready = (int32_t)(us_load_acquire(b->rank->done + op->wait) - want) >= 0;
    sh->ready = ready;
  }
  us_engine_meet();
  return sh->ready;
}

/* The job in shared memory. The first keys are on their way before the operation's input is awaited, if it is. */
template <int KG, int VT>
static __device__ __forceinline__ void us_attention_run_job(const struct us_engine_block *b,
                                                            const struct us_engine_op *op,
                                                            struct us_attention_shared *sh, bool wait) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  bool exists = row->sequence != US_ENGINE_NONE;
  struct us_attention_leaves l = sh->job.leaves[us_attention_unit()];
  struct us_attention_leaf leaf = {};
  struct us_attention_part<VT> part;
  bool busy = exists && l.begin < l.end;
  uint4 keys[2][KG];
  if (busy) {
    leaf = us_attention_leaf_of(row, &sh->job.pages, l.begin);
    us_attention_fetch_early(sh, leaf.page);
  }
  us_attention_load_keys<KG, 0, KG / 2>(&sh->job.pages, leaf.page, keys);
  if (wait && !us_attention_wait(b, op, sh)) {
    us_engine_wait_done(b, op->wait);
    us_attention_load_keys<KG, 0, KG / 2>(&sh->job.pages, leaf.page, keys);
  }
  if (!exists) {
    us_attention_close_absent(sh);
    return;
  }
  us_attention_stage(sh, op->row_tile * US_ENGINE_ROWS);
  us_attention_load_keys<KG, KG / 2, KG>(&sh->job.pages, leaf.page, keys);
  us_engine_meet();
  if (sh->job.appends) us_attention_append(sh);
  if (busy) us_attention_unit_sums<KG, VT>(sh, l, leaf, keys, &part);
  us_engine_meet();
  if (busy) us_attention_keep_part<VT>(sh, &part);
  us_engine_meet();
  us_attention_result(b, sh);
}

/* This block's first job. */
static __device__ __forceinline__ uint32_t us_attention_first(const struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  return (b->index + b->blocks - op->shift % b->blocks) % b->blocks;
}

/* This block's jobs. early: op->wait was not awaited yet. */
template <int KG, int VT>
static __device__ __forceinline__ void us_attention_jobs(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh, bool early) {
  uint32_t first = us_attention_first(b, op);
#pragma unroll 1
  for (uint32_t j = first; j < sh->jobs; j += b->blocks) {
    us_engine_meet(); /* shared memory of the job before */
    if (threadIdx.x == 0) us_attention_set_job(b, sh, j);
    us_engine_meet();
    us_attention_run_job<KG, VT>(b, op, sh, early && j == first);
  }
}

/* The operation: a block without a job waits all the same, so that what it does next may rely on what stood before. */
static __device__ __noinline__ void us_engine_attention(struct us_engine_block *b,
                                                        const struct us_engine_op *op) {
  struct us_attention_shared *sh = (struct us_attention_shared *)us_engine_scratch(b);
  bool early = op->attention.ready != US_ENGINE_NONE;
  us_engine_wait_done(b, early ? op->attention.ready : op->wait);
  us_engine_drain(b);
  us_attention_plan(b, op, sh);
  uint32_t groups = us_engine_k_stride(sh->a.Q) / 32;
  if (groups <= 2 && sh->a.V <= 32)
    us_attention_jobs<2, 1>(b, op, sh, early);
  else if (groups <= 4)
    us_attention_jobs<4, 4>(b, op, sh, early);
  else
    us_attention_jobs<6, 4>(b, op, sh, early);
  if (early && us_attention_first(b, op) >= sh->jobs) us_engine_wait_done(b, op->wait);
  us_engine_finish(b);
}

#endif
