/* reduce.cuh: residual += the ranks' partial sums, norm, operand; and the embedding that begins a pass.
 *
 * Bound: latency, two hand-offs. A block owns slices of 48 (or 32) columns of all 8 rows. Partial sums carry their own flag: a
 * word that is US_ENGINE_ABSENT has not arrived; who reads one puts the mark back, for the exchange `slots` later. All ranks
 * add the same numbers in the same order, their own among them. The sum of squares of a row is the sum of the slices' in
 * ascending order, each slice's a fixed tree: the same bits for any number of blocks.
 *
 * Formula: rmsnorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, rounded once to bf16.
 *
 * Contents: sums of all ranks; residual; operand and norm; the operation.
 */
#ifndef US_KERNELS_ENGINE_REDUCE_CUH
#define US_KERNELS_ENGINE_REDUCE_CUH

#include "kernels/engine/gemm.cuh"
#include <cuda_bf16.h>

/* ---- sums of all ranks -------------------------------------------------------------------------------------------- */

/* A thread's four values: columns r, r + 8 of a tile of 16, tokens 2t, 2t + 1. */
struct us_reduce_place {
  uint32_t column, token; /* of the first value */
};
static __device__ __forceinline__ struct us_reduce_place us_reduce_place(uint32_t tile, uint32_t lane) {
  struct us_reduce_place at = {tile * 16 + lane / 4, lane % 4 * 2};
  return at;
}

static __device__ __forceinline__ bool us_reduce_absent(uint4 v) {
  return v.x == US_ENGINE_ABSENT || v.y == US_ENGINE_ABSENT || v.z == US_ENGINE_ABSENT ||
         v.w == US_ENGINE_ABSENT;
}

#define US_REDUCE_AHEAD 4 /* addends, and words of the norm, whose loads are under way together */

/* Sum of the addends of one fragment place, in rank order; waits for each and clears it. Short, for it runs once: what is not there counts
 * as -0, which changes no sum. */
static __device__ __forceinline__ float4 us_reduce_sum(const struct us_engine_block *b,
                                                       const struct us_engine_reduce *r, uint32_t running,
                                                       uint32_t tile, uint32_t lane) {
  const struct us_engine_rank *rank = us_engine_rank_of(b);
  uint32_t one = 8 * rank->D, addends = r->addends;
  float *from = rank->exchange[rank->rank] + (size_t)((running & (rank->slots - 1)) * rank->addends) * one +
                tile * 128 + lane * 4;
  float4 sum = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
  uint64_t begin = us_engine_span_begin(b);
#pragma unroll 1
  for (uint32_t first = 0; first < addends; first += US_REDUCE_AHEAD, from += US_REDUCE_AHEAD * one) {
    uint4 v[US_REDUCE_AHEAD];
    struct us_engine_watch watch = {0, 0};
    for (bool absent = true; absent;) { /* one loop for all: the watchdog's code is long */
      absent = false;
#pragma unroll
      for (int i = 0; i < US_REDUCE_AHEAD; i++)
        v[i] = us_load_system16(from + (first + i < addends ? i * one : 0));
#pragma unroll
      for (int i = 0; i < US_REDUCE_AHEAD; i++) absent |= us_reduce_absent(v[i]);
      absent = __any_sync(0xffffffffu, absent); /* or the lanes would part here, and go on one by one */
      if (absent) us_engine_watch_try(b, &watch, US_ENGINE_WAIT_EXCHANGE, first, v[0].x, 0);
    }
#pragma unroll
    for (int i = 0; i < US_REDUCE_AHEAD; i++) {
      bool there = first + i < addends;
      if (there)
        *(uint4 *)(from + i * one) =
            make_uint4(US_ENGINE_ABSENT, US_ENGINE_ABSENT, US_ENGINE_ABSENT, US_ENGINE_ABSENT);
      sum.x = __fadd_rn(sum.x, there ? __uint_as_float(v[i].x) : -0.0f);
      sum.y = __fadd_rn(sum.y, there ? __uint_as_float(v[i].y) : -0.0f);
      sum.z = __fadd_rn(sum.z, there ? __uint_as_float(v[i].z) : -0.0f);
      sum.w = __fadd_rn(sum.w, there ? __uint_as_float(v[i].w) : -0.0f);
    }
  }
  us_engine_span_end(b, US_ENGINE_WAIT_EXCHANGE, begin);
  return sum;
}

