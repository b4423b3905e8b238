/* model.c: a target's activations on a GPU: what memory they take, creation, batches, loads and balance.
 *
 * Contents: memory; constants; creation; batches; loads.
 */
#include "training/cuda/model_state.h"

#include "kernels/router/router_grad.h"
#include "training/cuda/constants.h"
#include "training/cuda/limits.h"

#include <stdlib.h>
#include <string.h>

/* --- memory --- */

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

static void take_layer(struct us_arena *t, const struct us_shape *shape, size_t R, uint32_t l,
                       struct us_cuda_layer_saved *s) {
  const struct us_attention_shape *a = us_shape_attention(shape, l);
  size_t D = shape->hidden, slots = R * shape->top_k;
  US_ARENA_TAKE(t, s->norm1, R * D);
  US_ARENA_TAKE(t, s->inverse1, R);
  US_ARENA_TAKE(t, s->qkv, R * us_attention_qkv_rows(a));
  US_ARENA_TAKE(t, s->attention, R * a->q_heads * a->v_dim);
  US_ARENA_TAKE(t, s->lse, R * a->q_heads);
  US_ARENA_TAKE(t, s->middle, R * D);
  US_ARENA_TAKE(t, s->norm2, R * D);
  US_ARENA_TAKE(t, s->inverse2, R);
  if (!shape->moe_layer[l]) {
    US_ARENA_TAKE(t, s->gate_up, R * 2 * shape->dense_inner);
    return;
  }
  US_ARENA_TAKE(t, s->weight, slots);
  US_ARENA_TAKE(t, s->start, shape->experts + 1);
  US_ARENA_TAKE(t, s->row, slots);
  US_ARENA_TAKE(t, s->pair, slots);
  US_ARENA_TAKE(t, s->slot, slots);
  US_ARENA_TAKE(t, s->x, slots * D);
  US_ARENA_TAKE(t, s->gate_up, slots * 2 * shape->expert_inner);
}

/* Layers that share buffers start at the same place; the widest decides where the next piece begins. */
static void take_layers(struct us_arena *t, const struct us_cuda_model *model, bool counting) {
  struct us_cuda_layer_saved ignored;
  /* A student asks its teacher for the scores of all layers. */
  for (uint32_t l = 0; l < model->shape.layers; l++) {
    size_t n = model->shape.moe_layer[l] ? model->capacity * model->shape.experts : 0;
    US_ARENA_TAKE(t, (counting ? &ignored : &model->state->saved[l])->scores, n);
  }
  size_t start = t->used, widest = t->used;
  for (uint32_t l = 0; l < model->shape.layers; l++) {
    if (model->memory != US_TRAIN_SAVE) t->used = start;
    take_layer(t, &model->shape, model->capacity, l, counting ? &ignored : &model->state->saved[l]);
    widest = larger(widest, t->used);
  }
  t->used = widest;
}

static void take_attention(struct us_arena *t, const struct us_shape *shape, size_t R,
                           struct us_cuda_model_state *s) {
  const struct us_attention_shape *shapes[2] = {&shape->full, &shape->swa};
  for (int kind = 0; kind < 2; kind++) {
    struct us_cuda_attention_roles *a = &s->attention[kind];
    uint32_t H = shapes[kind]->q_heads, G = shapes[kind]->kv_heads;
    a->shape = shapes[kind];
    a->width = us_attention_qkv_rows(a->shape);
    US_ARENA_TAKE(t, a->q_offset, H);
    US_ARENA_TAKE(t, a->k_offset, G);
    US_ARENA_TAKE(t, a->v_offset, G);
    US_ARENA_TAKE(t, a->qk_offset, H + G);
    US_ARENA_TAKE(t, a->table, R * a->shape->rotary_dim);
    US_ARENA_TAKE(t, a->begin, R);
    a->plan = us_arena_take(t, us_attention_train_plan_bytes((uint32_t)R, (uint32_t)R, H, G), 1);
  }
}

