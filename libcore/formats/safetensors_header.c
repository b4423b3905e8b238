/* safetensors_header.c: parse and check the header of one safetensors file. */
#include "formats/safetensors_header.h"

#include "base/json.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
  const char *name;
  size_t bytes;
} dtypes[US_DTYPE_COUNT] = {
    [US_DTYPE_BOOL] = {"BOOL", 1},       [US_DTYPE_U8] = {"U8", 1},
    [US_DTYPE_I8] = {"I8", 1},           [US_DTYPE_F8_E5M2] = {"F8_E5M2", 1},
    [US_DTYPE_F8_E4M3] = {"F8_E4M3", 1}, [US_DTYPE_F8_E8M0] = {"F8_E8M0", 1},
    [US_DTYPE_I16] = {"I16", 2},         [US_DTYPE_U16] = {"U16", 2},
    [US_DTYPE_F16] = {"F16", 2},         [US_DTYPE_BF16] = {"BF16", 2},
    [US_DTYPE_I32] = {"I32", 4},         [US_DTYPE_U32] = {"U32", 4},
    [US_DTYPE_F32] = {"F32", 4},         [US_DTYPE_F64] = {"F64", 8},
    [US_DTYPE_I64] = {"I64", 8},         [US_DTYPE_U64] = {"U64", 8},
};

const char *us_dtype_name(enum us_dtype dtype) {
  return (unsigned)dtype < US_DTYPE_COUNT ? dtypes[dtype].name : "?";
}

size_t us_dtype_bytes(enum us_dtype dtype) {
  return (unsigned)dtype < US_DTYPE_COUNT ? dtypes[dtype].bytes : 0;
}

int us_st_name_ok(const char *name) {
  size_t n = strlen(name);
  if (n == 0 || n > US_SAFETENSORS_MAX_NAME) return 0;
  for (size_t i = 0; i < n; i++)
    if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f) return 0;
  return 1;
}

static int parse_dtype(const json_t *value, enum us_dtype *ret_dtype) {
  const char *name = json_string_value(value);
  for (int d = 0; name && d < US_DTYPE_COUNT; d++)
    if (strcmp(name, dtypes[d].name) == 0) {
      *ret_dtype = (enum us_dtype)d;
      return 1;
    }
  return 0;
}

/* Fill dims and *ret_bytes; a message on failure. */
static const char *parse_shape(const json_t *value, struct us_safetensor *t, uint64_t *ret_bytes) {
  if (!json_is_array(value)) return "shape is not an array";
  if (json_array_size(value) > US_SAFETENSORS_MAX_DIMS) return "shape has more than 8 dimensions";
  uint64_t bytes = us_dtype_bytes(t->dtype);
  t->ndim = (uint32_t)json_array_size(value);
  for (uint32_t d = 0; d < t->ndim; d++) {
    const json_t *dim = json_array_get(value, d);
    if (!json_is_integer(dim) || json_integer_value(dim) < 0) return "shape has an entry that is not a size";
    t->dims[d] = (uint64_t)json_integer_value(dim);
    if (__builtin_mul_overflow(bytes, t->dims[d], &bytes)) return "shape times dtype overflows";
  }
  *ret_bytes = bytes;
  return NULL;
}

/* One "name": {"dtype", "shape", "data_offsets"} entry. A message on failure. */
static const char *parse_tensor(const char *name, json_t *value, const uint8_t *data, uint64_t data_bytes,
                                struct us_safetensor *t) {
  json_t *offsets = json_object_get(value, "data_offsets");
  if (!json_is_object(value) || json_object_size(value) != 3 || !offsets || !json_object_get(value, "shape"))
    return "entry is not {dtype, shape, data_offsets}";
  if (!parse_dtype(json_object_get(value, "dtype"), &t->dtype)) return "dtype is unknown";
  uint64_t bytes = 0;
  const char *problem = parse_shape(json_object_get(value, "shape"), t, &bytes);
  if (problem) return problem;
  const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last))
    return "data_offsets is not a pair of integers";
  json_int_t begin = json_integer_value(first), end = json_integer_value(last);
  if (begin < 0 || end < begin || (uint64_t)end > data_bytes) return "data_offsets lie outside the file";
  if ((uint64_t)(end - begin) != bytes) return "data_offsets differ from dtype times shape";
  t->bytes = (size_t)bytes;
  t->data = data + begin;
  t->name = strdup(name);
  return NULL;
}

static int by_offset(const void *left, const void *right) {
  const struct us_safetensor *a = left, *b = right;
  if (a->data != b->data) return (const uint8_t *)a->data < (const uint8_t *)b->data ? -1 : 1;
  if (a->bytes != b->bytes) return a->bytes < b->bytes ? -1 : 1;
  return strcmp(a->name, b->name);
}

/* Sort by offset, then demand that each tensor begins where the one before ended, and that the last ends
 * the file. */
