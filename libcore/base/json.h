/* json.h: reading JSON that others wrote; a thin layer over jansson that says where it is wrong.
 *
 *     json_t *root;
 *     if (us_json_load("config.json", 1 << 20, &root, &err) != US_OK) return err.status;    // line and column
 *     status = us_json_int(root, "config.json", "hidden_size", 1, 65536, &hidden, &err);    // file and field
 *     json_decref(root);
 *
 * A message reads "config.json: hidden_size: expected an integer, found a string". Everything wrong with the content is
 * US_ERR_INPUT. Texts and nodes belong to the root.
 */
#ifndef US_BASE_JSON_H
#define US_BASE_JSON_H

#include "base/err.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define US_JSON_DEPTH_MAX 64

/* Parse `size` bytes; `name` is for messages. Duplicate keys, a second value, NUL bytes and nesting beyond
 * US_JSON_DEPTH_MAX are refused. Sets *ret_root; free with json_decref. */
US_CHECKED enum us_status us_json_parse(const char *text, size_t size, const char *name, json_t **ret_root,
                                        struct us_err *err);

/* Parse a file of at most max_bytes; the message begins with the path. */
US_CHECKED enum us_status us_json_load(const char *path, size_t max_bytes, json_t **ret_root,
                                       struct us_err *err);

/* Text for a value: malloc'd; NULL when out of memory, where json_dumps may leave something out. Keys keep their order. */
char *us_json_text(const json_t *value);               /* on one line */
char *us_json_dump(const json_t *value, size_t flags); /* as json_dumps */

/* Set a member, append an item; `value` is stolen. What could not be added makes *whole false, and it stays so: look at it once
 * at the end. A NULL value, or object or array, is a failure to make it. */
void us_json_set(json_t *object, const char *key, json_t *value, bool *whole);
void us_json_append(json_t *array, json_t *value, bool *whole);

/* Present and not null. */
bool us_json_has(const json_t *object, const char *key);

/* A field that must be there, of its type and inside [min, max]. `where` begins the message: a file, or file and path. An
 * integer is accepted as a number; nothing else is converted. */
US_CHECKED enum us_status us_json_int(const json_t *object, const char *where, const char *key, int64_t min,
                                      int64_t max, int64_t *ret_value, struct us_err *err);
US_CHECKED enum us_status us_json_num(const json_t *object, const char *where, const char *key, double min,
                                      double max, double *ret_value, struct us_err *err);
US_CHECKED enum us_status us_json_bool(const json_t *object, const char *where, const char *key,
                                       bool *ret_value, struct us_err *err);
US_CHECKED enum us_status us_json_str(const json_t *object, const char *where, const char *key,
                                      const char **ret_value, struct us_err *err);
US_CHECKED enum us_status us_json_object(const json_t *object, const char *where, const char *key,
                                         json_t **ret_value, struct us_err *err);
/* An array of at most max_items. */
US_CHECKED enum us_status us_json_array(const json_t *object, const char *where, const char *key,
                                        size_t max_items, json_t **ret_value, struct us_err *err);

/* Any bytes as a JSON string: what is not UTF-8, and NUL, which many readers refuse, become U+FFFD. NULL without memory. */
json_t *us_json_any_string(const char *bytes, size_t n);

#endif
