/* grouped_tile.cuh: what a block of a grouped product works on, and where it puts the sums.
 *
 * An output tile is 128 rows x COLUMNS; a cluster of BLOCKS blocks takes as many tiles below each other, which share the
 * column operand. The tiles of all groups have running numbers; every warp finds its cluster's next one by walking the
 * groups' row counts in shared memory, so that nothing has to be listed beforehand.
 */
#ifndef US_KERNELS_GROUPED_TILE_CUH
#define US_KERNELS_GROUPED_TILE_CUH

#include "kernels/experts/experts_vector.cuh"
#include "kernels/experts/grouped_gemm.h"
#include "kernels/experts/grouped_wgmma.cuh"

#define TILE_ROWS   128
#define DEPTH       64 /* summed indices of a stage: a row of 128 bytes */
#define BAND        8  /* tiles below each other that run side by side, then the next column */
#define MOST_STAGES 8
#define RING_MEMORY (222 * 1024)

/* SWIGLU: forward; the left half of a tile are gates, the right half the ups of the same columns. */
enum grouped_kind { GROUPED_FORWARD, GROUPED_SWIGLU, GROUPED_GRAD_X, GROUPED_GRAD_W };

struct grouped_args {
  const uint32_t *start;
  uint32_t groups, rows;
  uint32_t columns;     /* of the output */
  uint32_t depth;       /* summed indices; 0: a group's rows */
  uint32_t output_rows; /* GRAD_W: rows of a matrix */
  void *out;            /* rows of `columns` values */
  uint64_t out_stride;  /* GRAD_W: floats from matrix to matrix */
  uint16_t *gated;      /* SWIGLU: (rows, columns / 2) */
};

struct grouped_shared {
  uint64_t full[MOST_STAGES], empty[MOST_STAGES];
  uint32_t start[US_GROUPED_MOST_GROUPS + 1];
};

template <int KIND_, int COLUMNS_, int BLOCKS_, bool TURNS_, bool WIDE_ = false> struct grouped_shape {
  static constexpr int KIND = KIND_, COLUMNS = COLUMNS_, BLOCKS = BLOCKS_, TILES = COLUMNS / 8;
  static constexpr bool TURNS =
      TURNS_; /* a warpgroup has a tile of its own, while the other stores; else half of one */
  static constexpr int HALVES = TURNS ? 2 : 1; /* 64 rows each, of a warpgroup */
  static constexpr bool WIDE = WIDE_;          /* FORWARD: outputs in FP32 */
  static constexpr int ACROSS_A = KIND == GROUPED_GRAD_W,
                       ACROSS_B = KIND == GROUPED_GRAD_X || KIND == GROUPED_GRAD_W;
  static constexpr int PARTS = KIND == GROUPED_SWIGLU ? 2 : BLOCKS;
  static constexpr int BOXES = ACROSS_B ? (COLUMNS + 63) / 64 : PARTS; /* of the column operand */
  static constexpr uint32_t A_BYTES = TILE_ROWS * 128,
                            BOX_BYTES = ACROSS_B ? DEPTH * 128 : COLUMNS / PARTS * 128;
  static constexpr uint32_t STAGE_BYTES = A_BYTES + BOXES * BOX_BYTES;
  /* GRAD_W: what is added to comes through the ring too, 64 columns a stage: boxes of 32 floats, all rows. */
  static constexpr int SUM_STAGES = KIND == GROUPED_GRAD_W ? (COLUMNS + 63) / 64 : 0;
  static constexpr uint32_t SUM_BOX_BYTES = TILE_ROWS * 128;
  static_assert(STAGE_BYTES >= 2 * SUM_BOX_BYTES || !SUM_STAGES, "a stage of sums fits");
  static constexpr int FIT = RING_MEMORY / STAGE_BYTES, STAGES = FIT < MOST_STAGES ? FIT : MOST_STAGES;
};

/* ---- finding tiles ----------------------------------------------------------------------------------------------- */

struct grouped_tile {
  uint32_t group, begin, end; /* rows of the group */
  uint32_t row, column;       /* of the output: a row of all groups, or of the group's matrix (GRAD_W) */
  uint32_t stages;            /* steps of DEPTH along the sum */
};

/* Items [first, next) are those of the group before `group`. */
struct grouped_walk {
  uint32_t group, first, next;
};

template <class Shape>
static __device__ __forceinline__ bool find_tile(const struct grouped_args *a, const uint32_t *start,
                                                 struct grouped_walk *walk, uint32_t item, uint32_t rank,
                                                 struct grouped_tile *tile) {
  constexpr uint32_t ROWS = TILE_ROWS * Shape::BLOCKS;
  const uint32_t across = (a->columns + Shape::COLUMNS - 1) / Shape::COLUMNS;
  uint32_t begin, end, down = 0;
  if (item >= walk->next) {
    do {
      if (walk->group == a->groups) return false;
      begin = start[walk->group], end = start[++walk->group];
      down = ((Shape::KIND == GROUPED_GRAD_W ? a->output_rows : end - begin) + ROWS - 1) / ROWS;
      walk->first = walk->next;
      if (end > begin) walk->next += down * across;
    } while (item >= walk->next);
  } else {
    begin = start[walk->group - 1], end = start[walk->group];
    down = ((Shape::KIND == GROUPED_GRAD_W ? a->output_rows : end - begin) + ROWS - 1) / ROWS;
  }
  uint32_t local = item - walk->first, band = local / (BAND * across), rest = local - band * BAND * across,
           high = down - band * BAND < BAND ? down - band * BAND : BAND;
  tile->group = walk->group - 1, tile->begin = begin, tile->end = end;
  tile->column = rest / high * Shape::COLUMNS;
  tile->row = (band * BAND + rest % high) * ROWS + rank * TILE_ROWS;
  if (Shape::KIND != GROUPED_GRAD_W) tile->row += begin;
  tile->stages = ((Shape::KIND == GROUPED_GRAD_W ? end - begin : a->depth) + DEPTH - 1) / DEPTH;
  return true;
}

