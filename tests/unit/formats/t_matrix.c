/* t_matrix: one door to the formats: fake-quantization equals the stored file, rows can be cut, bad values
 * are named. */
#include "formats/matrix.h"

#include "gauss.h"
#include "suite.h"

#include <math.h>

static const struct us_matrix_encoding encodings[] = {
    {.format = US_FORMAT_F32},
    {.format = US_FORMAT_BF16},
    {.format = US_FORMAT_FP8},
    {.format = US_FORMAT_FP8, .fp8_scale = US_FP8_SCALE_UE8M0},
    {.format = US_FORMAT_FP8, .scale_chunk_rows = 200},
    {.format = US_FORMAT_MXFP4},
    {.format = US_FORMAT_MXFP4, .scale_rule = US_SCALE_FLOOR},
    {.format = US_FORMAT_MXFP4, .scale_rule = US_SCALE_EVEN},
    {.format = US_FORMAT_MXFP4, .scale_rule = US_SCALE_RCEIL},
    {.format = US_FORMAT_MXFP4, .scale_rule = US_SCALE_R7_25},
};
#define ENCODINGS (sizeof encodings / sizeof *encodings)

struct stored {
  struct us_matrix w;
  uint8_t *data, *scales;
};

static struct stored store(const float *values, size_t rows, size_t cols,
                           const struct us_matrix_encoding *e) {
  struct stored s = {
      .w = {.format = e->format, .rows = rows, .cols = cols, .scale_chunk_rows = e->scale_chunk_rows}};
  struct us_err err = {0};
  s.w.data = s.data = malloc(us_matrix_data_bytes(e->format, rows, cols));
  s.w.scales = s.scales = malloc(us_matrix_scale_bytes(e->format, rows, cols, e->scale_chunk_rows) + 1);
  ck_assert_msg(us_matrix_encode(values, rows, cols, e, s.data, s.scales, &err) == US_OK, "%s", err.message);
  return s;
}

static void drop(struct stored *s) {
  free(s->data), free(s->scales);
}

static float *random_values(size_t n) {
  float *values = malloc(n * sizeof *values);
  uint64_t state = us_test_seed();
  test_gauss_bf16(&state, n, values);
  for (size_t i = 0; i < n; i += 3) values[i] *= 1.0009765f; /* FP32 masters are not bf16 */
  return values;
}