static enum us_status check_cover(struct us_st_header *header, const uint8_t *data, uint64_t data_bytes,
                                  const char *name, struct us_err *err) {
  if (header->count) qsort(header->tensors, header->count, sizeof *header->tensors, by_offset);
  uint64_t expected = 0;
  for (size_t i = 0; i < header->count; i++) {
    const struct us_safetensor *t = &header->tensors[i];
    uint64_t begin = (uint64_t)((const uint8_t *)t->data - data);
    if (begin != expected)
      return us_err_set(
          err, US_ERR_INPUT, "%s: %s: begins at byte %llu, %s the tensor before, which ends at %llu", name,
          t->name, (unsigned long long)begin, begin < expected ? "overlapping" : "leaving a hole after",
          (unsigned long long)expected);
    expected = begin + t->bytes;
  }
  if (expected != data_bytes)
    return us_err_set(err, US_ERR_INPUT, "%s: tensors end at byte %llu of %llu", name,
                      (unsigned long long)expected, (unsigned long long)data_bytes);
  return US_OK;
}

static enum us_status parse_metadata(json_t *value, const char *name, struct us_st_header *header,
                                     struct us_err *err) {
  if (!json_is_object(value)) return us_err_set(err, US_ERR_INPUT, "%s: __metadata__ is not an object", name);
  header->metadata = calloc(2 * json_object_size(value) + 1, sizeof *header->metadata);
  if (!header->metadata)
    return us_err_memory(err, name, 2 * json_object_size(value) * sizeof *header->metadata);
  const char *key;
  json_t *text;
  json_object_foreach(value, key, text) {
    if (!json_is_string(text))
      return us_err_set(err, US_ERR_INPUT, "%s: __metadata__ holds a non-string", name);
    char **pair = header->metadata + 2 * header->metadata_count++;
    pair[0] = strdup(key);
    pair[1] = strdup(json_string_value(text));
    if (!pair[0] || !pair[1]) return us_err_memory(err, name, strlen(key));
  }
  return US_OK;
}

static enum us_status parse_entries(json_t *root, const uint8_t *data, uint64_t data_bytes, const char *name,
                                    struct us_st_header *header, struct us_err *err) {
  size_t entries = json_object_size(root);
  if (entries > US_SAFETENSORS_MAX_TENSORS)
    return us_err_set(err, US_ERR_INPUT, "%s: header lists %zu tensors", name, entries);
  header->tensors = calloc(entries + 1, sizeof *header->tensors);
  if (!header->tensors) return us_err_memory(err, name, entries * sizeof *header->tensors);
  const char *key;
  json_t *value;
  json_object_foreach(root, key, value) {
    if (strcmp(key, "__metadata__") == 0) {
      enum us_status status = parse_metadata(value, name, header, err);
      if (status != US_OK) return status;
      continue;
    }
    if (!us_st_name_ok(key))
      return us_err_set(err, US_ERR_INPUT, "%s: a tensor name is empty, too long, or has control characters",
                        name);
    struct us_safetensor *t = &header->tensors[header->count];
    const char *problem = parse_tensor(key, value, data, data_bytes, t);
    if (problem) return us_err_set(err, US_ERR_INPUT, "%s: %s: %s", name, key, problem);
    if (!t->name) return us_err_memory(err, key, strlen(key));
    header->count++;
  }
  return check_cover(header, data, data_bytes, name, err);
}

enum us_status us_st_header_parse(const void *bytes, size_t n, const char *name,
                                  struct us_st_header *ret_header, struct us_err *err) {
  *ret_header = (struct us_st_header){0};
  const uint8_t *file = bytes;
  if (n < 8)
    return us_err_set(err, US_ERR_INPUT, "%s: %zu bytes are too few for a safetensors file", name, n);
  uint64_t header_bytes = 0;
  for (int i = 0; i < 8; i++) header_bytes |= (uint64_t)file[i] << (8 * i);
  if (header_bytes > US_SAFETENSORS_MAX_HEADER || header_bytes > n - 8)
    return us_err_set(err, US_ERR_INPUT, "%s: header of %llu bytes in a file of %zu", name,
                      (unsigned long long)header_bytes, n);
  if (header_bytes == 0 || file[8] != '{')
    return us_err_set(err, US_ERR_INPUT, "%s: header does not begin with {", name);
  char where[US_ERR_MESSAGE_MAX];
  json_t *root = NULL;
  snprintf(where, sizeof where, "%s: header", name);
  enum us_status status = us_json_parse((const char *)file + 8, (size_t)header_bytes, where, &root, err);
  if (status != US_OK) return status;
  status = parse_entries(root, file + 8 + header_bytes, n - 8 - header_bytes, name, ret_header, err);
  json_decref(root);
  if (status != US_OK) us_st_header_release(ret_header);
  return status;
}

void us_st_header_release(struct us_st_header *header) {
  for (size_t i = 0; i < header->count; i++) free((char *)header->tensors[i].name);
  for (size_t i = 0; i < 2 * header->metadata_count; i++) free(header->metadata[i]);
  free(header->tensors);
  free(header->metadata);
  *header = (struct us_st_header){0};
}
