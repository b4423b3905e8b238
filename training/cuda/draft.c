/* draft.c: a DFlash drafter on a GPU: memory, creation, and what a pass brings to the device. */
#include "training/cuda/constants.h"
#include "training/cuda/draft_state.h"
#include "training/cuda/limits.h"

#include <stdlib.h>
#include <string.h>

/* --- memory --- */

static size_t larger(size_t a, size_t b) {
  return a > b ? a : b;
}

static void take_layer(struct us_arena *t, const struct us_cuda_draft *draft, struct us_cuda_draft_saved *s) {
  const struct us_draft_shape *shape = &draft->shape;
  const struct us_attention_shape *a = &shape->attention;
  size_t D = shape->hidden, rows = draft->blocks_capacity * shape->block, all = draft->capacity + rows;
  size_t width = us_attention_qkv_rows(a);
  US_ARENA_TAKE(t, s->raw, all * width);
  US_ARENA_TAKE(t, s->qkv, all * width);
  US_ARENA_TAKE(t, s->q_inverse, rows * a->q_heads);
  US_ARENA_TAKE(t, s->k_inverse, all * a->kv_heads);
  US_ARENA_TAKE(t, s->norm1, rows * D);
  US_ARENA_TAKE(t, s->inverse1, rows);
  US_ARENA_TAKE(t, s->attention, rows * a->q_heads * a->v_dim);
  US_ARENA_TAKE(t, s->lse, rows * a->q_heads);
  US_ARENA_TAKE(t, s->middle, rows * D);
  US_ARENA_TAKE(t, s->norm2, rows * D);
  US_ARENA_TAKE(t, s->inverse2, rows);
  US_ARENA_TAKE(t, s->gate_up, rows * 2 * shape->inner);
}

/* One operation runs at a time, so that all share what the hungriest needs. */
static size_t scratch_bytes(const struct us_cuda_draft *draft) {
  const struct us_draft_shape *shape = &draft->shape;
  const struct us_attention_shape *a = &shape->attention;
  size_t D = shape->hidden, C = draft->capacity, rows = draft->blocks_capacity * shape->block;
  size_t bytes = us_attention_train_scratch((uint32_t)rows, a->q_heads);
  bytes = larger(bytes, us_rmsnorm_train_scratch(rows, 1, D));
  bytes = larger(bytes, us_rmsnorm_train_scratch(C, 1, D));
  bytes = larger(bytes, us_rmsnorm_train_scratch(rows, a->q_heads, a->qk_dim));
  bytes = larger(bytes, us_rmsnorm_train_scratch(C + rows, a->kv_heads, a->qk_dim));
  return larger(bytes, us_embed_train_scratch(rows, D));
}

/* What a pass brings, and what the shape fixes. */
static void take_inputs(struct us_arena *t, const struct us_cuda_draft *draft,
                        struct us_cuda_draft_state *s) {
  const struct us_attention_shape *a = &draft->shape.attention;
  size_t C = draft->capacity, rows = draft->blocks_capacity * draft->shape.block, all = C + rows;
  US_ARENA_TAKE(t, s->q_offset, a->q_heads);
  US_ARENA_TAKE(t, s->k_offset, a->kv_heads);
  US_ARENA_TAKE(t, s->v_offset, a->kv_heads);
  US_ARENA_TAKE(t, s->qk_offset, a->q_heads + a->kv_heads);
  US_ARENA_TAKE(t, s->table, (C + draft->shape.block) * a->rotary_dim);
  US_ARENA_TAKE(t, s->position, all);
  US_ARENA_TAKE(t, s->token, rows);
  for (int i = 0; i < 4; i++) US_ARENA_TAKE(t, s->range[i], rows);
  US_ARENA_TAKE(t, s->mask_row, rows);
  US_ARENA_TAKE(t, s->mask_piece, rows);
  s->plan = us_arena_take(
      t, us_attention_train_plan_bytes((uint32_t)rows, (uint32_t)all, a->q_heads, a->kv_heads), 1);
}

