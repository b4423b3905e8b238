/* t_quant_stats: every number of the report against a hand count or a plain definition over the decoded
 * matrix. */
#include "formats/quant_stats.h"

#include "gauss.h"
#include "suite.h"

#include <math.h>

struct stored {
  struct us_matrix w;
  uint8_t *data, *scales;
};

static struct stored store(const float *values, size_t rows, size_t cols, struct us_matrix_encoding e) {
  struct stored s = {
      .w = {.format = e.format, .rows = rows, .cols = cols, .scale_chunk_rows = e.scale_chunk_rows}};
  struct us_err err = {0};
  s.w.data = s.data = malloc(us_matrix_data_bytes(e.format, rows, cols));
  s.w.scales = s.scales = malloc(us_matrix_scale_bytes(e.format, rows, cols, e.scale_chunk_rows) + 1);
  ck_assert_msg(us_matrix_encode(values, rows, cols, &e, s.data, s.scales, &err) == US_OK, "%s", err.message);
  return s;
}

static struct us_quant_stats stats_of(const float *values, const struct us_matrix *w) {
  struct us_quant_stats stats;
  us_quant_stats_init(&stats);
  us_quant_stats_add(&stats, values, w, 0, w->rows);
  us_quant_stats_finish(&stats);
  return stats;
}

START_TEST(a_small_matrix_has_the_numbers_counted_by_hand) {
  /* Row 0: scale 1 (6): 7 is clipped to 6, 0.2 is zeroed, 3 is exact. Row 1: all zero. Row 2: scale 2^10. */
  float values[3 * 32] = {[0] = 7, [1] = 0.2f, [2] = 3, [64] = 6 * 1024.0f};
  struct stored s = store(
      values, 3, 32, (struct us_matrix_encoding){.format = US_FORMAT_MXFP4, .scale_rule = US_SCALE_FLOOR});
  struct us_quant_stats stats = stats_of(values, &s.w);
  ck_assert_uint_eq(stats.values, 96);
  ck_assert_uint_eq(stats.nonzero, 4);
  ck_assert_uint_eq(stats.zeroed, 1);
  ck_assert_uint_eq(stats.blocks, 3);
  ck_assert_uint_eq(stats.zero_blocks, 1);
  ck_assert_uint_eq(stats.clipped_blocks, 1);
  ck_assert_int_eq(stats.scale_min, 127);
  ck_assert_int_eq(stats.scale_max, 137);
  ck_assert_int_eq(stats.max_tile_span, 10);
  ck_assert_uint_eq(stats.bytes, 3 * 17);
  ck_assert_double_eq(stats.max_abs_error, 1);
  double signal = 49 + 0.2 * 0.2 + 9 + 6144.0 * 6144, noise = 1 + 0.2 * 0.2;
  ck_assert_double_eq_tol(stats.sqnr_db, 10 * log10(signal / noise), 1e-6);
  ck_assert_double_eq_tol(stats.relative_rmse, sqrt(noise / signal), 1e-9);
  ck_assert_double_eq_tol(stats.cosine, (42 + 9 + 6144.0 * 6144) / sqrt(signal * (36 + 9 + 6144.0 * 6144)),
                          1e-9);
  ck_assert_double_eq(stats.clipped_share, 1 / 3.0);
  ck_assert_double_eq(stats.zeroed_share, 0.25);
  free(s.data), free(s.scales);
}
END_TEST

START_TEST(sums_equal_a_plain_loop_over_the_decoded_matrix) {
  const struct us_matrix_encoding encodings[] = {{.format = US_FORMAT_BF16},
                                                 {.format = US_FORMAT_FP8},
                                                 {.format = US_FORMAT_FP8, .scale_chunk_rows = 72},
                                                 {.format = US_FORMAT_MXFP4}};
  enum { ROWS = 288, COLS = 352 };
  float *values = malloc(ROWS * COLS * sizeof *values), *after = malloc(ROWS * COLS * sizeof *after);
  uint64_t state = us_test_seed();
  test_gauss_bf16(&state, ROWS * COLS, values);
  for (size_t i = 0; i < ROWS * COLS; i += 2) values[i] *= 1.001f;
  for (size_t e = 0; e < 4; e++) {
    struct stored s = store(values, ROWS, COLS, encodings[e]);
    struct us_quant_stats stats = stats_of(values, &s.w);
    us_matrix_decode(&s.w, after);
    double signal = 0, noise = 0, worst = 0;
    uint64_t zeroed = 0;
    for (size_t i = 0; i < ROWS * COLS; i++) {
      double error = (double)after[i] - (double)values[i];
      signal += (double)values[i] * (double)values[i];
      noise += error * error;
      worst = fmax(worst, fabs(error));
      zeroed += values[i] != 0 && after[i] == 0;
    }
    ck_assert_double_eq_tol(stats.sqnr_db, 10 * log10(signal / noise), 1e-9);
    ck_assert_double_eq(stats.max_abs_error, worst);
    ck_assert_uint_eq(stats.zeroed, zeroed);
    const uint64_t blocks[] = {0, 3 * 3, 4 * 3, ROWS * COLS / 32};
    ck_assert_uint_eq(stats.blocks, blocks[e]);
    ck_assert_uint_eq(stats.bytes, us_matrix_data_bytes(s.w.format, ROWS, COLS) +
                                       us_matrix_scale_bytes(s.w.format, ROWS, COLS, s.w.scale_chunk_rows));
    free(s.data), free(s.scales);
  }
  free(values), free(after);
}
END_TEST

