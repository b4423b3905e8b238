/* draft_forward.c: forward pass of a DFlash drafter on a GPU. */
#include "kernels/draft_loss/draft_loss_train.h"
#include "kernels/swiglu/swiglu_train.h"
#include "training/cuda/draft_state.h"
#include "training/cuda/gemm.h"

#include <math.h>

/* --- arguments that forward and backward share --- */

struct us_rmsnorm_train us_cuda_draft_norm(const struct us_cuda_draft *draft, size_t rows, const float *x,
                                           const struct us_param *gain, uint16_t *y, float *inverse) {
  return (struct us_rmsnorm_train){.R = rows,
                                   .D = draft->shape.hidden,
                                   .eps = (float)draft->shape.norm_eps,
                                   .x = x,
                                   .gain = us_cuda_param_rounded(draft->params, gain),
                                   .y = y,
                                   .inverse = inverse};
}

struct us_rmsnorm_train us_cuda_draft_q_norm(const struct us_cuda_draft *draft, uint32_t l) {
  const struct us_attention_shape *a = &draft->shape.attention;
  const struct us_cuda_draft_saved *saved = &draft->state->saved[l];
  size_t W = us_attention_qkv_rows(a), first = draft->R * W;
  return (struct us_rmsnorm_train){
      .R = us_cuda_draft_rows(draft),
      .D = a->qk_dim,
      .heads = a->q_heads,
      .stride = W,
      .eps = (float)draft->shape.norm_eps,
      .x_bf16 = saved->raw + first,
      .gain = us_cuda_param_rounded(draft->params, draft->state->roles.layer[l].q_norm),
      .y = saved->qkv + first,
      .inverse = saved->q_inverse};
}

struct us_rmsnorm_train us_cuda_draft_k_norm(const struct us_cuda_draft *draft, uint32_t l) {
  const struct us_attention_shape *a = &draft->shape.attention;
  const struct us_cuda_draft_saved *saved = &draft->state->saved[l];
  size_t q_width = us_cuda_draft_q_width(draft);
  return (struct us_rmsnorm_train){
      .R = draft->R + us_cuda_draft_rows(draft),
      .D = a->qk_dim,
      .heads = a->kv_heads,
      .stride = us_attention_qkv_rows(a),
      .eps = (float)draft->shape.norm_eps,
      .x_bf16 = saved->raw + q_width,
      .gain = us_cuda_param_rounded(draft->params, draft->state->roles.layer[l].k_norm),
      .y = saved->qkv + q_width,
      .inverse = saved->k_inverse};
}

static struct us_rope_train rope_of(const struct us_cuda_draft *draft, size_t rows, uint16_t *x) {
  const struct us_attention_shape *a = &draft->shape.attention;
  return (struct us_rope_train){.R = rows,
                                .stride = us_attention_qkv_rows(a),
                                .x = x,
                                .table = draft->state->table,
                                .position = draft->state->position,
                                .rotary = a->rotary_dim,
                                .scale = 1.0f};
}

struct us_rope_train us_cuda_draft_block_rope(const struct us_cuda_draft *draft, uint16_t *x) {
  const struct us_attention_shape *a = &draft->shape.attention;
  struct us_rope_train rope =
      rope_of(draft, us_cuda_draft_rows(draft), x + draft->R * us_attention_qkv_rows(a));
  rope.position += draft->R;
  rope.rotated = draft->state->qk_offset;
  rope.rotated_heads = a->q_heads + a->kv_heads;
  return rope;
}

struct us_rope_train us_cuda_draft_context_rope(const struct us_cuda_draft *draft, uint16_t *x) {
  struct us_rope_train rope = rope_of(draft, draft->R, x);
  rope.rotated = draft->state->k_offset;
  rope.rotated_heads = draft->shape.attention.kv_heads;
  return rope;
}

struct us_rope_train us_cuda_draft_scale(const struct us_cuda_draft *draft, size_t rows, uint16_t *x) {
  struct us_rope_train rope = rope_of(draft, rows, x);
  rope.scaled = draft->state->v_offset;
  rope.scaled_heads = draft->shape.attention.kv_heads;
  rope.scaled_dim = draft->shape.attention.v_dim;
  rope.scale = (float)draft->shape.value_scale;
  return rope;
}

