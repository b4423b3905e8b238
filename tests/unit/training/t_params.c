/* t_params.c: parameters: initial values, fake-quantization equals export, refusal of NaN. */
#include "training/params.h"

#include "tiny.h"

#include <math.h>
#include <stdlib.h>

START_TEST(fresh_values_have_their_deviation_and_their_seed) {
  struct us_shape shape = tiny_pro();
  struct us_params a, b, other;
  ck_assert_int_eq(us_params_init_fresh(&a, &shape, 3, 0.05f, NULL), US_OK);
  ck_assert_int_eq(us_params_init_fresh(&b, &shape, 3, 0.05f, NULL), US_OK);
  ck_assert_int_eq(us_params_init_fresh(&other, &shape, 4, 0.05f, NULL), US_OK);
  ck_assert(memcmp(a.value, b.value, a.floats * sizeof(float)) == 0);
  ck_assert(memcmp(a.value, other.value, a.floats * sizeof(float)) != 0);
  for (size_t i = 0; i < a.count; i++) {
    const struct us_param *p = &a.items[i];
    size_t n = p->rows * p->cols;
    double sum = 0.0, square = 0.0, fourth = 0.0;
    for (size_t k = 0; k < n; k++) {
      double x = (double)p->value[k] / 0.05;
      sum += x, square += x * x, fourth += x * x * x * x;
    }
    if (p->vector) {
      float expected = strcmp(p->family, "norm") == 0 ? 1.0f : 0.0f;
      for (size_t k = 0; k < n; k++) ck_assert(p->value[k] == expected);
    } else if (n >= 1024) { /* five deviations of mean, variance and fourth moment of n normal draws */
      ck_assert_msg(fabs(sum) < 5.0 * sqrt((double)n), "%s: mean", p->name);
      ck_assert_msg(fabs(square - (double)n) < 5.0 * sqrt(2.0 * (double)n), "%s: variance", p->name);
      ck_assert_msg(fabs(fourth - 3.0 * (double)n) < 5.0 * sqrt(96.0 * (double)n), "%s: fourth moment",
                    p->name);
    }
  }
  us_params_release(&a);
  us_params_release(&b);
  us_params_release(&other);
}
END_TEST

START_TEST(groups_follow_the_rules_of_muon) {
  struct us_shape shape = tiny_pro();
  struct us_params p;
  ck_assert_int_eq(us_params_init_fresh(&p, &shape, 3, 0.0f, NULL), US_OK);
  ck_assert_int_eq(us_params_find(&p, "model.embed_tokens.weight")->group, US_PARAM_ADAMW);
  ck_assert_int_eq(us_params_find(&p, "lm_head.weight")->group, US_PARAM_ADAMW);
  ck_assert_int_eq(us_params_find(&p, "model.norm.weight")->group, US_PARAM_ADAMW);
  ck_assert_int_eq(us_params_find(&p, "model.layers.1.mlp.gate.weight")->group, US_PARAM_ADAMW);
  ck_assert_int_eq(us_params_find(&p, "model.layers.1.mlp.gate.e_score_correction_bias")->group,
                   US_PARAM_BIAS);
  ck_assert_int_eq(us_params_find(&p, "model.layers.1.mlp.experts.2.down_proj.weight")->group, US_PARAM_MUON);
  struct us_param *qkv = us_params_find(&p, "model.layers.2.self_attn.qkv_proj.weight");
  ck_assert_int_eq(qkv->group, US_PARAM_MUON);
  ck_assert(qkv->split.chunks == 2 && qkv->split.q_rows == 48 && qkv->split.k_rows == 24 &&
            qkv->split.v_rows == 16);
  us_params_release(&p);
}
END_TEST

