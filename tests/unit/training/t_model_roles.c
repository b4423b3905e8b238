/* t_model_roles.c: finding the tensors of the graph, and what is said where they are missing or lie apart. */
#include "training/model_roles.h"

#include "tiny.h"

static struct us_params fresh(const struct us_shape *shape) {
  struct us_err err = {0};
  struct us_params params;
  ck_assert_msg(us_params_init_fresh(&params, shape, 1, 0.02f, &err) == US_OK, "%s", err.message);
  return params;
}

static struct us_param *named(const struct us_params *params, const char *name) {
  struct us_param *p = us_params_find(params, name);
  ck_assert_msg(p != NULL, "%s", name);
  return p;
}

/* Layer l is refused with a sentence that ends so. */
static void refused(const struct us_shape *shape, const struct us_params *params, uint32_t l,
                    const char *end) {
  struct us_err err = {0};
  struct us_layer_roles roles;
  ck_assert_int_eq(us_layer_roles_find(shape, params, l, &roles, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, end) != NULL, "%s", err.message);
}

START_TEST(every_expert_is_three_tensors_behind_the_first) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  struct us_params params = fresh(&shape);
  struct us_layer_roles roles;
  ck_assert_int_eq(us_layer_roles_find(&shape, &params, 1, &roles, &err), US_OK);
  ck_assert_str_eq(roles.experts[3 * 3 + 2].name, "model.layers.1.mlp.experts.3.down_proj.weight");
  ck_assert_str_eq(roles.qkv->name, "model.layers.1.self_attn.qkv_proj.weight");
  ck_assert_ptr_nonnull(roles.sink);
  ck_assert_ptr_null(roles.gate_up);
  us_params_release(&params);
}
END_TEST

START_TEST(a_missing_norm_is_said) {
  struct us_shape shape = tiny_pro();
  struct us_params params = fresh(&shape);
  named(&params, "model.layers.2.input_layernorm.weight")->name[0] = 'x';
  refused(&shape, &params, 2, "layer 2: a tensor is missing");
  us_params_release(&params);
}
END_TEST

START_TEST(a_missing_router_is_said) {
  struct us_shape shape = tiny_pro();
  struct us_params params = fresh(&shape);
  named(&params, "model.layers.1.mlp.gate.weight")->name[0] = 'x';
  refused(&shape, &params, 1, "layer 1: router or experts are missing");
  us_params_release(&params);
}
END_TEST

START_TEST(gate_and_up_that_lie_apart_are_refused) {
  struct us_shape shape = tiny_pro();
  struct us_params params = fresh(&shape);
  named(&params, "model.layers.0.mlp.up_proj.weight")->offset += 16;
  refused(&shape, &params, 0, "layer 0: gate and up are not stored behind each other");
  named(&params, "model.layers.1.mlp.experts.2.up_proj.weight")->offset += 16;
  refused(&shape, &params, 1, "layer 1: expert 2: gate and up are not stored behind each other");
  us_params_release(&params);
}
END_TEST

START_TEST(split_projections_that_lie_apart_are_refused) {
  struct us_shape shape = tiny_pro();
  shape.qkv_chunks = 0;
  struct us_params params = fresh(&shape);
  named(&params, "model.layers.1.self_attn.v_proj.weight")->offset += 16;
  refused(&shape, &params, 1, "layer 1: q, k and v are not stored behind each other");
  us_params_release(&params);
}
END_TEST

START_TEST(a_model_without_its_head_is_refused) {
  struct us_err err = {0};
  struct us_shape shape = tiny_pro();
  struct us_params params = fresh(&shape);
  struct us_model_roles roles;
  named(&params, "lm_head.weight")->name[0] = 'x';
  ck_assert_int_eq(us_model_roles_find(&params, &roles, &err), US_ERR_CHECK);
  ck_assert_str_eq(err.message, "embedding or head is missing");
  us_params_release(&params);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("model_roles");
  tcase_add_test(c, every_expert_is_three_tensors_behind_the_first);
  tcase_add_test(c, a_missing_norm_is_said);
  tcase_add_test(c, a_missing_router_is_said);
  tcase_add_test(c, gate_and_up_that_lie_apart_are_refused);
  tcase_add_test(c, split_projections_that_lie_apart_are_refused);
  tcase_add_test(c, a_model_without_its_head_is_refused);
  return us_suite("model_roles", c);
}

US_TEST_MAIN(make_suite)
