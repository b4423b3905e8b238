/* config.c: typed, ranged reads of config.json fields. */
#include "model/config.h"
#include "base/json.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Hand the root over if it is an object. */
static enum us_status expect_object(json_t *root, const char *name, json_t **ret_root, struct us_err *err) {
  if (json_is_object(root)) {
    *ret_root = root;
    return US_OK;
  }
  json_decref(root);
  return us_err_set(err, US_ERR_INPUT, "%s: expected a JSON object", name);
}

enum us_status us_config_parse(const char *json, size_t bytes, const char *name, json_t **ret_root,
                               struct us_err *err) {
  json_t *root = NULL;
  *ret_root = NULL;
  enum us_status status = us_json_parse(json, bytes, name, &root, err);
  return status == US_OK ? expect_object(root, name, ret_root, err) : status;
}

enum us_status us_config_load(const char *path, json_t **ret_root, struct us_err *err) {
  json_t *root = NULL;
  *ret_root = NULL;
  enum us_status status = us_json_load(path, US_MAX_CONFIG_BYTES, &root, err);
  return status == US_OK ? expect_object(root, path, ret_root, err) : status;
}

void us_config_fail(struct us_config *c, const char *key, const char *format, ...) {
  if (c->status != US_OK) return;
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  /* Strings from the file are quoted in messages, and a message is one line. */
  for (char *at = text; *at; at++) {
    if ((unsigned char)*at < ' ' || *at == 0x7f) *at = '?';
  }
  c->status =
      us_err_set(c->err, US_ERR_INPUT, "%s: %s%s: %s", c->name, c->prefix ? c->prefix : "", key, text);
}

const json_t *us_config_get(const struct us_config *c, const char *key) {
  const json_t *value = json_object_get(c->root, key);
  return json_is_null(value) ? NULL : value;
}

static const json_t *required(struct us_config *c, const char *key) {
  const json_t *value = us_config_get(c, key);
  if (!value) us_config_fail(c, key, json_object_get(c->root, key) ? "is null" : "missing");
  return c->status == US_OK ? value : NULL;
}

static uint32_t to_u32(struct us_config *c, const char *key, const json_t *value, uint32_t min,
                       uint32_t max) {
  if (!json_is_integer(value)) {
    us_config_fail(c, key, "expected an integer");
    return min;
  }
  json_int_t n = json_integer_value(value);
  if (n < (json_int_t)min || n > (json_int_t)max) {
    us_config_fail(c, key, "%lld is outside [%u, %u]", (long long)n, min, max);
    return min;
  }
  return (uint32_t)n;
}

uint32_t us_config_u32(struct us_config *c, const char *key, uint32_t min, uint32_t max) {
  const json_t *value = required(c, key);
  return value ? to_u32(c, key, value, min, max) : min;
}

uint32_t us_config_u32_or(struct us_config *c, const char *key, uint32_t def, uint32_t min, uint32_t max) {
  const json_t *value = us_config_get(c, key);
  return value && c->status == US_OK ? to_u32(c, key, value, min, max) : def;
}

static double to_real(struct us_config *c, const char *key, const json_t *value, double min, double max) {
  if (!json_is_number(value)) {
    us_config_fail(c, key, "expected a number");
    return min;
  }
  double x = json_number_value(value);
  if (!(x >= min && x <= max)) {
    us_config_fail(c, key, "%g is outside [%g, %g]", x, min, max);
    return min;
  }
  return x;
}

double us_config_real(struct us_config *c, const char *key, double min, double max) {
  const json_t *value = required(c, key);
  return value ? to_real(c, key, value, min, max) : min;
}

double us_config_real_or(struct us_config *c, const char *key, double def, double min, double max) {
  const json_t *value = us_config_get(c, key);
  return value && c->status == US_OK ? to_real(c, key, value, min, max) : def;
}

bool us_config_bool_or(struct us_config *c, const char *key, bool def) {
  const json_t *value = us_config_get(c, key);
  if (!value) return def;
  if (!json_is_boolean(value)) us_config_fail(c, key, "expected true or false");
  return json_is_true(value);
}

bool us_config_bool(struct us_config *c, const char *key) {
  return required(c, key) ? us_config_bool_or(c, key, false) : false;
}

const char *us_config_string_or(struct us_config *c, const char *key, const char *def) {
  const json_t *value = us_config_get(c, key);
  if (!value) return def;
  if (json_is_string(value)) return json_string_value(value);
  us_config_fail(c, key, "expected a string");
  return def;
}

void us_config_expect_string(struct us_config *c, const char *key, const char *only) {
  const char *text = us_config_string_or(c, key, only);
  if (strcmp(text, only) != 0) us_config_fail(c, key, "'%.64s' is not supported, only '%s'", text, only);
}

