/* quant_stats.h: what storing a tensor in fewer bits did to it.
 *
 *     us_quant_stats_init(&stats);
 *     us_quant_stats_add(&stats, w_before, &w_stored, row_begin, row_end);      // any number of times
 *     us_quant_stats_finish(&stats);                                           // stats.sqnr_db, ...
 *
 * Sums are FP64 in row order, so that a report does not depend on threads; to use threads give each its
 * rows and
 * us_quant_stats_merge the parts in row order (equal to within FP64 rounding).
 */
#ifndef US_FORMATS_QUANT_STATS_H
#define US_FORMATS_QUANT_STATS_H

#include "formats/matrix.h"

struct us_quant_stats {
  /* counts and sums over the values seen */
  uint64_t values, blocks;
  double signal, noise, dot, decoded_power; /* sum w^2, sum (q-w)^2, sum w*q, sum q^2 */
  uint64_t clipped_blocks; /* a value beyond the largest code (MXFP4: |w| > 6 * scale; FP8: > 448 * scale) */
  uint64_t zeroed;         /* values other than 0 that became 0 */
  uint64_t zero_blocks;    /* blocks whose values were all 0 */
  uint64_t nonzero;        /* values other than 0 */
  double max_abs_error;
  int scale_min,
      scale_max; /* MXFP4: scale bytes seen; FP8: exponents of the scales, biased by 127; -1: none */
  int max_tile_span; /* MXFP4: largest - smallest scale byte in a 128 x 128 tile, all-zero blocks aside; a tile up to
                                  14 is exact in FP8 with a power-of-two scale */
  uint64_t bytes; /* codes and scales */

  /* filled by us_quant_stats_finish */
  double sqnr_db;       /* 10 log10(signal / noise); INFINITY if nothing was lost */
  double relative_rmse; /* sqrt(noise / signal) */
  double cosine;        /* dot / sqrt(signal * decoded_power) */
  double clipped_share; /* of blocks */
  double zeroed_share;  /* of values other than 0 */
};

/* Start empty: all zero but the minima and maxima. */
void us_quant_stats_init(struct us_quant_stats *stats);

/* Compare rows [row_begin, row_end) of the stored matrix `w` with the original `values` (N, K), whole
 * matrix. row_begin is a
 * multiple of us_matrix_row_grain, and of 128 for MXFP4 if the tile spans are to be right. */
void us_quant_stats_add(struct us_quant_stats *stats, const float *values, const struct us_matrix *w,
                        size_t row_begin, size_t row_end);

/* Add the sums of `part`. */
void us_quant_stats_merge(struct us_quant_stats *stats, const struct us_quant_stats *part);

/* Compute the ratios; may be called again after more values. */
void us_quant_stats_finish(struct us_quant_stats *stats);

#endif
