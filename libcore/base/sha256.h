/* sha256.h: SHA-256 (FIPS 180-4) of bytes and files, through libcrypto.
 *
 *     char hex[US_SHA256_HEX];
 *     if (us_sha256_file("q.h5", hex, &err) != US_OK) return err.status;
 */
#ifndef US_BASE_SHA256_H
#define US_BASE_SHA256_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define US_SHA256_BYTES 32
#define US_SHA256_HEX   65 /* lower-case digits and the NUL */

/* In pieces: create, update any number of times, finish (which frees). */
struct us_sha256;
US_CHECKED enum us_status us_sha256_create(struct us_sha256 **ret_hash, struct us_err *err);
US_CHECKED enum us_status us_sha256_update(struct us_sha256 *hash, const void *bytes, size_t n,
                                           struct us_err *err);
US_CHECKED enum us_status us_sha256_finish(struct us_sha256 *hash, uint8_t ret_digest[US_SHA256_BYTES],
                                           struct us_err *err);
void us_sha256_free(struct us_sha256 *hash); /* for a hash that is not finished; NULL is allowed */

US_CHECKED enum us_status us_sha256_bytes(const void *bytes, size_t n, uint8_t ret_digest[US_SHA256_BYTES],
                                          struct us_err *err);

/* The content of a file. */
US_CHECKED enum us_status us_sha256_file(const char *path, char ret_hex[US_SHA256_HEX], struct us_err *err);

void us_sha256_hex(const uint8_t digest[US_SHA256_BYTES], char ret_hex[US_SHA256_HEX]);
bool us_sha256_is_hex(const char *text); /* 64 lower-case hexadecimal digits */

#endif
