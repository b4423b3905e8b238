/* gemm_tile.h: us_gemm by register tiles, for the instruction set that the including file describes. Internal.
 *
 * The includer defines: V (vector of W floats), W, ROWS and VECTORS (tile of ROWS x VECTORS * W), LOAD, STORE, SET1, ZERO,
 * FMA, MUL, ADD, TRANSPOSE (W x W block of B with k contiguous into the panel), NAME.
 *
 * A panel of B, 256 x (VECTORS * W), is copied to the stack once for all rows; A is read in place, one broadcast a row and
 * k. Bound: fma ports; per k there are ROWS * VECTORS fmas against ROWS + VECTORS loads.
 */
#include "kernels/gemm/gemm_impl.h"

#include <string.h>

#define WIDTH (VECTORS * W)

/* The sums must stay in registers, so every loop over a tile is unrolled. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Panel (depth, WIDTH) from columns [0, width) of b, zeros up to the next whole vector. */
static void pack(const float *b, size_t row, size_t col, size_t depth, size_t width, float *panel) {
  if (col == 1) {
    size_t whole = width / W * W, padded = (width + W - 1) / W * W;
    for (size_t k = 0; k < depth; k++, b += row, panel += WIDTH) {
      for (size_t j = 0; j < whole; j += W) STORE(panel + j, LOAD(b + j));
      for (size_t j = whole; j < padded; j++) panel[j] = j < width ? b[j] : 0.0f;
    }
    return;
  }
  size_t j = 0;
  for (; j + W <= width; j += W) {
    size_t k = 0;
    for (; k + W <= depth; k += W) TRANSPOSE(b + j * col + k, col, panel + k * WIDTH + j, WIDTH);
    for (; k < depth; k++)
      for (size_t l = 0; l < W; l++) panel[k * WIDTH + j + l] = b[(j + l) * col + k];
  }
  for (; j % W || j < width; j++)
    for (size_t k = 0; k < depth; k++) panel[k * WIDTH + j] = j < width ? b[j * col + k] : 0.0f;
}

struct tile_args {
  const float *a;
  size_t a_row, a_col, rows; /* rows <= ROWS of C */
  const float *panel;
  size_t depth;
  float *c;
  size_t c_row, width; /* width <= WIDTH columns of C */
  float alpha, beta;
};

/* One element of C at the end of a panel: the same two roundings everywhere. */
static inline float finish(float sum, float c, float alpha, float beta) {
  return beta == 0.0f ? alpha * sum : alpha * sum + beta * c;
}

static inline __attribute__((always_inline)) void tile(const struct tile_args *t, int vectors) {
  V sum[ROWS][VECTORS];
  const float *a[ROWS];
  UNROLL
  for (int i = 0; i < ROWS; i++) a[i] = t->a + ((size_t)i < t->rows ? (size_t)i : 0) * t->a_row;
  UNROLL
  for (int i = 0; i < ROWS; i++) {
    UNROLL
    for (int v = 0; v < vectors; v++) sum[i][v] = ZERO();
  }
  const float *panel = t->panel;
  size_t at = 0;
  for (size_t k = 0; k < t->depth; k++, at += t->a_col, panel += WIDTH) {
    V b[VECTORS];
    UNROLL
    for (int v = 0; v < vectors; v++) b[v] = LOAD(panel + v * W);
    UNROLL
    for (int i = 0; i < ROWS; i++) {
      V x = SET1(a[i][at]);
      UNROLL
      for (int v = 0; v < vectors; v++) sum[i][v] = FMA(x, b[v], sum[i][v]);
    }
  }
  V alpha = SET1(t->alpha), beta = SET1(t->beta);
  UNROLL
  for (int i = 0; i < ROWS; i++) {
    if ((size_t)i >= t->rows) break;
    float *c = t->c + (size_t)i * t->c_row;
    UNROLL
    for (int v = 0; v < vectors; v++) {
      size_t first = (size_t)v * W;
      if (first + W <= t->width) {
        V scaled = MUL(alpha, sum[i][v]);
        STORE(c + first, t->beta == 0.0f ? scaled : ADD(scaled, MUL(beta, LOAD(c + first))));
        continue;
      }
      float lane[W];
      STORE(lane, sum[i][v]);
      for (size_t l = 0; first + l < t->width; l++)
        c[first + l] = finish(lane[l], c[first + l], t->alpha, t->beta);
    }
  }
}

static void run_tile(const struct tile_args *t) {
  size_t vectors = (t->width + W - 1) / W;
  switch (vectors) {
  case 1:
    tile(t, 1);
    return;
#if VECTORS > 2
  case 2:
    tile(t, 2);
    return;
#endif
  default:
    tile(t, VECTORS);
    return;
  }
}

/* Columns of A far apart (A is transposed) are copied, CHUNK rows tile by tile, k by k: read in place they would map to
 * few cache sets, 59 GFLOP/s instead of 130 at a stride of 4096. Tiles are a line more than their content apart, or
 * writing them would have the same trouble. */
#define CHUNK  (16 * ROWS)
#define FAR    1024
#define PACKED (US_GEMM_DEPTH * ROWS + 16)

static void pack_rows(const float *a, size_t col, size_t rows, size_t depth, float *packed) {
  for (size_t k = 0; k < depth; k++, a += col) {
    float *out = packed + k * ROWS;
    size_t i = 0;
    for (; i + ROWS <= rows; i += ROWS, out += PACKED) memcpy(out, a + i, ROWS * sizeof *out);
    if (i < rows) memcpy(out, a + i, (rows - i) * sizeof *out);
  }
}

/* C rows [first, first + rows) += the products of `depth` k from k on. */
static void run_rows(const struct us_gemm *g, size_t first, size_t rows, size_t k, size_t depth, float beta,
                     float *panel, float *packed) {
  if (packed) pack_rows(g->a + first * g->a_row + k * g->a_col, g->a_col, rows, depth, packed);
  for (size_t j = 0; j < g->N; j += WIDTH) {
    struct tile_args t = {.a_row = packed ? 1 : g->a_row,
                          .a_col = packed ? ROWS : g->a_col,
                          .panel = panel,
                          .depth = depth,
                          .c_row = g->c_row,
                          .width = g->N - j < WIDTH ? g->N - j : WIDTH,
                          .alpha = g->alpha,
                          .beta = beta};
    pack(g->b + k * g->b_row + j * g->b_col, g->b_row, g->b_col, depth, t.width, panel);
    for (size_t i = 0; i < rows; i += ROWS) {
      t.a = packed ? packed + i / ROWS * PACKED : g->a + (first + i) * g->a_row + k * g->a_col;
      t.rows = rows - i < ROWS ? rows - i : ROWS;
      t.c = g->c + (first + i) * g->c_row + j;
      run_tile(&t);
    }
  }
}

void NAME(const struct us_gemm *g) {
  float panel[US_GEMM_DEPTH * WIDTH] __attribute__((aligned(64)));
  float packed[PACKED * (CHUNK / ROWS)] __attribute__((aligned(64)));
  bool far = g->a_row == 1 && g->a_col >= FAR;
  size_t k = 0, step = far ? CHUNK : g->M;
  float beta = g->beta;
  do {
    size_t depth = g->K - k < US_GEMM_DEPTH ? g->K - k : US_GEMM_DEPTH;
    for (size_t i = 0; i < g->M; i += step)
      run_rows(g, i, g->M - i < step ? g->M - i : step, k, depth, beta, panel, far ? packed : NULL);
    k += depth;
    beta = 1.0f;
  } while (k < g->K);
}
