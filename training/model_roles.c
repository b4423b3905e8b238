/* model_roles.c: finding the tensors of the graph by their published names. */
#include "training/model_roles.h"

#include <stdarg.h>
#include <stdio.h>

__attribute__((format(printf, 2, 3))) static struct us_param *find(const struct us_params *params,
                                                                   const char *format, ...) {
  char name[128];
  va_list args;
  va_start(args, format);
  vsnprintf(name, sizeof name, format, args);
  va_end(args);
  return us_params_find(params, name);
}

static struct us_param *in_layer(const struct us_params *params, uint32_t l, const char *rest) {
  return find(params, "model.layers.%u.%s", l, rest);
}

/* b lies right behind a, so that one product reads both. */
static bool follows(const struct us_param *a, const struct us_param *b) {
  return a && b && b->offset == a->offset + a->rows * a->cols && b->cols == a->cols;
}

enum us_status us_model_roles_find(const struct us_params *params, struct us_model_roles *ret_roles,
                                   struct us_err *err) {
  ret_roles->embed = us_params_find(params, "model.embed_tokens.weight");
  ret_roles->final_norm = us_params_find(params, "model.norm.weight");
  ret_roles->head = us_params_find(params, "lm_head.weight");
  if (!ret_roles->embed || !ret_roles->final_norm || !ret_roles->head)
    return us_err_set(err, US_ERR_CHECK, "embedding or head is missing");
  return US_OK;
}

static enum us_status find_qkv(const struct us_shape *shape, const struct us_params *params, uint32_t l,
                               struct us_layer_roles *roles, struct us_err *err) {
  if (shape->qkv_chunks) {
    roles->qkv = in_layer(params, l, "self_attn.qkv_proj.weight");
    return US_OK;
  }
  struct us_param *k = in_layer(params, l, "self_attn.k_proj.weight");
  roles->qkv = in_layer(params, l, "self_attn.q_proj.weight");
  if (!follows(roles->qkv, k) || !follows(k, in_layer(params, l, "self_attn.v_proj.weight")))
    return us_err_set(err, US_ERR_CHECK, "layer %u: q, k and v are not stored behind each other", l);
  return US_OK;
}

static enum us_status find_mlp(const struct us_shape *shape, const struct us_params *params, uint32_t l,
                               struct us_layer_roles *roles, struct us_err *err) {
  if (!shape->moe_layer[l]) {
    roles->gate_up = in_layer(params, l, "mlp.gate_proj.weight");
    roles->down = in_layer(params, l, "mlp.down_proj.weight");
    if (!roles->down || !follows(roles->gate_up, in_layer(params, l, "mlp.up_proj.weight")))
      return us_err_set(err, US_ERR_CHECK, "layer %u: gate and up are not stored behind each other", l);
    return US_OK;
  }
  roles->router = in_layer(params, l, "mlp.gate.weight");
  roles->router_bias = in_layer(params, l, "mlp.gate.e_score_correction_bias");
  roles->experts = in_layer(params, l, "mlp.experts.0.gate_proj.weight");
  if (!roles->router || !roles->router_bias || !roles->experts)
    return us_err_set(err, US_ERR_CHECK, "layer %u: router or experts are missing", l);
  for (uint32_t e = 0; e < shape->experts; e++) {
    const struct us_param *x = roles->experts + 3 * (size_t)e;
    if (!follows(x, x + 1) || x[2].rows != shape->hidden)
      return us_err_set(err, US_ERR_CHECK,
                        "layer %u: expert %u: gate and up are not stored behind each other", l, e);
  }
  return US_OK;
}

enum us_status us_layer_roles_find(const struct us_shape *shape, const struct us_params *params, uint32_t l,
                                   struct us_layer_roles *ret_roles, struct us_err *err) {
  *ret_roles = (struct us_layer_roles){.input_norm = in_layer(params, l, "input_layernorm.weight"),
                                       .post_norm = in_layer(params, l, "post_attention_layernorm.weight"),
                                       .o_proj = in_layer(params, l, "self_attn.o_proj.weight"),
                                       .sink = in_layer(params, l, "self_attn.attention_sink_bias")};
  enum us_status status = find_qkv(shape, params, l, ret_roles, err);
  if (status == US_OK) status = find_mlp(shape, params, l, ret_roles, err);
  if (status != US_OK) return status;
  if (!ret_roles->input_norm || !ret_roles->post_norm || !ret_roles->o_proj || !ret_roles->qkv)
    return us_err_set(err, US_ERR_CHECK, "layer %u: a tensor is missing", l);
  return US_OK;
}

static struct us_param *in_draft(const struct us_params *params, uint32_t l, const char *rest) {
  return find(params, "layers.%u.%s", l, rest);
}

static enum us_status find_draft_layer(const struct us_draft_shape *shape, const struct us_params *p,
                                       uint32_t l, struct us_draft_layer_roles *r, struct us_err *err) {
  struct us_param *v = in_draft(p, l, "self_attn.v_proj.weight"), *up = in_draft(p, l, "mlp.up_proj.weight");
  *r = (struct us_draft_layer_roles){.input_norm = in_draft(p, l, "input_layernorm.weight"),
                                     .post_norm = in_draft(p, l, "post_attention_layernorm.weight"),
                                     .q = in_draft(p, l, "self_attn.q_proj.weight"),
                                     .k = in_draft(p, l, "self_attn.k_proj.weight"),
                                     .q_norm = in_draft(p, l, "self_attn.q_norm.weight"),
                                     .k_norm = in_draft(p, l, "self_attn.k_norm.weight"),
                                     .o_proj = in_draft(p, l, "self_attn.o_proj.weight"),
                                     .sink = in_draft(p, l, "self_attn.attention_sink_bias"),
                                     .gate_up = in_draft(p, l, "mlp.gate_proj.weight"),
                                     .down = in_draft(p, l, "mlp.down_proj.weight")};
  if (!follows(r->q, r->k) || !follows(r->k, v) || !follows(r->gate_up, up))
    return us_err_set(err, US_ERR_CHECK, "layer %u: q, k, v or gate, up are not stored behind each other", l);
  if (!r->input_norm || !r->post_norm || !r->q_norm || !r->k_norm || !r->o_proj || !r->down ||
      (shape->attention.sink && !r->sink))
    return us_err_set(err, US_ERR_CHECK, "layer %u: a tensor is missing", l);
  return US_OK;
}

enum us_status us_draft_roles_find(const struct us_draft_shape *shape, const struct us_params *params,
                                   struct us_draft_roles *ret_roles, struct us_err *err) {
  ret_roles->fc = us_params_find(params, "fc.weight");
  ret_roles->hidden_norm = us_params_find(params, "hidden_norm.weight");
  ret_roles->final_norm = us_params_find(params, "norm.weight");
  ret_roles->mask = us_params_find(params, "mask_embedding");
  ret_roles->markov_in = us_params_find(params, "markov_in.weight");
  ret_roles->markov_out = us_params_find(params, "markov_out.weight");
  if (shape->markov && (!ret_roles->markov_in || !ret_roles->markov_out))
    return us_err_set(err, US_ERR_CHECK, "the drafter's Markov head is missing");
  if (!ret_roles->fc || !ret_roles->hidden_norm || !ret_roles->final_norm || !ret_roles->mask)
    return us_err_set(err, US_ERR_CHECK, "the drafter's fc, norms or mask vector are missing");
  enum us_status status = US_OK;
  for (uint32_t l = 0; l < shape->layers && status == US_OK; l++)
    status = find_draft_layer(shape, params, l, &ret_roles->layer[l], err);
  return status;
}
