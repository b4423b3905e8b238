/* config.h: reading the fields of a config.json: typed, ranged, and named when they are wrong.
 *
 *     struct us_config c = {.root = json, .name = "config.json", .err = err};
 *     shape->hidden = us_config_u32(&c, "hidden_size", 1, 65536);
 *     shape->window = us_config_u32_or(&c, "sliding_window", 0, 0, 1u << 30);
 *     return c.status;                           // the first problem: "config.json: hidden_size: missing"
 *
 * Once a field was bad every further read returns its minimum or default, so that parsers read straight through.
 * Private to libcore/model.
 */
#ifndef US_MODEL_CONFIG_H
#define US_MODEL_CONFIG_H

#include "base/err.h"
#include "model/shape.h"
#include <jansson.h>

#define US_MAX_CONFIG_BYTES ((size_t)1 << 24)

struct us_config {
  const json_t *root;
  const char *name;   /* of the file, for messages */
  const char *prefix; /* path of root inside the file ("dflash_config."), or NULL */
  struct us_err *err;
  enum us_status status;
};

/* Parse text into *ret_root (an object; json_decref it), as us_json_parse does. */
US_CHECKED enum us_status us_config_parse(const char *json, size_t bytes, const char *name, json_t **ret_root,
                                          struct us_err *err);

/* The same from a file of at most US_MAX_CONFIG_BYTES. */
US_CHECKED enum us_status us_config_load(const char *path, json_t **ret_root, struct us_err *err);

/* Record the problem with a key, unless there is one already. */
void us_config_fail(struct us_config *c, const char *key, const char *format, ...) US_PRINTF(3, 4);

/* The value of a key; NULL if it is absent or null. */
const json_t *us_config_get(const struct us_config *c, const char *key);

uint32_t us_config_u32(struct us_config *c, const char *key, uint32_t min, uint32_t max);
uint32_t us_config_u32_or(struct us_config *c, const char *key, uint32_t def, uint32_t min, uint32_t max);
double us_config_real(struct us_config *c, const char *key, double min, double max);
double us_config_real_or(struct us_config *c, const char *key, double def, double min, double max);
bool us_config_bool(struct us_config *c, const char *key);
bool us_config_bool_or(struct us_config *c, const char *key, bool def);

/* A string, or def when absent. The pointer lives as long as root. */
const char *us_config_string_or(struct us_config *c, const char *key, const char *def);

/* Fail unless the key is absent, null, or this string / this integer / false. `why` says what is supported. */
void us_config_expect_string(struct us_config *c, const char *key, const char *only);
void us_config_expect_u32(struct us_config *c, const char *key, uint32_t only);
void us_config_expect_false(struct us_config *c, const char *key);

/* An array of `count` integers 0 or 1. */
void us_config_flags(struct us_config *c, const char *key, uint32_t count, uint8_t *ret_flags);

/* An array of `count` strings, each either `zero` or `one`. */
void us_config_choices(struct us_config *c, const char *key, uint32_t count, const char *zero,
                       const char *one, uint8_t *ret_flags);

/* Ascending or not, up to `max` integers of at most `limit`; returns how many. An integer alone counts as one. */
uint32_t us_config_ids(struct us_config *c, const char *key, uint32_t max, uint32_t limit, uint32_t *ret_ids);

/* int(dim * factor) as Python computes it, and the shortest decimal factor that gives rotary_dim back (0: none). */
uint32_t us_config_rotary_dim(uint32_t dim, double factor);
double us_config_rotary_factor(uint32_t dim, uint32_t rotary_dim);

/* Print an object with two spaces of indent and as few digits as give every number back; malloc'ed. Steals root. */
US_CHECKED enum us_status us_config_print(json_t *root, char **ret_json, struct us_err *err);

/* us_shape_parse and us_draft_shape_parse of what is parsed already; `name` is for messages. */
US_CHECKED enum us_status us_shape_read(const json_t *config, const char *name, struct us_shape *ret_shape,
                                        struct us_err *err);
US_CHECKED enum us_status us_draft_shape_read(const json_t *config, const char *name,
                                              struct us_draft_shape *ret_draft, struct us_err *err);

/* What us_shape_print and us_draft_shape_print print; json_decref it. */
US_CHECKED enum us_status us_shape_json(const struct us_shape *shape, json_t **ret_root, struct us_err *err);
US_CHECKED enum us_status us_draft_shape_json(const struct us_draft_shape *draft, json_t **ret_root,
                                              struct us_err *err);

#endif
