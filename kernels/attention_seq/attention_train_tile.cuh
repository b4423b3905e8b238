/* attention_train_tile.cuh: how attention for training cuts its rows, and how tiles come into shared memory and leave it.
 *
 * A tile of 64 rows holds consecutive queries times `pack` query heads of one KV head: row r is query r / pack of the tile's unit,
 * head r % pack. Heads that share keys so share the loads of them, and few queries a tile keep the ranges of its keys narrow: a
 * window of 128 keys costs 64 / 4 + 127 = 143 key columns a row instead of 191. pack is the largest divisor of H / G that is at
 * most 16; where 64 is no multiple of it, the last rows stay empty.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_TILE_CUH
#define US_KERNELS_ATTENTION_TRAIN_TILE_CUH

#include "kernels/attention_seq/attention_train.h"
#include "kernels/attention_seq/attention_train_wgmma.cuh"
#include "kernels/gpu/async.cuh"

#define US_UNIT_ROWS 64
#define US_KEY_TILE  64 /* keys of a plan's key tile */
#define US_SHORT_WINDOW                                                                                      \
  256 /* windows whose units have so few tiles that blocks had better be small and many */
#define US_TRAIN_LOG2E 1.4426950408889634f
#define US_TRAIN_LN2   0.6931471805599453f

struct us_attention_cut {
  uint32_t pack;  /* heads a unit */
  uint32_t parts; /* of a KV head's query heads */
  uint32_t span;  /* queries a unit: 64 / pack */
  uint32_t magic; /* r / pack == r * magic >> 16 for r < 256 */
  uint32_t units, key_tiles;
};

/* What the queries of a unit see: the union of their ranges (begin, end), and the intersection (all). */
struct us_attention_unit {
  uint32_t context_begin, context_end, block_begin, block_end;
  uint32_t all_context_begin, all_context_end, all_block_begin, all_block_end;
};

struct us_attention_plan {
  struct us_attention_unit *unit; /* (units) */
  uint2 *seen_by;                 /* (key_tiles): units [x, y) that may see a tile */
};

static inline struct us_attention_cut us_attention_cut_of(uint32_t queries, uint32_t keys, uint32_t q_heads,
                                                          uint32_t kv_heads) {
  struct us_attention_cut c;
  uint32_t group = q_heads / kv_heads;
  c.pack = group < 16 ? group : 16;
  while (group % c.pack) c.pack--;
  c.parts = group / c.pack;
  c.span = US_UNIT_ROWS / c.pack;
  c.magic = 65536 / c.pack + 1;
  c.units = (queries + c.span - 1) / c.span;
  c.key_tiles = (keys + US_KEY_TILE - 1) / US_KEY_TILE;
  return c;
}

static inline struct us_attention_plan us_attention_plan_of(void *plan, const struct us_attention_cut *cut) {
  struct us_attention_plan p;
  p.unit = (struct us_attention_unit *)plan;
  p.seen_by = (uint2 *)(p.unit + cut->units);
  return p;
}

/* What every kernel gets. */
struct us_attention_job {
  struct us_attention_train a;
  struct us_attention_train_grads grads;
  struct us_attention_cut cut;
  struct us_attention_plan plan;
};

/* ---- loading ----------------------------------------------------------------------------------------------------- */

