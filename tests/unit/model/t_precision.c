/* t_precision.c: precision rules, conversion, counting, random models.
 *
 * Truth: the published parameter count of MiMo-V2.5-Pro, formats encoded by hand, and one tensor made twice.
 */
#include "model/count.h"
#include "model/precision.h"
#include "model/random.h"
#include "suite.h"

#include <math.h>
#include <string.h>

static struct us_shape load(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  ck_assert_msg(us_shape_load(name, &shape, &err) == US_OK, "%s", err.message);
  return shape;
}

static struct us_model *random_model(const char *name) {
  struct us_shape shape = load(name);
  struct us_model *model = NULL;
  struct us_err err = {0};
  ck_assert_msg(us_model_random(&shape, us_test_seed(), NULL, &model, &err) == US_OK, "%s", err.message);
  return model;
}

static struct us_precision_rules parse(const char *text) {
  struct us_precision_rules rules;
  struct us_err err = {0};
  ck_assert_msg(us_precision_parse(text, &rules, &err) == US_OK, "%s", err.message);
  return rules;
}

/* --- rules --- */

static enum us_format format_after(const char *text, const char *tensor) {
  struct us_model *model = random_model("tiny");
  struct us_precision_rules rules = parse(text);
  struct us_precision_row *rows = NULL;
  size_t count = 0;
  struct us_err err = {0};
  enum us_format format = US_FORMAT_NONE;
  ck_assert_msg(us_model_precision(model, &rules, &rows, &count, &err) == US_OK, "%s", err.message);
  for (size_t i = 0; i < count; i++) {
    if (strcmp(rows[i].ref.name, tensor) == 0) format = rows[i].to;
  }
  free(rows);
  us_model_free(model);
  return format;
}

static const struct {
  const char *rules, *tensor;
  enum us_format format;
} matches[] = {
    {"experts=mxfp4", "model.layers.1.mlp.experts.15.down_proj.weight", US_FORMAT_MXFP4},
    {"experts=mxfp4", "model.layers.0.mlp.down_proj.weight", US_FORMAT_BF16},
    {"experts=mxfp4,layers.0-2.experts=bf16", "model.layers.2.mlp.experts.0.up_proj.weight", US_FORMAT_BF16},
    {"experts=mxfp4,layers.0-2.experts=bf16", "model.layers.3.mlp.experts.0.up_proj.weight", US_FORMAT_MXFP4},
    {"layers.0-2.experts=bf16,experts=mxfp4", "model.layers.2.mlp.experts.0.up_proj.weight", US_FORMAT_MXFP4},
    {"experts.gate=mxfp4", "model.layers.1.mlp.experts.3.up_proj.weight", US_FORMAT_MXFP4},
    {"experts.gate=mxfp4", "model.layers.1.mlp.experts.3.down_proj.weight", US_FORMAT_BF16},
    {"experts.down=fp8", "model.layers.1.mlp.experts.3.down_proj.weight", US_FORMAT_FP8},
    {"attn.q=fp8", "model.layers.1.self_attn.v_proj.weight", US_FORMAT_FP8},
    {"attn.qkv=fp8", "model.layers.1.self_attn.o_proj.weight", US_FORMAT_BF16},
    {"attn=fp8", "model.layers.1.self_attn.o_proj.weight", US_FORMAT_FP8},
    {"mlp=fp8", "model.layers.0.mlp.gate_proj.weight", US_FORMAT_FP8},
    {"layers.3=fp8", "model.layers.3.self_attn.o_proj.weight", US_FORMAT_FP8},
    {"layers.3=fp8", "lm_head.weight", US_FORMAT_BF16},
    {"all=fp8", "lm_head.weight", US_FORMAT_FP8},
    {"all=fp8", "model.layers.1.mlp.gate.weight", US_FORMAT_F32},
    {" router=bf16 , head=fp8 ", "model.layers.1.mlp.gate.weight", US_FORMAT_BF16},
    {"", "lm_head.weight", US_FORMAT_BF16},
};

START_TEST(the_last_rule_that_matches_wins) {
  ck_assert_int_eq(format_after(matches[_i].rules, matches[_i].tensor), matches[_i].format);
}
END_TEST

static const struct {
  const char *rules, *expect;
} bad_syntax[] = {
    {"experts", "'experts': expected MODULE=FORMAT"},
    {"experts=int4", "'experts=int4': format is not"},
    {"expert=fp8", "no module 'expert'"},
    {"layers.a-3.experts=fp8", "layer range"},
    {"layers.3-1.experts=fp8", "layer range"},
    {"layers.999.experts=fp8", "layer range"},
    {"layers.experts=fp8", "layer range"},
    {"=fp8", "no module ''"},
};

