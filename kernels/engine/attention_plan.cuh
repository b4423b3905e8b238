/* attention_plan.cuh: what each row of a row tile sees, and into which jobs its keys are cut.
 *
 *     us_attention_plan(b, op, shared);                          // all compute threads, once state and rows stand
 *     us_attention_set_job(b, shared, j);                        // one thread: shared->job; j < shared->jobs
 *
 * A job is a row, a chunk of 16 query heads and a piece of the row's keys; a block does it with 4 units. The cut follows from the
 * row's own position alone: at most 4 leaves are one job, a leaf a unit; up to US_ENGINE_ATTENTION_GROUPED leaves a job is a
 * group, a leaf a unit; beyond, a segment, a group a unit. The sums form the same tree whatever the cut (attention_fold.cuh).
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_PLAN_CUH
#define US_KERNELS_ENGINE_ATTENTION_PLAN_CUH

#include "kernels/engine/attention_tile.cuh"

/* ---- rows ------------------------------------------------------------------------------------------------------------------ */

/* The run of rows of one sequence that row `r` of the tile belongs to, as rows of the pass relative to the tile: [first, end). */
static __device__ __forceinline__ void us_attention_run(const struct us_attention_shared *sh, uint32_t r,
                                                        int *first, int *end) {
  const uint32_t *near = sh->near + 16;
  *first = (int)r, *end = (int)r + 1;
  while (*first > (int)r + 1 - US_ATTENTION_FRESH && near[*first - 1] == near[r]) --*first;
  while (*end < 24 && near[*end] == near[r]) ++*end;
}

/* How many jobs each chunk of a row is. */
static __device__ __forceinline__ void us_attention_cut_row(struct us_attention_row *row) {
  row->leaves = row->begin < row->end;
  row->first = row->begin / 64, row->last = row->leaves ? (row->end - 1) / 64 : row->first;
  uint32_t leaves = row->leaves ? row->last - row->first + 1 : 0, block = row->block;
  row->cut = leaves + block <= US_ENGINE_ATTENTION_TOGETHER ? US_ATTENTION_WHOLE
             : leaves <= US_ENGINE_ATTENTION_GROUPED        ? US_ATTENTION_GROUPS
                                                            : US_ATTENTION_SEGMENTS;
  uint32_t each = row->cut == US_ATTENTION_GROUPS ? US_ATTENTION_GROUP : US_ATTENTION_SEGMENT;
  row->pieces = row->cut == US_ATTENTION_WHOLE ? 1 : row->last / each - row->first / each + 1 + block;
}

static __device__ __forceinline__ void us_attention_plan_row(const struct us_engine_block *b,
                                                             const struct us_engine_op *op,
                                                             struct us_attention_shared *sh, uint32_t r) {
  const struct us_engine_attention *a = &sh->a;
  const struct us_engine_state *state = b->rank->state;
  const struct us_engine_row *from =
      (a->draft ? state->draft : state->target) + op->row_tile * US_ENGINE_ROWS + r;
  struct us_attention_row *row = sh->row + r;
  row->sequence = sh->near[16 + r], row->pieces = 1;
  if (row->sequence == US_ENGINE_NONE) return;
  const struct us_engine_sequence *sequence = state->sequence + row->sequence;
  const uint64_t *const *tables = (a->draft ? &sequence->draft_kv : &sequence->kv)->tables;
  row->position = __ldcg(&from->position);
  row->table = tables[a->layer];
  if (!a->draft) row->own = row->table[row->position / 64 % a->page_count];
  int first, end;
  us_attention_run(sh, r, &first, &end);
  row->fresh = row->position - (r - (uint32_t)first);
  row->fresh_row = op->row_tile * US_ENGINE_ROWS + (uint32_t)first;
  row->fresh_count = a->draft ? (uint32_t)(end - first) : r - (uint32_t)first + 1;
  if (row->fresh_count > US_ATTENTION_FRESH) row->fresh_count = US_ATTENTION_FRESH;
  row->begin = a->window && row->position + 1 > a->window ? row->position + 1 - a->window : 0;
  row->end = a->draft ? row->fresh : row->position + 1;
  row->block = a->draft;
  us_attention_cut_row(row);
}

/* What the plan needs from memory: the operation, sequences of the rows around the tile. */
static __device__ __forceinline__ void us_attention_copy(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh) {
  static_assert(sizeof sh->a / 4 <= 96, "copied by three warps");
  const struct us_engine_state *state = b->rank->state;
  const uint32_t *from = (const uint32_t *)&op->attention;
  uint32_t word = threadIdx.x - 32, near = threadIdx.x - 128;
  if (word < sizeof sh->a / 4) ((uint32_t *)&sh->a)[word] = from[word];
  if (near >= 40) return;
  const struct us_engine_row *rows = op->attention.draft ? state->draft : state->target;
  uint32_t row = op->row_tile * US_ENGINE_ROWS + near - 16; /* wraps below the first */
  sh->near[near] = row < US_ENGINE_MAX_ROWS ? __ldcg(&rows[row].sequence) : US_ENGINE_NONE;
}

