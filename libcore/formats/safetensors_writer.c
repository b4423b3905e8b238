/* safetensors_writer.c: stream tensors into one safetensors file or into shards with an index.
 *
 * One file is open at a time: its header is known from the declarations, so it is written first and the data follows. No
 * file has its name before commit, which puts them all in place, the index last.
 */
#include "formats/safetensors.h"

#include "base/atomic.h"
#include "base/json.h"
#include "base/utf8.h"
#include "formats/safetensors_header.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define HEADER_ALIGN 64 /* the format wants 8; 64 lets vector loads of a mapped file be aligned */

struct declared {
  char *name;
  enum us_dtype dtype;
  uint32_t ndim;
  uint64_t dims[US_SAFETENSORS_MAX_DIMS];
  uint64_t bytes;
  size_t shard;
};

struct shard {
  char *path;
  struct us_atomic out; /* fd -1 before its data begins and after commit */
  size_t first, end;    /* tensors */
  uint64_t bytes;       /* of tensor data */
};

struct us_safetensors_writer {
  char *path;
  int folder; /* path is a folder */
  struct declared *tensors;
  size_t count, capacity;
  json_t *metadata;
  struct shard *shards;
  size_t shard_count, shard; /* shard: the one being written */
  char *index_path;          /* NULL without an index */
  uint64_t at, left;         /* the next byte's place in the open shard; data bytes it still misses */
};

enum us_status us_safetensors_writer_create(const char *path, struct us_safetensors_writer **ret_writer,
                                            struct us_err *err) {
  *ret_writer = NULL;
  struct us_safetensors_writer *writer = calloc(1, sizeof *writer);
  if (writer) {
    writer->path = strdup(path);
    writer->metadata = json_object();
  }
  if (!writer || !writer->path || !writer->metadata) {
    us_safetensors_writer_free(writer);
    return us_err_memory(err, "a safetensors writer", sizeof *writer);
  }
  size_t n = strlen(path), suffix = strlen(".safetensors");
  writer->folder = n < suffix || strcmp(path + n - suffix, ".safetensors") != 0;
  if (writer->folder && mkdir(path, 0777) != 0 && errno != EEXIST) {
    enum us_status status = us_err_errno(err, US_ERR_IO, "%s: cannot create the folder", path);
    us_safetensors_writer_free(writer);
    return status;
  }
  *ret_writer = writer;
  return US_OK;
}

static bool is_utf8(const char *text) {
  return us_utf8_valid(text, strlen(text)) == strlen(text);
}

enum us_status us_safetensors_writer_metadata(struct us_safetensors_writer *writer, const char *key,
                                              const char *value, struct us_err *err) {
  if (!is_utf8(key) || !is_utf8(value))
    return us_err_set(err, US_ERR_USAGE, "%s: metadata %s is not UTF-8", writer->path, key);
  bool whole = true;
  us_json_set(writer->metadata, key, json_string(value), &whole);
  return whole ? US_OK : us_err_memory(err, "safetensors metadata", strlen(value));
}

static enum us_status grow(struct us_safetensors_writer *writer, struct us_err *err) {
  if (writer->count < writer->capacity) return US_OK;
  size_t capacity = writer->capacity ? 2 * writer->capacity : 256;
  struct declared *tensors = realloc(writer->tensors, capacity * sizeof *tensors);
  if (!tensors) return us_err_memory(err, "the tensor list", capacity * sizeof *tensors);
  writer->tensors = tensors;
  writer->capacity = capacity;
  return US_OK;
}

