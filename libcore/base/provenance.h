/* provenance.h: where an artefact comes from; every artefact carries it as JSON.
 *
 *     struct us_provenance *p;
 *     if (us_provenance_create("qat-quant", argc, argv, options_json, seed, &p, &err) != US_OK) return err.status;
 *     us_provenance_add_parent(p, "pico.h5", sha256, "model", &err);
 *     us_provenance_set_text(p, "scale_rule", "mse", &err);
 *     char *json = us_provenance_text(p, &err);        // free(); goes into the file
 *     us_provenance_free(p);
 *
 *     us_provenance_parse(json, size, "q.h5", &p, &err);
 *     us_provenance_expect(p, "q.h5", "scale_rule", "mse", &err);   // "q.h5: scale_rule is floor, expected mse"
 *
 *     {"tool": ..., "version": ..., "revision": ..., "argv": [...], "options": {...}, "seed": 1,
 *      "parents": [{"path": ..., "sha256": ..., "kind": ...}], "fields": {...}}
 *
 * No time and no host: the same run gives the same bytes.
 */
#ifndef US_BASE_PROVENANCE_H
#define US_BASE_PROVENANCE_H

#include "base/buffer.h"
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

#define US_PROVENANCE_MAX_BYTES ((size_t)4 << 20)

struct us_provenance;

/* Of this version and revision. options_json as us_opts_record gives it, or NULL. Arguments that are not UTF-8 are kept
 * with U+FFFD for the bytes that are not. */
US_CHECKED enum us_status us_provenance_create(const char *tool, int argc, char *const *argv,
                                               const char *options_json, uint64_t seed,
                                               struct us_provenance **ret_provenance, struct us_err *err);
void us_provenance_free(struct us_provenance *provenance);

/* An artefact that this one was made from. */
US_CHECKED enum us_status us_provenance_add_parent(struct us_provenance *provenance, const char *path,
                                                   const char *sha256, const char *kind, struct us_err *err);

/* A field of the artefact's own: a text, or any JSON value. Setting it again replaces it. */
US_CHECKED enum us_status us_provenance_set_text(struct us_provenance *provenance, const char *key,
                                                 const char *text, struct us_err *err);
US_CHECKED enum us_status us_provenance_set_json(struct us_provenance *provenance, const char *key,
                                                 const char *json, struct us_err *err);

/* As one line of JSON: malloc'd. NULL: *err says why. */
char *us_provenance_text(const struct us_provenance *provenance, struct us_err *err);

/* From JSON that a file brought; `name` is for messages. Every part is checked: US_ERR_INPUT names the field. */
US_CHECKED enum us_status us_provenance_parse(const char *text, size_t size, const char *name,
                                              struct us_provenance **ret_provenance, struct us_err *err);

/* What it says; texts belong to the provenance. */
const char *us_provenance_tool(const struct us_provenance *provenance);
const char *us_provenance_version(const struct us_provenance *provenance);
const char *us_provenance_revision(const struct us_provenance *provenance);
uint64_t us_provenance_seed(const struct us_provenance *provenance);
size_t us_provenance_parents(const struct us_provenance *provenance);
const char *us_provenance_parent_path(const struct us_provenance *provenance, size_t i);
const char *us_provenance_parent_sha256(const struct us_provenance *provenance, size_t i);
const char *us_provenance_parent_kind(const struct us_provenance *provenance, size_t i);
const char *us_provenance_field(const struct us_provenance *provenance,
                                const char *key); /* NULL unless a text */

/* US_OK when field `key` is the text `expected`; else US_ERR_INPUT: "name: key is x, expected y". */
US_CHECKED enum us_status us_provenance_expect(const struct us_provenance *provenance, const char *name,
                                               const char *key, const char *expected, struct us_err *err);

/* Append one line a difference, "seed: 1, 2" or "options.steps: 200 (default), 0 (command line)", for tool, version,
 * revision, options, seed, parents (by content, not by path) and fields; argv and paths are not compared. *ret_count is
 * the number of lines. */
US_CHECKED enum us_status us_provenance_compare(const struct us_provenance *a, const struct us_provenance *b,
                                                struct us_buffer *differences, size_t *ret_count,
                                                struct us_err *err);

#endif
