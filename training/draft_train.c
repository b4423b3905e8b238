/* draft_train.c: forward pass of a DFlash drafter over many blocks.
 *
 * Contents: memory; creation; context; block layers; forward; cost.
 */
#include "training/arena.h"
#include "training/draft_train_state.h"

#include "kernels/embed/embed_grad.h"
#include "kernels/rope/rope.h"

#include <stdlib.h>

/* --- memory --- */

static void take_layer(struct us_arena *t, const struct us_draft_train *train, struct us_draft_saved *s) {
  const struct us_draft_shape *shape = &train->shape;
  const struct us_attention_shape *a = &shape->attention;
  size_t D = shape->hidden, F = shape->inner, rows = train->blocks_capacity * shape->block;
  size_t all = train->capacity + rows, width = us_attention_qkv_rows(a);
  US_ARENA_TAKE(t, s->raw, all * width);
  US_ARENA_TAKE(t, s->qkv, all * width);
  US_ARENA_TAKE(t, s->q_inverse, rows * a->q_heads);
  US_ARENA_TAKE(t, s->k_inverse, all * a->kv_heads);
  US_ARENA_TAKE(t, s->norm1, rows * D);
  US_ARENA_TAKE(t, s->inverse1, rows);
  US_ARENA_TAKE(t, s->attention, rows * a->q_heads * a->v_dim);
  US_ARENA_TAKE(t, s->max, rows * a->q_heads);
  US_ARENA_TAKE(t, s->sum, rows * a->q_heads);
  US_ARENA_TAKE(t, s->middle, rows * D);
  US_ARENA_TAKE(t, s->norm2, rows * D);
  US_ARENA_TAKE(t, s->inverse2, rows);
  US_ARENA_TAKE(t, s->gate_up, rows * 2 * F);
  US_ARENA_TAKE(t, s->a, rows * F);
}

static void take_all(struct us_arena *t, struct us_draft_train *train, struct us_draft_train_state *s) {
  const struct us_draft_shape *shape = &train->shape;
  const struct us_attention_shape *a = &shape->attention;
  size_t D = shape->hidden, C = train->capacity, rows = train->blocks_capacity * shape->block, all = C + rows;
  US_ARENA_TAKE(t, s->q_offset, a->q_heads);
  US_ARENA_TAKE(t, s->k_offset, a->kv_heads);
  US_ARENA_TAKE(t, s->v_offset, a->kv_heads);
  US_ARENA_TAKE(t, s->table, (C + shape->block) * a->rotary_dim);
  US_ARENA_TAKE(t, s->position, all);
  US_ARENA_TAKE(t, s->features, C * shape->taps * D);
  US_ARENA_TAKE(t, s->fused, C * D);
  US_ARENA_TAKE(t, s->fused_inverse, C);
  US_ARENA_TAKE(t, s->context, C * D);
  for (uint32_t l = 0; l < shape->layers; l++) take_layer(t, train, &s->saved[l]);
  for (uint32_t l = 0; l <= shape->layers; l++) US_ARENA_TAKE(t, s->residual[l], rows * D);
  US_ARENA_TAKE(t, train->hidden, rows * D);
  US_ARENA_TAKE(t, train->dhidden, rows * D);
  US_ARENA_TAKE(t, s->final_inverse, rows);
  US_ARENA_TAKE(t, s->branch, rows * D);
  US_ARENA_TAKE(t, s->dx, rows * D);
  US_ARENA_TAKE(t, s->dqkv, all * us_attention_qkv_rows(a));
  US_ARENA_TAKE(t, s->dattention, rows * a->q_heads * a->v_dim);
  US_ARENA_TAKE(t, s->da, rows * shape->inner);
  US_ARENA_TAKE(t, s->dcontext, C * D);
  US_ARENA_TAKE(t, s->masked, rows);
  if (!shape->markov) return;
  US_ARENA_TAKE(t, s->previous, rows);
  US_ARENA_TAKE(t, s->before, rows * D);
  US_ARENA_TAKE(t, s->inner, rows * shape->markov);
  US_ARENA_TAKE(t, s->dinner, rows * shape->markov);
}

/* --- creation --- */

static void fill_constants(const struct us_draft_train *train) {
  const struct us_attention_shape *a = &train->shape.attention;
  struct us_draft_train_state *s = train->state;
  for (uint32_t h = 0; h < a->q_heads; h++) s->q_offset[h] = us_attention_q_row(a, 1, h);
  for (uint32_t g = 0; g < a->kv_heads; g++) {
    s->k_offset[g] = us_attention_k_row(a, 1, g);
    s->v_offset[g] = us_attention_v_row(a, 1, g);
  }
  for (size_t p = 0; p < train->capacity + train->shape.block; p++)
    us_rope_table(a->rope_theta, a->rotary_dim, (uint32_t)p, s->table + p * a->rotary_dim);
  for (size_t r = 0; r < train->blocks_capacity * train->shape.block; r++)
    s->masked[r] = r % train->shape.block ? 1.0f : 0.0f;
}

