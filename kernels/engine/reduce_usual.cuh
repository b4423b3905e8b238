/* reduce_usual.cuh: REDUCE as most are: a slice a block at most, a norm, nothing else wanted. It runs twice a layer, at the rate at which
 * its code is fetched, so a thread has one value where us_engine_reduce's have four: the same sums in the same order.
 *
 *     if (us_reduce_is_usual(b, op)) us_engine_reduce_usual();      // compute warps
 *
 * Four warps have a tile of 16 columns, warp w tokens 2w and 2w + 1; lane l column l % 16 of token 2w + l / 16.
 */
#ifndef US_KERNELS_ENGINE_REDUCE_USUAL_CUH
#define US_KERNELS_ENGINE_REDUCE_USUAL_CUH

#include "kernels/engine/reduce.cuh"

#define US_REDUCE_TILE_WARPS 4

static __device__ __forceinline__ bool us_reduce_is_usual(const struct us_engine_block *b,
                                                          const struct us_engine_op *op) {
  const struct us_engine_reduce *r = &op->reduce;
  return op->kind == US_ENGINE_REDUCE && r->weight && !r->opt_tap && !r->opt_plain &&
         us_reduce_cut_of(b, r).slices <= b->blocks;
}

static __device__ __forceinline__ uint32_t us_load_system4(const void *p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

/* Sum of a value's addends, in rank order; waits for each and clears it. What is not there counts as -0, which changes no sum. */
static __device__ __forceinline__ float us_reduce_value_sum(const struct us_engine_block *b, uint32_t addends,
                                                            uint32_t running, uint32_t token,
                                                            uint32_t column) {
  const struct us_engine_rank *rank = us_engine_rank_of(b);
  uint32_t one = 8 * rank->D;
  uint32_t *from = (uint32_t *)rank->exchange[rank->rank] +
                   (size_t)((running & (rank->slots - 1)) * rank->addends) * one +
                   us_engine_fragment_index(token, column);
  float sum = -0.0f;
  uint64_t begin = us_engine_span_begin(b);
#pragma unroll 1
  for (uint32_t left = addends; left; from += US_REDUCE_AHEAD * one) {
    uint32_t v[US_REDUCE_AHEAD];
    struct us_engine_watch watch = {0, 0};
    for (bool absent = true; absent;) {
      absent = false;
#pragma unroll
      for (int i = 0; i < US_REDUCE_AHEAD; i++) v[i] = us_load_system4(from + (i < left ? i * one : 0));
#pragma unroll
      for (int i = 0; i < US_REDUCE_AHEAD; i++) absent |= v[i] == US_ENGINE_ABSENT;
      absent = __any_sync(0xffffffffu, absent); /* or the lanes would part here, and go on one by one */
      if (absent) us_engine_watch_try(b, &watch, US_ENGINE_WAIT_EXCHANGE, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < US_REDUCE_AHEAD; i++) {
      if (i < left) from[i * one] = US_ENGINE_ABSENT;
      sum = __fadd_rn(sum, i < left ? __uint_as_float(v[i]) : -0.0f);
    }
    left -= min(left, US_REDUCE_AHEAD);
  }
  us_engine_span_end(b, US_ENGINE_WAIT_EXCHANGE, begin);
  return sum;
}

/* Sums of squares of a tile's 16 columns for the warp's two tokens, to shared memory: the tree of us_reduce_squares. */
static __device__ __forceinline__ void us_reduce_value_square(float x, uint32_t lane, float *out) {
  float sum = x * x;
  sum += __shfl_xor_sync(0xffffffffu, sum, 8);
#pragma unroll
  for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane % 16 == 0) *out = sum;
}

static __device__ __noinline__ void us_engine_reduce_usual(void) {
  const struct us_engine_block *b = us_engine_self();
  const struct us_engine_op *op = us_engine_fetched_op(b);
  const struct us_engine_reduce *r = &op->reduce;
  struct us_reduce_cut cut = us_reduce_cut_of(b, r);
  uint32_t lane = threadIdx.x % 32, tile = threadIdx.x / (32 * US_REDUCE_TILE_WARPS),
           token = threadIdx.x / 16 % US_ENGINE_ROWS, column = (b->index * cut.tiles + tile) * 16 + lane % 16;
  float(*squares)[US_ENGINE_ROWS] = us_engine_shared_of(b)->row, *scale = us_engine_shared_of(b)->row[3];
  bool has = b->index < cut.slices, mine = has && tile < cut.tiles;
  float *residual = r->residual + (token * r->D + column), x = 0, weight = 0;
  if (mine) x = *residual, weight = r->weight[column];
  if (op->wait != US_ENGINE_NONE) us_engine_wait_done(b, op->wait); /* sums are their own flags */
  us_reduce_mark(b, r, cut.slices);
  if (mine) {
    float sum = us_reduce_value_sum(b, r->addends, cut.running, token, column);
    x = r->replace ? sum : __fadd_rn(x, sum);
    *residual = x;
    us_reduce_value_square(x, lane, &squares[tile][token]);
  }
  us_engine_meet();
  if (has) { /* a block without a slice may be late: the words may be of another REDUCE by then */
    if (threadIdx.x < US_ENGINE_ROWS)
      us_reduce_publish(b, op, cut.slices, b->index, cut.running, squares, cut.tiles);
    us_reduce_scales(b, op, cut, scale);
    if (mine) {
      float y = x * scale[token] * weight;
      *(uint16_t *)((uint8_t *)r->operand + us_engine_operand_offset(token, column)) =
          (uint16_t)us_reduce_bits(y, y);
    }
  }
  us_engine_finish(b);
}

#endif
