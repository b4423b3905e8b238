/* weights_stage.c: how the rows of an item are cut into pieces, and where they stand until they are packed. */
#include "base/init.h"
#include "device/weights_plan.h"

static uint32_t source_rows(const struct us_weights_item *item) {
  return item->pages.rows / item->matrices;
}

static uint32_t tile_source_rows(const struct us_weights_item *item) {
  return item->pages.tile_rows / item->matrices;
}

static struct us_weights_stage stage_of(const struct us_weights_item *item, uint32_t row, uint32_t rows,
                                        uint32_t count) {
  uint32_t sources = count * item->matrices;
  struct us_weights_stage s = {.row = row, .rows = rows};
  s.lead = item->pages.format == US_FORMAT_FP8 ? item->first_col % US_FP8_BLOCK : 0;
  s.cols = s.lead + item->pages.cols;
  s.data_bytes = us_matrix_data_bytes(item->pages.format, rows, s.cols);
  s.scale_bytes = us_matrix_scale_bytes(item->pages.format, rows, s.cols, US_WEIGHTS_FP8_ROWS);
  s.stride = us_weights_align(s.data_bytes) + us_weights_align(s.scale_bytes);
  s.inits = us_weights_align(count * sizeof(struct us_pages_source));
  s.sources_at = s.inits + us_weights_align((uint64_t)sources * item->gathers * sizeof(struct us_init));
  s.bytes = s.sources_at + sources * s.stride;
  return s;
}

struct us_weights_stage us_weights_stage(const struct us_weights_item *item,
                                         const struct us_weights_piece *piece) {
  uint32_t unit = tile_source_rows(item), row = piece->tile * unit, rows = piece->tiles * unit;
  if (row + rows > source_rows(item)) rows = source_rows(item) - row;
  return stage_of(item, row, rows, piece->count);
}

struct us_pages_source us_weights_staged(const struct us_weights_item *item,
                                         const struct us_weights_stage *stage, const uint8_t *opt_base,
                                         uint32_t matrix) {
  struct us_pages_source source = {.matrices = item->matrices, .first_col = stage->lead};
  for (uint32_t i = 0; i < item->matrices; i++) {
    const uint8_t *data = opt_base;
    if (data) data += stage->sources_at + (matrix * item->matrices + i) * stage->stride;
    source.w[i] = (struct us_matrix){item->pages.format, stage->rows, stage->cols, data, NULL, 0};
    if (data && stage->scale_bytes) source.w[i].scales = data + us_weights_align(stage->data_bytes);
    if (item->pages.format == US_FORMAT_FP8) source.w[i].scale_chunk_rows = US_WEIGHTS_FP8_ROWS;
  }
  return source;
}

/* The largest piece of an item: whole matrices if one fits, else tiles. */
static struct us_weights_piece largest_piece(const struct us_weights_item *item) {
  uint64_t matrix = stage_of(item, 0, source_rows(item), 1).stride * item->matrices;
  struct us_weights_piece piece = {0, 1, 0, us_pages_tiles(&item->pages)};
  if (matrix <= US_WEIGHTS_PIECE) {
    uint64_t fit = US_WEIGHTS_PIECE / matrix;
    piece.count = fit < US_WEIGHTS_PIECE_MOST ? (uint32_t)fit : US_WEIGHTS_PIECE_MOST;
    if (piece.count > item->count) piece.count = item->count;
    return piece;
  }
  uint64_t fit = US_WEIGHTS_PIECE / (stage_of(item, 0, tile_source_rows(item), 1).stride * item->matrices);
  piece.tiles = fit ? (uint32_t)fit : 1;
  return piece;
}

bool us_weights_next(const struct us_weights_item *item, struct us_weights_piece *piece) {
  struct us_weights_piece most = largest_piece(item);
  uint32_t tiles = us_pages_tiles(&item->pages);
  if (piece->count) piece->tile += piece->tiles;
  if (piece->tile == tiles) piece->first += piece->count, piece->tile = 0;
  piece->count = item->count - piece->first < most.count ? item->count - piece->first : most.count;
  piece->tiles = tiles - piece->tile < most.tiles ? tiles - piece->tile : most.tiles;
  return piece->count > 0;
}