START_TEST(a_rule_that_cannot_be_read_is_quoted) {
  struct us_precision_rules rules;
  struct us_err err = {0};
  ck_assert_int_eq(us_precision_parse(bad_syntax[_i].rules, &rules, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, bad_syntax[_i].expect) != NULL, "%s", err.message);
}
END_TEST

static const struct {
  const char *rules, *expect;
} bad_match[] = {
    {"layers.0.experts=fp8", "'layers.0.experts=fp8': matches no tensor"},
    {"layers.9.attn=fp8", "matches no tensor"},
    {"draft=fp8", "matches no tensor"},
    {"router=fp8", "the router is f32 or bf16"},
};

START_TEST(a_rule_that_matches_nothing_is_an_error) {
  struct us_model *model = random_model("tiny");
  struct us_precision_rules rules = parse(bad_match[_i].rules);
  struct us_precision_row *rows = NULL;
  size_t count = 0;
  struct us_err err = {0};
  ck_assert_int_eq(us_model_precision(model, &rules, &rows, &count, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, bad_match[_i].expect) != NULL, "%s", err.message);
  us_model_free(model);
}
END_TEST

START_TEST(rules_set_the_families_of_random_weights) {
  struct us_shape shape = {
      .precision = {.o_proj = US_FORMAT_BF16, .router = US_FORMAT_F32, .draft = US_FORMAT_BF16}};
  const struct us_precision *precision = &shape.precision;
  struct us_draft_shape draft = {.vocab = 7};
  struct us_precision_rules rules = parse("mlp=mxfp4,attn.o=fp8,draft=fp8,head=bf16,draft=mxfp4");
  ck_assert_int_eq(us_precision_shape(&rules, &shape, &draft, NULL), US_OK);
  ck_assert_int_eq(precision->experts, US_FORMAT_MXFP4);
  ck_assert_int_eq(precision->dense, US_FORMAT_MXFP4);
  ck_assert_int_eq(precision->o_proj, US_FORMAT_FP8);
  ck_assert_int_eq(precision->head, US_FORMAT_BF16);
  ck_assert_int_eq(precision->draft, US_FORMAT_MXFP4);
  ck_assert_int_eq(precision->router, US_FORMAT_F32);
  ck_assert_int_eq(draft.head, US_FORMAT_NONE);
  ck_assert_uint_eq(draft.vocab, 7);
}
END_TEST

START_TEST(a_rule_gives_a_random_drafter_a_head_and_wider_ones_change_it) {
  static const struct {
    const char *rules;
    enum us_format body, head;
  } cases[] = {{"draft=fp8,draft.head=mxfp4", US_FORMAT_FP8, US_FORMAT_MXFP4},
               {"draft.head=mxfp4,draft=fp8", US_FORMAT_FP8, US_FORMAT_FP8},
               {"draft.head=mxfp4,all=bf16", US_FORMAT_BF16, US_FORMAT_BF16},
               {"all=fp8", US_FORMAT_FP8, US_FORMAT_NONE}};
  struct us_shape shape = {.vocab = 512};
  struct us_draft_shape draft = {.vocab = 7};
  struct us_precision_rules rules = parse(cases[_i].rules);
  struct us_err err = {0};
  ck_assert_int_eq(us_precision_shape(&rules, &shape, &draft, &err), US_OK);
  ck_assert_int_eq(shape.precision.draft, cases[_i].body);
  ck_assert_int_eq(draft.head, cases[_i].head);
  ck_assert_uint_eq(draft.vocab, cases[_i].head == US_FORMAT_NONE ? 7 : 512);
  rules = parse("draft.head=fp8");
  ck_assert_int_eq(us_precision_shape(&rules, &shape, NULL, &err), US_ERR_USAGE);
  ck_assert_str_eq(err.message, "precision rule 'draft.head=fp8': there is no drafter");
}
END_TEST

START_TEST(random_weights_have_one_format_a_family) {
  static const char *const bad[] = {"layers.3.attn.o=fp8", "experts.down=fp8", "router=fp8"};
  struct us_shape shape = {0};
  struct us_precision_rules rules = parse(bad[_i]);
  struct us_err err = {0};
  ck_assert_int_eq(us_precision_shape(&rules, &shape, NULL, &err), US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, _i < 2 ? "one format a family" : "the router is") != NULL, "%s",
                err.message);
}
END_TEST

