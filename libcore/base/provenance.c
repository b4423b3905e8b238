/* provenance.c: building, reading and comparing the origin of an artefact. */
#include "base/provenance.h"
#include "base/json.h"
#include "base/sha256.h"
#include "base/version.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PARENTS_MAX   1024
#define ARGUMENTS_MAX 65536

struct us_provenance {
  json_t *root; /* checked: every key below is present and of its type */
};

static enum us_status no_memory(struct us_err *err) {
  return us_err_memory(err, "provenance", 0);
}

static json_t *arguments(int argc, char *const *argv) {
  json_t *array = json_array();
  for (int i = 0; array && i < argc; i++)
    if (json_array_append_new(array, us_json_any_string(argv[i], strlen(argv[i]))) != 0) {
      json_decref(array);
      return NULL;
    }
  return array;
}

enum us_status us_provenance_create(const char *tool, int argc, char *const *argv, const char *options_json,
                                    uint64_t seed, struct us_provenance **ret_provenance,
                                    struct us_err *err) {
  json_t *options = NULL;
  if (options_json) {
    enum us_status status = us_json_parse(options_json, strlen(options_json), "options", &options, err);
    if (status != US_OK) return status;
  } else
    options = json_object();
  struct us_provenance *p = calloc(1, sizeof *p);
  json_t *root = json_object();
  bool ok = json_object_set_new(root, "tool", us_json_any_string(tool, strlen(tool))) == 0;
  ok = ok && json_object_set_new(root, "version", json_string(us_version())) == 0;
  ok = ok && json_object_set_new(root, "revision", json_string(us_revision())) == 0;
  ok = ok && json_object_set_new(root, "argv", arguments(argc, argv)) == 0;
  ok = ok && json_object_set(root, "options", options) == 0;
  ok = ok && json_object_set_new(root, "seed", json_integer((json_int_t)seed)) == 0;
  ok = ok && json_object_set_new(root, "parents", json_array()) == 0;
  ok = ok && json_object_set_new(root, "fields", json_object()) == 0;
  json_decref(options);
  if (!ok || !p) {
    json_decref(root);
    free(p);
    return no_memory(err);
  }
  p->root = root;
  *ret_provenance = p;
  return US_OK;
}

void us_provenance_free(struct us_provenance *provenance) {
  if (!provenance) return;
  json_decref(provenance->root);
  free(provenance);
}

enum us_status us_provenance_add_parent(struct us_provenance *provenance, const char *path,
                                        const char *sha256, const char *kind, struct us_err *err) {
  json_t *parent = json_object();
  bool ok = json_object_set_new(parent, "path", us_json_any_string(path, strlen(path))) == 0;
  ok = ok && json_object_set_new(parent, "sha256", json_string(sha256)) == 0;
  ok = ok && json_object_set_new(parent, "kind", json_string(kind)) == 0;
  ok = ok && json_array_append(json_object_get(provenance->root, "parents"), parent) == 0;
  json_decref(parent);
  return ok ? US_OK : no_memory(err);
}

static enum us_status set_field(struct us_provenance *provenance, const char *key, json_t *value,
                                struct us_err *err) {
  if (json_object_set_new(json_object_get(provenance->root, "fields"), key, value) == 0) return US_OK;
  return no_memory(err);
}

enum us_status us_provenance_set_text(struct us_provenance *provenance, const char *key, const char *text,
                                      struct us_err *err) {
  return set_field(provenance, key, us_json_any_string(text, strlen(text)), err);
}

enum us_status us_provenance_set_json(struct us_provenance *provenance, const char *key, const char *json,
                                      struct us_err *err) {
  json_t *value;
  enum us_status status = us_json_parse(json, strlen(json), key, &value, err);
  return status == US_OK ? set_field(provenance, key, value, err) : status;
}

char *us_provenance_text(const struct us_provenance *provenance, struct us_err *err) {
  char *text = us_json_text(provenance->root);
  if (!text) (void)no_memory(err);
  return text;
}

/* --- reading --- */