/* One operation runs at a time, so that all share what the hungriest needs. */
static size_t scratch_bytes(const struct us_cuda_model *model) {
  const struct us_shape *shape = &model->shape;
  uint32_t R = (uint32_t)model->capacity, D = shape->hidden, E = shape->experts;
  size_t bytes = 256;
  if (E) bytes = larger(bytes, us_router_train_scratch(R, D, E));
  if (E) bytes = larger(bytes, us_experts_train_plan_scratch(R, E));
  if (model->memory == US_TRAIN_FORWARD) return bytes;
  bytes = larger(bytes, us_attention_train_scratch(R, shape->full.q_heads));
  bytes = larger(bytes, us_attention_train_scratch(R, shape->swa.q_heads));
  bytes = larger(bytes, us_rmsnorm_train_scratch(R, 1, D));
  if (E) bytes = larger(bytes, us_router_train_grad_scratch(D, E));
  if (E) bytes = larger(bytes, us_router_train_lesson_scratch(E));
  return larger(bytes, us_embed_train_scratch(R, D));
}

/* Rows of an MLP's inner products times their width, in the widest layer. */
static size_t inner_values(const struct us_shape *shape, size_t R) {
  size_t values = 0;
  for (uint32_t l = 0; l < shape->layers; l++)
    values = larger(
        values, R * (shape->moe_layer[l] ? (size_t)shape->top_k * shape->expert_inner : shape->dense_inner));
  return values;
}

static void take_gradients(struct us_arena *t, struct us_cuda_model *model, struct us_cuda_model_state *s) {
  const struct us_shape *shape = &model->shape;
  const struct us_attention_shape *full = &shape->full, *swa = &shape->swa;
  size_t R = model->capacity, D = shape->hidden, slots = R * shape->top_k;
  US_ARENA_TAKE(t, model->dhidden, R * D);
  US_ARENA_TAKE(t, s->embed_row, R);
  US_ARENA_TAKE(t, s->embed_piece, R);
  US_ARENA_TAKE(t, s->slot_dy, slots * D);
  US_ARENA_TAKE(t, s->da, inner_values(shape, R));
  US_ARENA_TAKE(t, s->dx, R * D);
  US_ARENA_TAKE(t, s->dnorm, R * D);
  US_ARENA_TAKE(t, s->dx_rounded, R * D);
  US_ARENA_TAKE(t, s->dqkv, R * larger(us_attention_qkv_rows(full), us_attention_qkv_rows(swa)));
  US_ARENA_TAKE(t, s->dattention,
                R * larger((size_t)full->q_heads * full->v_dim, (size_t)swa->q_heads * swa->v_dim));
  US_ARENA_TAKE(t, s->dweight, slots);
  US_ARENA_TAKE(t, s->dlogit, slots);
  US_ARENA_TAKE(t, s->lesson, R * shape->experts);
}

static void take_all(struct us_arena *t, struct us_cuda_model *model, struct us_cuda_model_state *s) {
  const struct us_shape *shape = &model->shape;
  size_t R = model->capacity, D = shape->hidden, L = shape->layers;
  bool counting = t->base == NULL, backward = model->memory != US_TRAIN_FORWARD;
  US_ARENA_TAKE(t, model->load, L * larger(shape->experts, 1));
  take_attention(t, shape, R, s);
  US_ARENA_TAKE(t, s->token, R);
  US_ARENA_TAKE(t, s->position, R);
  US_ARENA_TAKE(t, s->end, R);
  size_t streams = backward ? L + 1 : 2;
  for (size_t i = 0; i < streams; i++) {
    float *stream = us_arena_take(t, R * D, sizeof *stream);
    for (size_t l = i; !counting && l <= L; l += streams) s->residual[l] = stream;
  }
  for (size_t l = 0; l < L; l++) {
    uint32_t *id = us_arena_take(t, shape->moe_layer[l] ? R * shape->top_k : 0, sizeof *id);
    if (!counting) s->id[l] = id;
  }
  take_layers(t, model, counting);
  US_ARENA_TAKE(t, model->hidden, R * D);
  US_ARENA_TAKE(t, s->final_inverse, R);
  US_ARENA_TAKE(t, s->a, inner_values(shape, R));
  US_ARENA_TAKE(t, s->slot_y, R * shape->top_k * D);
  if (backward) take_gradients(t, model, s);
  s->scratch = us_arena_take(t, scratch_bytes(model), 1);
}

