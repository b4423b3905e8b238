/* model_train_grad.c: backward pass of a whole model, layer by layer from the last.
 *
 * dx always holds the gradient of the residual stream at the point reached; each branch adds its part through its norm.
 */
#include "kernels/attention_seq/attention_seq.h"
#include "kernels/embed/embed_grad.h"
#include "kernels/linear/linear_grad.h"
#include "kernels/rmsnorm/rmsnorm_grad.h"
#include "kernels/rope/rope_grad.h"
#include "kernels/router/router_grad.h"
#include "kernels/swiglu/swiglu_grad.h"
#include "training/model_train_state.h"

/* Gradients of a product's weights (if they take any) and of its input. */
static void linear_grad(struct us_seq *seq, size_t R, size_t N, size_t K, const float *x, const float *dy,
                        const struct us_param *w, float *dx) {
  struct us_linear dims = {.R = R, .N = N, .K = K};
  if (us_param_grad(w)) us_linear_grad_w(seq, &dims, dy, x, us_param_grad(w));
  us_linear_grad_x(seq, &dims, dy, w->compute, 0.0f, dx);
}

/* branch = gradient of the MLP's normed input, from dx. */
static void dense_grad(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  struct us_layer_saved *saved = &s->saved[l];
  size_t R = train->batch.R, D = train->shape.hidden, F = train->shape.dense_inner;
  linear_grad(train->seq, R, D, F, saved->a, s->dx, s->roles[l].down, s->da);
  us_swiglu_grad(train->seq, R, F, saved->gate_up, s->da, saved->gate_up);
  linear_grad(train->seq, R, 2 * F, D, saved->norm2, saved->gate_up, s->roles[l].gate_up, s->branch);
}

static void moe_grad(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  const struct us_shape *shape = &train->shape;
  struct us_layer_saved *saved = &s->saved[l];
  const struct us_layer_roles *roles = &s->roles[l];
  struct us_experts_rows experts = us_model_train_experts(train, l);
  struct us_experts_grads grads = {.gate_up = s->experts[l].gate_up_grad, .down = s->experts[l].down_grad};
  us_experts_grad(train->seq, &experts, &saved->plan, saved->weight, &saved->experts, s->dx, s->branch,
                  s->dweight, us_param_grad(roles->experts) ? &grads : NULL);
  struct us_router_rows router = {.R = train->batch.R,
                                  .D = shape->hidden,
                                  .E = shape->experts,
                                  .K = shape->top_k,
                                  .normalise = shape->norm_topk_prob,
                                  .scaling = (float)shape->routed_scaling};
  const struct us_model_train *teacher = train->routers.opt_teacher;
  struct us_router_teacher scores = {.opt_scores = teacher ? teacher->state->saved[l].scores : NULL,
                                     .target = train->routers.target,
                                     .opt_weight = train->routers.opt_weight,
                                     .scale = train->routers.scale,
                                     .margin = train->routers.margin,
                                     .margin_scale = train->routers.margin_scale,
                                     .opt_bias = roles->router_bias->compute};
  bool taught = scores.scale > 0.0f || scores.margin_scale > 0.0f;
  us_router_grad(train->seq, &router, saved->norm2, roles->router->compute, saved->scores, s->id[l],
                 s->dweight, taught ? &scores : NULL, s->branch, us_param_grad(roles->router));
}

/* branch = gradient of the attention's normed input, from dx. */
static void attention_grad(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  const struct us_attention_roles *a = &s->attention[train->shape.swa_layer[l]];
  const struct us_layer_roles *roles = &s->roles[l];
  struct us_layer_saved *saved = &s->saved[l];
  size_t R = train->batch.R, D = train->shape.hidden, heads = (size_t)a->shape->q_heads + a->shape->kv_heads;
  linear_grad(train->seq, R, D, (size_t)a->shape->q_heads * a->shape->v_dim, saved->attention, s->dx,
              roles->o_proj, s->dattention);
  struct us_attention_seq attention = us_model_train_attention(train, l);
  us_attention_seq_grad(
      train->seq, &attention,
      &(struct us_attention_seq_grads){.dout = s->dattention,
                                       .dq = s->dqkv,
                                       .dk = s->dqkv,
                                       .dv = s->dqkv,
                                       .dsink = roles->sink ? us_param_grad(roles->sink) : NULL});
  struct us_rope_rows v = {.R = R, .stride = a->width, .offset = a->v_offset, .heads = a->shape->kv_heads};
  us_scale_heads_seq(train->seq, &v, a->shape->v_dim, (float)train->shape.value_scale, false, s->dqkv);
  struct us_rope_rows qk = {
      .R = R, .stride = a->width, .offset = a->qk_offset, .heads = heads, .rotary = a->shape->rotary_dim};
  us_rope_grad(train->seq, &qk, a->table, train->batch.position, s->dqkv);
  linear_grad(train->seq, R, a->width, D, saved->norm1, s->dqkv, roles->qkv, s->branch);
}

enum us_status us_model_train_backward(struct us_model_train *train, struct us_err *err) {
  struct us_model_train_state *s = train->state;
  const struct us_shape *shape = &train->shape;
  if (train->memory == US_TRAIN_FORWARD)
    return us_err_set(err, US_ERR_USAGE, "made for forward passes alone");
  struct us_rmsnorm_rows rows = {.R = train->batch.R, .D = shape->hidden, .eps = (float)shape->norm_eps};
  us_rmsnorm_grad(train->seq, &rows, s->residual[shape->layers], s->model.final_norm->compute,
                  s->final_inverse, train->dhidden, 0.0f, s->dx, us_param_grad(s->model.final_norm));
  for (uint32_t l = shape->layers; l-- > 0;) {
    struct us_layer_saved *saved = &s->saved[l];
    const struct us_layer_roles *roles = &s->roles[l];
    if (train->memory == US_TRAIN_RECOMPUTE) us_model_train_layer(train, l);
    if (shape->moe_layer[l])
      moe_grad(train, l);
    else
      dense_grad(train, l);
    us_rmsnorm_grad(train->seq, &rows, saved->middle, roles->post_norm->compute, saved->inverse2, s->branch,
                    1.0f, s->dx, us_param_grad(roles->post_norm));
    attention_grad(train, l);
    us_rmsnorm_grad(train->seq, &rows, s->residual[l], roles->input_norm->compute, saved->inverse1, s->branch,
                    1.0f, s->dx, us_param_grad(roles->input_norm));
  }
  if (us_param_grad(s->model.embed))
    us_embed_grad(train->seq, train->batch.token, train->batch.R, shape->vocab, shape->hidden, s->dx,
                  us_param_grad(s->model.embed));
  return train->seq->failed ? us_err_memory(err, "scratch", 0) : US_OK;
}
