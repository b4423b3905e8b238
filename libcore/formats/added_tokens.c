/* added_tokens.c: find added tokens in text. */
#include "formats/added_tokens.h"
#include "base/utf8.h"
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum us_status us_added_tokens_add(struct us_added_tokens *added, const struct us_added_token *token,
                                   struct us_err *err) {
  if (added->n == added->capacity) {
    size_t capacity = added->capacity ? 2 * added->capacity : 32;
    struct us_added_token *items = realloc(added->items, capacity * sizeof *items);
    if (items == NULL) return us_err_memory(err, "added tokens", capacity * sizeof *items);
    added->items = items;
    added->capacity = capacity;
  }
  char *content = malloc(token->bytes + 1);
  if (content == NULL) return us_err_memory(err, "added tokens", token->bytes + 1);
  memcpy(content, token->content, token->bytes);
  content[token->bytes] = '\0';
  added->items[added->n] = *token;
  added->items[added->n++].content = content;
  return US_OK;
}

static int compare_tokens(const void *a, const void *b) {
  const struct us_added_token *left = a, *right = b;
  unsigned char x = (unsigned char)left->content[0], y = (unsigned char)right->content[0];
  if (x != y) return x < y ? -1 : 1;
  if (left->bytes != right->bytes) return left->bytes > right->bytes ? -1 : 1;
  return left->id < right->id ? -1 : left->id > right->id;
}

void us_added_tokens_sort(struct us_added_tokens *added) {
  if (added->n > 0) qsort(added->items, added->n, sizeof *added->items, compare_tokens);
  memset(added->first, 0, sizeof added->first);
  for (size_t i = 0; i < added->n; i++) added->first[(unsigned char)added->items[i].content[0] + 1]++;
  for (int b = 0; b < 256; b++) added->first[b + 1] += added->first[b];
}

void us_added_tokens_release(struct us_added_tokens *added) {
  for (size_t i = 0; i < added->n; i++) free(added->items[i].content);
  free(added->items);
  *added = (struct us_added_tokens){0};
}

/* The start of the character that ends at `end` (> 0). */
static size_t character_before(const char *text, size_t end) {
  do end--;
  while (end > 0 && ((unsigned char)text[end] & 0xc0) == 0x80);
  return end;
}

static bool is_word(const char *p) {
  int length;
  utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)us_utf8_get(p, &length));
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_ND) ||
         category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_PC;
}

static bool is_space(const char *p, int *ret_length) {
  uint32_t code = us_utf8_get(p, ret_length);
  if ((code >= 9 && code <= 13) || code == 0x85) return true;
  utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
         category == UTF8PROC_CATEGORY_ZP;
}

static const struct us_added_token *match_at(const struct us_added_tokens *added, const char *text,
                                             size_t left, bool normalized) {
  unsigned char byte = (unsigned char)text[0];
  for (size_t i = added->first[byte]; i < added->first[byte + 1]; i++) {
    const struct us_added_token *token = &added->items[i];
    if (token->normalized == normalized && token->bytes <= left &&
        memcmp(token->content, text, token->bytes) == 0)
      return token;
  }
  return NULL;
}

bool us_added_tokens_next(const struct us_added_tokens *added, const char *text, size_t bytes, size_t *at,
                          bool normalized, bool allow_special, struct us_added_cut *ret_cut) {
  if (added->n == 0) return false;
  for (size_t i = *at; i < bytes;) {
    unsigned char byte = (unsigned char)text[i];
    const struct us_added_token *token = NULL;
    if (added->first[byte] != added->first[byte + 1])
      token = match_at(added, text + i, bytes - i, normalized);
    if (token == NULL) {
      i++;
      continue;
    }
    size_t begin = i, end = i + token->bytes;
    i = end;
    if (token->special && !allow_special) continue;
    if (token->single_word && ((begin > 0 && is_word(text + character_before(text, begin))) ||
                               (end < bytes && is_word(text + end))))
      continue;
    for (size_t before; token->lstrip && begin > *at; begin = before) {
      int length;
      before = character_before(text, begin);
      if (!is_space(text + before, &length)) break;
    }
    for (int length; token->rstrip && end < bytes && is_space(text + end, &length);) end += (size_t)length;
    *at = end;
    *ret_cut = (struct us_added_cut){.begin = begin, .end = end, .token = token};
    return true;
  }
  return false;
}
