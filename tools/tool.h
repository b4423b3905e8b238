/* tool.h: what every tool's main does: parse, help, signals, errors as text, exit codes, a checked stdout.
 *
 *     static const struct us_opt opts[] = {US_OPT_FILE("model", 'm', "FILE", "checkpoint", .required = true),
 *                                          US_OPT_COMMON, US_OPT_END};
 *     static enum us_status run(struct us_tool_run *run, struct us_err *err) {
 *       const char *model = us_opt_str(run->opts, "model");
 *       ...                                     // records on run->out, talk through run->log
 *       return us_tool_interrupted() ? us_err_set(err, US_INTERRUPTED, "interrupted") : US_OK;
 *     }
 *     static const struct us_tool tool = {.name = "us-thing", .summary = "do one thing", .opts = opts, .run = run};
 *     int main(int argc, char **argv) { return us_tool_main(&tool, argc, argv); }
 *
 * --help, --version, and the hidden --man and --completion (alone on the command line; the build makes the man page and
 * bash completion with them) are handled here. An error of status s is one line "name: message" on stderr and exit
 * code s. docs/tools.md tells how to add a tool.
 */
#ifndef US_TOOLS_TOOL_H
#define US_TOOLS_TOOL_H

#include "base/err.h"
#include "base/log.h"
#include "base/opt.h"
#include "base/provenance.h"
#include <stdbool.h>
#include <stdio.h>

/* What a tool's run is given. */
struct us_tool_run {
  struct us_opts *opts;
  const struct us_opt *table; /* that they were parsed by */
  struct us_log *log;         /* stderr; level from --quiet and --verbose */
  FILE *out;                  /* stdout, for records only; checked at the end */
  bool quiet;                 /* --quiet: no progress */
  const char *name;           /* the tool's, for provenance */
  int argc;
  char *const *argv;
};

struct us_tool {
  const char *name;
  const char *summary;     /* one line, lower case, no full stop */
  const char *description; /* paragraphs for help and man page, or NULL */
  const char *examples;    /* commands, lines starting with # explain the next; or NULL */
  const struct us_opt *opts;
  enum us_status (*run)(struct us_tool_run *run, struct us_err *err);
};

/* The whole of main. Returns the exit code. */
int us_tool_main(const struct us_tool *tool, int argc, char **argv);

/* Provenance of what this run makes: tool, version, arguments, options, seed. */
US_CHECKED enum us_status us_tool_provenance(struct us_tool_run *run, uint64_t seed,
                                             struct us_provenance **ret_provenance, struct us_err *err);

/* Hash the artefact at `path` and name it as a parent. */
US_CHECKED enum us_status us_tool_add_parent(struct us_provenance *provenance, const char *path,
                                             const char *kind, struct us_err *err);

/* Whether each file that the command line wants written (.writes in the table) can be, before work that may take hours:
 * US_ERR_IO names it. US_ERR_USAGE for `-`: standard output takes records. With --dry-run nothing is looked at. */
US_CHECKED enum us_status us_tool_check_outputs(struct us_tool_run *run, struct us_err *err);

/* True once SIGINT or SIGTERM arrived; long loops look at it between steps and end with US_INTERRUPTED. A second signal
 * ends the process at once. Can be passed to the library as its `interrupted` callback. */
bool us_tool_interrupted(void);

#endif