static enum us_status check_parents(const json_t *root, const char *name, struct us_err *err) {
  json_t *parents;
  enum us_status status = us_json_array(root, name, "parents", PARENTS_MAX, &parents, err);
  for (size_t i = 0; status == US_OK && i < json_array_size(parents); i++) {
    const json_t *parent = json_array_get(parents, i);
    char where[256];
    snprintf(where, sizeof where, "%.200s: parents[%zu]", name, i);
    const char *text, *sha256 = "";
    status = us_json_str(parent, where, "path", &text, err);
    if (status == US_OK) status = us_json_str(parent, where, "kind", &text, err);
    if (status == US_OK) status = us_json_str(parent, where, "sha256", &sha256, err);
    if (status == US_OK && *sha256 && !us_sha256_is_hex(sha256))
      status = us_err_set(err, US_ERR_INPUT, "%s: sha256: not 64 hexadecimal digits", where);
  }
  return status;
}

static enum us_status check_root(const json_t *root, const char *name, struct us_err *err) {
  if (!json_is_object(root)) return us_err_set(err, US_ERR_INPUT, "%s: provenance is not an object", name);
  const char *text;
  json_t *node;
  int64_t seed;
  enum us_status status = us_json_str(root, name, "tool", &text, err);
  if (status == US_OK) status = us_json_str(root, name, "version", &text, err);
  if (status == US_OK) status = us_json_str(root, name, "revision", &text, err);
  if (status == US_OK) status = us_json_array(root, name, "argv", ARGUMENTS_MAX, &node, err);
  for (size_t i = 0; status == US_OK && i < json_array_size(node); i++)
    if (!json_is_string(json_array_get(node, i)))
      status = us_err_set(err, US_ERR_INPUT, "%s: argv[%zu]: expected a string", name, i);
  if (status == US_OK) status = us_json_object(root, name, "options", &node, err);
  if (status == US_OK) status = us_json_int(root, name, "seed", INT64_MIN, INT64_MAX, &seed, err);
  if (status == US_OK) status = us_json_object(root, name, "fields", &node, err);
  return status == US_OK ? check_parents(root, name, err) : status;
}

enum us_status us_provenance_parse(const char *text, size_t size, const char *name,
                                   struct us_provenance **ret_provenance, struct us_err *err) {
  if (size > US_PROVENANCE_MAX_BYTES)
    return us_err_set(err, US_ERR_INPUT, "%s: provenance of %zu bytes is too large", name, size);
  json_t *root;
  enum us_status status = us_json_parse(text, size, name, &root, err);
  if (status != US_OK) return status;
  status = check_root(root, name, err);
  struct us_provenance *p = status == US_OK ? calloc(1, sizeof *p) : NULL;
  if (!p) {
    json_decref(root);
    return status == US_OK ? no_memory(err) : status;
  }
  p->root = root;
  *ret_provenance = p;
  return US_OK;
}

static const char *text_of(const struct us_provenance *provenance, const char *key) {
  return json_string_value(json_object_get(provenance->root, key));
}

const char *us_provenance_tool(const struct us_provenance *provenance) {
  return text_of(provenance, "tool");
}
const char *us_provenance_version(const struct us_provenance *provenance) {
  return text_of(provenance, "version");
}
const char *us_provenance_revision(const struct us_provenance *provenance) {
  return text_of(provenance, "revision");
}

uint64_t us_provenance_seed(const struct us_provenance *provenance) {
  return (uint64_t)json_integer_value(json_object_get(provenance->root, "seed"));
}

size_t us_provenance_parents(const struct us_provenance *provenance) {
  return json_array_size(json_object_get(provenance->root, "parents"));
}

static const char *parent_text(const struct us_provenance *provenance, size_t i, const char *key) {
  return json_string_value(
      json_object_get(json_array_get(json_object_get(provenance->root, "parents"), i), key));
}

const char *us_provenance_parent_path(const struct us_provenance *p, size_t i) {
  return parent_text(p, i, "path");
}
const char *us_provenance_parent_sha256(const struct us_provenance *p, size_t i) {
  return parent_text(p, i, "sha256");
}
const char *us_provenance_parent_kind(const struct us_provenance *p, size_t i) {
  return parent_text(p, i, "kind");
}

