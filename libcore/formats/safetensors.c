/* safetensors.c: map safetensors files and find tensors in them.
 *
 * Contents: one file; an index and its shards; a folder; lookups.
 */
#include "formats/safetensors.h"

#include "base/io.h"
#include "base/json.h"
#include "formats/safetensors_header.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct st_file {
  char *path;
  struct us_io_map map; /* empty when the bytes are borrowed */
  struct us_st_header header;
};

struct us_safetensors {
  struct st_file *files;
  size_t file_count;
  struct us_safetensor *tensors; /* by file, then by offset; names belong to the headers */
  size_t count;
  const struct us_safetensor **by_name; /* sorted */
};

/* ---- one file ---- */

static enum us_status open_file(struct st_file *file, const char *path, struct us_err *err) {
  file->path = strdup(path);
  if (!file->path) return us_err_memory(err, path, strlen(path));
  enum us_status status = us_io_map_open(path, &file->map, err);
  return status == US_OK ? us_st_header_parse(file->map.data, file->map.size, path, &file->header, err)
                         : status;
}

static int by_name(const void *left, const void *right) {
  return strcmp((*(const struct us_safetensor *const *)left)->name,
                (*(const struct us_safetensor *const *)right)->name);
}

/* Collect the tensors of all files (those that `keep`, if given, says) and sort them by name. */
static enum us_status collect(struct us_safetensors *st, const json_t *opt_weight_map, struct us_err *err) {
  size_t total = 0;
  for (size_t f = 0; f < st->file_count; f++) total += st->files[f].header.count;
  if (total > US_SAFETENSORS_MAX_TENSORS)
    return us_err_set(err, US_ERR_INPUT, "%s: %zu tensors over all shards", st->files[0].path, total);
  st->tensors = calloc(total + 1, sizeof *st->tensors);
  st->by_name = calloc(total + 1, sizeof *st->by_name);
  if (!st->tensors || !st->by_name) return us_err_memory(err, "the tensor list", total * sizeof *st->tensors);
  for (size_t f = 0; f < st->file_count; f++) {
    const struct st_file *file = &st->files[f];
    const char *slash = strrchr(file->path, '/'), *base = slash ? slash + 1 : file->path;
    for (size_t i = 0; i < file->header.count; i++) {
      const struct us_safetensor *t = &file->header.tensors[i];
      const char *home = opt_weight_map ? json_string_value(json_object_get(opt_weight_map, t->name)) : base;
      if (!home || strcmp(home, base) != 0) continue;
      st->tensors[st->count] = *t;
      st->tensors[st->count++].file = file->path;
    }
  }
  for (size_t i = 0; i < st->count; i++) st->by_name[i] = &st->tensors[i];
  if (st->count) qsort(st->by_name, st->count, sizeof *st->by_name, by_name);
  return US_OK;
}

static enum us_status create(size_t files, struct us_safetensors **ret_st, struct us_err *err) {
  struct us_safetensors *st = calloc(1, sizeof *st);
  if (st) st->files = calloc(files + 1, sizeof *st->files);
  if (!st || !st->files) {
    free(st);
    return us_err_memory(err, "a safetensors reader", files * sizeof *st->files);
  }
  *ret_st = st;
  return US_OK;
}

static enum us_status open_single(const char *path, struct us_safetensors **ret_st, struct us_err *err) {
  struct us_safetensors *st = NULL;
  enum us_status status = create(1, &st, err);
  if (status != US_OK) return status;
  st->file_count = 1;
  status = open_file(&st->files[0], path, err);
  if (status == US_OK) status = collect(st, NULL, err);
  if (status == US_OK)
    *ret_st = st;
  else
    us_safetensors_close(st);
  return status;
}

enum us_status us_safetensors_open_memory(const void *bytes, size_t n, const char *name,
                                          struct us_safetensors **ret_st, struct us_err *err) {
  *ret_st = NULL;
  struct us_safetensors *st = NULL;
  enum us_status status = create(1, &st, err);
  if (status != US_OK) return status;
  st->file_count = 1;
  st->files[0].path = strdup(name);
  status = st->files[0].path ? us_st_header_parse(bytes, n, name, &st->files[0].header, err)
                             : us_err_memory(err, name, strlen(name));
  if (status == US_OK) status = collect(st, NULL, err);
  if (status == US_OK)
    *ret_st = st;
  else
    us_safetensors_close(st);
  return status;
}

/* ---- an index and its shards ---- */

static int ends_with(const char *text, const char *end) {
  size_t n = strlen(text), m = strlen(end);
  return n >= m && strcmp(text + n - m, end) == 0;
}

static int by_text(const void *left, const void *right) {
  return strcmp(*(const char *const *)left, *(const char *const *)right);
}

