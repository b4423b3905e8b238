/* checkpoint_hf.c: folders in the published layout: config.json, safetensors, tokenizer.json, and for a drafter
 * mask_embedding.pt.
 *
 * A folder is written beside its final name and renamed when it is whole.
 * Contents: the store, reading a model, reading a drafter, tensors out, folders out.
 */
#include "base/atomic.h"
#include "formats/mask_embedding.h"
#include "model/checkpoint_impl.h"
#include "model/config.h"
#include "model/owner.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- the store --- */

static bool find(void *arg, const char *name, struct us_stored *ret_stored) {
  const struct us_safetensor *t = us_safetensors_find(arg, name);
  if (!t) return false;
  *ret_stored =
      (struct us_stored){.id = t, .file = t->file, .dtype = t->dtype, .ndim = t->ndim, .data = t->data};
  memcpy(ret_stored->dims, t->dims, sizeof ret_stored->dims);
  return true;
}

static size_t count_all(void *arg) {
  return us_safetensors_count(arg);
}

static const char *name_at(void *arg, size_t i, const void **ret_id) {
  const struct us_safetensor *t = us_safetensors_at(arg, i);
  *ret_id = t;
  return t->name;
}

static void close_safetensors(void *thing) {
  us_safetensors_close(thing);
}

static enum us_status open_store(const char *path, void *owner, struct us_store *ret_store,
                                 struct us_err *err) {
  struct us_safetensors *st = NULL;
  enum us_status status = us_safetensors_open(path, &st, err);
  if (status != US_OK) return status;
  *ret_store =
      (struct us_store){.arg = st, .path = path, .find = find, .count = count_all, .name_at = name_at};
  return us_owner_attach(owner, st, close_safetensors, err);
}

/* --- reading a model --- */

static enum us_status join(char *path, size_t size, const char *folder, const char *name,
                           struct us_err *err) {
  if (snprintf(path, size, "%s/%s", folder, name) < (int)size) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "path too long: '%.100s...'", folder);
}

static bool in_folder(char *path, size_t size, const char *folder, const char *name) {
  struct stat st;
  return snprintf(path, size, "%s/%s", folder, name) < (int)size && stat(path, &st) == 0;
}

/* config.json names one end of sequence; generation_config.json has them all. */
static enum us_status read_stop_ids(const char *folder, struct us_shape *shape, struct us_err *err) {
  char path[PATH_MAX];
  if (!in_folder(path, sizeof path, folder, US_GENERATION_FILE)) return US_OK;
  json_t *root = NULL;
  enum us_status status = us_config_load(path, &root, err);
  if (status == US_OK) {
    struct us_config c = {.root = root, .name = path, .err = err};
    uint32_t ids[US_MAX_STOP_IDS];
    uint32_t count = us_config_ids(&c, "eos_token_id", US_MAX_STOP_IDS, shape->vocab - 1, ids);
    if (count) {
      memset(shape->stop_ids, 0, sizeof shape->stop_ids);
      memcpy(shape->stop_ids, ids, count * sizeof *ids);
      shape->stop_count = count;
    }
    status = c.status;
  }
  json_decref(root);
  return status;
}

/* A text file of the folder that need not exist. */
static enum us_status read_optional(const char *folder, const char *name, size_t max, char **ret_text,
                                    size_t *ret_bytes, struct us_err *err) {
  char path[PATH_MAX];
  if (!in_folder(path, sizeof path, folder, name)) return US_OK;
  struct us_buffer text = {0};
  enum us_status status = us_buffer_read_file(&text, path, max, err);
  if (status == US_OK && text.data) {
    *ret_text = strdup(text.data);
    *ret_bytes = text.size;
    if (*ret_text && strlen(*ret_text) != text.size)
      status = us_err_set(err, US_ERR_INPUT, "%s: contains a NUL byte", path);
    if (!*ret_text) status = us_err_memory(err, path, text.size);
  }
  us_buffer_release(&text);
  return status;
}

static enum us_status read_model_config(const char *folder, json_t **ret_config, struct us_shape *shape,
                                        struct us_err *err) {
  char path[PATH_MAX];
  enum us_status status = join(path, sizeof path, folder, US_CONFIG_FILE, err);
  if (status == US_OK) status = us_config_load(path, ret_config, err);
  if (status == US_OK) status = us_shape_read(*ret_config, path, shape, err);
  if (status == US_OK) status = read_stop_ids(folder, shape, err);
  return status;
}

