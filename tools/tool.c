/* tool.c: what every tool's main does. */
#include "tools/tool.h"
#include "base/atomic.h"
#include "base/optdoc.h"
#include "base/record.h"
#include "base/version.h"
#include "model/checkpoint.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXIT_SIGPIPE 141 /* 128 + SIGPIPE: what the shell reports for a reader that left */

static volatile sig_atomic_t interrupted_flag;

static void on_signal(int signal_number) {
  (void)signal_number;
  interrupted_flag = 1;
}

bool us_tool_interrupted(void) {
  return interrupted_flag != 0;
}

/* SIGINT and SIGTERM set a flag once; then the default action is back. A reader that left ends the tool quietly. */
static void install_signals(void) {
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
  signal(SIGPIPE, SIG_DFL);
}

static void print_error(const char *name, const char *message) {
  char clean[US_ERR_MESSAGE_MAX];
  us_log_clean(message, clean, sizeof clean);
  fflush(stdout);
  fprintf(stderr, "%s: %s\n", name, clean);
}

/* Flush and close stdout: a full disk often shows only here. Returns the exit code, `status` if all went well. */
static int close_stdout(const char *name, int status) {
  bool failed = ferror(stdout) != 0;
  if (failed)
    fputc('\n', stdout); /* the reason of an earlier failure is lost: one more byte asks for it again */
  errno = 0;
  failed = fclose(stdout) != 0 || failed;
  if (!failed || errno == EBADF) return status; /* EBADF: started without a stdout */
  if (errno == EPIPE) return status ? status : EXIT_SIGPIPE;
  if (status == US_ERR_IO) return status; /* the tool said so */
  char message[256];
  snprintf(message, sizeof message, "cannot write standard output%s%s", errno ? ": " : "",
           errno ? strerror(errno) : "");
  fprintf(stderr, "%s: %s\n", name, message);
  return status ? status : US_ERR_IO;
}

/* The words that print a page instead of running; they stand alone on the command line. */
static bool print_page(const struct us_optdoc *doc, int argc, char *const *argv) {
  if (argc != 2) return false;
  if (strcmp(argv[1], "--man") == 0)
    us_optdoc_man(doc, stdout);
  else if (strcmp(argv[1], "--completion") == 0)
    us_optdoc_completion(doc, stdout);
  else
    return false;
  return true;
}

static bool has_flag(const struct us_tool *tool, struct us_opts *opts, const char *name) {
  for (const struct us_opt *opt = tool->opts; opt->kind; opt++)
    if (opt->kind == US_OPT_KIND_FLAG && strcmp(opt->name, name) == 0) return us_opt_flag(opts, name);
  return false;
}

static size_t verbosity(const struct us_tool *tool, struct us_opts *opts) {
  return has_flag(tool, opts, "verbose") ? us_opt_count(opts, "verbose") : 0;
}

enum us_status us_tool_provenance(struct us_tool_run *run, uint64_t seed,
                                  struct us_provenance **ret_provenance, struct us_err *err) {
  char *options = us_opts_record(run->opts);
  if (!options) return us_err_memory(err, "options", 0);
  enum us_status status =
      us_provenance_create(run->name, run->argc, run->argv, options, seed, ret_provenance, err);
  free(options);
  return status;
}

enum us_status us_tool_add_parent(struct us_provenance *provenance, const char *path, const char *kind,
                                  struct us_err *err) {
  char hex[US_SHA256_HEX];
  enum us_status status = us_record_hash(path, hex, err);
  return status == US_OK ? us_provenance_add_parent(provenance, path, hex, kind, err) : status;
}

static enum us_status check_output(const struct us_opt *opt, const char *path, struct us_err *err) {
  struct stat info;
  if (strcmp(path, "-") == 0)
    return us_err_set(err, US_ERR_USAGE, "--%s: '-' is no file: standard output takes records alone",
                      opt->name);
  if (opt->writes == US_OPT_WRITES_CHECKPOINT) return us_checkpoint_try(path, err);
  if (stat(path, &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode))
    return US_OK; /* /dev/stderr */
  struct us_atomic out;
  enum us_status status = us_atomic_open(path, &out, err);
  if (status == US_OK) us_atomic_abandon(&out);
  return status;
}

enum us_status us_tool_check_outputs(struct us_tool_run *run, struct us_err *err) {
  enum us_status status = US_OK;
  for (const struct us_opt *opt = run->table; opt->kind; opt++)
    if (opt->kind == US_OPT_KIND_FLAG && strcmp(opt->name, "dry-run") == 0 &&
        us_opt_flag(run->opts, opt->name))
      return US_OK;
  for (const struct us_opt *opt = run->table; opt->kind && status == US_OK; opt++)
    if (opt->writes && us_opt_given(run->opts, opt->name))
      status = check_output(opt, us_opt_str(run->opts, opt->name), err);
  return status;
}

static enum us_status run_tool(const struct us_tool *tool, struct us_opts *opts, int argc, char *const *argv,
                               struct us_err *err) {
  bool quiet = has_flag(tool, opts, "quiet");
  size_t verbose = verbosity(tool, opts);
  enum us_log_level level = quiet          ? US_LOG_WARNING
                            : verbose >= 2 ? US_LOG_DEBUG
                            : verbose == 1 ? US_LOG_INFO
                                           : US_LOG_NOTICE;
  struct us_log log = {.out = stderr, .level = level, .name = tool->name};
  struct us_tool_run run = {.opts = opts,
                            .table = tool->opts,
                            .log = &log,
                            .out = stdout,
                            .quiet = quiet,
                            .name = tool->name,
                            .argc = argc,
                            .argv = argv};
  enum us_status status = tool->run(&run, err);
  const char *misuse = us_opts_misuse(opts);
  if (status == US_OK && misuse)
    status = us_err_set(err, US_ERR_CHECK, "bug: the option table has no '%s' of the kind asked for", misuse);
  return status;
}

int us_tool_main(const struct us_tool *tool, int argc, char **argv) {
  struct us_optdoc doc = {.tool = tool->name,
                          .summary = tool->summary,
                          .description = tool->description,
                          .examples = tool->examples,
                          .version = us_version(),
                          .table = tool->opts};
  install_signals();
  /* A help page fits, so that a full disk shows at the end, where its reason is still known. */
  static char buffer[1 << 16];
  if (!isatty(fileno(stdout))) setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
  if (print_page(&doc, argc, argv)) return close_stdout(tool->name, 0);
  struct us_err err = {0};
  struct us_opts *opts = NULL;
  enum us_status status = us_opts_parse(tool->opts, argc, argv, &opts, &err);
  if (status == US_ERR_USAGE) {
    print_error(tool->name, err.message);
    fprintf(stderr, "try '%s --help'\n", tool->name);
    return close_stdout(tool->name, status);
  }
  if (status == US_OK && has_flag(tool, opts, "help"))
    us_optdoc_help(&doc, stdout);
  else if (status == US_OK && has_flag(tool, opts, "version"))
    fprintf(stdout, "%s %s (%s)\n", tool->name, us_version(), us_revision());
  else if (status == US_OK)
    status = run_tool(tool, opts, argc, argv, &err);
  us_opts_free(opts);
  if (status != US_OK) print_error(tool->name, err.message[0] ? err.message : "failed without a message");
  return close_stdout(tool->name, status);
}
