/* byte_level.h: bytes spelled as printable characters, as in tokenizer.json's vocabulary (GPT-2's table).
 *
 *     us_byte_level_spell("a b", 3, &spelled, &err);                 // "aĠb"
 *     us_byte_level_bytes("aĠb", 4, &bytes, &is_spelled, &err);      // "a b"
 *
 * A printable Latin-1 byte is its own code point; the other 68, in ascending order, are U+0100 and up.
 */
#ifndef US_FORMATS_BYTE_LEVEL_H
#define US_FORMATS_BYTE_LEVEL_H

#include "base/buffer.h"
#include <stdbool.h>

/* The code point that stands for a byte. */
uint32_t us_byte_level_char(uint8_t byte);

/* The byte of a code point, -1 if it stands for none. */
int us_byte_level_byte(uint32_t code);

/* Append the spelling of n bytes. */
US_CHECKED enum us_status us_byte_level_spell(const void *bytes, size_t n, struct us_buffer *out,
                                              struct us_err *err);

/* Append the bytes of a spelling (valid UTF-8). If one character stands for no byte, the text is appended as it is and
 * *ret_spelled is false. */
US_CHECKED enum us_status us_byte_level_bytes(const char *text, size_t n, struct us_buffer *out,
                                              bool *ret_spelled, struct us_err *err);

#endif
