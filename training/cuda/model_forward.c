/* model_forward.c: forward pass of a target on a GPU: a dozen operations a layer, queued on one stream. */
#include "kernels/swiglu/swiglu_train.h"
#include "training/cuda/gemm.h"
#include "training/cuda/model_state.h"

#include <math.h>

/* --- arguments that forward and backward share --- */

struct us_rmsnorm_train us_cuda_model_norm(const struct us_cuda_model *model, const float *x,
                                           const struct us_param *gain, uint16_t *y, float *inverse) {
  return (struct us_rmsnorm_train){.R = model->R,
                                   .D = model->shape.hidden,
                                   .eps = (float)model->shape.norm_eps,
                                   .x = x,
                                   .gain = us_cuda_param_rounded(model->params, gain),
                                   .y = y,
                                   .inverse = inverse};
}

struct us_rope_train us_cuda_model_rope(const struct us_cuda_model *model, uint32_t l, uint16_t *x) {
  const struct us_cuda_attention_roles *a = &model->state->attention[model->shape.swa_layer[l]];
  return (struct us_rope_train){.R = model->R,
                                .stride = a->width,
                                .x = x,
                                .table = a->table,
                                .position = model->state->position,
                                .rotary = a->shape->rotary_dim,
                                .rotated = a->qk_offset,
                                .rotated_heads = a->shape->q_heads + a->shape->kv_heads,
                                .scaled = a->v_offset,
                                .scaled_heads = a->shape->kv_heads,
                                .scaled_dim = a->shape->v_dim,
                                .scale = (float)model->shape.value_scale};
}

static struct us_attention_train attention_of(const struct us_cuda_model *model, int kind) {
  const struct us_cuda_attention_roles *a = &model->state->attention[kind];
  return (struct us_attention_train){.queries = (uint32_t)model->R,
                                     .keys = (uint32_t)model->R,
                                     .q_heads = a->shape->q_heads,
                                     .kv_heads = a->shape->kv_heads,
                                     .qk_dim = a->shape->qk_dim,
                                     .v_dim = a->shape->v_dim,
                                     .q_stride = a->width,
                                     .k_stride = a->width,
                                     .v_stride = a->width,
                                     .q_offset = a->q_offset,
                                     .k_offset = a->k_offset,
                                     .v_offset = a->v_offset,
                                     .context_begin = a->begin,
                                     .context_end = model->state->end,
                                     .opt_window = a->shape->window,
                                     .scale = (float)(1.0 / sqrt((double)a->shape->qk_dim)),
                                     .plan = a->plan};
}

struct us_attention_train us_cuda_model_attention(const struct us_cuda_model *model, uint32_t l) {
  const struct us_cuda_layer_saved *saved = &model->state->saved[l];
  const struct us_param *sink = model->state->roles[l].sink;
  struct us_attention_train attention = attention_of(model, model->shape.swa_layer[l]);
  attention.q = attention.k = attention.v = saved->qkv;
  attention.sink = sink ? us_cuda_param_rounded(model->params, sink) : NULL;
  attention.out = saved->attention;
  attention.lse = saved->lse;
  return attention;
}

struct us_grouped us_cuda_model_grouped(const struct us_cuda_model *model, uint32_t l, uint32_t N,
                                        uint32_t K) {
  return (struct us_grouped){.start = model->state->saved[l].start,
                             .groups = model->shape.experts,
                             .rows = (uint32_t)model->R * model->shape.top_k,
                             .N = N,
                             .K = K};
}

/* --- a layer --- */

/* The stream before layer l is what was tapped after layer l - 1. */
static void set_tap(const struct us_cuda_model *model, const struct us_cuda_taps *opt_taps, uint32_t l,
                    struct us_rmsnorm_train *norm) {
  for (uint32_t i = 0; opt_taps && i < opt_taps->count; i++) {
    if (opt_taps->layer[i] + 1 != l) continue;
    norm->opt_tap = opt_taps->out + (size_t)i * model->shape.hidden;
    norm->tap_stride = (size_t)opt_taps->count * model->shape.hidden;
  }
}

void us_cuda_model_project(struct us_cuda_model *model, uint32_t l, const struct us_cuda_taps *opt_taps) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_cuda_attention_roles *a = &s->attention[model->shape.swa_layer[l]];
  const struct us_layer_roles *roles = &s->roles[l];
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  struct us_rmsnorm_train norm =
      us_cuda_model_norm(model, s->residual[l], roles->input_norm, saved->norm1, saved->inverse1);
  set_tap(model, opt_taps, l, &norm);
  us_cuda_did(cuda, us_rmsnorm_train(&norm, cuda->stream), "norm before attention");
  us_cuda_linear(cuda, &(struct us_cuda_linear){.R = model->R, .N = a->width, .K = model->shape.hidden},
                 saved->norm1, us_cuda_param_compute(model->params, roles->qkv), saved->qkv);
  struct us_rope_train rope = us_cuda_model_rope(model, l, saved->qkv);
  us_cuda_did(cuda, us_rope_train(&rope, cuda->stream), "rotation");
}

