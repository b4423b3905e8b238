/* random.c: models and drafters with random weights. */
#include "model/random.h"
#include "model/precision.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void range_of(const struct us_tensor_ref *ref, float *ret_middle, float *ret_half) {
  *ret_middle = 0;
  if (ref->matrix)
    *ret_half = sqrtf(3.0f / (strcmp(ref->family, "embed") == 0 ? 1.0f : (float)ref->cols));
  else if (strcmp(ref->family, "norm") == 0)
    *ret_middle = 1, *ret_half = 0.1f;
  else if (strcmp(ref->family, "router") == 0)
    *ret_half = 0.01f;
  else
    *ret_half = 1;
}

struct stream {
  struct us_init init;
  size_t cols;
};

struct us_init us_random_init(uint64_t seed, const struct us_tensor_ref *ref) {
  struct us_init init = {.key = us_philox_key(seed), .name = us_init_name(ref->name)};
  range_of(ref, &init.middle, &init.half);
  return init;
}

static struct stream stream_of(uint64_t seed, const struct us_tensor_ref *ref) {
  return (struct stream){.init = us_random_init(seed, ref), .cols = ref->cols};
}

static void stream_row(void *arg, size_t row, float *out) {
  const struct stream *s = arg;
  for (size_t c = 0; c < s->cols; c += 4) {
    float quad[4];
    us_init_quad(&s->init, (uint32_t)row, (uint32_t)(c / 4), quad);
    for (size_t i = 0; i < 4 && c + i < s->cols; i++) out[c + i] = quad[i];
  }
}

void us_random_row(uint64_t seed, const struct us_tensor_ref *ref, size_t row, float *ret_values) {
  struct stream s = stream_of(seed, ref);
  stream_row(&s, row, ret_values);
}

enum us_status us_random_tensor(const struct us_tensor_ref *ref, enum us_format format, size_t chunk,
                                uint64_t seed, void *owner, struct us_pool *pool, struct us_err *err) {
  struct stream s = stream_of(seed, ref);
  if (!ref->matrix) {
    for (size_t row = 0; row < ref->rows; row++) stream_row(&s, row, *ref->vector + row);
    return US_OK;
  }
  struct us_matrix_encoding encoding = {.format = format,
                                        .scale_chunk_rows = format == US_FORMAT_FP8 ? chunk : 0};
  enum us_status status =
      us_matrix_build(owner, ref->rows, ref->cols, &encoding, stream_row, &s, pool, ref->matrix, err);
  if (status != US_OK) us_err_prefix(err, "%s", ref->name);
  return status;
}

enum us_status us_model_random(const struct us_shape *shape, uint64_t seed, struct us_pool *pool,
                               struct us_model **ret_model, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  struct us_model *model = NULL;
  size_t count = 0;
  *ret_model = NULL;
  enum us_status status = us_model_create(shape, &model, err);
  if (status == US_OK) status = us_model_tensors(model, &refs, &count, err);
  for (size_t i = 0; status == US_OK && i < count; i++) {
    status = us_random_tensor(&refs[i], us_tensor_format(&shape->precision, &refs[i]),
                              us_tensor_scale_chunk_rows(shape, &refs[i]), seed, model->owner, pool, err);
  }
  free(refs);
  if (status != US_OK) {
    us_model_free(model);
    return status;
  }
  if (shape->precision.experts == US_FORMAT_MXFP4)
    strcpy(model->scale_rule, us_scale_rule_name(US_SCALE_MSE));
  *ret_model = model;
  return US_OK;
}

enum us_status us_draft_random(const struct us_draft_shape *shape, enum us_format format, uint64_t seed,
                               struct us_pool *pool, struct us_draft **ret_draft, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  struct us_draft *draft = NULL;
  size_t count = 0;
  *ret_draft = NULL;
  enum us_status status = us_draft_create(shape, &draft, err);
  if (status == US_OK) status = us_draft_tensors(draft, &refs, &count, err);
  for (size_t i = 0; status == US_OK && i < count; i++) {
    bool head = refs[i].matrix == &draft->head;
    status = us_random_tensor(&refs[i], head ? shape->head : format, 0, seed, draft->owner, pool, err);
  }
  free(refs);
  if (status != US_OK) {
    us_draft_free(draft);
    return status;
  }
  /* What a folder can hold of it: the side file is BF16. */
  us_bf16_round_all(draft->mask_embedding, shape->hidden, draft->mask_embedding);
  *ret_draft = draft;
  return US_OK;
}