START_TEST(fake_quantization_is_decode_of_encode_bit_for_bit) {
  const size_t shapes[][2] = {{1, 32}, {300, 96}, {129, 4160}, {401, 160}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (size_t e = 0; e < ENCODINGS; e++) {
      size_t rows = shapes[i][0], cols = shapes[i][1], n = rows * cols;
      float *values = random_values(n), *fake = malloc(n * sizeof *fake),
            *loaded = malloc(n * sizeof *loaded);
      struct us_err err = {0};
      struct stored s = store(values, rows, cols, &encodings[e]);
      us_matrix_decode(&s.w, loaded);
      ck_assert_int_eq(us_matrix_fake_quant(values, rows, cols, &encodings[e], fake, &err), US_OK);
      ck_assert(memcmp(fake, loaded, n * sizeof *fake) == 0);
      ck_assert_int_eq(us_matrix_fake_quant(values, rows, cols, &encodings[e], values, &err),
                       US_OK); /* in place */
      ck_assert(memcmp(values, loaded, n * sizeof *fake) == 0);
      ck_assert_int_eq(us_matrix_check(&s.w, &err), US_OK);
      drop(&s);
      free(values), free(fake), free(loaded);
    }
}
END_TEST

START_TEST(rows_cut_at_the_grain_give_the_same_bytes) {
  enum { ROWS = 520, COLS = 160 };
  float *values = random_values(ROWS * COLS);
  for (size_t e = 0; e < ENCODINGS; e++) {
    struct stored whole = store(values, ROWS, COLS, &encodings[e]),
                  parts = store(values, ROWS, COLS, &encodings[e]);
    size_t grain = us_matrix_row_grain(&encodings[e]),
           data_bytes = us_matrix_data_bytes(encodings[e].format, ROWS, COLS);
    size_t chunk = encodings[e].scale_chunk_rows;
    memset(parts.data, 0xaa, data_bytes);
    for (size_t row = 0; row < ROWS; row += grain) {
      size_t n = ROWS - row < grain ? ROWS - row : grain;
      struct us_err err = {0};
      ck_assert_int_eq(
          us_matrix_encode(values + row * COLS, n, COLS, &encodings[e],
                           parts.data + us_matrix_data_bytes(encodings[e].format, row, COLS),
                           parts.scales + us_matrix_scale_bytes(encodings[e].format, row, COLS, chunk), &err),
          US_OK);
    }
    ck_assert(memcmp(whole.data, parts.data, data_bytes) == 0);
    ck_assert(memcmp(whole.scales, parts.scales,
                     us_matrix_scale_bytes(encodings[e].format, ROWS, COLS, chunk)) == 0);
    drop(&whole), drop(&parts);
  }
  free(values);
}
END_TEST

START_TEST(sizes_are_the_published_bits_a_weight) {
  /* MiMo-V2.5-Pro: an expert's gate of (2048, 6144) in MXFP4, a fused qkv of 216 x 48 scales in 27136 rows. */
  ck_assert_uint_eq(us_matrix_data_bytes(US_FORMAT_MXFP4, 2048, 6144), 2048u * 3072);
  ck_assert_uint_eq(us_matrix_scale_bytes(US_FORMAT_MXFP4, 2048, 6144, 0), 2048u * 192);
  ck_assert_uint_eq(us_matrix_data_bytes(US_FORMAT_FP8, 27136, 6144), 27136u * 6144);
  ck_assert_uint_eq(us_matrix_scale_bytes(US_FORMAT_FP8, 27136, 6144, 3392), 216u * 48 * 4);
  ck_assert_uint_eq(us_matrix_scale_bytes(US_FORMAT_FP8, 27136, 6144, 0), 212u * 48 * 4);
  ck_assert_uint_eq(us_matrix_data_bytes(US_FORMAT_BF16, 3, 5), 30);
  ck_assert_uint_eq(us_matrix_scale_bytes(US_FORMAT_BF16, 3, 5, 0), 0);
  ck_assert_uint_eq(us_matrix_data_bytes(US_FORMAT_F32, 3, 5), 60);
}
END_TEST

START_TEST(scale_rows_of_a_restarting_grid_follow_the_chunks) {
  struct us_matrix w = {.format = US_FORMAT_FP8, .rows = 27136, .cols = 128, .scale_chunk_rows = 3392};
  ck_assert_uint_eq(us_matrix_scale_rows(&w), 216);
  ck_assert_uint_eq(us_matrix_scale_row(&w, 3391), 26);
  ck_assert_uint_eq(us_matrix_scale_row(&w, 3392), 27);
  ck_assert_uint_eq(us_matrix_scale_row(&w, 27135), 215);
}
END_TEST

START_TEST(every_format_names_the_row_and_column_of_a_bad_value) {
  enum { ROWS = 3, COLS = 4128 };
  float *values = random_values(ROWS * COLS), *out = malloc(ROWS * COLS * sizeof *out);
  uint8_t *data = malloc(ROWS * COLS * 4), *scales = malloc(ROWS * COLS);
  values[2 * COLS + 4100] = NAN;
  for (size_t e = 0; e < ENCODINGS; e++) {
    struct us_err err = {0};
    ck_assert_int_eq(us_matrix_encode(values, ROWS, COLS, &encodings[e], data, scales, &err), US_ERR_INPUT);
    ck_assert_str_eq(err.message, "row 2, column 4100 is NaN");
    err.message[0] = 0;
    ck_assert_int_eq(us_matrix_fake_quant(values, ROWS, COLS, &encodings[e], out, &err), US_ERR_INPUT);
    ck_assert_str_eq(err.message, "row 2, column 4100 is NaN");
  }
  free(values), free(out), free(data), free(scales);
}
END_TEST

START_TEST(the_check_finds_a_bad_value_in_every_format) {
  enum { ROWS = 130, COLS = 64 };
  float *values = random_values(ROWS * COLS);
  const char *expected[] = {"row 129, column 63 is NaN", "row 129, column 63 is NaN",
                            "code 0x7f at row 129, column 63 is NaN"};
  for (size_t e = 0; e < 3; e++) {
    struct stored s = store(values, ROWS, COLS, &encodings[e]);
    struct us_err err = {0};
    memset(s.data + us_matrix_data_bytes(s.w.format, ROWS, COLS) -
               (e == 0   ? 4
                : e == 1 ? 2
                         : 1),
           0x7f,
           e == 0   ? 4
           : e == 1 ? 2
                    : 1);
    if (e < 2) s.data[us_matrix_data_bytes(s.w.format, ROWS, COLS) - 2] = 0xff;
    ck_assert_int_eq(us_matrix_check(&s.w, &err), US_ERR_INPUT);
    ck_assert_str_eq(err.message, expected[e]);
    drop(&s);
  }
  struct stored s = store(values, ROWS, COLS, &encodings[5]);
  struct us_err err = {0};
  s.scales[129 * 2 + 1] = 255;
  ck_assert_int_eq(us_matrix_check(&s.w, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "row 129: scale byte 255 is NaN (block 1)");
  drop(&s);
  free(values);
}
END_TEST

START_TEST(encodings_that_a_shape_cannot_have_are_refused) {
  struct us_err err = {0};
  float w[40] = {0};
  uint8_t data[160], scales[16];
  ck_assert_int_eq(us_matrix_encode(w, 1, 40, &encodings[5], data, scales, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "40 columns: MXFP4 wants a multiple of 32");
  struct us_matrix_encoding none = {0}, rule = {.format = US_FORMAT_MXFP4, .scale_rule = 9},
                            kind = {.format = US_FORMAT_FP8, .fp8_scale = 9};
  ck_assert_int_eq(us_matrix_encode(w, 1, 32, &none, data, scales, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_matrix_encode(w, 1, 32, &rule, data, scales, &err), US_ERR_USAGE);
  ck_assert_int_eq(us_matrix_encode(w, 1, 32, &kind, data, scales, &err), US_ERR_USAGE);
}
END_TEST

START_TEST(format_names_parse) {
  for (int f = US_FORMAT_F32; f < US_FORMAT_COUNT; f++)
    ck_assert_int_eq(us_format_parse(us_format_name((enum us_format)f)), f);
  ck_assert_int_eq(us_format_parse("none"), US_FORMAT_NONE);
  ck_assert_int_eq(us_format_parse("int4"), US_FORMAT_NONE);
  ck_assert_str_eq(us_format_name((enum us_format)99), "none");
}
END_TEST

/* An MXFP4 tile whose scale bytes span at most 14 is exact in FP8 with a power-of-two scale; 15 is not. */
START_TEST(mxfp4_tiles_up_to_a_span_of_14_are_exact_in_fp8) {
  enum { ROWS = 128, COLS = 128 };
  for (int span = 0; span < 16; span++) {
    uint8_t codes[ROWS * COLS / 2], scales[ROWS * COLS / 32];
    float *w = malloc(ROWS * COLS * sizeof *w), *fp8 = malloc(ROWS * COLS * sizeof *fp8);
    uint64_t state = us_test_seed();
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)test_next(&state);
    for (size_t i = 0; i < sizeof scales; i++)
      scales[i] = (uint8_t)(100 + (int)(test_next(&state) % (unsigned)(span + 1)));
    scales[0] = 100, scales[1] = (uint8_t)(100 + span);
    for (size_t i = 0; i < 16; i++)
      codes[i] = 0x31, codes[16 + i] = 0x77; /* .5 and 1.5 at the bottom, 6 on top */
    us_mxfp4_decode(codes, scales, ROWS * COLS, w);
    struct us_err err = {0};
    ck_assert_int_eq(us_matrix_fake_quant(w, ROWS, COLS, &encodings[3], fp8, &err), US_OK);
    ck_assert_int_eq(memcmp(w, fp8, ROWS * COLS * sizeof *w) == 0, span <= 14);
    free(w), free(fp8);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("matrix");
  tcase_add_test(c, fake_quantization_is_decode_of_encode_bit_for_bit);
  tcase_add_test(c, rows_cut_at_the_grain_give_the_same_bytes);
  tcase_add_test(c, sizes_are_the_published_bits_a_weight);
  tcase_add_test(c, scale_rows_of_a_restarting_grid_follow_the_chunks);
  tcase_add_test(c, every_format_names_the_row_and_column_of_a_bad_value);
  tcase_add_test(c, the_check_finds_a_bad_value_in_every_format);
  tcase_add_test(c, encodings_that_a_shape_cannot_have_are_refused);
  tcase_add_test(c, format_names_parse);
  tcase_add_test(c, mxfp4_tiles_up_to_a_span_of_14_are_exact_in_fp8);
  return us_suite("matrix", c);
}
US_TEST_MAIN(make_suite)
