/* utf8.c: UTF-8 checked, repaired, normalised. */
#include "base/utf8.h"
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

int us_utf8_length(const char *p, size_t n, bool *opt_cut) {
  const unsigned char *s = (const unsigned char *)p;
  if (opt_cut) *opt_cut = false;
  if (s[0] < 0x80) return 1;
  if (s[0] < 0xc2 || s[0] > 0xf4) return -1;
  int length = s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
  unsigned low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80;
  unsigned high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
  for (int i = 1; i < length; i++) {
    if ((size_t)i == n) {
      if (opt_cut) *opt_cut = true;
      return -i;
    }
    if (s[i] < low || s[i] > high) return -i;
    low = 0x80;
    high = 0xbf;
  }
  return length;
}

uint32_t us_utf8_get(const char *p, int *ret_length) {
  const unsigned char *s = (const unsigned char *)p;
  if (s[0] < 0x80) return *ret_length = 1, s[0];
  if (s[0] < 0xe0) return *ret_length = 2, (s[0] & 0x1fu) << 6 | (s[1] & 0x3fu);
  if (s[0] < 0xf0) return *ret_length = 3, (s[0] & 0x0fu) << 12 | (s[1] & 0x3fu) << 6 | (s[2] & 0x3fu);
  return *ret_length = 4, (s[0] & 7u) << 18 | (s[1] & 0x3fu) << 12 | (s[2] & 0x3fu) << 6 | (s[3] & 0x3fu);
}

int us_utf8_put(uint32_t code, char out[4]) {
  if (code < 0x80) return out[0] = (char)code, 1;
  int length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  for (int i = length - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
  out[0] = (char)((length == 2 ? 0xc0 : length == 3 ? 0xe0 : 0xf0) | code);
  return length;
}

size_t us_utf8_valid(const char *text, size_t n) {
  size_t i = 0;
  while (i < n) {
    int length = us_utf8_length(text + i, n - i, NULL);
    if (length < 0) return i;
    i += (size_t)length;
  }
  return n;
}

enum us_status us_utf8_repair(const char *text, size_t n, struct us_buffer *out, struct us_err *err) {
  while (n > 0) {
    size_t valid = us_utf8_valid(text, n);
    enum us_status status = us_buffer_append(out, text, valid, err);
    if (status != US_OK || valid == n) return status;
    text += valid;
    n -= valid;
    size_t bad = (size_t)-us_utf8_length(text, n, NULL);
    if ((status = us_buffer_append(out, "\xef\xbf\xbd", 3, err)) != US_OK) return status;
    text += bad;
    n -= bad;
  }
  return US_OK;
}

bool us_utf8_is_plain(const char *text, size_t n) {
  for (size_t i = 0; i < n; i++)
    if ((unsigned char)text[i] >= 0xcc) return false; /* 0xcc begins U+0300 */
  return true;
}

/* Marks that Unicode 10 to 15 added. The `tokenizers` library normalises by the tables of Unicode 9, where these are
 * unassigned: they stay where they are and nothing composes across them. Models were trained on that form, so it is
 * this project's NFC; tests/parity compares every code point. U+11930 and U+11938 are a composition of Unicode 13. */
static const uint32_t late_marks[][2] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},
    {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},
    {0xa82c, 0xa82c},   {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50},
    {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a},
    {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136},
    {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}};

static bool is_late(uint32_t code) {
  for (size_t i = 0; i < sizeof late_marks / sizeof *late_marks && code >= late_marks[i][0]; i++)
    if (code <= late_marks[i][1]) return true;
  return false;
}

/* Canonical combining class, 0 for a character that begins a new sequence. */
static int class_of(utf8proc_int32_t code) {
  int class = utf8proc_get_property(code)->combining_class;
  return class != 0 && is_late((uint32_t)code) ? 0 : class;
}