const char *us_provenance_field(const struct us_provenance *provenance, const char *key) {
  return json_string_value(json_object_get(json_object_get(provenance->root, "fields"), key));
}

enum us_status us_provenance_expect(const struct us_provenance *provenance, const char *name, const char *key,
                                    const char *expected, struct us_err *err) {
  const char *found = us_provenance_field(provenance, key);
  if (found && strcmp(found, expected) == 0) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s: %s is %s, expected %s", name, key, found ? found : "not given",
                    expected);
}

/* --- comparing --- */

/* Differences found so far. */
struct report {
  struct us_buffer *lines;
  size_t count;
  enum us_status status;
  struct us_err *err;
};

/* A value for people: texts bare, an option as value (by), a parent as kind and hash. */
static char *show(const json_t *value) {
  if (!value) return strdup("not given");
  if (json_is_string(value)) return strdup(json_string_value(value));
  const json_t *by = json_object_get(value, "by"), *inner = json_object_get(value, "value");
  if (!json_is_string(by) || !inner) return us_json_text(value); /* a file may have them of any type */
  char *text = us_json_text(inner), *both = NULL;
  if (text && asprintf(&both, "%s (%s)", text, json_string_value(by)) < 0) both = NULL;
  free(text);
  return both;
}

static void differ(struct report *report, const char *prefix, const char *key, const json_t *a,
                   const json_t *b) {
  char *left = show(a), *right = show(b), *line = NULL;
  if (!left || !right || asprintf(&line, "%s%s: %s, %s\n", prefix, key, left, right) < 0) {
    line = NULL;
    report->status = no_memory(report->err);
  }
  if (line) report->status = us_buffer_add(report->lines, line, report->err);
  report->count++;
  free(left);
  free(right);
  free(line);
}

/* An option's value counts, not who set it. */
static bool same(const json_t *a, const json_t *b) {
  const json_t *left = json_object_get(a, "value"), *right = json_object_get(b, "value");
  if (left && right) return json_equal(left, right) != 0;
  return a && b && json_equal(a, b) != 0;
}

static void compare_objects(struct report *report, const char *prefix, json_t *a, json_t *b) {
  const char *key;
  json_t *value;
  json_object_foreach(a, key, value) {
    const json_t *other = json_object_get(b, key);
    if (report->status == US_OK && !same(value, other)) differ(report, prefix, key, value, other);
  }
  json_object_foreach(b, key, value) {
    if (report->status == US_OK && !json_object_get(a, key)) differ(report, prefix, key, NULL, value);
  }
}

static void compare_parents(struct report *report, const json_t *a, const json_t *b) {
  size_t n = json_array_size(a) > json_array_size(b) ? json_array_size(a) : json_array_size(b);
  for (size_t i = 0; report->status == US_OK && i < n; i++) {
    const json_t *left = json_array_get(a, i), *right = json_array_get(b, i);
    char key[32];
    snprintf(key, sizeof key, "parents[%zu]", i);
    if (!json_equal(json_object_get(left, "sha256"), json_object_get(right, "sha256")) ||
        !json_equal(json_object_get(left, "kind"), json_object_get(right, "kind")))
      differ(report, "", key, left, right);
  }
}

enum us_status us_provenance_compare(const struct us_provenance *a, const struct us_provenance *b,
                                     struct us_buffer *differences, size_t *ret_count, struct us_err *err) {
  static const char *const plain[] = {"tool", "version", "revision", "seed"};
  struct report report = {.lines = differences, .err = err, .status = US_OK};
  for (size_t i = 0; i < sizeof plain / sizeof *plain && report.status == US_OK; i++) {
    const json_t *left = json_object_get(a->root, plain[i]), *right = json_object_get(b->root, plain[i]);
    if (!json_equal(left, right)) differ(&report, "", plain[i], left, right);
  }
  compare_objects(&report, "options.", json_object_get(a->root, "options"),
                  json_object_get(b->root, "options"));
  compare_parents(&report, json_object_get(a->root, "parents"), json_object_get(b->root, "parents"));
  compare_objects(&report, "", json_object_get(a->root, "fields"), json_object_get(b->root, "fields"));
  *ret_count = report.count;
  return report.status;
}