/* ---- residual ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ const struct us_engine_row *us_engine_rows(const struct us_engine_block *b,
                                                                             const struct us_engine_op *op) {
  const struct us_engine_state *state = b->rank->state;
  const struct us_engine_row *rows = op->program == US_ENGINE_PASS_TARGET  ? state->target
                                     : op->program == US_ENGINE_PASS_DRAFT ? state->draft
                                                                           : state->context;
  return rows + op->row_tile * US_ENGINE_ROWS;
}

/* Embedding of a row's token at a column; 0 for a row that does not exist. */
static __device__ __forceinline__ float us_engine_embedding(const struct us_engine_block *b,
                                                            const struct us_engine_row *row,
                                                            uint32_t column) {
  const struct us_engine_rank *rank = b->rank;
  if (__ldcg(&row->sequence) == US_ENGINE_NONE) return 0.0f;
  int32_t token = __ldcg(&row->token);
  if (token == US_ENGINE_MASK) return rank->mask_embedding[column];
  uint32_t owner = (uint32_t)token / rank->embed_rows, index = (uint32_t)token % rank->embed_rows;
  return us_bf16_to_f32(rank->embed[owner][(size_t)index * rank->D + column]);
}

/* Four values of a place, in FP32 rows of D. */
static __device__ __forceinline__ float4 us_reduce_read(const float *x, uint32_t D,
                                                        struct us_reduce_place at) {
  const float *x0 = x + (size_t)at.token * D + at.column, *x1 = x0 + D;
  return make_float4(x0[0], x1[0], x0[8], x1[8]);
}

/* A place of the rows' embeddings. Out of line: once a pass. */
namespace us_rare {
static __device__ __noinline__ float4 us_reduce_embed(const struct us_engine_block *b,
                                                      const struct us_engine_op *op, uint32_t tile,
                                                      uint32_t lane) {
  const struct us_engine_row *rows = us_engine_rows(b, op);
  struct us_reduce_place at = us_reduce_place(tile, lane);
  float4 x;
  x.x = us_engine_embedding(b, rows + at.token, at.column),
  x.y = us_engine_embedding(b, rows + at.token + 1, at.column);
  x.z = us_engine_embedding(b, rows + at.token, at.column + 8);
  x.w = us_engine_embedding(b, rows + at.token + 1, at.column + 8);
  return x;
}
} // namespace us_rare
using us_rare::us_reduce_embed;

/* A place's sum, with `before` but for a reduction that replaces the residual. */
static __device__ __forceinline__ float4 us_reduce_added(const struct us_engine_block *b,
                                                         const struct us_engine_reduce *r, uint32_t running,
                                                         uint32_t tile, uint32_t lane, float4 before) {
  bool replace = r->replace;
  float4 x = us_reduce_sum(b, r, running, tile, lane);
  if (replace) return x;
  return make_float4(__fadd_rn(before.x, x.x), __fadd_rn(before.y, x.y), __fadd_rn(before.z, x.z),
                     __fadd_rn(before.w, x.w));
}
static __device__ __forceinline__ void us_reduce_write(const struct us_engine_reduce *r,
                                                       struct us_reduce_place at, float4 x) {
  float *x0 = r->residual + (size_t)at.token * r->D + at.column, *x1 = x0 + r->D;
  x0[0] = x.x, x1[0] = x.y, x0[8] = x.z, x1[8] = x.w;
}

