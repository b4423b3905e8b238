/* reduce_wide.cuh: REDUCE and EMBED of several row tiles: their hand-offs side by side instead of one after the other.
 *
 *     us_engine_reduce_wide(b, op);        // compute warps
 *
 * Bound: latency. A row tile's reduction keeps three warps of sixteen busy for two ways to L2 and back; here a warp has one or two
 * pieces (16 columns of a row tile) of the block's slice, and norms four rows. Sums and norms are reduce.cuh's, in its order.
 */
#ifndef US_KERNELS_ENGINE_REDUCE_WIDE_CUH
#define US_KERNELS_ENGINE_REDUCE_WIDE_CUH

#include "kernels/engine/reduce.cuh"

#define US_WIDE_PIECES 2 /* of a warp: 3 tiles x 8 row tiles over 16 warps */
#define US_WIDE_NORMS  4 /* rows of a warp: 64 over 16 */

struct us_reduce_wide_work {
  float squares[3 * US_ENGINE_GATHERED][US_ENGINE_ROWS]; /* by piece */
  float scale[US_ENGINE_GATHERED][US_ENGINE_ROWS];
};
static_assert(sizeof(struct us_reduce_wide_work) <= US_ENGINE_SCRATCH, "sums of squares");
static_assert(3 * US_ENGINE_GATHERED <= US_WIDE_PIECES * US_ENGINE_COMPUTE_WARPS, "pieces");

static __device__ __forceinline__ struct us_reduce_wide_work *us_reduce_wide_work(
    const struct us_engine_block *b) {
  return (struct us_reduce_wide_work *)us_engine_shared_of(b)->scratch;
}

/* A row tile's part of the operation. */
static __device__ __forceinline__ struct us_engine_reduce us_reduce_of(const struct us_engine_reduce *r,
                                                                       uint32_t row_tile) {
  struct us_engine_reduce one = *r;
  one.residual += (size_t)row_tile * US_ENGINE_ROWS * r->D;
  one.operand = (uint8_t *)r->operand + row_tile * r->operand_tile;
  if (r->opt_tap) one.opt_tap = (uint8_t *)r->opt_tap + row_tile * r->tap_tile;
  if (r->opt_plain) one.opt_plain += (size_t)row_tile * US_ENGINE_ROWS * r->D;
  return one;
}

/* What this thread's places of a slice hold, and their columns' weights. */
struct us_reduce_wide_places {
  float4 x[US_WIDE_PIECES];
  float2 weight[US_WIDE_PIECES];
};
static __device__ __forceinline__ void us_reduce_wide_load(const struct us_engine_op *op, uint32_t slice,
                                                           uint32_t tiles, struct us_reduce_wide_places *p) {
  const struct us_engine_reduce *r = &op->reduce;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < US_WIDE_PIECES; k++) {
    uint32_t piece = warp + k * US_ENGINE_COMPUTE_WARPS, tile = slice * tiles + piece % tiles;
    p->x[k] = make_float4(0, 0, 0, 0), p->weight[k] = make_float2(0, 0);
    if (piece >= tiles * op->row_tiles) continue;
    p->x[k] = us_reduce_read(r->residual + (size_t)(piece / tiles) * US_ENGINE_ROWS * r->D, r->D,
                             us_reduce_place(tile, lane));
    p->weight[k] = us_reduce_weights(r, tile, lane);
  }
}

/* One slice of all row tiles: the new residuals, taps, and sums of squares to all blocks. */
static __device__ __forceinline__ void us_reduce_wide_slice(const struct us_engine_block *b,
                                                            const struct us_engine_op *op, uint32_t running,
                                                            uint32_t slice, uint32_t tiles, uint32_t slices,
                                                            struct us_reduce_wide_places *p) {
  const struct us_engine_reduce *r = &op->reduce;
  struct us_reduce_wide_work *work = us_reduce_wide_work(b);
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = tiles * op->row_tiles;
#pragma unroll
  for (int k = 0; k < US_WIDE_PIECES; k++) {
    uint32_t piece = warp + k * US_ENGINE_COMPUTE_WARPS, row_tile = piece / tiles;
    if (piece >= pieces) continue;
    struct us_engine_op one = *op;
    one.reduce = us_reduce_of(r, row_tile), one.row_tile += row_tile;
    uint32_t tile = slice * tiles + piece % tiles;
    struct us_reduce_place at = us_reduce_place(tile, lane);
    p->x[k] = us_reduce_residual(b, &one, running + row_tile, tile, lane, p->x[k]);
    if (r->opt_tap) us_reduce_operand(one.reduce.opt_tap, at, p->x[k]);
    us_reduce_squares(p->x[k], lane, work->squares[piece]);
  }
  us_engine_meet();
  uint32_t row = threadIdx.x, row_tile = row / US_ENGINE_ROWS, token = row % US_ENGINE_ROWS;
  if (r->weight && row < op->row_tiles * US_ENGINE_ROWS) {
    float sum = work->squares[row_tile * tiles][token];
    for (uint32_t t = 1; t < tiles; t++) sum += work->squares[row_tile * tiles + t][token];
    us_store_flagged(us_reduce_words(b, op, running + row_tile, row_tile, slices) + token * slices + slice,
                     (uint64_t)(running + row_tile + 1) << 32 | __float_as_uint(sum));
  }
  us_engine_meet();
}