size_t us_cuda_model_bytes(const struct us_shape *shape, size_t capacity, enum us_train_memory memory) {
  struct us_cuda_model counted = {.shape = *shape, .capacity = capacity, .memory = memory};
  struct us_cuda_model_state state = {0};
  struct us_arena t = {0};
  take_all(&t, &counted, &state);
  return t.used;
}

/* --- constants --- */

static enum us_status fill_constants(const struct us_cuda_model *model, struct us_err *err) {
  struct us_cuda_model_state *s = model->state;
  size_t R = model->capacity;
  uint32_t *end = calloc(R, sizeof *end);
  if (!end) return us_err_memory(err, "ends of ranges", R * sizeof *end);
  for (size_t i = 0; i < R; i++) end[i] = (uint32_t)i + 1;
  enum us_status status = us_cuda_copy_in(model->cuda, s->end, end, R * sizeof *end, err);
  free(end);
  for (int kind = 0; kind < 2 && status == US_OK; kind++) {
    const struct us_cuda_attention_roles *a = &s->attention[kind];
    status = us_cuda_heads_fill(model->cuda,
                                &(struct us_cuda_heads){.shape = a->shape,
                                                        .chunks = model->shape.qkv_chunks,
                                                        .positions = R,
                                                        .q_offset = a->q_offset,
                                                        .k_offset = a->k_offset,
                                                        .v_offset = a->v_offset,
                                                        .qk_offset = a->qk_offset,
                                                        .table = a->table},
                                err);
  }
  return status;
}

/* --- creation --- */

/* What the kernels ask for beyond us_shape_check. */
static enum us_status check_shape(const struct us_shape *shape, size_t capacity, struct us_err *err) {
  enum us_status status = us_cuda_limits_rows(capacity, us_cuda_limits_widest(shape), err);
  if (status == US_OK) status = us_cuda_limits_widths(shape->hidden, shape->vocab, err);
  if (status == US_OK) status = us_cuda_limits_experts(shape->experts, shape->top_k, err);
  for (uint32_t l = 0; l < shape->layers && status == US_OK; l++) {
    status = us_cuda_limits_heads(us_shape_attention(shape, l), err);
    if (status != US_OK) us_err_prefix(err, "layer %u", l);
  }
  return status;
}

static enum us_status find_roles(struct us_cuda_model *model, struct us_err *err) {
  struct us_cuda_model_state *s = model->state;
  const struct us_params *host = model->params->host;
  enum us_status status = us_model_roles_find(host, &s->model, err);
  for (uint32_t l = 0; l < model->shape.layers && status == US_OK; l++) {
    const struct us_layer_roles *roles = &s->roles[l];
    status = us_layer_roles_find(&model->shape, host, l, &s->roles[l], err);
    for (uint32_t e = 1; status == US_OK && model->shape.moe_layer[l] && e < model->shape.experts; e++)
      if (roles->experts[3 * e].offset !=
              roles->experts->offset + e * us_cuda_expert_stride(&model->shape, roles) ||
          roles->experts[3 * e + 2].offset - roles->experts[3 * e].offset !=
              roles->experts[2].offset - roles->experts->offset)
        status = us_err_set(err, US_ERR_CHECK, "layer %u: experts are not stored at one distance", l);
  }
  if (status != US_OK) return status;
  model->head = us_cuda_param_compute(model->params, s->model.head);
  model->head_grad = us_cuda_param_grad(model->params, s->model.head);
  return US_OK;
}