enum us_status us_safetensors_writer_declare(struct us_safetensors_writer *writer, const char *name,
                                             enum us_dtype dtype, uint32_t ndim, const uint64_t *dims,
                                             struct us_err *err) {
  if (writer->shards) return us_err_set(err, US_ERR_USAGE, "%s: declared after writing began", name);
  if (!us_st_name_ok(name) || strcmp(name, "__metadata__") == 0)
    return us_err_set(err, US_ERR_USAGE, "%s: a tensor name is empty, too long, reserved, or not printable",
                      writer->path);
  if (!us_dtype_bytes(dtype) || ndim > US_SAFETENSORS_MAX_DIMS || writer->count >= US_SAFETENSORS_MAX_TENSORS)
    return us_err_set(err, US_ERR_USAGE, "%s: dtype, dimensions or number of tensors out of range", name);
  if (!is_utf8(name)) return us_err_set(err, US_ERR_USAGE, "%s: a tensor name is not UTF-8", writer->path);
  struct declared t = {.dtype = dtype, .ndim = ndim, .bytes = us_dtype_bytes(dtype)};
  for (uint32_t d = 0; d < ndim; d++) {
    t.dims[d] = dims[d];
    if (__builtin_mul_overflow(t.bytes, dims[d], &t.bytes) || t.bytes > INT64_MAX)
      return us_err_set(err, US_ERR_USAGE, "%s: shape times dtype overflows", name);
  }
  enum us_status status = grow(writer, err);
  if (status != US_OK) return status;
  t.name = strdup(name);
  if (!t.name) return us_err_memory(err, name, strlen(name));
  writer->tensors[writer->count++] = t;
  return US_OK;
}

/* ---- cutting into shards ---- */

static int by_name(const void *left, const void *right) {
  return strcmp((*(const struct declared *const *)left)->name,
                (*(const struct declared *const *)right)->name);
}

static enum us_status refuse_duplicates(const struct us_safetensors_writer *writer, struct us_err *err) {
  const struct declared **sorted = calloc(writer->count + 1, sizeof *sorted);
  if (!sorted) return us_err_memory(err, "the tensor list", writer->count * sizeof *sorted);
  for (size_t i = 0; i < writer->count; i++) sorted[i] = &writer->tensors[i];
  if (writer->count) qsort(sorted, writer->count, sizeof *sorted, by_name);
  const char *twice = NULL;
  for (size_t i = 1; i < writer->count && !twice; i++)
    if (strcmp(sorted[i - 1]->name, sorted[i]->name) == 0) twice = sorted[i]->name;
  free(sorted);
  return twice ? us_err_set(err, US_ERR_USAGE, "%s: %s: declared twice", writer->path, twice) : US_OK;
}

/* Assign tensors to shards greedily; sets shard numbers and returns how many there are. */
static size_t assign(struct us_safetensors_writer *writer, uint64_t limit) {
  size_t shard = 0;
  uint64_t used = 0;
  for (size_t i = 0; i < writer->count; i++) {
    struct declared *t = &writer->tensors[i];
    if (limit && used && t->bytes > limit - (used < limit ? used : limit)) {
      shard++;
      used = 0;
    }
    t->shard = shard;
    used += t->bytes;
  }
  return shard + 1;
}

static enum us_status name_file(const struct us_safetensors_writer *writer, const char *opt_base,
                                char **ret_path, struct us_err *err) {
  size_t size = strlen(writer->path) + (opt_base ? strlen(opt_base) : 0) + 2;
  *ret_path = malloc(size);
  if (!*ret_path) return us_err_memory(err, writer->path, size);
  snprintf(*ret_path, size, "%s%s%s", writer->path, opt_base ? "/" : "", opt_base ? opt_base : "");
  return US_OK;
}

static enum us_status name_shards(struct us_safetensors_writer *writer, struct us_err *err) {
  for (size_t s = 0; s < writer->shard_count; s++) {
    char base[64] = "model.safetensors";
    if (writer->shard_count > 1)
      snprintf(base, sizeof base, "model-%05zu-of-%05zu.safetensors", s + 1, writer->shard_count);
    enum us_status status = name_file(writer, writer->folder ? base : NULL, &writer->shards[s].path, err);
    if (status != US_OK) return status;
  }
  if (writer->shard_count == 1) return US_OK;
  return name_file(writer, "model.safetensors.index.json", &writer->index_path, err);
}

