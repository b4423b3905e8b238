/* t_draft_head.c: a drafter's own copy of the output head: made, converted, stored and refused, drafted with.
 *
 * Truth: the codecs on the decoded matrix; a product in double of the pass's hidden rows and the decoded head.
 */
#include "model/checkpoint.h"
#include "model/count.h"
#include "model/precision.h"
#include "same_shape.h"
#include "scratch_folder.h"
#include "small.h"

#include "base/buffer.h"

#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N = 97, D = 64, B = 8 };

static const enum us_format formats[] = {US_FORMAT_BF16, US_FORMAT_FP8, US_FORMAT_MXFP4, US_FORMAT_F32};

static struct us_err err;

static struct us_precision_rules parse(const char *text) {
  struct us_precision_rules rules;
  ck_assert_msg(us_precision_parse(text, &rules, &err) == US_OK, "%s", err.message);
  return rules;
}

/* A drafter with a copy of the target's head; to be freed before `draft`. */
static struct us_draft *with_head(const struct us_draft *draft, const struct us_model *model,
                                  enum us_format format) {
  struct us_matrix_encoding encoding = {.format = format};
  struct us_draft *other = NULL;
  ck_assert_msg(us_draft_with_head(draft, &model->head, &encoding, NULL, &other, &err) == US_OK, "%s",
                err.message);
  return other;
}

/* --- made and converted --- */

START_TEST(a_drafter_gets_a_head_another_one_and_none) {
  static float expected[N * D], got[N * D];
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_model *model = m.model;
  struct us_draft *draft = m.draft, *none = NULL;
  draft->shape.vocab = 90; /* as the published one's: not the target's */
  ck_assert_ptr_eq(us_draft_head(draft, model), &model->head);
  for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
    struct us_draft *first = with_head(draft, model, US_FORMAT_FP8),
                    *own = with_head(first, model, formats[i]);
    ck_assert_ptr_eq(us_draft_head(own, model), &own->head);
    ck_assert_int_eq(own->shape.head, formats[i]);
    ck_assert_uint_eq(own->shape.vocab, N);
    ck_assert_int_eq(us_draft_shape_check(&own->shape, &model->shape, &err), US_OK);
    ck_assert_ptr_eq(own->fc.data, draft->fc.data); /* shared */
    ck_assert_mem_eq(own->mask_embedding, draft->mask_embedding, D * sizeof(float));
    ck_assert_mem_eq(own->final_norm, draft->final_norm, D * sizeof(float));
    us_matrix_decode(&model->head, expected);
    ck_assert_int_eq(us_matrix_fake_quant(expected, N, D, &(struct us_matrix_encoding){.format = formats[i]},
                                          expected, &err),
                     US_OK);
    us_matrix_decode(&own->head, got);
    ck_assert_mem_eq(got, expected, N * D * sizeof(float));
    us_draft_free(own), us_draft_free(first);
  }
  struct us_draft *own = with_head(draft, model, US_FORMAT_MXFP4);
  ck_assert_int_eq(us_draft_with_head(own, NULL, NULL, NULL, &none, &err), US_OK);
  ck_assert_ptr_eq(us_draft_head(none, model), &model->head);
  ck_assert_int_eq(none->shape.head, US_FORMAT_NONE);
  ck_assert_mem_eq(none->mask_embedding, draft->mask_embedding, D * sizeof(float));
  us_draft_free(none), us_draft_free(own);
  close_small(&m);
}
END_TEST

START_TEST(a_head_of_another_width_is_refused) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_matrix wide = m.model->head;
  struct us_matrix_encoding encoding = {.format = US_FORMAT_BF16};
  struct us_draft *other;
  wide.cols = 128;
  ck_assert_int_eq(us_draft_with_head(m.draft, &wide, &encoding, NULL, &other, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "a head of 128 columns for a drafter of 64");
  close_small(&m);
}
END_TEST

