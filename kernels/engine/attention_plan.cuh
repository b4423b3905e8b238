/* attention_plan.cuh: what each row of a row tile sees, into which jobs its keys are cut, and the shared memory of it all.
 *
 *     us_attention_plan(b, op, shared, j);        // all compute threads, once state and rows stand: rows, jobs, job j's first step
 *     us_attention_set_step(b, shared, step);     // one warp: the units' leaves
 *
 * A job is a row, a chunk of 16 query heads and a piece of the row's keys; a block does it in steps of 4 leaves, a unit each. The
 * cut follows from the row's own position alone: up to US_ENGINE_ATTENTION_TOGETHER leaves are one job of one step; up to
 * US_ENGINE_ATTENTION_GROUPED leaves a job is a group; beyond, a segment, a group a step. The sums form the same tree whatever the
 * cut (attention_fold.cuh). Bound: latency, four loads one after the other; one warp has the rows.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_PLAN_CUH
#define US_KERNELS_ENGINE_ATTENTION_PLAN_CUH

#include "kernels/engine/attention_fold.cuh"
#include "kernels/engine/attention_head.cuh"

#define US_ATTENTION_UNITS        4
#define US_ATTENTION_THREADS      128 /* of a unit */
#define US_ATTENTION_FRESH        16  /* new keys, at most: rows of a sequence in a pass */
#define US_ATTENTION_FRESH_PIECES 3   /* 8 positions each, at multiples of 8, that new keys may touch */
#define US_ATTENTION_HEADS        128 /* of a rank, at most */

enum us_attention_cut { US_ATTENTION_WHOLE, US_ATTENTION_GROUPS, US_ATTENTION_SEGMENTS };

/* What a row sees, and how its keys are cut. */
struct us_attention_row {
  const uint64_t *table; /* of the layer's pages */
  uint32_t sequence, position;
  uint32_t begin, end; /* positions seen outside a drafter's block; none if equal */
  uint32_t fresh,
      count; /* position of the first new key, and how many: target: up to the row itself, draft: the block */
  int32_t fresh_row;      /* row of the first new key, from the row tile's first on */
  uint32_t first, leaves; /* leaves seen outside a block */
  uint32_t first_page;    /* of the table: leaf `first` */
  uint32_t pieces;        /* jobs a chunk: groups, segments or everything, and the block's leaf */
  uint32_t first_job;
  uint32_t cut; /* enum us_attention_cut */
};

/* A unit's leaf: where its 64 keys lie and which of the slots the row sees. */
struct us_attention_leaf {
  const uint8_t *page,
      *next;     /* NULL: a drafter's block, or no leaf; `next`: the unit's page in the next step */
  uint32_t id;   /* NONE: the unit has nothing to do */
  uint32_t base; /* position of slot 0 */
  uint32_t begin, end;
};

/* The job and step that a block is at. */
struct us_attention_job {
  uint32_t row, chunk, piece;
  uint32_t g, first_head, heads; /* of the chunk */
  uint32_t own;                  /* leaf to which the row's key and value are appended; NONE: not here */
  uint32_t step, steps;
  uint32_t new_keys; /* that the step sees: 0 or all of the row's */
};

