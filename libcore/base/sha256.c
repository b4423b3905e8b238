/* sha256.c: SHA-256 through libcrypto's EVP interface. */
#include "base/sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PIECE ((size_t)1 << 20)

struct us_sha256 {
  EVP_MD_CTX *context;
};

enum us_status us_sha256_create(struct us_sha256 **ret_hash, struct us_err *err) {
  struct us_sha256 *hash = calloc(1, sizeof *hash);
  if (hash) hash->context = EVP_MD_CTX_new();
  if (!hash || !hash->context || EVP_DigestInit_ex(hash->context, EVP_sha256(), NULL) != 1) {
    us_sha256_free(hash);
    return us_err_memory(err, "SHA-256", sizeof *hash);
  }
  *ret_hash = hash;
  return US_OK;
}

enum us_status us_sha256_update(struct us_sha256 *hash, const void *bytes, size_t n, struct us_err *err) {
  if (n == 0 || EVP_DigestUpdate(hash->context, bytes, n) == 1) return US_OK;
  return us_err_set(err, US_ERR_IO, "SHA-256 failed");
}

enum us_status us_sha256_finish(struct us_sha256 *hash, uint8_t ret_digest[US_SHA256_BYTES],
                                struct us_err *err) {
  int ok = EVP_DigestFinal_ex(hash->context, ret_digest, NULL);
  us_sha256_free(hash);
  return ok == 1 ? US_OK : us_err_set(err, US_ERR_IO, "SHA-256 failed");
}

void us_sha256_free(struct us_sha256 *hash) {
  if (!hash) return;
  EVP_MD_CTX_free(hash->context);
  free(hash);
}

enum us_status us_sha256_bytes(const void *bytes, size_t n, uint8_t ret_digest[US_SHA256_BYTES],
                               struct us_err *err) {
  struct us_sha256 *hash;
  enum us_status status = us_sha256_create(&hash, err);
  if (status != US_OK) return status;
  status = us_sha256_update(hash, bytes, n, err);
  if (status == US_OK) return us_sha256_finish(hash, ret_digest, err);
  us_sha256_free(hash);
  return status;
}

/* Feed a file's content by pieces: it may be larger than memory. */
static enum us_status update_from(struct us_sha256 *hash, int fd, const char *path, struct us_err *err) {
  uint8_t *piece = malloc(PIECE);
  if (!piece) return us_err_memory(err, "SHA-256", PIECE);
  enum us_status status = US_OK;
  while (status == US_OK) {
    ssize_t n = read(fd, piece, PIECE);
    if (n == 0) break;
    if (n < 0 && errno == EINTR) continue;
    status = n < 0 ? us_err_errno(err, US_ERR_IO, "cannot read '%s'", path)
                   : us_sha256_update(hash, piece, (size_t)n, err);
  }
  free(piece);
  return status;
}

enum us_status us_sha256_file(const char *path, char ret_hex[US_SHA256_HEX], struct us_err *err) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return us_err_errno(err, US_ERR_IO, "cannot open '%s'", path);
  struct us_sha256 *hash = NULL;
  uint8_t digest[US_SHA256_BYTES];
  enum us_status status = us_sha256_create(&hash, err);
  if (status == US_OK) status = update_from(hash, fd, path, err);
  if (status == US_OK)
    status = us_sha256_finish(hash, digest, err);
  else
    us_sha256_free(hash);
  if (status == US_OK) us_sha256_hex(digest, ret_hex);
  close(fd);
  return status;
}

void us_sha256_hex(const uint8_t digest[US_SHA256_BYTES], char ret_hex[US_SHA256_HEX]) {
  static const char digits[] = "0123456789abcdef";
  for (size_t i = 0; i < US_SHA256_BYTES; i++) {
    ret_hex[2 * i] = digits[digest[i] >> 4];
    ret_hex[2 * i + 1] = digits[digest[i] & 15];
  }
  ret_hex[2 * US_SHA256_BYTES] = 0;
}

bool us_sha256_is_hex(const char *text) {
  return strlen(text) == US_SHA256_HEX - 1 && strspn(text, "0123456789abcdef") == US_SHA256_HEX - 1;
}