/* Bytes of one batch on its way: five arrays of rows and the pieces of the embedding's gradient. */
static size_t staging_bytes(size_t R) {
  return 5 * (R * sizeof(uint32_t) + 64) + R * sizeof(struct us_embed_train_piece) + 64;
}

static enum us_status take_host(struct us_cuda_model *model, struct us_err *err) {
  struct us_cuda_model_state *s = model->state;
  size_t L = model->shape.layers, R = model->capacity;
  void *load = NULL;
  s->roles = calloc(L, sizeof *s->roles);
  s->saved = calloc(L, sizeof *s->saved);
  s->id = calloc(L, sizeof *s->id);
  s->residual = calloc(L + 1, sizeof *s->residual);
  s->embed_work = calloc(2 * R, sizeof *s->embed_work);
  if (!s->roles || !s->saved || !s->id || !s->residual || !s->embed_work)
    return us_err_memory(err, "training state", 2 * R * sizeof *s->embed_work);
  enum us_status status = us_cuda_take_pinned(L * larger(model->shape.experts, 1) * sizeof(uint64_t),
                                              "pinned memory", &load, err);
  s->load = load;
  if (status == US_OK) status = us_cuda_staging_create(model->cuda, staging_bytes(R), &s->staging, err);
  return status;
}

static enum us_status build(struct us_cuda_model *model, struct us_err *err) {
  size_t bytes = us_cuda_model_bytes(&model->shape, model->capacity, model->memory);
  model->state = calloc(1, sizeof *model->state);
  if (!model->state) return us_err_memory(err, "training state", sizeof *model->state);
  enum us_status status = us_cuda_take(model->cuda, bytes, "activations", &model->state->memory, err);
  if (status == US_OK) status = take_host(model, err);
  if (status != US_OK) return status;
  struct us_arena t = {.base = model->state->memory};
  take_all(&t, model, model->state);
  status = find_roles(model, err);
  return status == US_OK ? fill_constants(model, err) : status;
}

enum us_status us_cuda_model_create(struct us_cuda *cuda, const struct us_shape *shape,
                                    struct us_cuda_params *params, size_t capacity,
                                    enum us_train_memory memory, struct us_cuda_model **ret_model,
                                    struct us_err *err) {
  *ret_model = NULL;
  enum us_status status = check_shape(shape, capacity, err);
  if (status != US_OK) return status;
  struct us_cuda_model *model = calloc(1, sizeof *model);
  if (!model) return us_err_memory(err, "training state", sizeof *model);
  *model = (struct us_cuda_model){
      .cuda = cuda, .shape = *shape, .params = params, .capacity = capacity, .memory = memory};
  status = build(model, err);
  if (status != US_OK) {
    us_cuda_model_free(model);
    return status;
  }
  *ret_model = model;
  return US_OK;
}

void us_cuda_model_free(struct us_cuda_model *model) {
  if (!model) return;
  struct us_cuda_model_state *s = model->state;
  us_cuda_use(model->cuda);
  (void)cudaStreamSynchronize(model->cuda->stream); /* what is queued reads what is freed here */
  if (s) {
    us_cuda_staging_free(&s->staging);
    us_cuda_give_pinned(s->load);
    us_cuda_give(s->memory);
    free(s->embed_work);
    free(s->residual);
    free(s->id);
    free(s->saved);
    free(s->roles);
  }
  free(s);
  free(model);
}

/* --- batches --- */

static enum us_status check_batch(const struct us_cuda_model *model, const struct us_batch *batch,
                                  struct us_err *err) {
  if (batch->R > model->capacity)
    return us_err_set(err, US_ERR_USAGE, "%zu rows in a batch of at most %zu", batch->R, model->capacity);
  for (size_t i = 0; i < batch->R; i++) {
    if (batch->token[i] < 0 || (uint32_t)batch->token[i] >= model->shape.vocab)
      return us_err_set(err, US_ERR_INPUT, "row %zu: token %d outside the vocabulary of %u", i,
                        batch->token[i], model->shape.vocab);
    if (batch->position[i] >= model->capacity || batch->document[i] > i)
      return us_err_set(err, US_ERR_USAGE, "row %zu: position %u or document start %u out of range", i,
                        batch->position[i], batch->document[i]);
  }
  return US_OK;
}