static void take_all(struct us_arena *t, struct us_cuda_draft *draft, struct us_cuda_draft_state *s) {
  const struct us_draft_shape *shape = &draft->shape;
  const struct us_attention_shape *a = &shape->attention;
  size_t D = shape->hidden, C = draft->capacity, rows = draft->blocks_capacity * shape->block;
  take_inputs(t, draft, s);
  US_ARENA_TAKE(t, draft->taps, C * shape->taps * D);
  US_ARENA_TAKE(t, s->fused, C * D);
  US_ARENA_TAKE(t, s->fused_inverse, C);
  US_ARENA_TAKE(t, s->context, C * D);
  for (uint32_t l = 0; l < shape->layers; l++) take_layer(t, draft, &s->saved[l]);
  for (uint32_t l = 0; l <= shape->layers; l++) US_ARENA_TAKE(t, s->residual[l], rows * D);
  US_ARENA_TAKE(t, draft->hidden, rows * D);
  US_ARENA_TAKE(t, draft->dhidden, rows * D);
  US_ARENA_TAKE(t, s->final_inverse, rows);
  US_ARENA_TAKE(t, s->a, rows * shape->inner);
  US_ARENA_TAKE(t, s->da, rows * shape->inner);
  US_ARENA_TAKE(t, s->dx, rows * D);
  US_ARENA_TAKE(t, s->dx_rounded, rows * D);
  US_ARENA_TAKE(t, s->dnorm, rows * D);
  US_ARENA_TAKE(t, s->dqkv, (C + rows) * us_attention_qkv_rows(a));
  US_ARENA_TAKE(t, s->dattention, rows * a->q_heads * a->v_dim);
  US_ARENA_TAKE(t, s->dcontext, C * D);
  US_ARENA_TAKE(t, s->dfused, C * D);
  if (shape->markov) {
    US_ARENA_TAKE(t, s->previous, rows);
    US_ARENA_TAKE(t, s->before, rows * D);
    US_ARENA_TAKE(t, s->inner, rows * shape->markov);
    US_ARENA_TAKE(t, s->dinner, rows * shape->markov);
  }
  s->scratch = us_arena_take(t, scratch_bytes(draft), 1);
}

size_t us_cuda_draft_bytes(const struct us_draft_shape *shape, size_t capacity, size_t blocks) {
  struct us_cuda_draft counted = {.shape = *shape, .capacity = capacity, .blocks_capacity = blocks};
  struct us_cuda_draft_state state;
  struct us_arena t = {0};
  take_all(&t, &counted, &state);
  return t.used;
}

/* --- creation --- */

/* Bytes of one pass on its way: positions, tokens, those before them, four ranges, and the plan of the mask vector's gradient. */
static size_t staging_bytes(const struct us_cuda_draft *draft) {
  size_t rows = draft->blocks_capacity * draft->shape.block;
  return (draft->capacity + 8 * rows) * sizeof(uint32_t) + rows * sizeof(struct us_embed_train_piece) +
         10 * 64;
}

static enum us_status build(struct us_cuda_draft *draft, struct us_err *err) {
  size_t bytes = us_cuda_draft_bytes(&draft->shape, draft->capacity, draft->blocks_capacity);
  size_t rows = draft->blocks_capacity * draft->shape.block;
  struct us_cuda_draft_state *s = draft->state = calloc(1, sizeof *draft->state);
  if (s) s->plan_work = calloc(2 * rows, sizeof *s->plan_work);
  if (!s || !s->plan_work) return us_err_memory(err, "drafter's training state", sizeof *s);
  enum us_status status = us_draft_roles_find(&draft->shape, draft->params->host, &s->roles, err);
  if (status == US_OK) status = us_cuda_staging_create(draft->cuda, staging_bytes(draft), &s->staging, err);
  if (status == US_OK) status = us_cuda_take(draft->cuda, bytes, "drafter's activations", &s->memory, err);
  if (status != US_OK) return status;
  struct us_arena t = {.base = s->memory};
  take_all(&t, draft, s);
  return us_cuda_heads_fill(draft->cuda,
                            &(struct us_cuda_heads){.shape = &draft->shape.attention,
                                                    .chunks = 1,
                                                    .positions = draft->capacity + draft->shape.block,
                                                    .q_offset = s->q_offset,
                                                    .k_offset = s->k_offset,
                                                    .v_offset = s->v_offset,
                                                    .qk_offset = s->qk_offset,
                                                    .table = s->table},
                            err);
}

/* What the kernels ask for beyond us_draft_shape_check. */
static enum us_status check_shape(const struct us_draft_shape *shape, size_t rows, struct us_err *err) {
  enum us_status status = us_cuda_limits_rows(rows, us_cuda_limits_draft_widest(shape), err);
  if (status == US_OK) status = us_cuda_limits_widths(shape->hidden, shape->vocab, err);
  if (status == US_OK) status = us_cuda_limits_heads(&shape->attention, err);
  return status == US_OK ? US_OK : us_err_prefix(err, "drafter");
}