struct us_attention_shared {
  uint4 q[6 * 2 * 2 * 32]; /* queries by us_attention_operand_index: groups of 32 dims */
  union {
    struct {
      uint4 p[US_ATTENTION_UNITS][2 * 2 * 2 * 32]; /* weights, keys for dims */
      uint4 key[US_ATTENTION_FRESH * 192 / 8];     /* new keys, rotated: (count, k_stride) bf16 */
      uint4 value
          [128 *
           US_ATTENTION_FRESH_PIECES]; /* (V, 24) bf16 from us_attention_origin on, 0 where no new key is seen */
    };
    float sums[US_ATTENTION_UNITS]
              [16 * (128 + 2)]; /* of each unit: o by us_attention_sum_index, then m, then s */
  };
  float max[US_ATTENTION_UNITS][16][4], sum[US_ATTENTION_UNITS][16][4]; /* by head and warp of the unit */
  struct us_engine_attention a;
  struct us_attention_row row[US_ENGINE_ROWS];
  struct us_attention_job job;
  struct us_attention_leaf leaf[US_ATTENTION_UNITS];
  float sink[US_ATTENTION_HEADS]; /* times log2 e; -Inf: none */
  uint32_t chunks;                /* of 16 query heads */
  uint32_t jobs;
  uint32_t ready; /* the input was done when thread 0 looked */
  uint32_t last;  /* this block was the last of a row and chunk */
};
static_assert(sizeof(struct us_attention_shared) <= US_ENGINE_VECTOR_BYTES, "shared memory of attention");

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* What a row sees, of its place and of the rows of its sequence around it: `before` and `after` it in the pass. */
static __device__ __forceinline__ void us_attention_see(const struct us_engine_attention *a,
                                                        struct us_attention_row *row, uint32_t r,
                                                        uint32_t before, uint32_t after) {
  uint32_t position = row->position;
  row->fresh = position - before, row->fresh_row = (int32_t)(r - before);
  row->count = before + 1 + (a->draft ? after : 0);
  row->begin = a->window && position + 1 > a->window ? position + 1 - a->window : 0;
  row->end = a->draft ? row->fresh : position + 1;
  if (row->end < row->begin) row->end = row->begin;
  row->first = row->begin / 64,
  row->leaves = row->end > row->begin ? (row->end - 1) / 64 - row->first + 1 : 0;
  row->first_page = row->first % a->page_count;
}

/* How many jobs each chunk of a row is. */
static __device__ __forceinline__ void us_attention_cut_row(struct us_attention_row *row, uint32_t block) {
  uint32_t each = row->leaves <= US_ENGINE_ATTENTION_GROUPED ? US_ATTENTION_GROUP : US_ATTENTION_SEGMENT;
  uint32_t last = row->first + row->leaves - 1;
  row->cut = row->leaves + block <= US_ENGINE_ATTENTION_TOGETHER ? US_ATTENTION_WHOLE
             : each == US_ATTENTION_GROUP                        ? US_ATTENTION_GROUPS
                                                                 : US_ATTENTION_SEGMENTS;
  row->pieces = row->cut == US_ATTENTION_WHOLE ? 1 : last / each - row->first / each + 1 + block;
}