/* 16 bytes, or zeros. */
static __device__ __forceinline__ void us_copy_16(uint32_t to, const void *from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
static __device__ __forceinline__ void us_copy_8(uint32_t to, const void *from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(exists ? 8 : 0)
               : "memory");
}
static __device__ __forceinline__ void us_copy_4(uint32_t to, const void *from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(exists ? 4 : 0)
               : "memory");
}
static __device__ __forceinline__ void us_copy_commit(void) {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/* This thread's copies but for the last N groups have arrived and, after the next barrier of the block, the tensor cores of all
 * warps see them. */
template <int N> static __device__ __forceinline__ void us_copy_wait(void) {
  asm volatile("cp.async.wait_group %0;\n\tfence.proxy.async.shared::cta;" ::"n"(N) : "memory");
}

/* Byte of a 16-byte chunk in a tile of `count` rows. */
static __device__ __forceinline__ uint32_t us_chunk_at(uint32_t count, uint32_t row, uint32_t chunk) {
  return chunk / 8 * count * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
}

/* Start copying, as one of THREADS, key (or value) rows [first, first + COUNT) of one head, zeros from `end` on and past column `dim`. */
template <int C, int COUNT, int THREADS>
static __device__ __forceinline__ void us_load_keys(uint32_t tile, const uint16_t *head, size_t stride,
                                                    uint32_t dim, uint32_t first, uint32_t end,
                                                    uint32_t thread) {
  constexpr int CHUNKS = C / 8, UNROLL = C > 128 ? 4 : 16; /* a copying group has 40 registers a thread */
#pragma unroll UNROLL
  for (int j = 0; j < (COUNT * CHUNKS + THREADS - 1) / THREADS; j++) {
    uint32_t i = thread + j * THREADS, row = i / CHUNKS, chunk = i % CHUNKS;
    if (COUNT * CHUNKS % THREADS && i >= COUNT * CHUNKS) break;
    bool exists = first + row < end && chunk * 8 < dim;
    us_copy_16(tile + us_chunk_at(COUNT, row, chunk),
               exists ? head + (first + row) * stride + chunk * 8 : head, exists);
  }
}

/* Start copying COUNT rows from row `first` of a unit on; offset: in shared memory, where each of the unit's heads starts. */
template <int C, int COUNT, int THREADS>
static __device__ __forceinline__ void us_load_rows(uint32_t tile, const uint16_t *rows, size_t stride,
                                                    uint32_t dim, const uint32_t *offset,
                                                    const struct us_attention_job &job, uint32_t unit,
                                                    uint32_t first, uint32_t thread) {
  constexpr int CHUNKS = C / 8, UNROLL = C > 128 ? 4 : 16; /* a copying group has 40 registers a thread */
#pragma unroll UNROLL
  for (int j = 0; j < (COUNT * CHUNKS + THREADS - 1) / THREADS; j++) {
    uint32_t i = thread + j * THREADS, row = i / CHUNKS, chunk = i % CHUNKS;
    if (COUNT * CHUNKS % THREADS && i >= COUNT * CHUNKS) break;
    uint32_t r = first + row, q = r * job.cut.magic >> 16, query = unit * job.cut.span + q;
    bool exists = q < job.cut.span && query < job.a.queries && chunk * 8 < dim;
    us_copy_16(tile + us_chunk_at(COUNT, row, chunk),
               exists ? rows + query * stride + offset[r - q * job.cut.pack] + chunk * 8 : rows, exists);
  }
}

/* ---- a thread's rows --------------------------------------------------------------------------------------------- */

/* Row r of a unit. */
struct us_attention_row {
  uint32_t query, head; /* head among the model's */
  bool exists;
};
static __device__ __forceinline__ struct us_attention_row us_attention_row_of(
    const struct us_attention_job &job, uint32_t unit, uint32_t first_head, uint32_t r) {
  struct us_attention_row row;
  uint32_t q = r * job.cut.magic >> 16;
  row.query = unit * job.cut.span + q, row.head = first_head + r - q * job.cut.pack;
  row.exists = q < job.cut.span && row.query < job.a.queries;
  return row;
}

/* Where a thread of a kernel that goes by units is. */
struct us_attention_here {
  uint32_t shared;            /* address of the dynamic shared memory */
  uint32_t lane, warp, group; /* warp of the group's four, group of the block */
  uint32_t first_unit,
      unit; /* of the block, the group's: the last units first, in packed sequences the longest */
  uint32_t g, first_head; /* KV head; first query head */
  const uint32_t
      *offset; /* in shared memory, (16): where the heads start in a row of q; (16): of out and dout */
  struct us_attention_row row[2];
};

/* A barrier of the block must follow before `offset` is read. */
template <int GROUPS>
static __device__ __forceinline__ struct us_attention_here us_attention_here_of(
    const struct us_attention_job &job, uint8_t *memory, uint32_t offsets) {
  struct us_attention_here h;
  uint32_t *offset = (uint32_t *)(memory + offsets);
  h.shared = us_shared_address(memory), h.lane = threadIdx.x % 32, h.warp = threadIdx.x / 32 % 4;
  h.group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); /* the compiler sees that a warp agrees */
  h.first_unit = (gridDim.x - 1 - blockIdx.x) * GROUPS, h.unit = h.first_unit + h.group;
  h.g = blockIdx.y / job.cut.parts, h.first_head = blockIdx.y * job.cut.pack, h.offset = offset;
  if (threadIdx.x < job.cut.pack) {
    offset[threadIdx.x] = job.a.q_offset[h.first_head + threadIdx.x];
    offset[16 + threadIdx.x] = (h.first_head + threadIdx.x) * job.a.v_dim;
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
    h.row[i] = us_attention_row_of(job, h.unit, h.first_head, h.warp * 16 + h.lane / 4 + 8 * i);
  return h;
}

/* The keys of one kind (0: context, 1: block) that a thread's two rows see. */
struct us_attention_seen {
  uint32_t begin[2], end[2];
};
static __device__ __forceinline__ struct us_attention_seen us_attention_seen_of(
    const struct us_attention_job &job, const struct us_attention_row row[2], int kind) {
  struct us_attention_seen s;
  const uint32_t *begin = kind ? job.a.block_begin : job.a.context_begin,
                 *end = kind ? job.a.block_end : job.a.context_end;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.begin[i] = row[i].exists ? begin[row[i].query] : 0;
    s.end[i] = row[i].exists ? end[row[i].query] : 0;
  }
  return s;
}

