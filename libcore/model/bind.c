/* bind.c: checking named tensors against the config and pointing a model at them. */
#include "model/bind.h"
#include "model/owner.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool us_scale_name(const struct us_tensor_ref *ref, enum us_format format, char *ret_name, size_t size) {
  if (format != US_FORMAT_FP8 && format != US_FORMAT_MXFP4) return false;
  snprintf(ret_name, size, "%s%s", ref->name, format == US_FORMAT_FP8 ? "_scale_inv" : "_scale");
  return true;
}

/* --- messages --- */

static void dims_text(uint32_t ndim, const uint64_t *dims, char *text, size_t size) {
  size_t used = (size_t)snprintf(text, size, "[");
  for (uint32_t i = 0; i < ndim && used < size; i++) {
    used += (size_t)snprintf(text + used, size - used, i ? ", %llu" : "%llu", (unsigned long long)dims[i]);
  }
  if (used < size) snprintf(text + used, size - used, "]");
}

static enum us_status expect_dims(const struct us_stored *t, const char *name, uint32_t ndim,
                                  const uint64_t *dims, struct us_err *err) {
  if (t->ndim == ndim && memcmp(t->dims, dims, ndim * sizeof *dims) == 0) return US_OK;
  char have[128], want[128];
  dims_text(t->ndim, t->dims, have, sizeof have);
  dims_text(ndim, dims, want, sizeof want);
  return us_err_set(err, US_ERR_INPUT, "%s: %s: shape is %s, expected %s", t->file, name, have, want);
}

static enum us_status bad_dtype(const struct us_stored *t, const char *name, const char *expected,
                                struct us_err *err) {
  return us_err_set(err, US_ERR_INPUT, "%s: %s: dtype is %s, expected %s", t->file, name,
                    us_dtype_name(t->dtype), expected);
}

static enum us_status find(struct us_store *store, const char *name, struct us_stored *t,
                           struct us_err *err) {
  if (!store->find(store->arg, name, t)) {
    return us_err_set(err, US_ERR_INPUT, "%s: %s: missing", store->path, name);
  }
  return us_bind_mark(store, t->id, err);
}

/* Data that kernels may load by elements: as it lies in the file, or a copy if a writer did not align it. */
static enum us_status aligned(const struct us_stored *t, size_t bytes, size_t alignment, void *owner,
                              const void **ret_data, struct us_err *err) {
  *ret_data = t->data;
  if ((uintptr_t)t->data % alignment == 0) return US_OK;
  void *copy = NULL;
  enum us_status status = us_owner_alloc(owner, bytes, &copy, err);
  if (status != US_OK) return status;
  memcpy(copy, t->data, bytes);
  *ret_data = copy;
  return US_OK;
}

/* --- vectors --- */

static enum us_status bind_vector(struct us_store *store, const struct us_tensor_ref *ref,
                                  struct us_err *err) {
  struct us_stored t;
  enum us_status status = find(store, ref->name, &t, err);
  if (status != US_OK) return status;
  if (t.dtype != US_DTYPE_F32 && t.dtype != US_DTYPE_BF16)
    return bad_dtype(&t, ref->name, "F32 or BF16", err);
  status = expect_dims(&t, ref->name, 1, (uint64_t[]){ref->rows}, err);
  if (status != US_OK) return status;
  float *v = *ref->vector;
  if (t.dtype == US_DTYPE_F32) {
    memcpy(v, t.data, ref->rows * sizeof *v);
  } else {
    const unsigned char *bytes = t.data;
    for (size_t i = 0; i < ref->rows; i++)
      v[i] = us_bf16_to_f32((uint16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8));
  }
  for (size_t i = 0; i < ref->rows; i++) {
    if (!isfinite(v[i])) {
      return us_err_set(err, US_ERR_INPUT, "%s: %s: value %zu is %s", t.file, ref->name, i,
                        isnan(v[i]) ? "NaN" : "Inf");
    }
  }
  return US_OK;
}

/* --- matrices --- */

static enum us_status format_of(const struct us_stored *t, const struct us_tensor_ref *ref,
                                enum us_format *ret_format, struct us_err *err) {
  bool router = strcmp(ref->family, "router") == 0;
  switch (t->dtype) {
  case US_DTYPE_F32:
    *ret_format = US_FORMAT_F32;
    return US_OK;
  case US_DTYPE_BF16:
    *ret_format = US_FORMAT_BF16;
    return US_OK;
  case US_DTYPE_F8_E4M3:
    *ret_format = US_FORMAT_FP8;
    break;
  case US_DTYPE_U8:
    *ret_format = US_FORMAT_MXFP4;
    break;
  default:
    return bad_dtype(t, ref->name, router ? "F32 or BF16" : "F32, BF16, F8_E4M3 or U8 (MXFP4)", err);
  }
  if (router) return bad_dtype(t, ref->name, "F32 or BF16", err);
  if (*ret_format == US_FORMAT_MXFP4 && ref->cols % US_MXFP4_GROUP) {
    return us_err_set(err, US_ERR_INPUT, "%s: %s: MXFP4 with %zu columns, not a multiple of 32", t->file,
                      ref->name, ref->cols);
  }
  return US_OK;
}

/* FP8 scales: F32 as they are, E8M0 expanded to what it means. */
static enum us_status bind_fp8_scales(const struct us_stored *t, const char *name, size_t count, void *owner,
                                      const void **ret_scales, struct us_err *err) {
  if (t->dtype == US_DTYPE_F32)
    return aligned(t, count * sizeof(float), sizeof(float), owner, ret_scales, err);
  if (t->dtype != US_DTYPE_F8_E8M0) return bad_dtype(t, name, "F32 or F8_E8M0", err);
  void *memory = NULL;
  enum us_status status = us_owner_alloc(owner, count * sizeof(float), &memory, err);
  if (status != US_OK) return status;
  const uint8_t *bytes = t->data;
  float *scales = memory;
  for (size_t i = 0; i < count; i++) scales[i] = us_e8m0_to_f32(bytes[i]);
  *ret_scales = scales;
  return US_OK;
}

