/* checkpoint.c: opening and writing by path, and what the two file formats have in common. */
#include "model/checkpoint.h"
#include "base/atomic.h"
#include "model/checkpoint_impl.h"
#include "model/config.h"
#include "model/precision.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* --- by path --- */

static enum us_status is_folder(const char *path, bool *ret_folder, struct us_err *err) {
  struct stat st;
  if (stat(path, &st) != 0) return us_err_errno(err, US_ERR_IO, "cannot open '%s'", path);
  *ret_folder = S_ISDIR(st.st_mode);
  return US_OK;
}

static bool ends_in_h5(const char *path) {
  size_t n = strlen(path);
  return n > 3 && strcmp(path + n - 3, ".h5") == 0;
}

enum us_status us_model_open(const char *path, struct us_model **ret_model, struct us_err *err) {
  bool folder = false;
  *ret_model = NULL;
  enum us_status status = is_folder(path, &folder, err);
  if (status != US_OK) return status;
  status = folder ? us_model_open_folder(path, ret_model, err) : us_model_open_h5(path, ret_model, err);
  if (status == US_OK) snprintf((*ret_model)->path, sizeof(*ret_model)->path, "%s", path);
  return status;
}

enum us_status us_draft_open(const char *path, struct us_draft **ret_draft, struct us_err *err) {
  bool folder = false;
  *ret_draft = NULL;
  enum us_status status = is_folder(path, &folder, err);
  if (status != US_OK) return status;
  status = folder ? us_draft_open_folder(path, ret_draft, err) : us_draft_open_h5(path, ret_draft, err);
  if (status == US_OK) snprintf((*ret_draft)->path, sizeof(*ret_draft)->path, "%s", path);
  return status;
}

enum us_status us_model_write(const char *path, struct us_model *model, const char *opt_provenance_json,
                              struct us_err *err) {
  if (ends_in_h5(path)) return us_model_write_h5(path, model, opt_provenance_json, err);
  return us_model_write_folder(path, model, opt_provenance_json, US_SHARD_BYTES, err);
}

enum us_status us_checkpoint_try(const char *path, struct us_err *err) {
  struct us_atomic out;
  if (!ends_in_h5(path)) return us_checkpoint_try_folder(path, err);
  enum us_status status = us_atomic_open(path, &out, err);
  if (status == US_OK) us_atomic_abandon(&out);
  return status;
}

enum us_status us_draft_write(const char *path, struct us_draft *draft, const char *opt_provenance_json,
                              struct us_err *err) {
  us_draft_update_head(draft);
  if (ends_in_h5(path)) return us_draft_write_h5(path, draft, opt_provenance_json, err);
  return us_draft_write_folder(path, draft, opt_provenance_json, err);
}

/* --- binding --- */

enum us_status us_model_bind(struct us_model *model, struct us_store *store, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  struct us_buffer notes = {0};
  size_t count = 0;
  enum us_status status = us_model_tensors(model, &refs, &count, err);
  if (status == US_OK) status = us_bind(store, refs, count, &model->shape, model->owner, err);
  if (status == US_OK) status = us_bind_leftovers(store, &notes, err);
  if (status == US_OK && notes.size) {
    model->notes = strdup(notes.data);
    if (!model->notes) status = us_err_memory(err, "notes", notes.size);
  }
  if (status == US_OK) us_model_update_precision(model);
  us_buffer_release(&notes);
  us_store_release(store);
  free(refs);
  return status;
}

enum us_status us_draft_bind(struct us_draft *draft, struct us_store *store, bool bind_mask,
                             struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  struct us_buffer notes = {0};
  size_t count = 0;
  enum us_status status = us_draft_tensors(draft, &refs, &count, err);
  if (status == US_OK) status = us_bind(store, refs, bind_mask ? count : count - 1, NULL, draft->owner, err);
  if (status == US_OK) us_draft_update_head(draft);
  if (status == US_OK) status = us_bind_leftovers(store, &notes, err);
  if (status == US_OK && notes.size) {
    draft->notes = strdup(notes.data);
    if (!draft->notes) status = us_err_memory(err, "notes", notes.size);
  }
  us_buffer_release(&notes);
  us_store_release(store);
  free(refs);
  return status;
}

enum us_status us_refs_check_data(const struct us_tensor_ref *refs, size_t count, struct us_err *err) {
  for (size_t i = 0; i < count; i++) {
    if (refs[i].matrix && (refs[i].matrix->format == US_FORMAT_NONE || !refs[i].matrix->data)) {
      return us_err_set(err, US_ERR_USAGE, "%s: has no data", refs[i].name);
    }
  }
  return US_OK;
}

/* --- config with the scale rule --- */

/* In config.json beside mxfp4_block_size: engines ignore what they do not know. */
#define SCALE_RULE_KEY "mxfp4_scale_rule"

enum us_status us_model_config_json(struct us_model *model, json_t **ret_root, struct us_err *err) {
  us_model_update_precision(model);
  enum us_status status = us_shape_json(&model->shape, ret_root, err);
  if (status != US_OK || !model->scale_rule[0] || model->shape.precision.experts != US_FORMAT_MXFP4)
    return status;
  json_t *quantization = json_object_get(*ret_root, "quantization_config");
  if (json_object_set_new(quantization, SCALE_RULE_KEY, json_string(model->scale_rule)) == 0) return US_OK;
  json_decref(*ret_root);
  *ret_root = NULL;
  return us_err_memory(err, "config.json", 0);
}

void us_model_config_scale_rule(struct us_model *model, const json_t *config) {
  const char *rule =
      json_string_value(json_object_get(json_object_get(config, "quantization_config"), SCALE_RULE_KEY));
  if (rule) snprintf(model->scale_rule, sizeof model->scale_rule, "%.15s", rule);
}

/* --- checks --- */

static enum us_status check_refs(const struct us_tensor_ref *refs, size_t count, const char *path,
                                 struct us_err *err) {
  enum us_status status = us_refs_check_data(refs, count, err);
  for (size_t i = 0; status == US_OK && i < count; i++) {
    if (refs[i].matrix) status = us_matrix_check(refs[i].matrix, err);
    for (size_t n = 0; !refs[i].matrix && n < refs[i].rows; n++) {
      if (!isfinite((*refs[i].vector)[n])) {
        status = us_err_set(err, US_ERR_INPUT, "value %zu is not finite", n);
        break;
      }
    }
    if (status != US_OK) us_err_prefix(err, "%s", refs[i].name);
  }
  if (status != US_OK && *path) us_err_prefix(err, "%s", path);
  return status;
}

enum us_status us_model_check(const struct us_model *model, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_model_tensors((struct us_model *)model, &refs, &count, err);
  if (status == US_OK) status = check_refs(refs, count, model->path, err);
  free(refs);
  return status;
}

enum us_status us_draft_check(const struct us_draft *draft, struct us_err *err) {
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = us_draft_tensors((struct us_draft *)draft, &refs, &count, err);
  if (status == US_OK) status = check_refs(refs, count, draft->path, err);
  free(refs);
  return status;
}

enum us_status us_draft_check_target(const struct us_draft *draft, const struct us_model *model,
                                     struct us_err *err) {
  enum us_status status = us_draft_shape_check(&draft->shape, &model->shape, err);
  if (status == US_OK) return US_OK;
  return us_err_prefix(err, "%s does not fit %s", *draft->path ? draft->path : "drafter",
                       *model->path ? model->path : "the model");
}
