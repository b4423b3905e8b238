/* prefill.c: prompts in packed passes. */
#include "training/cuda/prefill.h"

#include "kernels/attention_seq/attention_decode.h"
#include "training/cuda/model_state.h"

#include <stdlib.h>

static size_t aligned(size_t rows) {
  return (rows + US_CUDA_PREFILL_ALIGN - 1) / US_CUDA_PREFILL_ALIGN * US_CUDA_PREFILL_ALIGN;
}

enum us_status us_cuda_prefill_open(struct us_cuda_prefill *p, const struct us_shape *shape,
                                    struct us_cuda_params *params, uint32_t longest, struct us_err *err) {
  size_t R = longest > US_CUDA_PREFILL_ROWS ? aligned(longest) : US_CUDA_PREFILL_ROWS, words = 2 * R;
  uint32_t slots = p->slots->slots;
  p->capacity = R, p->used = 0;
  p->row_slot = malloc(R * sizeof *p->row_slot);
  p->row_end = malloc(R * sizeof *p->row_end);
  p->read = malloc(slots * sizeof *p->read);
  if (!p->row_slot || !p->row_end || !p->read) return us_err_memory(err, "prompts", words * sizeof *p->read);
  for (uint32_t s = 0; s < slots; s++) p->read[s] = -1;
  enum us_status status = us_rows_init(&p->rows, R, err);
  if (status == US_OK)
    status = us_cuda_model_create(p->cuda, shape, params, R, US_TRAIN_FORWARD, &p->model, err);
  if (status == US_OK) status = us_cuda_staging_create(p->cuda, words * 4 + 256, &p->staging, err);
  if (status == US_OK) status = us_cuda_take(p->cuda, words * 4, "rows of prompts", &p->memory, err);
  if (status != US_OK) return status;
  p->device_slot = p->memory;
  p->device_end = (uint32_t *)p->memory + R;
  return US_OK;
}

void us_cuda_prefill_close(struct us_cuda_prefill *p) {
  us_cuda_model_free(p->model);
  us_cuda_staging_free(&p->staging);
  us_cuda_give(p->memory);
  us_rows_release(&p->rows);
  free(p->row_slot);
  free(p->row_end);
  free(p->read);
}

/* --- a pass --- */

static void keep(struct us_cuda_prefill *p, uint32_t l) {
  const struct us_cuda_model_state *s = p->model->state;
  const struct us_cuda_attention_roles *a = &s->attention[p->model->shape.swa_layer[l]];
  struct us_attention_keep k = {.rows = (uint32_t)p->capacity,
                                .kv_heads = a->shape->kv_heads,
                                .qk_dim = a->shape->qk_dim,
                                .v_dim = a->shape->v_dim,
                                .k = s->saved[l].qkv,
                                .v = s->saved[l].qkv,
                                .stride = a->width,
                                .k_offset = a->k_offset,
                                .v_offset = a->v_offset,
                                .slot = p->device_slot,
                                .position = s->position,
                                .end = p->device_end,
                                .k_cache = p->kept[l].k,
                                .v_cache = p->kept[l].v,
                                .capacity = p->kept[l].capacity};
  us_cuda_did(p->cuda, us_attention_keep(&k, p->cuda->stream), "keys and values of prompts");
}

static void add_row(struct us_cuda_prefill *p, int32_t token, uint32_t position, uint32_t document,
                    int32_t slot, uint32_t end) {
  size_t r = p->used++;
  p->rows.token[r] = token, p->rows.position[r] = position, p->rows.document[r] = document;
  p->row_slot[r] = slot, p->row_end[r] = end;
}

static enum us_status send_rows(struct us_cuda_prefill *p, struct us_err *err) {
  size_t bytes = p->capacity * 4;
  p->rows.R = p->capacity;
  struct us_batch batch = us_rows_batch(&p->rows);
  enum us_status status = us_cuda_model_accept(p->model, &batch, err);
  if (status == US_OK) status = us_cuda_staging_begin(&p->staging, err);
  if (status != US_OK) return status;
  memcpy(us_cuda_staging_put(&p->staging, p->device_slot, bytes), p->row_slot, bytes);
  memcpy(us_cuda_staging_put(&p->staging, p->device_end, bytes), p->row_end, bytes);
  us_cuda_staging_send(&p->staging);
  return US_OK;
}

/* The rows that are packed, and others up to the pass's number. Of the last layer keys and values are all that is wanted. */
static enum us_status queue_pass(struct us_cuda_prefill *p, struct us_err *err) {
  struct us_cuda_model *model = p->model;
  uint32_t L = model->shape.layers;
  if (!p->used) return US_OK;
  while (p->used < p->capacity) {
    uint32_t position = (uint32_t)(p->used % US_CUDA_PREFILL_ALIGN);
    add_row(p, 0, position, (uint32_t)p->used - position, -1, 0);
  }
  p->used = 0;
  enum us_status status = send_rows(p, err);
  if (status != US_OK) return status;
  us_cuda_model_plan(model);
  us_cuda_model_begin(model);
  for (uint32_t l = 0; l < L; l++) {
    if (l + 1 < L)
      us_cuda_model_layer(model, l, NULL, false);
    else
      us_cuda_model_project(model, l, NULL);
    keep(p, l);
  }
  us_cuda_did(p->cuda,
              us_slots_resume(p->slots, (uint32_t)p->capacity, p->device_slot, model->state->position,
                              p->cuda->stream),
              "sequences whose prompts are read");
  return us_cuda_failed(p->cuda, err);
}

/* --- prompts --- */

static enum us_status add_prompt(struct us_cuda_prefill *p, uint32_t slot, int32_t index,
                                 struct us_err *err) {
  const struct us_continuation *item = &p->items[index];
  uint32_t end = item->prompt_count - 1, all = (uint32_t)aligned(end);
  enum us_status status = p->used + all > p->capacity ? queue_pass(p, err) : US_OK;
  uint32_t first = (uint32_t)p->used;
  for (uint32_t k = 0; k < all; k++) /* those behind its end see it and are seen by none of it */
    add_row(p, k < end ? item->prompt[k] : 0, k, first, k < end ? (int32_t)slot : -1, end);
  p->read[slot] = index;
  return status;
}

enum us_status us_cuda_prefill_queue(struct us_cuda_prefill *p, const int32_t *index, const int32_t *token,
                                     struct us_err *err) {
  enum us_status status = US_OK;
  for (uint32_t slot = 0; slot < p->slots->slots && status == US_OK; slot++)
    if (index[slot] >= 0 && token[slot] < 0 && p->read[slot] != index[slot])
      status = add_prompt(p, slot, index[slot], err);
  return status == US_OK ? queue_pass(p, err) : status;
}