START_TEST(parts_merged_in_row_order_equal_one_pass) {
  enum { ROWS = 400, COLS = 160 };
  float *values = malloc(ROWS * COLS * sizeof *values);
  uint64_t state = us_test_seed();
  test_gauss_bf16(&state, ROWS * COLS, values);
  for (size_t i = 0; i < 5 * COLS; i++) values[i] = 0;
  for (size_t i = 300 * COLS; i < ROWS * COLS; i++) values[i] *= 64;
  const struct us_matrix_encoding encodings[] = {{.format = US_FORMAT_FP8}, {.format = US_FORMAT_MXFP4}};
  for (int e = 0; e < 2; e++) {
    struct stored s = store(values, ROWS, COLS, encodings[e]);
    struct us_quant_stats whole = stats_of(values, &s.w), merged;
    us_quant_stats_init(&merged);
    for (size_t row = 0; row < ROWS; row += 128) {
      struct us_quant_stats part;
      us_quant_stats_init(&part);
      us_quant_stats_add(&part, values, &s.w, row, row + 128 < ROWS ? row + 128 : ROWS);
      us_quant_stats_merge(&merged, &part);
    }
    us_quant_stats_finish(&merged);
    ck_assert_double_eq_tol(merged.sqnr_db, whole.sqnr_db, 1e-9);
    ck_assert_double_eq_tol(merged.cosine, whole.cosine, 1e-12);
    ck_assert_double_eq(merged.max_abs_error, whole.max_abs_error);
    ck_assert_uint_eq(merged.values, whole.values);
    ck_assert_uint_eq(merged.nonzero, whole.nonzero);
    ck_assert_uint_eq(merged.blocks, whole.blocks);
    ck_assert_uint_eq(merged.zero_blocks, whole.zero_blocks);
    ck_assert_uint_eq(merged.clipped_blocks, whole.clipped_blocks);
    ck_assert_uint_eq(merged.zeroed, whole.zeroed);
    ck_assert_uint_eq(merged.bytes, whole.bytes);
    ck_assert_int_eq(merged.scale_min, whole.scale_min);
    ck_assert_int_eq(merged.scale_max, whole.scale_max);
    ck_assert_int_eq(merged.max_tile_span, whole.max_tile_span);
    free(s.data), free(s.scales);
  }
  free(values);
}
END_TEST

START_TEST(a_lossless_format_has_infinite_sqnr_and_cosine_1) {
  float values[64];
  for (int i = 0; i < 64; i++) values[i] = (float)(i - 20);
  struct stored s = store(values, 2, 32, (struct us_matrix_encoding){.format = US_FORMAT_F32});
  struct us_quant_stats stats = stats_of(values, &s.w);
  ck_assert(isinf(stats.sqnr_db) && stats.sqnr_db > 0);
  ck_assert_double_eq_tol(stats.cosine, 1, 1e-15);
  ck_assert_double_eq(stats.relative_rmse, 0);
  ck_assert_int_eq(stats.scale_min, -1);
  free(s.data), free(s.scales);
}
END_TEST

START_TEST(an_all_zero_matrix_divides_by_nothing) {
  float values[64] = {0};
  struct stored s = store(values, 2, 32, (struct us_matrix_encoding){.format = US_FORMAT_MXFP4});
  struct us_quant_stats stats = stats_of(values, &s.w);
  ck_assert_uint_eq(stats.zero_blocks, 2);
  ck_assert_int_eq(stats.scale_max, -1);
  ck_assert_double_eq(stats.relative_rmse + stats.cosine + stats.zeroed_share + stats.clipped_share, 0);
  free(s.data), free(s.scales);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("quant_stats");
  tcase_add_test(c, a_small_matrix_has_the_numbers_counted_by_hand);
  tcase_add_test(c, sums_equal_a_plain_loop_over_the_decoded_matrix);
  tcase_add_test(c, parts_merged_in_row_order_equal_one_pass);
  tcase_add_test(c, a_lossless_format_has_infinite_sqnr_and_cosine_1);
  tcase_add_test(c, an_all_zero_matrix_divides_by_nothing);
  return us_suite("quant_stats", c);
}
US_TEST_MAIN(make_suite)
