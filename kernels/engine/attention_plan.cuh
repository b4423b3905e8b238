/* attention_plan.cuh: what each row of a row tile sees, into which jobs its keys are cut, and the shared memory of it all.
 *
 *     us_attention_plan_rows(b, program, row_tile, shared);  // one warp, once state and rows stand: rows, jobs
 *     us_attention_set_job(j, false);             // one warp: job j
 *
 * A job is a row, a chunk of 16 query heads and a piece of the row's keys. The cut follows from the row's own position alone: up to
 * US_ENGINE_ATTENTION_TOGETHER leaves are one job, a leaf a unit; up to US_ENGINE_ATTENTION_GROUPED leaves a job is a group, a leaf a
 * unit; beyond, so many segments that a block has one job (attention_long.cuh). Rows of a sequence that are cut in segments share the
 * jobs (attention_shared.cuh). The sums form the same tree whatever the cut (attention_fold.cuh) and whoever shares.
 * Behind the jobs come folds: a row and chunk that is cut, some of its heads. Bound: latency, three loads one after the other; one
 * warp has the rows.
 *
 * Contents: rows; jobs.
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
#define US_ATTENTION_SHARED_ROWS  3   /* rows that share jobs, at least */
#define US_ATTENTION_MOST_SPAN    96  /* segments a job, whose pages are listed in shared memory */

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
  uint32_t pieces;  /* a chunk's partial results: groups, segments or everything, and the block's leaf */
  uint32_t partial; /* where the first of them lies */
  uint32_t cut;     /* enum us_attention_cut */
  uint32_t first_piece, last_piece; /* at absolute positions, without the block */
  uint32_t first_job, chunk_jobs;
  uint32_t together; /* rows from this one on that share its jobs, or 1; 0: an earlier row has them */
};

/* A unit's leaf: where its 64 keys lie and which of the slots the row sees. */
struct us_attention_leaf {
  const uint8_t *page; /* NULL: a drafter's block, or no leaf */
  uint32_t id;         /* NONE: the unit has nothing to do */
  uint32_t base;       /* position of slot 0 */
  uint32_t begin, end;
};

/* The job that a block is at. */
struct us_attention_job {
  uint32_t row, chunk;
  uint32_t piece, piece_end;     /* of the row; of rows that share it: absolute */
  uint32_t g, first_head, heads; /* of the chunk */
  uint32_t own;                  /* leaf to which the row's key and value are appended; NONE: not here */
  uint32_t new_keys;             /* that the job sees: 0 or all of the row's */
  uint32_t rows;                 /* that share the job; `piece` is then an absolute one */
  uint32_t leaf,
      leaf_end; /* segments: from where on, and the end of what is seen; NONE: a leaf a unit, at once */
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
  uint32_t group;                 /* query heads of a KV head */
  uint32_t jobs;
  uint32_t span;         /* segments a job */
  uint32_t folds;        /* bit r: row r is cut in pieces, which somebody folds */
  const uint32_t *input; /* its counter, and what the counter is when the input is done */
  uint32_t want;
  uint32_t parts; /* blocks that fold a row and chunk together */
  bool ring;      /* a row is cut in segments: keys go through the ring */
  bool unset;     /* the block's first job is still to be set: its pages lie where the projection's sums do */
  uint32_t turn[4]; /* of each warp of a unit: which unit a segment's sum waits for (attention_long.cuh) */
};
static_assert(sizeof(struct us_attention_shared) <= US_ENGINE_VECTOR_BYTES, "shared memory of attention");

/* By an address in a register: constants would each take an instruction to be one. */
static __device__ __forceinline__ struct us_attention_shared *us_attention_shared_of(void) {
  uint32_t address = us_engine_shared_base((const struct us_engine_block *)0) +
                     (uint32_t)offsetof(struct us_engine_shared, partial);
  return (struct us_attention_shared *)__cvta_shared_to_generic(address);
}

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
  row->first_page =
      row->first - us_engine_quotient(row->first, a->page_count) * a->page_count; /* positions < 2^27 */
}

/* How many jobs each chunk of a row is. */
static __device__ __forceinline__ void us_attention_cut_row(struct us_attention_row *row, uint32_t block) {
  bool groups = row->leaves <= US_ENGINE_ATTENTION_GROUPED;
  uint32_t last = row->first + row->leaves - 1;
  row->first_piece = groups ? row->first / US_ATTENTION_GROUP : row->first / US_ATTENTION_SEGMENT;
  row->last_piece = groups ? last / US_ATTENTION_GROUP : last / US_ATTENTION_SEGMENT;
  row->cut = groups ? US_ATTENTION_GROUPS : US_ATTENTION_SEGMENTS;
  row->pieces = row->last_piece - row->first_piece + 1 + block;
  if (row->leaves + block <= US_ENGINE_ATTENTION_TOGETHER) row->cut = US_ATTENTION_WHOLE, row->pieces = 1;
}