struct us_attention_train us_cuda_draft_attention(const struct us_cuda_draft *draft, uint32_t l) {
  const struct us_cuda_draft_state *s = draft->state;
  const struct us_attention_shape *a = &draft->shape.attention;
  const struct us_cuda_draft_saved *saved = &s->saved[l];
  size_t W = us_attention_qkv_rows(a), rows = us_cuda_draft_rows(draft);
  return (struct us_attention_train){
      .queries = (uint32_t)rows,
      .keys = (uint32_t)(draft->R + rows),
      .q_heads = a->q_heads,
      .kv_heads = a->kv_heads,
      .qk_dim = a->qk_dim,
      .v_dim = a->v_dim,
      .q = saved->qkv + draft->R * W,
      .k = saved->qkv,
      .v = saved->raw,
      .q_stride = W,
      .k_stride = W,
      .v_stride = W,
      .q_offset = s->q_offset,
      .k_offset = s->k_offset,
      .v_offset = s->v_offset,
      .context_begin = s->range[0],
      .context_end = s->range[1],
      .block_begin = s->range[2],
      .block_end = s->range[3],
      .opt_window = a->window ? a->window + draft->shape.block : 0,
      .scale = (float)(1.0 / sqrt((double)a->qk_dim)),
      .sink = a->sink ? us_cuda_param_rounded(draft->params, s->roles.layer[l].sink) : NULL,
      .plan = s->plan,
      .out = saved->attention,
      .lse = saved->lse};
}

/* --- layers --- */

/* c = rmsnorm(fc f), once for all layers. */
static void fuse_taps(struct us_cuda_draft *draft) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  size_t D = draft->shape.hidden;
  us_cuda_linear_f32(cuda, &(struct us_cuda_linear){.R = draft->R, .N = D, .K = draft->shape.taps * D},
                     draft->taps, us_cuda_param_compute(draft->params, s->roles.fc), s->fused);
  struct us_rmsnorm_train norm =
      us_cuda_draft_norm(draft, draft->R, s->fused, s->roles.hidden_norm, s->context, s->fused_inverse);
  us_cuda_did(cuda, us_rmsnorm_train(&norm, cuda->stream), "norm of the features");
}

/* Raw q, k, v of all rows, then normed and rotated q and k: the context's from c, the blocks' from the normed stream. */
static void project(struct us_cuda_draft *draft, uint32_t l) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_cuda_draft_saved *saved = &s->saved[l];
  size_t R = draft->R, rows = us_cuda_draft_rows(draft), D = draft->shape.hidden;
  size_t W = us_attention_qkv_rows(&draft->shape.attention), q_width = us_cuda_draft_q_width(draft);
  us_cuda_linear(cuda, &(struct us_cuda_linear){.R = R, .N = W - q_width, .K = D, .y_stride = W}, s->context,
                 us_cuda_param_compute(draft->params, roles->k), saved->raw + q_width);
  us_cuda_linear(cuda, &(struct us_cuda_linear){.R = rows, .N = W, .K = D}, saved->norm1,
                 us_cuda_param_compute(draft->params, roles->q), saved->raw + R * W);
  struct us_rmsnorm_train q_norm = us_cuda_draft_q_norm(draft, l), k_norm = us_cuda_draft_k_norm(draft, l);
  us_cuda_did(cuda, us_rmsnorm_train(&q_norm, cuda->stream), "norm of queries");
  us_cuda_did(cuda, us_rmsnorm_train(&k_norm, cuda->stream), "norm of keys");
  struct us_rope_train block = us_cuda_draft_block_rope(draft, saved->qkv);
  struct us_rope_train context = us_cuda_draft_context_rope(draft, saved->qkv);
  struct us_rope_train scale = us_cuda_draft_scale(draft, R + rows, saved->raw);
  us_cuda_did(cuda, us_rope_train(&block, cuda->stream), "rotation");
  us_cuda_did(cuda, us_rope_train(&context, cuda->stream), "rotation of the context");
  us_cuda_did(cuda, us_rope_train(&scale, cuda->stream), "scaling of values");
}