enum us_status us_draft_train_create(const struct us_draft_shape *shape, struct us_params *params,
                                     const float *embed, struct us_seq *seq, size_t capacity, size_t blocks,
                                     struct us_draft_train **ret_train, struct us_err *err) {
  *ret_train = NULL;
  if (!capacity || !blocks || capacity > UINT32_MAX / 64 || blocks > UINT32_MAX / 1024)
    return us_err_set(err, US_ERR_USAGE, "%zu context rows and %zu blocks a pass", capacity, blocks);
  struct us_draft_train *train = calloc(1, sizeof *train);
  if (!train) return us_err_memory(err, "drafter's training state", sizeof *train);
  *train = (struct us_draft_train){.shape = *shape,
                                   .params = params,
                                   .seq = seq,
                                   .embed = embed,
                                   .capacity = capacity,
                                   .blocks_capacity = blocks};
  struct us_draft_train_state counted = {0};
  struct us_arena t = {0};
  take_all(&t, train, &counted);
  train->state = calloc(1, sizeof *train->state);
  if (train->state) train->state->arena = aligned_alloc(64, t.used);
  enum us_status status = US_OK;
  if (!train->state || !train->state->arena) status = us_err_memory(err, "drafter's activations", t.used);
  if (status == US_OK) {
    t = (struct us_arena){.base = train->state->arena};
    take_all(&t, train, train->state);
    fill_constants(train);
    status = us_draft_roles_find(shape, params, &train->state->roles, err);
  }
  if (status != US_OK) {
    us_draft_train_free(train);
    return status;
  }
  *ret_train = train;
  return US_OK;
}

void us_draft_train_free(struct us_draft_train *train) {
  if (!train) return;
  if (train->state) free(train->state->arena);
  free(train->state);
  free(train);
}

/* --- context --- */

/* c = rmsnorm(fc f), once for all layers. */
static void fuse_taps(struct us_draft_train *train, const float *taps) {
  struct us_draft_train_state *s = train->state;
  size_t R = train->R, D = train->shape.hidden, wide = train->shape.taps * D;
  if (train->seq->rounding == US_SEQ_ROUND_BF16)
    us_bf16_round_all(taps, R * wide, s->features);
  else
    memcpy(s->features, taps, R * wide * sizeof *taps);
  us_linear_seq(train->seq, &(struct us_linear){.R = R, .N = D, .K = wide}, s->features, s->roles.fc->compute,
                s->fused);
  us_rmsnorm_seq(train->seq, &(struct us_rmsnorm_rows){.R = R, .D = D, .eps = (float)train->shape.norm_eps},
                 s->fused, s->roles.hidden_norm->compute, s->context, s->fused_inverse);
}

/* --- block layers --- */

/* Raw q, k, v of all rows, then normed and rotated q and k: the context's from c, the blocks' from the normed stream. */
static void project(struct us_draft_train *train, uint32_t l) {
  struct us_draft_train_state *s = train->state;
  const struct us_attention_shape *a = &train->shape.attention;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_draft_saved *saved = &s->saved[l];
  size_t R = train->R, rows = us_draft_block_rows(train), D = train->shape.hidden;
  size_t W = us_attention_qkv_rows(a), q_width = (size_t)a->q_heads * a->qk_dim;
  float eps = (float)train->shape.norm_eps, *raw = saved->raw, *qkv = saved->qkv;
  us_linear_seq(train->seq, &(struct us_linear){.R = R, .N = W - q_width, .K = D, .y_stride = W}, s->context,
                roles->k->compute, raw + q_width);
  us_linear_seq(train->seq, &(struct us_linear){.R = rows, .N = W, .K = D}, saved->norm1, roles->q->compute,
                raw + R * W);
  struct us_rmsnorm_rows q_rows = {
      .R = rows, .D = a->qk_dim, .heads = a->q_heads, .stride = W, .eps = eps, .keep_f32 = true};
  struct us_rmsnorm_rows k_rows = {
      .R = R + rows, .D = a->qk_dim, .heads = a->kv_heads, .stride = W, .eps = eps, .keep_f32 = true};
  us_rmsnorm_seq(train->seq, &q_rows, raw + R * W, roles->q_norm->compute, qkv + R * W, saved->q_inverse);
  us_rmsnorm_seq(train->seq, &k_rows, raw + q_width, roles->k_norm->compute, qkv + q_width, saved->k_inverse);
  struct us_rope_rows q = {
      .R = rows, .stride = W, .offset = s->q_offset, .heads = a->q_heads, .rotary = a->rotary_dim};
  struct us_rope_rows k = {
      .R = R + rows, .stride = W, .offset = s->k_offset, .heads = a->kv_heads, .rotary = a->rotary_dim};
  struct us_rope_rows v = {.R = R + rows, .stride = W, .offset = s->v_offset, .heads = a->kv_heads};
  us_rope_seq(train->seq, &q, s->table, s->position + R, qkv + R * W);
  us_rope_seq(train->seq, &k, s->table, s->position, qkv);
  us_scale_heads_seq(train->seq, &k, a->qk_dim, 1.0f, true, qkv);
  us_scale_heads_seq(train->seq, &v, a->v_dim, (float)train->shape.value_scale, true, raw);
}

