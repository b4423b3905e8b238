/* model_train.c: forward pass of a whole model over packed sequences.
 *
 * Contents: roles; memory; creation; layers; forward; balance and cost.
 */
#include "training/model_train.h"
#include "kernels/attention_seq/attention_seq.h"
#include "kernels/embed/embed_grad.h"
#include "kernels/linear/linear_grad.h"
#include "kernels/rmsnorm/rmsnorm_grad.h"
#include "kernels/rope/rope.h"
#include "kernels/rope/rope_grad.h"
#include "kernels/router/router_grad.h"
#include "kernels/swiglu/swiglu_grad.h"
#include "training/arena.h"
#include "training/model_train_state.h"

#include <stdlib.h>

/* --- roles --- */

static void list_experts(const struct us_model_train *train, uint32_t l) {
  const struct us_layer_experts *experts = &train->state->experts[l];
  for (uint32_t e = 0; e < train->shape.experts; e++) {
    struct us_param *x = train->state->roles[l].experts + 3 * (size_t)e;
    experts->gate_up[e] = x->compute;
    experts->down[e] = x[2].compute;
    experts->gate_up_grad[e] = x->grad;
    experts->down_grad[e] = x[2].grad;
  }
}

static enum us_status bind_roles(struct us_model_train *train, struct us_err *err) {
  struct us_model_train_state *s = train->state;
  enum us_status status = us_model_roles_find(train->params, &s->model, err);
  train->head = s->model.head;
  for (uint32_t l = 0; l < train->shape.layers && status == US_OK; l++) {
    status = us_layer_roles_find(&train->shape, train->params, l, &s->roles[l], err);
    if (status == US_OK && train->shape.moe_layer[l]) list_experts(train, l);
  }
  return status;
}

/* --- memory --- */

static void take_layer(struct us_arena *t, const struct us_shape *shape, size_t R, uint32_t l,
                       struct us_layer_saved *s) {
  const struct us_attention_shape *a = us_shape_attention(shape, l);
  size_t D = shape->hidden, slots = R * shape->top_k;
  US_ARENA_TAKE(t, s->norm1, R * D);
  US_ARENA_TAKE(t, s->inverse1, R);
  US_ARENA_TAKE(t, s->qkv, R * us_attention_qkv_rows(a));
  US_ARENA_TAKE(t, s->attention, R * a->q_heads * a->v_dim);
  US_ARENA_TAKE(t, s->max, R * a->q_heads);
  US_ARENA_TAKE(t, s->sum, R * a->q_heads);
  US_ARENA_TAKE(t, s->middle, R * D);
  US_ARENA_TAKE(t, s->norm2, R * D);
  US_ARENA_TAKE(t, s->inverse2, R);
  if (!shape->moe_layer[l]) {
    US_ARENA_TAKE(t, s->gate_up, R * 2 * shape->dense_inner);
    US_ARENA_TAKE(t, s->a, R * shape->dense_inner);
    return;
  }
  US_ARENA_TAKE(t, s->weight, slots);
  US_ARENA_TAKE(t, s->plan.start, shape->experts + 1);
  US_ARENA_TAKE(t, s->plan.row, slots);
  US_ARENA_TAKE(t, s->plan.slot, slots);
  US_ARENA_TAKE(t, s->experts.x, slots * D);
  US_ARENA_TAKE(t, s->experts.gate_up, slots * 2 * shape->expert_inner);
  US_ARENA_TAKE(t, s->experts.a, slots * shape->expert_inner);
}

/* Layers that share buffers start at the same place; the widest decides where the next piece begins. */
static void take_layers(struct us_arena *t, const struct us_model_train *train,
                        struct us_layer_saved *saved) {
  struct us_layer_saved ignored = {0};
  /* A student asks its teacher for the scores of all layers. */
  for (uint32_t l = 0; l < train->shape.layers; l++) {
    size_t n = train->shape.moe_layer[l] ? train->capacity * train->shape.experts : 0;
    US_ARENA_TAKE(t, (saved ? &saved[l] : &ignored)->scores, n);
  }
  size_t start = t->used, widest = t->used;
  for (uint32_t l = 0; l < train->shape.layers; l++) {
    if (train->memory != US_TRAIN_SAVE) t->used = start;
    take_layer(t, &train->shape, train->capacity, l, saved ? &saved[l] : &ignored);
    if (t->used > widest) widest = t->used;
  }
  t->used = widest;
}

