/* opt.c: the option table.
 *
 *   1. Slots: what each row was given
 *   2. Command line
 *   3. Config file
 *   4. Getters
 *   5. The recorded run
 */
#include "base/opt.h"
#include "base/json.h"
#include "base/opt_value.h"
#include "base/suggest.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum source { SOURCE_NONE, SOURCE_DEFAULT, SOURCE_CONFIG, SOURCE_COMMAND };

struct slot {
  char **values;
  size_t count;
  enum source source;
};

struct us_opts {
  const struct us_opt *table;
  size_t rows;
  struct slot *slots; /* (rows) */
  const char *misuse;
};

/* --- 1. Slots: what each row was given --- */

static bool is_option(const struct us_opt *opt) {
  return opt->kind != US_OPT_KIND_ARG && opt->kind != US_OPT_KIND_GROUP && opt->kind != US_OPT_KIND_END;
}

static void clear_slot(struct slot *slot) {
  for (size_t i = 0; i < slot->count; i++) free(slot->values[i]);
  free(slot->values);
  *slot = (struct slot){0};
}

/* Give row `row` a value that us_opt_check accepted. A stronger source replaces what a weaker one gave. */
static enum us_status give(struct us_opts *opts, size_t row, const char *value, enum source source,
                           struct us_err *err) {
  struct slot *slot = &opts->slots[row];
  const struct us_opt *opt = &opts->table[row];
  bool takes_back = opt->kind == US_OPT_KIND_FLAG && us_opt_value_is_false(value);
  if (slot->source != source || !opt->repeat || takes_back) clear_slot(slot);
  slot->source = source;
  if (takes_back) return US_OK;
  char **values = realloc(slot->values, (slot->count + 1) * sizeof *values);
  if (!values) return us_err_memory(err, "options", (slot->count + 1) * sizeof *values);
  slot->values = values;
  if (!(values[slot->count] = strdup(value))) return us_err_memory(err, "options", strlen(value) + 1);
  slot->count++;
  return US_OK;
}

static int find_name(const struct us_opts *opts, const char *name, size_t length) {
  for (size_t i = 0; i < opts->rows; i++)
    if (is_option(&opts->table[i]) && strlen(opts->table[i].name) == length &&
        strncmp(opts->table[i].name, name, length) == 0)
      return (int)i;
  return -1;
}

static int find_letter(const struct us_opts *opts, char letter) {
  for (size_t i = 0; i < opts->rows; i++)
    if (is_option(&opts->table[i]) && opts->table[i].letter == letter) return (int)i;
  return -1;
}

static enum us_status unknown_option(const struct us_opts *opts, const char *name, size_t length,
                                     enum us_status status, struct us_err *err) {
  char word[128];
  snprintf(word, sizeof word, "%.*s", (int)(length < 120 ? length : 120), name);
  const char *names[256];
  size_t n = 0;
  for (size_t i = 0; i < opts->rows && n < 256; i++)
    if (is_option(&opts->table[i])) names[n++] = opts->table[i].name;
  const char *near = us_suggest(word, names, n);
  const char *dashes = status == US_ERR_USAGE ? "--" : "";
  if (!near) return us_err_set(err, status, "unknown option '%s%s'", dashes, word);
  return us_err_set(err, status, "unknown option '%s%s'; did you mean '%s%s'?", dashes, word, dashes, near);
}

/* --- 2. Command line --- */

/* The words still to be read, and the next positional's row. */
struct reader {
  struct us_opts *opts;
  char *const *argv;
  int argc, next;
  size_t arg_row;
};

static enum us_status give_checked(struct us_opts *opts, size_t row, const char *value, struct us_err *err) {
  const struct us_opt *opt = &opts->table[row];
  if (us_opt_check(opt, value, err) != US_OK)
    return err ? us_err_prefix(err, opt->kind == US_OPT_KIND_ARG ? "argument %s" : "option '--%s'",
                               opt->kind == US_OPT_KIND_ARG ? opt->value_name : opt->name)
               : US_ERR_USAGE;
  return give(opts, row, value, SOURCE_COMMAND, err);
}

/* An option's value is `attached` or else the next word. A word that looks like a long option is not taken:
 * it is nearly always a forgotten value, and --name=--value says the rest. */