enum us_status us_model_open_folder(const char *path, struct us_model **ret_model, struct us_err *err) {
  json_t *config = NULL;
  struct us_shape shape;
  struct us_store store = {0};
  struct us_model *model = NULL;
  size_t provenance_bytes = 0;
  enum us_status status = read_model_config(path, &config, &shape, err);
  if (status == US_OK) status = us_model_create(&shape, &model, err);
  if (status == US_OK) status = open_store(path, model->owner, &store, err);
  if (status == US_OK) status = us_model_bind(model, &store, err);
  if (status == US_OK) {
    us_model_config_scale_rule(model, config);
    status = read_optional(path, US_TOKENIZER_FILE, US_MAX_TOKENIZER_BYTES, &model->tokenizer_json,
                           &model->tokenizer_bytes, err);
  }
  if (status == US_OK) {
    status = read_optional(path, US_PROVENANCE_FILE, US_MAX_CONFIG_BYTES, &model->provenance_json,
                           &provenance_bytes, err);
  }
  json_decref(config);
  if (status != US_OK) {
    us_model_free(model);
    return status;
  }
  *ret_model = model;
  return US_OK;
}

/* --- reading a drafter --- */

static enum us_status read_mask(const char *folder, struct us_draft *draft, struct us_err *err) {
  char path[PATH_MAX];
  struct us_mask_embedding mask = {0};
  const struct us_draft_shape *s = &draft->shape;
  enum us_status status = join(path, sizeof path, folder, US_MASK_FILE, err);
  if (status == US_OK) status = us_mask_embedding_read(path, &mask, err);
  if (status != US_OK) return status;
  if (mask.mask_token_id != (int64_t)s->mask_id) {
    status = us_err_set(err, US_ERR_INPUT, "%s: mask_token_id is %lld, but config.json says %u", path,
                        (long long)mask.mask_token_id, s->mask_id);
  } else if (mask.hidden != s->hidden) {
    status = us_err_set(err, US_ERR_INPUT, "%s: embedding has %zu values, expected %u", path, mask.hidden,
                        s->hidden);
  } else {
    memcpy(draft->mask_embedding, mask.values, mask.hidden * sizeof *mask.values);
  }
  us_mask_embedding_release(&mask);
  return status;
}

enum us_status us_draft_open_folder(const char *path, struct us_draft **ret_draft, struct us_err *err) {
  char nested[PATH_MAX], config_path[PATH_MAX];
  json_t *config = NULL;
  struct us_draft_shape shape;
  struct us_store store = {0};
  struct us_draft *draft = NULL;
  size_t bytes = 0;
  enum us_status status = US_OK;
  if (in_folder(config_path, sizeof config_path, path, "dflash/" US_CONFIG_FILE)) {
    status = join(nested, sizeof nested, path, "dflash", err);
    path = nested;
  } else {
    status = join(config_path, sizeof config_path, path, US_CONFIG_FILE, err);
  }
  if (status == US_OK) status = us_config_load(config_path, &config, err);
  if (status == US_OK) status = us_draft_shape_read(config, config_path, &shape, err);
  if (status == US_OK) status = us_draft_create(&shape, &draft, err);
  if (status == US_OK) status = open_store(path, draft->owner, &store, err);
  if (status == US_OK) status = us_draft_bind(draft, &store, false, err);
  if (status == US_OK) status = read_mask(path, draft, err);
  if (status == US_OK) {
    status =
        read_optional(path, US_PROVENANCE_FILE, US_MAX_CONFIG_BYTES, &draft->provenance_json, &bytes, err);
  }
  json_decref(config);
  if (status != US_OK) {
    us_draft_free(draft);
    return status;
  }
  *ret_draft = draft;
  return US_OK;
}

/* --- tensors out --- */

/* A vector goes out in BF16, as published, if that loses nothing; the router's bias is FP32 there anyhow. */
static bool fits_bf16(const struct us_tensor_ref *ref) {
  if (strcmp(ref->family, "router") == 0) return false;
  for (size_t i = 0; i < ref->rows; i++) {
    if (us_bf16_round((*ref->vector)[i]) != (*ref->vector)[i]) return false;
  }
  return true;
}

static enum us_status declare(struct us_safetensors_writer *writer, const struct us_tensor_ref *ref,
                              struct us_err *err) {
  static const enum us_dtype dtypes[US_FORMAT_COUNT] = {US_DTYPE_U8, US_DTYPE_F32, US_DTYPE_BF16,
                                                        US_DTYPE_F8_E4M3, US_DTYPE_U8};
  if (!ref->matrix) {
    uint64_t n = ref->rows;
    return us_safetensors_writer_declare(writer, ref->name, fits_bf16(ref) ? US_DTYPE_BF16 : US_DTYPE_F32, 1,
                                         &n, err);
  }
  const struct us_matrix *w = ref->matrix;
  char name[160];
  uint64_t dims[] = {w->rows, w->format == US_FORMAT_MXFP4 ? w->cols / 2 : w->cols};
  enum us_status status = us_safetensors_writer_declare(writer, ref->name, dtypes[w->format], 2, dims, err);
  if (status != US_OK || !us_scale_name(ref, w->format, name, sizeof name)) return status;
  bool fp8 = w->format == US_FORMAT_FP8;
  uint64_t fp8_dims[] = {us_matrix_scale_rows(w), (w->cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK};
  uint64_t fp4_dims[] = {w->rows, w->cols / US_MXFP4_GROUP};
  return us_safetensors_writer_declare(writer, name, fp8 ? US_DTYPE_F32 : US_DTYPE_U8, 2,
                                       fp8 ? fp8_dims : fp4_dims, err);
}

static enum us_status put(struct us_safetensors_writer *writer, const struct us_tensor_ref *ref,
                          struct us_err *err) {
  const struct us_matrix *w = ref->matrix;
  if (w) {
    size_t scales = us_matrix_scale_bytes(w->format, w->rows, w->cols, w->scale_chunk_rows);
    enum us_status status =
        us_safetensors_writer_write(writer, w->data, us_matrix_data_bytes(w->format, w->rows, w->cols), err);
    return status == US_OK && scales ? us_safetensors_writer_write(writer, w->scales, scales, err) : status;
  }
  if (!fits_bf16(ref))
    return us_safetensors_writer_write(writer, *ref->vector, ref->rows * sizeof(float), err);
  uint16_t *halves = malloc(ref->rows * sizeof *halves);
  if (!halves) return us_err_memory(err, ref->name, ref->rows * sizeof *halves);
  us_bf16_encode(*ref->vector, ref->rows, halves);
  enum us_status status = us_safetensors_writer_write(writer, halves, ref->rows * sizeof *halves, err);
  free(halves);
  return status;
}

static enum us_status write_tensors(const char *folder, const struct us_tensor_ref *refs, size_t count,
                                    uint64_t shard_bytes, struct us_err *err) {
  struct us_safetensors_writer *writer = NULL;
  enum us_status status = us_refs_check_data(refs, count, err);
  if (status == US_OK) status = us_safetensors_writer_create(folder, &writer, err);
  if (status == US_OK) status = us_safetensors_writer_metadata(writer, "format", "pt", err);
  for (size_t i = 0; status == US_OK && i < count; i++) status = declare(writer, &refs[i], err);
  if (status == US_OK) status = us_safetensors_writer_begin(writer, shard_bytes, err);
  for (size_t i = 0; status == US_OK && i < count; i++) status = put(writer, &refs[i], err);
  if (status == US_OK) status = us_safetensors_writer_commit(writer, err);
  us_safetensors_writer_free(writer);
  return status;
}

/* --- folders out --- */

static enum us_status write_text(const char *folder, const char *name, const char *text, struct us_err *err) {
  char path[PATH_MAX];
  struct us_atomic out;
  enum us_status status = join(path, sizeof path, folder, name, err);
  if (status == US_OK) status = us_atomic_open(path, &out, err);
  if (status != US_OK) return status;
  if (!us_atomic_write(out.fd, text, strlen(text), 0)) {
    status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
    us_atomic_abandon(&out);
    return status;
  }
  return us_atomic_commit(&out, err);
}

/* The folder under construction: files are flat in it. */
static void remove_folder(const char *folder) {
  DIR *dir = opendir(folder);
  for (struct dirent *entry; dir && (entry = readdir(dir));) {
    char path[PATH_MAX];
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
    if (snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) < (int)sizeof path) unlink(path);
  }
  if (dir) closedir(dir);
  rmdir(folder);
}

static bool is_empty(const char *folder) {
  DIR *dir = opendir(folder);
  size_t entries = 0;
  for (struct dirent *entry; dir && (entry = readdir(dir));)
    entries += entry->d_name[0] != '.' || strlen(entry->d_name) > 2;
  if (dir) closedir(dir);
  return dir && entries == 0;
}