/* All lanes: rows of a sequence that are cut in segments share their jobs, if they are enough. `left`: the sequence of the lane
 * before. Returns the segments that the row has jobs for. */
static __device__ __forceinline__ uint32_t us_attention_share_rows(struct us_attention_row *row, uint32_t r,
                                                                   uint32_t left, uint32_t block) {
  uint32_t lane = threadIdx.x % 32, left_cut = __shfl_up_sync(0xffffffffu, row->cut, 1);
  bool joins = r > 0 && r < US_ENGINE_ROWS && row->sequence != US_ENGINE_NONE && left == row->sequence &&
               row->cut == US_ATTENTION_SEGMENTS && left_cut == row->cut;
  uint32_t leads = ~__ballot_sync(0xffffffffu, joins);
  uint32_t lead = 31 - __clz((int)(leads & ((2u << lane) - 1))), next = leads & ~((2u << lead) - 1);
  uint32_t end = next ? __ffs((int)next) - 1 : 32;
  uint32_t last_piece = __shfl_sync(0xffffffffu, row->last_piece, (int)(end - 1));
  row->together = end - lead < US_ATTENTION_SHARED_ROWS ? 1 : joins ? 0 : end - lead;
  return row->together > 1 ? last_piece - row->first_piece + 1 : row->together * (row->pieces - block);
}

/* All lanes: how many segments a job takes: so many that every block has one job, if it can be; `segments` and `others`: the lane's. */
static __device__ __forceinline__ uint32_t us_attention_span(uint32_t blocks, uint32_t segments,
                                                             uint32_t others, uint32_t chunks) {
  uint32_t fixed = __reduce_add_sync(0xffffffffu, others) * chunks;
  uint32_t span = __reduce_add_sync(0xffffffffu, segments) * chunks / blocks;
  span = span < 1 ? 1 : span > US_ATTENTION_MOST_SPAN ? US_ATTENTION_MOST_SPAN : span;
#pragma unroll 1
  for (uint32_t more = 0; more < 8 && span < US_ATTENTION_MOST_SPAN; more++, span++)
    if (__reduce_add_sync(0xffffffffu, (segments + span - 1) / span) * chunks + fixed <= blocks) break;
  return span;
}

/* All lanes, if a row is cut in segments: who shares, and how many jobs each chunk of the lane's row then is. Returns the span. */
static __device__ __forceinline__ uint32_t us_attention_cut_segments(struct us_attention_row *row, uint32_t r,
                                                                     uint32_t left, bool draft,
                                                                     uint32_t blocks, uint32_t chunks) {
  bool exists = r < US_ENGINE_ROWS, cut = exists && row->cut == US_ATTENTION_SEGMENTS;
  uint32_t all = us_attention_share_rows(row, r, left, cut && draft);
  uint32_t segments = cut ? all : 0, others = cut ? row->together && draft : row->chunk_jobs;
  uint32_t span = us_attention_span(blocks, segments, others, chunks);
  row->chunk_jobs = (segments + span - 1) / span + others;
  return span;
}

/* A lane's row of the pass. */
struct us_attention_lane {
  uint32_t r, position, sequence, left; /* row of the tile; the sequence of the lane before */
  uint32_t before, after; /* rows of its sequence; as many after it as a sequence may have at all */
  uint64_t tables;        /* of its sequence */
};

/* One warp. Lanes hold the rows 8 tile - 15 ... + 16 of the pass, and those after them. A row that does not exist is alone at position 0:
 * its cut is that of a row with one leaf. */
