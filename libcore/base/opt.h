/* opt.h: one option table a tool; parsing, help, man page, completion, config file and the recorded run come from it.
 *
 *     static const struct us_opt table[] = {
 *       US_OPT_FILE("model", 'm', "FILE", "checkpoint: a Hugging Face folder or an .h5 file", .required = true),
 *       US_OPT_INT("steps", 'n', "N", "finetuning steps; 0 only quantizes", .def = "200"),
 *       US_OPT_ENUM("loss", 0, "kl|ce", "what finetuning minimizes", .def = "kl"),
 *       US_OPT_STR("prompt", 'p', "TEXT", "prompt; may be repeated", .repeat = true),
 *       US_OPT_ARG("input", "FILE", "token shards", .repeat = true),
 *       US_OPT_COMMON, US_OPT_END};
 *
 *     struct us_opts *opts;
 *     if (us_opts_parse(table, argc, argv, &opts, &err) != US_OK) return err.status;
 *     int64_t steps = us_opt_int(opts, "steps");
 *     us_opts_free(opts);
 *
 * Command line: `--name value`, `--name=value`, `-n value`, `-nvalue`, bundled flags `-qv`, `--` ends the options, `-`
 * alone is a positional. Names are never abbreviated. Of a repeated option the last value counts, unless .repeat.
 * Config file (`--config FILE`): lines `name = value`, `#` starts a comment line. Command line > config file > default.
 */
#ifndef US_BASE_OPT_H
#define US_BASE_OPT_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum us_opt_kind {
  US_OPT_KIND_END = 0,
  US_OPT_KIND_FILE,   /* a path; `-` is the tool's business */
  US_OPT_KIND_STR,    /* any text */
  US_OPT_KIND_INT,    /* decimal or 0x, with an optional K, M or G: powers of 1024 */
  US_OPT_KIND_NUM,    /* a finite number */
  US_OPT_KIND_FLAG,   /* no value; `--name=false` takes back what a config file set */
  US_OPT_KIND_ENUM,   /* one of value_name's words, which `|` separates */
  US_OPT_KIND_RULES,  /* key=value,key=value,... */
  US_OPT_KIND_DEVICE, /* cpu, cuda or cuda:N */
  US_OPT_KIND_ARG,    /* a positional, filled in table order */
  US_OPT_KIND_GROUP,  /* a heading of the help page, no option */
};

/* What a FILE is to the tool: read, or written when the work is done. */
enum us_opt_writes { US_OPT_READS = 0, US_OPT_WRITES_FILE, US_OPT_WRITES_CHECKPOINT };

struct us_opt {
  enum us_opt_kind kind;
  const char *name;       /* long name, without dashes */
  char letter;            /* short name, 0 for none */
  const char *value_name; /* how help calls the value; an ENUM's words */
  const char *help;       /* one line, lower case, no full stop */
  const char *def;        /* default as typed, NULL for none */
  double min, max;        /* INT and NUM: lowest allowed (0 unless given), highest allowed (0: no bound) */
  bool above_min;         /* min itself is refused */
  bool required;
  bool repeat; /* every value is kept; a FLAG counts */
  enum us_opt_writes writes;
};

/* Rows: the help text comes last, then any of .def, .min, .max, .above_min, .required, .repeat,
 * .writes. */
#define US_OPT_FILE(name_, letter_, value_, ...)                                                             \
  { .kind = US_OPT_KIND_FILE, .name = name_, .letter = letter_, .value_name = value_, .help = __VA_ARGS__ }
#define US_OPT_STR(name_, letter_, value_, ...)                                                              \
  { .kind = US_OPT_KIND_STR, .name = name_, .letter = letter_, .value_name = value_, .help = __VA_ARGS__ }
#define US_OPT_INT(name_, letter_, value_, ...)                                                              \
  { .kind = US_OPT_KIND_INT, .name = name_, .letter = letter_, .value_name = value_, .help = __VA_ARGS__ }
#define US_OPT_NUM(name_, letter_, value_, ...)                                                              \
  { .kind = US_OPT_KIND_NUM, .name = name_, .letter = letter_, .value_name = value_, .help = __VA_ARGS__ }
#define US_OPT_RULES(name_, letter_, value_, ...)                                                            \
  { .kind = US_OPT_KIND_RULES, .name = name_, .letter = letter_, .value_name = value_, .help = __VA_ARGS__ }
#define US_OPT_ENUM(name_, letter_, words_, ...)                                                             \
  { .kind = US_OPT_KIND_ENUM, .name = name_, .letter = letter_, .value_name = words_, .help = __VA_ARGS__ }
#define US_OPT_FLAG(name_, letter_, ...)                                                                     \
  { .kind = US_OPT_KIND_FLAG, .name = name_, .letter = letter_, .help = __VA_ARGS__ }