static enum us_status bind_scales(struct us_store *store, const struct us_tensor_ref *ref,
                                  struct us_matrix *w, void *owner, struct us_err *err) {
  char name[160];
  struct us_stored t;
  if (!us_scale_name(ref, w->format, name, sizeof name)) return US_OK;
  enum us_status status = find(store, name, &t, err);
  if (status != US_OK) return status;
  if (w->format == US_FORMAT_FP8) {
    uint64_t dims[] = {us_matrix_scale_rows(w), (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK};
    status = expect_dims(&t, name, 2, dims, err);
    return status == US_OK ? bind_fp8_scales(&t, name, dims[0] * dims[1], owner, &w->scales, err) : status;
  }
  if (t.dtype != US_DTYPE_U8 && t.dtype != US_DTYPE_F8_E8M0) return bad_dtype(&t, name, "U8 or F8_E8M0", err);
  w->scales = t.data;
  return expect_dims(&t, name, 2, (uint64_t[]){w->rows, w->cols / US_MXFP4_GROUP}, err);
}

static enum us_status bind_matrix(struct us_store *store, const struct us_tensor_ref *ref, size_t chunk_rows,
                                  void *owner, struct us_err *err) {
  static const size_t alignment[US_FORMAT_COUNT] = {1, sizeof(float), sizeof(uint16_t), 1, 1};
  struct us_stored t;
  struct us_matrix w = {.rows = ref->rows, .cols = ref->cols};
  enum us_status status = find(store, ref->name, &t, err);
  if (status == US_OK) status = format_of(&t, ref, &w.format, err);
  if (status != US_OK) return status;
  uint64_t dims[] = {w.rows, w.format == US_FORMAT_MXFP4 ? w.cols / 2 : w.cols};
  status = expect_dims(&t, ref->name, 2, dims, err);
  if (status != US_OK) return status;
  size_t bytes = us_matrix_data_bytes(w.format, w.rows, w.cols);
  status = aligned(&t, bytes, alignment[w.format], owner, &w.data, err);
  if (w.format == US_FORMAT_FP8) w.scale_chunk_rows = chunk_rows;
  if (status == US_OK) status = bind_scales(store, ref, &w, owner, err);
  if (status == US_OK) *ref->matrix = w;
  return status;
}

enum us_status us_bind(struct us_store *store, const struct us_tensor_ref *refs, size_t count,
                       const struct us_shape *opt_shape, void *owner, struct us_err *err) {
  enum us_status status = US_OK;
  for (size_t i = 0; status == US_OK && i < count; i++) {
    size_t chunk_rows = opt_shape ? us_tensor_scale_chunk_rows(opt_shape, &refs[i]) : 0;
    status = refs[i].matrix ? bind_matrix(store, &refs[i], chunk_rows, owner, err)
                            : bind_vector(store, &refs[i], err);
  }
  return status;
}

/* --- leftovers --- */

enum us_status us_bind_mark(struct us_store *store, const void *id, struct us_err *err) {
  if (store->used_count == store->used_size) {
    size_t size = store->used_size ? 2 * store->used_size : 256;
    const void **larger = realloc(store->used, size * sizeof *larger);
    if (!larger) return us_err_memory(err, "tensor index", size * sizeof *larger);
    store->used = larger;
    store->used_size = size;
  }
  store->used[store->used_count++] = id;
  return US_OK;
}

static int compare_ids(const void *a, const void *b) {
  uintptr_t x = (uintptr_t) * (const void *const *)a, y = (uintptr_t) * (const void *const *)b;
  return (x > y) - (x < y);
}

static bool starts(const char *text, const char *prefix) {
  return strncmp(text, prefix, strlen(prefix)) == 0;
}

static bool belongs(const char *name) {
  static const char *const prefixes[] = {
      "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.", "layers.", "fc.",
      "norm.",         "hidden_norm."};
  for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
    if (starts(name, prefixes[i])) return true;
  }
  return false;
}

enum us_status us_bind_leftovers(struct us_store *store, struct us_buffer *notes, struct us_err *err) {
  size_t mtp = 0, other = 0, count = store->count(store->arg);
  const char *example = NULL;
  if (store->used_count) qsort(store->used, store->used_count, sizeof *store->used, compare_ids);
  for (size_t i = 0; i < count; i++) {
    const void *id = NULL;
    const char *name = store->name_at(store->arg, i, &id);
    if (bsearch(&id, store->used, store->used_count, sizeof *store->used, compare_ids)) continue;
    if (belongs(name)) {
      return us_err_set(err, US_ERR_INPUT, "%s: %s: the config has no such tensor", store->path, name);
    }
    if (starts(name, "model.mtp."))
      mtp++;
    else if (!other++)
      example = name;
  }
  char line[512];
  enum us_status status = US_OK;
  if (mtp) {
    snprintf(line, sizeof line, "skipped %zu MTP tensors (model.mtp.*): DFlash drafting replaces them\n",
             mtp);
    status = us_buffer_add(notes, line, err);
  }
  if (other && status == US_OK) {
    snprintf(line, sizeof line, "skipped %zu tensors that are not part of the text model (%.200s, ...)\n",
             other, example);
    status = us_buffer_add(notes, line, err);
  }
  return status;
}

void us_store_release(struct us_store *store) {
  free(store->used);
  store->used = NULL;
  store->used_count = store->used_size = 0;
}
