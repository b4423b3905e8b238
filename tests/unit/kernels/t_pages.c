/* t_pages.c: packing and unpacking of weight pages. The packer gathers word by word, the unpacker follows the map from a
 * weight to its place: two directions written apart, so that a round trip proves both. */
#include "kernels/pages/pages.h"
#include "values.h"

static const enum us_format formats[] = {US_FORMAT_F32, US_FORMAT_BF16, US_FORMAT_FP8, US_FORMAT_MXFP4};

struct page_case {
  uint32_t rows, cols, tile_rows, slice_cols;
};
static const struct page_case cases[] = {{16, 32, 16, 32},   {32, 32, 32, 32},    {48, 128, 16, 128},
                                         {64, 256, 32, 128}, {128, 384, 32, 384}, {144, 768, 16, 384},
                                         {96, 96, 32, 96},   {160, 512, 16, 256}, {64, 192, 32, 64},
                                         {96, 160, 16, 32},  {8, 128, 16, 128},   {40, 64, 32, 64}};

static uint32_t code_at(const struct us_matrix *w, size_t n, size_t k) {
  struct us_pages_source one = {.w = {*w}, .matrices = 1};
  return us_pages_source_code(&one, (uint32_t)n, (uint32_t)k);
}

static void pack(const struct us_pages *p, const struct us_pages_source *source, uint8_t **ret_pages) {
  struct us_err err = {0};
  *ret_pages = malloc(us_pages_bytes(p));
  memset(*ret_pages, 0xa5, us_pages_bytes(p));
  ck_assert_msg(us_pages_pack(p, source, *ret_pages, &err) == US_OK, "%s", err.message);
}

/* A float for each 16 rows and 128 columns of a slice. */
static void check_fp8_scales(const struct us_pages *p, const struct us_matrix *w, const float *scales) {
  for (uint32_t n = 0; n < p->rows; n += 16)
    for (uint32_t slice = 0; slice < p->cols; slice += p->slice_cols)
      for (uint32_t k = slice; k < slice + p->slice_cols; k += 128, scales++)
        ck_assert_mem_eq(scales, (const float *)w->scales + n / 128 * ((p->cols + 127) / 128) + k / 128, 4);
}

START_TEST(unpacking_gives_every_bit_back) {
  uint64_t state = us_test_seed();
  for (size_t f = 0; f < sizeof formats / sizeof *formats; f++)
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
      struct us_pages p = {formats[f], cases[c].rows, cases[c].cols, cases[c].tile_rows, cases[c].slice_cols};
      struct us_matrix w = new_matrix(formats[f], p.rows, p.cols, &state);
      uint8_t *pages, *data = malloc(us_matrix_data_bytes(p.format, p.rows, p.cols));
      uint8_t *scales = malloc((size_t)p.rows * p.cols);
      pack(&p, &(struct us_pages_source){.w = {w}, .matrices = 1}, &pages);
      us_pages_unpack(&p, pages, data, scales);
      ck_assert_mem_eq(data, w.data, us_matrix_data_bytes(p.format, p.rows, p.cols));
      if (p.format == US_FORMAT_MXFP4) ck_assert_mem_eq(scales, w.scales, (size_t)p.rows * p.cols / 32);
      if (p.format == US_FORMAT_FP8) check_fp8_scales(&p, &w, (const float *)(void *)scales);
      free(pages), free(data), free(scales);
      release_matrix(&w);
    }
}
END_TEST

START_TEST(places_do_not_overlap_and_fill_the_page) {
  struct us_pages p = {US_FORMAT_BF16, 32, 128, 32, 64};
  uint8_t *seen = calloc(us_pages_bytes(&p), 1);
  for (uint32_t n = 0; n < p.rows; n++)
    for (uint32_t k = 0; k < p.cols; k++) {
      struct us_pages_place at = us_pages_place(&p, n, k);
      size_t byte = at.page * us_pages_page_bytes(&p) +
                    us_pages_word_offset(at.lane, at.fragment * 4 + at.reg) + 2 * at.half;
      ck_assert_uint_lt(byte, us_pages_bytes(&p));
      ck_assert_uint_eq(seen[byte]++, 0);
    }
  free(seen);
}
END_TEST

/* What mma.cuh does, register `reg` of a word. */
static uint32_t decode_mxfp4(uint32_t word, uint32_t reg) {
  uint32_t turned = word << 6 | word >> 26;
  uint32_t moved = reg == 0   ? word
                   : reg == 1 ? word * 8u
                   : reg == 2 ? turned
                              : (turned & 0x001b001bu) * 0x1084u;
  return moved & 0x81c081c0u;
}

static float bf16_value(uint32_t half) {
  return us_f32_from_bits(half << 16);
}