START_TEST(a_drafters_head_converts_by_its_own_rule_and_counts_apart) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_draft *draft = m.draft, *own = with_head(draft, m.model, US_FORMAT_BF16), *converted = NULL;
  struct us_precision_rules rules = parse("draft=fp8,draft.head=mxfp4"), alone = parse("draft.head=fp8");
  struct us_count count;
  ck_assert_int_eq(us_draft_convert(own, &(struct us_convert){.rules = &rules}, NULL, &converted, &err),
                   US_OK);
  ck_assert_int_eq(converted->head.format, US_FORMAT_MXFP4);
  ck_assert_int_eq(converted->shape.head, US_FORMAT_MXFP4);
  ck_assert_int_eq(converted->fc.format, US_FORMAT_FP8);
  ck_assert_int_eq(us_draft_format(converted), US_FORMAT_FP8);
  ck_assert_int_eq(us_draft_count(converted, &count, &err), US_OK);
  ck_assert_uint_eq(count.family[US_FAMILY_DRAFT_HEAD].parameters, N * D);
  ck_assert_uint_eq(count.family[US_FAMILY_DRAFT_HEAD].bytes, N * D / 32 * 17);
  ck_assert_str_eq(us_family_name(US_FAMILY_DRAFT_HEAD), "draft.head");
  us_draft_free(converted);
  ck_assert_int_eq(us_draft_convert(draft, &(struct us_convert){.rules = &alone}, NULL, &converted, &err),
                   US_ERR_USAGE);
  ck_assert_str_eq(err.message, "precision rule 'draft.head=fp8': matches no tensor");
  us_draft_free(own);
  close_small(&m);
}
END_TEST

/* --- stored --- */

static char path[128];

static const char *in(const char *name) {
  snprintf(path, sizeof path, "%s/%s", scratch_folder, name);
  return path;
}

START_TEST(a_head_comes_back_bit_for_bit_from_file_and_folder) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_draft *own = with_head(m.draft, m.model, formats[_i]), *back;
  for (int h5 = 0; h5 < 2; h5++) {
    ck_assert_msg(us_draft_write(in(h5 ? "d.h5" : "d"), own, NULL, &err) == US_OK, "%s", err.message);
    ck_assert_msg(us_draft_open(path, &back, &err) == US_OK, "%s", err.message);
    ck_assert_int_eq(us_draft_check(back, &err), US_OK);
    ck_assert_int_eq(us_draft_check_target(back, m.model, &err), US_OK);
    assert_same_draft_shape(&back->shape, &own->shape);
    ck_assert_int_eq(back->head.format, formats[_i]);
    ck_assert_mem_eq(back->head.data, own->head.data, us_matrix_data_bytes(formats[_i], N, D));
    size_t scales = us_matrix_scale_bytes(formats[_i], N, D, 0);
    if (scales) ck_assert_mem_eq(back->head.scales, own->head.scales, scales);
    us_draft_free(back);
  }
  us_draft_free(own);
  close_small(&m);
}
END_TEST

START_TEST(a_folder_whose_config_and_head_differ_is_refused_by_its_field) {
  static const struct {
    bool own;
    const char *from, *to, *expect;
  } cases[] = {
      {true, "\"own_head\": \"mxfp4\"", "\"other\": 1", "lm_head.weight: the config has no such tensor"},
      {true, "\"vocab_size\": 97", "\"vocab_size\": 98",
       "lm_head.weight: shape is [97, 32], expected [98, 32]"},
      {true, "\"own_head\": \"mxfp4\"", "\"own_head\": \"int4\"", "dflash_config.own_head: 'int4' is not"},
      {false, "\"use_swa\"", "\"own_head\": \"fp8\", \"use_swa\"", "lm_head.weight: missing"}};
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_draft *own = with_head(m.draft, m.model, US_FORMAT_MXFP4), *back = NULL;
  ck_assert_int_eq(us_draft_write(in("d"), cases[_i].own ? own : m.draft, NULL, &err), US_OK);
  replace_in_config(path, cases[_i].from, cases[_i].to);
  ck_assert_int_eq(us_draft_open(path, &back, &err), US_ERR_INPUT);
  ck_assert_msg(!strncmp(err.message, path, strlen(path)) && strstr(err.message, cases[_i].expect), "%s",
                err.message);
  us_draft_free(own);
  close_small(&m);
}
END_TEST