/* ---- storing ----------------------------------------------------------------------------------------------------- */

/* A warp's 16 rows from `row`, in FP32. */
template <class Shape>
static __device__ __forceinline__ void store_wide(const struct grouped_args *a,
                                                  const struct grouped_tile *tile, uint32_t row, int lane,
                                                  const float d[Shape::TILES][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t r = row + half * 8 + lane / 4, column = tile->column + lane % 4 * 2;
    float *out = (float *)a->out + (uint64_t)r * a->columns;
#pragma unroll
    for (int t = 0; t < Shape::TILES; t++)
      if (r < tile->end && column + t * 8 < a->columns)
        *(float2 *)(out + column + t * 8) = make_float2(d[t][2 * half], d[t][2 * half + 1]);
  }
}

/* Four lanes hold two columns each of four tiles of 8; afterwards each holds the 8 columns of the tile of its own number. */
static __device__ __forceinline__ void exchange_tiles(uint32_t p[4], int lane) {
  bool odd = lane & 1, high = lane & 2;
  uint32_t a = __shfl_xor_sync(~0u, odd ? p[0] : p[1], 1), b = __shfl_xor_sync(~0u, odd ? p[2] : p[3], 1);
  if (odd)
    p[0] = a, p[2] = b;
  else
    p[1] = a, p[3] = b;
  a = __shfl_xor_sync(~0u, high ? p[0] : p[2], 2), b = __shfl_xor_sync(~0u, high ? p[1] : p[3], 2);
  if (high)
    p[0] = a, p[1] = b;
  else
    p[2] = a, p[3] = b;
}

/* A warp's 16 rows from `row`, in bf16: 16 bytes a lane. */
template <class Shape>
static __device__ __forceinline__ void store_rounded(const struct grouped_args *a,
                                                     const struct grouped_tile *tile, uint32_t row, int lane,
                                                     const float d[Shape::TILES][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t r = row + half * 8 + lane / 4;
    uint16_t *out = (uint16_t *)a->out + (uint64_t)r * a->columns;
#pragma unroll
    for (int t = 0; t < Shape::TILES; t += 4) {
      uint32_t p[4], column = tile->column + (t + lane % 4) * 8;
#pragma unroll
      for (int j = 0; j < 4; j++) p[j] = pack_2(d[t + j] + 2 * half);
      exchange_tiles(p, lane);
      if (r < tile->end && column < a->columns) *(uint4 *)(out + column) = make_uint4(p[0], p[1], p[2], p[3]);
    }
  }
}

/* Gates, ups and silu(gate) * up of 16 rows, the last from the rounded values, as us_experts_train_swiglu has it. */
template <class Shape>
static __device__ __forceinline__ void store_gated(const struct grouped_args *a,
                                                   const struct grouped_tile *tile, uint32_t row, int lane,
                                                   const float d[Shape::TILES][4]) {
  constexpr int HALF = Shape::TILES / 2;
  const uint32_t F = a->columns / 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t r = row + half * 8 + lane / 4;
    uint16_t *out = (uint16_t *)a->out + (uint64_t)r * a->columns;
#pragma unroll
    for (int t = 0; t < HALF; t += 4) {
      uint32_t p[3][4], column = tile->column / 2 + (t + lane % 4) * 8;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        constexpr int LAST = HALF - 1; /* of 10 tiles the third four has two */
        int from = t + j < HALF ? t + j : LAST;
        float gate[2], up[2];
        unpack_2(p[0][j] = pack_2(d[from] + 2 * half), gate);
        unpack_2(p[1][j] = pack_2(d[from + HALF] + 2 * half), up);
#pragma unroll
        for (int i = 0; i < 2; i++) up[i] = gate[i] * sigmoid(gate[i]) * up[i];
        p[2][j] = pack_2(up);
      }
#pragma unroll
      for (int i = 0; i < 3; i++) exchange_tiles(p[i], lane);
      if (r >= tile->end || column >= F || t + lane % 4 >= HALF) continue;
      if (a->out) {
        *(uint4 *)(out + column) = make_uint4(p[0][0], p[0][1], p[0][2], p[0][3]);
        *(uint4 *)(out + F + column) = make_uint4(p[1][0], p[1][1], p[1][2], p[1][3]);
      }
      *(uint4 *)(a->gated + (uint64_t)r * F + column) = make_uint4(p[2][0], p[2][1], p[2][2], p[2][3]);
    }
  }
}

/* Add tiles [first, first + 8) to a stage of what is there. `row` is the warp's first of the stage's; chunks of 16 bytes are swizzled. */
template <class Shape>
static __device__ __forceinline__ void add_sums(uint8_t *stage, uint32_t row, int first, int lane,
                                                const float d[Shape::TILES][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t r = row + half * 8 + lane / 4;
#pragma unroll
    for (int t = 0; t < 8; t++) {
      if (first + t >= Shape::TILES) break;
      uint32_t chunk = (t % 4 * 2 + lane % 4 / 2) ^ (r & 7);
      float2 *at = (float2 *)(stage + t / 4 * Shape::SUM_BOX_BYTES + r * 128 + chunk * 16 + lane % 2 * 8),
             v = *at;
      *at = make_float2(v.x + d[first + t][2 * half], v.y + d[first + t][2 * half + 1]);
    }
  }
}

#endif
