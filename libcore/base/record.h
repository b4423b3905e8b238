/* record.h: the artefact record by which tools hand each other files: path, SHA-256, kind on one line.
 *
 *     us_record_emit(stdout, json, "q.h5", "model", &err);             // q.h5 <TAB> 9f86... <TAB> model
 *
 *     struct us_record target = {0};
 *     if (us_record_resolve("-", stdin, "model", &target, &err) != US_OK) return err.status;
 *     ... target.path ...
 *     us_record_release(&target);
 *
 * So `qat-quant pico.h5 -o q.h5 | dflash-train --target - -o d.h5`. The kind is a word: model, draft, tokens, trace, ...
 */
#ifndef US_BASE_RECORD_H
#define US_BASE_RECORD_H

#include "base/err.h"
#include "base/sha256.h"
#include <stdbool.h>
#include <stdio.h>

struct us_record {
  char *path;
  char sha256[US_SHA256_HEX]; /* "" when not computed */
  char *kind;                 /* "" when not known */
};

/* SHA-256 of an artefact: of a file its content; of a folder the listing "digest  name\n" of its files in byte order of
 * names, as `sha256sum *` prints in the C locale. Files of a folder in it (a model's drafter) are "folder/name", where that
 * folder's name stands; what begins with a dot is left out. US_ERR_IO; US_ERR_INPUT for a pipe or device, which may have no end. */
US_CHECKED enum us_status us_record_hash(const char *path, char ret_hex[US_SHA256_HEX], struct us_err *err);

/* Hash `path` and print its record: TSV, or {"path": ..., "sha256": ..., "kind": ...}. Flushes. */
US_CHECKED enum us_status us_record_emit(FILE *out, bool json, const char *path, const char *kind,
                                         struct us_err *err);

/* Read one line (either form, without or with its newline). US_ERR_INPUT says what is wrong. */
US_CHECKED enum us_status us_record_parse(const char *line, struct us_record *ret_record, struct us_err *err);

/* The artefact that an argument names. A path: itself, neither opened nor hashed. "-": the next line of `in` is a record;
 * its file must exist and have the recorded hash (US_ERR_INPUT), and its kind be `kind` unless that is NULL. US_ERR_USAGE
 * when `in` is a terminal. Release the result. */
US_CHECKED enum us_status us_record_resolve(const char *argument, FILE *in, const char *kind,
                                            struct us_record *ret_record, struct us_err *err);

void us_record_release(struct us_record *record);

#endif