static __device__ __forceinline__ struct us_attention_lane us_attention_lane_of(
    const struct us_engine_block *b, uint32_t program, uint32_t row_tile, bool draft) {
  const struct us_engine_state *state = us_engine_rank_of(b)->state;
  const struct us_engine_row *rows =
      (const struct us_engine_row *)((const uint8_t *)state +
                                     (program == US_ENGINE_PASS_DRAFT
                                          ? offsetof(struct us_engine_state, draft)
                                          : offsetof(struct us_engine_state, target)));
  uint32_t lane = threadIdx.x % 32, r = lane - (US_ATTENTION_FRESH - 1), here = row_tile * US_ENGINE_ROWS + r,
           next = here + 32;
  struct us_attention_lane x = {r, 0, US_ENGINE_NONE};
  uint32_t later = US_ENGINE_NONE;
  if (here < US_ENGINE_MAX_ROWS)
    x.position = __ldcg(&rows[here].position), x.sequence = __ldcg(&rows[here].sequence);
  if (next < US_ENGINE_MAX_ROWS) later = __ldcg(&rows[next].sequence);
  const struct us_engine_sequence *sequence = state->sequence + lane % US_ENGINE_SEQUENCES;
  x.tables = *(const uint64_t *)((const uint8_t *)sequence +
                                 (draft ? offsetof(struct us_engine_sequence, draft_kv.tables)
                                        : offsetof(struct us_engine_sequence, kv.tables)));
  x.tables = __shfl_sync(0xffffffffu, x.tables, (int)(x.sequence % US_ENGINE_SEQUENCES));
  if (x.sequence == US_ENGINE_NONE) x.position = 0;
  x.left = __shfl_sync(0xffffffffu, x.sequence, (int)(lane - 1)); /* of lane 0: the last lane's */
  uint32_t later_left = __shfl_up_sync(0xffffffffu, later, 1);
  /* bit i: a run begins at lane i, at lane 32 + i */
  uint32_t starts =
      __ballot_sync(0xffffffffu, lane == 0 || x.left != x.sequence || x.sequence == US_ENGINE_NONE);
  uint32_t later_starts = __ballot_sync(0xffffffffu, (lane ? later_left : x.left) != later);
  x.before = lane + __clz((int)(starts & ((2u << lane) - 1))) - 31;
  uint32_t end = __ffs((int)__funnelshift_r(starts, later_starts, lane + 1)) - 1,
           most = US_ATTENTION_FRESH - 1 - x.before;
  x.after = end < most ? end : most;
  return x;
}

