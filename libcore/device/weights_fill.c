/* weights_fill.c: source rows of a piece: copied from the model, or made on the GPU. */
#include "device/weights_fill.h"

#include "device/device.h"
#include "kernels/pages/pages_gpu.h"

#include <string.h>

/* A gather's rows that lie in the stage. */
struct part {
  const struct us_matrix *w;
  uint32_t first, rows; /* of the matrix */
  uint32_t at;          /* row in the stage */
};

/* The part of gather `index` of source `source`; rows 0 if there is none. */
static struct part part_of(const struct us_weights_item *item, const struct us_weights_stage *stage,
                           uint32_t source, uint32_t index) {
  const struct us_weights_gather *g = &item->gather[(size_t)source * item->gathers];
  uint32_t before = 0, end = stage->row + stage->rows;
  for (uint32_t i = 0; i < index; i++) before += g[i].rows;
  uint32_t from = before > stage->row ? before : stage->row;
  uint32_t to = before + g[index].rows < end ? before + g[index].rows : end;
  struct part none = {g[index].w, 0, 0, 0};
  if (from >= to) return none;
  return (struct part){g[index].w, g[index].first + from - before, to - from, from - stage->row};
}

/* ---- from a checkpoint ------------------------------------------------------------------------------------------- */

/* rows x bytes from one pitch to another; one copy where both are the same. */
static void copy_rows(uint8_t *to, const uint8_t *from, size_t bytes, size_t from_pitch, uint32_t rows) {
  if (bytes == from_pitch) {
    memcpy(to, from, bytes * rows);
    return;
  }
  for (uint32_t n = 0; n < rows; n++) memcpy(to + n * bytes, from + n * from_pitch, bytes);
}

static void copy_scales(const struct us_weights_stage *stage, const struct part *p, uint32_t first_col,
                        uint8_t *to) {
  const uint8_t *scales = p->w->scales;
  if (p->w->format == US_FORMAT_MXFP4) {
    size_t bytes = stage->cols / US_MXFP4_GROUP, pitch = p->w->cols / US_MXFP4_GROUP;
    copy_rows(to + p->at * bytes, scales + p->first * pitch + first_col / US_MXFP4_GROUP, bytes, pitch,
              p->rows);
  }
  size_t blocks = (stage->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK,
         all = (p->w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  for (uint32_t n = 0; p->w->format == US_FORMAT_FP8 && n < p->rows; n += US_WEIGHTS_FP8_ROWS)
    memcpy(to + (p->at + n) / US_WEIGHTS_FP8_ROWS * blocks * sizeof(float),
           scales +
               (us_matrix_scale_row(p->w, p->first + n) * all + first_col / US_FP8_BLOCK) * sizeof(float),
           blocks * sizeof(float));
}

/* Whether pages can hold the part's scales, of exactly the window's columns. */
static enum us_status check_scales(const struct us_weights_item *item, const struct part *p,
                                   struct us_err *err) {
  struct us_pages pages = item->pages;
  pages.rows = p->rows;
  struct us_pages_source source = {.matrices = 1, .first_row = p->first, .first_col = item->first_col};
  source.w[0] = *p->w;
  return us_pages_scales_check(&pages, &source, err);
}

static enum us_status copy_part(const struct us_weights_item *item, const struct us_weights_stage *stage,
                                const struct part *p, uint8_t *data, uint8_t *scales, struct us_err *err) {
  enum us_status status = check_scales(item, p, err);
  if (status != US_OK) return status;
  uint32_t first_col = item->first_col - stage->lead;
  size_t row_bytes = us_matrix_data_bytes(p->w->format, 1, stage->cols);
  size_t pitch = us_matrix_data_bytes(p->w->format, 1, p->w->cols);
  const uint8_t *from = (const uint8_t *)p->w->data + p->first * pitch;
  copy_rows(data + p->at * row_bytes, from + us_matrix_data_bytes(p->w->format, 1, first_col), row_bytes,
            pitch, p->rows);
  copy_scales(stage, p, first_col, scales);
  return US_OK;
}

enum us_status us_weights_copy(const struct us_weights_item *item, const struct us_weights_piece *piece,
                               const struct us_weights_stage *stage, uint8_t *host, struct us_err *err) {
  for (uint32_t i = 0; i < piece->count * item->matrices; i++) {
    uint8_t *data = host + stage->sources_at + i * stage->stride,
            *scales = data + us_weights_align(stage->data_bytes);
    uint32_t source = piece->first * item->matrices + i;
    for (uint32_t j = 0; j < item->gathers; j++) {
      struct part p = part_of(item, stage, source, j);
      if (!p.rows) continue;
      enum us_status status = copy_part(item, stage, &p, data, scales, err);
      if (status == US_OK) continue;
      const char *which = item->matrices == 1 ? "" : i % 2 ? ".up" : ".gate";
      return item->count > 1
                 ? us_err_prefix(err, "%s, expert %u%s", item->name, source / item->matrices, which)
                 : us_err_prefix(err, "%s%s", item->name, which);
    }
  }
  return US_OK;
}

/* ---- synthetic --------------------------------------------------------------------------------------------------- */

void us_weights_inits(const struct us_weights_item *item, const struct us_weights_piece *piece,
                      const struct us_weights_stage *stage, uint8_t *host) {
  uint32_t sources = piece->count * item->matrices;
  struct us_init *inits = (struct us_init *)(void *)(host + stage->inits);
  for (uint32_t j = 0; j < item->gathers; j++)
    for (uint32_t i = 0; i < sources; i++) {
      uint32_t source = piece->first * item->matrices + i;
      inits[j * sources + i] = *(const struct us_init *)item->gather[source * item->gathers + j].w->data;
    }
}

enum us_status us_weights_make(const struct us_weights_item *item, const struct us_weights_piece *piece,
                               const struct us_weights_stage *stage, uint8_t *device, cudaStream_t stream,
                               struct us_err *err) {
  uint32_t sources = piece->count * item->matrices;
  const struct us_init *inits = (const struct us_init *)(const void *)(device + stage->inits);
  size_t row_bytes = us_matrix_data_bytes(item->pages.format, 1, stage->cols);
  bool fp8 = item->pages.format == US_FORMAT_FP8;
  size_t scale_bytes =
      fp8 ? (stage->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK * sizeof(float) : stage->cols / US_MXFP4_GROUP;
  for (uint32_t j = 0; j < item->gathers; j++) {
    struct part p = part_of(item, stage, piece->first * item->matrices, j);
    if (!p.rows) continue;
    uint8_t *data = device + stage->sources_at, *scales = data + us_weights_align(stage->data_bytes);
    struct us_synthetic s = {.format = item->pages.format,
                             .rows = (uint32_t)p.w->rows,
                             .cols = (uint32_t)p.w->cols,
                             .scale_chunk_rows = (uint32_t)p.w->scale_chunk_rows,
                             .first_row = p.first,
                             .window_rows = p.rows,
                             .first_col = item->first_col - stage->lead,
                             .window_cols = stage->cols,
                             .scale_rows = US_WEIGHTS_FP8_ROWS,
                             .data_stride = stage->stride,
                             .scale_stride = stage->stride};
    cudaError_t error =
        us_synthetic_window_gpu(&s, inits + j * sources, sources, data + p.at * row_bytes,
                                scales + p.at / (fp8 ? US_WEIGHTS_FP8_ROWS : 1) * scale_bytes, stream);
    if (error != cudaSuccess) return us_cuda_status(error, item->name, err);
  }
  return US_OK;
}
