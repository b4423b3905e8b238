/* t_linear.c: the canonical dot product: formats, instruction sets, rows and tiles give the same bits; the value is
 * checked against a sum in double within the bound of the order: |error| <= (K/16 + 5) u * sum |w x|, u = 2^-24. */
#include "formats/mxfp4.h"
#include "kernels/linear/linear.h"
#include "kernels/linear/mxfp4_tables.h"
#include "values.h"

#include <math.h>

static const enum us_format formats[] = {US_FORMAT_F32, US_FORMAT_BF16, US_FORMAT_FP8, US_FORMAT_MXFP4};

struct problem {
  struct us_matrix w;
  size_t R, width;
  float *x, *packed;
};

static struct problem new_problem(enum us_format format, size_t N, size_t K, size_t R, uint64_t *state) {
  struct problem p = {.w = new_matrix(format, N, K, state), .R = R, .width = us_linear_packed_width(K)};
  p.x = new_values(R * K, 2.0f, state);
  p.packed = new_values(R * p.width, 1, state);
  us_linear_pack(p.x, R, K, K, p.packed, p.width);
  return p;
}

static void free_problem(struct problem *p) {
  release_matrix(&p->w);
  free(p->x);
  free(p->packed);
}

static void run(const struct problem *p, size_t begin, size_t end, enum us_isa isa, float *y,
                size_t y_stride) {
  us_linear(&(struct us_linear_args){.w = &p->w,
                                     .x = p->packed,
                                     .x_stride = p->width,
                                     .y = y,
                                     .y_stride = y_stride,
                                     .R = p->R,
                                     .begin = begin,
                                     .end = end,
                                     .isa = isa});
}

START_TEST(packing_puts_even_k_before_odd_k_and_pads_with_zeros) {
  float x[40], packed[64];
  for (int i = 0; i < 40; i++) x[i] = (float)(i + 1);
  us_linear_pack(x, 1, 40, 40, packed, 64);
  ck_assert(packed[0] == 1 && packed[1] == 3 && packed[15] == 31 && packed[16] == 2 && packed[31] == 32);
  ck_assert(packed[32] == 33 && packed[35] == 39 && packed[36] == 0 && packed[48] == 34 && packed[52] == 0);
  for (size_t k = 0; k < 40; k++) ck_assert(packed[us_linear_packed_index(k)] == x[k]);
}
END_TEST

START_TEST(every_format_is_near_the_sum_in_double) {
  uint64_t state = us_test_seed();
  for (size_t f = 0; f < 4; f++) {
    struct problem p = new_problem(formats[f], 11, 416, 3, &state);
    float y[3 * 11], *row = calloc(416, sizeof *row);
    run(&p, 0, 11, US_ISA_BEST, y, 11);
    for (size_t n = 0; n < 11; n++) {
      us_matrix_decode_row(&p.w, n, row);
      for (size_t r = 0; r < 3; r++) {
        double sum = 0, size = 0;
        for (size_t k = 0; k < 416; k++) {
          sum += (double)row[k] * (double)p.x[r * 416 + k];
          size += fabs((double)row[k] * (double)p.x[r * 416 + k]);
        }
        double bound = (416.0 / 16 + 5) * 0x1p-24 * size;
        ck_assert_msg(fabs((double)y[r * 11 + n] - sum) <= bound, "%s: %g, not %g",
                      us_format_name(formats[f]), (double)y[r * 11 + n], sum);
        ck_assert(size > 1);
      }
    }
    free(row);
    free_problem(&p);
  }
}
END_TEST

START_TEST(instruction_sets_give_the_bits_of_plain_c) {
  uint64_t state = us_test_seed() + 1;
  const size_t widths[] = {1, 24, 31, 32, 33, 64, 200, 288};
  enum us_isa isas[2];
  size_t isa_count = fast_isas(isas);
  for (size_t f = 0; f < 4; f++) {
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
      if (formats[f] == US_FORMAT_MXFP4 && widths[i] % 32) continue;
      struct problem p = new_problem(formats[f], 9, widths[i], 7, &state);
      float plain[7 * 9], fast[7 * 9];
      run(&p, 0, 9, US_ISA_PLAIN, plain, 9);
      for (size_t j = 0; j < isa_count; j++) {
        run(&p, 0, 9, isas[j], fast, 9);
        assert_same_bits(fast, plain, 7 * 9, us_isa_name(isas[j]));
      }
      free_problem(&p);
    }
  }
}
END_TEST

