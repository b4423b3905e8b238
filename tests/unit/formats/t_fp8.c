/* t_fp8: E4M3 against a slow definition in FP64, block scales against theirs, and published statistics. */
#include "formats/fp8.h"

#include "gauss.h"
#include "suite.h"

#include <math.h>

/* The definition: bias 7, subnormals below code 8. */
static double slow_value(int code) {
  int exponent = code >> 3 & 15, fraction = code & 7;
  double magnitude = exponent ? ldexp(1 + fraction / 8.0, exponent - 7) : ldexp(fraction, -9);
  return code & 0x80 ? -magnitude : magnitude;
}

/* Smallest power of two that is not below a / 448, at least 2^-126. */
static double slow_power(double a) {
  double power = 0x1p-126;
  while (power * 448 < a) power *= 2;
  return power;
}

static double slow_scale(double a, enum us_fp8_scale kind) {
  if (kind == US_FP8_SCALE_UE8M0) return slow_power(a);
  return fmax((double)(float)(a / 448), 0x1p-126);
}

static int slow_code(double x) {
  int best = 0;
  for (int c = 1; c < 0x7f; c++) {
    double gain = fabs(fmin(fabs(x), 448) - slow_value(best)) - fabs(fmin(fabs(x), 448) - slow_value(c));
    if (gain > 0 || (gain == 0 && c % 2 == 0)) best = c;
  }
  return best | (signbit(x) ? 0x80 : 0);
}

START_TEST(all_256_codes_decode_to_their_definition_and_back) {
  for (int c = 0; c < 256; c++) {
    float x = us_fp8_to_f32((uint8_t)c);
    if ((c & 0x7f) == 0x7f) {
      ck_assert(isnan(x));
      continue;
    }
    ck_assert_double_eq((double)x, slow_value(c));
    ck_assert_int_eq(signbit(x) != 0, c >> 7);
    ck_assert_int_eq(us_fp8_from_f32(x), c);
  }
}
END_TEST

START_TEST(every_tie_goes_to_the_even_code_and_its_neighbours_do_not) {
  for (int c = 0; c < 0x7e; c++)
    for (int sign = 0; sign < 2; sign++) {
      float middle = (float)((slow_value(c) + slow_value(c + 1)) / 2);
      float s = sign ? -1.0f : 1.0f;
      int bit = sign << 7;
      ck_assert_int_eq(us_fp8_from_f32(s * nextafterf(middle, 0)), c | bit);
      ck_assert_int_eq(us_fp8_from_f32(s * middle), (c + (c & 1)) | bit);
      ck_assert_int_eq(us_fp8_from_f32(s * nextafterf(middle, 500)), (c + 1) | bit);
    }
}
END_TEST

/* Ascending values cross each midpoint once, so the definition can follow along without a search. */
START_TEST(codes_are_the_nearest_values_for_every_fp32_up_to_512) {
  uint32_t last = us_f32_bits(512.0f);
  int c = 0;
  double middle = 0x1p-10;
  for (uint32_t bits = us_f32_bits(0x1p-12f); bits <= last; bits++) {
    double x = (double)us_f32_from_bits(bits);
    if (c < 0x7e && (x > middle || (x == middle && c % 2 == 1))) {
      c++;
      middle = c < 0x7e ? (slow_value(c) + slow_value(c + 1)) / 2 : 1e9;
    }
    if (us_fp8_from_f32((float)x) != c)
      ck_abort_msg("%a: 0x%02x, expected 0x%02x", x, us_fp8_from_f32((float)x), c);
  }
  ck_assert_int_eq(c, 0x7e);
}
END_TEST

START_TEST(large_values_saturate_at_448_and_nan_stays_nan) {
  const float large[] = {448, 463, 464, 465, 480, 1e30f, INFINITY};
  for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
    ck_assert_int_eq(us_fp8_from_f32(large[i]), 0x7e);
    ck_assert_int_eq(us_fp8_from_f32(-large[i]), 0xfe);
  }
  ck_assert_int_eq(us_fp8_from_f32(us_f32_from_bits(0x7fc00000)), 0x7f);
  ck_assert_int_eq(us_fp8_from_f32(us_f32_from_bits(0xff800001)), 0xff);
  ck_assert_int_eq(us_fp8_from_f32(-0.0f), 0x80);
  ck_assert_int_eq(us_fp8_from_f32(0x1p-149f), 0);
}
END_TEST

START_TEST(block_scales_equal_their_definition_for_every_bf16_and_its_fp32_neighbours) {
  for (uint32_t h = 0; h < 0x7f80; h++)
    for (int delta = -1; delta <= 1; delta++) {
      uint32_t bits = (h << 16) + (uint32_t)delta;
      if (bits >= 0x7f800000u) continue;
      double a = (double)us_f32_from_bits(bits);
      for (int kind = 0; kind < US_FP8_SCALE_COUNT; kind++) {
        double got = (double)us_fp8_block_scale((float)a, (enum us_fp8_scale)kind);
        double expected = slow_scale(a, (enum us_fp8_scale)kind);
        if (got != expected)
          ck_abort_msg("%a, %s: %a, expected %a", a, us_fp8_scale_name((enum us_fp8_scale)kind), got,
                       expected);
      }
    }
}
END_TEST

