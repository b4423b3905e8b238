/* embed_train.cu: embedding rows and their gradient.
 *
 * Bound: bytes, 6 a value forward (bf16 in, FP32 out), 4 a row's value and 8 a touched token's value backward. A warp has 128 columns
 * of a piece and adds its rows one after another, 8 loads under way; a token of many pieces (or the mask) gets them added by a
 * second kernel, in order.
 */
#include "kernels/embed/embed_train.h"
#include "kernels/gpu/rows.cuh"

#define THREADS    256
#define COLUMNS    128 /* of a warp */
#define IN_ADVANCE 8

static __global__ void __launch_bounds__(THREADS)
    embed_rows(const __grid_constant__ struct us_embed_train e, uint32_t a_row) {
  uint32_t i = blockIdx.x * THREADS + threadIdx.x, k = i % a_row * 4;
  size_t r = i / a_row;
  if (r >= e.R) return;
  int32_t token = e.token[r];
  const uint16_t *from = token < 0 ? e.opt_mask : e.table + (size_t)token * e.D;
  us_store_four(e.x + r * e.D + k, from ? us_load_four(from + k) : us_four{});
}

int us_embed_train(const struct us_embed_train *embed, cudaStream_t stream) {
  size_t blocks = (embed->R * (embed->D / 4) + THREADS - 1) / THREADS;
  if (embed->D % 4 || blocks >= (1u << 31) / THREADS) return cudaErrorInvalidValue;
  if (blocks) embed_rows<<<(unsigned)blocks, THREADS, 0, stream>>>(*embed, (uint32_t)(embed->D / 4));
  return cudaGetLastError();
}

/* --- plan, on the host --- */

/* Stable counting passes over the tokens' bytes: keys are token + 1 (0: negative) above the row. */
static const uint64_t *sort_rows(const int32_t *token, size_t R, uint64_t *work) {
  uint64_t *from = work, *to = work + R, largest = 0;
  for (size_t r = 0; r < R; r++) {
    uint64_t key = token[r] < 0 ? 0 : (uint64_t)token[r] + 1;
    largest = key > largest ? key : largest;
    from[r] = key << 32 | r;
  }
  for (int shift = 32; shift < 64 && largest >> (shift - 32); shift += 8) {
    size_t place[257] = {0};
    for (size_t r = 0; r < R; r++) place[(from[r] >> shift & 255) + 1]++;
    for (int i = 0; i < 256; i++) place[i + 1] += place[i];
    for (size_t r = 0; r < R; r++) to[place[from[r] >> shift & 255]++] = from[r];
    uint64_t *swap = from;
    from = to;
    to = swap;
  }
  return from;
}

size_t us_embed_train_plan(const int32_t *token, size_t R, uint32_t *row, struct us_embed_train_piece *piece,
                           uint64_t *work) {
  const uint64_t *sorted = sort_rows(token, R, work);
  size_t pieces = 0;
  for (size_t r = 0; r < R; r++) row[r] = (uint32_t)sorted[r];
  for (size_t first = 0, end; first < R; first = end) {
    uint64_t key = sorted[first] >> 32;
    for (end = first + 1; end < R && sorted[end] >> 32 == key; end++) continue;
    uint32_t count = (uint32_t)((end - first + US_EMBED_TRAIN_PIECE - 1) / US_EMBED_TRAIN_PIECE);
    for (size_t at = first; at < end; at += US_EMBED_TRAIN_PIECE) {
      size_t left = end - at;
      uint32_t rows = (uint32_t)(left < US_EMBED_TRAIN_PIECE ? left : US_EMBED_TRAIN_PIECE);
      piece[pieces++] = {(uint32_t)at, rows, (int32_t)key - 1, at == first ? count : 0};
    }
  }
  return pieces;
}

/* --- gradient --- */

/* This lane's 4 columns of the warp's (piece, 128 columns). */
struct place {
  uint32_t piece, column;
};

