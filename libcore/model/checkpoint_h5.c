/* checkpoint_h5.c: models and drafters as one HDF5 artefact: the tensors under their published names.
 *
 * Datasets are those of the folder layout; small vectors are FP32. The text "header" holds the config.json and, for people
 * and for checks, the precision of each family, the scale rule and a drafter's conventions.
 * Contents: the store, headers, models, drafters, writing.
 */
#include "base/h5.h"
#include "base/json.h"
#include "model/checkpoint_impl.h"
#include "model/config.h"
#include "model/owner.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODEL_KIND     "model"
#define DRAFT_KIND     "draft"
#define TOKENIZER_NAME "tokenizer.json"

/* A drafter trained by other conventions would load and never be right (dflash: 0.27 % accepted instead of 51 %). */
#define LABELS  "unshifted: block slot j predicts the token at anchor + j"
#define CONTEXT "target features of positions strictly before the anchor"
#define TAPS    "residual stream after the layer, before the final norm"

/* --- the store --- */

static bool to_dtype(enum us_h5_type type, enum us_dtype *ret_dtype) {
  switch (type) {
  case US_H5_U8:
    *ret_dtype = US_DTYPE_U8;
    return true;
  case US_H5_F32:
    *ret_dtype = US_DTYPE_F32;
    return true;
  case US_H5_BF16:
    *ret_dtype = US_DTYPE_BF16;
    return true;
  case US_H5_FP8:
    *ret_dtype = US_DTYPE_F8_E4M3;
    return true;
  case US_H5_I32:
    *ret_dtype = US_DTYPE_I32;
    return true;
  case US_H5_U32:
    *ret_dtype = US_DTYPE_U32;
    return true;
  case US_H5_F64:
    *ret_dtype = US_DTYPE_F64;
    return true;
  default:
    *ret_dtype = US_DTYPE_I64;
    return true;
  }
}

static bool find(void *arg, const char *name, struct us_stored *ret_stored) {
  const struct us_h5_dataset *d = us_h5_find(arg, name);
  if (!d) return false;
  *ret_stored =
      (struct us_stored){.id = d, .file = us_h5_path(arg), .ndim = (uint32_t)d->rank, .data = d->data};
  for (int i = 0; i < d->rank; i++) ret_stored->dims[i] = d->dims[i];
  return to_dtype(d->type, &ret_stored->dtype);
}

static size_t count_all(void *arg) {
  size_t count = 0;
  us_h5_datasets(arg, &count);
  return count;
}

static const char *name_at(void *arg, size_t i, const void **ret_id) {
  size_t count = 0;
  const struct us_h5_dataset *d = us_h5_datasets(arg, &count) + i;
  *ret_id = d;
  return d->name;
}

static void close_h5(void *thing) {
  us_h5_close(thing);
}

/* --- headers --- */

/* The parsed "header" text, to be released by the caller, and the config inside it. */
static enum us_status read_header(const struct us_h5 *file, json_t **ret_header, const json_t **ret_config,
                                  struct us_err *err) {
  char name[1100];
  const char *text = us_h5_text(file, "header");
  if (!text) return us_err_set(err, US_ERR_INPUT, "%s: header: missing", us_h5_path(file));
  snprintf(name, sizeof name, "%.1000s: header", us_h5_path(file));
  enum us_status status = us_config_parse(text, strlen(text), name, ret_header, err);
  if (status != US_OK) return status;
  *ret_config = json_object_get(*ret_header, "config");
  return json_is_object(*ret_config) ? US_OK : us_err_set(err, US_ERR_INPUT, "%s: config: missing", name);
}

static enum us_status copy_text(const char *text, size_t bytes, char **ret_copy, struct us_err *err) {
  *ret_copy = malloc(bytes + 1);
  if (!*ret_copy) return us_err_memory(err, "text", bytes + 1);
  memcpy(*ret_copy, text, bytes);
  (*ret_copy)[bytes] = 0;
  return US_OK;
}

static enum us_status read_provenance(const struct us_h5 *file, char **ret_json, struct us_err *err) {
  const char *text = us_h5_text(file, "provenance");
  return text ? copy_text(text, strlen(text), ret_json, err) : US_OK;
}

/* --- models --- */

static json_t *precision_json(const struct us_precision *p) {
  return json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:s}", "embed", us_format_name(p->embed), "head",
                   us_format_name(p->head), "qkv", us_format_name(p->qkv), "o_proj",
                   us_format_name(p->o_proj), "dense", us_format_name(p->dense), "experts",
                   us_format_name(p->experts), "router", us_format_name(p->router));
}

