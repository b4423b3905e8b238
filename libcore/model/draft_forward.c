/* draft_forward.c: the DFlash drafter's two passes.
 *
 * Context, for each committed token at position t: f = the tapped residual rows side by side, rounded to bf16 on entry;
 * c = rmsnorm(fc f); in each layer K = rope(rmsnorm_head(Wk c), t) and V = value_scale * Wv c go to the cache.
 * Block, rows j = 0 .. B-1 at positions p + j (the anchor's embedding, then the mask vector): n = rmsnorm(h); q, k, v from
 * n; rmsnorm of each head of q and k, then rope; keys are the context (positions < p) and the whole block; o_proj;
 * residual; rmsnorm; SwiGLU; residual. Last, rmsnorm and the head (the drafter's own, or the target's) on rows 1 .. B-1.
 */
#include "model/forward.h"

#include "formats/bf16.h"
#include "kernels/embed/embed.h"
#include "kernels/linear/linear.h"
#include "kernels/residual/residual.h"
#include "kernels/rmsnorm/rmsnorm.h"
#include "kernels/rope/rope.h"
#include <string.h>

/* Norm of each of `heads` heads, then rope, in place; FP32 throughout. */
static void norm_and_rotate(const struct us_forward *f, const struct us_draft_shape *s, const float *weight,
                            const float *table, uint32_t heads, float *x) {
  uint32_t Q = s->attention.qk_dim;
  us_rmsnorm(&(struct us_rmsnorm_args){.x = x,
                                       .x_stride = Q,
                                       .weight = weight,
                                       .y = x,
                                       .y_stride = Q,
                                       .R = heads,
                                       .D = Q,
                                       .eps = (float)s->norm_eps,
                                       .isa = f->isa});
  for (uint32_t h = 0; h < heads; h++) us_rope_apply(table, s->attention.rotary_dim, x + (size_t)h * Q);
}

/* ---- Context ---- */

struct context_rows {
  float *packed, *fused, *kv_rows, *tables;
  size_t R;
  uint32_t position;
};

/* The last rows that a query can still see; older ones need no K/V. */
static size_t rows_to_keep(const struct us_draft_shape *s, size_t R) {
  uint32_t window = s->attention.window;
  return window && R > window ? window : R;
}

static enum us_status take_context(struct us_forward *f, const struct us_draft *draft, struct context_rows *c,
                                   struct us_err *err) {
  const struct us_draft_shape *s = &draft->shape;
  const struct us_attention_shape *a = &s->attention;
  enum us_status status = US_OK;
  size_t R = c->R;
  c->packed = us_forward_need(f, US_WORK_PACKED, R * us_linear_packed_width((size_t)s->taps * s->hidden),
                              &status, err);
  c->fused = us_forward_need(f, US_WORK_NORM, R * s->hidden, &status, err);
  c->kv_rows = us_forward_need(f, US_WORK_QKV, R * a->kv_heads * (a->qk_dim + a->v_dim), &status, err);
  c->tables = us_forward_need(f, US_WORK_ROPE, R * a->rotary_dim, &status, err);
  return status;
}

/* c = rmsnorm(fc f), packed. `taps` (R, taps * D). */
static enum us_status fuse_taps(struct us_forward *f, const struct us_draft *draft, const float *taps,
                                struct context_rows *c, struct us_err *err) {
  const struct us_draft_shape *s = &draft->shape;
  size_t wide = (size_t)s->taps * s->hidden;
  if (f->round_bf16) {
    enum us_status status = US_OK;
    float *rounded = us_forward_need(f, US_WORK_GATE, c->R * wide, &status, err);
    if (status != US_OK) return status;
    us_bf16_round_all(taps, c->R * wide, rounded);
    taps = rounded;
  }
  us_forward_pack(f, taps, c->R, wide, c->packed);
  us_forward_linear(f, &draft->fc, c->packed, c->R, c->fused, s->hidden);
  us_forward_norm(f, c->fused, draft->hidden_norm, c->R, s->hidden, s->norm_eps, c->fused, c->packed);
  return US_OK;
}

static void store_context(struct us_forward *f, const struct us_draft *draft, struct us_kv *kv, uint32_t l,
                          const struct context_rows *c) {
  const struct us_draft_shape *s = &draft->shape;
  const struct us_attention_shape *a = &s->attention;
  const struct us_draft_layer *layer = &draft->layers[l];
  size_t k_width = (size_t)a->kv_heads * a->qk_dim, v_width = (size_t)a->kv_heads * a->v_dim;
  float *k = c->kv_rows, *v = c->kv_rows + c->R * k_width, value_scale = (float)s->value_scale;
  us_forward_linear(f, &layer->k, c->packed, c->R, k, k_width);
  us_forward_linear(f, &layer->v, c->packed, c->R, v, v_width);
  for (size_t i = 0; i < c->R * v_width; i++) v[i] = v[i] * value_scale;
  for (size_t r = 0; r < c->R; r++) {
    norm_and_rotate(f, s, layer->k_norm, c->tables + r * a->rotary_dim, a->kv_heads, k + r * k_width);
    for (uint32_t g = 0; g < a->kv_heads; g++)
      us_kv_write(kv, l, c->position + (uint32_t)r, g, k + r * k_width + (size_t)g * a->qk_dim,
                  v + r * v_width + (size_t)g * a->v_dim);
  }
}