START_TEST(long_rows_that_are_summed_in_runs_give_the_bits_of_one_run) {
  uint64_t state = us_test_seed() + 7;
  enum us_isa isas[2];
  size_t isa_count = fast_isas(isas);
  for (size_t f = 0; f < 4; f++) {
    size_t K = formats[f] == US_FORMAT_MXFP4 ? 2208 : 2215; /* runs of 32 and 64 groups, the last one short */
    struct problem p = new_problem(formats[f], 29, K, 15, &state);
    float *plain = calloc(15 * 29, sizeof *plain), *fast = calloc(15 * 29, sizeof *fast);
    run(&p, 0, 29, US_ISA_PLAIN, plain, 29);
    for (size_t j = 0; j < isa_count; j++) {
      run(&p, 0, 29, isas[j], fast, 29);
      assert_same_bits(fast, plain, 15 * 29, us_isa_name(isas[j]));
    }
    free(plain);
    free(fast);
    free_problem(&p);
  }
}
END_TEST

START_TEST(the_tables_hold_every_code_times_every_scale) {
  for (int scale = 0; scale < 256; scale++)
    for (int code = 0; code < 16; code++) {
      float truth = us_e2m1_to_f32((uint8_t)code) * us_e8m0_to_f32((uint8_t)scale);
      if (scale == 255)
        ck_assert(isnan(us_mxfp4_tables[scale][code]));
      else
        ck_assert_uint_eq(us_f32_bits(us_mxfp4_tables[scale][code]), us_f32_bits(truth));
    }
}
END_TEST

START_TEST(equal_decoded_values_give_equal_bits_in_every_format) {
  uint64_t state = us_test_seed() + 2;
  struct problem p = new_problem(US_FORMAT_MXFP4, 6, 96, 2, &state);
  float decoded[6 * 96], y4[12], y32[12], y16[12];
  uint16_t halves[6 * 96];
  us_matrix_decode(&p.w, decoded);
  us_bf16_encode(decoded, 6 * 96, halves);
  run(&p, 0, 6, US_ISA_BEST, y4, 6);
  struct problem q = p;
  q.w = (struct us_matrix){.format = US_FORMAT_F32, .rows = 6, .cols = 96, .data = decoded};
  run(&q, 0, 6, US_ISA_BEST, y32, 6);
  q.w = (struct us_matrix){.format = US_FORMAT_BF16, .rows = 6, .cols = 96, .data = halves};
  run(&q, 0, 6, US_ISA_BEST, y16, 6);
  assert_same_bits(y32, y4, 12, "f32");
  assert_same_bits(y16, y4, 12, "bf16");
  free_problem(&p);
}
END_TEST

START_TEST(fp8_rows_use_the_scales_of_their_own_block_and_chunk) {
  uint64_t state = us_test_seed() + 3;
  /* Two chunks of 160 rows: 2 scale rows each, the second chunk's grid restarts. */
  struct problem p = new_problem(US_FORMAT_FP8, 320, 160, 1, &state);
  free((void *)(uintptr_t)p.w.scales);
  float *scales = new_values(4 * 2, 0.1f, &state), row[160], y[320];
  p.w.scales = scales;
  p.w.scale_chunk_rows = 160;
  run(&p, 0, 320, US_ISA_BEST, y, 320);
  struct problem q = p;
  for (size_t n = 0; n < 320; n++) {
    size_t scale_row = n / 160 * 2 + n % 160 / 128;
    for (size_t k = 0; k < 160; k++) {
      struct us_matrix one = {.format = US_FORMAT_FP8,
                              .rows = 1,
                              .cols = 1,
                              .data = (const uint8_t *)p.w.data + n * 160 + k,
                              .scales = &scales[scale_row * 2 + k / 128]};
      us_matrix_decode_row(&one, 0, &row[k]);
    }
    float expected;
    q.w = (struct us_matrix){.format = US_FORMAT_F32, .rows = 1, .cols = 160, .data = row};
    run(&q, 0, 1, US_ISA_PLAIN, &expected, 1);
    assert_same_bits(&y[n], &expected, 1, "row");
  }
  free_problem(&p);
}
END_TEST