/* What the header says of each family against what the tensors are. */
static enum us_status check_precision(const struct us_h5 *file, const json_t *header,
                                      const struct us_model *model, struct us_err *err) {
  json_t *is = precision_json(&model->shape.precision);
  const json_t *said = json_object_get(header, "precision");
  const char *family;
  json_t *format;
  enum us_status status = is ? US_OK : us_err_memory(err, "header", 0);
  json_object_foreach(is, family, format) {
    const char *text = json_string_value(json_object_get(said, family));
    if (status == US_OK && (!text || strcmp(text, json_string_value(format)) != 0)) {
      status = us_err_set(err, US_ERR_INPUT, "%s: header: precision.%s: says %.32s, but the tensors are %s",
                          us_h5_path(file), family, text ? text : "nothing", json_string_value(format));
    }
  }
  json_decref(is);
  return status;
}

static enum us_status read_tokenizer(const struct us_h5 *file, struct us_store *store, struct us_model *model,
                                     struct us_err *err) {
  const struct us_h5_dataset *d = us_h5_find(file, TOKENIZER_NAME);
  if (!d) return US_OK;
  enum us_status status = us_h5_get(file, TOKENIZER_NAME, US_H5_U8, 1, NULL, &d, err);
  if (status == US_OK) status = us_bind_mark(store, d, err);
  if (status != US_OK) return status;
  if (d->bytes > US_MAX_TOKENIZER_BYTES || (d->bytes && memchr(d->data, 0, d->bytes))) {
    return us_err_set(err, US_ERR_INPUT, "%s: " TOKENIZER_NAME ": too long, or contains a NUL byte",
                      us_h5_path(file));
  }
  model->tokenizer_bytes = d->bytes;
  return copy_text(d->data, d->bytes, &model->tokenizer_json, err);
}

static enum us_status open_model(struct us_h5 *file, const char *path, struct us_model **ret_model,
                                 struct us_err *err) {
  struct us_shape shape;
  struct us_store store = {.arg = file, .path = path, .find = find, .count = count_all, .name_at = name_at};
  struct us_model *model = NULL;
  json_t *header = NULL;
  const json_t *config = NULL;
  enum us_status status = read_header(file, &header, &config, err);
  if (status == US_OK) status = us_shape_read(config, path, &shape, err);
  if (status == US_OK) status = us_model_create(&shape, &model, err);
  if (status == US_OK) status = read_tokenizer(file, &store, model, err);
  if (status == US_OK) status = us_model_bind(model, &store, err);
  if (status == US_OK) status = check_precision(file, header, model, err);
  if (status == US_OK) status = read_provenance(file, &model->provenance_json, err);
  if (status == US_OK) {
    us_model_config_scale_rule(model, config);
    *ret_model = model;
    model = NULL;
  }
  us_model_free(model);
  us_store_release(&store);
  json_decref(header);
  return status;
}

enum us_status us_model_open_h5(const char *path, struct us_model **ret_model, struct us_err *err) {
  struct us_h5 *file = NULL;
  enum us_status status = us_h5_open(path, MODEL_KIND, &file, err);
  if (status != US_OK) return status;
  status = open_model(file, path, ret_model, err);
  if (status != US_OK) {
    us_h5_close(file);
    return status;
  }
  status = us_owner_attach((*ret_model)->owner, file, close_h5, err);
  if (status != US_OK) {
    us_model_free(*ret_model);
    *ret_model = NULL;
  }
  return status;
}

/* --- drafters --- */

static json_t *conventions_json(const struct us_draft_shape *s) {
  json_t *taps = json_array();
  bool whole = true;
  for (uint32_t i = 0; i < s->taps; i++) us_json_append(taps, json_integer(s->tap_layer[i]), &whole);
  if (!whole) {
    json_decref(taps);
    return NULL;
  }
  return json_pack("{s:s, s:s, s:s, s:o, s:i, s:i, s:i}", "labels", LABELS, "context", CONTEXT, "taps", TAPS,
                   "tap_layers", taps, "mask_token_id", (int)s->mask_id, "target_layers",
                   (int)s->target_layers, "target_hidden_size", (int)s->hidden);
}

static enum us_status check_conventions(const struct us_h5 *file, const json_t *header,
                                        const struct us_draft_shape *s, struct us_err *err) {
  json_t *is = conventions_json(s);
  const json_t *said = json_object_get(header, "conventions");
  const char *key;
  json_t *value;
  enum us_status status = is ? US_OK : us_err_memory(err, "header", 0);
  json_object_foreach(is, key, value) {
    const json_t *other = json_object_get(said, key);
    if (status != US_OK || json_equal(value, other)) continue;
    char *have = us_json_text(other), *want = us_json_text(value);
    status = us_err_set(err, US_ERR_INPUT, "%s: header: conventions.%s: is %.100s, expected %.200s",
                        us_h5_path(file), key, have ? have : "missing", want ? want : "?");
    free(have);
    free(want);
  }
  json_decref(is);
  return status;
}

static enum us_status open_draft(struct us_h5 *file, const char *path, struct us_draft **ret_draft,
                                 struct us_err *err) {
  struct us_draft_shape shape;
  struct us_store store = {.arg = file, .path = path, .find = find, .count = count_all, .name_at = name_at};
  struct us_draft *draft = NULL;
  json_t *header = NULL;
  const json_t *config = NULL;
  enum us_status status = read_header(file, &header, &config, err);
  if (status == US_OK) status = us_draft_shape_read(config, path, &shape, err);
  if (status == US_OK) status = check_conventions(file, header, &shape, err);
  if (status == US_OK) status = us_draft_create(&shape, &draft, err);
  if (status == US_OK) status = us_draft_bind(draft, &store, true, err);
  if (status == US_OK) status = read_provenance(file, &draft->provenance_json, err);
  if (status == US_OK) {
    *ret_draft = draft;
    draft = NULL;
  }
  us_draft_free(draft);
  json_decref(header);
  return status;
}

enum us_status us_draft_open_h5(const char *path, struct us_draft **ret_draft, struct us_err *err) {
  struct us_h5 *file = NULL;
  enum us_status status = us_h5_open(path, DRAFT_KIND, &file, err);
  if (status != US_OK) return status;
  status = open_draft(file, path, ret_draft, err);
  if (status != US_OK) {
    us_h5_close(file);
    return status;
  }
  status = us_owner_attach((*ret_draft)->owner, file, close_h5, err);
  if (status != US_OK) {
    us_draft_free(*ret_draft);
    *ret_draft = NULL;
  }
  return status;
}

/* --- writing --- */

static enum us_status put(struct us_h5_writer *out, const struct us_tensor_ref *ref, struct us_err *err) {
  static const enum us_h5_type types[US_FORMAT_COUNT] = {US_H5_U8, US_H5_F32, US_H5_BF16, US_H5_FP8,
                                                         US_H5_U8};
  const struct us_matrix *w = ref->matrix;
  if (!w) return us_h5_put(out, ref->name, US_H5_F32, 1, &ref->rows, *ref->vector, err);
  char name[160];
  size_t dims[] = {w->rows, w->format == US_FORMAT_MXFP4 ? w->cols / 2 : w->cols};
  enum us_status status = us_h5_put(out, ref->name, types[w->format], 2, dims, w->data, err);
  if (status != US_OK || !us_scale_name(ref, w->format, name, sizeof name)) return status;
  size_t fp8_dims[] = {us_matrix_scale_rows(w), (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK};
  size_t fp4_dims[] = {w->rows, w->cols / US_MXFP4_GROUP};
  bool fp8 = w->format == US_FORMAT_FP8;
  return us_h5_put(out, name, fp8 ? US_H5_F32 : US_H5_U8, 2, fp8 ? fp8_dims : fp4_dims, w->scales, err);
}

/* Write it all; steals header. */
static enum us_status write_h5(const char *path, const char *kind, const struct us_tensor_ref *refs,
                               size_t count, json_t *header, const char *opt_tokenizer,
                               size_t tokenizer_bytes, const char *opt_provenance, struct us_err *err) {
  struct us_h5_writer *out = NULL;
  char *text = NULL;
  enum us_status status = us_config_print(header, &text, err);
  if (status == US_OK) status = us_refs_check_data(refs, count, err);
  if (status == US_OK) status = us_h5_create(path, kind, &out, err);
  if (status == US_OK) status = us_h5_put_text(out, "header", text, err);
  if (status == US_OK && opt_provenance) status = us_h5_put_text(out, "provenance", opt_provenance, err);
  if (status == US_OK && opt_tokenizer) {
    status = us_h5_put(out, TOKENIZER_NAME, US_H5_U8, 1, &tokenizer_bytes, opt_tokenizer, err);
  }
  for (size_t i = 0; status == US_OK && i < count; i++) status = put(out, &refs[i], err);
  free(text);
  if (status == US_OK) return us_h5_finish(out, err);
  us_h5_abandon(out);
  return status;
}

enum us_status us_model_write_h5(const char *path, struct us_model *model, const char *opt_provenance,
                                 struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  json_t *config = NULL;
  size_t count = 0;
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  if (status == US_OK) status = us_model_config_json(model, &config, err);
  if (status == US_OK) {
    json_t *header = json_pack("{s:o, s:o, s:s}", "config", config, "precision",
                               precision_json(&model->shape.precision), "scale_rule", model->scale_rule);
    status = write_h5(path, MODEL_KIND, refs, count, header, model->tokenizer_json, model->tokenizer_bytes,
                      opt_provenance, err);
  }
  free(refs);
  return status;
}

enum us_status us_draft_write_h5(const char *path, struct us_draft *draft, const char *opt_provenance,
                                 struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  json_t *config = NULL;
  size_t count = 0;
  enum us_status status = us_draft_tensors(draft, &refs, &count, err);
  if (status == US_OK) status = us_draft_shape_json(&draft->shape, &config, err);
  if (status == US_OK) {
    json_t *header =
        json_pack("{s:o, s:o}", "config", config, "conventions", conventions_json(&draft->shape));
    status = write_h5(path, DRAFT_KIND, refs, count, header, NULL, 0, opt_provenance, err);
  }
  free(refs);
  return status;
}