/* A warp's rows: 1 / sqrt(mean + eps), from all blocks' slices; all rows' words under way together. */
static __device__ __forceinline__ void us_reduce_wide_scales(const struct us_engine_block *b,
                                                             const struct us_engine_op *op, uint32_t running,
                                                             uint32_t slices) {
  const struct us_engine_reduce *r = &op->reduce;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = op->row_tiles * US_ENGINE_ROWS;
  float sum[US_WIDE_NORMS] = {};
#pragma unroll 1
  for (uint32_t first = lane; first < slices; first += US_REDUCE_AHEAD * 32) {
    uint64_t word[US_WIDE_NORMS][US_REDUCE_AHEAD];
    struct us_engine_watch watch = {0, 0};
    for (bool late = true; late;) {
      late = false;
#pragma unroll
      for (int i = 0; i < US_WIDE_NORMS; i++) {
        uint32_t row = warp + i * US_ENGINE_COMPUTE_WARPS, of = (row < rows ? row : warp) / US_ENGINE_ROWS;
        const uint64_t *from =
            us_reduce_words(b, op, running + of, of, slices) + row % US_ENGINE_ROWS * slices + first;
#pragma unroll
        for (int j = 0; j < US_REDUCE_AHEAD; j++)
          word[i][j] = us_load_flagged(from + (first + j * 32 < slices ? j * 32 : 0));
      }
#pragma unroll
      for (int i = 0; i < US_WIDE_NORMS; i++) {
        uint32_t row = warp + i * US_ENGINE_COMPUTE_WARPS, of = (row < rows ? row : warp) / US_ENGINE_ROWS;
#pragma unroll
        for (int j = 0; j < US_REDUCE_AHEAD; j++) late |= (uint32_t)(word[i][j] >> 32) != running + of + 1;
      }
      if (late) us_engine_watch_try(b, &watch, US_ENGINE_WAIT_NORM, first, word[0][0] >> 32, running + 1);
    }
#pragma unroll
    for (int i = 0; i < US_WIDE_NORMS; i++)
#pragma unroll
      for (int j = 0; j < US_REDUCE_AHEAD; j++)
        if (first + j * 32 < slices) sum[i] += __uint_as_float((uint32_t)word[i][j]);
  }
#pragma unroll
  for (int i = 0; i < US_WIDE_NORMS; i++) {
    uint32_t row = warp + i * US_ENGINE_COMPUTE_WARPS;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
    if (lane == 0 && row < rows)
      us_reduce_wide_work(b)->scale[row / US_ENGINE_ROWS][row % US_ENGINE_ROWS] =
          1.0f / sqrtf(sum[i] / (float)r->D + r->eps);
  }
}

/* A slice's values normed. */
static __device__ __forceinline__ void us_reduce_wide_norm(const struct us_engine_block *b,
                                                           const struct us_engine_op *op, uint32_t slice,
                                                           uint32_t tiles,
                                                           const struct us_reduce_wide_places *p) {
  const struct us_engine_reduce *r = &op->reduce;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < US_WIDE_PIECES; k++) {
    uint32_t piece = warp + k * US_ENGINE_COMPUTE_WARPS, row_tile = piece / tiles;
    if (piece >= tiles * op->row_tiles) continue;
    struct us_engine_reduce one = us_reduce_of(r, row_tile);
    uint32_t tile = slice * tiles + piece % tiles;
    us_reduce_norm(&one, us_reduce_wide_work(b)->scale[row_tile], tile, lane, p->x[k], p->weight[k]);
  }
}

static __device__ __noinline__ void us_engine_reduce_wide(struct us_engine_block *b,
                                                          const struct us_engine_op *op) {
  const struct us_engine_reduce *r = &op->reduce;
  uint32_t width = us_engine_slice(r->D), slices = r->D / width, tiles = width / 16;
  uint32_t running = b->launch->exchanges + b->round * b->launch->exchanges_a_round + r->exchange;
  struct us_reduce_wide_places
      first = {},
      other; /* a block's first slice, in most launches its only one, stays in registers */
  if (b->index < slices) us_reduce_wide_load(op, b->index, tiles, &first);
  us_engine_wait_done(b, op->wait);
  if (b->index < slices) us_reduce_wide_slice(b, op, running, b->index, tiles, slices, &first);
#pragma unroll 1
  for (uint32_t slice = b->index + b->blocks; slice < slices; slice += b->blocks) {
    us_reduce_wide_load(op, slice, tiles, &other);
    us_reduce_wide_slice(b, op, running, slice, tiles, slices, &other);
  }
  if (r->weight && b->index < slices) {
    us_engine_jitter(b);
    uint64_t begin = us_engine_span_begin(b);
    us_reduce_wide_scales(b, op, running, slices);
    us_engine_span_end(b, US_ENGINE_WAIT_NORM, begin);
    us_engine_meet();
    us_reduce_wide_norm(b, op, b->index, tiles, &first);
#pragma unroll 1
    for (uint32_t slice = b->index + b->blocks; slice < slices; slice += b->blocks) {
      us_reduce_wide_load(op, slice, tiles, &other);
      us_reduce_wide_norm(b, op, slice, tiles, &other);
    }
  }
  us_engine_finish(b);
}

#endif
