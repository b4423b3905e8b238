/* decontaminate.c: 13-word overlap with prompts. */
#include "training/decontaminate.h"
#include "base/intern.h"
#include "base/utf8.h"
#include <stdlib.h>
#include <utf8proc.h>

struct us_decontaminator {
  struct us_intern windows;      /* 13 words, one space between: exact, no hash to collide */
  const struct us_intern *known; /* these, or those of the filter that this one shares */
  struct us_buffer repaired, normal, words;
  size_t *starts; /* where each word begins in `words` */
  size_t n_words, capacity;
};

enum us_status us_decontaminator_create(struct us_decontaminator **ret_filter, struct us_err *err) {
  *ret_filter = calloc(1, sizeof **ret_filter);
  if (*ret_filter == NULL) return us_err_memory(err, "decontamination", sizeof **ret_filter);
  (*ret_filter)->known = &(*ret_filter)->windows;
  return US_OK;
}

enum us_status us_decontaminator_share(const struct us_decontaminator *filter,
                                       struct us_decontaminator **ret_filter, struct us_err *err) {
  enum us_status status = us_decontaminator_create(ret_filter, err);
  if (status == US_OK) (*ret_filter)->known = filter->known;
  return status;
}

static bool is_word_character(uint32_t code) {
  if (code < 0x80) return (code >= '0' && code <= '9') || ((code | 32) >= 'a' && (code | 32) <= 'z');
  utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
  return category >= UTF8PROC_CATEGORY_LU &&
         category <= UTF8PROC_CATEGORY_NO; /* Lu .. Lo, Mn .. Me, Nd .. No */
}

static enum us_status begin_word(struct us_decontaminator *filter, struct us_err *err) {
  if (filter->n_words == filter->capacity) {
    size_t capacity = filter->capacity ? 2 * filter->capacity : 1024;
    size_t *starts = realloc(filter->starts, capacity * sizeof *starts);
    if (starts == NULL) return us_err_memory(err, "decontamination", capacity * sizeof *starts);
    filter->starts = starts;
    filter->capacity = capacity;
  }
  if (filter->words.size > 0) {
    enum us_status status = us_buffer_append(&filter->words, " ", 1, err);
    if (status != US_OK) return status;
  }
  filter->starts[filter->n_words++] = filter->words.size;
  return US_OK;
}

/* The text's words, normalised, into filter->words and starts. */
static enum us_status split(struct us_decontaminator *filter, const char *text, size_t bytes,
                            struct us_err *err) {
  us_buffer_clear(&filter->repaired);
  us_buffer_clear(&filter->normal);
  us_buffer_clear(&filter->words);
  filter->n_words = 0;
  enum us_status status = us_utf8_repair(text, bytes, &filter->repaired, err);
  if (status == US_OK)
    status = us_utf8_nfc(filter->repaired.data, filter->repaired.size, &filter->normal, err);
  bool inside = false;
  for (size_t i = 0; i < filter->normal.size && status == US_OK;) {
    int length;
    uint32_t code = us_utf8_get(filter->normal.data + i, &length);
    i += (size_t)length;
    if (!is_word_character(code)) {
      inside = false;
      continue;
    }
    if (!inside) status = begin_word(filter, err);
    inside = true;
    char lower[4];
    uint32_t low = code < 0x80 ? (code >= 'A' && code <= 'Z' ? code + 32 : code)
                               : (uint32_t)utf8proc_tolower((utf8proc_int32_t)code);
    if (status == US_OK)
      status = us_buffer_append(&filter->words, lower, (size_t)us_utf8_put(low, lower), err);
  }
  return status;
}

/* Window i of the split text. */
static const char *window(const struct us_decontaminator *filter, size_t i, size_t *ret_bytes) {
  size_t end =
      i + US_OVERLAP_WORDS < filter->n_words ? filter->starts[i + US_OVERLAP_WORDS] - 1 : filter->words.size;
  *ret_bytes = end - filter->starts[i];
  return filter->words.data + filter->starts[i];
}

enum us_status us_decontaminator_add(struct us_decontaminator *filter, const char *text, size_t bytes,
                                     struct us_err *err) {
  enum us_status status = split(filter, text, bytes, err);
  for (size_t i = 0; i + US_OVERLAP_WORDS <= filter->n_words && status == US_OK; i++) {
    size_t n;
    uint32_t index;
    const char *words = window(filter, i, &n);
    status = us_intern_add(&filter->windows, words, n, &index, NULL, err);
  }
  return status;
}

enum us_status us_decontaminator_check(struct us_decontaminator *filter, const char *text, size_t bytes,
                                       bool *ret_overlaps, struct us_buffer *opt_words, struct us_err *err) {
  *ret_overlaps = false;
  if (filter->known->n == 0) return US_OK;
  enum us_status status = split(filter, text, bytes, err);
  for (size_t i = 0; i + US_OVERLAP_WORDS <= filter->n_words && status == US_OK; i++) {
    size_t n;
    const char *words = window(filter, i, &n);
    if (us_intern_find(filter->known, words, n) < 0) continue;
    *ret_overlaps = true;
    return opt_words ? us_buffer_append(opt_words, words, n, err) : US_OK;
  }
  return status;
}

size_t us_decontaminator_windows(const struct us_decontaminator *filter) {
  return filter->known->n;
}

void us_decontaminator_free(struct us_decontaminator *filter) {
  if (filter == NULL) return;
  us_intern_release(&filter->windows);
  us_buffer_release(&filter->repaired);
  us_buffer_release(&filter->normal);
  us_buffer_release(&filter->words);
  free(filter->starts);
  free(filter);
}