/* One warp: every row of the tile, and the jobs. Lanes hold the rows 8 tile - 15 ... + 16 of the pass, and those after them. */
static __device__ __forceinline__ void us_attention_plan_rows(const struct us_engine_block *b,
                                                              const struct us_engine_op *op,
                                                              struct us_attention_shared *sh) {
  const struct us_engine_attention *a = &op->attention;
  const struct us_engine_state *state = b->rank->state;
  const struct us_engine_row *rows = op->program == US_ENGINE_PASS_DRAFT ? state->draft : state->target;
  uint32_t lane = threadIdx.x % 32, r = lane - 15, here = op->row_tile * US_ENGINE_ROWS + r, next = here + 32;
  uint32_t position = 0, sequence = US_ENGINE_NONE, later = US_ENGINE_NONE;
  if (here < US_ENGINE_MAX_ROWS)
    position = __ldcg(&rows[here].position), sequence = __ldcg(&rows[here].sequence);
  if (next < US_ENGINE_MAX_ROWS) later = __ldcg(&rows[next].sequence);
  uint32_t left = __shfl_up_sync(0xffffffffu, sequence, 1), last = __shfl_sync(0xffffffffu, sequence, 31);
  uint32_t later_left = __shfl_up_sync(0xffffffffu, later, 1);
  /* bit i: a run begins at lane i */
  uint64_t starts = __ballot_sync(0xffffffffu, lane == 0 || left != sequence);
  starts |= (uint64_t)__ballot_sync(0xffffffffu, (lane ? later_left : last) != later) << 32;
  struct us_attention_row row = {};
  uint32_t jobs = 0, chunks = us_engine_attention_chunks(a->H, a->G);
  if (r < US_ENGINE_ROWS) {
    row.sequence = sequence, row.position = position, row.pieces = 1;
    if (sequence != US_ENGINE_NONE) {
      const struct us_engine_sequence *s = state->sequence + sequence;
      row.table = (a->draft ? s->draft_kv.tables : s->kv.tables)[a->layer];
      uint32_t begin = 63 - __clzll((long long)(starts & ((2ull << lane) - 1)));
      uint32_t end = __ffsll((long long)(starts >> (lane + 1))) - 1; /* rows after it, of its sequence */
      us_attention_see(
          a, &row, r, lane - begin,
          end < US_ATTENTION_FRESH - 1 - (lane - begin) ? end : US_ATTENTION_FRESH - 1 - (lane - begin));
      us_attention_cut_row(&row, a->draft);
    }
    jobs = row.pieces * chunks;
  }
  uint32_t through = jobs;
#pragma unroll
  for (uint32_t step = 1; step < US_ENGINE_ROWS; step *= 2) {
    uint32_t v = __shfl_up_sync(0xffffffffu, through, step);
    if (r >= step && r < US_ENGINE_ROWS) through += v;
  }
  row.first_job = through - jobs;
  if (r < US_ENGINE_ROWS) sh->row[r] = row;
  if (r == US_ENGINE_ROWS - 1) sh->jobs = through, sh->chunks = chunks;
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ bool us_attention_is_last(const struct us_attention_row *row,
                                                            uint32_t piece) {
  return piece + 1 == row->pieces;
}

/* First leaf of a piece that is one of several: what the tree knows it by. */
static __device__ __forceinline__ uint32_t us_attention_piece_leaf(const struct us_attention_shared *sh,
                                                                   const struct us_attention_row *row,
                                                                   uint32_t piece) {
  uint32_t each = row->cut == US_ATTENTION_GROUPS ? US_ATTENTION_GROUP : US_ATTENTION_SEGMENT;
  return sh->a.draft && us_attention_is_last(row, piece) ? US_ATTENTION_BLOCK
                                                         : (row->first & ~(each - 1)) + piece * each;
}

/* Leaf of a unit in a step; NONE: none. */
static __device__ __forceinline__ uint32_t us_attention_leaf_id(const struct us_attention_shared *sh,
                                                                const struct us_attention_row *row,
                                                                uint32_t step, uint32_t unit) {
  uint32_t end = row->first + row->leaves, first = us_attention_piece_leaf(sh, row, sh->job.piece);
  if (row->sequence == US_ENGINE_NONE || step >= sh->job.steps) return US_ENGINE_NONE;
  if (row->cut == US_ATTENTION_WHOLE) {
    uint32_t id = row->first + unit;
    return id < end ? id : id == end && sh->a.draft ? US_ATTENTION_BLOCK : US_ENGINE_NONE;
  }
  if (first == US_ATTENTION_BLOCK) return unit == 0 ? first : US_ENGINE_NONE;
  uint32_t id = first + step * US_ATTENTION_UNITS + unit;
  return id >= row->first && id < end ? id : US_ENGINE_NONE;
}

static __device__ __forceinline__ const uint8_t *us_attention_page(const struct us_engine_block *b,
                                                                   const struct us_attention_shared *sh,
                                                                   const struct us_attention_row *row,
                                                                   uint32_t id) {
  if (id >= US_ATTENTION_BLOCK) return (const uint8_t *)0;
  uint32_t page = row->first_page + (id - row->first);
  if (page >= sh->a.page_count) page -= sh->a.page_count;
  return (sh->a.draft ? b->rank->draft_pool : b->rank->kv_pool) + row->table[page];
}

/* One warp: lanes 0 to 3 have a unit each, lanes 4 to 7 look for the pages of the next step. */
static __device__ __forceinline__ void us_attention_set_step(const struct us_engine_block *b,
                                                             struct us_attention_shared *sh, uint32_t step) {
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t lane = threadIdx.x % 32, unit = lane % US_ATTENTION_UNITS, count = row->count;
  struct us_attention_leaf leaf;
  leaf.id = lane < 8 ? us_attention_leaf_id(sh, row, step + lane / US_ATTENTION_UNITS, unit) : US_ENGINE_NONE;
  leaf.page = us_attention_page(b, sh, row, leaf.id);
  leaf.next = (const uint8_t *)__shfl_down_sync(0xffffffffu, (uint64_t)leaf.page, US_ATTENTION_UNITS);
  bool block = leaf.id == US_ATTENTION_BLOCK;
  uint32_t end = block ? row->fresh + count : row->end;
  leaf.base = block ? row->fresh : leaf.id * 64;
  leaf.begin = row->begin > leaf.base ? row->begin - leaf.base : 0;
  leaf.end = end - leaf.base < 64 ? end - leaf.base : 64;
  bool fresh = lane < US_ATTENTION_UNITS && leaf.id != US_ENGINE_NONE && leaf.base + leaf.end > row->fresh;
  uint32_t any = __ballot_sync(0xffffffffu, fresh);
  if (lane < US_ATTENTION_UNITS) sh->leaf[unit] = leaf;
  if (lane == 0) sh->job.step = step, sh->job.new_keys = any ? count : 0;
}

/* One warp: job j, and its first step. */
static __device__ __forceinline__ void us_attention_set_job(const struct us_engine_block *b,
                                                            struct us_attention_shared *sh, uint32_t j) {
  const struct us_engine_attention *a = &sh->a;
  struct us_attention_job *job = &sh->job;
  uint32_t lane = threadIdx.x % 32, group = (uint32_t)a->H / a->G, each = (group + 15) / 16;
  uint32_t r = __popc(__ballot_sync(0xffffffffu,
                                    lane < US_ENGINE_ROWS && sh->row[lane % US_ENGINE_ROWS].first_job <= j)) -
               1;
  const struct us_attention_row *row = sh->row + r;
  uint32_t local = j - row->first_job, piece = local / sh->chunks, chunk = local % sh->chunks,
           g = chunk / each;
  uint32_t first = chunk % each * 16, leaf = us_attention_piece_leaf(sh, row, piece), steps = 1, step = 0;
  if (row->cut == US_ATTENTION_SEGMENTS && leaf != US_ATTENTION_BLOCK) {
    uint32_t end = row->first + row->leaves - leaf;
    steps = ((end < US_ATTENTION_SEGMENT ? end : US_ATTENTION_SEGMENT) + US_ATTENTION_UNITS - 1) /
            US_ATTENTION_UNITS;
    step = row->first > leaf ? (row->first - leaf) / US_ATTENTION_UNITS : 0;
  }
  if (lane == 0) {
    job->row = r, job->chunk = chunk, job->piece = piece, job->g = g, job->first_head = g * group + first;
    job->heads = group - first < 16 ? group - first : 16, job->steps = steps;
    job->own = first == 0 && !a->draft ? row->position / 64 : US_ENGINE_NONE;
  }
  __syncwarp();
  us_attention_set_step(b, sh, step);
}

/* Position of the first new value in shared memory: pieces of 8 line up with the slots of a page, or of a block. */
static __device__ __forceinline__ uint32_t us_attention_origin(const struct us_attention_shared *sh,
                                                               const struct us_attention_row *row) {
  return sh->a.draft ? row->fresh : row->fresh / 8 * 8;
}

/* ---- all together ---------------------------------------------------------------------------------------------------- */

/* All compute threads; ends with a barrier. `first`: the block's first job, if there are so many. */
static __device__ __forceinline__ void us_attention_plan(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh, uint32_t first) {
  const struct us_engine_attention *a = &op->attention;
  uint32_t i = threadIdx.x, head = i - 128;
  if (i < 32) {
    for (uint32_t word = i; word < sizeof sh->a / 4; word += 32)
      ((uint32_t *)&sh->a)[word] = ((const uint32_t *)a)[word];
    us_attention_plan_rows(b, op, sh);
    __syncwarp();
    if (first < sh->jobs) us_attention_set_job(b, sh, first);
  }
  if (head < a->H) sh->sink[head] = a->sink ? a->sink[head] * US_ATTENTION_LOG2E : -CUDART_INF_F;
  us_engine_meet();
}

#endif