START_TEST(the_table_says_what_conversion_then_does) {
  struct us_model *model = random_model("tiny-pro"), *converted = NULL;
  struct us_precision_rules rules = parse("experts=mxfp4,attn.qkv=fp8");
  struct us_precision_row *rows = NULL, *after = NULL;
  size_t count = 0;
  struct us_err err = {0};
  ck_assert_int_eq(us_model_precision(model, &rules, &rows, &count, &err), US_OK);
  struct us_convert how = {.rules = &rules};
  ck_assert_msg(us_model_convert(model, &how, NULL, &converted, &err) == US_OK, "%s", err.message);
  ck_assert_int_eq(us_model_precision(converted, NULL, &after, &count, &err), US_OK);
  for (size_t i = 0; i < count; i++) {
    ck_assert_int_eq(rows[i].to, after[i].from);
    ck_assert_uint_eq(rows[i].to_bytes, after[i].from_bytes);
  }
  ck_assert_int_eq(converted->shape.precision.experts, US_FORMAT_MXFP4);
  ck_assert_int_eq(converted->shape.precision.qkv, US_FORMAT_FP8);
  ck_assert_str_eq(converted->scale_rule, "mse");
  free(rows);
  free(after);
  us_model_free(converted);
  us_model_free(model);
}
END_TEST

/* --- conversion --- */

START_TEST(conversion_equals_encoding_the_whole_matrix) {
  struct us_model *model = random_model("tiny-pro"), *converted = NULL;
  struct us_precision_rules rules = parse("experts=mxfp4,attn.qkv=fp8");
  struct us_pool *pool = NULL;
  ck_assert_int_eq(us_pool_create(3, &pool, NULL), US_OK);
  ck_assert_int_eq(us_model_convert(model, &(struct us_convert){.rules = &rules}, pool, &converted, NULL),
                   US_OK);
  const struct us_matrix *from = &model->layers[2].qkv, *to = &converted->layers[2].qkv;
  size_t chunk = from->rows / 4;
  ck_assert_uint_eq(to->scale_chunk_rows, chunk);
  float *values = malloc(from->rows * from->cols * sizeof *values);
  us_matrix_decode(from, values);
  struct us_matrix_encoding fp8 = {.format = US_FORMAT_FP8, .scale_chunk_rows = chunk};
  unsigned char *codes = malloc(from->rows * from->cols), *scales = malloc(4096);
  ck_assert_int_eq(us_matrix_encode(values, from->rows, from->cols, &fp8, codes, scales, NULL), US_OK);
  ck_assert_mem_eq(codes, to->data, from->rows * from->cols);
  ck_assert_mem_eq(scales, to->scales, us_matrix_scale_bytes(US_FORMAT_FP8, from->rows, from->cols, chunk));
  from = &model->layers[1].experts[5].down, to = &converted->layers[1].experts[5].down;
  us_matrix_decode(from, values);
  struct us_matrix_encoding mxfp4 = {.format = US_FORMAT_MXFP4};
  ck_assert_int_eq(us_matrix_encode(values, from->rows, from->cols, &mxfp4, codes, scales, NULL), US_OK);
  ck_assert_mem_eq(codes, to->data, from->rows * from->cols / 2);
  ck_assert_mem_eq(scales, to->scales, from->rows * from->cols / 32);
  ck_assert_ptr_eq(model->head.data, converted->head.data); /* unchanged: shared */
  ck_assert_mem_eq(model->layers[1].router_bias, converted->layers[1].router_bias, 16 * sizeof(float));
  free(values);
  free(codes);
  free(scales);
  us_pool_free(pool);
  us_model_free(converted);
  us_model_free(model);
}
END_TEST

START_TEST(a_nan_in_a_weight_names_the_tensor) {
  struct us_model *model = random_model("tiny"), *converted = NULL;
  struct us_precision_rules rules = parse("experts=mxfp4");
  struct us_err err = {0};
  ((uint16_t *)(uintptr_t)model->layers[1].experts[3].up.data)[70] = 0x7fc0;
  ck_assert_int_eq(us_model_convert(model, &(struct us_convert){.rules = &rules}, NULL, &converted, &err),
                   US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "model.layers.1.mlp.experts.3.up_proj.weight") != NULL, "%s",
                err.message);
  ck_assert_ptr_null(converted);
  us_model_free(model);
}
END_TEST