/* A matrix of any shape and chunking, compared value by value with the definition on its own block grid. */
static void check_matrix(size_t rows, size_t cols, size_t chunk, enum us_fp8_scale kind) {
  float *w = malloc(rows * cols * sizeof *w), scales[64];
  uint8_t *codes = malloc(rows * cols);
  struct us_err err = {0};
  uint64_t state = us_test_seed() + rows;
  test_gauss_bf16(&state, rows * cols, w);
  for (size_t i = 0; i < rows * cols; i++) w[i] *= 1 + (float)(i / cols % 7);
  ck_assert_msg(us_fp8_encode(w, rows, cols, chunk, kind, codes, scales, &err) == US_OK, "%s", err.message);
  size_t grid_cols = (cols + 127) / 128, chunk_blocks = chunk ? (chunk + 127) / 128 : 0, grid_rows = 0;
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < cols; c++) {
      size_t first = chunk ? r / chunk * chunk : 0,
             end = chunk && first + chunk < rows ? first + chunk : rows;
      size_t top = first + (r - first) / 128 * 128, bottom = top + 128 < end ? top + 128 : end;
      size_t grid = (chunk ? r / chunk * chunk_blocks : 0) + (r - first) / 128;
      double amax = 0;
      for (size_t y = top; y < bottom && (r == top && c % 128 == 0); y++)
        for (size_t x = c; x < c + 128 && x < cols; x++) amax = fmax(amax, fabs((double)w[y * cols + x]));
      float scale = scales[grid * grid_cols + c / 128];
      if (r == top && c % 128 == 0) ck_assert_double_eq((double)scale, slow_scale(amax, kind));
      ck_assert_int_eq(codes[r * cols + c], slow_code((double)(w[r * cols + c] / scale)));
      grid_rows = grid + 1;
    }
  ck_assert_uint_eq(us_fp8_scale_rows(rows, chunk), grid_rows);
  ck_assert_int_eq(us_fp8_check(codes, scales, rows, cols, chunk, &err), US_OK);
  free(w), free(codes);
}

START_TEST(matrices_with_partial_blocks_and_restarting_grids_equal_the_definition) {
  for (int kind = 0; kind < US_FP8_SCALE_COUNT; kind++) {
    check_matrix(128, 128, 0, (enum us_fp8_scale)kind);
    check_matrix(130, 200, 0, (enum us_fp8_scale)kind);
    check_matrix(1, 2, 0, (enum us_fp8_scale)kind);
    check_matrix(144, 130, 72, (enum us_fp8_scale)kind); /* chunks below a block */
    check_matrix(432, 64, 216, (enum us_fp8_scale)kind); /* 128 + 88 rows a chunk */
    check_matrix(300, 64, 216, (enum us_fp8_scale)kind); /* a last chunk that is cut */
    check_matrix(100, 64, 216, (enum us_fp8_scale)kind); /* less than one chunk */
  }
}
END_TEST

START_TEST(an_all_zero_block_round_trips_with_the_smallest_normal_scale) {
  float w[128 * 2] = {[5] = -0.0f}, back[128 * 2], scale;
  uint8_t codes[128 * 2];
  struct us_err err = {0};
  for (int kind = 0; kind < US_FP8_SCALE_COUNT; kind++) {
    ck_assert_int_eq(us_fp8_encode(w, 2, 128, 0, (enum us_fp8_scale)kind, codes, &scale, &err), US_OK);
    ck_assert_float_eq(scale, 0x1p-126f);
    us_fp8_decode(codes, &scale, 128, back);
    us_fp8_decode(codes + 128, &scale, 128, back + 128);
    ck_assert(memcmp(w, back, sizeof w) == 0);
  }
}
END_TEST

START_TEST(decode_is_the_fp32_rounded_product) {
  float scale = 0.0123f, back[300], scales[3] = {scale, scale * 3, scale * 7};
  uint8_t codes[300];
  for (int i = 0; i < 300; i++) codes[i] = (uint8_t)(i % 127);
  us_fp8_decode(codes, scales, 300, back);
  for (int i = 0; i < 300; i++)
    ck_assert_float_eq(back[i], (float)(slow_value(codes[i]) * (double)scales[i / 128]));
}
END_TEST