enum us_status us_draft_forward_context(struct us_forward *f, const struct us_draft *draft,
                                        const struct us_draft_context *context, struct us_err *err) {
  const struct us_draft_shape *s = &draft->shape;
  struct us_kv_spec spec = us_kv_spec_of_draft(s);
  size_t skip = context->R - rows_to_keep(s, context->R);
  struct context_rows c = {.R = context->R - skip, .position = context->position + (uint32_t)skip};
  if (!c.R) return US_OK;
  enum us_status status = us_forward_check_kv(context->kv, &spec, err);
  if (status == US_OK) status = us_kv_reserve(context->kv, c.position, (uint32_t)c.R, err);
  if (status == US_OK) status = take_context(f, draft, &c, err);
  if (status == US_OK) status = fuse_taps(f, draft, context->taps + skip * s->taps * s->hidden, &c, err);
  if (status != US_OK) return status;
  for (size_t r = 0; r < c.R; r++)
    us_rope_table(s->attention.rope_theta, s->attention.rotary_dim, c.position + (uint32_t)r,
                  c.tables + r * s->attention.rotary_dim);
  for (uint32_t l = 0; l < s->layers; l++) store_context(f, draft, context->kv, l, &c);
  return US_OK;
}

/* ---- Block ---- */

struct block_pass {
  struct us_forward *f;
  const struct us_draft *draft;
  struct us_kv *kv;
  uint32_t position;
  size_t B;
  struct us_row rows[US_MAX_BLOCK];
  struct us_err *err;
  float *h, *norm, *packed, *q, *k, *v, *attention, *y, *tables;
  void *page; /* the block's own K/V, laid out like a page of the cache */
};

static enum us_status take_block(struct block_pass *b) {
  const struct us_draft_shape *s = &b->draft->shape;
  const struct us_attention_shape *a = &s->attention;
  size_t B = b->B, D = s->hidden, wide = (size_t)a->q_heads * a->v_dim;
  struct us_attention_keys keys = us_kv_keys(b->kv, 0);
  struct us_forward *f = b->f;
  enum us_status status = US_OK;
  b->h = us_forward_need(f, US_WORK_H, B * D, &status, b->err);
  b->norm = us_forward_need(f, US_WORK_NORM, B * D, &status, b->err);
  b->packed =
      us_forward_need(f, US_WORK_PACKED, B * us_forward_packed_width(D, wide, s->inner), &status, b->err);
  b->q = us_forward_need(f, US_WORK_Q, B * a->q_heads * a->qk_dim, &status, b->err);
  b->k = us_forward_need(f, US_WORK_QKV, B * a->kv_heads * (a->qk_dim + a->v_dim), &status, b->err);
  b->attention = us_forward_need(f, US_WORK_ATTENTION, B * wide, &status, b->err);
  b->y = us_forward_need(f, US_WORK_Y, B * D, &status, b->err);
  b->tables = us_forward_need(f, US_WORK_ROPE, B * a->rotary_dim, &status, b->err);
  b->page =
      us_forward_need(f, US_WORK_BLOCK, us_attention_page_bytes(&keys) / sizeof(float) + 1, &status, b->err);
  if (status == US_OK) b->v = b->k + B * a->kv_heads * a->qk_dim;
  return status;
}

/* q, k, v of the block rows; k and v go to the block's page. */
static void project_block(struct block_pass *b, uint32_t l) {
  const struct us_draft_shape *s = &b->draft->shape;
  const struct us_attention_shape *a = &s->attention;
  const struct us_draft_layer *layer = &b->draft->layers[l];
  size_t q_width = (size_t)a->q_heads * a->qk_dim, k_width = (size_t)a->kv_heads * a->qk_dim;
  size_t v_width = (size_t)a->kv_heads * a->v_dim;
  struct us_attention_keys keys = us_kv_keys(b->kv, l);
  float value_scale = (float)s->value_scale;
  us_forward_linear(b->f, &layer->q, b->packed, b->B, b->q, q_width);
  us_forward_linear(b->f, &layer->k, b->packed, b->B, b->k, k_width);
  us_forward_linear(b->f, &layer->v, b->packed, b->B, b->v, v_width);
  for (size_t i = 0; i < b->B * v_width; i++) b->v[i] = b->v[i] * value_scale;
  for (size_t j = 0; j < b->B; j++) {
    const float *table = b->tables + j * a->rotary_dim;
    norm_and_rotate(b->f, s, layer->q_norm, table, a->q_heads, b->q + j * q_width);
    norm_and_rotate(b->f, s, layer->k_norm, table, a->kv_heads, b->k + j * k_width);
    for (uint32_t g = 0; g < a->kv_heads; g++)
      us_kv_store(&keys, b->page, (uint32_t)j, g, b->k + j * k_width + (size_t)g * a->qk_dim,
                  b->v + j * v_width + (size_t)g * a->v_dim);
  }
}

