/* draft_grad.c: backward pass of a DFlash drafter on a GPU, layer by layer from the last.
 *
 * dx holds the gradient of the blocks' residual stream at the point reached (dx_rounded the same in bf16), dcontext that of c,
 * to which every layer adds through its keys and values. The features and the target's embedding take no gradient.
 */
#include "kernels/quant/quant_train.h"
#include "kernels/swiglu/swiglu_train.h"
#include "training/cuda/draft_state.h"
#include "training/cuda/gemm.h"

static float *grad_of(const struct us_cuda_draft *draft, const struct us_param *p) {
  return us_cuda_param_grad(draft->params, p);
}

/* dx += (or =) gradient through the norm of the stream x, and its bf16 copy. */
static void norm_grad(struct us_cuda_draft *draft, const float *x, const struct us_param *gain,
                      float *inverse, const float *dy, bool add) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_rmsnorm_train_grad grad = {
      .norm = us_cuda_draft_norm(draft, us_cuda_draft_rows(draft), x, gain, NULL, inverse),
      .dy = dy,
      .dx = s->dx,
      .add = add,
      .opt_dx_copy = s->dx_rounded,
      .opt_dgain = grad_of(draft, gain),
      .scratch = s->scratch};
  us_cuda_did(draft->cuda, us_rmsnorm_train_grad(&grad, draft->cuda->stream), "gradient of a norm");
}

/* dnorm = gradient of the MLP's normed input, from dx. */
static void mlp_grad(struct us_cuda_draft *draft, uint32_t l) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_cuda_draft_saved *saved = &s->saved[l];
  size_t rows = us_cuda_draft_rows(draft), D = draft->shape.hidden, F = draft->shape.inner;
  struct us_cuda_linear down = {.R = rows, .N = D, .K = F}, gate_up = {.R = rows, .N = 2 * F, .K = D};
  us_cuda_linear_grad_x(cuda, &down, s->dx_rounded, us_cuda_param_compute(draft->params, roles->down), s->da);
  us_cuda_did(cuda, us_swiglu_train_grad(rows, F, saved->gate_up, s->da, saved->gate_up, s->a, cuda->stream),
              "gradient of SwiGLU");
  us_cuda_linear_grad_w(cuda, &down, s->dx_rounded, s->a, grad_of(draft, roles->down));
  us_cuda_linear_grad_w(cuda, &gate_up, saved->gate_up, saved->norm2, grad_of(draft, roles->gate_up));
  us_cuda_linear_grad_x_f32(cuda, &gate_up, saved->gate_up,
                            us_cuda_param_compute(draft->params, roles->gate_up), 0.0f, s->dnorm);
}

/* Gradient of a per-head norm in place: dy and dx are the same part of dqkv. */
static void head_norm_grad(struct us_cuda_draft *draft, struct us_rmsnorm_train norm,
                           const struct us_param *gain, uint16_t *d) {
  struct us_rmsnorm_train_grad grad = {.norm = norm,
                                       .dy_bf16 = d,
                                       .dx_bf16 = d,
                                       .opt_dgain = grad_of(draft, gain),
                                       .scratch = draft->state->scratch};
  us_cuda_did(draft->cuda, us_rmsnorm_train_grad(&grad, draft->cuda->stream), "gradient of a head's norm");
}

/* dqkv: from the gradients of rotated, normed q and k and of scaled v to those of the raw projections. */
static void unrotate(struct us_cuda_draft *draft, uint32_t l) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  size_t R = draft->R, W = us_attention_qkv_rows(&draft->shape.attention);
  struct us_rope_train block = us_cuda_draft_block_rope(draft, s->dqkv);
  struct us_rope_train context = us_cuda_draft_context_rope(draft, s->dqkv);
  struct us_rope_train scale = us_cuda_draft_scale(draft, R + us_cuda_draft_rows(draft), s->dqkv);
  us_cuda_did(cuda, us_rope_train_grad(&block, cuda->stream), "gradient of the rotation");
  us_cuda_did(cuda, us_rope_train_grad(&context, cuda->stream), "gradient of the context's rotation");
  us_cuda_did(cuda, us_rope_train_grad(&scale, cuda->stream), "gradient of scaled values");
  head_norm_grad(draft, us_cuda_draft_q_norm(draft, l), roles->q_norm, s->dqkv + R * W);
  head_norm_grad(draft, us_cuda_draft_k_norm(draft, l), roles->k_norm,
                 s->dqkv + us_cuda_draft_q_width(draft));
}