START_TEST(a_row_does_not_depend_on_its_neighbours_or_on_the_tile) {
  uint64_t state = us_test_seed() + 4;
  for (size_t f = 0; f < 4; f++) {
    struct problem p = new_problem(formats[f], 37, 128, 16, &state);
    float all[16 * 37], part[16 * 37];
    run(&p, 0, 37, US_ISA_BEST, all, 37);
    for (size_t R = 1; R <= 16; R++) {
      for (size_t first = 0; first + R <= 16; first += 5) {
        struct problem q = p;
        q.packed = p.packed + first * p.width;
        q.R = R;
        run(&q, 3, 30, US_ISA_BEST, part, 27);
        for (size_t r = 0; r < R; r++)
          assert_same_bits(part + r * 27, all + (first + r) * 37 + 3, 27, "tile");
      }
    }
    free_problem(&p);
  }
}
END_TEST

START_TEST(gathered_rows_are_the_rows_named) {
  uint64_t state = us_test_seed() + 5;
  struct problem p = new_problem(US_FORMAT_BF16, 5, 64, 6, &state);
  uint32_t rows[3] = {5, 0, 3};
  float all[30], some[15];
  run(&p, 0, 5, US_ISA_BEST, all, 5);
  us_linear(&(struct us_linear_args){.w = &p.w,
                                     .x = p.packed,
                                     .x_stride = p.width,
                                     .opt_x_rows = rows,
                                     .y = some,
                                     .y_stride = 5,
                                     .R = 3,
                                     .begin = 0,
                                     .end = 5});
  for (size_t i = 0; i < 3; i++) assert_same_bits(some + i * 5, all + rows[i] * 5, 5, "gather");
  free_problem(&p);
}
END_TEST

START_TEST(nothing_past_a_short_row_is_read) {
  /* K = 8 of a one-row matrix placed at the very end of an allocation: the address sanitizer watches. */
  for (int i = 0; i < 3; i++) {
    uint64_t state = us_test_seed() + 6;
    struct problem p = new_problem(formats[i], 1, 8, 1, &state);
    float best, plain;
    run(&p, 0, 1, US_ISA_BEST, &best, 1);
    run(&p, 0, 1, US_ISA_PLAIN, &plain, 1);
    assert_same_bits(&best, &plain, 1, "short row");
    free_problem(&p);
  }
}
END_TEST

START_TEST(a_scale_byte_of_zero_is_two_to_the_minus_127) {
  uint8_t codes[16], scale = 0;
  memset(codes, 0x12, sizeof codes); /* low nibble 2: 1.0, high nibble 1: 0.5 */
  float x[32], packed[32], y;
  for (int i = 0; i < 32; i++) x[i] = i ? 0.0f : 0x1p100f;
  us_linear_pack(x, 1, 32, 32, packed, 32);
  struct us_matrix w = {.format = US_FORMAT_MXFP4, .rows = 1, .cols = 32, .data = codes, .scales = &scale};
  for (int isa = US_ISA_BEST; isa < US_ISA_COUNT; isa++) {
    us_linear(&(struct us_linear_args){.w = &w,
                                       .x = packed,
                                       .x_stride = 32,
                                       .y = &y,
                                       .y_stride = 1,
                                       .R = 1,
                                       .begin = 0,
                                       .end = 1,
                                       .isa = (enum us_isa)isa});
    ck_assert(y == 0x1p-27f);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("linear");
  tcase_add_test(c, packing_puts_even_k_before_odd_k_and_pads_with_zeros);
  tcase_add_test(c, every_format_is_near_the_sum_in_double);
  tcase_add_test(c, instruction_sets_give_the_bits_of_plain_c);
  tcase_add_test(c, long_rows_that_are_summed_in_runs_give_the_bits_of_one_run);
  tcase_add_test(c, the_tables_hold_every_code_times_every_scale);
  tcase_add_test(c, equal_decoded_values_give_equal_bits_in_every_format);
  tcase_add_test(c, fp8_rows_use_the_scales_of_their_own_block_and_chunk);
  tcase_add_test(c, a_row_does_not_depend_on_its_neighbours_or_on_the_tile);
  tcase_add_test(c, gathered_rows_are_the_rows_named);
  tcase_add_test(c, nothing_past_a_short_row_is_read);
  tcase_add_test(c, a_scale_byte_of_zero_is_two_to_the_minus_127);
  return us_suite("linear", c);
}
US_TEST_MAIN(make_suite)
