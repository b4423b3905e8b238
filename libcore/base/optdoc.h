/* optdoc.h: the pages made from an option table: help, man page, bash completion.
 *
 *     struct us_optdoc doc = {.tool = "qat-quant", .summary = "quantize a model's experts to MXFP4", .table = table};
 *     us_optdoc_help(&doc, stdout);
 *
 * Texts are plain: lines may be of any length, an empty line starts a paragraph. No function reports write errors:
 * check the stream.
 */
#ifndef US_BASE_OPTDOC_H
#define US_BASE_OPTDOC_H

#include "base/opt.h"
#include <stdio.h>

struct us_optdoc {
  const char *tool;        /* name of the command */
  const char *summary;     /* what it does: one line, lower case, no full stop */
  const char *description; /* paragraphs, or NULL */
  const char *examples;    /* one command a line, lines starting with # explain the next; or NULL */
  const char *version;
  const struct us_opt *table;
};

void us_optdoc_usage(const struct us_optdoc *doc, FILE *out); /* the one-line usage */
void us_optdoc_help(const struct us_optdoc *doc, FILE *out);  /* --help, 79 columns */
void us_optdoc_man(const struct us_optdoc *doc, FILE *out);   /* mdoc(7), section 1 */
void us_optdoc_completion(const struct us_optdoc *doc, FILE *out);

#endif
