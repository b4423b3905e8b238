/* added_tokens.h: tokens that are cut out of the text before anything else: <|im_end|>, <think>.
 *
 *     struct us_added_tokens added = {0};
 *     us_added_tokens_add(&added, &(struct us_added_token){.content = "<|im_end|>", ...}, &err);
 *     us_added_tokens_sort(&added);
 *     while (us_added_tokens_next(&added, text, bytes, &at, normalized, special, &cut)) ...;
 *     us_added_tokens_release(&added);
 *
 * Matching as in the `tokenizers` library: leftmost, then longest; single_word refuses a match beside a word
 * character; lstrip and rstrip take the white space beside it along.
 */
#ifndef US_FORMATS_ADDED_TOKENS_H
#define US_FORMATS_ADDED_TOKENS_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct us_added_token {
  char *content; /* owned by the table; valid UTF-8, not empty */
  size_t bytes;
  int32_t id;
  bool special, normalized, lstrip, rstrip, single_word;
};

struct us_added_tokens {
  struct us_added_token *items; /* after sort: by first byte, then the longest first */
  size_t n, capacity;
  size_t first[257]; /* items that begin with byte b are [first[b], first[b + 1]) */
};

/* Copy the token and its content. */
US_CHECKED enum us_status us_added_tokens_add(struct us_added_tokens *added,
                                              const struct us_added_token *token, struct us_err *err);
void us_added_tokens_sort(struct us_added_tokens *added);
void us_added_tokens_release(struct us_added_tokens *added);

struct us_added_cut {
  size_t begin, end;
  const struct us_added_token *token;
};

/* The next token at or after *at, among those whose `normalized` flag is as given; without allow_special, special ones are
 * passed over. Fills *ret_cut and moves *at behind it; false when there is none. begin is never below the *at given. */
bool us_added_tokens_next(const struct us_added_tokens *added, const char *text, size_t bytes, size_t *at,
                          bool normalized, bool allow_special, struct us_added_cut *ret_cut);

#endif
