/* pages.c: packing weights into pages on the CPU, and back: the reference of the device's packing. */
#include "kernels/pages/pages.h"

#include <math.h>
#include <string.h>

enum us_status us_pages_check(const struct us_pages *p, struct us_err *err) {
  if (p->format <= US_FORMAT_NONE || p->format >= US_FORMAT_COUNT)
    return us_err_set(err, US_ERR_USAGE, "pages of format '%s'", us_format_name(p->format));
  if ((p->tile_rows != 16 && p->tile_rows != 32) || !p->rows)
    return us_err_set(err, US_ERR_USAGE, "%u rows in tiles of %u (16 or 32)", p->rows, p->tile_rows);
  if (!p->cols || !p->slice_cols || p->slice_cols % 32 || p->cols % p->slice_cols)
    return us_err_set(err, US_ERR_USAGE, "%u columns do not divide into slices of %u, a multiple of 32",
                      p->cols, p->slice_cols);
  if (p->format == US_FORMAT_FP8 && p->slice_cols % US_FP8_BLOCK && US_FP8_BLOCK % p->slice_cols &&
      p->slice_cols != p->cols)
    return us_err_set(err, US_ERR_USAGE, "FP8 slices of %u columns cut blocks of 128", p->slice_cols);
  return US_OK;
}

/* A page has one FP8 scale for a 16-row half and each 128 of its columns. */
static enum us_status check_fp8_grid(const struct us_pages *p, const struct us_pages_source *s,
                                     struct us_err *err) {
  uint32_t column = s->first_col % US_FP8_BLOCK;
  bool within = US_FP8_BLOCK % p->slice_cols == 0 ? column % p->slice_cols == 0
                                                  : column + p->slice_cols <= US_FP8_BLOCK;
  if (column && !within)
    return us_err_set(err, US_ERR_USAGE, "slices of %u columns from column %u cut blocks of 128",
                      p->slice_cols, s->first_col);
  for (uint32_t n = 0; n < p->rows; n += 16) {
    uint32_t first, last;
    const struct us_matrix *w = us_pages_source_row(s, n, &first);
    us_pages_source_row(s, n + 15 < p->rows ? n + 15 : p->rows - 1, &last);
    if (us_matrix_scale_row(w, first) != us_matrix_scale_row(w, last))
      return us_err_set(err, US_ERR_USAGE, "rows %u to %u lie in two FP8 blocks", first, last);
  }
  return US_OK;
}

enum us_status us_pages_source_check(const struct us_pages *p, const struct us_pages_source *s,
                                     struct us_err *err) {
  enum us_status status = us_pages_check(p, err);
  if (status != US_OK) return status;
  if (s->matrices != 1 && (s->matrices != 2 || p->tile_rows != 32))
    return us_err_set(err, US_ERR_USAGE, "%u matrices in tiles of %u rows", s->matrices, p->tile_rows);
  if (s->matrices == 2 && p->rows % 32)
    return us_err_set(err, US_ERR_USAGE, "%u rows of gate and up do not fill tiles of 32", p->rows);
  for (uint32_t i = 0; i < s->matrices; i++) {
    const struct us_matrix *w = &s->w[i];
    size_t rows = (size_t)s->first_row + p->rows / s->matrices, cols = (size_t)s->first_col + p->cols;
    if (w->format != p->format || rows > w->rows || cols > w->cols)
      return us_err_set(err, US_ERR_USAGE, "rows %u, columns %u at (%u, %u) of a %s matrix (%zu, %zu)",
                        p->rows, p->cols, s->first_row, s->first_col, us_format_name(w->format), w->rows,
                        w->cols);
    if (p->format == US_FORMAT_MXFP4 && (s->first_col % US_MXFP4_GROUP || w->cols % US_MXFP4_GROUP))
      return us_err_set(err, US_ERR_USAGE, "column %u of %zu cuts a group of 32", s->first_col, w->cols);
  }
  return p->format == US_FORMAT_FP8 ? check_fp8_grid(p, s, err) : US_OK;
}

/* One row of MXFP4 scale bytes: a loop that the compiler makes into vector maxima, since a model has billions. */
static uint32_t largest_byte(const uint8_t *bytes, uint32_t n) {
  uint8_t most = 0;
  for (uint32_t i = 0; i < n; i++) most = bytes[i] > most ? bytes[i] : most;
  return most;
}

static enum us_status check_bytes(const struct us_pages *p, const struct us_pages_source *s,
                                  struct us_err *err) {
  for (uint32_t n = 0; n < p->rows; n++) {
    uint32_t row;
    const struct us_matrix *w = us_pages_source_row(s, n, &row);
    size_t at = ((size_t)row * w->cols + s->first_col) / US_MXFP4_GROUP;
    const uint8_t *bytes = (const uint8_t *)w->scales + at;
    if (largest_byte(bytes, p->cols / US_MXFP4_GROUP) <= US_PAGES_SCALE_MOST) continue;
    uint32_t group = 0;
    while (bytes[group] <= US_PAGES_SCALE_MOST) group++;
    return us_err_set(err, US_ERR_INPUT,
                      "scale byte %u at row %u, column %u (at most %d: weights below 2^65)", bytes[group],
                      row, s->first_col + group * US_MXFP4_GROUP, US_PAGES_SCALE_MOST);
  }
  return US_OK;
}