/* The index's distinct shard names, sorted; they point into the JSON. */
static enum us_status list_shards(json_t *map, const char *path, const char ***ret_shards, size_t *ret_count,
                                  struct us_err *err) {
  size_t entries = json_object_size(map), count = 0;
  if (entries > US_SAFETENSORS_MAX_TENSORS)
    return us_err_set(err, US_ERR_INPUT, "%s: weight_map lists %zu tensors", path, entries);
  const char **shards = calloc(entries + 1, sizeof *shards);
  if (!shards) return us_err_memory(err, path, entries * sizeof *shards);
  const char *key;
  json_t *value;
  json_object_foreach(map, key, value) {
    const char *shard = json_string_value(value);
    /* A shard is a plain name beside the index: nothing a file says may lead out of the folder. */
    if (!shard || !us_st_name_ok(shard) || strchr(shard, '/') || !ends_with(shard, ".safetensors") ||
        strlen(shard) > NAME_MAX) {
      free(shards);
      return us_err_set(err, US_ERR_INPUT,
                        "%s: weight_map holds a shard name that is not a .safetensors file name", path);
    }
    shards[count++] = shard;
  }
  if (count) qsort(shards, count, sizeof *shards, by_text);
  size_t distinct = 0;
  for (size_t i = 0; i < count; i++)
    if (!distinct || strcmp(shards[distinct - 1], shards[i]) != 0) shards[distinct++] = shards[i];
  *ret_shards = shards;
  *ret_count = distinct;
  if (distinct && distinct <= US_SAFETENSORS_MAX_SHARDS) return US_OK;
  free(shards);
  return us_err_set(err, US_ERR_INPUT, "%s: weight_map names %zu shards", path, distinct);
}

/* Every name of the index must have been found where it says. */
static enum us_status check_index(const struct us_safetensors *st, json_t *map, const char *path,
                                  struct us_err *err) {
  if (st->count == json_object_size(map))
    return US_OK; /* collect kept only tensors at home: each name once */
  const char *key;
  json_t *value;
  json_object_foreach(map, key, value) {
    if (!us_st_name_ok(key))
      return us_err_set(err, US_ERR_INPUT,
                        "%s: weight_map holds a name that is empty, too long, or not printable", path);
    if (!us_safetensors_find(st, key))
      return us_err_set(err, US_ERR_INPUT, "%s: %s: not in %s, where the index says it is", path, key,
                        json_string_value(value));
  }
  return us_err_set(err, US_ERR_INPUT, "%s: the index and its shards differ", path);
}

static enum us_status open_shards(struct us_safetensors *st, json_t *map, const char *path,
                                  const char **shards, size_t count, struct us_err *err) {
  const char *slash = strrchr(path, '/');
  size_t folder = slash ? (size_t)(slash - path) + 1 : 0;
  for (size_t i = 0; i < count; i++) {
    char shard_path[PATH_MAX];
    if ((size_t)snprintf(shard_path, sizeof shard_path, "%.*s%s", (int)folder, path, shards[i]) >=
        sizeof shard_path)
      return us_err_set(err, US_ERR_INPUT, "%s: the path of %s is too long", path, shards[i]);
    st->file_count = i + 1;
    enum us_status status = open_file(&st->files[i], shard_path, err);
    if (status != US_OK) return status;
  }
  enum us_status status = collect(st, map, err);
  return status == US_OK ? check_index(st, map, path, err) : status;
}

/* The whole index, at most US_SAFETENSORS_MAX_HEADER bytes, as JSON. */
static enum us_status load_index(const char *path, json_t **ret_root, struct us_err *err) {
  struct us_io_map map;
  enum us_status status = us_io_map_open(path, &map, err);
  if (status != US_OK) return status;
  if (map.size > US_SAFETENSORS_MAX_HEADER)
    status = us_err_set(err, US_ERR_INPUT, "%s: an index of %zu bytes", path, map.size);
  else
    status = us_json_parse(map.size ? (const char *)map.data : "", map.size, path, ret_root, err);
  us_io_map_close(&map);
  return status;
}

static enum us_status open_index(const char *path, struct us_safetensors **ret_st, struct us_err *err) {
  json_t *root = NULL;
  const char **shards = NULL;
  struct us_safetensors *st = NULL;
  size_t count = 0;
  enum us_status status = load_index(path, &root, err);
  if (status != US_OK) return status;
  json_t *map = json_object_get(root, "weight_map");
  if (!json_is_object(map)) status = us_err_set(err, US_ERR_INPUT, "%s: weight_map is missing", path);
  if (status == US_OK) status = list_shards(map, path, &shards, &count, err);
  if (status != US_OK) goto cleanup;
  status = create(count, &st, err);
  if (status == US_OK) status = open_shards(st, map, path, shards, count, err);
  free(shards);
  if (status == US_OK)
    *ret_st = st;
  else
    us_safetensors_close(st);
cleanup:
  json_decref(root);
  return status;
}