START_TEST(nan_and_inf_are_refused_by_row_and_column) {
  float w[140 * 150] = {0}, scales[4];
  uint8_t codes[140 * 150];
  struct us_err err = {0};
  w[135 * 150 + 149] = INFINITY;
  ck_assert_int_eq(us_fp8_encode(w, 140, 150, 0, US_FP8_SCALE_F32, codes, scales, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "row 135, column 149 is Inf");
  w[3 * 150 + 7] = NAN;
  ck_assert_int_eq(us_fp8_encode(w, 140, 150, 0, US_FP8_SCALE_F32, codes, scales, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "row 3, column 7 is NaN");
}
END_TEST

START_TEST(the_check_names_nan_codes_and_scales_that_are_not_positive) {
  uint8_t codes[130 * 130] = {0};
  struct us_err err = {0};
  const float bad[] = {0, -1, NAN, INFINITY};
  for (int i = 0; i < 4; i++) {
    float scales[4] = {1, 1, bad[i], 1};
    ck_assert_int_eq(us_fp8_check(codes, scales, 130, 130, 0, &err), US_ERR_INPUT);
    ck_assert_ptr_nonnull(strstr(err.message, "at row 1, column 0 of the scale grid"));
  }
  float scales[4] = {1, 1, 1, 1};
  codes[129 * 130 + 4] = 0xff;
  ck_assert_int_eq(us_fp8_check(codes, scales, 130, 130, 0, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "code 0xff at row 129, column 4 is NaN");
}
END_TEST

START_TEST(the_check_refuses_exactly_the_values_that_overflow_fp32) {
  for (int exponent = 117; exponent < 128; exponent++)
    for (int c = 0; c < 0x7f; c++) {
      uint8_t codes[200] = {[150] = (uint8_t)c};
      float scales[2] = {1, (float)ldexp(1, exponent)}, back[200];
      struct us_err err = {0};
      us_fp8_decode(codes, scales, 200, back);
      ck_assert_int_eq(us_fp8_check(codes, scales, 1, 200, 0, &err),
                       isfinite(back[150]) ? US_OK : US_ERR_INPUT);
    }
}
END_TEST

START_TEST(gaussian_weights_have_the_published_signal_to_noise) {
  const double published[US_FP8_SCALE_COUNT] = {31.56, 31.50};
  enum { ROWS = 512, COLS = 1024 };
  float *w = malloc(ROWS * COLS * sizeof *w), back[COLS], scales[ROWS / 128 * COLS / 128];
  uint8_t *codes = malloc(ROWS * COLS);
  struct us_err err = {0};
  uint64_t state = us_test_seed();
  test_gauss_bf16(&state, ROWS * COLS, w);
  for (int kind = 0; kind < US_FP8_SCALE_COUNT; kind++) {
    double signal = 0, noise = 0;
    ck_assert_int_eq(us_fp8_encode(w, ROWS, COLS, 0, (enum us_fp8_scale)kind, codes, scales, &err), US_OK);
    for (size_t r = 0; r < ROWS; r++) {
      us_fp8_decode(codes + r * COLS, scales + r / 128 * (COLS / 128), COLS, back);
      for (size_t c = 0; c < COLS; c++) {
        double x = (double)w[r * COLS + c], error = (double)back[c] - x;
        signal += x * x;
        noise += error * error;
      }
    }
    ck_assert_double_eq_tol(10 * log10(signal / noise), published[kind], 0.05);
  }
  free(w), free(codes);
}
END_TEST

START_TEST(scale_kinds_have_names_that_parse) {
  struct us_err err = {0};
  enum us_fp8_scale kind;
  for (int k = 0; k < US_FP8_SCALE_COUNT; k++) {
    ck_assert_int_eq(us_fp8_scale_parse(us_fp8_scale_name((enum us_fp8_scale)k), &kind, &err), US_OK);
    ck_assert_int_eq(kind, k);
  }
  ck_assert_int_eq(us_fp8_scale_parse("fp32", &kind, &err), US_ERR_USAGE);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("fp8");
  tcase_add_test(c, all_256_codes_decode_to_their_definition_and_back);
  tcase_add_test(c, every_tie_goes_to_the_even_code_and_its_neighbours_do_not);
  tcase_add_test(c, codes_are_the_nearest_values_for_every_fp32_up_to_512);
  tcase_add_test(c, large_values_saturate_at_448_and_nan_stays_nan);
  tcase_add_test(c, block_scales_equal_their_definition_for_every_bf16_and_its_fp32_neighbours);
  tcase_add_test(c, matrices_with_partial_blocks_and_restarting_grids_equal_the_definition);
  tcase_add_test(c, an_all_zero_block_round_trips_with_the_smallest_normal_scale);
  tcase_add_test(c, decode_is_the_fp32_rounded_product);
  tcase_add_test(c, nan_and_inf_are_refused_by_row_and_column);
  tcase_add_test(c, the_check_names_nan_codes_and_scales_that_are_not_positive);
  tcase_add_test(c, the_check_refuses_exactly_the_values_that_overflow_fp32);
  tcase_add_test(c, gaussian_weights_have_the_published_signal_to_noise);
  tcase_add_test(c, scale_kinds_have_names_that_parse);
  return us_suite("fp8", c);
}
US_TEST_MAIN(make_suite)