static enum us_status begin_folder(const char *path, char *ret_part, size_t size, struct us_err *err) {
  struct stat st;
  size_t length = strlen(path);
  while (length > 1 && path[length - 1] == '/') length--;
  if (stat(path, &st) == 0 && !(S_ISDIR(st.st_mode) && is_empty(path))) {
    return us_err_set(err, US_ERR_IO, "'%s' exists: a checkpoint folder is only written anew", path);
  }
  if (snprintf(ret_part, size, "%.*s.part-%ld", (int)length, path, (long)getpid()) >= (int)size) {
    return us_err_set(err, US_ERR_USAGE, "path too long: '%.100s...'", path);
  }
  if (mkdir(ret_part, 0777) != 0) return us_err_errno(err, US_ERR_IO, "cannot create '%s'", ret_part);
  return US_OK;
}

enum us_status us_checkpoint_try_folder(const char *path, struct us_err *err) {
  char part[PATH_MAX];
  enum us_status status = begin_folder(path, part, sizeof part, err);
  if (status == US_OK) rmdir(part);
  return status;
}

/* Make the rename last: sync the folder that the folder is in. */
static void sync_parent(const char *path) {
  char parent[PATH_MAX];
  if (snprintf(parent, sizeof parent, "%s/..", path) >= (int)sizeof parent) return;
  int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  fsync(fd);
  close(fd);
}

static enum us_status end_folder(enum us_status status, const char *part, const char *path,
                                 struct us_err *err) {
  if (status == US_OK && rename(part, path) != 0)
    status = us_err_errno(err, US_ERR_IO, "cannot rename to '%s'", path);
  if (status != US_OK)
    remove_folder(part);
  else
    sync_parent(path);
  return status;
}

enum us_status us_model_write_folder(const char *path, struct us_model *model,
                                     const char *opt_provenance_json, uint64_t shard_bytes,
                                     struct us_err *err) {
  char part[PATH_MAX], *config = NULL;
  struct us_tensor_ref *refs = NULL;
  json_t *root = NULL;
  size_t count = 0;
  enum us_status status = begin_folder(path, part, sizeof part, err);
  if (status != US_OK) return status;
  status = us_model_tensors(model, &refs, &count, err);
  if (status == US_OK) status = us_model_config_json(model, &root, err);
  if (status == US_OK) status = us_config_print(root, &config, err);
  if (status == US_OK) status = write_tensors(part, refs, count, shard_bytes, err);
  if (status == US_OK && model->tokenizer_json)
    status = write_text(part, US_TOKENIZER_FILE, model->tokenizer_json, err);
  if (status == US_OK && opt_provenance_json)
    status = write_text(part, US_PROVENANCE_FILE, opt_provenance_json, err);
  if (status == US_OK) status = write_text(part, US_CONFIG_FILE, config, err);
  free(refs);
  free(config);
  return end_folder(status, part, path, err);
}

static enum us_status write_mask(const char *folder, struct us_draft *draft, struct us_err *err) {
  char path[PATH_MAX];
  struct us_mask_embedding mask = {draft->shape.mask_id, draft->shape.hidden, draft->mask_embedding};
  enum us_status status = join(path, sizeof path, folder, US_MASK_FILE, err);
  return status == US_OK ? us_mask_embedding_write(path, &mask, err) : status;
}

enum us_status us_draft_write_folder(const char *path, struct us_draft *draft, const char *opt_provenance,
                                     struct us_err *err) {
  char part[PATH_MAX], *config = NULL;
  struct us_tensor_ref *refs = NULL;
  size_t count = 0;
  enum us_status status = begin_folder(path, part, sizeof part, err);
  if (status != US_OK) return status;
  status = us_draft_tensors(draft, &refs, &count, err);
  if (status == US_OK) status = us_draft_shape_print(&draft->shape, &config, err);
  if (status == US_OK) status = write_tensors(part, refs, count - 1, US_SHARD_BYTES, err);
  if (status == US_OK) status = write_mask(part, draft, err);
  if (status == US_OK && opt_provenance) status = write_text(part, US_PROVENANCE_FILE, opt_provenance, err);
  if (status == US_OK) status = write_text(part, US_CONFIG_FILE, config, err);
  free(refs);
  free(config);
  return end_folder(status, part, path, err);
}
