/* mask_embedding.c: read and write the drafter's mask_embedding.pt. */
#include "formats/mask_embedding.h"

#include "base/atomic.h"
#include "base/buffer.h"
#include "formats/bf16.h"
#include "formats/f16.h"
#include "formats/torch_pickle.h"
#include "formats/zip_stored.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILE_BYTES (64u + 8u * US_MASK_EMBEDDING_MAX) /* FP32 values and as much again */

/* ---- reading ---- */

static float element(const struct us_torch_item *item, const uint8_t *data, size_t i) {
  uint32_t bits;
  uint16_t half;
  if (strcmp(item->dtype, "FloatStorage") == 0) {
    memcpy(&bits, data + 4 * i, sizeof bits);
    return us_f32_from_bits(bits);
  }
  memcpy(&half, data + 2 * i, sizeof half);
  return strcmp(item->dtype, "HalfStorage") == 0 ? us_f16_to_f32(half) : us_bf16_to_f32(half);
}

/* The storage's bytes; they must be exactly what the pickle says, and the vector must lie inside. */
static enum us_status find_storage(const void *bytes, size_t n, const char *name,
                                   const struct us_torch_item *item, struct us_zip_member *ret_data,
                                   struct us_err *err) {
  if (item->elements < 1 || item->elements > US_MASK_EMBEDDING_MAX)
    return us_err_set(err, US_ERR_INPUT, "%s: embedding has %lld values", name, (long long)item->elements);
  if (item->stride != 1 && item->elements > 1)
    return us_err_set(err, US_ERR_INPUT, "%s: embedding has a stride of %lld", name, (long long)item->stride);
  if (item->offset > item->storage_elements || item->storage_elements - item->offset < item->elements)
    return us_err_set(err, US_ERR_INPUT, "%s: embedding reaches beyond its storage", name);
  char suffix[US_TORCH_NAME_MAX + 8];
  snprintf(suffix, sizeof suffix, "/data/%s", item->storage);
  enum us_status status = us_zip_find(bytes, n, name, suffix, ret_data, err);
  if (status != US_OK) return status;
  size_t width = strcmp(item->dtype, "FloatStorage") == 0 ? 4 : 2;
  if (!ret_data->data || ret_data->bytes % width ||
      ret_data->bytes / width != (uint64_t)item->storage_elements)
    return us_err_set(err, US_ERR_INPUT, "%s: the embedding's storage is missing or has another size", name);
  return US_OK;
}

static enum us_status read_vector(const struct us_torch_item *item, const uint8_t *data, const char *name,
                                  struct us_mask_embedding *mask, struct us_err *err) {
  mask->hidden = (size_t)item->elements;
  mask->values = malloc(mask->hidden * sizeof *mask->values);
  if (!mask->values) return us_err_memory(err, name, mask->hidden * sizeof *mask->values);
  for (size_t i = 0; i < mask->hidden; i++) {
    mask->values[i] = element(item, data, (size_t)item->offset + i);
    if ((us_f32_bits(mask->values[i]) & 0x7fffffffu) < 0x7f800000u) continue;
    us_mask_embedding_release(mask);
    return us_err_set(err, US_ERR_INPUT, "%s: embedding value %zu is not finite", name, i);
  }
  return US_OK;
}

enum us_status us_mask_embedding_parse(const void *bytes, size_t n, const char *name,
                                       struct us_mask_embedding *ret_mask, struct us_err *err) {
  *ret_mask = (struct us_mask_embedding){0};
  struct us_zip_member pickle, order, data;
  enum us_status status = us_zip_find(bytes, n, name, "/data.pkl", &pickle, err);
  if (status == US_OK) status = us_zip_find(bytes, n, name, "/byteorder", &order, err);
  if (status != US_OK) return status;
  if (!pickle.data) return us_err_set(err, US_ERR_INPUT, "%s: no data.pkl: not a torch.save file", name);
  if (order.data && (order.bytes != 6 || memcmp(order.data, "little", 6) != 0))
    return us_err_set(err, US_ERR_INPUT, "%s: byteorder is not little", name);
  struct us_torch_dict dict;
  if (us_torch_dict_parse(pickle.data, pickle.bytes, &dict, err) != US_OK) {
    us_err_prefix(err, "%s", name);
    return US_ERR_INPUT;
  }
  const struct us_torch_item *id = us_torch_dict_find(&dict, "mask_token_id");
  const struct us_torch_item *embedding = us_torch_dict_find(&dict, "embedding");
  if (!id || id->type != US_TORCH_INT || id->integer < 0)
    return us_err_set(err, US_ERR_INPUT, "%s: mask_token_id is missing or not a token id", name);
  if (!embedding || embedding->type != US_TORCH_TENSOR)
    return us_err_set(err, US_ERR_INPUT, "%s: embedding is missing or not a tensor", name);
  status = find_storage(bytes, n, name, embedding, &data, err);
  if (status == US_OK) status = read_vector(embedding, data.data, name, ret_mask, err);
  ret_mask->mask_token_id = id->integer;
  return status;
}

enum us_status us_mask_embedding_read(const char *path, struct us_mask_embedding *ret_mask,
                                      struct us_err *err) {
  struct us_buffer file = {0};
  *ret_mask = (struct us_mask_embedding){0};
  enum us_status status = us_buffer_read_file(&file, path, MAX_FILE_BYTES, err);
  if (status == US_OK) status = us_mask_embedding_parse(file.data, file.size, path, ret_mask, err);
  us_buffer_release(&file);
  return status;
}

void us_mask_embedding_release(struct us_mask_embedding *mask) {
  free(mask->values);
  *mask = (struct us_mask_embedding){0};
}

