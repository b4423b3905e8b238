/* h5_block.c: the user block of an HDF5 artefact: what is checked before anything else in the file is looked at. */
#include "base/h5_block.h"

#include "base/sha256.h"
#include <string.h>

static const char magic[8] = {'U', 'L', 'T', 'R', 'A', 'S', 'P', 'D'};

bool us_h5_kind_valid(const char *kind) {
  size_t length = strspn(kind, "abcdefghijklmnopqrstuvwxyz0123456789-");
  return length > 0 && length <= US_H5_MAX_KIND && kind[length] == 0;
}

static bool name_byte_valid(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
         c == '-';
}

bool us_h5_name_valid(const char *name) {
  size_t component = 0, depth = 0, i = 0;
  bool dots = true;
  for (; name[i]; i++) {
    if (i == US_H5_MAX_NAME) return false;
    if (name[i] == '/') {
      if (component == 0 || (dots && component <= 2) || ++depth > US_H5_MAX_DEPTH) return false;
      component = 0;
      dots = true;
      continue;
    }
    if (!name_byte_valid(name[i])) return false;
    dots = dots && name[i] == '.';
    component++;
  }
  return component > 0 && !(dots && component <= 2);
}

void us_h5_block_fill(uint8_t *user_block, const struct us_h5_block *block) {
  memset(user_block, 0, US_H5_BLOCK_BYTES);
  memcpy(user_block, magic, sizeof magic);
  us_h5_store(user_block + 8, 1, 4);
  us_h5_store(user_block + 12, US_H5_BLOCK_BYTES, 4);
  memcpy(user_block + 16, block->kind, strlen(block->kind));
  us_h5_store(user_block + 48, block->file_bytes, 8);
  us_h5_store(user_block + 56, block->table_offset, 8);
  us_h5_store(user_block + 64, block->extents, 8);
}

enum us_status us_h5_block_hash(const uint8_t *file, const uint8_t *head, const struct us_h5_block *block,
                                uint8_t sha[US_H5_SHA_BYTES], struct us_err *err) {
  struct us_sha256 *hash;
  enum us_status status = us_sha256_create(&hash, err);
  if (status != US_OK) return status;
  status = us_sha256_update(hash, head, US_H5_SHA_AT, err);
  uint64_t at = US_H5_BLOCK_BYTES;
  for (uint64_t i = 0; status == US_OK && i < block->extents; i++) {
    struct us_h5_extent extent = us_h5_block_extent(file, block, i);
    status = us_sha256_update(hash, file + at, extent.offset - at, err);
    at = extent.offset + extent.bytes;
  }
  if (status == US_OK) status = us_sha256_update(hash, file + at, block->file_bytes - at, err);
  if (status == US_OK) return us_sha256_finish(hash, sha, err);
  us_sha256_free(hash);
  return status;
}

static enum us_status read_head(const uint8_t *file, size_t size, struct us_h5_block *block,
                                struct us_err *err) {
  if (size < sizeof magic || memcmp(file, magic, sizeof magic) != 0)
    return us_err_set(err, US_ERR_INPUT,
                      "user block: no magic ULTRASPD, so not a (finished) artefact of this toolkit");
  if (size < US_H5_BLOCK_BYTES)
    return us_err_set(err, US_ERR_INPUT, "user block: cut after %zu of %d bytes", size, US_H5_BLOCK_BYTES);
  uint64_t version = us_h5_load(file + 8, 4), bytes = us_h5_load(file + 12, 4);
  if (version != 1 || bytes != US_H5_BLOCK_BYTES)
    return us_err_set(err, US_ERR_INPUT,
                      "user block: version %llu of %llu bytes; this program reads version 1 of %d",
                      (unsigned long long)version, (unsigned long long)bytes, US_H5_BLOCK_BYTES);
  memcpy(block->kind, file + 16, sizeof block->kind);
  block->file_bytes = us_h5_load(file + 48, 8);
  block->table_offset = us_h5_load(file + 56, 8);
  block->extents = us_h5_load(file + 64, 8);
  if (block->file_bytes != size)
    return us_err_set(err, US_ERR_INPUT, "user block: the file should have %llu bytes and has %zu",
                      (unsigned long long)block->file_bytes, size);
  bool kind_ok = block->kind[US_H5_MAX_KIND] == 0 && us_h5_kind_valid(block->kind);
  for (size_t i = strnlen(block->kind, sizeof block->kind); i < sizeof block->kind; i++)
    kind_ok = kind_ok && block->kind[i] == 0;
  if (!kind_ok) return us_err_set(err, US_ERR_INPUT, "user block: the kind is not a name");
  for (size_t i = US_H5_SHA_AT + US_H5_SHA_BYTES; i < US_H5_BLOCK_BYTES; i++)
    if (file[i]) return us_err_set(err, US_ERR_INPUT, "user block: byte %zu is not 0", i);
  return US_OK;
}

static enum us_status check_table(const uint8_t *file, const struct us_h5_block *block, struct us_err *err) {
  uint64_t table = block->table_offset;
  if (table < US_H5_BLOCK_BYTES || table > block->file_bytes || table % 8 != 0)
    return us_err_set(err, US_ERR_INPUT, "user block: extent table at %llu", (unsigned long long)table);
  uint64_t room = block->file_bytes - table;
  if (block->extents > US_H5_MAX_DATASETS || room != 16 * block->extents)
    return us_err_set(err, US_ERR_INPUT, "user block: %llu extents in a table of %llu bytes",
                      (unsigned long long)block->extents, (unsigned long long)room);
  uint64_t end = US_H5_BLOCK_BYTES;
  for (uint64_t i = 0; i < block->extents; i++) {
    struct us_h5_extent extent = us_h5_block_extent(file, block, i);
    if (extent.offset < end || extent.offset > table || extent.bytes == 0 ||
        extent.bytes > table - extent.offset || extent.offset % US_H5_ALIGNMENT != 0)
      return us_err_set(
          err, US_ERR_INPUT, "extent table: entry %llu (offset %llu, %llu bytes) overlaps or leaves the file",
          (unsigned long long)i, (unsigned long long)extent.offset, (unsigned long long)extent.bytes);
    end = extent.offset + extent.bytes;
  }
  return US_OK;
}

enum us_status us_h5_block_check(const uint8_t *file, size_t size, const char *opt_kind,
                                 struct us_h5_block *ret_block, struct us_err *err) {
  enum us_status status = read_head(file, size, ret_block, err);
  if (status == US_OK) status = check_table(file, ret_block, err);
  uint8_t sha[US_H5_SHA_BYTES];
  if (status == US_OK) status = us_h5_block_hash(file, file, ret_block, sha, err);
  if (status != US_OK) return status;
  if (memcmp(sha, file + US_H5_SHA_AT, sizeof sha) != 0)
    return us_err_set(err, US_ERR_INPUT,
                      "user block: SHA-256 of the metadata differs, so the file was changed");
  if (opt_kind && strcmp(opt_kind, ret_block->kind) != 0)
    return us_err_set(err, US_ERR_INPUT, "kind: a file of kind %s where %s is expected", ret_block->kind,
                      opt_kind);
  return US_OK;
}
