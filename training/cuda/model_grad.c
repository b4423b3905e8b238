/* model_grad.c: backward pass of a target on a GPU, layer by layer from the last.
 *
 * dx always holds the gradient of the residual stream at the point reached (FP32), dx_rounded the same in bf16 where the next
 * products read it; each branch adds its part through its norm, which writes both.
 */
#include "kernels/swiglu/swiglu_train.h"
#include "training/cuda/gemm.h"
#include "training/cuda/model_state.h"

static float *grad_of(const struct us_cuda_model *model, const struct us_param *p) {
  return us_cuda_param_grad(model->params, p);
}

/* dx += (or =) gradient through the norm of x; and its bf16 copy if anybody reads it. */
static void norm_grad(struct us_cuda_model *model, const float *x, const struct us_param *gain,
                      float *inverse, const float *dy, bool add, bool copy) {
  struct us_cuda_model_state *s = model->state;
  struct us_rmsnorm_train_grad grad = {.norm = us_cuda_model_norm(model, x, gain, NULL, inverse),
                                       .dy = dy,
                                       .dx = s->dx,
                                       .add = add,
                                       .opt_dx_copy = copy ? s->dx_rounded : NULL,
                                       .opt_dgain = grad_of(model, gain),
                                       .scratch = s->scratch};
  us_cuda_did(model->cuda, us_rmsnorm_train_grad(&grad, model->cuda->stream), "gradient of a norm");
}

/* dnorm = gradient of the MLP's normed input, from dx. */
static void dense_grad(struct us_cuda_model *model, uint32_t l) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_layer_roles *roles = &s->roles[l];
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  size_t R = model->R, D = model->shape.hidden, F = model->shape.dense_inner;
  struct us_cuda_linear down = {.R = R, .N = D, .K = F}, gate_up = {.R = R, .N = 2 * F, .K = D};
  us_cuda_linear_grad_x(cuda, &down, s->dx_rounded, us_cuda_param_compute(model->params, roles->down), s->da);
  us_cuda_did(cuda, us_swiglu_train_grad(R, F, saved->gate_up, s->da, saved->gate_up, s->a, cuda->stream),
              "gradient of SwiGLU");
  us_cuda_linear_grad_w(cuda, &down, s->dx_rounded, s->a, grad_of(model, roles->down));
  us_cuda_linear_grad_w(cuda, &gate_up, saved->gate_up, saved->norm2, grad_of(model, roles->gate_up));
  us_cuda_linear_grad_x_f32(cuda, &gate_up, saved->gate_up,
                            us_cuda_param_compute(model->params, roles->gate_up), 0.0f, s->dnorm);
}

/* Gradients of the experts' inner rows and weights: slot_y = gradient of their input rows, dweight. */
static void experts_grad(struct us_cuda_model *model, uint32_t l, const struct us_experts_train_rows *rows) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_shape *shape = &model->shape;
  const struct us_param *experts = s->roles[l].experts;
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  uint32_t D = shape->hidden, F = shape->expert_inner;
  uint64_t stride = us_cuda_expert_stride(shape, &s->roles[l]);
  struct us_grouped gate_up = us_cuda_model_grouped(model, l, 2 * F, D);
  struct us_grouped down = us_cuda_model_grouped(model, l, D, F);
  us_cuda_did(cuda, us_experts_train_scatter_grad(rows, s->dx, s->slot_dy, cuda->stream),
              "gradients to experts");
  us_cuda_did(cuda,
              us_grouped_grad_x(&down, s->slot_dy, us_cuda_param_compute(model->params, &experts[2]), stride,
                                s->da, cuda->stream),
              "gradient of experts' down");
  struct us_experts_train_swiglu_grad swiglu = {.S = down.rows,
                                                .F = F,
                                                .gate_up = saved->gate_up,
                                                .da = s->da,
                                                .weight = saved->weight,
                                                .pair = saved->pair,
                                                .a_w = s->a,
                                                .dgate_up = saved->gate_up,
                                                .dweight = s->dweight};
  us_cuda_did(cuda, us_experts_train_swiglu_grad(&swiglu, cuda->stream), "gradient of SwiGLU");
  float *dgate_up = grad_of(model, &experts[0]), *ddown = grad_of(model, &experts[2]);
  if (ddown)
    us_cuda_did(cuda, us_grouped_grad_w(&down, s->slot_dy, s->a, ddown, stride, cuda->stream),
                "gradient of down's weights");
  if (dgate_up)
    us_cuda_did(cuda, us_grouped_grad_w(&gate_up, saved->gate_up, saved->x, dgate_up, stride, cuda->stream),
                "gradient of gate's and up's weights");
  us_cuda_did(cuda,
              us_grouped_grad_x(&gate_up, saved->gate_up, us_cuda_param_compute(model->params, &experts[0]),
                                stride, s->slot_y, cuda->stream),
              "gradient of experts' input");
}

