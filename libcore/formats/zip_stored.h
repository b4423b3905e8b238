/* zip_stored.h: find a member of a small zip whose members are stored, not compressed. Internal to
 * mask_embedding.
 *
 *     struct us_zip_member member;
 *     if (us_zip_find(bytes, n, "mask.pt", "/data.pkl", &member, &err) != US_OK) return err.status;
 *     ... member.data[0 .. member.bytes) ...
 *
 * A torch.save file is such a zip. Compression, encryption, ZIP64 sizes and several disks are refused; offsets, the
 * local header and the CRC-32 of what is read are checked.
 */
#ifndef US_FORMATS_ZIP_STORED_H
#define US_FORMATS_ZIP_STORED_H

#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct us_zip_member {
  const uint8_t *data; /* into the file; NULL if there is no such member */
  size_t bytes;
};

/* The member whose name ends in `suffix` after its first folder ("x/data.pkl" for "/data.pkl"); `data` is NULL if
 * there is none. US_ERR_INPUT, naming `file`, if the zip is bad or two members match. */
US_CHECKED enum us_status us_zip_find(const void *bytes, size_t n, const char *file, const char *suffix,
                                      struct us_zip_member *ret_member, struct us_err *err);

/* CRC-32 (IEEE 802.3, as zip and PNG use). */
uint32_t us_zip_crc32(const void *bytes, size_t n);

#endif