static enum us_status check_floats(const struct us_pages *p, const struct us_pages_source *s,
                                   struct us_err *err) {
  for (uint32_t n = 0; n < p->rows; n += 16)
    for (uint32_t k = 0; k < p->cols; k += 32) {
      float scale = us_f32_from_bits(us_pages_source_scale(s, n, k));
      if (isfinite(scale * US_PAGES_FP8_SCALE)) continue;
      uint32_t row;
      us_pages_source_row(s, n, &row);
      return us_err_set(err, US_ERR_INPUT, "FP8 scale %g at row %u, column %u (must be below 2^72)",
                        (double)scale, row, s->first_col + k);
    }
  return US_OK;
}

enum us_status us_pages_scales_check(const struct us_pages *p, const struct us_pages_source *s,
                                     struct us_err *err) {
  if (p->format == US_FORMAT_MXFP4) return check_bytes(p, s, err);
  return p->format == US_FORMAT_FP8 ? check_floats(p, s, err) : US_OK;
}

enum us_status us_pages_pack(const struct us_pages *p, const struct us_pages_source *s, void *pages,
                             struct us_err *err) {
  enum us_status status = us_pages_source_check(p, s, err);
  if (status == US_OK) status = us_pages_scales_check(p, s, err);
  if (status != US_OK) return status;
  uint32_t words = us_pages_chunks(p) * 4, code_bytes = us_pages_code_bytes(p);
  uint8_t *out = pages;
  for (uint64_t page = 0; page < us_pages_count(p); page++, out += us_pages_page_bytes(p)) {
    for (uint32_t lane = 0; lane < US_PAGES_LANES; lane++)
      for (uint32_t word = 0; word < words; word++) {
        uint32_t value = us_pages_gather(p, s, page, lane, word);
        memcpy(out + us_pages_word_offset(lane, word), &value, sizeof value);
      }
    for (uint32_t i = 0; i < us_pages_tail_bytes(p); i++)
      out[code_bytes + i] = us_pages_gather_tail(p, s, page, i);
  }
  return US_OK;
}

/* The bits of one weight: from place to place, not by way of us_pages_gather, so that one checks the other. */
static uint32_t take(const struct us_pages *p, const uint8_t *page, const struct us_pages_place *at) {
  uint32_t words = us_pages_fragment_words(p->format), sub = at->reg * words / 4, value;
  if (words == 8) sub = at->reg * 2 + at->half;
  memcpy(&value, page + us_pages_word_offset(at->lane, at->fragment * words + sub), sizeof value);
  if (words == 8) return value;
  if (words == 2) value = at->reg % 2 ? value ^ value << 4 : value << 12 | value >> 20;
  bool crossed = words == 1 && at->reg == 3; /* its bits lie in the other half */
  value = value >> 16 * (crossed ? 1 - at->half : at->half) & 0xffffu;
  if (words == 4) return value;
  if (words == 2) return (value >> 8 & 0x80u) | (value >> 4 & 0x7fu);
  static const uint8_t bit[4][4] = {{6, 7, 8, 15}, {3, 4, 5, 12}, {0, 1, 2, 9}, {14, 10, 11, 13}};
  uint32_t code = 0;
  for (uint32_t i = 0; i < 4; i++) code |= (value >> bit[at->reg][i] & 1u) << i;
  return code;
}

static void put(enum us_format format, void *data, size_t at, uint32_t code) {
  if (format == US_FORMAT_F32) ((uint32_t *)data)[at] = code;
  if (format == US_FORMAT_BF16) ((uint16_t *)data)[at] = (uint16_t)code;
  if (format == US_FORMAT_FP8) ((uint8_t *)data)[at] = (uint8_t)code;
  if (format != US_FORMAT_MXFP4) return;
  uint8_t *byte = (uint8_t *)data + at / 2;
  *byte = (uint8_t)(at % 2 ? (*byte & 15u) | code << 4 : code);
}

static void unpack_scale(const struct us_pages *p, const uint8_t *page, uint32_t n, uint32_t k,
                         void *scales) {
  const uint8_t *from = page + us_pages_scale_offset(p, n % p->tile_rows, k % p->slice_cols);
  if (p->format == US_FORMAT_MXFP4 && k % US_MXFP4_GROUP == 0)
    ((uint8_t *)scales)[((size_t)n * p->cols + k) / US_MXFP4_GROUP] = (uint8_t)(*from - US_PAGES_MXFP4_SCALE);
  uint32_t quads = us_pages_scale_quads(p), slice = k / p->slice_cols, within = k % p->slice_cols;
  if (p->format == US_FORMAT_FP8 && n % 16 == 0 && within % US_FP8_BLOCK == 0) {
    float scale;
    memcpy(&scale, from, sizeof scale);
    ((float *)scales)[((size_t)(n / 16) * us_pages_slices(p) + slice) * quads + within / US_FP8_BLOCK] =
        scale / US_PAGES_FP8_SCALE;
  }
}

void us_pages_unpack(const struct us_pages *p, const void *pages, void *data, void *opt_scales) {
  for (uint32_t n = 0; n < p->rows; n++)
    for (uint32_t k = 0; k < p->cols; k++) {
      struct us_pages_place at = us_pages_place(p, n, k);
      const uint8_t *page = (const uint8_t *)pages + at.page * us_pages_page_bytes(p);
      put(p->format, data, (size_t)n * p->cols + k, take(p, page, &at));
      if (opt_scales) unpack_scale(p, page, n, k, opt_scales);
    }
}
