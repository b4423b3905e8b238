/* pretokenize.c: cut text into pieces by a tokenizer's own pattern. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "formats/pretokenize.h"
#include "base/buffer.h"
#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PATTERN 65536
/* Backtracking of one match: what a run of n spaces costs is linear in n; a million more is a pattern gone wild. */
#define MATCH_STEPS   1000000u
#define JIT_STACK_MAX (8u << 20)
#define HEAP_MAX_KIB  (256u << 10)

struct us_pattern {
  pcre2_code *code;
};

/* Copy one bracket expression that begins at p, rewriting \s inside; returns the end. \S inside stays PCRE2's. */
static const char *copy_class(const char *p, struct us_buffer *out, enum us_status *status,
                              struct us_err *err) {
  const char *begin = p++;
  if (*p == '^') p++;
  if (*p == ']') p++;
  *status = us_buffer_append(out, begin, (size_t)(p - begin), err);
  while (*p && *p != ']' && *status == US_OK) {
    if (p[0] == '\\' && p[1] == 's') {
      *status = us_buffer_add(out, "\\t-\\r\\x{85}\\p{Z}", err);
      p += 2;
      continue;
    }
    const char *end = p + (p[0] == '\\' && p[1] ? 2 : 1);
    if (p[0] == '[' && p[1] == ':' && strstr(p, ":]")) end = strstr(p, ":]") + 2;
    *status = us_buffer_append(out, p, (size_t)(end - p), err);
    p = end;
  }
  return p;
}

static enum us_status rewrite(const char *regex, struct us_buffer *out, struct us_err *err) {
  enum us_status status = us_buffer_reserve(out, strlen(regex), err);
  for (const char *p = regex; *p && status == US_OK;) {
    if (*p == '[') {
      p = copy_class(p, out, &status, err);
    } else if (p[0] == '\\' && (p[1] == 's' || p[1] == 'S')) {
      status = us_buffer_add(out, p[1] == 's' ? "[\\t-\\r\\x{85}\\p{Z}]" : "[^\\t-\\r\\x{85}\\p{Z}]", err);
      p += 2;
    } else {
      size_t n = p[0] == '\\' && p[1] ? 2 : 1;
      status = us_buffer_append(out, p, n, err);
      p += n;
    }
  }
  return status;
}

enum us_status us_pattern_create(const char *regex, struct us_pattern **ret_pattern, struct us_err *err) {
  if (strlen(regex) > MAX_PATTERN)
    return us_err_set(err, US_ERR_INPUT, "pattern longer than %d bytes", MAX_PATTERN);
  struct us_buffer text = {0};
  struct us_pattern *pattern = calloc(1, sizeof *pattern);
  enum us_status status =
      pattern ? rewrite(regex, &text, err) : us_err_memory(err, "pattern", sizeof *pattern);
  if (status != US_OK) goto cleanup;
  int code;
  PCRE2_SIZE offset;
  /* Without \C, which could cut a character in two. */
  pattern->code = pcre2_compile((PCRE2_SPTR)text.data, text.size,
                                PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &offset, NULL);
  if (pattern->code == NULL) {
    char message[256];
    pcre2_get_error_message(code, (PCRE2_UCHAR *)message, sizeof message);
    status = us_err_set(err, US_ERR_INPUT, "pattern: %s", message);
    goto cleanup;
  }
  /* Where PCRE2 was built without JIT, or refuses the pattern, the interpreter gives the same matches. */
  (void)pcre2_jit_compile(pattern->code, PCRE2_JIT_COMPLETE);
  *ret_pattern = pattern;
  pattern = NULL;

cleanup:
  us_buffer_release(&text);
  us_pattern_free(pattern);
  return status;
}

void us_pattern_free(struct us_pattern *pattern) {
  if (pattern == NULL) return;
  pcre2_code_free(pattern->code);
  free(pattern);
}

enum us_status us_pieces_begin(struct us_pieces *pieces, const struct us_pattern *pattern,
                               struct us_err *err) {
  *pieces = (struct us_pieces){.pattern = pattern};
  pieces->match_data = pcre2_match_data_create_from_pattern(pattern->code, NULL);
  pieces->match_context = pcre2_match_context_create(NULL);
  pieces->jit_stack = pcre2_jit_stack_create(32 << 10, JIT_STACK_MAX, NULL);
  if (!pieces->match_data || !pieces->match_context) {
    us_pieces_end(pieces);
    return us_err_memory(err, "pattern matching", 0);
  }
  pcre2_set_heap_limit(pieces->match_context, HEAP_MAX_KIB);
  if (pieces->jit_stack) pcre2_jit_stack_assign(pieces->match_context, NULL, pieces->jit_stack);
  us_pieces_set(pieces, "", 0);
  return US_OK;
}

void us_pieces_set(struct us_pieces *pieces, const char *text, size_t bytes) {
  pieces->text = text;
  pieces->bytes = bytes;
  pieces->at = 0;
  pieces->match_begin = pieces->match_end = 0;
  size_t steps = bytes > UINT32_MAX / 32 ? UINT32_MAX : MATCH_STEPS + 16 * bytes;
  pcre2_set_match_limit(pieces->match_context, (uint32_t)steps);
}

/* Find the next non-empty match at or after match_end; none: an empty one at the end of the text. */
static enum us_status find_match(struct us_pieces *pieces, struct us_err *err) {
  size_t from = pieces->match_end;
  while (from < pieces->bytes) {
    int found = pcre2_match(pieces->pattern->code, (PCRE2_SPTR)pieces->text, pieces->bytes, from,
                            PCRE2_NO_UTF_CHECK, pieces->match_data, pieces->match_context);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT)
      found = pcre2_match(pieces->pattern->code, (PCRE2_SPTR)pieces->text, pieces->bytes, from,
                          PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, pieces->match_data, pieces->match_context);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      char message[128];
      pcre2_get_error_message(found, (PCRE2_UCHAR *)message, sizeof message);
      return us_err_set(err, US_ERR_INPUT, "the tokenizer's pattern gave up at byte %zu of the text: %s",
                        from, message);
    }
    const PCRE2_SIZE *range = pcre2_get_ovector_pointer(pieces->match_data);
    /* \K in a lookahead can put the begin after the end, or before what was already cut. */
    if (range[1] > range[0] && range[0] >= pieces->match_end) {
      pieces->match_begin = range[0];
      pieces->match_end = range[1];
      return US_OK;
    }
    from = range[1] > from ? range[1] : from + 1;
    while (from < pieces->bytes && ((unsigned char)pieces->text[from] & 0xc0) == 0x80) from++;
  }
  pieces->match_begin = pieces->match_end = pieces->bytes;
  return US_OK;
}

enum us_status us_pieces_next(struct us_pieces *pieces, const char **ret_piece, size_t *ret_bytes,
                              struct us_err *err) {
  *ret_piece = NULL;
  *ret_bytes = 0;
  if (pieces->at == pieces->bytes) return US_OK;
  if (pieces->at == pieces->match_end) {
    enum us_status status = find_match(pieces, err);
    if (status != US_OK) return status;
  }
  size_t end = pieces->at < pieces->match_begin ? pieces->match_begin : pieces->match_end;
  *ret_piece = pieces->text + pieces->at;
  *ret_bytes = end - pieces->at;
  pieces->at = end;
  return US_OK;
}

void us_pieces_end(struct us_pieces *pieces) {
  pcre2_match_data_free(pieces->match_data);
  pcre2_match_context_free(pieces->match_context);
  pcre2_jit_stack_free(pieces->jit_stack);
  *pieces = (struct us_pieces){0};
}