/* Sort a run of combining marks by class, stably. utf8proc's own ordering is quadratic in the run's length. */
static enum us_status order_marks(utf8proc_int32_t *run, size_t n, struct us_err *err) {
  if (n <= 16) {
    for (size_t i = 1; i < n; i++) {
      utf8proc_int32_t code = run[i];
      int class = class_of(code);
      size_t j = i;
      for (; j > 0 && class_of(run[j - 1]) > class; j--) run[j] = run[j - 1];
      run[j] = code;
    }
    return US_OK;
  }
  utf8proc_int32_t *sorted = malloc(n * sizeof *sorted);
  if (sorted == NULL) return us_err_memory(err, "combining marks", n * sizeof *sorted);
  size_t first[257] = {0};
  for (size_t i = 0; i < n; i++) first[(class_of(run[i]) & 255) + 1]++;
  for (int c = 0; c < 256; c++) first[c + 1] += first[c];
  for (size_t i = 0; i < n; i++) sorted[first[class_of(run[i]) & 255]++] = run[i];
  memcpy(run, sorted, n * sizeof *run);
  free(sorted);
  return US_OK;
}

/* Compose in place and append as UTF-8. */
static enum us_status compose_sequence(utf8proc_int32_t *codes, size_t n, struct us_buffer *out,
                                       struct us_err *err) {
  utf8proc_ssize_t composed =
      utf8proc_normalize_utf32(codes, (utf8proc_ssize_t)n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  enum us_status status = US_OK;
  for (utf8proc_ssize_t i = 0; i < composed && status == US_OK; i++) {
    char bytes[4];
    status = us_buffer_append(out, bytes, (size_t)us_utf8_put((uint32_t)codes[i], bytes), err);
  }
  return status;
}

/* NFC of a stretch of text: canonical decomposition, ordering of marks, composition. */
static enum us_status compose_stretch(const char *text, size_t n, struct us_buffer *out, struct us_err *err) {
  /* A character of b bytes decomposes into at most 3 * b / 2 code points (the longest is U+0390: 3 from 2 bytes). */
  size_t capacity = 2 * n + 8, count = 0;
  utf8proc_int32_t *codes = malloc(capacity * sizeof *codes);
  if (codes == NULL) return us_err_memory(err, "normalisation", capacity * sizeof *codes);
  enum us_status status = US_OK;
  for (size_t i = 0; i < n;) {
    int length, boundclass = 0;
    uint32_t code = us_utf8_get(text + i, &length);
    utf8proc_ssize_t got = 1;
    if (is_late(code))
      codes[count] = (utf8proc_int32_t)code;
    else
      got =
          utf8proc_decompose_char((utf8proc_int32_t)code, codes + count, (utf8proc_ssize_t)(capacity - count),
                                  UTF8PROC_STABLE | UTF8PROC_COMPOSE, &boundclass);
    if (got < 0 || (size_t)got > capacity - count) {
      status = us_err_set(err, US_ERR_INPUT, "U+%04X cannot be normalised", (unsigned)code);
      goto cleanup;
    }
    count += (size_t)got;
    i += (size_t)length;
  }
  for (size_t i = 0; i < count;) {
    size_t end = i;
    while (end < count && class_of(codes[end]) != 0) end++;
    if (end - i > 1 && (status = order_marks(codes + i, end - i, err)) != US_OK) goto cleanup;
    i = end + 1;
  }
  for (size_t i = 0, end; i < count && status == US_OK; i = end) {
    end = i + 1;
    while (end < count && !is_late((uint32_t)codes[end])) end++;
    status = compose_sequence(codes + i, end - i, out, err);
  }

cleanup:
  free(codes);
  return status;
}

/* Characters below U+0300 are stable and never combine with what precedes them, so only the stretches above, each with
 * the one character before it, need work: code and English text cost one scan. */
enum us_status us_utf8_nfc(const char *text, size_t n, struct us_buffer *out, struct us_err *err) {
  size_t done = 0;
  for (size_t i = 0; i < n;) {
    if ((unsigned char)text[i] < 0xcc) {
      i++;
      continue;
    }
    size_t begin = i;
    if (begin > done) {
      begin--;
      while (begin > done && ((unsigned char)text[begin] & 0xc0) == 0x80) begin--;
    }
    while (i < n && ((unsigned char)text[i] >= 0xcc || ((unsigned char)text[i] & 0xc0) == 0x80)) i++;
    enum us_status status = us_buffer_append(out, text + done, begin - done, err);
    if (status == US_OK) status = compose_stretch(text + begin, i - begin, out, err);
    if (status != US_OK) return status;
    done = i;
  }
  return us_buffer_append(out, text + done, n - done, err);
}