static __device__ __forceinline__ struct place find_place(uint32_t slices) {
  uint32_t warp = (blockIdx.x * THREADS + threadIdx.x) / 32;
  return {warp / slices, warp % slices * COLUMNS + threadIdx.x % 32 * 4};
}

/* Where the gradient of a token goes; NULL if nobody wants it. */
static __device__ __forceinline__ float *target(const struct us_embed_train_grad &g, int32_t token) {
  return token < 0 ? g.opt_dmask : g.dtable ? g.dtable + (size_t)token * g.D : NULL;
}

static __device__ __forceinline__ void add_four(struct us_four *sum, const struct us_four &x) {
#pragma unroll
  for (int j = 0; j < 4; j++) sum->v[j] += x.v[j];
}

static __global__ void __launch_bounds__(THREADS)
    add_rows(const __grid_constant__ struct us_embed_train_grad g, uint32_t slices) {
  struct place at = find_place(slices);
  if (at.piece >= g.pieces || at.column >= g.D) return;
  struct us_embed_train_piece piece = g.piece[at.piece];
  float *to = target(g, piece.token);
  if (!to) return;
  to += at.column;
  bool alone = piece.pieces == 1;
  if (!alone) to = (float *)g.scratch + (size_t)at.piece * g.D + at.column;
  struct us_four sum = alone ? us_load_four(to) : us_four{};
  for (uint32_t i = 0; i < piece.rows; i += IN_ADVANCE) {
    struct us_four x[IN_ADVANCE];
#pragma unroll
    for (int j = 0; j < IN_ADVANCE; j++)
      x[j] = i + j < piece.rows ? us_load_four(g.dx + (size_t)g.row[piece.first + i + j] * g.D + at.column)
                                : us_four{};
#pragma unroll
    for (int j = 0; j < IN_ADVANCE; j++)
      if (i + j < piece.rows) add_four(&sum, x[j]);
  }
  us_store_four(to, sum);
}

/* Tokens of more than one piece. */
static __global__ void __launch_bounds__(THREADS)
    add_pieces(const __grid_constant__ struct us_embed_train_grad g, uint32_t slices) {
  struct place at = find_place(slices);
  if (at.piece >= g.pieces || at.column >= g.D) return;
  struct us_embed_train_piece piece = g.piece[at.piece];
  float *to = target(g, piece.token);
  if (piece.pieces < 2 || !to) return;
  to += at.column;
  const float *from = (const float *)g.scratch + (size_t)at.piece * g.D + at.column;
  struct us_four sum = us_load_four(to);
  for (uint32_t i = 0; i < piece.pieces; i += IN_ADVANCE) {
    struct us_four x[IN_ADVANCE];
#pragma unroll
    for (int j = 0; j < IN_ADVANCE; j++)
      x[j] = i + j < piece.pieces ? us_load_four(from + (size_t)(i + j) * g.D) : us_four{};
#pragma unroll
    for (int j = 0; j < IN_ADVANCE; j++)
      if (i + j < piece.pieces) add_four(&sum, x[j]);
  }
  us_store_four(to, sum);
}

size_t us_embed_train_scratch(size_t pieces, size_t D) {
  return pieces * D * sizeof(float);
}

int us_embed_train_grad(const struct us_embed_train_grad *grad, cudaStream_t stream) {
  size_t slices = (grad->D + COLUMNS - 1) / COLUMNS,
         blocks = (grad->pieces * slices * 32 + THREADS - 1) / THREADS;
  if (grad->D % 4 || blocks >= (1u << 31) / THREADS)
    return cudaErrorInvalidValue; /* threads have 32-bit numbers */
  if (!blocks) return cudaSuccess;
  add_rows<<<(unsigned)blocks, THREADS, 0, stream>>>(*grad, (uint32_t)slices);
  add_pieces<<<(unsigned)blocks, THREADS, 0, stream>>>(*grad, (uint32_t)slices);
  return cudaGetLastError();
}
