/* buffer.c: growable bytes and token ids; doubling, so that n appends cost O(n). */
#include "base/buffer.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Smallest capacity >= need, growing by doubling from `now`; 0 if it would overflow. */
static size_t grown(size_t now, size_t need) {
  size_t capacity = now < 64 ? 64 : now;
  while (capacity < need) {
    if (capacity > SIZE_MAX / 2) return 0;
    capacity *= 2;
  }
  return capacity;
}

enum us_status us_buffer_reserve(struct us_buffer *buffer, size_t more, struct us_err *err) {
  if (more >= SIZE_MAX - buffer->size) return us_err_memory(err, "text", more);
  size_t need = buffer->size + more + 1;
  if (need <= buffer->capacity) return US_OK;
  size_t capacity = grown(buffer->capacity, need);
  char *data = capacity ? realloc(buffer->data, capacity) : NULL;
  if (data == NULL) return us_err_memory(err, "text", need);
  buffer->data = data;
  buffer->capacity = capacity;
  return US_OK;
}

enum us_status us_buffer_append(struct us_buffer *buffer, const void *bytes, size_t n, struct us_err *err) {
  enum us_status status = us_buffer_reserve(buffer, n, err);
  if (status != US_OK) return status;
  if (n > 0) memcpy(buffer->data + buffer->size, bytes, n);
  buffer->size += n;
  buffer->data[buffer->size] = '\0';
  return US_OK;
}

enum us_status us_buffer_add(struct us_buffer *buffer, const char *text, struct us_err *err) {
  return us_buffer_append(buffer, text, strlen(text), err);
}

void us_buffer_clear(struct us_buffer *buffer) {
  buffer->size = 0;
  if (buffer->data) buffer->data[0] = '\0';
}

void us_buffer_release(struct us_buffer *buffer) {
  free(buffer->data);
  *buffer = (struct us_buffer){0};
}

static enum us_status read_stream(struct us_buffer *buffer, FILE *file, const char *path, size_t max_bytes,
                                  struct us_err *err) {
  for (;;) {
    enum us_status status = us_buffer_reserve(buffer, 65536, err);
    if (status != US_OK) return status;
    size_t n = fread(buffer->data + buffer->size, 1, buffer->capacity - buffer->size - 1, file);
    buffer->size += n;
    buffer->data[buffer->size] = '\0';
    if (ferror(file)) return us_err_errno(err, US_ERR_IO, "%s: cannot read", path);
    if (buffer->size > max_bytes)
      return us_err_set(err, US_ERR_INPUT, "%s: larger than the limit of %zu bytes", path, max_bytes);
    if (n == 0) return US_OK;
  }
}

enum us_status us_buffer_read_file(struct us_buffer *buffer, const char *path, size_t max_bytes,
                                   struct us_err *err) {
  if (strcmp(path, "-") == 0) return read_stream(buffer, stdin, "stdin", max_bytes, err);
  FILE *file = fopen(path, "rb");
  if (file == NULL) return us_err_errno(err, US_ERR_IO, "%s: cannot open", path);
  enum us_status status = read_stream(buffer, file, path, max_bytes, err);
  fclose(file);
  return status;
}

enum us_status us_ids_append(struct us_ids *ids, const int32_t *more, size_t n, struct us_err *err) {
  if (n > SIZE_MAX / sizeof *ids->ids - ids->count) return us_err_memory(err, "token ids", SIZE_MAX);
  size_t need = ids->count + n;
  if (need > ids->capacity) {
    size_t capacity = grown(ids->capacity, need);
    int32_t *grown_ids = capacity && capacity <= SIZE_MAX / sizeof *ids->ids
                             ? realloc(ids->ids, capacity * sizeof *ids->ids)
                             : NULL;
    if (grown_ids == NULL) return us_err_memory(err, "token ids", need * sizeof *ids->ids);
    ids->ids = grown_ids;
    ids->capacity = capacity;
  }
  if (n > 0) memcpy(ids->ids + ids->count, more, n * sizeof *more);
  ids->count = need;
  return US_OK;
}

void us_ids_release(struct us_ids *ids) {
  free(ids->ids);
  *ids = (struct us_ids){0};
}