static void take_attention(struct us_arena *t, const struct us_shape *shape, size_t R,
                           struct us_model_train_state *s) {
  const struct us_attention_shape *shapes[2] = {&shape->full, &shape->swa};
  for (int kind = 0; kind < 2; kind++) {
    struct us_attention_roles *a = &s->attention[kind];
    a->shape = shapes[kind];
    a->width = us_attention_qkv_rows(a->shape);
    US_ARENA_TAKE(t, a->q_offset, a->shape->q_heads);
    US_ARENA_TAKE(t, a->k_offset, a->shape->kv_heads);
    US_ARENA_TAKE(t, a->v_offset, a->shape->kv_heads);
    US_ARENA_TAKE(t, a->qk_offset, a->shape->q_heads + a->shape->kv_heads);
    US_ARENA_TAKE(t, a->table, R * a->shape->rotary_dim);
    US_ARENA_TAKE(t, a->begin, R);
  }
}

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

static void take_all(struct us_arena *t, struct us_model_train *train, struct us_model_train_state *s) {
  const struct us_shape *shape = &train->shape;
  size_t R = train->capacity, D = shape->hidden, L = shape->layers, E = shape->experts;
  bool counting = t->base == NULL, backward = train->memory != US_TRAIN_FORWARD;
  US_ARENA_TAKE(t, s->roles, L);
  US_ARENA_TAKE(t, s->experts, L);
  US_ARENA_TAKE(t, s->saved, L);
  US_ARENA_TAKE(t, s->id, L);
  US_ARENA_TAKE(t, s->residual, L + 1);
  US_ARENA_TAKE(t, train->load, L * larger(E, 1));
  take_attention(t, shape, R, s);
  US_ARENA_TAKE(t, s->end, R);
  for (size_t l = 0; l < L; l++) {
    struct us_layer_experts ignored = {0}, *experts = counting ? &ignored : &s->experts[l];
    uint32_t *ids = us_arena_take(t, shape->moe_layer[l] ? R * shape->top_k : 0, sizeof *ids);
    if (!counting) s->id[l] = ids;
    if (!shape->moe_layer[l]) continue;
    US_ARENA_TAKE(t, experts->gate_up, E);
    US_ARENA_TAKE(t, experts->down, E);
    US_ARENA_TAKE(t, experts->gate_up_grad, E);
    US_ARENA_TAKE(t, experts->down_grad, E);
  }
  size_t streams = backward ? L + 1 : 2;
  for (size_t i = 0; i < streams; i++) {
    float *stream = us_arena_take(t, R * D, sizeof *stream);
    for (size_t l = i; !counting && l <= L; l += backward ? L + 1 : 2) s->residual[l] = stream;
  }
  take_layers(t, train, counting ? NULL : s->saved);
  US_ARENA_TAKE(t, train->hidden, R * D);
  US_ARENA_TAKE(t, s->final_inverse, R);
  US_ARENA_TAKE(t, s->branch, R * D);
  if (!backward) return;
  const struct us_attention_shape *full = &shape->full, *swa = &shape->swa;
  US_ARENA_TAKE(t, train->dhidden, R * D);
  US_ARENA_TAKE(t, s->dx, R * D);
  US_ARENA_TAKE(t, s->dqkv, R * larger(us_attention_qkv_rows(full), us_attention_qkv_rows(swa)));
  US_ARENA_TAKE(t, s->dattention,
                R * larger((size_t)full->q_heads * full->v_dim, (size_t)swa->q_heads * swa->v_dim));
  US_ARENA_TAKE(t, s->da, R * shape->dense_inner);
  US_ARENA_TAKE(t, s->dweight, R * shape->top_k);
}

/* --- creation --- */

static void fill_attention(struct us_attention_roles *a, uint32_t chunks, size_t positions) {
  for (uint32_t h = 0; h < a->shape->q_heads; h++)
    a->q_offset[h] = a->qk_offset[h] = us_attention_q_row(a->shape, chunks, h);
  for (uint32_t g = 0; g < a->shape->kv_heads; g++) {
    a->k_offset[g] = a->qk_offset[a->shape->q_heads + g] = us_attention_k_row(a->shape, chunks, g);
    a->v_offset[g] = us_attention_v_row(a->shape, chunks, g);
  }
  for (size_t p = 0; p < positions; p++)
    us_rope_table(a->shape->rope_theta, a->shape->rotary_dim, (uint32_t)p,
                  a->table + p * a->shape->rotary_dim);
}