/* All compute threads; ends with a barrier. */
static __device__ __forceinline__ void us_attention_plan(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh) {
  uint32_t i = threadIdx.x;
  us_attention_copy(b, op, sh);
  us_engine_meet();
  if (i >= 32 && i - 32 < sh->a.H)
    sh->sink[i - 32] = sh->a.sink ? sh->a.sink[i - 32] * US_ATTENTION_LOG2E : -CUDART_INF_F;
  if (i < US_ENGINE_ROWS) us_attention_plan_row(b, op, sh, i);
  __syncwarp();
  if (i == 0) {
    sh->chunks = us_engine_attention_chunks(sh->a.H, sh->a.G), sh->jobs = 0;
    for (uint32_t r = 0; r < US_ENGINE_ROWS; r++)
      sh->row[r].first_job = sh->jobs, sh->jobs += sh->row[r].pieces * sh->chunks;
  }
  us_engine_meet();
}

/* ---- jobs ------------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ bool us_attention_is_last(const struct us_attention_row *row,
                                                            uint32_t piece) {
  return piece + 1 == row->pieces;
}

/* Leaves of a piece that is one of several. */
static __device__ __forceinline__ uint32_t us_attention_each(const struct us_attention_row *row) {
  return row->cut == US_ATTENTION_GROUPS ? US_ATTENTION_GROUP : US_ATTENTION_SEGMENT;
}

/* First leaf of a piece that is one of several: what the tree knows it by. */
static __device__ __forceinline__ uint32_t us_attention_piece_leaf(const struct us_attention_row *row,
                                                                   uint32_t piece) {
  uint32_t each = us_attention_each(row);
  return row->block && us_attention_is_last(row, piece) ? US_ATTENTION_BLOCK
                                                        : (row->first / each + piece) * each;
}

static __device__ __forceinline__ struct us_attention_leaves us_attention_unit_leaves(
    const struct us_attention_row *row, uint32_t piece, uint32_t unit) {
  struct us_attention_leaves none = {0, 0}, block = {US_ATTENTION_BLOCK, US_ATTENTION_BLOCK + 1}, l;
  if (row->cut == US_ATTENTION_WHOLE) {
    uint32_t leaves = row->leaves ? row->last - row->first + 1 : 0;
    if (unit >= leaves) return unit == leaves && row->block ? block : none;
    l.begin = row->first + unit, l.end = l.begin + 1;
    return l;
  }
  l.begin = us_attention_piece_leaf(row, piece);
  if (l.begin == US_ATTENTION_BLOCK) return unit == 0 ? block : none;
  uint32_t each = us_attention_each(row) / US_ATTENTION_UNITS;
  l.begin += unit * each, l.end = l.begin + each;
  if (l.begin < row->first) l.begin = row->first;
  if (l.end > row->last + 1) l.end = row->last + 1;
  return l.begin < l.end ? l : none;
}

/* One thread. The last piece always holds new keys; a target's may hold some where new rows cross a multiple of its size. */
static __device__ __forceinline__ void us_attention_set_job(const struct us_engine_block *b,
                                                            struct us_attention_shared *sh, uint32_t j) {
  const struct us_engine_attention *a = &sh->a;
  struct us_attention_job *job = &sh->job;
  uint32_t r = 0, group = a->H / a->G, each = sh->chunks / a->G;
  while (r + 1 < US_ENGINE_ROWS && sh->row[r + 1].first_job <= j) r++;
  const struct us_attention_row *row = sh->row + r;
  uint32_t local = j - row->first_job, chunk = local % sh->chunks, first = chunk % each * 16;
  job->row = r, job->chunk = chunk, job->piece = local / sh->chunks, job->g = chunk / each;
  job->first_head = job->g * group + first, job->heads = group - first < 16 ? group - first : 16;
  if (row->sequence == US_ENGINE_NONE) return;
  const uint8_t *pool = a->draft ? b->rank->draft_pool : b->rank->kv_pool;
  bool last = us_attention_is_last(row, job->piece);
  uint32_t end = us_attention_piece_leaf(row, job->piece) + us_attention_each(row);
  job->new_keys = last || (!row->block && end * 64 > row->fresh) ? row->fresh_count : 0;
  job->appends = last && !a->draft && first == 0;
  job->pages = us_head_pages(pool, row->table, a->page_count, a->G, a->Q, a->V, job->g);
  for (uint32_t u = 0; u < US_ATTENTION_UNITS; u++)
    job->leaves[u] = us_attention_unit_leaves(row, job->piece, u);
}

/* One leaf as the row sees it. */
static __device__ __forceinline__ struct us_attention_leaf us_attention_leaf_of(
    const struct us_attention_row *row, const struct us_head_pages *pages, uint32_t leaf) {
  bool block = leaf == US_ATTENTION_BLOCK;
  uint32_t end = block ? row->fresh + row->fresh_count : row->end;
  struct us_attention_leaf l;
  l.page = block ? (const uint8_t *)0 : us_head_page(pages, leaf);
  l.base = block ? row->fresh : leaf * 64;
  l.begin = row->begin > l.base ? row->begin - l.base : 0;
  l.end = end - l.base < 64 ? end - l.base : 64;
  return l;
}

#endif
