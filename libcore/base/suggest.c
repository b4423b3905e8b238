/* suggest.c: nearest name by edit distance. */
#include "base/suggest.h"

#include <stdint.h>
#include <string.h>

#define LENGTH_MAX 64

static size_t min3(size_t a, size_t b, size_t c) {
  size_t ab = a < b ? a : b;
  return ab < c ? ab : c;
}

/* Optimal string alignment distance; words over LENGTH_MAX are far from everything. */
static size_t distance(const char *a, const char *b) {
  size_t n = strlen(a), m = strlen(b);
  if (n > LENGTH_MAX || m > LENGTH_MAX) return SIZE_MAX;
  size_t d[3][LENGTH_MAX + 1];
  for (size_t j = 0; j <= m; j++) d[0][j] = j;
  for (size_t i = 1; i <= n; i++) {
    size_t *row = d[i % 3], *above = d[(i + 2) % 3], *above2 = d[(i + 1) % 3];
    row[0] = i;
    for (size_t j = 1; j <= m; j++) {
      row[j] = min3(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a[i - 1] != b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && above2[j - 2] + 1 < row[j])
        row[j] = above2[j - 2] + 1;
    }
  }
  return d[n % 3][m];
}

const char *us_suggest(const char *word, const char *const *names, size_t n) {
  size_t length = strlen(word), best = length / 3 + 1;
  const char *found = NULL;
  for (size_t i = 0; i < n; i++) {
    if (!names[i]) continue;
    size_t d = distance(word, names[i]);
    if (d < best) {
      best = d;
      found = names[i];
    }
  }
  for (size_t i = 0; i < n && !found && length >= 3; i++)
    if (names[i] && strncmp(names[i], word, length) == 0) found = names[i];
  return found;
}