START_TEST(a_drafter_converts_by_the_rule_draft) {
  struct us_draft_shape shape = {.layers = 1,
                                 .hidden = 64,
                                 .vocab = 512,
                                 .inner = 96,
                                 .norm_eps = 1e-5,
                                 .value_scale = 1,
                                 .block = 4,
                                 .mask_id = 1,
                                 .taps = 1,
                                 .target_layers = 4,
                                 .attention = {.q_heads = 4,
                                               .kv_heads = 2,
                                               .qk_dim = 16,
                                               .v_dim = 16,
                                               .rotary_dim = 8,
                                               .rope_theta = 10000,
                                               .window = 32}};
  struct us_draft *draft = NULL, *converted = NULL;
  struct us_precision_rules rules = parse("draft=fp8"), wrong = parse("experts=fp8");
  struct us_err err = {0};
  ck_assert_int_eq(us_draft_random(&shape, US_FORMAT_BF16, 1, NULL, &draft, NULL), US_OK);
  ck_assert_int_eq(us_draft_convert(draft, &(struct us_convert){.rules = &rules}, NULL, &converted, &err),
                   US_OK);
  ck_assert_int_eq(converted->fc.format, US_FORMAT_FP8);
  ck_assert_int_eq(converted->layers[0].down.format, US_FORMAT_FP8);
  ck_assert_int_eq(us_draft_format(draft), US_FORMAT_BF16);
  ck_assert_int_eq(us_draft_format(converted), US_FORMAT_FP8);
  ck_assert_mem_eq(converted->mask_embedding, draft->mask_embedding, 64 * sizeof(float));
  us_draft_free(converted);
  ck_assert_int_eq(us_draft_convert(draft, &(struct us_convert){.rules = &wrong}, NULL, &converted, &err),
                   US_ERR_USAGE);
  ck_assert_ptr_null(converted);
  us_draft_free(draft);
}
END_TEST

/* --- counting --- */

START_TEST(pro_counts_to_the_published_total) {
  struct us_shape pro = load("mimo-v2.5-pro");
  struct us_count count;
  ck_assert_int_eq(us_shape_count(&pro, &count, NULL), US_OK);
  /* Published for the FP8 checkpoint, MTP and scale tensors included: 1,023,244,718,976. Each of its 3 MTP layers has
   * eh_proj, 5 norms, a dense MLP, attention and 128 sinks; the FP8 scales are one value a block. */
  uint64_t D = 6144, attention = 27136 * D + D * 16384, mlp = 3 * D * 16384;
  uint64_t mtp = 3 * (2 * D * D + 5 * D + mlp + attention + 128);
  uint64_t dense_scales = 3 * 128 * 48, qkv_scales = 216 * 48, expert_scales = 3 * 16 * 48;
  uint64_t scales =
      70 * qkv_scales + dense_scales + 69 * 384 * expert_scales + 3 * (qkv_scales + dense_scales);
  ck_assert_uint_eq(count.total.parameters + mtp + scales, 1023244718976ull);
  /* One expert is 20,054,016 bytes of MXFP4, in 69 layers of 384. */
  ck_assert_uint_eq(count.family[US_FAMILY_EXPERTS].bytes, 69ull * 384 * 20054016);
  ck_assert_uint_eq(count.family[US_FAMILY_QKV].scale_bytes, 70 * qkv_scales * 4);
}
END_TEST

START_TEST(pro_activates_42_billion) {
  struct us_shape pro = load("mimo-v2.5-pro");
  struct us_count count;
  ck_assert_int_eq(us_shape_count(&pro, &count, NULL), US_OK);
  ck_assert(fabs((double)count.active.parameters / 1e9 - 41.3) < 1);
  /* Bytes a token, roofline sheet for one row: 28.6 GB and 11.1 GB of experts. */
  ck_assert(fabs((double)count.active.bytes / 1e9 - 39.7) < 0.397);
}
END_TEST

START_TEST(pico_fits_its_budget) {
  struct us_shape pico = load("pico");
  struct us_count count;
  ck_assert_int_eq(us_shape_count(&pico, &count, NULL), US_OK);
  ck_assert_uint_le(count.total.parameters, 3100000);
  ck_assert_uint_eq(count.family[US_FAMILY_EMBED].parameters, 4096 * 128);
}
END_TEST

START_TEST(nano_and_mini_have_the_sizes_they_are_named_for) {
  struct us_shape nano = load("nano"), mini = load("mini");
  struct us_count count;
  ck_assert_int_eq(us_shape_count(&nano, &count, NULL), US_OK);
  ck_assert_uint_ge(count.total.parameters, 25000000);
  ck_assert_uint_le(count.total.parameters, 30000000);
  ck_assert_uint_eq(nano.vocab, 8192);
  ck_assert_int_eq(us_shape_count(&mini, &count, NULL), US_OK);
  ck_assert_uint_ge(count.total.parameters, 900000000);
  ck_assert_uint_le(count.total.parameters, 1250000000);
  ck_assert(mini.layers >= 16 && mini.experts == 64 && mini.top_k == 8);
}
END_TEST