static bool has_lesson(const struct us_cuda_model *model) {
  return model->routers.scale > 0.0f || model->routers.margin_scale > 0.0f;
}

/* Adds what routers are taught to dnorm and to the router's gradient. */
static void router_lesson(struct us_cuda_model *model, uint32_t l) {
  struct us_cuda_model_state *s = model->state;
  const struct us_cuda_router_lesson *routers = &model->routers;
  const struct us_param *router = s->roles[l].router;
  uint32_t R = (uint32_t)model->R, E = model->shape.experts;
  struct us_router_train_lesson lesson = {
      .R = R,
      .E = E,
      .scores = s->saved[l].scores,
      .opt_theirs = routers->opt_teacher ? routers->opt_teacher->state->saved[l].scores : NULL,
      .target = routers->target,
      .opt_weight = routers->opt_weight,
      .scale = routers->scale,
      .K = model->shape.top_k,
      .id = s->id[l],
      .margin = routers->margin,
      .margin_scale = routers->margin_scale,
      .opt_bias = us_cuda_param_rounded(model->params, s->roles[l].router_bias),
      .dlogit = s->lesson,
      .scratch = s->scratch};
  struct us_cuda_linear logits = {.R = R, .N = E, .K = model->shape.hidden};
  us_cuda_did(model->cuda, us_router_train_lesson(&lesson, model->cuda->stream), "lesson of the router");
  us_cuda_linear_grad_x_f32(model->cuda, &logits, s->lesson, us_cuda_param_compute(model->params, router),
                            1.0f, s->dnorm);
  us_cuda_linear_grad_w(model->cuda, &logits, s->lesson, s->saved[l].norm2, grad_of(model, router));
}

/* dnorm = gradient of the MLP's normed input, from dx. */
static void moe_grad(struct us_cuda_model *model, uint32_t l) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_shape *shape = &model->shape;
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  struct us_experts_train_rows rows = {
      .R = (uint32_t)model->R, .D = shape->hidden, .K = shape->top_k, .slot = saved->slot};
  experts_grad(model, l, &rows);
  struct us_router_train_grad router = {.R = rows.R,
                                        .D = rows.D,
                                        .E = shape->experts,
                                        .K = rows.K,
                                        .normalise = shape->norm_topk_prob,
                                        .scaling = (float)shape->routed_scaling,
                                        .scores = saved->scores,
                                        .id = s->id[l],
                                        .dweight = s->dweight,
                                        .x = saved->norm2,
                                        .start = saved->start,
                                        .pair = saved->pair,
                                        .dlogit = s->dlogit,
                                        .opt_dw = grad_of(model, s->roles[l].router),
                                        .scratch = s->scratch};
  us_cuda_did(cuda, us_router_train_grad(&router, cuda->stream), "gradient of the router");
  struct us_experts_train_router part = {
      .dlogit = s->dlogit, .id = s->id[l], .w = us_cuda_param_rounded(model->params, s->roles[l].router)};
  us_cuda_did(cuda, us_experts_train_gather_grad(&rows, s->slot_y, &part, s->dnorm, cuda->stream),
              "sum of experts' gradients");
  if (has_lesson(model)) router_lesson(model, l);
}