START_TEST(an_mxfp4_word_decodes_to_bf16_by_masks_shifts_and_a_product) {
  for (uint32_t code = 0; code < 16; code++)
    for (uint32_t place = 0; place < 8; place++) { /* register and half */
      float expected = us_e2m1_to_f32((uint8_t)code) * US_PAGES_MXFP4_UNIT;
      for (uint32_t others = 0; others < 16; others++) { /* whatever the other codes of the word are */
        uint32_t word = us_pages_place_code(US_FORMAT_MXFP4, code, place / 2, place % 2);
        for (uint32_t other = 0; other < 8; other++)
          if (other != place)
            word ^=
                us_pages_place_code(US_FORMAT_MXFP4, (others * other + others) & 15u, other / 2, other % 2);
        uint32_t half = decode_mxfp4(word, place / 2) >> 16 * (place % 2) & 0xffffu;
        ck_assert_uint_eq(us_f32_bits(bf16_value(half)), us_f32_bits(expected));
      }
    }
}
END_TEST

START_TEST(an_fp8_word_decodes_to_bf16_by_masks_and_shifts) {
  for (uint32_t code = 0; code < 256; code++)
    for (uint32_t place = 0; place < 4; place++) { /* register of the word and half */
      if ((code & 127u) == 127u) continue;         /* NaN */
      uint32_t expected = us_f32_bits(us_fp8_to_f32((uint8_t)code) * US_PAGES_FP8_UNIT);
      for (uint32_t others = 0; others < 256; others++) { /* whatever the other codes of the word are */
        uint32_t word = us_pages_place_code(US_FORMAT_FP8, code, 2 + place / 2, place % 2);
        for (uint32_t other = 0; other < 4; other++)
          if (other != place)
            word ^= us_pages_place_code(US_FORMAT_FP8, (others * (2 * other + 1) + other) & 255u, other / 2,
                                        other % 2);
        uint32_t decoded = (place / 2 ? word ^ word << 4 : word << 12 | word >> 20) & 0x87f087f0u;
        ck_assert_uint_eq(us_f32_bits(bf16_value(decoded >> 16 * (place % 2) & 0xffffu)), expected);
      }
    }
}
END_TEST

START_TEST(rows_past_the_matrix_are_zeros) {
  uint64_t state = us_test_seed() + 4;
  for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
    struct us_matrix w = new_matrix(formats[f], 20, 64, &state);
    struct us_pages p = {formats[f], 20, 64, 32, 64}, whole = p;
    uint8_t *pages, data[32 * 64 * 4], scales[32 * 64];
    pack(&p, &(struct us_pages_source){.w = {w}, .matrices = 1}, &pages);
    whole.rows = 32;
    us_pages_unpack(&whole, pages, data, scales);
    for (size_t i = us_matrix_data_bytes(p.format, 20, 64); i < us_matrix_data_bytes(p.format, 32, 64); i++)
      ck_assert_uint_eq(data[i], 0);
    for (size_t i = 20 * 2; p.format == US_FORMAT_MXFP4 && i < 32 * 2; i++) ck_assert_uint_eq(scales[i], 0);
    free(pages);
    release_matrix(&w);
  }
}
END_TEST

START_TEST(gate_and_up_share_a_tile_of_32_rows) {
  uint64_t state = us_test_seed() + 1;
  struct us_matrix gate = new_matrix(US_FORMAT_MXFP4, 64, 128, &state),
                   up = new_matrix(US_FORMAT_MXFP4, 64, 128, &state);
  struct us_pages p = {US_FORMAT_MXFP4, 64, 64, 32,
                       64}; /* the second of two ranks: inner 32..63, columns 64.. */
  struct us_pages_source s = {.w = {gate, up}, .matrices = 2, .first_row = 32, .first_col = 64};
  uint8_t *pages, data[64 * 32];
  pack(&p, &s, &pages);
  us_pages_unpack(&p, pages, data, NULL);
  struct us_matrix back = {.format = p.format, .rows = 64, .cols = 64, .data = data};
  for (size_t n = 0; n < 64; n++)
    for (size_t k = 0; k < 64; k++)
      ck_assert_uint_eq(code_at(&back, n, k),
                        code_at(n % 32 < 16 ? &gate : &up, 32 + n / 32 * 16 + n % 16, 64 + k));
  free(pages);
  release_matrix(&gate);
  release_matrix(&up);
}
END_TEST

START_TEST(ranks_share_without_gap_or_overlap) {
  for (uint32_t ranks = 1; ranks <= 8; ranks *= 2)
    for (uint32_t rank = 0, at = 0; rank < ranks; rank++) {
      struct us_share share = us_share_of(2048, rank, ranks);
      ck_assert_uint_eq(share.begin, at);
      ck_assert_uint_eq(share.end - share.begin, 2048 / ranks);
      at = share.end;
    }
}
END_TEST