START_TEST(a_model_counts_as_its_shape) {
  struct us_model *model = random_model("tiny-pro");
  struct us_count of_model, of_shape;
  ck_assert_int_eq(us_model_count(model, &of_model, NULL), US_OK);
  ck_assert_int_eq(us_shape_count(&model->shape, &of_shape, NULL), US_OK);
  ck_assert_mem_eq(&of_model, &of_shape, sizeof of_model);
  us_model_free(model);
}
END_TEST

/* --- random models --- */

START_TEST(a_tensor_can_be_made_again_by_itself) {
  struct us_model *model = random_model("tiny");
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  ck_assert_int_eq(us_model_tensors(model, &refs, &count, NULL), US_OK);
  float made[512], stored[512];
  for (size_t i = 0; i < count; i++) {
    if (!refs[i].matrix) continue;
    size_t row = refs[i].rows - 1;
    us_random_row(us_test_seed(), &refs[i], row, made);
    if (refs[i].matrix->format == US_FORMAT_BF16) us_bf16_round_all(made, refs[i].cols, made);
    us_matrix_decode_row(refs[i].matrix, row, stored);
    ck_assert_mem_eq(made, stored, refs[i].cols * sizeof *made);
  }
  free(refs);
  us_model_free(model);
}
END_TEST

START_TEST(weights_have_variance_one_over_fan_in) {
  struct us_model *model = random_model("pico");
  const struct us_matrix *w = &model->head;
  double sum = 0, square = 0;
  float row[128];
  for (size_t r = 0; r < w->rows; r++) {
    us_matrix_decode_row(w, r, row);
    for (size_t c = 0; c < w->cols; c++) sum += row[c], square += (double)row[c] * row[c];
  }
  double n = (double)w->rows * (double)w->cols;
  ck_assert(fabs(sum / n) < 1e-3);
  ck_assert(fabs(square / n * 128 - 1) < 0.01);
  us_model_free(model);
}
END_TEST

START_TEST(two_seeds_give_two_models) {
  struct us_shape shape = load("tiny");
  struct us_model *a = NULL, *b = NULL;
  ck_assert_int_eq(us_model_random(&shape, 1, NULL, &a, NULL), US_OK);
  ck_assert_int_eq(us_model_random(&shape, 2, NULL, &b, NULL), US_OK);
  ck_assert(memcmp(a->head.data, b->head.data, 1024) != 0);
  ck_assert(memcmp(a->layers[1].experts[0].gate.data, a->layers[1].experts[0].up.data, 1024) != 0);
  us_model_free(a);
  us_model_free(b);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("precision");
  tcase_add_loop_test(c, the_last_rule_that_matches_wins, 0, sizeof matches / sizeof *matches);
  tcase_add_loop_test(c, a_rule_that_cannot_be_read_is_quoted, 0, sizeof bad_syntax / sizeof *bad_syntax);
  tcase_add_loop_test(c, a_rule_that_matches_nothing_is_an_error, 0, sizeof bad_match / sizeof *bad_match);
  tcase_add_test(c, rules_set_the_families_of_random_weights);
  tcase_add_loop_test(c, a_rule_gives_a_random_drafter_a_head_and_wider_ones_change_it, 0, 4);
  tcase_add_loop_test(c, random_weights_have_one_format_a_family, 0, 3);
  tcase_add_test(c, the_table_says_what_conversion_then_does);
  tcase_add_test(c, conversion_equals_encoding_the_whole_matrix);
  tcase_add_test(c, a_drafter_converts_by_the_rule_draft);
  tcase_add_test(c, a_nan_in_a_weight_names_the_tensor);
  tcase_add_test(c, pro_counts_to_the_published_total);
  tcase_add_test(c, pro_activates_42_billion);
  tcase_add_test(c, pico_fits_its_budget);
  tcase_add_test(c, nano_and_mini_have_the_sizes_they_are_named_for);
  tcase_add_test(c, a_model_counts_as_its_shape);
  tcase_add_test(c, a_tensor_can_be_made_again_by_itself);
  tcase_add_test(c, weights_have_variance_one_over_fan_in);
  tcase_add_test(c, two_seeds_give_two_models);
  return us_suite("precision", c);
}
US_TEST_MAIN(make_suite)