enum us_status us_cuda_draft_create(struct us_cuda *cuda, const struct us_draft_shape *shape,
                                    struct us_cuda_params *params, const uint16_t *embed, size_t capacity,
                                    size_t blocks, struct us_cuda_draft **ret_draft, struct us_err *err) {
  *ret_draft = NULL;
  if (!capacity || !blocks || capacity > UINT32_MAX / 64 || blocks > UINT32_MAX / 1024)
    return us_err_set(err, US_ERR_USAGE, "%zu context rows and %zu blocks a pass", capacity, blocks);
  enum us_status status = check_shape(shape, capacity + blocks * shape->block, err);
  if (status != US_OK) return status;
  struct us_cuda_draft *draft = calloc(1, sizeof *draft);
  if (!draft) return us_err_memory(err, "drafter's training state", sizeof *draft);
  *draft = (struct us_cuda_draft){.cuda = cuda,
                                  .shape = *shape,
                                  .params = params,
                                  .embed = embed,
                                  .capacity = capacity,
                                  .blocks_capacity = blocks};
  status = build(draft, err);
  if (status != US_OK) {
    us_cuda_draft_free(draft);
    return status;
  }
  *ret_draft = draft;
  return US_OK;
}

void us_cuda_draft_free(struct us_cuda_draft *draft) {
  if (!draft) return;
  us_cuda_use(draft->cuda);
  (void)cudaStreamSynchronize(draft->cuda->stream); /* what is queued reads what is freed here */
  if (draft->state) {
    us_cuda_staging_free(&draft->state->staging);
    us_cuda_give(draft->state->memory);
    free(draft->state->plan_work);
  }
  free(draft->state);
  free(draft);
}

/* --- passes --- */

static enum us_status check_pass(const struct us_cuda_draft *draft, size_t R, const uint32_t *position,
                                 const struct us_draft_blocks *blocks, struct us_err *err) {
  if (R > draft->capacity || blocks->n > draft->blocks_capacity || blocks->B != draft->shape.block)
    return us_err_set(err, US_ERR_USAGE,
                      "%zu context rows and %zu blocks of %u; at most %zu and %zu of %u fit", R, blocks->n,
                      blocks->B, draft->capacity, draft->blocks_capacity, draft->shape.block);
  for (size_t r = 0; r < R; r++)
    if (position[r] >= draft->capacity)
      return us_err_set(err, US_ERR_USAGE, "row %zu: position %u out of range", r, position[r]);
  return US_OK;
}

/* The mask vector stands in every row but the anchors': those rows come first in the plan. */
static void put_mask_plan(struct us_cuda_draft_state *s, const struct us_draft_blocks *blocks, size_t rows) {
  uint32_t *row = us_cuda_staging_put(&s->staging, s->mask_row, rows * sizeof *row);
  struct us_embed_train_piece *piece = us_cuda_staging_put(&s->staging, s->mask_piece, rows * sizeof *piece);
  size_t pieces = us_embed_train_plan(blocks->token, rows, row, piece, s->plan_work), masks = 0;
  while (masks < pieces && piece[masks].token < 0) masks++;
  s->mask_pieces = masks;
  us_cuda_staging_shorten(&s->staging, masks * sizeof *piece);
}

enum us_status us_cuda_draft_accept(struct us_cuda_draft *draft, size_t R, const uint32_t *position,
                                    const struct us_draft_blocks *blocks, struct us_err *err) {
  struct us_cuda_draft_state *s = draft->state;
  enum us_status status = check_pass(draft, R, position, blocks, err);
  if (status == US_OK) status = us_cuda_staging_begin(&s->staging, err);
  if (status != US_OK) return status;
  draft->R = R;
  draft->blocks = blocks->n;
  size_t rows = us_cuda_draft_rows(draft), bytes = rows * sizeof(uint32_t);
  uint32_t *all = us_cuda_staging_put(&s->staging, s->position, (R + rows) * sizeof *all);
  memcpy(all, position, R * sizeof *all);
  memcpy(all + R, blocks->position, bytes);
  memcpy(us_cuda_staging_put(&s->staging, s->token, bytes), blocks->token, bytes);
  for (int i = 0; i < 4; i++)
    memcpy(us_cuda_staging_put(&s->staging, s->range[i], bytes), blocks->range[i], bytes);
  uint32_t *previous = draft->shape.markov ? us_cuda_staging_put(&s->staging, s->previous, bytes) : NULL;
  for (size_t r = 0; previous && r < rows; r++)
    previous[r] = (uint32_t)us_draft_blocks_previous(blocks, r / blocks->B, (uint32_t)(r % blocks->B));
  put_mask_plan(s, blocks, rows);
  us_cuda_staging_send(&s->staging);
  return US_OK;
}