static void put_ranges(struct us_cuda_model *model, const struct us_batch *batch) {
  struct us_cuda_model_state *s = model->state;
  for (int kind = 0; kind < 2; kind++) {
    uint32_t window = s->attention[kind].shape->window;
    uint32_t *out = us_cuda_staging_put(&s->staging, s->attention[kind].begin, batch->R * sizeof *out);
    for (size_t i = 0; i < batch->R; i++) {
      uint32_t begin = batch->document[i];
      if (window && i + 1 > begin + (size_t)window) begin = (uint32_t)(i + 1 - window);
      out[i] = begin;
    }
  }
}

static void put_embed_plan(struct us_cuda_model *model, const struct us_batch *batch) {
  struct us_cuda_model_state *s = model->state;
  size_t bytes = batch->R * sizeof(uint32_t);
  uint32_t *row = us_cuda_staging_put(&s->staging, s->embed_row, bytes);
  struct us_embed_train_piece *piece =
      us_cuda_staging_put(&s->staging, s->embed_piece, batch->R * sizeof *piece);
  s->embed_pieces = us_embed_train_plan(batch->token, batch->R, row, piece, s->embed_work);
  us_cuda_staging_shorten(&s->staging, s->embed_pieces * sizeof *piece);
}

enum us_status us_cuda_model_accept(struct us_cuda_model *model, const struct us_batch *batch,
                                    struct us_err *err) {
  struct us_cuda_model_state *s = model->state;
  enum us_status status = check_batch(model, batch, err);
  if (status == US_OK) status = us_cuda_staging_begin(&s->staging, err);
  if (status != US_OK) return status;
  size_t bytes = batch->R * sizeof(uint32_t);
  memcpy(us_cuda_staging_put(&s->staging, s->token, bytes), batch->token, bytes);
  memcpy(us_cuda_staging_put(&s->staging, s->position, bytes), batch->position, bytes);
  put_ranges(model, batch);
  if (model->memory != US_TRAIN_FORWARD && us_cuda_param_grad(model->params, s->model.embed))
    put_embed_plan(model, batch);
  us_cuda_staging_send(&s->staging);
  model->R = batch->R;
  return US_OK;
}

/* --- loads --- */

enum us_status us_cuda_model_fetch_load(struct us_cuda_model *model, uint64_t *load, struct us_err *err) {
  size_t bytes = (size_t)model->shape.layers * model->shape.experts * sizeof *load;
  us_cuda_use(model->cuda);
  us_cuda_download(model->cuda, model->state->load, model->load, bytes);
  enum us_status status = us_cuda_sync(model->cuda, err);
  memcpy(load, model->state->load, bytes);
  return status;
}

void us_cuda_model_clear_load(struct us_cuda_model *model) {
  size_t bytes = (size_t)model->shape.layers * model->shape.experts * sizeof *model->load;
  us_cuda_use(model->cuda);
  us_cuda_did(model->cuda, cudaMemsetAsync(model->load, 0, bytes, model->cuda->stream), "clearing loads");
}

enum us_status us_cuda_model_routed(struct us_cuda_model *model, uint32_t layer, uint32_t *id,
                                    struct us_err *err) {
  if (layer >= model->shape.layers || !model->shape.moe_layer[layer])
    return us_err_set(err, US_ERR_USAGE, "layer %u has no experts", layer);
  us_cuda_use(model->cuda);
  us_cuda_did(model->cuda,
              cudaMemcpyAsync(id, model->state->id[layer], model->R * model->shape.top_k * sizeof *id,
                              cudaMemcpyDeviceToHost, model->cuda->stream),
              "copying expert ids");
  return us_cuda_sync(model->cuda, err);
}