/* The new residual of one place; written back. `before`: what it was. */
static __device__ __forceinline__ float4 us_reduce_residual(const struct us_engine_block *b,
                                                            const struct us_engine_op *op, uint32_t running,
                                                            uint32_t tile, uint32_t lane, float4 before) {
  float4 x;
  if (op->kind == US_ENGINE_EMBED)
    x = us_reduce_embed(b, op, tile, lane);
  else
    x = us_reduce_added(b, &op->reduce, running, tile, lane, before);
  us_reduce_write(&op->reduce, us_reduce_place(tile, lane), x);
  return x;
}

/* ---- operand and norm --------------------------------------------------------------------------------------------- */

/* Two values rounded to bf16, times the operand's power of two: the first in the low half. */
static __device__ __forceinline__ uint32_t us_reduce_bits(float x, float y) {
  __nv_bfloat162 v = __hmul2_rn(__floats2bfloat162_rn(x, y), __float2bfloat162_rn(US_ENGINE_OPERAND_UNIT));
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

/* Four values into an operand. A tile's column r and r + 8 are neighbouring words; columns r and r + 1, which lanes 4 apart hold, share a
 * word: of a pair of such lanes the first stores both words of token 2t, the other of token 2t + 1. Whole warps. */
static __device__ __forceinline__ void us_reduce_operand(void *operand, struct us_reduce_place at, float4 v) {
  uint32_t odd = at.column & 1, even_token = us_reduce_bits(v.x, v.z), odd_token = us_reduce_bits(v.y, v.w);
  uint32_t mine = odd ? odd_token : even_token;
  uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? even_token : odd_token, 4);
  uint32_t left = odd ? other : mine, right = odd ? mine : other;
  uint2 words = make_uint2(__byte_perm(left, right, 0x5410), __byte_perm(left, right, 0x7632));
  *(uint2 *)((uint8_t *)operand + us_engine_operand_offset(at.token + odd, at.column - odd)) = words;
}

/* Sums of squares of a tile of 16 columns for the 8 tokens, from a warp to shared memory. */
static __device__ __forceinline__ void us_reduce_squares(float4 x, uint32_t lane, float *out) {
  float even = x.x * x.x + x.z * x.z, odd = x.y * x.y + x.w * x.w;
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
    even += __shfl_xor_sync(0xffffffffu, even, step), odd += __shfl_xor_sync(0xffffffffu, odd, step);
  if (lane < 4) out[lane * 2] = even, out[lane * 2 + 1] = odd;
}

/* Where the words of the 8 rows of an operation's row tile are: of every second reduction of the row tile. */
static __device__ __forceinline__ uint64_t *us_reduce_words(const struct us_engine_block *b,
                                                            const struct us_engine_op *op, uint32_t running,
                                                            uint32_t row_tile, uint32_t slices) {
  const struct us_engine_rank *rank = us_engine_rank_of(b);
  uint32_t tiles = rank->norm_tiles, at = running % 2;
  if (US_ENGINE_SEVERAL && tiles > 1) at = running / tiles % 2 * tiles + op->row_tile + row_tile;
  return rank->norm + (size_t)at * US_ENGINE_ROWS * slices;
}

/* Publish a slice's sums of squares: 8 rows, each with the running index as its flag. */
static __device__ __forceinline__ void us_reduce_publish(const struct us_engine_block *b,
                                                         const struct us_engine_op *op, uint32_t slices,
                                                         uint32_t slice, uint32_t running,
                                                         const float (*squares)[US_ENGINE_ROWS],
                                                         uint32_t tiles) {
  uint32_t token = threadIdx.x;
  float sum = squares[0][token];
#pragma unroll 1
  for (uint32_t t = 1; t < tiles; t++) sum += squares[t][token];
  uint64_t *to = us_reduce_words(b, op, running, 0, slices) + token * slices + slice;
  us_store_flagged(to, (uint64_t)(running + 1) << 32 | __float_as_uint(sum));
}

