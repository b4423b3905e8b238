/* t_budget.c: GPU memory by kind before anything is allocated, the layout of a pool of pages, and operands on the host.
 *
 * Truth: the pages' sizes from their definition (64 positions, K padded to 32 columns, V), the published shape's known size.
 */
#include "device/budget.h"
#include "device/operand.h"
#include "suite.h"

#include <math.h>
#include <string.h>

static const uint64_t GIB = (uint64_t)1 << 30;

static void load(struct us_shape *shape, struct us_draft_shape *draft) {
  struct us_err err = {0};
  ck_assert_msg(us_shape_load("mimo-v2.5-pro", shape, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_shape_load("mimo-v2.5-pro-dflash", draft, &err) == US_OK, "%s", err.message);
}

static struct us_device_budget budget_of(uint32_t gpus, uint32_t ranks, uint32_t positions,
                                         uint64_t free_bytes) {
  struct us_shape shape;
  struct us_draft_shape draft;
  struct us_device_budget budget;
  struct us_device_budget_options options = {
      .gpus = gpus, .ranks = ranks, .sequences = 9, .positions = positions};
  struct us_err err = {0};
  load(&shape, &draft);
  ck_assert_msg(us_device_budget(&shape, &draft, &options, free_bytes, &budget, &err) == US_OK, "%s",
                err.message);
  return budget;
}

START_TEST(the_published_model_fits_on_four_gpus_with_its_caches) {
  struct us_device_budget b = budget_of(4, 4, 0, 139 * GIB);
  struct us_err err = {0};
  ck_assert_uint_eq(b.options.positions, 32768);
  ck_assert_int_eq(us_device_budget_check(&b, 139 * GIB, "GPU 0", &err), US_OK);
  /* 2 heads of a rank; 10 full layers of 513 pages and 60 of 3, 9 caches */
  uint64_t page = 64 * 2 * (2 * 192 + 2 * 128), pages = 9 * (10 * 513 + 60 * 3);
  ck_assert(b.caches > pages * page && b.caches < pages * page + (page + (24u << 20)));
  uint64_t sum = us_device_bytes_weights(&b.weights) + b.workspace + b.caches + b.draft_caches;
  ck_assert(b.gpu_bytes > sum && b.gpu_bytes < sum + GIB / 2);
}
END_TEST

START_TEST(ranks_that_share_a_gpu_add_up) {
  struct us_device_budget four = budget_of(4, 4, 2048, 0), one = budget_of(1, 4, 2048, 0);
  uint64_t a_rank = us_device_bytes_weights(&four.weights) + four.workspace + four.caches + four.draft_caches;
  ck_assert_uint_eq(one.gpu_bytes - four.gpu_bytes, 3 * a_rank);
}
END_TEST

START_TEST(positions_are_halved_until_they_fit_unless_they_were_asked_for) {
  uint64_t tight = budget_of(4, 4, 16384, 0).gpu_bytes;
  ck_assert_uint_eq(budget_of(4, 4, 0, tight).options.positions, 16384);
  ck_assert_uint_eq(budget_of(4, 4, 0, tight - 1).options.positions, 8192);
  ck_assert_uint_eq(budget_of(4, 4, 32768, tight).options.positions, 32768);
  ck_assert_uint_eq(budget_of(4, 4, 0, 0).options.positions, 32768);
}
END_TEST

START_TEST(too_little_memory_is_one_line_with_every_kind) {
  struct us_device_budget b = budget_of(1, 1, 0, 139 * GIB);
  struct us_err err = {0};
  ck_assert_int_eq(us_device_budget_check(&b, 139 * GIB, "GPU 3", &err), US_ERR_MEMORY);
  ck_assert_msg(!strncmp(err.message, "GPU 3: 53", 9) &&
                    strstr(err.message, "139 are free (GiB: experts 494.9"),
                "%s", err.message);
}
END_TEST

START_TEST(heads_that_cannot_be_shared_are_named) {
  struct us_shape shape;
  struct us_device_budget budget;
  struct us_device_budget_options options = {.gpus = 1, .ranks = 8};
  struct us_err err = {0};
  ck_assert_int_eq(us_shape_load("tiny", &shape, &err), US_OK);
  ck_assert_int_eq(us_device_budget(&shape, NULL, &options, 0, &budget, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "8") != NULL, "%s", err.message);
}
END_TEST

START_TEST(a_pool_keeps_a_zero_page_then_its_kinds_one_behind_the_other) {
  struct us_kv_spec spec = {
      .layers = 3,
      .attention = {{.q_heads = 8, .kv_heads = 4, .qk_dim = 24, .v_dim = 16},
                    {.q_heads = 8, .kv_heads = 8, .qk_dim = 24, .v_dim = 16, .window = 16}},
      .kind = {0, 1, 0}};
  struct us_kv_pool_options options = {.positions = 200};
  struct us_kv_pool_layout layout;
  struct us_err err = {0};
  us_kv_pool_need(&spec, 200, 3, options.pages);
  ck_assert_uint_eq(options.pages[0], 3 * 2 * 4);
  ck_assert_uint_eq(options.pages[1], 3); /* 16 + 15 slots are one page */
  ck_assert_int_eq(us_kv_pool_lay_out(&spec, 2, &options, &layout, &err), US_OK);
  uint64_t full = 2 * 64 * 2 * (32 + 16), windowed = 2 * full;
  ck_assert_uint_eq(layout.page_bytes[0], full);
  ck_assert_uint_eq(layout.page_bytes[1], windowed);
  ck_assert_uint_eq(layout.first[0], windowed);
  ck_assert_uint_eq(layout.first[1], windowed + 24 * full);
  ck_assert_uint_eq(layout.pages_bytes, windowed + 24 * full + 3 * windowed);
  ck_assert_uint_eq(layout.table_bytes, 8 * (3 + 4 + 1 + 4));
  ck_assert_int_eq(us_kv_pool_lay_out(&spec, 8, &options, &layout, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "the 4 KV heads of layer 0 cannot be shared by 8 ranks");
}
END_TEST

START_TEST(an_operand_gives_back_the_rows_it_was_made_from) {
  float rows[5][64], back[8][64];
  uint8_t operand[1024];
  uint32_t word = (uint32_t)us_test_seed();
  for (int r = 0; r < 5; r++)
    for (int c = 0; c < 64; c++) {
      word = word * 1664525u + 1013904223u;
      rows[r][c] = ldexpf((float)(int32_t)word, (int)(word >> 27) - 40);
    }
  ck_assert_uint_eq(us_operand_bytes(64), sizeof operand);
  us_operand_pack(rows[0], 5, 64, operand);
  us_operand_unpack(operand, 8, 64, back[0]);
  for (int r = 0; r < 8; r++)
    for (int c = 0; c < 64; c++)
      ck_assert_msg(back[r][c] == (r < 5 ? us_bf16_round(rows[r][c]) : 0.0f), "row %d column %d", r, c);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("budget");
  tcase_add_test(c, the_published_model_fits_on_four_gpus_with_its_caches);
  tcase_add_test(c, ranks_that_share_a_gpu_add_up);
  tcase_add_test(c, positions_are_halved_until_they_fit_unless_they_were_asked_for);
  tcase_add_test(c, too_little_memory_is_one_line_with_every_kind);
  tcase_add_test(c, heads_that_cannot_be_shared_are_named);
  tcase_add_test(c, a_pool_keeps_a_zero_page_then_its_kinds_one_behind_the_other);
  tcase_add_test(c, an_operand_gives_back_the_rows_it_was_made_from);
  return us_suite("budget", c);
}
US_TEST_MAIN(make_suite)