enum us_status us_model_train_create(const struct us_shape *shape, struct us_params *params,
                                     struct us_seq *seq, size_t capacity, enum us_train_memory memory,
                                     struct us_model_train **ret_train, struct us_err *err) {
  *ret_train = NULL;
  if (!capacity || capacity > UINT32_MAX / 64)
    return us_err_set(err, US_ERR_USAGE, "%zu rows a batch", capacity);
  struct us_model_train *train = calloc(1, sizeof *train);
  if (!train) return us_err_memory(err, "training state", sizeof *train);
  *train = (struct us_model_train){
      .shape = *shape, .params = params, .seq = seq, .capacity = capacity, .memory = memory};
  struct us_model_train_state counted = {0};
  struct us_arena t = {0};
  take_all(&t, train, &counted);
  train->state = calloc(1, sizeof *train->state);
  if (train->state) train->state->arena = aligned_alloc(64, t.used);
  enum us_status status = US_OK;
  if (!train->state || !train->state->arena) status = us_err_memory(err, "activations", t.used);
  if (status == US_OK) {
    memset(train->state->arena, 0, t.used);
    t = (struct us_arena){.base = (char *)train->state->arena};
    take_all(&t, train, train->state);
    for (int kind = 0; kind < 2; kind++)
      fill_attention(&train->state->attention[kind], shape->qkv_chunks, capacity);
    status = bind_roles(train, err);
  }
  if (status != US_OK) {
    us_model_train_free(train);
    return status;
  }
  *ret_train = train;
  return US_OK;
}

void us_model_train_free(struct us_model_train *train) {
  if (!train) return;
  if (train->state) free(train->state->arena);
  free(train->state);
  free(train);
}

/* --- layers --- */

struct us_attention_seq us_model_train_attention(const struct us_model_train *train, uint32_t l) {
  const struct us_model_train_state *s = train->state;
  const struct us_attention_roles *a = &s->attention[train->shape.swa_layer[l]];
  const struct us_layer_saved *saved = &s->saved[l];
  return (struct us_attention_seq){.queries = train->batch.R,
                                   .keys = train->batch.R,
                                   .q_heads = a->shape->q_heads,
                                   .kv_heads = a->shape->kv_heads,
                                   .qk_dim = a->shape->qk_dim,
                                   .v_dim = a->shape->v_dim,
                                   .q = saved->qkv,
                                   .k = saved->qkv,
                                   .v = saved->qkv,
                                   .q_stride = a->width,
                                   .k_stride = a->width,
                                   .v_stride = a->width,
                                   .q_offset = a->q_offset,
                                   .k_offset = a->k_offset,
                                   .v_offset = a->v_offset,
                                   .context_begin = a->begin,
                                   .context_end = s->end,
                                   .scale = (float)(1.0 / sqrt((double)a->shape->qk_dim)),
                                   .sink = s->roles[l].sink ? s->roles[l].sink->compute : NULL,
                                   .out = saved->attention,
                                   .max = saved->max,
                                   .sum = saved->sum};
}

struct us_experts_rows us_model_train_experts(const struct us_model_train *train, uint32_t l) {
  const struct us_shape *shape = &train->shape;
  return (struct us_experts_rows){.R = train->batch.R,
                                  .D = shape->hidden,
                                  .F = shape->expert_inner,
                                  .E = shape->experts,
                                  .K = shape->top_k,
                                  .gate_up = train->state->experts[l].gate_up,
                                  .down = train->state->experts[l].down};
}

static void attention_inputs(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  const struct us_layer_saved *saved = &s->saved[l];
  us_rmsnorm_seq(train->seq,
                 &(struct us_rmsnorm_rows){
                     .R = train->batch.R, .D = train->shape.hidden, .eps = (float)train->shape.norm_eps},
                 s->residual[l], s->roles[l].input_norm->compute, saved->norm1, saved->inverse1);
}

static void attention(struct us_model_train *train, uint32_t l) {
  const struct us_model_train_state *s = train->state;
  const struct us_attention_roles *a = &s->attention[train->shape.swa_layer[l]];
  const struct us_layer_saved *saved = &s->saved[l];
  size_t R = train->batch.R, D = train->shape.hidden, heads = (size_t)a->shape->q_heads + a->shape->kv_heads;
  us_linear_seq(train->seq, &(struct us_linear){.R = R, .N = a->width, .K = D}, saved->norm1,
                s->roles[l].qkv->compute, saved->qkv);
  struct us_rope_rows qk = {
      .R = R, .stride = a->width, .offset = a->qk_offset, .heads = heads, .rotary = a->shape->rotary_dim};
  us_rope_seq(train->seq, &qk, a->table, train->batch.position, saved->qkv);
  struct us_rope_rows k = {.R = R, .stride = a->width, .offset = a->k_offset, .heads = a->shape->kv_heads};
  struct us_rope_rows v = {.R = R, .stride = a->width, .offset = a->v_offset, .heads = a->shape->kv_heads};
  us_scale_heads_seq(train->seq, &k, a->shape->qk_dim, 1.0f, true, saved->qkv);
  us_scale_heads_seq(train->seq, &v, a->shape->v_dim, (float)train->shape.value_scale, true, saved->qkv);
  struct us_attention_seq rows = us_model_train_attention(train, l);
  us_attention_seq(train->seq, &rows);
}