/* ---- one shard ---- */

/* {"__metadata__": ..., "name": {"dtype", "shape", "data_offsets"}, ...}; malloc'ed, NULL when out of
 * memory. */
static char *print_header(const struct us_safetensors_writer *writer, const struct shard *shard) {
  json_t *root = json_object();
  bool whole = true;
  if (json_object_size(writer->metadata))
    us_json_set(root, "__metadata__", json_incref(writer->metadata), &whole);
  uint64_t offset = 0;
  for (size_t i = shard->first; i < shard->end; i++) {
    const struct declared *t = &writer->tensors[i];
    json_t *shape = json_array();
    for (uint32_t d = 0; d < t->ndim; d++)
      us_json_append(shape, json_integer((json_int_t)t->dims[d]), &whole);
    json_t *entry = json_pack("{s:s, s:o, s:[I, I]}", "dtype", us_dtype_name(t->dtype), "shape", shape,
                              "data_offsets", (json_int_t)offset, (json_int_t)(offset + t->bytes));
    us_json_set(root, t->name, entry, &whole);
    offset += t->bytes;
  }
  char *text = whole ? us_json_dump(root, JSON_COMPACT) : NULL;
  json_decref(root);
  return text;
}

static enum us_status append(struct us_safetensors_writer *writer, const void *data, size_t bytes,
                             struct us_err *err) {
  const struct shard *shard = &writer->shards[writer->shard];
  if (!us_atomic_write(shard->out.fd, data, bytes, writer->at))
    return us_err_errno(err, US_ERR_IO, "%s: cannot write", shard->path);
  writer->at += bytes;
  return US_OK;
}