/* One warp: every row of the tile, and the jobs. */
static __device__ __forceinline__ void us_attention_plan_rows(const struct us_engine_block *b,
                                                              uint32_t program, uint32_t row_tile,
                                                              struct us_attention_shared *sh) {
  const struct us_engine_attention *a = &sh->a;
  bool draft = a->draft;
  struct us_attention_lane x = us_attention_lane_of(b, program, row_tile, draft);
  bool exists = x.r < US_ENGINE_ROWS;
  struct us_attention_row row;
  row.sequence = x.sequence, row.position = x.position;
  if (exists && x.sequence != US_ENGINE_NONE) x.tables = ((const uint64_t *)x.tables)[a->layer];
  uint32_t group = us_engine_quotient(a->H, a->G), chunks = a->G * ((group + 15) / 16);
  us_attention_see(a, &row, x.r, x.before, x.after);
  us_attention_cut_row(&row, draft);
  row.table = (const uint64_t *)x.tables;
  uint32_t folds = __ballot_sync(0xffffffffu, exists && row.cut != US_ATTENTION_WHOLE), span = 1;
  bool ring = __any_sync(0xffffffffu, exists && row.cut == US_ATTENTION_SEGMENTS);
  row.together = 1, row.chunk_jobs = exists ? row.pieces : 0;
  if (ring) span = us_attention_cut_segments(&row, x.r, x.left, draft, b->blocks, chunks);
  uint32_t jobs = row.chunk_jobs * chunks, slots = exists ? row.pieces * chunks : 0;
  row.first_job = jobs, row.partial = slots;
#pragma unroll 1
  for (uint32_t step = 1; step < US_ENGINE_ROWS; step *= 2) { /* lanes before the first row have none */
    row.first_job += __shfl_up_sync(0xffffffffu, row.first_job, step);
    row.partial += __shfl_up_sync(0xffffffffu, row.partial, step);
  }
  if (x.r == US_ENGINE_ROWS - 1) {
    uint32_t parts = 1, all = __popc(folds) * chunks * 2; /* as many as there are blocks for */
#pragma unroll 1
    while (parts < 16 && all * parts <= b->blocks) parts *= 2;
    sh->jobs = row.first_job, sh->chunks = chunks, sh->group = group, sh->span = span, sh->parts = parts;
    sh->ring = ring, sh->folds = folds >> (US_ATTENTION_FRESH - 1);
  }
  row.first_job -= jobs, row.partial -= slots;
  if (exists) sh->row[x.r] = row;
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ bool us_attention_is_last(const struct us_attention_row *row,
                                                            uint32_t piece) {
  return piece + 1 == row->pieces;
}

/* Where a piece of a row and the job's chunk lies. */
static __device__ __forceinline__ float *us_attention_partial(const struct us_attention_shared *sh,
                                                              const struct us_attention_row *row,
                                                              uint32_t piece) {
  uint32_t at = row->partial + piece * sh->chunks + sh->job.chunk;
  return sh->a.partial + (size_t)at * us_engine_attention_piece(sh->a.V);
}

/* One thread: the job's row and chunk. */
static __device__ __forceinline__ void us_attention_set_chunk(struct us_attention_shared *sh, uint32_t row,
                                                              uint32_t chunk) {
  uint32_t group = sh->group, each = (group + 15) / 16, g = us_engine_quotient(chunk, each),
           first = (chunk - g * each) * 16;
  sh->job.row = row, sh->job.chunk = chunk, sh->job.g = g;
  sh->job.first_head = g * group + first, sh->job.heads = group - first < 16 ? group - first : 16;
  sh->job.own = first == 0 && !sh->a.draft ? sh->row[row].position / 64 : US_ENGINE_NONE;
}

/* First leaf of a piece that is one of several: what the tree knows it by. */
static __device__ __forceinline__ uint32_t us_attention_piece_leaf(const struct us_attention_shared *sh,
                                                                   const struct us_attention_row *row,
                                                                   uint32_t piece) {
  uint32_t each = row->cut == US_ATTENTION_GROUPS ? US_ATTENTION_GROUP : US_ATTENTION_SEGMENT;
  return sh->a.draft && us_attention_is_last(row, piece) ? US_ATTENTION_BLOCK
                                                         : (row->first & ~(each - 1)) + piece * each;
}

/* Leaf of a unit when the job is a leaf a unit; NONE: none. */
static __device__ __forceinline__ uint32_t us_attention_leaf_id(const struct us_attention_shared *sh,
                                                                const struct us_attention_row *row,
                                                                uint32_t unit) {
  bool whole = row->cut == US_ATTENTION_WHOLE;
  uint32_t end = row->first + row->leaves,
           id = unit + (whole ? row->first : us_attention_piece_leaf(sh, row, sh->job.piece));
  if (row->sequence == US_ENGINE_NONE) return US_ENGINE_NONE;
  if (id >= row->first && id < end) return id;
  return whole ? (id == end && sh->a.draft ? US_ATTENTION_BLOCK : US_ENGINE_NONE)
               : (id == US_ATTENTION_BLOCK ? id : US_ENGINE_NONE);
}

static __device__ __forceinline__ const uint8_t *us_attention_page(const struct us_engine_block *b,
                                                                   const struct us_attention_shared *sh,
                                                                   const struct us_attention_row *row,
                                                                   uint32_t id) {
  if (id >= US_ATTENTION_BLOCK) return (const uint8_t *)0;
  uint32_t page = row->first_page + (id - row->first);
  if (page >= sh->a.page_count) page -= sh->a.page_count;
  return (sh->a.draft ? us_engine_rank_of(b)->draft_pool : us_engine_rank_of(b)->kv_pool) + row->table[page];
}

/* One warp: lanes 0 to 3 have a unit each. */
static __device__ __forceinline__ void us_attention_set_units(const struct us_engine_block *b,
                                                              struct us_attention_shared *sh,
                                                              const struct us_attention_row *row) {
  uint32_t lane = threadIdx.x % 32, count = row->count;
  struct us_attention_leaf leaf;
  leaf.id = lane < US_ATTENTION_UNITS ? us_attention_leaf_id(sh, row, lane) : US_ENGINE_NONE;
  leaf.page = us_attention_page(b, sh, row, leaf.id);
  bool block = leaf.id == US_ATTENTION_BLOCK;
  uint32_t end = block ? row->fresh + count : row->end;
  leaf.base = block ? row->fresh : leaf.id * 64;
  leaf.begin = row->begin > leaf.base ? row->begin - leaf.base : 0;
  leaf.end = end - leaf.base < 64 ? end - leaf.base : 64;
  bool fresh = leaf.id != US_ENGINE_NONE && leaf.base + leaf.end > row->fresh;
  uint32_t any = __ballot_sync(0xffffffffu, fresh);
  if (lane < US_ATTENTION_UNITS) sh->leaf[lane] = leaf;
  if (lane == 0) sh->job.leaf = US_ENGINE_NONE, sh->job.new_keys = any ? count : 0;
}

/* Of a shared job's leaves, in order: its queries lie in the ring. */
static __device__ __forceinline__ uint64_t *us_attention_pages(struct us_attention_shared *sh) {
  return (uint64_t *)sh->q;
}

/* One warp: the leaves of a job that rows share, of which `row` is the first. */
static __device__ __forceinline__ void us_attention_set_shared(const struct us_engine_block *b,
                                                               struct us_attention_shared *sh,
                                                               const struct us_attention_row *row,
                                                               uint32_t k) {
  const struct us_attention_row *last = row + row->together - 1;
  uint32_t piece = row->first_piece + k * sh->span, piece_end = piece + sh->span;
  if (piece_end > last->last_piece + 1) piece_end = last->last_piece + 1;
  uint32_t leaf = piece * US_ATTENTION_SEGMENT, end = piece_end * US_ATTENTION_SEGMENT;
  leaf = leaf < row->first ? row->first : leaf;
  end = end > last->first + last->leaves ? last->first + last->leaves : end;
  bool block = sh->a.draft && k + 1 == row->chunk_jobs;
  if (block) leaf = US_ATTENTION_BLOCK, end = leaf + 1;
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < end - leaf; i += 32)
    us_attention_pages(sh)[i] = (uint64_t)us_attention_page(b, sh, row, leaf + i);
  if (threadIdx.x % 32 == 0) {
    sh->job.piece = piece, sh->job.piece_end = piece_end, sh->job.leaf = leaf, sh->job.leaf_end = end;
    sh->job.new_keys = block || end * 64 > last->fresh ? last->count : 0;
  }
}

