/* quant_stats.h: what storing a tensor in fewer bits did to it.
 *
 *     struct us_quant_stats stats;
 *     us_quant_stats_init(&stats);
 *     us_quant_stats_add(&stats, before, &stored, 0, stored.rows);   // any number of matrices or row ranges
 *     us_quant_stats_finish(&stats);                                 // stats.sqnr_db, stats.cosine, ...
 *
 * Sums are FP64, in order of tiles of 128 x 128 and of rows in a tile. To use threads give each a range of rows and
 * merge the parts in row order: as reproducible, and equal to one pass but for FP64 rounding.
 */
#ifndef US_FORMATS_QUANT_STATS_H
#define US_FORMATS_QUANT_STATS_H

#include "formats/matrix.h"

/* A block is what shares a scale: 32 values of MXFP4, up to 128 x 128 of FP8. Other formats have none. */
struct us_quant_stats {
  uint64_t values, nonzero, blocks;
  double signal;        /* sum w^2 */
  double noise;         /* sum (q - w)^2 */
  double dot;           /* sum w * q */
  double decoded_power; /* sum q^2 */
  double max_abs_error;
  uint64_t clipped_blocks; /* hold a value beyond the largest code: 6 * scale, or 448 * scale */
  uint64_t zeroed;         /* values other than 0 that became 0 */
  uint64_t zero_blocks;    /* all values 0 */
  int scale_min,
      scale_max;     /* MXFP4: scale bytes; FP8: exponents of the scales, biased by 127; all-zero blocks
                               aside; -1 if there is none */
  int max_tile_span; /* MXFP4: largest - smallest scale byte in a tile of 128 x 128, all-zero blocks aside;
                               up to 14 the tile is exact in FP8 with a power-of-two scale */
  uint64_t bytes;    /* codes and scales */

  /* filled by us_quant_stats_finish; 0 where there was nothing to divide by */
  double sqnr_db;       /* 10 log10(signal / noise); INFINITY if nothing was lost */
  double relative_rmse; /* sqrt(noise / signal) */
  double cosine;        /* dot / sqrt(signal * decoded_power) */
  double clipped_share; /* clipped_blocks / blocks */
  double zeroed_share;  /* zeroed / nonzero */
};

/* Start empty. */
void us_quant_stats_init(struct us_quant_stats *stats);

/* Compare rows [row_begin, row_end) of the stored matrix `w` with `values`, the original whole matrix (N,
 * K). row_begin is a multiple of us_matrix_row_grain, and of 128 for MXFP4 if tile spans are to be those of
 * the whole matrix. */
void us_quant_stats_add(struct us_quant_stats *stats, const float *values, const struct us_matrix *w,
                        size_t row_begin, size_t row_end);

/* Add the sums of `part` to `stats`. */
void us_quant_stats_merge(struct us_quant_stats *stats, const struct us_quant_stats *part);

/* Compute the ratios from the sums; may be called again after more values. */
void us_quant_stats_finish(struct us_quant_stats *stats);

#endif