/* dnorm = gradient of the attention's normed input, from dx. */
static void attention_grad(struct us_cuda_model *model, uint32_t l) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_cuda_attention_roles *a = &s->attention[model->shape.swa_layer[l]];
  const struct us_layer_roles *roles = &s->roles[l];
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  size_t R = model->R, D = model->shape.hidden;
  struct us_cuda_linear o_proj = {.R = R, .N = D, .K = (size_t)a->shape->q_heads * a->shape->v_dim};
  struct us_cuda_linear qkv = {.R = R, .N = a->width, .K = D};
  us_cuda_linear_grad_w(cuda, &o_proj, s->dx_rounded, saved->attention, grad_of(model, roles->o_proj));
  us_cuda_linear_grad_x(cuda, &o_proj, s->dx_rounded, us_cuda_param_compute(model->params, roles->o_proj),
                        s->dattention);
  struct us_attention_train attention = us_cuda_model_attention(model, l);
  struct us_attention_train_grads grads = {.dout = s->dattention,
                                           .dq = s->dqkv,
                                           .dk = s->dqkv,
                                           .dv = s->dqkv,
                                           .dsink = roles->sink ? grad_of(model, roles->sink) : NULL,
                                           .scratch = s->scratch};
  us_cuda_did(cuda, us_attention_train_grad(&attention, &grads, cuda->stream), "gradient of attention");
  struct us_rope_train rope = us_cuda_model_rope(model, l, s->dqkv);
  us_cuda_did(cuda, us_rope_train_grad(&rope, cuda->stream), "gradient of the rotation");
  us_cuda_linear_grad_w(cuda, &qkv, s->dqkv, saved->norm1, grad_of(model, roles->qkv));
  us_cuda_linear_grad_x_f32(cuda, &qkv, s->dqkv, us_cuda_param_compute(model->params, roles->qkv), 0.0f,
                            s->dnorm);
}

static void embed_grad(struct us_cuda_model *model) {
  struct us_cuda_model_state *s = model->state;
  struct us_embed_train_grad grad = {.D = model->shape.hidden,
                                     .row = s->embed_row,
                                     .piece = s->embed_piece,
                                     .pieces = s->embed_pieces,
                                     .dx = s->dx,
                                     .dtable = grad_of(model, s->model.embed),
                                     .scratch = s->scratch};
  if (grad.dtable)
    us_cuda_did(model->cuda, us_embed_train_grad(&grad, model->cuda->stream), "gradient of the embedding");
}

enum us_status us_cuda_model_backward(struct us_cuda_model *model, struct us_err *err) {
  struct us_cuda_model_state *s = model->state;
  const struct us_shape *shape = &model->shape;
  if (model->memory == US_TRAIN_FORWARD)
    return us_err_set(err, US_ERR_USAGE, "made for forward passes alone");
  if (!model->R) return US_OK;
  if (has_lesson(model) && shape->experts % 8)
    return us_err_set(err, US_ERR_USAGE, "%u experts; on a GPU multiples of 8 are taught routing",
                      shape->experts);
  us_cuda_use(model->cuda);
  norm_grad(model, s->residual[shape->layers], s->model.final_norm, s->final_inverse, model->dhidden, false,
            !shape->moe_layer[shape->layers - 1]);
  for (uint32_t l = shape->layers; l-- > 0;) {
    const struct us_cuda_layer_saved *saved = &s->saved[l];
    const struct us_layer_roles *roles = &s->roles[l];
    if (model->memory == US_TRAIN_RECOMPUTE) us_cuda_model_layer(model, l, NULL, true);
    if (shape->moe_layer[l])
      moe_grad(model, l);
    else
      dense_grad(model, l);
    norm_grad(model, saved->middle, roles->post_norm, saved->inverse2, s->dnorm, true, true);
    attention_grad(model, l);
    norm_grad(model, s->residual[l], roles->input_norm, saved->inverse1, s->dnorm, true,
              l > 0 && !shape->moe_layer[l - 1]);
  }
  embed_grad(model);
  return us_cuda_failed(model->cuda, err);
}
