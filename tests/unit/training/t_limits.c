/* t_limits.c: sizes that are refused before a GPU is asked. */
#include "training/cuda/limits.h"
#include "tiny.h"

static void says(enum us_status status, const struct us_err *err, const char *message) {
  ck_assert_int_eq(status, US_ERR_USAGE);
  ck_assert_str_eq(err->message, message);
}

START_TEST(a_hidden_size_beyond_what_norms_hold_is_named) {
  struct us_err err = {0};
  ck_assert_int_eq(us_cuda_limits_widths(8192, 152576, &err), US_OK);
  says(us_cuda_limits_widths(12288, 152576, &err), &err,
       "a hidden size of 12288; on a GPU up to 8192 is trained");
}
END_TEST

START_TEST(a_vocabulary_that_is_no_multiple_of_8_is_named) {
  struct us_err err = {0};
  ck_assert_int_eq(us_cuda_limits_widths(64, 8, &err), US_OK);
  says(us_cuda_limits_widths(64, 50257, &err), &err,
       "a vocabulary of 50257; on a GPU a multiple of 8 is trained");
}
END_TEST

START_TEST(heads_that_tensor_cores_cannot_take_are_named) {
  struct us_err err = {0};
  struct us_attention_shape a = {.qk_dim = 192, .v_dim = 128};
  ck_assert_int_eq(us_cuda_limits_heads(&a, &err), US_OK);
  a.qk_dim = 24;
  says(us_cuda_limits_heads(&a, &err), &err,
       "heads of 24 and 128; on a GPU multiples of 16 up to 192 and 128 are trained");
  a.qk_dim = 192, a.v_dim = 144;
  ck_assert_int_eq(us_cuda_limits_heads(&a, &err), US_ERR_USAGE);
  a.qk_dim = 208, a.v_dim = 128;
  ck_assert_int_eq(us_cuda_limits_heads(&a, &err), US_ERR_USAGE);
}
END_TEST

START_TEST(too_many_experts_are_named) {
  struct us_err err = {0};
  ck_assert_int_eq(us_cuda_limits_experts(1024, 32, &err), US_OK);
  ck_assert_int_eq(us_cuda_limits_experts(0, 0, &err), US_OK);
  says(us_cuda_limits_experts(1025, 8, &err), &err,
       "1025 experts, 8 a token; on a GPU up to 1024 and 32 are trained");
  ck_assert_int_eq(us_cuda_limits_experts(384, 33, &err), US_ERR_USAGE);
}
END_TEST

/* Kernels over rows count pieces of 8 values (of the embedding 4) in 31 bits: the widest array decides how many rows fit. */
START_TEST(rows_fit_while_every_piece_of_the_widest_array_has_a_number) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  shape.hidden = 1024, shape.top_k = 2, shape.expert_inner = 512, shape.dense_inner = 64;
  ck_assert_uint_eq(us_cuda_limits_widest(&shape), 2048); /* the embedding's pieces are half as wide */
  ck_assert_int_eq(us_cuda_limits_rows(INT32_MAX / 256, 2048, &err), US_OK);
  says(us_cuda_limits_rows(INT32_MAX / 256 + 1, 2048, &err), &err,
       "8388608 rows a batch; on a GPU 1 to 8388607 of this model are trained");
  says(us_cuda_limits_rows(0, 2048, &err), &err,
       "0 rows a batch; on a GPU 1 to 8388607 of this model are trained");
  shape.top_k = 8;
  ck_assert_uint_eq(us_cuda_limits_widest(&shape), 8 * 512);
  shape.dense_inner = 8192;
  ck_assert_uint_eq(us_cuda_limits_widest(&shape), 8192);
  shape.swa.v_dim = 8192;
  ck_assert_uint_eq(us_cuda_limits_widest(&shape),
                    8192 * 2 + 4 * (4 + 2)); /* values of 2 heads, 4 pairs of 6 */
}
END_TEST

START_TEST(a_drafter_is_as_wide_as_its_widest_layer) {
  struct us_draft_shape shape = {.hidden = 64, .inner = 96};
  shape.attention =
      (struct us_attention_shape){.q_heads = 2, .kv_heads = 1, .qk_dim = 16, .v_dim = 16, .rotary_dim = 8};
  ck_assert_uint_eq(us_cuda_limits_draft_widest(&shape), 256); /* a warp, whatever it has to do */
  shape.inner = 288;
  ck_assert_uint_eq(us_cuda_limits_draft_widest(&shape), 288);
  shape.attention.kv_heads = 32;
  ck_assert_uint_eq(us_cuda_limits_draft_widest(&shape), 4 * 34 + 32 * 16);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("limits");
  tcase_add_test(c, a_hidden_size_beyond_what_norms_hold_is_named);
  tcase_add_test(c, a_vocabulary_that_is_no_multiple_of_8_is_named);
  tcase_add_test(c, heads_that_tensor_cores_cannot_take_are_named);
  tcase_add_test(c, too_many_experts_are_named);
  tcase_add_test(c, rows_fit_while_every_piece_of_the_widest_array_has_a_number);
  tcase_add_test(c, a_drafter_is_as_wide_as_its_widest_layer);
  return us_suite("limits", c);
}

US_TEST_MAIN(make_suite)