static void run_layer(struct us_cuda_draft *draft, uint32_t l) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  const struct us_attention_shape *a = &draft->shape.attention;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_cuda_draft_saved *saved = &s->saved[l];
  size_t rows = us_cuda_draft_rows(draft), D = draft->shape.hidden, F = draft->shape.inner;
  struct us_rmsnorm_train norm =
      us_cuda_draft_norm(draft, rows, s->residual[l], roles->input_norm, saved->norm1, saved->inverse1);
  us_cuda_did(cuda, us_rmsnorm_train(&norm, cuda->stream), "norm before attention");
  project(draft, l);
  struct us_attention_train attention = us_cuda_draft_attention(draft, l);
  us_cuda_did(cuda, us_attention_train(&attention, cuda->stream), "attention");
  us_cuda_linear_add(cuda, &(struct us_cuda_linear){.R = rows, .N = D, .K = (size_t)a->q_heads * a->v_dim},
                     saved->attention, us_cuda_param_compute(draft->params, roles->o_proj), s->residual[l],
                     saved->middle);
  norm = us_cuda_draft_norm(draft, rows, saved->middle, roles->post_norm, saved->norm2, saved->inverse2);
  us_cuda_did(cuda, us_rmsnorm_train(&norm, cuda->stream), "norm before the MLP");
  us_cuda_linear(cuda, &(struct us_cuda_linear){.R = rows, .N = 2 * F, .K = D}, saved->norm2,
                 us_cuda_param_compute(draft->params, roles->gate_up), saved->gate_up);
  us_cuda_did(cuda, us_swiglu_train(rows, F, saved->gate_up, s->a, cuda->stream), "SwiGLU");
  us_cuda_linear_add(cuda, &(struct us_cuda_linear){.R = rows, .N = D, .K = F}, s->a,
                     us_cuda_param_compute(draft->params, roles->down), saved->middle, s->residual[l + 1]);
}

/* The Markov head: what each normed row gets of the token before it, in `out`; NULL without one. The anchors' rows, which predict
 * nothing, get it too: nobody reads them. */
static const float *previous_part(struct us_cuda_draft *draft, float *out) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  size_t rows = us_cuda_draft_rows(draft), D = draft->shape.hidden, rank = draft->shape.markov;
  if (!rank) return NULL;
  us_cuda_did(cuda, us_rows_gather_train(rows, D, s->previous, draft->embed, s->before, cuda->stream),
              "tokens before");
  us_cuda_linear(cuda, &(struct us_cuda_linear){.R = rows, .N = rank, .K = D}, s->before,
                 us_cuda_param_compute(draft->params, s->roles.markov_in), s->inner);
  us_cuda_linear_f32(cuda, &(struct us_cuda_linear){.R = rows, .N = D, .K = rank}, s->inner,
                     us_cuda_param_compute(draft->params, s->roles.markov_out), out);
  return out;
}

/* --- forward --- */

enum us_status us_cuda_draft_forward(struct us_cuda_draft *draft, size_t R, const uint32_t *position,
                                     const struct us_draft_blocks *blocks, struct us_err *err) {
  struct us_cuda_draft_state *s = draft->state;
  struct us_cuda *cuda = draft->cuda;
  uint32_t L = draft->shape.layers;
  us_cuda_use(cuda);
  enum us_status status = us_cuda_draft_accept(draft, R, position, blocks, err);
  if (status != US_OK || !blocks->n) return status;
  struct us_attention_train attention = us_cuda_draft_attention(draft, 0);
  us_cuda_did(cuda, us_attention_train_plan(&attention, cuda->stream), "attention's plan");
  struct us_embed_train embed = {.R = us_cuda_draft_rows(draft),
                                 .D = draft->shape.hidden,
                                 .token = s->token,
                                 .table = draft->embed,
                                 .opt_mask = us_cuda_param_compute(draft->params, s->roles.mask),
                                 .x = s->residual[0]};
  us_cuda_did(cuda, us_embed_train(&embed, cuda->stream), "embedding");
  fuse_taps(draft);
  for (uint32_t l = 0; l < L; l++) run_layer(draft, l);
  struct us_rmsnorm_train norm = us_cuda_draft_norm(draft, embed.R, s->residual[L], s->roles.final_norm,
                                                    draft->hidden, s->final_inverse);
  norm.opt_add = previous_part(draft, s->dnorm); /* which backward alone uses otherwise */
  us_cuda_did(cuda, us_rmsnorm_train(&norm, cuda->stream), "final norm");
  return us_cuda_failed(cuda, err);
}