static void route(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  const struct us_shape *shape = &train->shape;
  struct us_layer_saved *saved = &s->saved[l];
  struct us_router_rows router = {.R = train->batch.R,
                                  .D = shape->hidden,
                                  .E = shape->experts,
                                  .K = shape->top_k,
                                  .normalise = shape->norm_topk_prob,
                                  .scaling = (float)shape->routed_scaling,
                                  .opt_chosen = train->opt_follow ? train->opt_follow->state->id[l] : NULL};
  us_router_seq(train->seq, &router, saved->norm2, s->roles[l].router->compute,
                s->roles[l].router_bias->compute, saved->scores, s->id[l], saved->weight);
  struct us_experts_rows experts = us_model_train_experts(train, l);
  us_experts_sort(&experts, s->id[l], &saved->plan);
}

static void mlp_inputs(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  const struct us_attention_shape *a = us_shape_attention(&train->shape, l);
  const struct us_layer_saved *saved = &s->saved[l];
  size_t R = train->batch.R, D = train->shape.hidden;
  us_linear_seq(train->seq, &(struct us_linear){.R = R, .N = D, .K = (size_t)a->q_heads * a->v_dim},
                saved->attention, s->roles[l].o_proj->compute, s->branch);
  us_seq_add(train->seq, R * D, s->residual[l], s->branch, saved->middle);
  us_rmsnorm_seq(train->seq, &(struct us_rmsnorm_rows){.R = R, .D = D, .eps = (float)train->shape.norm_eps},
                 saved->middle, s->roles[l].post_norm->compute, saved->norm2, saved->inverse2);
  if (train->shape.moe_layer[l]) route(train, l);
}

static void mlp(struct us_model_train *train, uint32_t l) {
  struct us_model_train_state *s = train->state;
  struct us_layer_saved *saved = &s->saved[l];
  size_t R = train->batch.R, D = train->shape.hidden, F = train->shape.dense_inner;
  if (train->shape.moe_layer[l]) {
    struct us_experts_rows experts = us_model_train_experts(train, l);
    us_experts_seq(train->seq, &experts, &saved->plan, saved->norm2, saved->weight, &saved->experts,
                   s->branch);
  } else {
    us_linear_seq(train->seq, &(struct us_linear){.R = R, .N = 2 * F, .K = D}, saved->norm2,
                  s->roles[l].gate_up->compute, saved->gate_up);
    us_swiglu_seq(train->seq, R, F, saved->gate_up, saved->a);
    us_linear_seq(train->seq, &(struct us_linear){.R = R, .N = D, .K = F}, saved->a,
                  s->roles[l].down->compute, s->branch);
  }
  us_seq_add(train->seq, R * D, saved->middle, s->branch, s->residual[l + 1]);
}

void us_model_train_part(struct us_model_train *train, uint32_t l, enum us_layer_part part) {
  switch (part) {
  case US_PART_ATTENTION_INPUTS:
    attention_inputs(train, l);
    break;
  case US_PART_ATTENTION:
    attention(train, l);
    break;
  case US_PART_MLP_INPUTS:
    mlp_inputs(train, l);
    break;
  case US_PART_MLP:
    mlp(train, l);
    break;
  }
}

void us_model_train_layer(struct us_model_train *train, uint32_t l) {
  for (enum us_layer_part part = US_PART_ATTENTION_INPUTS; part <= US_PART_MLP; part++)
    us_model_train_part(train, l, part);
}

/* --- forward --- */

