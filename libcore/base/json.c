/* json.c: parsing with caps, typed getters. */
#include "base/json.h"
#include "base/buffer.h"
#include "base/utf8.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* jansson recurses; its own limit of 2048 levels is more stack than a pool thread may have. */
static bool too_deep(const char *text, size_t size) {
  size_t depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < size; i++) {
    char c = text[i];
    if (in_string) {
      if (c == '\\')
        i++;
      else if (c == '"')
        in_string = false;
    } else if (c == '"')
      in_string = true;
    else if (c == '{' || c == '[') {
      if (++depth > US_JSON_DEPTH_MAX) return true;
    } else if ((c == '}' || c == ']') && depth)
      depth--;
  }
  return false;
}

/* The text as jansson reads it, a byte a call: when memory ends inside a token, jansson 2.14 goes on with a part of the
 * token. errno is the only trace, and the next number resets it; so it is looked at before every byte. */
struct source {
  const char *text;
  size_t size, next;
  bool starved;
};

static size_t give_byte(void *buffer, size_t capacity, void *arg) {
  struct source *source = arg;
  if (errno == ENOMEM) source->starved = true;
  if (source->starved || source->next == source->size || capacity == 0) return 0;
  *(char *)buffer = source->text[source->next++];
  return 1;
}

/* What the parser found, in words that are not its own where those would not help. */
static enum us_status refuse(const char *text, size_t size, const char *name, const json_error_t *why,
                             struct us_err *err) {
  const char *end = size ? memchr(text, '\n', size) : NULL, *what = why->text;
  if (size >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
    what = "a byte order mark, which JSON does not begin with";
  if (strstr(what, "JSON_ALLOW_NUL")) what = "\\u0000 is not allowed";
  if (size && (!end || end + 1 == text + size)) /* one line, often of many: its number is in the name */
    return us_err_set(err, US_ERR_INPUT, "%s: column %d: %s", name, why->column, what);
  return us_err_set(err, US_ERR_INPUT, "%s: line %d column %d: %s", name, why->line, why->column, what);
}

enum us_status us_json_parse(const char *text, size_t size, const char *name, json_t **ret_root,
                             struct us_err *err) {
  if (too_deep(text, size))
    return us_err_set(err, US_ERR_INPUT, "%s: nested deeper than %d levels", name, US_JSON_DEPTH_MAX);
  struct source source = {.text = text, .size = size};
  json_error_t why;
  errno = 0;
  json_t *root = json_load_callback(give_byte, &source, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &why);
  if (source.starved || errno == ENOMEM || (!root && !why.text[0])) {
    json_decref(root);
    return us_err_memory(err, name, size);
  }
  if (!root) return refuse(text, size, name, &why, err);
  *ret_root = root;
  return US_OK;
}

enum us_status us_json_load(const char *path, size_t max_bytes, json_t **ret_root, struct us_err *err) {
  struct us_buffer text = {0};
  enum us_status status = us_buffer_read_file(&text, path, max_bytes, err);
  if (status == US_OK) status = us_json_parse(text.data ? text.data : "", text.size, path, ret_root, err);
  us_buffer_release(&text);
  return status;
}

char *us_json_dump(const json_t *value, size_t flags) {
  errno = 0;
  char *text = json_dumps(value, flags);
  if (errno != ENOMEM) return text;
  free(text); /* jansson 2.14 overlooks when a key could not be appended */
  return NULL;
}

char *us_json_text(const json_t *value) {
  return us_json_dump(value, JSON_COMPACT | JSON_ENCODE_ANY);
}

void us_json_set(json_t *object, const char *key, json_t *value, bool *whole) {
  if (json_object_set_new(object, key, value) != 0) *whole = false;
}

void us_json_append(json_t *array, json_t *value, bool *whole) {
  if (json_array_append_new(array, value) != 0) *whole = false;
}

bool us_json_has(const json_t *object, const char *key) {
  const json_t *value = json_object_get(object, key);
  return value && !json_is_null(value);
}

static const char *type_name(const json_t *value) {
  switch (json_typeof(value)) {
  case JSON_OBJECT:
    return "an object";
  case JSON_ARRAY:
    return "an array";
  case JSON_STRING:
    return "a string";
  case JSON_INTEGER:
    return "an integer";
  case JSON_REAL:
    return "a real number";
  case JSON_TRUE:
  case JSON_FALSE:
    return "a boolean";
  default:
    return "null";
  }
}

static enum us_status wrong_type(const json_t *value, const char *where, const char *key,
                                 const char *expected, struct us_err *err) {
  if (!value) return us_err_set(err, US_ERR_INPUT, "%s: %s: missing", where, key);
  return us_err_set(err, US_ERR_INPUT, "%s: %s: expected %s, found %s", where, key, expected,
                    type_name(value));
}

enum us_status us_json_int(const json_t *object, const char *where, const char *key, int64_t min, int64_t max,
                           int64_t *ret_value, struct us_err *err) {
  const json_t *node = json_object_get(object, key);
  if (!json_is_integer(node)) return wrong_type(node, where, key, "an integer", err);
  int64_t value = json_integer_value(node);
  if (value < min || value > max)
    return us_err_set(err, US_ERR_INPUT, "%s: %s: %lld is not in %lld to %lld", where, key, (long long)value,
                      (long long)min, (long long)max);
  *ret_value = value;
  return US_OK;
}

enum us_status us_json_num(const json_t *object, const char *where, const char *key, double min, double max,
                           double *ret_value, struct us_err *err) {
  const json_t *node = json_object_get(object, key);
  if (!json_is_number(node)) return wrong_type(node, where, key, "a number", err);
  double value = json_number_value(node);
  if (!(value >= min && value <= max))
    return us_err_set(err, US_ERR_INPUT, "%s: %s: %.10g is not in %.10g to %.10g", where, key, value, min,
                      max);
  *ret_value = value;
  return US_OK;
}

enum us_status us_json_bool(const json_t *object, const char *where, const char *key, bool *ret_value,
                            struct us_err *err) {
  const json_t *node = json_object_get(object, key);
  if (!json_is_boolean(node)) return wrong_type(node, where, key, "a boolean", err);
  *ret_value = json_is_true(node);
  return US_OK;
}

enum us_status us_json_str(const json_t *object, const char *where, const char *key, const char **ret_value,
                           struct us_err *err) {
  const json_t *node = json_object_get(object, key);
  if (!json_is_string(node)) return wrong_type(node, where, key, "a string", err);
  *ret_value = json_string_value(node);
  return US_OK;
}

enum us_status us_json_object(const json_t *object, const char *where, const char *key, json_t **ret_value,
                              struct us_err *err) {
  json_t *node = json_object_get(object, key);
  if (!json_is_object(node)) return wrong_type(node, where, key, "an object", err);
  *ret_value = node;
  return US_OK;
}

enum us_status us_json_array(const json_t *object, const char *where, const char *key, size_t max_items,
                             json_t **ret_value, struct us_err *err) {
  json_t *node = json_object_get(object, key);
  if (!json_is_array(node)) return wrong_type(node, where, key, "an array", err);
  if (json_array_size(node) > max_items)
    return us_err_set(err, US_ERR_INPUT, "%s: %s: %zu items, at most %zu are allowed", where, key,
                      json_array_size(node), max_items);
  *ret_value = node;
  return US_OK;
}

json_t *us_json_any_string(const char *bytes, size_t n) {
  struct us_buffer clean = {0};
  json_t *string = NULL;
  enum us_status status = US_OK;
  for (size_t at = 0; status == US_OK && at < n;) {
    size_t part = strnlen(bytes + at, n - at);
    status = us_utf8_repair(bytes + at, part, &clean, NULL);
    if (status == US_OK && at + part < n) status = us_buffer_add(&clean, "\xef\xbf\xbd", NULL);
    at += part + 1;
  }
  if (status == US_OK) string = json_stringn(clean.data ? clean.data : "", clean.size);
  us_buffer_release(&clean);
  return string;
}