/* Scores or weights (64, KEYS) of keys that a row must not see become `hidden`. */
template <int KEYS>
static __device__ __forceinline__ void us_mask_keys(float (*s)[4], const struct us_attention_seen &seen,
                                                    uint32_t first, uint32_t lane, float hidden) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t before = seen.begin[i] - first - lane % 4 * 2, count = seen.end[i] - seen.begin[i];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int c = 0; c < 2; c++)
        if (n * 8 + c - before >= count) s[n][2 * i + c] = hidden;
  }
}

/* ---- a block's key tiles ----------------------------------------------------------------------------------------- */

/* The tiles that a block of queries goes through: the union of its context ranges, then that of its block ranges. A unit that sees
 * nothing of a kind has begin = end = 0 there. */
struct us_attention_walk {
  uint32_t begin[2], end[2];
  uint32_t context_tiles, tiles;
};
template <int KEYS, int GROUPS>
static __device__ __forceinline__ struct us_attention_walk us_attention_walk_of(
    const struct us_attention_job &job, uint32_t first_unit) {
  struct us_attention_walk w = {{UINT32_MAX, UINT32_MAX}, {0, 0}, 0, 0};
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    if (first_unit + g >= job.cut.units) break;
    uint4 u = *(const uint4 *)&job.plan.unit[first_unit + g];
    if (u.x < u.y) w.begin[0] = min(w.begin[0], u.x), w.end[0] = max(w.end[0], u.y);
    if (u.z < u.w) w.begin[1] = min(w.begin[1], u.z), w.end[1] = max(w.end[1], u.w);
  }
  w.context_tiles = w.end[0] ? (w.end[0] - w.begin[0] + KEYS - 1) / KEYS : 0;
  w.tiles = w.context_tiles + (w.end[1] ? (w.end[1] - w.begin[1] + KEYS - 1) / KEYS : 0);
  return w;
}
struct us_attention_tile {
  uint32_t first, end; /* keys; end: of the whole union */
};
template <int KEYS>
static __device__ __forceinline__ struct us_attention_tile us_attention_tile_of(
    const struct us_attention_walk &w, uint32_t t) {
  bool block = t >= w.context_tiles;
  struct us_attention_tile tile;
  tile.first = block ? w.begin[1] + (t - w.context_tiles) * KEYS : w.begin[0] + t * KEYS;
  tile.end = block ? w.end[1] : w.end[0];
  return tile;
}

/* Whether every query of the unit sees the whole tile, kind 0 by its context, 1 by its block. */
template <int KEYS>
static __device__ __forceinline__ bool us_all_see(const struct us_attention_unit &unit, uint32_t first,
                                                  int kind) {
  return (kind ? unit.all_block_begin : unit.all_context_begin) <= first &&
         first + KEYS <= (kind ? unit.all_block_end : unit.all_context_end);
}

/* ---- storing ----------------------------------------------------------------------------------------------------- */

/* Accumulators (64, C), times a factor a row, as bf16 into a tile of 64 rows. warp: of the four. */
template <int C>
static __device__ __forceinline__ void us_stage_rows(uint32_t tile, const float (*d)[4],
                                                     const float factor[2], uint32_t warp, uint32_t lane) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int n = 0; n < C / 8; n++) {
      uint32_t word = us_wg_pack(d[n][2 * i] * factor[i], d[n][2 * i + 1] * factor[i]);
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(tile + us_chunk_at(64, warp * 16 + lane / 4 + 8 * i, n) +
                                                   lane % 4 * 4),
                   "r"(word)
                   : "memory");
    }
}

/* The chunk of a staged tile. */
static __device__ __forceinline__ uint4 us_staged(uint32_t tile, uint32_t row, uint32_t chunk) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(tile + us_chunk_at(64, row, chunk)));
  return v;
}

/* A warp stores its 16 rows of a staged tile of a unit: the inverse of us_load_rows. */
template <int C>
static __device__ __forceinline__ void us_store_rows(uint32_t tile, uint16_t *rows, size_t stride,
                                                     uint32_t dim, const uint32_t *offset,
                                                     const struct us_attention_job &job, uint32_t unit,
                                                     uint32_t warp, uint32_t lane) {
  constexpr int CHUNKS = C / 8;
#pragma unroll 4
  for (int j = 0; j < 16 * CHUNKS / 32; j++) {
    uint32_t i = lane + j * 32, r = warp * 16 + i / CHUNKS, chunk = i % CHUNKS, q = r * job.cut.magic >> 16,
             query = unit * job.cut.span + q;
    uint4 v = us_staged(tile, r, chunk);
    if (q < job.cut.span && query < job.a.queries && chunk * 8 < dim)
      *(uint4 *)(rows + query * stride + offset[r - q * job.cut.pack] + chunk * 8) = v;
  }
}

/* The four warps of a group. */
static __device__ __forceinline__ void us_group_barrier(uint32_t group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

static __device__ __forceinline__ float us_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif
