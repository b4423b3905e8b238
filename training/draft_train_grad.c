/* draft_train_grad.c: backward pass of a DFlash drafter, layer by layer from the last.
 *
 * dx holds the gradient of the blocks' residual stream at the point reached, dcontext that of c, to which every layer
 * adds through its keys and values. The features and the target's embedding take no gradient.
 */
#include "training/draft_train_state.h"

/* Gradients of a product's weights (if they take any) and of its input. */
static void linear_grad(struct us_seq *seq, const struct us_linear *dims, const float *x, const float *dy,
                        const struct us_param *w, float beta, float *dx) {
  if (us_param_grad(w)) us_linear_grad_w(seq, dims, dy, x, us_param_grad(w));
  us_linear_grad_x(seq, dims, dy, w->compute, beta, dx);
}

/* branch = gradient of the MLP's normed input, from dx. */
static void mlp_grad(struct us_draft_train *train, uint32_t l) {
  struct us_draft_train_state *s = train->state;
  struct us_draft_saved *saved = &s->saved[l];
  size_t rows = us_draft_block_rows(train), D = train->shape.hidden, F = train->shape.inner;
  linear_grad(train->seq, &(struct us_linear){.R = rows, .N = D, .K = F}, saved->a, s->dx,
              s->roles.layer[l].down, 0.0f, s->da);
  us_swiglu_grad(train->seq, rows, F, saved->gate_up, s->da, saved->gate_up);
  linear_grad(train->seq, &(struct us_linear){.R = rows, .N = 2 * F, .K = D}, saved->norm2, saved->gate_up,
              s->roles.layer[l].gate_up, 0.0f, s->branch);
}

/* dqkv: from the gradients of rotated, normed q and k and of scaled v to those of the raw projections. */
static void unrotate(struct us_draft_train *train, uint32_t l) {
  struct us_draft_train_state *s = train->state;
  const struct us_attention_shape *a = &train->shape.attention;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_draft_saved *saved = &s->saved[l];
  size_t R = train->R, rows = us_draft_block_rows(train), W = us_attention_qkv_rows(a);
  size_t q_width = (size_t)a->q_heads * a->qk_dim;
  float eps = (float)train->shape.norm_eps;
  struct us_rope_rows q = {
      .R = rows, .stride = W, .offset = s->q_offset, .heads = a->q_heads, .rotary = a->rotary_dim};
  struct us_rope_rows k = {
      .R = R + rows, .stride = W, .offset = s->k_offset, .heads = a->kv_heads, .rotary = a->rotary_dim};
  struct us_rope_rows v = {.R = R + rows, .stride = W, .offset = s->v_offset, .heads = a->kv_heads};
  us_scale_heads_seq(train->seq, &v, a->v_dim, (float)train->shape.value_scale, false, s->dqkv);
  us_rope_grad(train->seq, &q, s->table, s->position + R, s->dqkv + R * W);
  us_rope_grad(train->seq, &k, s->table, s->position, s->dqkv);
  struct us_rmsnorm_rows q_rows = {
      .R = rows, .D = a->qk_dim, .heads = a->q_heads, .stride = W, .eps = eps, .keep_f32 = true};
  struct us_rmsnorm_rows k_rows = {
      .R = R + rows, .D = a->qk_dim, .heads = a->kv_heads, .stride = W, .eps = eps, .keep_f32 = true};
  float *dq = s->dqkv + R * W, *dk = s->dqkv + q_width;
  us_rmsnorm_grad(train->seq, &q_rows, saved->raw + R * W, roles->q_norm->compute, saved->q_inverse, dq, 0.0f,
                  dq, us_param_grad(roles->q_norm));
  us_rmsnorm_grad(train->seq, &k_rows, saved->raw + q_width, roles->k_norm->compute, saved->k_inverse, dk,
                  0.0f, dk, us_param_grad(roles->k_norm));
}

/* branch = gradient of the attention's normed input, from dx; dcontext gets the layer's part. */
static void attention_grad(struct us_draft_train *train, uint32_t l) {
  struct us_draft_train_state *s = train->state;
  const struct us_attention_shape *a = &train->shape.attention;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_draft_saved *saved = &s->saved[l];
  size_t R = train->R, rows = us_draft_block_rows(train), D = train->shape.hidden;
  size_t W = us_attention_qkv_rows(a), q_width = (size_t)a->q_heads * a->qk_dim;
  linear_grad(train->seq, &(struct us_linear){.R = rows, .N = D, .K = (size_t)a->q_heads * a->v_dim},
              saved->attention, s->dx, roles->o_proj, 0.0f, s->dattention);
  struct us_attention_seq attention = us_draft_train_attention(train, l);
  us_attention_seq_grad(
      train->seq, &attention,
      &(struct us_attention_seq_grads){.dout = s->dattention,
                                       .dq = s->dqkv + R * W,
                                       .dk = s->dqkv,
                                       .dv = s->dqkv,
                                       .dsink = a->sink ? us_param_grad(roles->sink) : NULL});
  unrotate(train, l);
  linear_grad(train->seq, &(struct us_linear){.R = rows, .N = W, .K = D}, saved->norm1, s->dqkv + R * W,
              roles->q, 0.0f, s->branch);
  linear_grad(train->seq, &(struct us_linear){.R = R, .N = W - q_width, .K = D, .y_stride = W}, s->context,
              s->dqkv + q_width, roles->k, l + 1 == train->shape.layers ? 0.0f : 1.0f, s->dcontext);
}

/* Gradients of the Markov head, from that of the rows it is added to, which goes on as it is. */
static void markov_grad(struct us_draft_train *train) {
  struct us_draft_train_state *s = train->state;
  size_t rows = us_draft_block_rows(train), D = train->shape.hidden, rank = train->shape.markov;
  linear_grad(train->seq, &(struct us_linear){.R = rows, .N = D, .K = rank}, s->inner, train->dhidden,
              s->roles.markov_out, 0.0f, s->dinner);
  if (us_param_grad(s->roles.markov_in))
    us_linear_grad_w(train->seq, &(struct us_linear){.R = rows, .N = rank, .K = D}, s->dinner, s->before,
                     us_param_grad(s->roles.markov_in));
}

enum us_status us_draft_train_backward(struct us_draft_train *train, struct us_err *err) {
  struct us_draft_train_state *s = train->state;
  const struct us_draft_shape *shape = &train->shape;
  size_t R = train->R, rows = us_draft_block_rows(train), D = shape->hidden;
  struct us_rmsnorm_rows norm = {.R = rows, .D = D, .eps = (float)shape->norm_eps};
  if (shape->markov) markov_grad(train);
  us_rmsnorm_grad(train->seq, &norm, s->residual[shape->layers], s->roles.final_norm->compute,
                  s->final_inverse, train->dhidden, 0.0f, s->dx, us_param_grad(s->roles.final_norm));
  for (uint32_t l = shape->layers; l-- > 0;) {
    struct us_draft_saved *saved = &s->saved[l];
    const struct us_draft_layer_roles *roles = &s->roles.layer[l];
    mlp_grad(train, l);
    us_rmsnorm_grad(train->seq, &norm, saved->middle, roles->post_norm->compute, saved->inverse2, s->branch,
                    1.0f, s->dx, us_param_grad(roles->post_norm));
    attention_grad(train, l);
    us_rmsnorm_grad(train->seq, &norm, s->residual[l], roles->input_norm->compute, saved->inverse1, s->branch,
                    1.0f, s->dx, us_param_grad(roles->input_norm));
  }
  /* The mask vector stands in every row but the anchors': its gradient is the sum of those rows. */
  if (us_param_grad(s->roles.mask))
    us_linear_grad_w(train->seq, &(struct us_linear){.R = rows, .N = 1, .K = D}, s->masked, s->dx,
                     us_param_grad(s->roles.mask));
  struct us_rmsnorm_rows context = {.R = R, .D = D, .eps = (float)shape->norm_eps};
  us_rmsnorm_grad(train->seq, &context, s->fused, s->roles.hidden_norm->compute, s->fused_inverse,
                  s->dcontext, 0.0f, s->dcontext, us_param_grad(s->roles.hidden_norm));
  if (us_param_grad(s->roles.fc))
    us_linear_grad_w(train->seq, &(struct us_linear){.R = R, .N = D, .K = shape->taps * D}, s->dcontext,
                     s->features, us_param_grad(s->roles.fc));
  return train->seq->failed ? us_err_memory(err, "scratch", 0) : US_OK;
}
