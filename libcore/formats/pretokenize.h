/* pretokenize.h: cut text into the pieces that BPE merges inside of, by a tokenizer's own pattern.
 *
 *     struct us_pattern *pattern;
 *     us_pattern_create(US_PATTERN_QWEN2, &pattern, &err);
 *     struct us_pieces pieces;
 *     us_pieces_begin(&pieces, pattern, &err);
 *     us_pieces_set(&pieces, text, bytes);
 *     while ((status = us_pieces_next(&pieces, &piece, &n, &err)) == US_OK && piece) use(piece, n);
 *     us_pieces_end(&pieces); us_pattern_free(pattern);
 *
 * Split with behavior Isolated: each match is a piece, and so is each stretch between matches. PCRE2 with UTF and UCP, compiled
 * just in time. \s and \S are rewritten to White_Space: PCRE2 counts U+180E, Oniguruma and Unicode do not.
 */
#ifndef US_FORMATS_PRETOKENIZE_H
#define US_FORMATS_PRETOKENIZE_H

#include "base/err.h"
#include <stddef.h>

/* Qwen2's pattern: one digit a piece, letters with one leading mark or space, punctuation runs, line ends, spaces. */
#define US_PATTERN_QWEN2                                                                                     \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "                                      \
  "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"                                                             \
  "\\s+(?!\\S)|\\s+"

/* The pattern of ByteLevel with use_regex. */
#define US_PATTERN_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

struct us_pattern; /* read-only once created: threads may share it */

/* US_ERR_INPUT with PCRE2's message. Free with us_pattern_free. */
US_CHECKED enum us_status us_pattern_create(const char *regex, struct us_pattern **ret_pattern,
                                            struct us_err *err);
void us_pattern_free(struct us_pattern *pattern);

/* One walk over a text; several may use a pattern at a time. */
struct us_pieces {
  const struct us_pattern *pattern;
  void *match_data, *match_context, *jit_stack;
  const char *text;
  size_t bytes, at, match_begin, match_end;
};

/* Create what matching needs; then us_pieces_set for each text. */
US_CHECKED enum us_status us_pieces_begin(struct us_pieces *pieces, const struct us_pattern *pattern,
                                          struct us_err *err);

/* Walk over another text: valid UTF-8, kept by the caller during the walk. */
void us_pieces_set(struct us_pieces *pieces, const char *text, size_t bytes);

/* The next piece (inside text), NULL at the end. US_ERR_INPUT if matching takes more steps than a linear pattern can. */
US_CHECKED enum us_status us_pieces_next(struct us_pieces *pieces, const char **ret_piece, size_t *ret_bytes,
                                         struct us_err *err);
void us_pieces_end(struct us_pieces *pieces);

#endif