static enum us_status accept_batch(struct us_model_train *train, const struct us_batch *batch,
                                   struct us_err *err) {
  struct us_model_train_state *s = train->state;
  if (batch->R > train->capacity)
    return us_err_set(err, US_ERR_USAGE, "%zu rows in a batch of at most %zu", batch->R, train->capacity);
  for (size_t i = 0; i < batch->R; i++) {
    if (batch->token[i] < 0 || (uint32_t)batch->token[i] >= train->shape.vocab)
      return us_err_set(err, US_ERR_INPUT, "row %zu: token %d outside the vocabulary of %u", i,
                        batch->token[i], train->shape.vocab);
    if (batch->position[i] >= train->capacity || batch->document[i] > i)
      return us_err_set(err, US_ERR_USAGE, "row %zu: position %u or document start %u out of range", i,
                        batch->position[i], batch->document[i]);
    s->end[i] = (uint32_t)i + 1;
    for (int kind = 0; kind < 2; kind++) {
      uint32_t window = s->attention[kind].shape->window, begin = batch->document[i];
      if (window && i + 1 > begin + (size_t)window) begin = (uint32_t)(i + 1 - window);
      s->attention[kind].begin[i] = begin;
    }
  }
  train->batch = *batch;
  return US_OK;
}

static void copy_taps(const struct us_model_train *train, const struct us_train_taps *taps, uint32_t l) {
  size_t D = train->shape.hidden;
  for (uint32_t i = 0; i < taps->count; i++) {
    if (taps->layer[i] != l) continue;
    for (size_t r = 0; r < train->batch.R; r++)
      memcpy(taps->out + (r * taps->count + i) * D, train->state->residual[l + 1] + r * D, D * sizeof(float));
  }
}

enum us_status us_model_train_begin(struct us_model_train *train, const struct us_batch *batch,
                                    struct us_err *err) {
  struct us_model_train_state *s = train->state;
  enum us_status status = accept_batch(train, batch, err);
  if (status == US_OK)
    us_embed_seq(train->seq, batch->token, batch->R, train->shape.hidden, s->model.embed->compute,
                 s->residual[0]);
  return status;
}

enum us_status us_model_train_end(struct us_model_train *train, struct us_err *err) {
  struct us_model_train_state *s = train->state;
  const struct us_shape *shape = &train->shape;
  us_rmsnorm_seq(
      train->seq,
      &(struct us_rmsnorm_rows){.R = train->batch.R, .D = shape->hidden, .eps = (float)shape->norm_eps},
      s->residual[shape->layers], s->model.final_norm->compute, train->hidden, s->final_inverse);
  return train->seq->failed ? us_err_memory(err, "scratch", 0) : US_OK;
}

enum us_status us_model_train_forward(struct us_model_train *train, const struct us_batch *batch,
                                      const struct us_train_taps *opt_taps, struct us_err *err) {
  struct us_model_train_state *s = train->state;
  const struct us_shape *shape = &train->shape;
  enum us_status status = us_model_train_begin(train, batch, err);
  if (status != US_OK) return status;
  for (uint32_t l = 0; l < shape->layers; l++) {
    us_model_train_layer(train, l);
    if (shape->moe_layer[l])
      us_router_load(s->id[l], batch->R * shape->top_k, shape->experts,
                     train->load + (size_t)l * shape->experts);
    if (opt_taps) copy_taps(train, opt_taps, l);
  }
  return us_model_train_end(train, err);
}

/* --- balance and cost --- */

const uint32_t *us_model_train_routed(const struct us_model_train *train, uint32_t layer) {
  return train->shape.moe_layer[layer] ? train->state->id[layer] : NULL;
}

void us_model_train_clear_load(struct us_model_train *train) {
  memset(train->load, 0, (size_t)train->shape.layers * train->shape.experts * sizeof *train->load);
}

void us_model_train_balance(struct us_model_train *train, float rate) {
  for (uint32_t l = 0; l < train->shape.layers; l++) {
    struct us_param *bias = train->state->roles[l].router_bias;
    if (bias && !bias->frozen)
      us_router_balance(bias->value, train->load + (size_t)l * train->shape.experts, train->shape.experts,
                        rate);
  }
  us_model_train_clear_load(train);
}

double us_model_train_flops(const struct us_shape *shape, double keys) {
  double D = shape->hidden, flops = 2.0 * D * shape->vocab;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const struct us_attention_shape *a = us_shape_attention(shape, l);
    double seen = a->window && keys > a->window ? a->window : keys;
    flops += 2.0 * D * (us_attention_qkv_rows(a) + (double)a->q_heads * a->v_dim);
    flops += 2.0 * a->q_heads * seen * (a->qk_dim + a->v_dim);
    flops += shape->moe_layer[l] ? 2.0 * D * (shape->experts + 3.0 * shape->top_k * shape->expert_inner)
                                 : 6.0 * D * shape->dense_inner;
  }
  return flops;
}