void us_cuda_model_merge(struct us_cuda_model *model, uint32_t l) {
  struct us_cuda_model_state *s = model->state;
  const struct us_attention_shape *a = s->attention[model->shape.swa_layer[l]].shape;
  struct us_cuda_linear dims = {.R = model->R, .N = model->shape.hidden, .K = (size_t)a->q_heads * a->v_dim};
  us_cuda_linear_add(model->cuda, &dims, s->saved[l].attention,
                     us_cuda_param_compute(model->params, s->roles[l].o_proj), s->residual[l],
                     s->saved[l].middle);
}

void us_cuda_model_dense(struct us_cuda_model *model, uint32_t l, bool again) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  size_t R = model->R, D = model->shape.hidden, F = model->shape.dense_inner;
  us_cuda_linear(cuda, &(struct us_cuda_linear){.R = R, .N = 2 * F, .K = D}, saved->norm2,
                 us_cuda_param_compute(model->params, s->roles[l].gate_up), saved->gate_up);
  if (again) return;
  us_cuda_did(cuda, us_swiglu_train(R, F, saved->gate_up, s->a, cuda->stream), "SwiGLU");
  us_cuda_linear_add(cuda, &(struct us_cuda_linear){.R = R, .N = D, .K = F}, s->a,
                     us_cuda_param_compute(model->params, s->roles[l].down), saved->middle,
                     s->residual[l + 1]);
}

void us_cuda_model_route(struct us_cuda_model *model, uint32_t l, bool again) {
  struct us_cuda_model_state *s = model->state;
  const struct us_shape *shape = &model->shape;
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  uint32_t R = (uint32_t)model->R, E = shape->experts, K = shape->top_k;
  struct us_router_train router = {.R = R,
                                   .D = shape->hidden,
                                   .E = E,
                                   .K = K,
                                   .normalise = shape->norm_topk_prob,
                                   .scaling = (float)shape->routed_scaling,
                                   .x = saved->norm2,
                                   .w = us_cuda_param_rounded(model->params, s->roles[l].router),
                                   .opt_bias = us_cuda_param_rounded(model->params, s->roles[l].router_bias),
                                   .scores = saved->scores,
                                   .id = s->id[l],
                                   .weight = saved->weight,
                                   .scratch = s->scratch,
                                   .opt_chosen = model->opt_follow ? model->opt_follow->state->id[l] : NULL};
  us_cuda_did(model->cuda, us_router_train(&router, model->cuda->stream), "router");
  struct us_experts_train_plan plan = {.R = R,
                                       .E = E,
                                       .K = K,
                                       .id = s->id[l],
                                       .start = saved->start,
                                       .row = saved->row,
                                       .pair = saved->pair,
                                       .slot = saved->slot,
                                       .opt_load = again ? NULL : model->load + (size_t)l * E,
                                       .scratch = s->scratch};
  us_cuda_did(model->cuda, us_experts_train_plan(&plan, model->cuda->stream), "plan of experts");
}

void us_cuda_model_experts(struct us_cuda_model *model, uint32_t l, bool again) {
  struct us_cuda_model_state *s = model->state;
  struct us_cuda *cuda = model->cuda;
  const struct us_shape *shape = &model->shape;
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  const struct us_param *experts = s->roles[l].experts;
  uint32_t D = shape->hidden, F = shape->expert_inner;
  uint64_t stride = us_cuda_expert_stride(shape, &s->roles[l]);
  struct us_experts_train_rows rows = {
      .R = (uint32_t)model->R, .D = D, .K = shape->top_k, .slot = saved->slot};
  struct us_grouped gate_up = us_cuda_model_grouped(model, l, 2 * F, D);
  struct us_grouped down = us_cuda_model_grouped(model, l, D, F);
  us_cuda_did(cuda, us_experts_train_scatter(&rows, saved->norm2, saved->x, cuda->stream), "rows to experts");
  const uint16_t *w = us_cuda_param_compute(model->params, &experts[0]);
  if (again) {
    us_cuda_did(cuda, us_grouped_forward(&gate_up, saved->x, w, stride, saved->gate_up, cuda->stream),
                "experts' gate and up");
    return;
  }
  uint16_t *opt_kept = model->memory == US_TRAIN_FORWARD ? NULL : saved->gate_up;
  us_cuda_did(cuda, us_grouped_forward_swiglu(&gate_up, saved->x, w, stride, opt_kept, s->a, cuda->stream),
              "experts' gate, up and SwiGLU");
  us_cuda_did(cuda,
              us_grouped_forward(&down, s->a, us_cuda_param_compute(model->params, &experts[2]), stride,
                                 s->slot_y, cuda->stream),
              "experts' down");
  us_cuda_did(cuda,
              us_experts_train_combine(&rows, saved->weight, s->slot_y, saved->middle, s->residual[l + 1],
                                       cuda->stream),
              "experts' sum");
}