#define US_OPT_DEVICE(name_, letter_, ...)                                                                   \
  {                                                                                                          \
    .kind = US_OPT_KIND_DEVICE, .name = name_, .letter = letter_, .value_name = "DEVICE",                    \
    .help = __VA_ARGS__                                                                                      \
  }
#define US_OPT_ARG(name_, value_, ...)                                                                       \
  { .kind = US_OPT_KIND_ARG, .name = name_, .value_name = value_, .help = __VA_ARGS__ }
#define US_OPT_GROUP(title_)                                                                                 \
  { .kind = US_OPT_KIND_GROUP, .name = title_ }
#define US_OPT_END                                                                                           \
  { .kind = US_OPT_KIND_END }

/* What every tool calls the same. A tool that has no use for a part lists only the parts it honours. */
#define US_OPT_COMMON US_OPT_COMMON_RUN, US_OPT_COMMON_OUT, US_OPT_COMMON_TALK
#define US_OPT_COMMON_RUN                                                                                    \
  US_OPT_GROUP("Common options"), US_OPT_INT("seed", 0, "N", "seed of everything random", .def = "1"),       \
      US_OPT_DEVICE("device", 0, "where to compute: cpu, cuda or cuda:N", .def = "cpu"),                     \
      US_OPT_INT("gpus", 0, "N", "number of GPUs, from --device on", .def = "1", .min = 1, .max = 1024),     \
      US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256)
#define US_OPT_COMMON_OUT                                                                                    \
  US_OPT_GROUP("Output"), US_OPT_FLAG("dry-run", 0, "say what would be done, do nothing"),                   \
      US_OPT_FLAG("json", 0, "records as JSON lines instead of TSV"),                                        \
      US_OPT_FILE("plot", 0, "FILE.png", "draw the result", .writes = US_OPT_WRITES_FILE)
#define US_OPT_COMMON_TALK                                                                                   \
  US_OPT_GROUP("Messages and settings"), US_OPT_FLAG("quiet", 'q', "no progress, only warnings and errors"), \
      US_OPT_FLAG("verbose", 'v', "say more; twice for debugging", .repeat = true),                          \
      US_OPT_FILE("config", 0, "FILE", "read options from lines 'name = value'"),                            \
      US_OPT_FLAG("help", 'h', "print this help and exit"),                                                  \
      US_OPT_FLAG("version", 0, "print the version and exit")

struct us_opts; /* a parsed command line */

/* Parse argv[1..argc-1] against `table`, which must outlive *ret_opts. Every value is checked here, so that the getters
 * below cannot fail. With --help or --version given, required options may be missing and no config file is read.
 * US_ERR_USAGE for the command line, US_ERR_INPUT for a config file's line, US_ERR_IO when it cannot be read. */
US_CHECKED enum us_status us_opts_parse(const struct us_opt *table, int argc, char *const *argv,
                                        struct us_opts **ret_opts, struct us_err *err);
void us_opts_free(struct us_opts *opts);

/* Getters, by long name. Without value and default: NULL, 0, false. Texts belong to opts. A name that is not in the
 * table is the tool's bug: the getter returns the same and us_opts_misuse tells. */
const char *us_opt_str(struct us_opts *opts, const char *name); /* FILE STR ENUM RULES DEVICE ARG: the last */
int64_t us_opt_int(struct us_opts *opts, const char *name);     /* INT */
double us_opt_num(struct us_opts *opts, const char *name);      /* NUM, INT */
bool us_opt_flag(struct us_opts *opts, const char *name);       /* FLAG */
int us_opt_choice(struct us_opts *opts, const char *name);      /* ENUM: index of the word; -1 without */
int us_opt_device(struct us_opts *opts, const char *name);      /* DEVICE: -1 is the CPU, else the ordinal */
bool us_opt_given(struct us_opts *opts, const char *name);      /* set by command line or config file */
size_t us_opt_count(struct us_opts *opts, const char *name);    /* number of values; of -v */
const char *us_opt_nth(struct us_opts *opts, const char *name, size_t i); /* value i of a repeated option */

/* First name that a getter was asked for and the table lacks or has with another kind; NULL when all was right. */
const char *us_opts_misuse(const struct us_opts *opts);

/* The recorded run: {"steps": {"value": 200, "by": "default"}, ...}, every option but help, version and config; `by` is
 * "default", "command line" or "config". Returns malloc'd JSON text, NULL when out of memory. */
char *us_opts_record(const struct us_opts *opts);

/* Check and convert one value as option `opt` would; for values that come from elsewhere (a request, a record). */
US_CHECKED enum us_status us_opt_check(const struct us_opt *opt, const char *value, struct us_err *err);

#endif