static enum us_status take_value(struct reader *reader, size_t row, const char *attached,
                                 struct us_err *err) {
  const struct us_opt *opt = &reader->opts->table[row];
  if (opt->kind == US_OPT_KIND_FLAG && !attached) return give_checked(reader->opts, row, "true", err);
  if (attached) return give_checked(reader->opts, row, attached, err);
  const char *word = reader->next < reader->argc ? reader->argv[reader->next] : NULL;
  if (!word || strncmp(word, "--", 2) == 0)
    return us_err_set(err, US_ERR_USAGE, "option '--%s' needs a value, %s", opt->name, opt->value_name);
  reader->next++;
  return give_checked(reader->opts, row, word, err);
}

static enum us_status read_long(struct reader *reader, const char *word, struct us_err *err) {
  size_t length = strcspn(word, "=");
  int row = find_name(reader->opts, word, length);
  if (row < 0) return unknown_option(reader->opts, word, length, US_ERR_USAGE, err);
  return take_value(reader, (size_t)row, word[length] ? word + length + 1 : NULL, err);
}

static enum us_status read_letters(struct reader *reader, const char *letters, struct us_err *err) {
  for (; *letters; letters++) {
    int row = find_letter(reader->opts, *letters);
    if (row < 0) return us_err_set(err, US_ERR_USAGE, "unknown option '-%c'", *letters);
    if (reader->opts->table[row].kind != US_OPT_KIND_FLAG)
      return take_value(reader, (size_t)row, letters[1] ? letters + 1 : NULL, err);
    if (take_value(reader, (size_t)row, NULL, err) != US_OK) return err ? err->status : US_ERR_MEMORY;
  }
  return US_OK;
}

static enum us_status read_arg(struct reader *reader, const char *word, struct us_err *err) {
  struct us_opts *opts = reader->opts;
  size_t row = reader->arg_row;
  while (row < opts->rows && opts->table[row].kind != US_OPT_KIND_ARG) row++;
  if (row == opts->rows) return us_err_set(err, US_ERR_USAGE, "unexpected argument '%s'", word);
  reader->arg_row = opts->table[row].repeat ? row : row + 1;
  return give_checked(opts, row, word, err);
}