/* ---- writing ---- */

static void put(uint8_t *to, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; i++) to[i] = (uint8_t)(value >> (8 * i));
}

struct zip {
  struct us_buffer file, directory;
  int members;
  enum us_status status;
};

static void zip_append(struct us_buffer *buffer, const void *bytes, size_t n, struct zip *zip,
                       struct us_err *err) {
  if (zip->status == US_OK) zip->status = us_buffer_append(buffer, bytes, n, err);
}

/* Add a stored member whose data begins at a multiple of 64, padded by an extra field "FB" as torch does. */
static void zip_add(struct zip *zip, const char *name, const void *data, size_t bytes, struct us_err *err) {
  static const uint8_t zeros[64];
  size_t offset = zip->file.size, name_bytes = strlen(name);
  size_t extra = 4 + (64 - (offset + 30 + name_bytes + 4) % 64) % 64;
  uint8_t local[30] = {'P', 'K', 3, 4, 20}, entry[46] = {'P', 'K', 1, 2, 20, 0, 20}, field[4] = {'F', 'B'};
  uint8_t sizes[16];
  put(sizes, us_zip_crc32(data, bytes), 4);
  put(sizes + 4, bytes, 4);
  put(sizes + 8, bytes, 4);
  put(sizes + 12, name_bytes, 2);
  memcpy(local + 14, sizes, 14);
  memcpy(entry + 16, sizes, 14);
  put(local + 28, extra, 2);
  put(field + 2, extra - 4, 2);
  put(entry + 42, offset, 4);
  /* 1980-01-01, the earliest date of a zip: the file depends on its content only. */
  put(local + 12, 0x21, 2);
  put(entry + 14, 0x21, 2);
  zip_append(&zip->file, local, sizeof local, zip, err);
  zip_append(&zip->file, name, name_bytes, zip, err);
  zip_append(&zip->file, field, sizeof field, zip, err);
  zip_append(&zip->file, zeros, extra - 4, zip, err);
  zip_append(&zip->file, data, bytes, zip, err);
  zip_append(&zip->directory, entry, sizeof entry, zip, err);
  zip_append(&zip->directory, name, name_bytes, zip, err);
  zip->members++;
}

static void zip_finish(struct zip *zip, struct us_err *err) {
  uint8_t end[22] = {'P', 'K', 5, 6};
  put(end + 8, (uint64_t)zip->members, 2);
  put(end + 10, (uint64_t)zip->members, 2);
  put(end + 12, zip->directory.size, 4);
  put(end + 16, zip->file.size, 4);
  zip_append(&zip->file, zip->directory.data, zip->directory.size, zip, err);
  zip_append(&zip->file, end, sizeof end, zip, err);
}

/* The pickle that torch.save writes for the dict, without memo entries that nothing loads. Returns its
 * length. */
static size_t print_pickle(const struct us_mask_embedding *mask, uint8_t *out) {
  static const char head[] = "\x80\x02}(X\x0d\0\0\0mask_token_id\x8a\x08";
  static const char middle[] = "X\x09\0\0\0embeddingctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"
                               "ctorch\nBFloat16Storage\nX\x01\0\0\0"
                               "0X\x03\0\0\0cpuJ";
  static const char tail[] = "K\x01\x85\x89"
                             "ccollections\nOrderedDict\n)RtRu.";
  uint8_t *p = out, count[4];
  put(count, mask->hidden, 4);
  memcpy(p, head, sizeof head - 1);
  p += sizeof head - 1;
  put(p, (uint64_t)mask->mask_token_id, 8);
  p += 8;
  memcpy(p, middle, sizeof middle - 1);
  p += sizeof middle - 1;
  memcpy(p, count, 4);
  memcpy(p + 4, "tQK\0J", 5);
  memcpy(p + 9, count, 4);
  p[13] = 0x85;
  p += 14;
  memcpy(p, tail, sizeof tail - 1);
  return (size_t)(p - out) + sizeof tail - 1;
}

enum us_status us_mask_embedding_write(const char *path, const struct us_mask_embedding *mask,
                                       struct us_err *err) {
  if (mask->hidden < 1 || mask->hidden > US_MASK_EMBEDDING_MAX || mask->mask_token_id < 0)
    return us_err_set(err, US_ERR_USAGE, "%s: %zu values for mask id %lld", path, mask->hidden,
                      (long long)mask->mask_token_id);
  uint16_t *halves = malloc(mask->hidden * sizeof *halves);
  if (!halves) return us_err_memory(err, path, mask->hidden * sizeof *halves);
  us_bf16_encode(mask->values, mask->hidden, halves);
  uint8_t pickle[512];
  struct zip zip = {0};
  zip_add(&zip, "mask_embedding/data.pkl", pickle, print_pickle(mask, pickle), err);
  zip_add(&zip, "mask_embedding/byteorder", "little", 6, err);
  zip_add(&zip, "mask_embedding/data/0", halves, mask->hidden * sizeof *halves, err);
  zip_add(&zip, "mask_embedding/version", "3\n", 2, err);
  zip_finish(&zip, err);
  struct us_atomic out = {.fd = -1};
  enum us_status status = zip.status;
  if (status == US_OK) status = us_atomic_open(path, &out, err);
  if (status == US_OK && !us_atomic_write(out.fd, zip.file.data, zip.file.size, 0)) {
    status = us_err_errno(err, US_ERR_IO, "%s: cannot write", path);
    us_atomic_abandon(&out);
  }
  if (status == US_OK) status = us_atomic_commit(&out, err);
  us_buffer_release(&zip.file);
  us_buffer_release(&zip.directory);
  free(halves);
  return status;
}