struct us_attention_seq us_draft_train_attention(const struct us_draft_train *train, uint32_t l) {
  const struct us_draft_train_state *s = train->state;
  const struct us_attention_shape *a = &train->shape.attention;
  const struct us_draft_saved *saved = &s->saved[l];
  size_t W = us_attention_qkv_rows(a), rows = us_draft_block_rows(train);
  return (struct us_attention_seq){.queries = rows,
                                   .keys = train->R + rows,
                                   .q_heads = a->q_heads,
                                   .kv_heads = a->kv_heads,
                                   .qk_dim = a->qk_dim,
                                   .v_dim = a->v_dim,
                                   .q = saved->qkv + train->R * W,
                                   .k = saved->qkv,
                                   .v = saved->raw,
                                   .q_stride = W,
                                   .k_stride = W,
                                   .v_stride = W,
                                   .q_offset = s->q_offset,
                                   .k_offset = s->k_offset,
                                   .v_offset = s->v_offset,
                                   .context_begin = train->blocks->range[0],
                                   .context_end = train->blocks->range[1],
                                   .block_begin = train->blocks->range[2],
                                   .block_end = train->blocks->range[3],
                                   .scale = (float)(1.0 / sqrt((double)a->qk_dim)),
                                   .sink = a->sink ? s->roles.layer[l].sink->compute : NULL,
                                   .out = saved->attention,
                                   .max = saved->max,
                                   .sum = saved->sum};
}

static void run_layer(struct us_draft_train *train, uint32_t l) {
  struct us_draft_train_state *s = train->state;
  const struct us_attention_shape *a = &train->shape.attention;
  const struct us_draft_layer_roles *roles = &s->roles.layer[l];
  struct us_draft_saved *saved = &s->saved[l];
  size_t rows = us_draft_block_rows(train), D = train->shape.hidden, F = train->shape.inner;
  struct us_rmsnorm_rows norm = {.R = rows, .D = D, .eps = (float)train->shape.norm_eps};
  us_rmsnorm_seq(train->seq, &norm, s->residual[l], roles->input_norm->compute, saved->norm1,
                 saved->inverse1);
  project(train, l);
  struct us_attention_seq attention = us_draft_train_attention(train, l);
  us_attention_seq(train->seq, &attention);
  us_linear_seq(train->seq, &(struct us_linear){.R = rows, .N = D, .K = (size_t)a->q_heads * a->v_dim},
                saved->attention, roles->o_proj->compute, s->branch);
  us_seq_add(train->seq, rows * D, s->residual[l], s->branch, saved->middle);
  us_rmsnorm_seq(train->seq, &norm, saved->middle, roles->post_norm->compute, saved->norm2, saved->inverse2);
  us_linear_seq(train->seq, &(struct us_linear){.R = rows, .N = 2 * F, .K = D}, saved->norm2,
                roles->gate_up->compute, saved->gate_up);
  us_swiglu_seq(train->seq, rows, F, saved->gate_up, saved->a);
  us_linear_seq(train->seq, &(struct us_linear){.R = rows, .N = D, .K = F}, saved->a, roles->down->compute,
                s->branch);
  us_seq_add(train->seq, rows * D, saved->middle, s->branch, s->residual[l + 1]);
}

/* The Markov head: what each normed row gets of the token before it, whose row of the head's table is rounded as decoding has it. An
 * anchor's row, which predicts nothing, gets no token and so nothing, forward or backward: decoding leaves it alone. */
