/* byte_level.c: bytes spelled as printable characters. */
#include "formats/byte_level.h"
#include "base/utf8.h"

/* Bytes 0..32 are the first 33 of the others, 127..160 the next 34, 173 the last. */
uint32_t us_byte_level_char(uint8_t byte) {
  if (byte <= 32) return 0x100u + byte;
  if (byte >= 127 && byte <= 160) return 0x100u + 33 + (byte - 127u);
  return byte == 173 ? 0x100u + 67 : byte;
}

int us_byte_level_byte(uint32_t code) {
  if (code < 0x100) return us_byte_level_char((uint8_t)code) == code ? (int)code : -1;
  if (code <= 0x120) return (int)(code - 0x100);
  if (code <= 0x142) return (int)(code - 0x121 + 127);
  return code == 0x143 ? 173 : -1;
}

enum us_status us_byte_level_spell(const void *bytes, size_t n, struct us_buffer *out, struct us_err *err) {
  enum us_status status = us_buffer_reserve(out, 2 * n, err);
  for (size_t i = 0; i < n && status == US_OK; i++) {
    char spelled[4];
    int length = us_utf8_put(us_byte_level_char(((const uint8_t *)bytes)[i]), spelled);
    status = us_buffer_append(out, spelled, (size_t)length, err);
  }
  return status;
}

enum us_status us_byte_level_bytes(const char *text, size_t n, struct us_buffer *out, bool *ret_spelled,
                                   struct us_err *err) {
  size_t begin = out->size;
  enum us_status status = us_buffer_reserve(out, n, err);
  *ret_spelled = true;
  for (size_t i = 0; i < n && status == US_OK;) {
    int length, byte = us_byte_level_byte(us_utf8_get(text + i, &length));
    if (byte < 0) {
      *ret_spelled = false;
      out->size = begin;
      return us_buffer_append(out, text, n, err);
    }
    char as_char = (char)byte;
    status = us_buffer_append(out, &as_char, 1, err);
    i += (size_t)length;
  }
  return status;
}
