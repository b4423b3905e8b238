/* h5_block.h: the user block of an HDF5 artefact (internal to h5_read.c, h5_write.c and their tests).
 *
 *     struct us_h5_block block;
 *     if (us_h5_block_check(bytes, size, "token-shards", &block, &err) != US_OK) ...;   // believed from here on
 *
 * The first 4096 bytes of the file, little-endian; HDF5 begins after them:
 *
 *      0   8  magic "ULTRASPD"
 *      8   4  version, 1
 *     12   4  bytes of the user block, 4096
 *     16  32  kind, padded with NUL
 *     48   8  bytes of the file
 *     56   8  offset of the extent table: the end of the HDF5 part; a multiple of 8
 *     64   8  number of extents
 *     72  32  SHA-256 of bytes [0, 72) of the user block and all metadata
 *    104      zero
 *
 * The extent table is the end of the file: (offset, bytes) of each dataset's data, two u64 each, ascending, disjoint,
 * never empty. Metadata is every byte after the user block that is in no extent, so it includes the table.
 */
#ifndef US_BASE_H5_BLOCK_H
#define US_BASE_H5_BLOCK_H

#include "base/err.h"
#include "base/h5.h"
#include <stddef.h>
#include <stdint.h>

#define US_H5_BLOCK_BYTES 4096
#define US_H5_SHA_AT      72
#define US_H5_SHA_BYTES   32

struct us_h5_block {
  char kind[US_H5_MAX_KIND + 1];
  uint64_t file_bytes, table_offset, extents;
};

struct us_h5_extent {
  uint64_t offset, bytes; /* from the beginning of the file */
};

static inline uint64_t us_h5_load(const uint8_t *bytes, int width) {
  uint64_t value = 0;
  for (int i = 0; i < width; i++) value |= (uint64_t)bytes[i] << (8 * i);
  return value;
}

static inline void us_h5_store(uint8_t *bytes, uint64_t value, int width) {
  for (int i = 0; i < width; i++) bytes[i] = (uint8_t)(value >> (8 * i));
}

/* Extent i of a checked block. */
static inline struct us_h5_extent us_h5_block_extent(const uint8_t *file, const struct us_h5_block *block,
                                                     uint64_t i) {
  const uint8_t *entry = file + block->table_offset + 16 * i;
  return (struct us_h5_extent){us_h5_load(entry, 8), us_h5_load(entry + 8, 8)};
}

/* Is this a kind: 1 to US_H5_MAX_KIND of [a-z0-9-]? */
bool us_h5_kind_valid(const char *kind);

/* Is this a full dataset name: components of [A-Za-z0-9._-], separated by '/', within the limits of h5.h? */
bool us_h5_name_valid(const char *name);

/* Read and check the block, the extent table and the hash of a whole file in memory. `opt_kind` as in us_h5_open. */
US_CHECKED enum us_status us_h5_block_check(const uint8_t *file, size_t size, const char *opt_kind,
                                            struct us_h5_block *ret_block, struct us_err *err);

/* Fill the first US_H5_SHA_AT bytes of a user block; the rest becomes zero. */
void us_h5_block_fill(uint8_t *user_block, const struct us_h5_block *block);

/* SHA-256 over the block's head and the metadata of a file in memory whose table is well-formed. */
US_CHECKED enum us_status us_h5_block_hash(const uint8_t *file, const uint8_t *head,
                                           const struct us_h5_block *block, uint8_t sha[US_H5_SHA_BYTES],
                                           struct us_err *err);

#endif