/* dnorm = gradient of the attention's normed input, from dx; dcontext gets the layer's part. */
static void attention_grad(struct us_cuda_draft *draft, uint32_t l) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  const struct us_attention_shape *a = &draft->shape.attention;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_cuda_draft_saved *saved = &s->saved[l];
  size_t R = draft->R, rows = us_cuda_draft_rows(draft), D = draft->shape.hidden;
  size_t W = us_attention_qkv_rows(a), q_width = us_cuda_draft_q_width(draft);
  struct us_cuda_linear o_proj = {.R = rows, .N = D, .K = (size_t)a->q_heads * a->v_dim};
  struct us_cuda_linear qkv = {.R = rows, .N = W, .K = D};
  struct us_cuda_linear kv = {.R = R, .N = W - q_width, .K = D, .y_stride = W};
  us_cuda_linear_grad_w(cuda, &o_proj, s->dx_rounded, saved->attention, grad_of(draft, roles->o_proj));
  us_cuda_linear_grad_x(cuda, &o_proj, s->dx_rounded, us_cuda_param_compute(draft->params, roles->o_proj),
                        s->dattention);
  struct us_attention_train attention = us_cuda_draft_attention(draft, l);
  struct us_attention_train_grads grads = {.dout = s->dattention,
                                           .dq = s->dqkv + R * W,
                                           .dk = s->dqkv,
                                           .dv = s->dqkv,
                                           .dsink = a->sink ? grad_of(draft, roles->sink) : NULL,
                                           .scratch = s->scratch};
  us_cuda_did(cuda, us_attention_train_grad(&attention, &grads, cuda->stream), "gradient of attention");
  unrotate(draft, l);
  us_cuda_linear_grad_w(cuda, &qkv, s->dqkv + R * W, saved->norm1, grad_of(draft, roles->q));
  us_cuda_linear_grad_x_f32(cuda, &qkv, s->dqkv + R * W, us_cuda_param_compute(draft->params, roles->q), 0.0f,
                            s->dnorm);
  us_cuda_linear_grad_w(cuda, &kv, s->dqkv + q_width, s->context, grad_of(draft, roles->k));
  us_cuda_linear_grad_x_f32(cuda, &kv, s->dqkv + q_width, us_cuda_param_compute(draft->params, roles->k),
                            l + 1 == draft->shape.layers ? 0.0f : 1.0f, s->dcontext);
}

/* Gradients of the mask vector, of the features' norm and of fc. */
static void input_grad(struct us_cuda_draft *draft) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  size_t D = draft->shape.hidden;
  struct us_embed_train_grad mask = {.D = D,
                                     .row = s->mask_row,
                                     .piece = s->mask_piece,
                                     .pieces = s->mask_pieces,
                                     .dx = s->dx,
                                     .opt_dmask = grad_of(draft, s->roles.mask),
                                     .scratch = s->scratch};
  if (mask.opt_dmask)
    us_cuda_did(cuda, us_embed_train_grad(&mask, cuda->stream), "gradient of the mask vector");
  struct us_rmsnorm_train_grad norm = {
      .norm = us_cuda_draft_norm(draft, draft->R, s->fused, s->roles.hidden_norm, NULL, s->fused_inverse),
      .dy = s->dcontext,
      .dx = s->dcontext,
      .opt_dx_copy = s->dfused,
      .opt_dgain = grad_of(draft, s->roles.hidden_norm),
      .scratch = s->scratch};
  us_cuda_did(cuda, us_rmsnorm_train_grad(&norm, cuda->stream), "gradient of the features' norm");
  us_cuda_linear_grad_w(cuda, &(struct us_cuda_linear){.R = draft->R, .N = D, .K = draft->shape.taps * D},
                        s->dfused, draft->taps, grad_of(draft, s->roles.fc));
}

/* Gradients of the Markov head, from that of the rows it is added to, which goes on as it is: its bf16 copy lies in dx_rounded, which
 * the final norm's gradient fills only after this. */
static void markov_grad(struct us_cuda_draft *draft) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  size_t rows = us_cuda_draft_rows(draft), D = draft->shape.hidden, rank = draft->shape.markov;
  struct us_cuda_linear out = {.R = rows, .N = D, .K = rank}, in = {.R = rows, .N = rank, .K = D};
  us_cuda_did(cuda, us_bf16_train(rows * D, draft->dhidden, s->dx_rounded, cuda->stream),
              "rounding the gradient of hidden rows");
  us_cuda_linear_grad_w(cuda, &out, s->dx_rounded, s->inner, grad_of(draft, s->roles.markov_out));
  us_cuda_linear_grad_x(cuda, &out, s->dx_rounded, us_cuda_param_compute(draft->params, s->roles.markov_out),
                        s->dinner);
  us_cuda_linear_grad_w(cuda, &in, s->dinner, s->before, grad_of(draft, s->roles.markov_in));
}

enum us_status us_cuda_draft_backward(struct us_cuda_draft *draft, struct us_err *err) {
  struct us_cuda_draft_state *s = draft->state;
  if (!draft->blocks) return US_OK;
  us_cuda_use(draft->cuda);
  if (draft->shape.markov) markov_grad(draft);
  norm_grad(draft, s->residual[draft->shape.layers], s->roles.final_norm, s->final_inverse, draft->dhidden,
            false);
  for (uint32_t l = draft->shape.layers; l-- > 0;) {
    struct us_cuda_draft_saved *saved = &s->saved[l];
    const struct us_draft_layer_roles *roles = &s->roles.layer[l];
    mlp_grad(draft, l);
    norm_grad(draft, saved->middle, roles->post_norm, saved->inverse2, s->dnorm, true);
    attention_grad(draft, l);
    norm_grad(draft, s->residual[l], roles->input_norm, saved->inverse1, s->dnorm, true);
  }
  input_grad(draft);
  return us_cuda_failed(draft->cuda, err);
}
