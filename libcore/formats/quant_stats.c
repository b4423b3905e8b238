/* quant_stats.c: error sums and scale statistics of a stored matrix, a tile of at most 128 x 128 at a time. */
#include "formats/quant_stats.h"

#include <math.h>

enum { TILE = 128 };

/* What is known of the tile so far. */
struct tile {
  size_t row, col, height, width;
  int scale_min, scale_max; /* of blocks that are not all zero; -1: none yet */
  float fp8_scale;          /* FP8: the tile is one block */
  int fp8_clipped, fp8_nonzero;
};

void us_quant_stats_init(struct us_quant_stats *stats) {
  *stats = (struct us_quant_stats){.scale_min = -1, .scale_max = -1};
}

static void widen(int *low, int *high, int from, int to) {
  if (from < 0) return;
  if (*low < 0 || from < *low) *low = from;
  if (*high < 0 || to > *high) *high = to;
}

/* Decode columns [col, col + width) of a row; col is a multiple of 128. */
static void decode_piece(const struct us_matrix *w, size_t row, size_t col, size_t width, float *out) {
  size_t at = row * w->cols + col;
  size_t scale_cols = (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  switch (w->format) {
  case US_FORMAT_F32:
    memcpy(out, (const float *)w->data + at, width * sizeof *out);
    break;
  case US_FORMAT_BF16:
    us_bf16_decode((const uint16_t *)w->data + at, width, out);
    break;
  case US_FORMAT_FP8:
    us_fp8_decode((const uint8_t *)w->data + at,
                  (const float *)w->scales + us_matrix_scale_row(w, row) * scale_cols + col / US_FP8_BLOCK,
                  width, out);
    break;
  case US_FORMAT_MXFP4:
    us_mxfp4_decode((const uint8_t *)w->data + at / 2, (const uint8_t *)w->scales + at / US_MXFP4_GROUP,
                    width, out);
    break;
  default:
    memset(out, 0, width * sizeof *out);
  }
}

static void add_errors(struct us_quant_stats *stats, const float *before, const float *after, size_t n) {
  for (size_t i = 0; i < n; i++) {
    double w = (double)before[i], q = (double)after[i], error = q - w;
    stats->signal += w * w;
    stats->noise += error * error;
    stats->dot += w * q;
    stats->decoded_power += q * q;
    if (fabs(error) > stats->max_abs_error) stats->max_abs_error = fabs(error);
    stats->nonzero += w != 0;
    stats->zeroed += w != 0 && q == 0;
  }
  stats->values += n;
}

static float largest(const float *values, size_t n) {
  float m = 0;
  for (size_t i = 0; i < n; i++) m = fmaxf(m, fabsf(values[i]));
  return m;
}

static void add_groups(struct us_quant_stats *stats, struct tile *tile, const uint8_t *scales,
                       const float *before, size_t width) {
  for (size_t g = 0; g < width / US_MXFP4_GROUP; g++) {
    float amax = largest(before + g * US_MXFP4_GROUP, US_MXFP4_GROUP);
    stats->blocks++;
    stats->zero_blocks += amax == 0;
    stats->clipped_blocks += amax * us_e8m0_inverse(scales[g]) > 6.0f;
    if (amax != 0) widen(&tile->scale_min, &tile->scale_max, scales[g], scales[g]);
  }
}

static void add_row(struct us_quant_stats *stats, struct tile *tile, const struct us_matrix *w,
                    const float *values, size_t row) {
  float after[TILE];
  const float *before = values + row * w->cols + tile->col;
  decode_piece(w, row, tile->col, tile->width, after);
  add_errors(stats, before, after, tile->width);
  if (w->format == US_FORMAT_MXFP4)
    add_groups(stats, tile, (const uint8_t *)w->scales + (row * w->cols + tile->col) / US_MXFP4_GROUP, before,
               tile->width);
  if (w->format == US_FORMAT_FP8) {
    float amax = largest(before, tile->width);
    tile->fp8_nonzero |= amax != 0;
    tile->fp8_clipped |= amax > US_FP8_MAX * tile->fp8_scale;
  }
}

static void add_tile(struct us_quant_stats *stats, struct tile *tile, const struct us_matrix *w,
                     const float *values) {
  size_t scale_cols = (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  if (w->format == US_FORMAT_FP8)
    tile->fp8_scale =
        ((const float *)w->scales)[us_matrix_scale_row(w, tile->row) * scale_cols + tile->col / US_FP8_BLOCK];
  for (size_t r = 0; r < tile->height; r++) add_row(stats, tile, w, values, tile->row + r);
  if (w->format == US_FORMAT_FP8) {
    int exponent = (int)(us_f32_bits(tile->fp8_scale) >> 23 & 255);
    stats->blocks++;
    stats->zero_blocks += !tile->fp8_nonzero;
    stats->clipped_blocks += (uint64_t)tile->fp8_clipped;
    if (tile->fp8_nonzero) widen(&tile->scale_min, &tile->scale_max, exponent, exponent);
  }
  widen(&stats->scale_min, &stats->scale_max, tile->scale_min, tile->scale_max);
  int span = tile->scale_max - tile->scale_min;
  if (w->format == US_FORMAT_MXFP4 && span > stats->max_tile_span) stats->max_tile_span = span;
}

void us_quant_stats_add(struct us_quant_stats *stats, const float *values, const struct us_matrix *w,
                        size_t row_begin, size_t row_end) {
  size_t chunk = w->format == US_FORMAT_FP8 && w->scale_chunk_rows ? w->scale_chunk_rows : w->rows;
  for (size_t row = row_begin; row < row_end;) {
    size_t within = row % chunk, height = TILE - within % TILE;
    if (height > chunk - within) height = chunk - within;
    if (height > row_end - row) height = row_end - row;
    for (size_t col = 0; col < w->cols; col += TILE) {
      struct tile tile = {.row = row, .col = col, .height = height, .scale_min = -1, .scale_max = -1};
      tile.width = w->cols - col < TILE ? w->cols - col : TILE;
      add_tile(stats, &tile, w, values);
    }
    row += height;
  }
  size_t rows = row_end - row_begin;
  stats->bytes += us_matrix_data_bytes(w->format, rows, w->cols) +
                  us_matrix_scale_bytes(w->format, rows, w->cols, w->scale_chunk_rows);
}

void us_quant_stats_merge(struct us_quant_stats *stats, const struct us_quant_stats *part) {
  stats->values += part->values;
  stats->nonzero += part->nonzero;
  stats->blocks += part->blocks;
  stats->signal += part->signal;
  stats->noise += part->noise;
  stats->dot += part->dot;
  stats->decoded_power += part->decoded_power;
  stats->max_abs_error = fmax(stats->max_abs_error, part->max_abs_error);
  stats->clipped_blocks += part->clipped_blocks;
  stats->zeroed += part->zeroed;
  stats->zero_blocks += part->zero_blocks;
  stats->bytes += part->bytes;
  widen(&stats->scale_min, &stats->scale_max, part->scale_min, part->scale_max);
  if (part->max_tile_span > stats->max_tile_span) stats->max_tile_span = part->max_tile_span;
}

void us_quant_stats_finish(struct us_quant_stats *stats) {
  double power = sqrt(stats->signal) * sqrt(stats->decoded_power);
  stats->sqnr_db = stats->noise > 0 ? 10 * log10(stats->signal / stats->noise) : (double)INFINITY;
  stats->relative_rmse = stats->signal > 0 ? sqrt(stats->noise / stats->signal) : 0;
  stats->cosine = power > 0 ? stats->dot / power : 0;
  stats->clipped_share = stats->blocks ? (double)stats->clipped_blocks / (double)stats->blocks : 0;
  stats->zeroed_share = stats->nonzero ? (double)stats->zeroed / (double)stats->nonzero : 0;
}