void us_config_expect_u32(struct us_config *c, const char *key, uint32_t only) {
  uint32_t n = us_config_u32_or(c, key, only, 0, UINT32_MAX);
  if (n != only) us_config_fail(c, key, "%u is not supported, only %u", n, only);
}

void us_config_expect_false(struct us_config *c, const char *key) {
  if (us_config_bool_or(c, key, false)) us_config_fail(c, key, "true is not supported");
}

static const json_t *array_of(struct us_config *c, const char *key, uint32_t count) {
  const json_t *value = required(c, key);
  if (!value) return NULL;
  if (!json_is_array(value)) {
    us_config_fail(c, key, "expected an array");
  } else if (json_array_size(value) != count) {
    us_config_fail(c, key, "has %zu entries, expected %u (num_hidden_layers)", json_array_size(value), count);
  }
  return c->status == US_OK ? value : NULL;
}

void us_config_flags(struct us_config *c, const char *key, uint32_t count, uint8_t *ret_flags) {
  const json_t *array = array_of(c, key, count);
  for (uint32_t i = 0; array && i < count; i++) {
    const json_t *value = json_array_get(array, i);
    json_int_t n = json_is_integer(value) ? json_integer_value(value) : -1;
    if (n != 0 && n != 1) {
      us_config_fail(c, key, "entry %u is not 0 or 1", i);
      return;
    }
    ret_flags[i] = (uint8_t)n;
  }
}

void us_config_choices(struct us_config *c, const char *key, uint32_t count, const char *zero,
                       const char *one, uint8_t *ret_flags) {
  const json_t *array = array_of(c, key, count);
  for (uint32_t i = 0; array && i < count; i++) {
    const char *text = json_string_value(json_array_get(array, i));
    if (!text || (strcmp(text, zero) != 0 && strcmp(text, one) != 0)) {
      us_config_fail(c, key, "entry %u is not '%s' or '%s'", i, zero, one);
      return;
    }
    ret_flags[i] = strcmp(text, one) == 0;
  }
}

uint32_t us_config_ids(struct us_config *c, const char *key, uint32_t max, uint32_t limit,
                       uint32_t *ret_ids) {
  const json_t *value = us_config_get(c, key);
  if (!value || c->status != US_OK) return 0;
  if (json_is_integer(value)) {
    ret_ids[0] = to_u32(c, key, value, 0, limit);
    return 1;
  }
  if (!json_is_array(value)) {
    us_config_fail(c, key, "expected an integer or an array of them");
    return 0;
  }
  size_t count = json_array_size(value);
  if (count > max) {
    us_config_fail(c, key, "has %zu entries, at most %u are supported", count, max);
    return 0;
  }
  for (size_t i = 0; i < count && c->status == US_OK; i++) {
    ret_ids[i] = to_u32(c, key, json_array_get(value, i), 0, limit);
  }
  return c->status == US_OK ? (uint32_t)count : 0;
}

uint32_t us_config_rotary_dim(uint32_t dim, double factor) {
  return (uint32_t)((double)dim * factor);
}

double us_config_rotary_factor(uint32_t dim, uint32_t rotary_dim) {
  /* Rounded up at each length, as 64 of 192 is published as 0.334: a value below the ratio would truncate to 63. */
  for (double scale = 1; scale <= 1e9; scale *= 10) {
    double factor = ceil((double)rotary_dim / dim * scale) / scale;
    if (factor <= 1 && us_config_rotary_dim(dim, factor) == rotary_dim) return factor;
  }
  return 0;
}

/* Do all numbers in value survive `digits` significant digits? */
static bool survives(const json_t *value, int digits) {
  if (json_is_real(value)) {
    char text[64];
    snprintf(text, sizeof text, "%.*g", digits, json_real_value(value));
    return strtod(text, NULL) == json_real_value(value);
  }
  const char *key;
  json_t *child;
  size_t i;
  json_object_foreach((json_t *)value, key, child) if (!survives(child, digits)) return false;
  json_array_foreach(value, i, child) if (!survives(child, digits)) return false;
  return true;
}

enum us_status us_config_print(json_t *root, char **ret_json, struct us_err *err) {
  *ret_json = NULL;
  if (!root) return us_err_memory(err, "config.json", 0);
  int digits = survives(root, 15) ? 15 : 17;
  *ret_json = us_json_dump(root, JSON_INDENT(2) | JSON_REAL_PRECISION(digits));
  json_decref(root);
  return *ret_json ? US_OK : us_err_memory(err, "config.json", 0);
}
