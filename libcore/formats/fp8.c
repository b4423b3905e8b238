/* fp8.c: encode, decode and check FP8 E4M3 matrices with one scale a 128 x 128 block. */
#include "formats/fp8.h"

static const char *const scale_names[US_FP8_SCALE_COUNT] = {
    [US_FP8_SCALE_F32] = "f32",
    [US_FP8_SCALE_UE8M0] = "ue8m0",
};

const char *us_fp8_scale_name(enum us_fp8_scale kind) {
  return (unsigned)kind < US_FP8_SCALE_COUNT ? scale_names[kind] : NULL;
}

enum us_status us_fp8_scale_parse(const char *name, enum us_fp8_scale *ret_kind, struct us_err *err) {
  for (int kind = 0; kind < US_FP8_SCALE_COUNT; kind++) {
    if (strcmp(name, scale_names[kind]) != 0) continue;
    *ret_kind = (enum us_fp8_scale)kind;
    return US_OK;
  }
  return us_err_set(err, US_ERR_USAGE, "unknown FP8 scale '%s' (f32, ue8m0)", name);
}

/* Largest magnitude of a row piece as bits: NaN and Inf compare above every finite value. */
static uint32_t row_max_bits(const float *values, size_t n) {
  int32_t largest = 0;
  for (size_t i = 0; i < n; i++) {
    int32_t magnitude = (int32_t)(us_f32_bits(values[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return (uint32_t)largest;
}

static size_t first_nonfinite(const float *values, size_t n) {
  size_t i = 0;
  while (i < n && (us_f32_bits(values[i]) & 0x7fffffffu) < 0x7f800000u) i++;
  return i;
}

enum us_status us_fp8_encode_block(const float *values, size_t stride, size_t rows, size_t cols,
                                   enum us_fp8_scale kind, uint8_t *codes, size_t code_stride, float *scale,
                                   size_t *opt_bad_row, size_t *opt_bad_col) {
  uint32_t max_bits = 0;
  for (size_t r = 0; r < rows; r++) {
    uint32_t row_bits = row_max_bits(values + r * stride, cols);
    if (row_bits >= 0x7f800000u) {
      if (opt_bad_row) *opt_bad_row = r;
      if (opt_bad_col) *opt_bad_col = first_nonfinite(values + r * stride, cols);
      return US_ERR_INPUT;
    }
    max_bits = row_bits > max_bits ? row_bits : max_bits;
  }
  float s = us_fp8_block_scale(us_f32_from_bits(max_bits), kind);
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < cols; c++)
      codes[r * code_stride + c] = us_fp8_from_f32(values[r * stride + c] / s);
  *scale = s;
  return US_OK;
}

enum us_status us_fp8_encode(const float *values, size_t rows, size_t cols, size_t chunk_rows,
                             enum us_fp8_scale kind, uint8_t *codes, float *scales, struct us_err *err) {
  size_t chunk = chunk_rows ? chunk_rows : rows;
  size_t scale_cols = (cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  for (size_t row = 0; row < rows;) {
    size_t left = chunk - row % chunk; /* a block stops at its chunk's end */
    size_t height = left < US_FP8_BLOCK ? left : US_FP8_BLOCK;
    if (height > rows - row) height = rows - row;
    for (size_t col = 0; col < cols; col += US_FP8_BLOCK) {
      size_t width = cols - col < US_FP8_BLOCK ? cols - col : US_FP8_BLOCK, r = 0, c = 0;
      size_t at = row * cols + col;
      if (us_fp8_encode_block(values + at, cols, height, width, kind, codes + at, cols,
                              scales + col / US_FP8_BLOCK, &r, &c) != US_OK) {
        float bad = values[(row + r) * cols + col + c];
        return us_err_set(err, US_ERR_INPUT, "row %zu, column %zu is %s", row + r, col + c,
                          bad != bad ? "NaN" : "Inf");
      }
    }
    row += height;
    scales += scale_cols;
  }
  return US_OK;
}

void us_fp8_decode(const uint8_t *codes, const float *scales, size_t n, float *values) {
  for (size_t begin = 0; begin < n; begin += US_FP8_BLOCK) {
    size_t end = n - begin < US_FP8_BLOCK ? n : begin + US_FP8_BLOCK;
    float scale = scales[begin / US_FP8_BLOCK];
    for (size_t i = begin; i < end; i++) values[i] = us_fp8_to_f32(codes[i]) * scale;
  }
}

/* First column of a row that holds NaN, or whose value overflows FP32; cols if there is none. */
static size_t first_bad(const uint8_t *codes, const float *scales, size_t cols) {
  unsigned suspect = 0;
  for (size_t c = 0; c < cols; c++) suspect |= (codes[c] & 0x7fu) == 0x7fu;
  for (size_t b = 0; b < (cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK; b++) suspect |= scales[b] > 0x1p119f;
  size_t c = suspect ? 0 : cols;
  while (c < cols && first_nonfinite(&(float){us_fp8_to_f32(codes[c]) * scales[c / US_FP8_BLOCK]}, 1)) c++;
  return c;
}

enum us_status us_fp8_check(const uint8_t *codes, const float *scales, size_t rows, size_t cols,
                            size_t chunk_rows, struct us_err *err) {
  size_t scale_rows = us_fp8_scale_rows(rows, chunk_rows),
         scale_cols = (cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  for (size_t i = 0; i < scale_rows * scale_cols; i++)
    if (!(scales[i] > 0) || us_f32_bits(scales[i]) >= 0x7f800000u)
      return us_err_set(err, US_ERR_INPUT,
                        "scale %g at row %zu, column %zu of the scale grid is not finite and positive",
                        (double)scales[i], i / scale_cols, i % scale_cols);
  size_t chunk = chunk_rows ? chunk_rows : rows, per_chunk = us_fp8_scale_rows(chunk_rows, 0);
  for (size_t row = 0; row < rows; row++) {
    size_t scale_row = row / chunk * per_chunk + row % chunk / US_FP8_BLOCK;
    const uint8_t *code = codes + row * cols;
    size_t c = first_bad(code, scales + scale_row * scale_cols, cols);
    if (c < cols)
      return us_err_set(err, US_ERR_INPUT, "code 0x%02x at row %zu, column %zu %s", code[c], row, c,
                        (code[c] & 0x7fu) == 0x7fu ? "is NaN" : "overflows FP32 with its scale");
  }
  return US_OK;
}