static enum us_status read_command_line(struct us_opts *opts, int argc, char *const *argv,
                                        struct us_err *err) {
  struct reader reader = {.opts = opts, .argv = argv, .argc = argc, .next = 1};
  bool ended = false;
  while (reader.next < argc) {
    const char *word = argv[reader.next++];
    enum us_status status = US_OK;
    if (!ended && strcmp(word, "--") == 0)
      ended = true;
    else if (!ended && strncmp(word, "--", 2) == 0)
      status = read_long(&reader, word + 2, err);
    else if (!ended && word[0] == '-' && word[1])
      status = read_letters(&reader, word + 1, err);
    else
      status = read_arg(&reader, word, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* --- 3. Config file --- */

static char *trim(char *text) {
  while (*text == ' ' || *text == '\t') text++;
  size_t length = strlen(text);
  while (length && strchr(" \t\r\n", text[length - 1])) text[--length] = 0;
  return text;
}

static enum us_status read_config_line(struct us_opts *opts, char *line, struct us_err *err) {
  char *text = trim(line);
  if (!*text || *text == '#') return US_OK;
  char *equals = strchr(text, '=');
  if (!equals) return us_err_set(err, US_ERR_INPUT, "expected 'name = value'");
  *equals = 0;
  char *name = trim(text), *value = trim(equals + 1);
  int row = find_name(opts, name, strlen(name));
  if (row < 0) return unknown_option(opts, name, strlen(name), US_ERR_INPUT, err);
  if (!strcmp(name, "config") || !strcmp(name, "help") || !strcmp(name, "version"))
    return us_err_set(err, US_ERR_INPUT, "'%s' cannot be set in a config file", name);
  if (opts->slots[row].source == SOURCE_COMMAND) return US_OK;
  struct us_err why = {0};
  if (us_opt_check(&opts->table[row], value, &why) != US_OK)
    return us_err_set(err, US_ERR_INPUT, "%s: %s", name, why.message);
  return give(opts, (size_t)row, value, SOURCE_CONFIG, err);
}

static enum us_status read_config(struct us_opts *opts, const char *path, struct us_err *err) {
  FILE *file = fopen(path, "re");
  if (!file) return us_err_errno(err, US_ERR_IO, "cannot open '%s'", path);
  char *line = NULL;
  size_t capacity = 0;
  enum us_status status = US_OK;
  for (int number = 1; status == US_OK && (errno = 0, getline(&line, &capacity, file)) >= 0; number++) {
    struct us_err why = {0};
    status = read_config_line(opts, line, &why);
    if (status != US_OK) us_err_set(err, status, "%s: line %d: %s", path, number, why.message);
  }
  if (status == US_OK && (ferror(file) || errno))
    status = us_err_errno(err, US_ERR_IO, "cannot read '%s'", path);
  free(line);
  fclose(file);
  return status;
}

/* --- 4. Getters --- */

static enum us_status fill_defaults(struct us_opts *opts, bool excused, struct us_err *err) {
  for (size_t i = 0; i < opts->rows; i++) {
    const struct us_opt *opt = &opts->table[i];
    if (opt->kind == US_OPT_KIND_GROUP || opts->slots[i].source != SOURCE_NONE) continue;
    if (opt->required && !excused) {
      if (opt->kind == US_OPT_KIND_ARG)
        return us_err_set(err, US_ERR_USAGE, "missing argument %s", opt->value_name);
      return us_err_set(err, US_ERR_USAGE, "missing option '--%s %s'", opt->name, opt->value_name);
    }
    if (!opt->def) continue;
    if (us_opt_check(opt, opt->def, err) != US_OK)
      return err ? us_err_prefix(err, "default of '--%s'", opt->name) : US_ERR_USAGE;
    enum us_status status = give(opts, i, opt->def, SOURCE_DEFAULT, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static bool flag_of(const struct us_opts *opts, const char *name) {
  int row = find_name(opts, name, strlen(name));
  return row >= 0 && opts->slots[row].count > 0;
}

enum us_status us_opts_parse(const struct us_opt *table, int argc, char *const *argv,
                             struct us_opts **ret_opts, struct us_err *err) {
  struct us_opts *opts = calloc(1, sizeof *opts);
  if (!opts) return us_err_memory(err, "options", sizeof *opts);
  opts->table = table;
  while (table[opts->rows].kind != US_OPT_KIND_END) opts->rows++;
  opts->slots = calloc(opts->rows + 1, sizeof *opts->slots);
  enum us_status status = US_OK;
  if (!opts->slots) status = us_err_memory(err, "options", (opts->rows + 1) * sizeof *opts->slots);
  if (status == US_OK) status = read_command_line(opts, argc, argv, err);
  if (status == US_OK) {
    bool excused = flag_of(opts, "help") || flag_of(opts, "version");
    int config = find_name(opts, "config", 6);
    if (config >= 0 && opts->slots[config].count && !excused)
      status = read_config(opts, opts->slots[config].values[0], err);
    if (status == US_OK) status = fill_defaults(opts, excused, err);
  }
  if (status != US_OK) {
    us_opts_free(opts);
    return status;
  }
  *ret_opts = opts;
  return US_OK;
}

void us_opts_free(struct us_opts *opts) {
  if (!opts) return;
  for (size_t i = 0; opts->slots && i < opts->rows; i++) clear_slot(&opts->slots[i]);
  free(opts->slots);
  free(opts);
}

/* The slot of `name` if its kind is among `kinds` (bits 1 << kind); else notes the misuse. */
static const struct slot *slot_of(struct us_opts *opts, const char *name, unsigned kinds, int *opt_row) {
  for (size_t i = 0; i < opts->rows; i++)
    if (opts->table[i].kind != US_OPT_KIND_GROUP && strcmp(opts->table[i].name, name) == 0 &&
        (kinds >> opts->table[i].kind & 1)) {
      if (opt_row) *opt_row = (int)i;
      return &opts->slots[i];
    }
  if (!opts->misuse) opts->misuse = name;
  return NULL;
}

#define KIND(k)    (1u << US_OPT_KIND_##k)
#define KINDS_TEXT (KIND(FILE) | KIND(STR) | KIND(ENUM) | KIND(RULES) | KIND(DEVICE) | KIND(ARG))

static const char *last_value(struct us_opts *opts, const char *name, unsigned kinds, int *opt_row) {
  const struct slot *slot = slot_of(opts, name, kinds, opt_row);
  return slot && slot->count ? slot->values[slot->count - 1] : NULL;
}

const char *us_opt_str(struct us_opts *opts, const char *name) {
  return last_value(opts, name, KINDS_TEXT, NULL);
}

int64_t us_opt_int(struct us_opts *opts, const char *name) {
  int64_t value = 0;
  const char *text = last_value(opts, name, KIND(INT), NULL);
  return text && us_opt_value_int(text, &value) ? value : 0;
}

double us_opt_num(struct us_opts *opts, const char *name) {
  int row = 0;
  const char *text = last_value(opts, name, KIND(INT) | KIND(NUM), &row);
  if (!text) return 0;
  int64_t integer = 0;
  double number = 0;
  if (opts->table[row].kind == US_OPT_KIND_INT) return us_opt_value_int(text, &integer) ? (double)integer : 0;
  return us_opt_value_num(text, &number) ? number : 0;
}

bool us_opt_flag(struct us_opts *opts, const char *name) {
  return last_value(opts, name, KIND(FLAG), NULL) != NULL;
}

int us_opt_choice(struct us_opts *opts, const char *name) {
  int row = 0;
  const char *text = last_value(opts, name, KIND(ENUM), &row);
  return text ? us_opt_value_choice(opts->table[row].value_name, text) : -1;
}

int us_opt_device(struct us_opts *opts, const char *name) {
  int ordinal = -1;
  const char *text = last_value(opts, name, KIND(DEVICE), NULL);
  return text && us_opt_value_device(text, &ordinal) ? ordinal : -1;
}

bool us_opt_given(struct us_opts *opts, const char *name) {
  const struct slot *slot = slot_of(opts, name, ~0u, NULL);
  return slot && slot->source >= SOURCE_CONFIG;
}

size_t us_opt_count(struct us_opts *opts, const char *name) {
  const struct slot *slot = slot_of(opts, name, ~0u, NULL);
  return slot ? slot->count : 0;
}

const char *us_opt_nth(struct us_opts *opts, const char *name, size_t i) {
  const struct slot *slot = slot_of(opts, name, ~0u, NULL);
  return slot && i < slot->count ? slot->values[i] : NULL;
}

const char *us_opts_misuse(const struct us_opts *opts) {
  return opts->misuse;
}

/* --- 5. The recorded run --- */

static json_t *value_to_json(const struct us_opt *opt, const char *text) {
  int64_t integer = 0;
  double number = 0;
  if (opt->kind == US_OPT_KIND_INT && us_opt_value_int(text, &integer)) return json_integer(integer);
  if (opt->kind == US_OPT_KIND_NUM && us_opt_value_num(text, &number)) return json_real(number);
  json_t *string = json_string(text);
  return string ? string : json_string("(not UTF-8)");
}

static json_t *slot_to_json(const struct us_opt *opt, const struct slot *slot) {
  if (opt->kind == US_OPT_KIND_FLAG)
    return opt->repeat ? json_integer((json_int_t)slot->count) : json_boolean(slot->count > 0);
  if (!opt->repeat) return slot->count ? value_to_json(opt, slot->values[0]) : json_null();
  json_t *array = json_array();
  for (size_t i = 0; array && i < slot->count; i++)
    if (json_array_append_new(array, value_to_json(opt, slot->values[i])) != 0) {
      json_decref(array);
      return NULL;
    }
  return array;
}

char *us_opts_record(const struct us_opts *opts) {
  static const char *const by[] = {"default", "default", "config", "command line"};
  json_t *object = json_object();
  bool ok = object != NULL;
  for (size_t i = 0; ok && i < opts->rows; i++) {
    const struct us_opt *opt = &opts->table[i];
    if (opt->kind == US_OPT_KIND_GROUP || !strcmp(opt->name, "help") || !strcmp(opt->name, "version") ||
        !strcmp(opt->name, "config"))
      continue;
    json_t *row = json_object();
    ok = row && json_object_set_new(row, "value", slot_to_json(opt, &opts->slots[i])) == 0 &&
         json_object_set_new(row, "by", json_string(by[opts->slots[i].source])) == 0;
    if (!ok)
      json_decref(row);
    else
      ok = json_object_set_new(object, opt->name, row) == 0;
  }
  char *text = ok ? us_json_text(object) : NULL;
  json_decref(object);
  return text;
}
