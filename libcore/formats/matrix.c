/* matrix.c: one door to the formats: sizes, decode, encode, fake-quantization, check. */
#include "formats/matrix.h"

static const char *const format_names[US_FORMAT_COUNT] = {
    [US_FORMAT_NONE] = "none", [US_FORMAT_F32] = "f32",     [US_FORMAT_BF16] = "bf16",
    [US_FORMAT_FP8] = "fp8",   [US_FORMAT_MXFP4] = "mxfp4",
};

const char *us_format_name(enum us_format format) {
  return (unsigned)format < US_FORMAT_COUNT ? format_names[format] : "none";
}

enum us_format us_format_parse(const char *name) {
  for (int format = US_FORMAT_F32; format < US_FORMAT_COUNT; format++)
    if (strcmp(name, format_names[format]) == 0) return (enum us_format)format;
  return US_FORMAT_NONE;
}

size_t us_matrix_scale_rows(const struct us_matrix *w) {
  return us_fp8_scale_rows(w->rows, w->scale_chunk_rows);
}

size_t us_matrix_data_bytes(enum us_format format, size_t rows, size_t cols) {
  switch (format) {
  case US_FORMAT_F32:
    return rows * cols * 4;
  case US_FORMAT_BF16:
    return rows * cols * 2;
  case US_FORMAT_FP8:
    return rows * cols;
  case US_FORMAT_MXFP4:
    return rows * (cols / 2);
  default:
    return 0;
  }
}