/* One warp: the segments of a job of a row alone. Returns false if it is the drafter's own block. */
static __device__ __forceinline__ bool us_attention_set_long(struct us_attention_shared *sh,
                                                             const struct us_attention_row *row, uint32_t k) {
  uint32_t pieces = row->pieces - sh->a.draft, piece = k * sh->span, piece_end = piece + sh->span;
  bool block = piece >= pieces;
  piece = block ? pieces : piece, piece_end = block ? pieces + 1 : piece_end < pieces ? piece_end : pieces;
  uint32_t leaf = us_attention_piece_leaf(sh, row, piece), end = row->first + row->leaves;
  if (threadIdx.x % 32 < US_ATTENTION_UNITS) sh->turn[threadIdx.x % 32] = 0;
  if (threadIdx.x % 32 == 0) {
    sh->job.piece = piece, sh->job.piece_end = piece_end, sh->job.leaf = leaf;
    if (!block) {
      uint32_t most = leaf + (piece_end - piece) * US_ATTENTION_SEGMENT;
      sh->job.leaf_end = most = most < end ? most : end;
      sh->job.new_keys = most * 64 > row->fresh ? row->count : 0;
    }
  }
  __syncwarp();
  return !block;
}

/* The row that job j is of; whole warps. */
static __device__ __forceinline__ uint32_t us_attention_row_of(const struct us_attention_shared *sh,
                                                               uint32_t j) {
  uint32_t lane = threadIdx.x % 32;
  bool begun = lane < US_ENGINE_ROWS && sh->row[lane % US_ENGINE_ROWS].first_job <= j;
  return __popc(__ballot_sync(0xffffffffu, begun)) - 1;
}
/* One warp: job j. Out of line: who plans and who comes to a further job go through the same code. `ahead`: not yet, if rows share it. */
static __device__ __noinline__ void us_attention_set_job(uint32_t j, bool ahead) {
  const struct us_engine_block *b = us_engine_self();
  struct us_attention_shared *sh = us_attention_shared_of();
  uint32_t r = us_attention_row_of(sh, j);
  const struct us_attention_row *row = sh->row + r;
  uint32_t of_row = j - row->first_job, chunks = sh->chunks, k = us_engine_quotient(of_row, chunks),
           together = row->together;
  if (threadIdx.x % 32 == 0) {
    us_attention_set_chunk(sh, r, of_row - k * chunks);
    sh->job.piece = k, sh->job.piece_end = k + 1, sh->job.rows = together;
  }
  __syncwarp();
  if (together > 1) {
    if (!ahead) us_attention_set_shared(b, sh, row, k);
  } else if (row->cut != US_ATTENTION_SEGMENTS || !us_attention_set_long(sh, row, k))
    us_attention_set_units(b, sh, row);
}

/* Position of the first new value in shared memory: pieces of 8 line up with the slots of a page, or of a block. */
static __device__ __forceinline__ uint32_t us_attention_origin(const struct us_attention_shared *sh,
                                                               const struct us_attention_row *row) {
  return sh->a.draft ? row->fresh : row->fresh / 8 * 8;
}

#endif
