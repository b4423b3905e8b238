/* suggest.h: "did you mean".
 *
 *     const char *near = us_suggest(word, names, n);
 *     us_err_set(err, US_ERR_USAGE, "unknown option '%s'%s%s%s", word, near ? "; did you mean '" : "", ...);
 */
#ifndef US_BASE_SUGGEST_H
#define US_BASE_SUGGEST_H

#include <stddef.h>

/* The name nearest to `word` by edit distance (insert, delete, replace, swap neighbours), or that begins with it; NULL
 * when none is near: at most one edit in three letters. names (n); NULL entries are skipped. */
const char *us_suggest(const char *word, const char *const *names, size_t n);

#endif