/* What the forward pass multiplies by is what the exported model decodes to, bit for bit, in every format. */
static void check_format(enum us_format format) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  struct us_params p, back;
  struct us_model *model = NULL;
  struct us_pool *pool = NULL;
  ck_assert_int_eq(us_pool_create(3, &pool, &err), US_OK);
  ck_assert_int_eq(us_params_init_fresh(&p, &shape, 9, 0.05f, &err), US_OK);
  for (size_t i = 0; i < p.count; i++) {
    if (!p.items[i].vector && strcmp(p.items[i].family, "router") != 0) p.items[i].encoding.format = format;
    for (size_t k = 0; p.items[i].vector && k < p.items[i].rows; k++) p.items[i].value[k] += 0.01f * (float)k;
  }
  ck_assert_msg(us_params_refresh(&p, NULL, US_SEQ_ROUND_BF16, &err) == US_OK, "%s", err.message);
  ck_assert_int_eq(us_model_create(&shape, &model, &err), US_OK);
  ck_assert_msg(us_params_export(&p, model, &err) == US_OK, "%s", err.message);
  ck_assert_int_eq(us_params_init_model(&back, model, pool, true, &err), US_OK);
  ck_assert_uint_eq(back.floats, p.floats);
  for (size_t i = 0; i < p.count; i++) {
    size_t n = p.items[i].rows * p.items[i].cols;
    ck_assert_msg(memcmp(p.items[i].compute, back.items[i].value, n * sizeof(float)) == 0, "%s in %s",
                  p.items[i].name, us_format_name(format));
  }
  us_pool_free(pool);
  us_model_free(model);
  us_params_release(&p);
  us_params_release(&back);
}

START_TEST(compute_weights_are_the_exported_ones) {
  check_format(US_FORMAT_F32);
  check_format(US_FORMAT_BF16);
  check_format(US_FORMAT_FP8);
  check_format(US_FORMAT_MXFP4);
}
END_TEST

START_TEST(without_rounding_the_masters_are_used) {
  struct us_shape shape = tiny_pro();
  struct us_params p;
  ck_assert_int_eq(us_params_init_fresh(&p, &shape, 9, 0.05f, NULL), US_OK);
  ck_assert_int_eq(us_params_refresh(&p, NULL, US_SEQ_ROUND_NONE, NULL), US_OK);
  ck_assert(memcmp(p.value, p.compute, p.floats * sizeof(float)) == 0);
  ck_assert_int_eq(us_params_refresh(&p, NULL, US_SEQ_ROUND_BF16, NULL), US_OK);
  ck_assert(memcmp(p.value, p.compute, p.floats * sizeof(float)) != 0);
  us_params_release(&p);
}
END_TEST

START_TEST(a_value_that_is_not_finite_is_named) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  struct us_params p;
  ck_assert_int_eq(us_params_init_fresh(&p, &shape, 9, 0.05f, NULL), US_OK);
  us_params_find(&p, "model.layers.1.self_attn.o_proj.weight")->value[65] = NAN;
  ck_assert_int_eq(us_params_refresh(&p, NULL, US_SEQ_ROUND_BF16, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, "model.layers.1.self_attn.o_proj.weight") != NULL, "%s", err.message);
  ck_assert_str_eq(us_params_find_nonfinite(&p, false)->name, "model.layers.1.self_attn.o_proj.weight");
  ck_assert(us_params_find_nonfinite(&p, true) == NULL);
  us_params_release(&p);
}
END_TEST

START_TEST(a_model_of_another_shape_is_refused) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro(), other = tiny_flash();
  struct us_params p;
  struct us_model *model = NULL;
  ck_assert_int_eq(us_params_init_fresh(&p, &shape, 9, 0.05f, NULL), US_OK);
  ck_assert_int_eq(us_model_create(&other, &model, &err), US_OK);
  ck_assert_int_eq(us_params_export(&p, model, &err), US_ERR_USAGE);
  us_model_free(model);
  us_params_release(&p);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("params");
  tcase_add_test(c, fresh_values_have_their_deviation_and_their_seed);
  tcase_add_test(c, groups_follow_the_rules_of_muon);
  tcase_add_test(c, compute_weights_are_the_exported_ones);
  tcase_add_test(c, without_rounding_the_masters_are_used);
  tcase_add_test(c, a_value_that_is_not_finite_is_named);
  tcase_add_test(c, a_model_of_another_shape_is_refused);
  return us_suite("params", c);
}

US_TEST_MAIN(make_suite)