/* Length, JSON, and spaces up to the alignment, in one piece. */
static enum us_status write_header(struct us_safetensors_writer *writer, struct us_err *err) {
  const struct shard *shard = &writer->shards[writer->shard];
  char *text = print_header(writer, shard);
  if (!text) return us_err_memory(err, "a safetensors header", (shard->end - shard->first) * 128);
  size_t n = strlen(text), padded = (8 + n + HEADER_ALIGN - 1) / HEADER_ALIGN * HEADER_ALIGN - 8;
  uint8_t *whole = malloc(8 + padded);
  enum us_status status = US_OK;
  if (!whole)
    status = us_err_memory(err, "a safetensors header", padded);
  else if (padded > US_SAFETENSORS_MAX_HEADER)
    status =
        us_err_set(err, US_ERR_USAGE, "%s: a header of %zu bytes; use smaller shards", shard->path, padded);
  if (status == US_OK) {
    for (int i = 0; i < 8; i++) whole[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    memcpy(whole + 8, text, n);
    memset(whole + 8 + n, ' ', padded - n);
    status = append(writer, whole, 8 + padded, err);
  }
  free(whole);
  free(text);
  return status;
}

static enum us_status open_shard(struct us_safetensors_writer *writer, struct us_err *err) {
  struct shard *shard = &writer->shards[writer->shard];
  enum us_status status = us_atomic_open(shard->path, &shard->out, err);
  if (status != US_OK) return status;
  writer->at = 0;
  writer->left = shard->bytes;
  return write_header(writer, err);
}

/* Step over finished shards to the next one that wants data. */
static enum us_status advance(struct us_safetensors_writer *writer, struct us_err *err) {
  while (writer->left == 0) {
    if (++writer->shard >= writer->shard_count) return US_OK;
    enum us_status status = open_shard(writer, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

enum us_status us_safetensors_writer_begin(struct us_safetensors_writer *writer, uint64_t max_shard_bytes,
                                           struct us_err *err) {
  if (writer->shards) return us_err_set(err, US_ERR_USAGE, "%s: writing began twice", writer->path);
  enum us_status status = refuse_duplicates(writer, err);
  if (status != US_OK) return status;
  writer->shard_count = assign(writer, writer->folder ? max_shard_bytes : 0);
  if (writer->shard_count > US_SAFETENSORS_MAX_SHARDS)
    return us_err_set(err, US_ERR_USAGE, "%s: %zu shards; allow more bytes a shard", writer->path,
                      writer->shard_count);
  writer->shards = calloc(writer->shard_count, sizeof *writer->shards);
  if (!writer->shards) return us_err_memory(err, "the shards", writer->shard_count * sizeof *writer->shards);
  for (size_t s = 0; s < writer->shard_count; s++) writer->shards[s].out.fd = -1;
  for (size_t i = 0; i < writer->count; i++) {
    struct shard *shard = &writer->shards[writer->tensors[i].shard];
    if (shard->end == 0) shard->first = i;
    shard->end = i + 1;
    if (__builtin_add_overflow(shard->bytes, writer->tensors[i].bytes, &shard->bytes) ||
        shard->bytes > INT64_MAX)
      return us_err_set(err, US_ERR_USAGE, "%s: more bytes than a file can have", writer->path);
  }
  status = name_shards(writer, err);
  if (status == US_OK) status = open_shard(writer, err);
  return status == US_OK ? advance(writer, err) : status;
}

enum us_status us_safetensors_writer_write(struct us_safetensors_writer *writer, const void *data,
                                           size_t bytes, struct us_err *err) {
  const uint8_t *next = data;
  while (bytes) {
    if (!writer->shards || writer->left == 0)
      return us_err_set(err, US_ERR_USAGE, "%s: %zu bytes more than declared", writer->path, bytes);
    size_t n = bytes < writer->left ? bytes : (size_t)writer->left;
    enum us_status status = append(writer, next, n, err);
    if (status != US_OK) return status;
    next += n;
    bytes -= n;
    writer->left -= n;
    status = advance(writer, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* ---- commit ---- */

static enum us_status write_index(struct us_safetensors_writer *writer, struct us_err *err) {
  json_t *map = json_object();
  bool whole = true;
  uint64_t total = 0;
  for (size_t i = 0; i < writer->count; i++) {
    const char *path = writer->shards[writer->tensors[i].shard].path;
    us_json_set(map, writer->tensors[i].name, json_string(strrchr(path, '/') + 1), &whole);
    total += writer->tensors[i].bytes;
  }
  json_t *root = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
  char *text = whole ? us_json_dump(root, JSON_INDENT(2)) : NULL;
  json_decref(root);
  if (!text) return us_err_memory(err, "the index", writer->count * 128);
  struct us_atomic out;
  enum us_status status = us_atomic_open(writer->index_path, &out, err);
  if (status == US_OK && !us_atomic_write(out.fd, text, strlen(text), 0)) {
    status = us_err_errno(err, US_ERR_IO, "%s: cannot write", writer->index_path);
    us_atomic_abandon(&out);
  }
  free(text);
  return status == US_OK ? us_atomic_commit(&out, err) : status;
}

enum us_status us_safetensors_writer_commit(struct us_safetensors_writer *writer, struct us_err *err) {
  if (!writer->shards || writer->shard < writer->shard_count)
    return us_err_set(err, US_ERR_USAGE, "%s: %llu bytes of a file are missing", writer->path,
                      (unsigned long long)writer->left);
  for (size_t s = 0; s < writer->shard_count; s++) {
    enum us_status status = us_atomic_commit(&writer->shards[s].out, err);
    if (status != US_OK) return status;
  }
  return writer->index_path ? write_index(writer, err) : US_OK;
}

void us_safetensors_writer_free(struct us_safetensors_writer *writer) {
  if (!writer) return;
  for (size_t s = 0; writer->shards && s < writer->shard_count; s++) {
    us_atomic_abandon(&writer->shards[s].out);
    free(writer->shards[s].path);
  }
  for (size_t i = 0; i < writer->count; i++) free(writer->tensors[i].name);
  free(writer->tensors);
  free(writer->shards);
  free(writer->index_path);
  json_decref(writer->metadata);
  free(writer->path);
  free(writer);
}