/* What the tensor is decides, as for a model. */
START_TEST(a_head_of_another_format_than_the_config_says_is_what_it_is) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_draft *own = with_head(m.draft, m.model, US_FORMAT_MXFP4), *back;
  ck_assert_int_eq(us_draft_write(in("d"), own, NULL, &err), US_OK);
  replace_in_config(path, "\"own_head\": \"mxfp4\"", "\"own_head\": \"fp8\"");
  ck_assert_int_eq(us_draft_open(path, &back, &err), US_OK);
  ck_assert_int_eq(back->shape.head, US_FORMAT_MXFP4);
  us_draft_free(back), us_draft_free(own);
  close_small(&m);
}
END_TEST

START_TEST(a_head_of_another_vocabulary_names_both_files) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_draft *own = with_head(m.draft, m.model, US_FORMAT_FP8);
  m.model->shape.vocab = 101;
  strcpy(own->path, "d.h5"), strcpy(m.model->path, "q.h5");
  ck_assert_int_eq(us_draft_check_target(own, m.model, &err), US_ERR_INPUT);
  ck_assert_str_eq(err.message, "d.h5 does not fit q.h5: drafter vocab_size: 97, but the model's is 101, and "
                                "the drafter has an output head of its own");
  us_draft_free(own);
  close_small(&m);
}
END_TEST

/* --- drafted with --- */

START_TEST(drafts_are_the_hidden_rows_times_the_drafters_head) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_draft *own = with_head(m.draft, m.model, formats[_i]);
  static float head[N * D], logits[(B - 1) * N], shared[(B - 1) * N], hidden[B * D];
  struct us_draft_pass pass = {.anchor = 5, .block = B, .logits = shared, .hidden = hidden};
  struct us_kv *kv = pass.kv = new_draft_kv(&m);
  struct us_executor *ex;
  ck_assert_int_eq(m.ex->ops->draft(m.ex, &pass, &err), US_OK);
  ck_assert_int_eq(us_executor_create_reference(m.model, own, m.pool, US_ROUND_BF16, &ex, &err), US_OK);
  pass.logits = logits;
  ck_assert_int_eq(ex->ops->draft(ex, &pass, &err), US_OK);
  us_matrix_decode(&own->head, head);
  for (int r = 0; r < B - 1; r++)
    for (int n = 0; n < N; n++) {
      double sum = 0, size = 0;
      for (int k = 0; k < D; k++) {
        double term = (double)hidden[(r + 1) * D + k] * (double)head[n * D + k];
        sum += term, size += fabs(term);
      }
      ck_assert_double_le(fabs(sum - (double)logits[r * N + n]), D * 0x1p-24 * size);
    }
  bool same = memcmp(logits, shared, sizeof logits) == 0; /* the target's is bf16 */
  ck_assert_int_eq(same, formats[_i] == US_FORMAT_BF16 || formats[_i] == US_FORMAT_F32);
  ex->ops->free(ex);
  us_kv_free(kv);
  us_draft_free(own);
  close_small(&m);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("draft_head");
  int n = sizeof formats / sizeof *formats;
  tcase_add_checked_fixture(c, scratch_folder_make, scratch_folder_remove);
  tcase_add_test(c, a_drafter_gets_a_head_another_one_and_none);
  tcase_add_test(c, a_head_of_another_width_is_refused);
  tcase_add_test(c, a_drafters_head_converts_by_its_own_rule_and_counts_apart);
  tcase_add_loop_test(c, a_head_comes_back_bit_for_bit_from_file_and_folder, 0, n);
  tcase_add_loop_test(c, a_folder_whose_config_and_head_differ_is_refused_by_its_field, 0, 4);
  tcase_add_test(c, a_head_of_another_format_than_the_config_says_is_what_it_is);
  tcase_add_test(c, a_head_of_another_vocabulary_names_both_files);
  tcase_add_loop_test(c, drafts_are_the_hidden_rows_times_the_drafters_head, 0, n);
  return us_suite("draft_head", c);
}
US_TEST_MAIN(make_suite)
