/* utf8.h: UTF-8 checked, repaired, normalised.
 *
 *     struct us_buffer clean = {0};
 *     us_utf8_repair(text, bytes, &clean, &err);      // valid UTF-8: each maximal invalid subpart is one U+FFFD
 *     us_utf8_nfc(clean.data, clean.size, &nfc, &err);
 *
 * The definition of valid is Unicode 15 table 3-7: no surrogates, nothing above U+10FFFF, shortest form.
 */
#ifndef US_BASE_UTF8_H
#define US_BASE_UTF8_H

#include "base/buffer.h"
#include <stdbool.h>

/* Length of the character at p (n > 0 bytes left): 1 to 4 if it is valid. Otherwise -k, where the first k bytes (1 to 3)
 * are a maximal invalid subpart; *opt_cut then says whether the bytes ended inside a character that may be valid. */
int us_utf8_length(const char *p, size_t n, bool *opt_cut);

/* The code point of a valid character, and its length. */
uint32_t us_utf8_get(const char *p, int *ret_length);

/* Write a code point as UTF-8; returns its length, 1 to 4. */
int us_utf8_put(uint32_t code, char out[4]);

/* Length of the longest prefix that is valid. */
size_t us_utf8_valid(const char *text, size_t n);

/* Append the text with each maximal invalid subpart replaced by U+FFFD. */
US_CHECKED enum us_status us_utf8_repair(const char *text, size_t n, struct us_buffer *out,
                                         struct us_err *err);

/* Append the NFC form of valid text. Linear time: a long run of combining marks is sorted by counting. */
US_CHECKED enum us_status us_utf8_nfc(const char *text, size_t n, struct us_buffer *out, struct us_err *err);

/* Whether NFC changes nothing for sure: every character lies below U+0300. */
bool us_utf8_is_plain(const char *text, size_t n);

#endif