/* Warp `token`: 1 / sqrt(mean + eps) of its row, from all blocks' slices. */
static __device__ __forceinline__ float us_reduce_scale(const struct us_engine_block *b,
                                                        const struct us_engine_op *op, uint32_t slices,
                                                        uint32_t token, uint32_t running, uint32_t lane) {
  const struct us_engine_reduce *r = &op->reduce;
  const uint64_t *from = us_reduce_words(b, op, running, 0, slices) + token * slices + lane;
  uint64_t none = (uint64_t)(running + 1) << 32; /* no slice: a sum of 0, which changes none */
  float sum = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < slices; first += US_REDUCE_AHEAD * 32, from += US_REDUCE_AHEAD * 32) {
    uint64_t word[US_REDUCE_AHEAD];
    struct us_engine_watch watch = {0, 0};
    for (bool late = true; late;) {
      late = false;
#pragma unroll
      for (int i = 0; i < US_REDUCE_AHEAD; i++)
        word[i] = first + i * 32 + lane < slices ? us_load_flagged(from + i * 32) : none;
#pragma unroll
      for (int i = 0; i < US_REDUCE_AHEAD; i++) late |= (uint32_t)(word[i] >> 32) != running + 1;
      late = __any_sync(0xffffffffu, late); /* the lanes stay together */
      if (late) us_engine_watch_try(b, &watch, US_ENGINE_WAIT_NORM, first, word[0] >> 32, running + 1);
    }
#pragma unroll
    for (int i = 0; i < US_REDUCE_AHEAD; i++) sum += __uint_as_float((uint32_t)word[i]);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return 1.0f / sqrtf(sum / (float)r->D + r->eps);
}

/* The second half: a place's values scaled, weighted and rounded into the operand. */
static __device__ __forceinline__ float4 us_reduce_normed(const float *scale, uint32_t token, float4 x,
                                                          float2 w) {
  float s0 = scale[token], s1 = scale[token + 1];
  return make_float4(x.x * s0 * w.x, x.y * s1 * w.x, x.z * s0 * w.y, x.w * s1 * w.y);
}
static __device__ __forceinline__ void us_reduce_norm(const struct us_engine_reduce *r, const float *scale,
                                                      uint32_t tile, uint32_t lane, float4 x, float2 w) {
  struct us_reduce_place at = us_reduce_place(tile, lane);
  float4 y = us_reduce_normed(scale, at.token, x, w);
  us_reduce_operand(r->operand, at, y);
  if (!r->opt_plain) return;
  float *p0 = r->opt_plain + (size_t)at.token * r->D + at.column, *p1 = p0 + r->D;
  p0[0] = us_bf16_round(y.x), p1[0] = us_bf16_round(y.y), p0[8] = us_bf16_round(y.z),
  p1[8] = us_bf16_round(y.w);
}
static __device__ __forceinline__ float2 us_reduce_weights(const struct us_engine_reduce *r, uint32_t tile,
                                                           uint32_t lane) {
  if (!r->weight) return make_float2(0, 0);
  const float *w = r->weight + us_reduce_place(tile, lane).column;
  return make_float2(w[0], w[8]);
}

/* Running number of a reduction, and how a row is cut. */
struct us_reduce_cut {
  uint32_t running, slices, tiles; /* tiles of 16 columns a slice */
};
static __device__ __forceinline__ struct us_reduce_cut us_reduce_cut_of(const struct us_engine_block *b,
                                                                        const struct us_engine_reduce *r) {
  const struct us_engine_launch *launch = us_engine_launch_of(b);
  struct us_reduce_cut cut;
  cut.running = launch->exchanges + b->round * launch->exchanges_a_round + r->exchange;
  bool wide = us_engine_slice(r->D) == 48; /* divisions by constants */
  cut.slices = wide ? r->D / 48 : r->D / 32, cut.tiles = wide ? 3 : 2;
  return cut;
}

