/* opt_value.c: checking and converting what was typed. */
#include "base/opt_value.h"
#include "base/suggest.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

bool us_opt_value_is_true(const char *text) {
  return !strcasecmp(text, "true") || !strcasecmp(text, "yes") || !strcasecmp(text, "on") ||
         !strcmp(text, "1");
}

bool us_opt_value_is_false(const char *text) {
  return !strcasecmp(text, "false") || !strcasecmp(text, "no") || !strcasecmp(text, "off") ||
         !strcmp(text, "0");
}

bool us_opt_value_int(const char *text, int64_t *ret_value) {
  const char *digits = text + (*text == '-');
  if (*digits < '0' || *digits > '9') return false; /* no blanks, no second sign */
  char *end;
  errno = 0;
  long long value = strtoll(text, &end, digits[0] == '0' && (digits[1] | 32) == 'x' ? 16 : 10);
  if (end == text || errno) return false;
  const char *letters = "KMG", *letter = *end ? strchr(letters, *end) : NULL;
  int64_t unit = 1;
  if (letter) {
    unit <<= 10 * (letter - letters + 1);
    end++;
  }
  return !*end && !__builtin_mul_overflow(value, unit, ret_value);
}

bool us_opt_value_num(const char *text, double *ret_value) {
  if (!*text || strchr(" \t\n\v\f\r", *text)) return false;
  char *end;
  *ret_value = strtod(text, &end);
  return !*end && isfinite(*ret_value);
}

/* Index of `word` among "a|b|c"; -1 when it is none of them. */
int us_opt_value_choice(const char *words, const char *word) {
  size_t length = strlen(word);
  for (int i = 0;; i++) {
    size_t n = strcspn(words, "|");
    if (n == length && strncmp(words, word, n) == 0) return i;
    if (!words[n]) return -1;
    words += n + 1;
  }
}

bool us_opt_value_device(const char *text, int *ret_ordinal) {
  *ret_ordinal = -1;
  if (!strcmp(text, "cpu")) return true;
  if (strncmp(text, "cuda", 4) != 0) return false;
  *ret_ordinal = 0;
  if (!text[4]) return true;
  int64_t ordinal;
  if (text[4] != ':' || !us_opt_value_int(text + 5, &ordinal) || ordinal < 0 || ordinal > 1023) return false;
  *ret_ordinal = (int)ordinal;
  return true;
}

static bool rules_are_well_formed(const char *text) {
  if (!*text) return false;
  for (;;) {
    size_t rule = strcspn(text, ","), key = strcspn(text, "=,");
    if (key == 0 || text[key] != '=' || rule <= key + 1) return false;
    if (!text[rule]) return true;
    text += rule + 1;
  }
}

static enum us_status check_range(const struct us_opt *opt, const char *text, double value,
                                  struct us_err *err) {
  bool low = opt->above_min ? value <= opt->min : value < opt->min;
  bool high = opt->max != 0 && value > opt->max;
  if (!low && !high) return US_OK;
  const char *relation = opt->above_min ? "above" : "at least";
  if (opt->max != 0)
    return us_err_set(err, US_ERR_USAGE, "%s is out of range: %s %.10g, at most %.10g", text, relation,
                      opt->min, opt->max);
  return us_err_set(err, US_ERR_USAGE, "%s is out of range: %s %.10g", text, relation, opt->min);
}

static enum us_status bad_choice(const struct us_opt *opt, const char *value, struct us_err *err) {
  char words[512];
  const char *names[64];
  size_t n = 0;
  snprintf(words, sizeof words, "%s", opt->value_name);
  for (char *rest = words, *word; n < 64 && (word = strsep(&rest, "|"));) names[n++] = word;
  const char *near = us_suggest(value, names, n);
  return us_err_set(err, US_ERR_USAGE, "'%s' is none of %s%s%s%s", value, opt->value_name,
                    near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
}

enum us_status us_opt_check(const struct us_opt *opt, const char *value, struct us_err *err) {
  int64_t integer;
  double number;
  int ordinal;
  switch (opt->kind) {
  case US_OPT_KIND_INT:
    if (!us_opt_value_int(value, &integer))
      return us_err_set(err, US_ERR_USAGE, "'%s' is not an integer", value);
    return check_range(opt, value, (double)integer, err);
  case US_OPT_KIND_NUM:
    if (!us_opt_value_num(value, &number))
      return us_err_set(err, US_ERR_USAGE, "'%s' is not a number", value);
    return check_range(opt, value, number, err);
  case US_OPT_KIND_FLAG:
    if (us_opt_value_is_true(value) || us_opt_value_is_false(value)) return US_OK;
    return us_err_set(err, US_ERR_USAGE, "'%s' is neither true nor false", value);
  case US_OPT_KIND_ENUM:
    return us_opt_value_choice(opt->value_name, value) >= 0 ? US_OK : bad_choice(opt, value, err);
  case US_OPT_KIND_DEVICE:
    if (us_opt_value_device(value, &ordinal)) return US_OK;
    return us_err_set(err, US_ERR_USAGE, "'%s' is no device: cpu, cuda or cuda:N", value);
  case US_OPT_KIND_RULES:
    if (rules_are_well_formed(value)) return US_OK;
    return us_err_set(err, US_ERR_USAGE, "'%s' is not of the form key=value,key=value", value);
  case US_OPT_KIND_FILE:
  case US_OPT_KIND_ARG:
    if (*value) return US_OK;
    return us_err_set(err, US_ERR_USAGE, "the value is empty");
  default:
    return US_OK;
  }
}