void us_cuda_model_norm_middle(struct us_cuda_model *model, uint32_t l) {
  struct us_cuda_model_state *s = model->state;
  const struct us_cuda_layer_saved *saved = &s->saved[l];
  struct us_rmsnorm_train norm =
      us_cuda_model_norm(model, saved->middle, s->roles[l].post_norm, saved->norm2, saved->inverse2);
  us_cuda_did(model->cuda, us_rmsnorm_train(&norm, model->cuda->stream), "norm before the MLP");
}

void us_cuda_model_mlp(struct us_cuda_model *model, uint32_t l, bool again) {
  us_cuda_model_norm_middle(model, l);
  if (!model->shape.moe_layer[l]) {
    us_cuda_model_dense(model, l, again);
    return;
  }
  us_cuda_model_route(model, l, again);
  us_cuda_model_experts(model, l, again);
}

void us_cuda_model_attend(struct us_cuda_model *model, uint32_t l) {
  struct us_attention_train attention = us_cuda_model_attention(model, l);
  us_cuda_did(model->cuda, us_attention_train(&attention, model->cuda->stream), "attention");
}

void us_cuda_model_layer(struct us_cuda_model *model, uint32_t l, const struct us_cuda_taps *opt_taps,
                         bool again) {
  us_cuda_model_project(model, l, opt_taps);
  us_cuda_model_attend(model, l);
  us_cuda_model_merge(model, l);
  us_cuda_model_mlp(model, l, again);
}

/* --- forward --- */

static enum us_status check_taps(const struct us_cuda_model *model, const struct us_cuda_taps *opt_taps,
                                 struct us_err *err) {
  for (uint32_t i = 0; opt_taps && i < opt_taps->count; i++)
    for (uint32_t j = 0; j <= i; j++)
      if (opt_taps->layer[i] >= model->shape.layers || (j < i && opt_taps->layer[j] == opt_taps->layer[i]))
        return us_err_set(err, US_ERR_USAGE, "layer %u is tapped twice or does not exist",
                          opt_taps->layer[i]);
  return US_OK;
}

void us_cuda_model_plan(struct us_cuda_model *model) {
  bool used[2] = {false, false};
  for (uint32_t l = 0; l < model->shape.layers; l++) used[model->shape.swa_layer[l]] = true;
  for (int kind = 0; kind < 2; kind++) {
    struct us_attention_train attention = attention_of(model, kind);
    if (used[kind])
      us_cuda_did(model->cuda, us_attention_train_plan(&attention, model->cuda->stream), "attention's plan");
  }
}

void us_cuda_model_begin(struct us_cuda_model *model) {
  struct us_cuda_model_state *s = model->state;
  struct us_embed_train embed = {.R = model->R,
                                 .D = model->shape.hidden,
                                 .token = s->token,
                                 .table = us_cuda_param_compute(model->params, s->model.embed),
                                 .x = s->residual[0]};
  us_cuda_did(model->cuda, us_embed_train(&embed, model->cuda->stream), "embedding");
}

void us_cuda_model_end(struct us_cuda_model *model, const struct us_cuda_taps *opt_taps) {
  struct us_cuda_model_state *s = model->state;
  uint32_t L = model->shape.layers;
  struct us_rmsnorm_train norm =
      us_cuda_model_norm(model, s->residual[L], s->model.final_norm, model->hidden, s->final_inverse);
  set_tap(model, opt_taps, L, &norm);
  us_cuda_did(model->cuda, us_rmsnorm_train(&norm, model->cuda->stream), "final norm");
}

enum us_status us_cuda_model_forward(struct us_cuda_model *model, const struct us_batch *batch,
                                     const struct us_cuda_taps *opt_taps, struct us_err *err) {
  struct us_cuda *cuda = model->cuda;
  us_cuda_use(cuda);
  enum us_status status = check_taps(model, opt_taps, err);
  if (status == US_OK) status = us_cuda_model_accept(model, batch, err);
  if (status != US_OK || !batch->R) return status;
  us_cuda_model_plan(model);
  us_cuda_model_begin(model);
  for (uint32_t l = 0; l < model->shape.layers; l++) us_cuda_model_layer(model, l, opt_taps, false);
  us_cuda_model_end(model, opt_taps);
  return us_cuda_failed(cuda, err);
}
