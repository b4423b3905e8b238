/* weights_plan.h: what a rank's weights are gathered from and where they go: the list that loading works through.
 *
 *     us_weights_plan_create(model, opt_draft, rank, ranks, &plan, &err);
 *     for (i = 0; i < plan->item_count; i++) pack(&plan->items[i]);       // plan->arena_bytes of device memory in all
 *     us_weights_plan_free(plan);
 *
 * Reads no weights: the matrices' data may be NULL (a skeleton). Points into the model, which must outlive it.
 */
#ifndef US_DEVICE_WEIGHTS_PLAN_H
#define US_DEVICE_WEIGHTS_PLAN_H

#include "device/weights.h"
#include "kernels/pages/pages.h"

/* Rows [first, first + rows) of a matrix of the model. */
struct us_weights_gather {
  const struct us_matrix *w;
  uint32_t first, rows;
};

/* One packed matrix, or the experts of a layer. A packed matrix is made from one source or from two (gate and up); a source is
 * the rows of its gathers one after the other, columns [first_col, first_col + pages.cols). */
struct us_weights_item {
  char name[48]; /* "layers.3.experts", for messages */
  struct us_pages pages;
  uint32_t count, matrices, gathers;
  struct us_weights_gather *gather; /* (count, matrices, gathers); of equal rows for all sources */
  uint32_t first_col;
  struct us_device_matrix *to;
  uint64_t offset; /* in the arena */
};

struct us_weights_vector {
  float **to;
  const float *from; /* (n) */
  uint32_t n;
  uint64_t offset;
};

struct us_weights_plan {
  struct us_device_weights *weights; /* geometry; freed with the plan unless it has been taken (NULL) */
  struct us_weights_item *items;
  struct us_weights_vector *vectors;
  uint32_t item_count, vector_count;
  const struct us_matrix *embed; /* rows [embed_first, embed_first + embed_rows) go to embed_offset */
  uint32_t embed_first, embed_rows;
  uint64_t embed_offset, arena_bytes;
  uint64_t markov_before, markov_after; /* places of a Markov head's tables */
  uint64_t piece_bytes; /* device memory for the rows that are being packed, tables included */
};

#define US_WEIGHTS_ALIGN      256
#define US_WEIGHTS_FP8_ROWS   16            /* rows of a staged FP8 source that share a scale: half a tile */
#define US_WEIGHTS_PIECE      (64ull << 20) /* source bytes packed at a time, unless a tile's rows have more */
#define US_WEIGHTS_PIECE_MOST 512           /* matrices packed at a time */

static inline uint64_t us_weights_align(uint64_t bytes) {
  return (bytes + US_WEIGHTS_ALIGN - 1) / US_WEIGHTS_ALIGN * US_WEIGHTS_ALIGN;
}

/* A piece is what is packed at a time: `tiles` tiles of one matrix, or `count` whole matrices. */
struct us_weights_piece {
  uint32_t first, count; /* matrices */
  uint32_t tile, tiles;
};

/* The piece after `piece`; of an empty one (count 0), the first. Returns false after the last. */
bool us_weights_next(const struct us_weights_item *item, struct us_weights_piece *piece);

/* Where a piece's sources stand in the device memory that it is packed from: tables that us_pages_pack_gpu (`sources`, count)
 * and us_synthetic_gpu (`inits`, (gathers, count, matrices)) read, then the sources, each its codes and its scales. A source has
 * rows [row, row + rows) of the gathered ones and the window's columns, and for FP8 `lead` columns before them, from which their
 * block of 128 begins; FP8 has a scale for every 16 rows. Offsets in bytes. */
struct us_weights_stage {
  uint32_t row, rows, lead, cols; /* cols include lead */
  uint64_t inits, sources_at;     /* of the second table, of the first source */
  uint64_t data_bytes, scale_bytes, stride, bytes;
};

struct us_weights_stage us_weights_stage(const struct us_weights_item *item,
                                         const struct us_weights_piece *piece);

/* The source of matrix `matrix` of the piece in a stage at `opt_base` (NULL: without data). */
struct us_pages_source us_weights_staged(const struct us_weights_item *item,
                                         const struct us_weights_stage *stage, const uint8_t *opt_base,
                                         uint32_t matrix);

/* US_ERR_USAGE: the model cannot be cut so; says which size. */
US_CHECKED enum us_status us_weights_plan_create(const struct us_model *model,
                                                 const struct us_draft *opt_draft, uint32_t rank,
                                                 uint32_t ranks, struct us_weights_plan **ret_plan,
                                                 struct us_err *err);

void us_weights_plan_free(struct us_weights_plan *plan); /* NULL is allowed */

#endif