static void add_previous(struct us_draft_train *train) {
  struct us_draft_train_state *s = train->state;
  const struct us_draft_blocks *blocks = train->blocks;
  size_t rows = us_draft_block_rows(train), D = train->shape.hidden, rank = train->shape.markov;
  for (size_t r = 0; r < rows; r++) {
    uint32_t j = (uint32_t)(r % blocks->B);
    s->previous[r] = j ? us_draft_blocks_previous(blocks, r / blocks->B, j) : -1;
  }
  us_embed_seq(train->seq, s->previous, rows, D, train->embed, s->before);
  us_linear_seq(train->seq, &(struct us_linear){.R = rows, .N = rank, .K = D}, s->before,
                s->roles.markov_in->compute, s->inner);
  if (train->seq->rounding == US_SEQ_ROUND_BF16) us_bf16_round_all(s->inner, rows * rank, s->inner);
  us_linear_seq(train->seq, &(struct us_linear){.R = rows, .N = D, .K = rank}, s->inner,
                s->roles.markov_out->compute, s->branch);
  us_seq_add(train->seq, rows * D, train->hidden, s->branch, train->hidden);
}

/* The rows that the head multiplies, rounded once: after the addition where there is one. */
static void finish_rows(struct us_draft_train *train) {
  struct us_draft_train_state *s = train->state;
  size_t rows = us_draft_block_rows(train), D = train->shape.hidden;
  bool adds = train->shape.markov != 0;
  struct us_rmsnorm_rows norm = {.R = rows, .D = D, .eps = (float)train->shape.norm_eps, .keep_f32 = adds};
  us_rmsnorm_seq(train->seq, &norm, s->residual[train->shape.layers], s->roles.final_norm->compute,
                 train->hidden, s->final_inverse);
  if (!adds) return;
  add_previous(train);
  if (train->seq->rounding == US_SEQ_ROUND_BF16) us_bf16_round_all(train->hidden, rows * D, train->hidden);
}

/* --- forward --- */

static enum us_status accept_pass(struct us_draft_train *train, size_t R, const uint32_t *position,
                                  const struct us_draft_blocks *blocks, struct us_err *err) {
  size_t rows = blocks->n * blocks->B;
  if (R > train->capacity || blocks->n > train->blocks_capacity || blocks->B != train->shape.block)
    return us_err_set(err, US_ERR_USAGE,
                      "%zu context rows and %zu blocks of %u; at most %zu and %zu of %u fit", R, blocks->n,
                      blocks->B, train->capacity, train->blocks_capacity, train->shape.block);
  for (size_t r = 0; r < R; r++)
    if (position[r] >= train->capacity)
      return us_err_set(err, US_ERR_USAGE, "row %zu: position %u out of range", r, position[r]);
  train->R = R;
  train->blocks = blocks;
  memcpy(train->state->position, position, R * sizeof *position);
  memcpy(train->state->position + R, blocks->position, rows * sizeof *position);
  return US_OK;
}

enum us_status us_draft_train_forward(struct us_draft_train *train, const float *taps, size_t R,
                                      const uint32_t *position, const struct us_draft_blocks *blocks,
                                      struct us_err *err) {
  struct us_draft_train_state *s = train->state;
  enum us_status status = accept_pass(train, R, position, blocks, err);
  if (status != US_OK) return status;
  size_t rows = us_draft_block_rows(train), D = train->shape.hidden;
  us_embed_seq(train->seq, blocks->token, rows, D, train->embed, s->residual[0]);
  for (size_t r = 0; r < rows; r++)
    if (blocks->token[r] < 0) memcpy(s->residual[0] + r * D, s->roles.mask->compute, D * sizeof(float));
  fuse_taps(train, taps);
  for (uint32_t l = 0; l < train->shape.layers; l++) run_layer(train, l);
  finish_rows(train);
  return train->seq->failed ? us_err_memory(err, "scratch", 0) : US_OK;
}

/* --- cost --- */

double us_draft_train_block_flops(const struct us_draft_shape *shape, double keys) {
  const struct us_attention_shape *a = &shape->attention;
  double D = shape->hidden, seen = keys < a->window ? keys : a->window;
  double layer = 2.0 * D * (us_attention_qkv_rows(a) + (double)a->q_heads * a->v_dim + 3.0 * shape->inner);
  layer += 2.0 * a->q_heads * (seen + shape->block) * (a->qk_dim + a->v_dim);
  double head = 4.0 * D * shape->vocab * (shape->block - 1.0);
  return 3.0 * shape->block * (shape->layers * layer + 4.0 * D * shape->markov) + head;
}

double us_draft_train_context_flops(const struct us_draft_shape *shape) {
  const struct us_attention_shape *a = &shape->attention;
  double D = shape->hidden, kv = (double)a->kv_heads * (a->qk_dim + a->v_dim);
  return 3.0 * 2.0 * D * shape->layers * kv + 2.0 * 2.0 * D * D * shape->taps;
}
