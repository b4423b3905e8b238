/* tile_buffers.c: the activations of a pass, in one arena that grows with the number of rows. */
#include "plan/tile_buffers.h"

#include "kernels/attention/attention.h"

#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64

/* Hands out aligned parts of an arena; with a NULL arena it only measures. */
struct carver {
  char *arena;
  size_t used;
};

static void *carve(struct carver *carver, size_t bytes) {
  void *part = carver->arena ? carver->arena + carver->used : NULL;
  carver->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return part;
}

static float *floats(struct carver *carver, size_t rows, size_t width) {
  return carve(carver, rows * width * sizeof(float));
}

static size_t most(size_t a, size_t b) {
  return a > b ? a : b;
}

/* Widths that hold for every layer of model and drafter. */
struct widths {
  size_t D, qkv, q, attended, rotary[2], experts, top_k, expert_inner, dense_inner, features, block_page;
};

static void widen_attention(struct widths *w, const struct us_attention_shape *a, int kind) {
  w->qkv = most(w->qkv, us_attention_qkv_rows(a));
  w->q = most(w->q, (size_t)a->q_heads * a->qk_dim);
  w->attended = most(w->attended, (size_t)a->q_heads * a->v_dim);
  w->rotary[kind] = most(w->rotary[kind], a->rotary_dim);
}

static struct widths widths_of(const struct us_model *model, const struct us_draft *draft) {
  const struct us_shape *s = &model->shape;
  struct widths w = {.D = s->hidden,
                     .experts = s->experts,
                     .top_k = s->top_k,
                     .expert_inner = s->expert_inner,
                     .dense_inner = s->dense_inner};
  widen_attention(&w, &s->full, 0);
  widen_attention(&w, &s->swa, 1);
  if (!draft) return w;
  const struct us_attention_shape *a = &draft->shape.attention;
  widen_attention(&w, a, 1);
  w.dense_inner = most(w.dense_inner, draft->shape.inner);
  w.features = (size_t)draft->shape.taps * draft->shape.hidden;
  struct us_attention_keys keys = {.type = US_KV_F32, .G = a->kv_heads, .Q = a->qk_dim, .V = a->v_dim};
  w.block_page = us_attention_page_bytes(&keys);
  return w;
}

static void lay_out(struct us_tile_buffers *b, const struct widths *w, size_t R, struct carver *carver) {
  b->residual = floats(carver, R, w->D);
  b->normed = floats(carver, R, w->D);
  b->normed_packed = floats(carver, R, us_linear_packed_width(w->D));
  b->qkv = floats(carver, R, w->qkv);
  b->q = floats(carver, R, w->q);
  b->attended = floats(carver, R, w->attended);
  b->attended_packed = floats(carver, R, us_linear_packed_width(w->attended));
  b->partial[0] = floats(carver, R, w->D);
  b->partial[1] = floats(carver, R, w->D);
  b->router = floats(carver, R, w->experts);
  b->ids = carve(carver, R * w->top_k * sizeof *b->ids);
  b->weights = floats(carver, R, w->top_k);
  b->groups.expert = carve(carver, w->experts * sizeof *b->groups.expert);
  b->groups.begin = carve(carver, (w->experts + 1) * sizeof *b->groups.begin);
  b->groups.row = carve(carver, R * w->top_k * sizeof *b->groups.row);
  b->groups.weight = floats(carver, R, w->top_k);
  b->inner_packed = floats(
      carver, R,
      most(w->top_k * us_linear_packed_width(w->expert_inner), us_linear_packed_width(w->dense_inner)));
  b->features_packed = floats(carver, R, us_linear_packed_width(w->features));
  b->context = floats(carver, R, w->features ? w->D : 0);
  b->rope[0] = floats(carver, R, w->rotary[0]);
  b->rope[1] = floats(carver, R, w->rotary[1]);
  b->block_page = carve(carver, w->block_page);
}

enum us_status us_tile_buffers_reserve(struct us_tile_buffers *b, const struct us_model *model,
                                       const struct us_draft *draft, size_t R, struct us_err *err) {
  if (R <= b->capacity) return US_OK;
  struct widths w = widths_of(model, draft);
  struct carver measure = {0};
  lay_out(b, &w, R, &measure);
  void *arena = aligned_alloc(ALIGNMENT, measure.used);
  if (!arena) {
    us_tile_buffers_release(b);
    return us_err_memory(err, "activations", measure.used);
  }
  memset(arena, 0, measure.used); /* packed rows end in padding that must be zero */
  free(b->arena);
  b->arena = arena;
  b->capacity = R;
  lay_out(b, &w, R, &(struct carver){.arena = arena});
  return US_OK;
}

enum us_status us_tile_buffers_reserve_scratch(struct us_tile_buffers *b, size_t floats_a_worker, int workers,
                                               struct us_err *err) {
  size_t padded = (floats_a_worker + 15) / 16 * 16;
  if (padded <= b->scratch_floats) return US_OK;
  float *scratch = aligned_alloc(ALIGNMENT, padded * (size_t)workers * sizeof *scratch);
  if (!scratch) return us_err_memory(err, "scratch", padded * (size_t)workers * sizeof *scratch);
  free(b->scratch);
  b->scratch = scratch;
  b->scratch_floats = padded;
  return US_OK;
}

void us_tile_buffers_release(struct us_tile_buffers *b) {
  free(b->arena);
  free(b->scratch);
  *b = (struct us_tile_buffers){0};
}