/* Warps 0 to 7: the rows' factors into shared memory. */
static __device__ __forceinline__ void us_reduce_scales(const struct us_engine_block *b,
                                                        const struct us_engine_op *op,
                                                        struct us_reduce_cut cut, float *scale) {
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  us_engine_jitter(b);
  uint64_t begin = us_engine_span_begin(b);
  if (warp < US_ENGINE_ROWS) {
    float s = us_reduce_scale(b, op, cut.slices, warp, cut.running, lane);
    if (lane == 0) scale[warp] = s;
  }
  us_engine_span_end(b, US_ENGINE_WAIT_NORM, begin);
  us_engine_meet();
}

/* A block with a slice: its share of the words that become absent. Who has read them last has ended the reduction before this one. */
static __device__ __forceinline__ void us_reduce_mark(const struct us_engine_block *b,
                                                      const struct us_engine_reduce *r, uint32_t slices) {
  uint32_t blocks = min(b->blocks, slices);
  if (!r->opt_absent || b->index >= blocks) return;
#pragma unroll 1
  for (uint32_t i = b->index * US_ENGINE_COMPUTE + threadIdx.x; i < r->absent;
       i += blocks * US_ENGINE_COMPUTE)
    us_store_gpu4(r->opt_absent + i, US_ENGINE_ABSENT);
}

/* ---- the operation ------------------------------------------------------------------------------------------------ */

namespace us_rare {
static __device__ __noinline__ void us_engine_reduce(struct us_engine_block *b,
                                                     const struct us_engine_op *op) {
  const struct us_engine_reduce *r = &op->reduce;
  struct us_reduce_cut cut = us_reduce_cut_of(b, r);
  uint32_t slices = cut.slices, tiles = cut.tiles, running = cut.running;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float(*squares)[US_ENGINE_ROWS] = us_engine_shared_of(b)->row, *scale = us_engine_shared_of(b)->row[3];
  /* A place is always the same thread's, so what it was is known before the sums are. A block's first slice, in most launches
   * its only one, stays in registers until its norm is known. */
  uint32_t tile = b->index * tiles + warp;
  bool mine = b->index < slices && warp < tiles;
  float4 x = make_float4(0, 0, 0, 0), kept = x;
  float2 weights = make_float2(0, 0);
  if (mine)
    x = us_reduce_read(r->residual, r->D, us_reduce_place(tile, lane)),
    weights = us_reduce_weights(r, tile, lane);
  us_engine_wait_done(b, op->wait);
  us_reduce_mark(b, r, slices);
  for (uint32_t slice = b->index; slice < slices; slice += b->blocks) {
    if (warp < tiles) {
      tile = slice * tiles + warp;
      if (slice != b->index) x = us_reduce_read(r->residual, r->D, us_reduce_place(tile, lane));
      x = us_reduce_residual(b, op, running, tile, lane, x);
      if (slice == b->index) kept = x;
      if (r->opt_tap) us_reduce_operand(r->opt_tap, us_reduce_place(tile, lane), x);
      us_reduce_squares(x, lane, squares[warp]);
    }
    us_engine_meet();
    if (r->weight && threadIdx.x < US_ENGINE_ROWS)
      us_reduce_publish(b, op, slices, slice, running, squares, tiles);
    if (slice + b->blocks < slices) us_engine_meet(); /* the next slice's squares go to the same place */
  }
  if (r->weight && b->index < slices) { /* a block without a slice may be late, as above */
    us_reduce_scales(b, op, cut, scale);
    if (mine) us_reduce_norm(r, scale, b->index * tiles + warp, lane, kept, weights);
    for (uint32_t slice = b->index + b->blocks; slice < slices; slice += b->blocks)
      if (warp < tiles) {
        tile = slice * tiles + warp;
        x = us_reduce_read(r->residual, r->D, us_reduce_place(tile, lane));
        us_reduce_norm(r, scale, tile, lane, x, us_reduce_weights(r, tile, lane));
      }
  }
  us_engine_finish(b);
}
} // namespace us_rare
using us_rare::us_engine_reduce;

#endif