static enum us_status run_block_layer(struct block_pass *b, uint32_t l) {
  const struct us_draft_shape *s = &b->draft->shape;
  const struct us_draft_layer *layer = &b->draft->layers[l];
  const struct us_attention_shape *a = &s->attention;
  size_t D = s->hidden, wide = (size_t)a->q_heads * a->v_dim;
  us_forward_norm(b->f, b->h, layer->input_norm, b->B, D, s->norm_eps, b->norm, b->packed);
  project_block(b, l);
  struct us_forward_attention attention = {.rows = b->rows,
                                           .end = b->B,
                                           .layer = l,
                                           .shape = a,
                                           .sink = a->sink ? layer->sink : NULL,
                                           .q = b->q,
                                           .out = b->attention,
                                           .opt_block = b->page,
                                           .block_position = b->position,
                                           .block_rows = (uint32_t)b->B};
  enum us_status status = us_forward_attention(b->f, &attention, b->err);
  if (status != US_OK) return status;
  us_forward_pack(b->f, b->attention, b->B, wide, b->packed);
  us_forward_linear(b->f, &layer->o_proj, b->packed, b->B, b->y, D);
  us_residual_add(b->h, b->y, b->B * D);
  us_forward_norm(b->f, b->h, layer->post_norm, b->B, D, s->norm_eps, b->norm, b->packed);
  status = us_forward_dense(b->f, &layer->gate, &layer->up, &layer->down, b->packed, b->B, b->y, b->err);
  if (status == US_OK) us_residual_add(b->h, b->y, b->B * D);
  return status;
}

static enum us_status check_block(const struct us_model *model, const struct us_draft_shape *s,
                                  const struct us_draft_pass *pass, struct us_err *err) {
  struct us_kv_spec spec = us_kv_spec_of_draft(s);
  if (!pass->block || pass->block > US_MAX_BLOCK)
    return us_err_set(err, US_ERR_USAGE, "a block of %u; 1 to %d rows can be drafted", pass->block,
                      US_MAX_BLOCK);
  if (pass->anchor < 0 || (uint32_t)pass->anchor >= model->shape.vocab)
    return us_err_set(err, US_ERR_USAGE, "anchor token %d is outside the vocabulary of %u", pass->anchor,
                      model->shape.vocab);
  return us_forward_check_kv(pass->kv, &spec, err);
}

enum us_status us_draft_forward_block(struct us_forward *f, const struct us_model *model,
                                      const struct us_draft *draft, const struct us_draft_pass *pass,
                                      struct us_err *err) {
  const struct us_draft_shape *s = &draft->shape;
  size_t D = s->hidden, N = model->shape.vocab;
  struct block_pass b = {
      .f = f, .draft = draft, .kv = pass->kv, .position = pass->position, .B = pass->block, .err = err};
  enum us_status status = check_block(model, s, pass, err);
  if (status == US_OK) status = take_block(&b);
  if (status != US_OK) return status;
  for (uint32_t j = 0; j < pass->block; j++) {
    b.rows[j] = (struct us_row){.position = pass->position + j, .kv = pass->kv};
    if (j) memcpy(b.h + j * D, draft->mask_embedding, D * sizeof *b.h);
  }
  us_embed(&model->embed, (uint32_t)pass->anchor, b.h);
  us_forward_rope(s->attention.rope_theta, s->attention.rotary_dim, b.rows, b.B, b.tables);
  for (uint32_t l = 0; l < s->layers; l++) {
    status = run_block_layer(&b, l);
    if (status != US_OK) return status;
  }
  us_forward_norm(f, b.h, draft->final_norm, b.B, D, s->norm_eps, b.norm, b.packed);
  if (pass->hidden) memcpy(pass->hidden, b.norm, b.B * D * sizeof *b.norm);
  if (pass->logits && b.B > 1)
    us_forward_linear(f, us_draft_head(draft, model), b.packed + us_linear_packed_width(D), b.B - 1,
                      pass->logits, N);
  return US_OK;
}
