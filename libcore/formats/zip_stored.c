/* zip_stored.c: members of an uncompressed zip, by its central directory. */
#include "formats/zip_stored.h"

#include <string.h>

#define END_BYTES     22 /* end of central directory */
#define ENTRY_BYTES   46 /* central directory entry */
#define LOCAL_BYTES   30 /* local header */
#define MAX_COMMENT   65535
#define DIRECTORY_MAX 1024 /* members */

static uint32_t le16(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}
static uint32_t le32(const uint8_t *p) {
  return le16(p) | le16(p + 2) << 16;
}

uint32_t us_zip_crc32(const void *bytes, size_t n) {
  const uint8_t *p = bytes;
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < n; i++) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1u ? 0xedb88320u : 0);
  }
  return ~crc;
}

/* The end record is the last thing in the file but for a comment. */
static const uint8_t *find_end(const uint8_t *file, size_t n) {
  if (n < END_BYTES) return NULL;
  size_t lowest = n - END_BYTES > MAX_COMMENT ? n - END_BYTES - MAX_COMMENT : 0;
  for (size_t at = n - END_BYTES + 1; at-- > lowest;)
    if (le32(file + at) == 0x06054b50u && le16(file + at + 20) == n - at - END_BYTES) return file + at;
  return NULL;
}

/* Follow a directory entry to its bytes; a message on failure. */
static const char *follow(const uint8_t *file, size_t n, const uint8_t *entry, struct us_zip_member *member) {
  uint32_t size = le32(entry + 24), offset = le32(entry + 42);
  if (le16(entry + 8) & 1u) return "a member is encrypted";
  if (le16(entry + 10) != 0 || le32(entry + 20) != size) return "a member is compressed";
  if (size == UINT32_MAX || offset == UINT32_MAX) return "a member has ZIP64 sizes";
  if (offset > n || n - offset < LOCAL_BYTES || le32(file + offset) != 0x04034b50u)
    return "a member's local header is not where the directory says";
  size_t name_bytes = le16(entry + 28), local_name = le16(file + offset + 26);
  size_t header = LOCAL_BYTES + local_name + le16(file + offset + 28);
  if (n - offset < header || n - offset - header < size) return "a member ends outside the file";
  if (local_name != name_bytes || memcmp(entry + ENTRY_BYTES, file + offset + LOCAL_BYTES, name_bytes) != 0)
    return "a member's two names differ";
  *member = (struct us_zip_member){.data = file + offset + header, .bytes = size};
  return us_zip_crc32(member->data, size) == le32(entry + 16) ? NULL : "a member's checksum differs";
}

/* name is FOLDER + suffix, with no slash in FOLDER. */
static int matches(const uint8_t *name, size_t bytes, const char *suffix) {
  size_t n = strlen(suffix);
  return bytes > n && memcmp(name + bytes - n, suffix, n) == 0 && !memchr(name, '/', bytes - n);
}

enum us_status us_zip_find(const void *bytes, size_t n, const char *name, const char *suffix,
                           struct us_zip_member *ret_member, struct us_err *err) {
  *ret_member = (struct us_zip_member){0};
  const uint8_t *file = bytes, *end = find_end(file, n);
  if (!end) return us_err_set(err, US_ERR_INPUT, "%s: not a zip file", name);
  size_t count = le16(end + 10), at = le32(end + 16), stop = (size_t)(end - file);
  if (le16(end + 4) || le16(end + 6) || le16(end + 8) != count || count > DIRECTORY_MAX)
    return us_err_set(err, US_ERR_INPUT, "%s: a zip of several disks or of %zu members", name, count);
  for (size_t i = 0; i < count; i++) {
    if (at > stop || stop - at < ENTRY_BYTES || le32(file + at) != 0x02014b50u)
      return us_err_set(err, US_ERR_INPUT, "%s: zip directory entry %zu is outside the directory", name, i);
    size_t name_bytes = le16(file + at + 28);
    size_t entry_bytes = ENTRY_BYTES + name_bytes + le16(file + at + 30) + le16(file + at + 32);
    if (stop - at < entry_bytes)
      return us_err_set(err, US_ERR_INPUT, "%s: zip directory entry %zu is cut", name, i);
    if (matches(file + at + ENTRY_BYTES, name_bytes, suffix)) {
      if (ret_member->data) return us_err_set(err, US_ERR_INPUT, "%s: two members end in %s", name, suffix);
      const char *problem = follow(file, n, file + at, ret_member);
      if (problem) return us_err_set(err, US_ERR_INPUT, "%s: %s: %s", name, suffix, problem);
    }
    at += entry_bytes;
  }
  return US_OK;
}
