/* answer.c: exact match of a generated text with a reference answer. */
#include "decode/answer.h"

#include <ctype.h>
#include <stddef.h>
#include <string.h>
#include <strings.h>

/* A decimal number in canonical form: sign, digits without leading zeros, fraction without trailing zeros. Compared as
 * text, so that numbers of any length differ where they differ. */
struct number {
  const char *whole, *fraction; /* inside the text; commas remain in `whole` */
  size_t whole_chars, fraction_digits;
  bool negative;
};

static bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/* A comma groups digits only where exactly three follow it. */
static bool groups(const char *at) {
  return *at == ',' && is_digit(at[1]) && is_digit(at[2]) && is_digit(at[3]) && !is_digit(at[4]);
}

/* The number whose first digit, or point before a digit, is at `at`; returns its end. */
static const char *read_number(const char *text, const char *at, struct number *n) {
  *n = (struct number){0};
  const char *before = at;
  while (before > text && before[-1] == '$') before--;
  /* "5-3" is a difference, "-3" a number */
  n->negative =
      before > text && before[-1] == '-' && (before - 1 == text || !isalnum((unsigned char)before[-2]));
  while (*at == '0' && is_digit(at[1])) at++;
  n->whole = at;
  while (is_digit(*at) || groups(at)) at++;
  n->whole_chars = (size_t)(at - n->whole);
  if (*at != '.' || !is_digit(at[1])) return at;
  n->fraction = ++at;
  while (is_digit(*at)) at++;
  n->fraction_digits = (size_t)(at - n->fraction);
  while (n->fraction_digits && n->fraction[n->fraction_digits - 1] == '0') n->fraction_digits--;
  return at;
}

static bool begins_number(const char *text, const char *at) {
  return is_digit(*at) || (*at == '.' && is_digit(at[1]) && (at == text || !is_digit(at[-1])));
}

static bool first_number(const char *text, struct number *n) {
  for (const char *at = text; *at; at++) {
    if (!begins_number(text, at)) continue;
    read_number(text, at, n);
    return true;
  }
  return false;
}

static bool last_number(const char *text, struct number *n) {
  bool found = false;
  for (const char *at = text; *at;) {
    if (begins_number(text, at)) {
      at = read_number(text, at, n);
      found = true;
    } else {
      at++;
    }
  }
  return found;
}

/* Whether the text is one number and nothing else that matters. */
static bool only_number(const char *text, struct number *n) {
  while (isspace((unsigned char)*text)) text++;
  const char *at = text;
  while (*at == '-' || *at == '+' || *at == '$') at++;
  if (!begins_number(text, at)) return false;
  at = read_number(text, at, n);
  while (*at == '.' || *at == '%' || isspace((unsigned char)*at)) at++;
  return !*at;
}

static char next_digit(const struct number *n, size_t *at) {
  while (*at < n->whole_chars && n->whole[*at] == ',') (*at)++;
  return *at < n->whole_chars ? n->whole[(*at)++] : 0;
}

/* "007" lost its leading zeros; "0.5" and ".5" differ only by a whole part of zero. */
static size_t skip_zero(const struct number *n) {
  return n->whole_chars == 1 && n->whole[0] == '0' ? 1 : 0;
}

static bool is_zero(const struct number *n) {
  return n->whole_chars == skip_zero(n) && !n->fraction_digits;
}

static bool same_number(const struct number *a, const struct number *b) {
  size_t i = skip_zero(a), j = skip_zero(b);
  char x, y;
  do {
    x = next_digit(a, &i), y = next_digit(b, &j);
    if (x != y) return false;
  } while (x);
  if (a->fraction_digits != b->fraction_digits) return false;
  if (a->fraction_digits && memcmp(a->fraction, b->fraction, a->fraction_digits) != 0) return false;
  return a->negative == b->negative || is_zero(a);
}

/* What follows the last "####", or NULL. */
static const char *marked(const char *text) {
  const char *found = NULL;
  for (const char *at = strstr(text, "####"); at; at = strstr(at + 1, "####")) found = at + 4;
  return found;
}

static void trim(const char **begin, const char **end) {
  while (*begin < *end && isspace((unsigned char)**begin)) (*begin)++;
  while (*end > *begin && isspace((unsigned char)(*end)[-1])) (*end)--;
}

static bool same_words(const char *text, const char *reference) {
  const char *begin = marked(text), *end = text + strlen(text), *want = reference,
             *want_end = reference + strlen(reference);
  trim(&want, &want_end);
  if (!begin) {
    const char *line = text;
    trim(&line, &end);
    for (begin = end; begin > line && begin[-1] != '\n';) begin--;
  }
  trim(&begin, &end);
  return end - begin == want_end - want && strncasecmp(begin, want, (size_t)(end - begin)) == 0;
}

bool us_answer_matches(const char *text, const char *reference) {
  struct number want, got;
  const char *wanted = marked(reference), *given = marked(text);
  if (!wanted) wanted = reference;
  if (!only_number(wanted, &want)) return same_words(text, wanted);
  if (given ? !first_number(given, &got) : !last_number(text, &got)) return false;
  return same_number(&want, &got);
}