size_t us_matrix_scale_bytes(enum us_format format, size_t rows, size_t cols, size_t scale_chunk_rows) {
  if (format == US_FORMAT_MXFP4) return rows * (cols / US_MXFP4_GROUP);
  if (format != US_FORMAT_FP8) return 0;
  return us_fp8_scale_rows(rows, scale_chunk_rows) * ((cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK) *
         sizeof(float);
}

void us_matrix_decode_row(const struct us_matrix *w, size_t row, float *values) {
  size_t K = w->cols;
  switch (w->format) {
  case US_FORMAT_F32:
    memcpy(values, (const float *)w->data + row * K, K * sizeof *values);
    break;
  case US_FORMAT_BF16:
    us_bf16_decode((const uint16_t *)w->data + row * K, K, values);
    break;
  case US_FORMAT_FP8: {
    size_t scale_cols = (K + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
    const float *scales = (const float *)w->scales + us_matrix_scale_row(w, row) * scale_cols;
    us_fp8_decode((const uint8_t *)w->data + row * K, scales, K, values);
    break;
  }
  case US_FORMAT_MXFP4:
    us_mxfp4_decode((const uint8_t *)w->data + row * (K / 2),
                    (const uint8_t *)w->scales + row * (K / US_MXFP4_GROUP), K, values);
    break;
  default:
    break;
  }
}

void us_matrix_decode(const struct us_matrix *w, float *values) {
  for (size_t row = 0; row < w->rows; row++) us_matrix_decode_row(w, row, values + row * w->cols);
}

enum us_status us_matrix_encoding_check(const struct us_matrix_encoding *encoding, size_t cols,
                                        struct us_err *err) {
  if (encoding->format <= US_FORMAT_NONE || encoding->format >= US_FORMAT_COUNT)
    return us_err_set(err, US_ERR_USAGE, "format %d cannot be encoded", (int)encoding->format);
  if (encoding->format == US_FORMAT_MXFP4) {
    if (!us_scale_rule_name(encoding->scale_rule))
      return us_err_set(err, US_ERR_USAGE, "scale rule %d", (int)encoding->scale_rule);
    if (cols % US_MXFP4_GROUP)
      return us_err_set(err, US_ERR_USAGE, "%zu columns: MXFP4 wants a multiple of 32", cols);
  }
  if (encoding->format == US_FORMAT_FP8 && !us_fp8_scale_name(encoding->fp8_scale))
    return us_err_set(err, US_ERR_USAGE, "FP8 scale kind %d", (int)encoding->fp8_scale);
  return US_OK;
}

size_t us_matrix_row_grain(const struct us_matrix_encoding *encoding) {
  if (encoding->format != US_FORMAT_FP8) return 1;
  return encoding->scale_chunk_rows ? encoding->scale_chunk_rows : US_FP8_BLOCK;
}

static enum us_status refuse_nonfinite(float value, size_t row, size_t col, struct us_err *err) {
  return us_err_set(err, US_ERR_INPUT, "row %zu, column %zu is %s", row, col, value != value ? "NaN" : "Inf");
}

/* Index of the first NaN or Inf of a row; K if there is none. */
static size_t first_nonfinite(const float *values, size_t K) {
  uint32_t largest = 0;
  for (size_t i = 0; i < K; i++) {
    uint32_t magnitude = us_f32_bits(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest < 0x7f800000u) return K;
  size_t i = 0;
  while ((us_f32_bits(values[i]) & 0x7fffffffu) < 0x7f800000u) i++;
  return i;
}

/* One row of any format but FP8, whose blocks span rows. codes and scales are the row's. */
static enum us_status encode_row(const float *values, size_t row, size_t K,
                                 const struct us_matrix_encoding *encoding, void *codes, void *scales,
                                 struct us_err *err) {
  if (encoding->format == US_FORMAT_MXFP4 &&
      us_mxfp4_encode(values, K, encoding->scale_rule, codes, scales, NULL) == US_OK)
    return US_OK;
  size_t bad = first_nonfinite(values, K);
  if (bad < K) return refuse_nonfinite(values[bad], row, bad, err);
  if (encoding->format == US_FORMAT_BF16)
    us_bf16_encode(values, K, codes);
  else
    memcpy(codes, values, K * sizeof *values);
  return US_OK;
}

enum us_status us_matrix_encode(const float *values, size_t rows, size_t cols,
                                const struct us_matrix_encoding *encoding, void *data, void *scales,
                                struct us_err *err) {
  enum us_status status = us_matrix_encoding_check(encoding, cols, err);
  if (status != US_OK) return status;
  if (encoding->format == US_FORMAT_FP8)
    return us_fp8_encode(values, rows, cols, encoding->scale_chunk_rows, encoding->fp8_scale, data, scales,
                         err);
  size_t row_bytes = us_matrix_data_bytes(encoding->format, 1, cols);
  size_t row_scales = us_matrix_scale_bytes(encoding->format, 1, cols, 0);
  for (size_t row = 0; row < rows && status == US_OK; row++)
    status = encode_row(values + row * cols, row, cols, encoding, (uint8_t *)data + row * row_bytes,
                        row_scales ? (uint8_t *)scales + row * row_scales : NULL, err);
  return status;
}

/* FP8 by tile: encode, then decode over the values just read, so that out may be the input. */
static enum us_status fake_quant_fp8(const float *values, size_t rows, size_t cols,
                                     const struct us_matrix_encoding *encoding, float *out,
                                     struct us_err *err) {
  uint8_t codes[US_FP8_BLOCK * US_FP8_BLOCK];
  size_t chunk = encoding->scale_chunk_rows ? encoding->scale_chunk_rows : rows, height;
  for (size_t row = 0; row < rows; row += height) {
    size_t left = chunk - row % chunk;
    height = left < US_FP8_BLOCK ? left : US_FP8_BLOCK;
    if (height > rows - row) height = rows - row;
    for (size_t col = 0; col < cols; col += US_FP8_BLOCK) {
      size_t width = cols - col < US_FP8_BLOCK ? cols - col : US_FP8_BLOCK, r = 0, c = 0;
      const float *tile = values + row * cols + col;
      float scale;
      if (us_fp8_encode_block(tile, cols, height, width, encoding->fp8_scale, codes, width, &scale, &r, &c) !=
          US_OK)
        return refuse_nonfinite(tile[r * cols + c], row + r, col + c, err);
      for (r = 0; r < height; r++)
        us_fp8_decode(codes + r * width, &scale, width, out + (row + r) * cols + col);
    }
  }
  return US_OK;
}

/* Other formats by pieces of a row. */
static enum us_status fake_quant_row(const float *values, size_t row, size_t K,
                                     const struct us_matrix_encoding *encoding, float *out,
                                     struct us_err *err) {
  enum { PIECE = 2048 };
  uint8_t codes[PIECE * sizeof(float)] __attribute__((aligned(16))), scales[PIECE / US_MXFP4_GROUP];
  for (size_t begin = 0; begin < K; begin += PIECE) {
    size_t n = K - begin < PIECE ? K - begin : PIECE;
    if (encode_row(values + begin, row, n, encoding, codes, scales, NULL) != US_OK) {
      size_t bad = begin + first_nonfinite(values + begin, n);
      return refuse_nonfinite(values[bad], row, bad, err);
    }
    struct us_matrix piece = {
        .format = encoding->format, .rows = 1, .cols = n, .data = codes, .scales = scales};
    us_matrix_decode_row(&piece, 0, out + begin);
  }
  return US_OK;
}

enum us_status us_matrix_fake_quant(const float *values, size_t rows, size_t cols,
                                    const struct us_matrix_encoding *encoding, float *out,
                                    struct us_err *err) {
  enum us_status status = us_matrix_encoding_check(encoding, cols, err);
  if (status != US_OK) return status;
  if (encoding->format == US_FORMAT_FP8) return fake_quant_fp8(values, rows, cols, encoding, out, err);
  for (size_t row = 0; row < rows && status == US_OK; row++)
    status = fake_quant_row(values + row * cols, row, cols, encoding, out + row * cols, err);
  return status;
}

static enum us_status check_bf16_row(const uint16_t *halves, size_t row, size_t K, struct us_err *err) {
  unsigned bad = 0;
  for (size_t i = 0; i < K; i++) bad |= (halves[i] & 0x7f80u) == 0x7f80u;
  for (size_t i = 0; bad && i < K; i++)
    if ((halves[i] & 0x7f80u) == 0x7f80u) return refuse_nonfinite(us_bf16_to_f32(halves[i]), row, i, err);
  return US_OK;
}

static enum us_status check_row(const struct us_matrix *w, size_t row, struct us_err *err) {
  size_t K = w->cols;
  if (w->format == US_FORMAT_BF16) return check_bf16_row((const uint16_t *)w->data + row * K, row, K, err);
  if (w->format == US_FORMAT_F32) {
    const float *values = (const float *)w->data + row * K;
    size_t bad = first_nonfinite(values, K);
    return bad < K ? refuse_nonfinite(values[bad], row, bad, err) : US_OK;
  }
  if (us_mxfp4_check((const uint8_t *)w->data + row * (K / 2),
                     (const uint8_t *)w->scales + row * (K / US_MXFP4_GROUP), K, err) == US_OK)
    return US_OK;
  us_err_prefix(err, "row %zu", row);
  return US_ERR_INPUT;
}

enum us_status us_matrix_check(const struct us_matrix *w, struct us_err *err) {
  if (w->format == US_FORMAT_NONE) return US_OK;
  if (w->format == US_FORMAT_FP8)
    return us_fp8_check(w->data, w->scales, w->rows, w->cols, w->scale_chunk_rows, err);
  enum us_status status = US_OK;
  for (size_t row = 0; row < w->rows && status == US_OK; row++) status = check_row(w, row, err);
  return status;
}
