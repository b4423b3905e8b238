/* gptq.c: rounding the rows of a matrix so that its products change little. */
#include "training/gptq.h"

#include <stdlib.h>

#define DAMPING 0.01f /* 0.001 and other amounts of text: the same divergence within 2 % (docs/results.md) */

/* --- factors --- */

struct place {
  float moment;
  uint32_t col;
};

static int by_moment(const void *a, const void *b) {
  const struct place *x = a, *y = b;
  if (x->moment != y->moment) return x->moment < y->moment ? -1 : 1;
  return x->col < y->col ? -1 : 1;
}

/* y += f x */
US_SEQ_CLONES static void add_scaled(float *y, const float *x, float f, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] += f * x[i];
}

/* Upper R of a = R^T R in place, a row at a time. */
static void cholesky(float *a, size_t K, float least) {
  for (size_t i = 0; i < K; i++) {
    float *row = a + i * K, root = sqrtf(row[i] > least ? row[i] : least), inverse = 1.0f / root;
    row[i] = root;
    for (size_t j = i + 1; j < K; j++) row[j] *= inverse;
    for (size_t j = i + 1; j < K; j++) add_scaled(a + j * K + j, row + j, -row[j], K - j);
  }
}

void us_gptq_factor(float *h, size_t K, uint32_t *at, float *scratch) {
  struct place *places = (struct place *)scratch; /* K^2 floats hold 2 K words where K > 1 */
  double mean = 0.0;
  for (size_t i = 0; i < K; i++) mean += (double)h[i * K + i] / (double)K;
  float damping = DAMPING * (float)mean + 1e-20f;
  for (size_t i = 0; i < K; i++) places[i] = (struct place){h[i * K + i], (uint32_t)i};
  qsort(places, K, sizeof *places, by_moment);
  for (size_t i = 0; i < K; i++) at[i] = places[i].col;
  for (size_t i = 0; i < K; i++) {
    for (size_t j = 0; j < K; j++) scratch[i * K + j] = h[at[i] * K + at[j]];
    scratch[i * K + i] += damping;
  }
  cholesky(scratch, K, 0.25f * damping);
  for (size_t i = 0; i < K; i++)
    for (size_t k = 0; k < K; k++) h[i * K + k] = k <= i ? scratch[k * K + i] : 0.0f;
}

US_SEQ_CLONES static float dot(const float *x, const float *y, size_t n) {
  return us_seq_dot(x, y, n);
}

/* z L^T = row, then x L = z, a row of L at a time for all rows. */
void us_gptq_solve(float *rows, size_t count, size_t K, const float *L, const uint32_t *at, float *z) {
  for (size_t i = 0; i < K; i++) {
    const float *row = L + i * K;
    for (size_t r = 0; r < count; r++) z[r * K + i] = (rows[r * K + at[i]] - dot(row, z + r * K, i)) / row[i];
  }
  for (size_t i = K; i-- > 0;) {
    const float *row = L + i * K;
    for (size_t r = 0; r < count; r++) {
      float x = z[r * K + i] / row[i];
      rows[r * K + at[i]] = x;
      add_scaled(z + r * K, row, -x, i);
    }
  }
}

/* --- rounding --- */

static float scale_at(const struct us_matrix_encoding *e, const void *scales, size_t N, size_t K, size_t row,
                      size_t col) {
  if (e->format == US_FORMAT_MXFP4)
    return us_e8m0_to_f32(((const uint8_t *)scales)[row * (K / US_MXFP4_GROUP) + col / US_MXFP4_GROUP]);
  struct us_matrix w = {
      .format = US_FORMAT_FP8, .rows = N, .cols = K, .scale_chunk_rows = e->scale_chunk_rows};
  size_t blocks = (K + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  return ((const float *)scales)[us_matrix_scale_row(&w, row) * blocks + col / US_FP8_BLOCK];
}

static float nearest(enum us_format format, float x, float scale) {
  if (format == US_FORMAT_MXFP4) return us_e2m1_to_f32(us_e2m1_from_f32(x / scale)) * scale;
  return us_fp8_to_f32(us_fp8_from_f32(x / scale)) * scale;
}

/* Column by column, so that a row of L serves all rows of w. */
void us_gptq_round(float *w, size_t N, size_t K, const struct us_matrix_encoding *encoding,
                   const void *scales, const float *L, const uint32_t *at, size_t begin, size_t end,
                   float *lost) {
  float largest = encoding->format == US_FORMAT_MXFP4 ? 6.0f : US_FP8_MAX;
  for (size_t i = K; i-- > 0;) {
    const float *row = L + i * K;
    size_t col = at[i];
    for (size_t r = begin; r < end; r++) {
      float *own = lost + (r - begin) * K, *value = w + r * K + col;
      float scale = scale_at(encoding, scales, N, K, r, col), aim = *value + own[i] / row[i];
      float error = *value - nearest(encoding->format, aim, scale);
      *value =
          fminf(fmaxf(aim, -largest * scale), largest * scale); /* beyond it the block's scale would grow */
      add_scaled(own, row, error, i);
    }
  }
}