START_TEST(scales_that_do_not_fit_are_refused_and_the_ends_survive) {
  uint64_t state = us_test_seed() + 2;
  struct us_matrix w = new_matrix(US_FORMAT_MXFP4, 16, 64, &state);
  struct us_pages p = {US_FORMAT_MXFP4, 16, 64, 16, 64};
  struct us_pages_source s = {.w = {w}, .matrices = 1};
  struct us_err err = {0};
  uint8_t *scales = (uint8_t *)(uintptr_t)w.scales, *pages, data[16 * 64], back[32];
  scales[5] = 0, scales[6] = 192;
  pack(&p, &s, &pages);
  us_pages_unpack(&p, pages, data, back);
  ck_assert_mem_eq(back, scales, sizeof back);
  scales[7] = 193;
  ck_assert_int_eq(us_pages_pack(&p, &s, pages, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "scale byte 193 at row 3, column 32"));
  free(pages);
  release_matrix(&w);

  w = new_matrix(US_FORMAT_FP8, 16, 64, &state);
  p.format = US_FORMAT_FP8, s.w[0] = w;
  float *scale = (float *)(uintptr_t)w.scales, one;
  *scale = 0x1.fffffep71f;
  pack(&p, &s, &pages);
  us_pages_unpack(&p, pages, data, &one);
  ck_assert_float_eq(one, *scale);
  *scale = 0x1p72f;
  ck_assert_int_eq(us_pages_pack(&p, &s, pages, &err), US_ERR_INPUT);
  ck_assert_ptr_nonnull(strstr(err.message, "FP8 scale"));
  free(pages);
  release_matrix(&w);
}
END_TEST

START_TEST(shapes_that_do_not_divide_are_refused) {
  const struct us_pages bad[] = {{US_FORMAT_NONE, 32, 64, 32, 64}, {US_FORMAT_FP8, 32, 192, 16, 96},
                                 {US_FORMAT_F32, 64, 64, 8, 64},   {US_FORMAT_F32, 32, 64, 32, 48},
                                 {US_FORMAT_F32, 32, 96, 32, 64},  {US_FORMAT_F32, 0, 64, 32, 64},
                                 {US_FORMAT_F32, 32, 0, 32, 32}};
  struct us_err err = {0};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    ck_assert_int_eq(us_pages_check(&bad[i], &err), US_ERR_USAGE);
}
END_TEST

START_TEST(windows_outside_the_matrix_and_cut_blocks_are_refused) {
  uint64_t state = us_test_seed() + 3;
  struct us_err err = {0};
  struct us_matrix w = new_matrix(US_FORMAT_FP8, 64, 256, &state);
  struct us_pages p = {US_FORMAT_FP8, 32, 128, 16, 128};
  struct us_pages_source s = {.w = {w}, .matrices = 1, .first_row = 48};
  ck_assert_int_eq(us_pages_source_check(&p, &s, &err), US_ERR_USAGE);
  s.first_row = 0, s.first_col = 64;
  ck_assert_int_eq(us_pages_source_check(&p, &s, &err), US_ERR_USAGE);
  p.slice_cols = 64; /* each slice within a block */
  ck_assert_int_eq(us_pages_source_check(&p, &s, &err), US_OK);
  s.first_col = 32;
  ck_assert_int_eq(us_pages_source_check(&p, &s, &err), US_ERR_USAGE);
  p.slice_cols = 128, s.first_col = 128;
  ck_assert_int_eq(us_pages_source_check(&p, &s, &err), US_OK);
  s.w[0].scale_chunk_rows = 24; /* the grid restarts inside a 16-row half */
  ck_assert_int_eq(us_pages_source_check(&p, &s, &err), US_ERR_USAGE);
  release_matrix(&w);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("pages");
  tcase_add_test(c, unpacking_gives_every_bit_back);
  tcase_add_test(c, places_do_not_overlap_and_fill_the_page);
  tcase_add_test(c, an_mxfp4_word_decodes_to_bf16_by_masks_shifts_and_a_product);
  tcase_add_test(c, an_fp8_word_decodes_to_bf16_by_masks_and_shifts);
  tcase_add_test(c, rows_past_the_matrix_are_zeros);
  tcase_add_test(c, gate_and_up_share_a_tile_of_32_rows);
  tcase_add_test(c, ranks_share_without_gap_or_overlap);
  tcase_add_test(c, scales_that_do_not_fit_are_refused_and_the_ends_survive);
  tcase_add_test(c, shapes_that_do_not_divide_are_refused);
  tcase_add_test(c, windows_outside_the_matrix_and_cut_blocks_are_refused);
  return us_suite("pages", c);
}
US_TEST_MAIN(make_suite)