/* ---- a folder ---- */

/* Count the folder's entries that end in `suffix` and keep one of their names. */
static size_t scan(const char *folder, const char *suffix, char name[NAME_MAX + 1]) {
  DIR *dir = opendir(folder);
  size_t found = 0;
  for (struct dirent *entry; dir && (entry = readdir(dir));) {
    if (entry->d_name[0] == '.' || !ends_with(entry->d_name, suffix)) continue;
    snprintf(name, NAME_MAX + 1, "%s", entry->d_name);
    found++;
  }
  if (dir) closedir(dir);
  return found;
}

static int has(const char *folder, const char *name) {
  char path[PATH_MAX];
  return (size_t)snprintf(path, sizeof path, "%s/%s", folder, name) < sizeof path && access(path, F_OK) == 0;
}

static enum us_status open_folder(const char *folder, struct us_safetensors **ret_st, struct us_err *err) {
  char name[NAME_MAX + 1], path[PATH_MAX];
  const char *index = "model.safetensors.index.json";
  int indexed = 1;
  if (has(folder, index))
    snprintf(name, sizeof name, "%s", index);
  else if (scan(folder, ".safetensors.index.json", name) != 1) {
    indexed = 0;
    if (has(folder, "model.safetensors"))
      snprintf(name, sizeof name, "model.safetensors");
    else if (scan(folder, ".safetensors", name) != 1)
      return us_err_set(err, US_ERR_INPUT,
                        "%s: no model.safetensors, and no index to tell which files to read", folder);
  }
  if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, name) >= sizeof path)
    return us_err_set(err, US_ERR_INPUT, "%s: the path is too long", folder);
  return indexed ? open_index(path, ret_st, err) : open_single(path, ret_st, err);
}

enum us_status us_safetensors_open(const char *path, struct us_safetensors **ret_st, struct us_err *err) {
  *ret_st = NULL;
  struct stat info;
  if (stat(path, &info) != 0) return us_err_errno(err, US_ERR_IO, "%s: cannot open", path);
  if (S_ISDIR(info.st_mode)) return open_folder(path, ret_st, err);
  return ends_with(path, ".json") ? open_index(path, ret_st, err) : open_single(path, ret_st, err);
}

/* ---- lookups ---- */

void us_safetensors_close(struct us_safetensors *st) {
  if (!st) return;
  for (size_t f = 0; f < st->file_count; f++) {
    us_st_header_release(&st->files[f].header);
    us_io_map_close(&st->files[f].map);
    free(st->files[f].path);
  }
  free(st->files);
  free(st->tensors);
  free(st->by_name);
  free(st);
}

size_t us_safetensors_count(const struct us_safetensors *st) {
  return st->count;
}

const struct us_safetensor *us_safetensors_at(const struct us_safetensors *st, size_t i) {
  return i < st->count ? &st->tensors[i] : NULL;
}

const struct us_safetensor *us_safetensors_find(const struct us_safetensors *st, const char *name) {
  struct us_safetensor wanted = {.name = name};
  const struct us_safetensor *key = &wanted;
  if (!st->count) return NULL;
  const struct us_safetensor *const *found =
      bsearch(&key, st->by_name, st->count, sizeof *st->by_name, by_name);
  return found ? *found : NULL;
}

const char *us_safetensors_metadata(const struct us_safetensors *st, const char *key) {
  for (size_t f = 0; f < st->file_count; f++) {
    const struct us_st_header *header = &st->files[f].header;
    for (size_t i = 0; i < header->metadata_count; i++)
      if (strcmp(header->metadata[2 * i], key) == 0) return header->metadata[2 * i + 1];
  }
  return NULL;
}

static void print_shape(char *text, size_t size, uint32_t ndim, const uint64_t *dims) {
  size_t used = (size_t)snprintf(text, size, "[");
  for (uint32_t d = 0; d < ndim && used < size; d++)
    used += (size_t)snprintf(text + used, size - used, "%s%llu", d ? ", " : "", (unsigned long long)dims[d]);
  if (used < size) snprintf(text + used, size - used, "]");
}

enum us_status us_safetensor_expect(const struct us_safetensor *t, enum us_dtype dtype, uint32_t ndim,
                                    const uint64_t *dims, struct us_err *err) {
  int same = t->dtype == dtype && t->ndim == ndim;
  for (uint32_t d = 0; same && d < ndim; d++) same = t->dims[d] == dims[d];
  if (same) return US_OK;
  char have[192], want[192];
  print_shape(have, sizeof have, t->ndim, t->dims);
  print_shape(want, sizeof want, ndim, dims);
  return us_err_set(err, US_ERR_INPUT, "%s: %s: is %s %s, expected %s %s", t->file, t->name,
                    us_dtype_name(t->dtype), have, us_dtype_name(dtype), want);
}
