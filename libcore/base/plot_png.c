/* plot_png.c: write pixels as a PNG file with text chunks. */
#include "base/plot_png.h"

#include "base/atomic.h"
#include <png.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEXTS 4

/* libpng reports an error by a long jump; what must survive it lives here, not on the stack of encode(). */
struct encoder {
  int fd;
  uint64_t written;
  uint8_t *row;
  png_structp png;
  png_infop info;
  struct us_err *err;
  const char *path;
};

static void on_error(png_structp png, png_const_charp message) {
  struct encoder *encoder = png_get_error_ptr(png);
  if (encoder->err->status == US_OK)
    us_err_set(encoder->err, US_ERR_IO, "%s: libpng: %s", encoder->path, message);
  png_longjmp(png, 1);
}

static void on_warning(png_structp png, png_const_charp message) {}

static void on_write(png_structp png, png_bytep data, size_t size) {
  struct encoder *encoder = png_get_io_ptr(png);
  if (!us_atomic_write(encoder->fd, data, size, encoder->written)) {
    us_err_errno(encoder->err, US_ERR_IO, "%s: cannot write", encoder->path);
    png_error(png, "write");
  }
  encoder->written += size;
}

static void on_flush(png_structp png) {}

static void put_texts(struct encoder *encoder, const struct us_plot_text *texts, int text_count) {
  png_text chunks[MAX_TEXTS];
  int used = 0;
  for (int i = 0; i < text_count && used < MAX_TEXTS; i++) {
    if (!texts[i].value) continue;
    png_text *chunk = &chunks[used++];
    memset(chunk, 0, sizeof *chunk);
    chunk->compression = PNG_ITXT_COMPRESSION_NONE; /* UTF-8, and readable with strings(1) */
    chunk->key = (png_charp)(uintptr_t)texts[i].key;
    chunk->text = (png_charp)(uintptr_t)texts[i].value;
    chunk->itxt_length = strlen(texts[i].value);
  }
  if (used) png_set_text(encoder->png, encoder->info, chunks, used);
}

static bool encode(struct encoder *encoder, int width, int height, size_t stride, const uint8_t *pixels,
                   const struct us_plot_text *texts, int text_count) {
  if (setjmp(png_jmpbuf(encoder->png))) return false;
  png_set_write_fn(encoder->png, encoder, on_write, on_flush);
  png_set_IHDR(encoder->png, encoder->info, (png_uint_32)width, (png_uint_32)height, 8, PNG_COLOR_TYPE_RGB,
               PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  put_texts(encoder, texts, text_count);
  png_write_info(encoder->png, encoder->info);
  for (int y = 0; y < height; y++) {
    const uint8_t *from = pixels + (size_t)y * stride;
    for (int x = 0; x < width; x++) {
      uint32_t argb;
      memcpy(&argb, from + 4 * (size_t)x, sizeof argb);
      for (int c = 0; c < 3; c++) encoder->row[3 * (size_t)x + (size_t)c] = (uint8_t)(argb >> (16 - 8 * c));
    }
    png_write_row(encoder->png, encoder->row);
  }
  png_write_end(encoder->png, encoder->info);
  return true;
}

enum us_status us_plot_png_write(const char *path, int width, int height, size_t stride,
                                 const uint8_t *pixels, const struct us_plot_text *texts, int text_count,
                                 struct us_err *err) {
  struct us_err own = {0};
  struct us_atomic out;
  enum us_status status = us_atomic_open(path, &out, err);
  if (status != US_OK) return status;
  struct encoder encoder = {.fd = out.fd, .path = path, .err = &own};
  encoder.row = malloc(3 * (size_t)width);
  encoder.png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &encoder, on_error, on_warning);
  if (encoder.png) encoder.info = png_create_info_struct(encoder.png);
  if (!encoder.row || !encoder.info)
    us_err_memory(&own, "a PNG row", 3 * (unsigned long long)width);
  else
    encode(&encoder, width, height, stride, pixels, texts, text_count);
  png_destroy_write_struct(&encoder.png, &encoder.info);
  free(encoder.row);
  if (own.status == US_OK) return us_atomic_commit(&out, err);
  us_atomic_abandon(&out);
  return us_err_set(err, own.status, "%s", own.message);
}
