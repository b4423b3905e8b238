/* count.c: parameters and bytes by module family. */
#include "model/count.h"

#include <stdlib.h>
#include <string.h>

static const char *const names[US_FAMILY_COUNT] = {"embed",  "qkv",  "o_proj", "dense", "experts",
                                                   "router", "norm", "head",   "draft", "draft.head"};

const char *us_family_name(enum us_family family) {
  return (unsigned)family < US_FAMILY_COUNT ? names[family] : "?";
}

static enum us_family family_of(const struct us_tensor_ref *ref) {
  for (int f = 0; f < US_FAMILY_COUNT; f++) {
    if (strcmp(names[f], ref->family) == 0) return (enum us_family)f;
  }
  return US_FAMILY_NORM; /* sinks */
}

static void add(struct us_count_row *row, uint64_t tensors, uint64_t parameters, uint64_t bytes,
                uint64_t scales) {
  row->tensors += tensors;
  row->parameters += parameters;
  row->bytes += bytes + scales;
  row->scale_bytes += scales;
}

static void count_tensor(const struct us_shape *opt_shape, const struct us_tensor_ref *ref,
                         enum us_format format, struct us_count *count) {
  uint64_t parameters = (uint64_t)ref->rows * ref->cols;
  size_t chunk = opt_shape ? us_tensor_scale_chunk_rows(opt_shape, ref) : 0;
  uint64_t bytes = us_matrix_data_bytes(format, ref->rows, ref->cols);
  uint64_t scales = us_matrix_scale_bytes(format, ref->rows, ref->cols, chunk);
  enum us_family family = family_of(ref);
  add(&count->family[family], 1, parameters, bytes, scales);
  add(&count->total, 1, parameters, bytes, scales);
  if (family == US_FAMILY_EMBED && ref->matrix) {
    add(&count->active, 1, ref->cols, us_matrix_data_bytes(format, 1, ref->cols),
        us_matrix_scale_bytes(format, 1, ref->cols, 0));
  } else if (family != US_FAMILY_EXPERTS) {
    add(&count->active, 1, parameters, bytes, scales);
  }
}

/* Experts weigh top_k / experts of their family; all experts of a layer are alike unless a model mixes formats. */
static void add_active_experts(const struct us_shape *s, struct us_count *count) {
  const struct us_count_row *x = &count->family[US_FAMILY_EXPERTS];
  if (!s->experts) return;
  double share = (double)s->top_k / s->experts;
  uint64_t scales = (uint64_t)((double)x->scale_bytes * share + 0.5);
  uint64_t bytes = (uint64_t)((double)x->bytes * share + 0.5);
  add(&count->active, x->tensors * s->top_k / s->experts, x->parameters / s->experts * s->top_k,
      bytes - scales, scales);
}

static enum us_status count_model(struct us_model *model, bool by_shape, struct us_count *ret_count,
                                  struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t n = 0;
  memset(ret_count, 0, sizeof *ret_count);
  enum us_status status = us_model_tensors(model, &refs, &n, err);
  for (size_t i = 0; status == US_OK && i < n; i++) {
    enum us_format format = refs[i].matrix ? refs[i].matrix->format : US_FORMAT_F32;
    if (by_shape && refs[i].matrix) format = us_tensor_format(&model->shape.precision, &refs[i]);
    count_tensor(&model->shape, &refs[i], format, ret_count);
  }
  if (status == US_OK) add_active_experts(&model->shape, ret_count);
  free(refs);
  return status;
}

enum us_status us_model_count(const struct us_model *model, struct us_count *ret_count, struct us_err *err) {
  return count_model((struct us_model *)model, false, ret_count, err);
}

enum us_status us_shape_count(const struct us_shape *shape, struct us_count *ret_count, struct us_err *err) {
  struct us_model *model = NULL;
  enum us_status status = us_model_create(shape, &model, err);
  if (status == US_OK) status = count_model(model, true, ret_count, err);
  us_model_free(model);
  return status;
}

enum us_status us_draft_count(const struct us_draft *draft, struct us_count *ret_count, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t n = 0;
  memset(ret_count, 0, sizeof *ret_count);
  enum us_status status = us_draft_tensors((struct us_draft *)draft, &refs, &n, err);
  for (size_t i = 0; status == US_OK && i < n; i++) {
    count_tensor(NULL, &refs[i], refs[i].matrix ? refs[i].matrix->format : US_FORMAT_F32, ret_count);
  }
  free(refs);
  return status;
}
