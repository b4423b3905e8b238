/* shards.c: read token shards. */
#include "training/shards.h"
#include "base/h5.h"
#include "base/json.h"
#include "base/philox.h"
#include "base/sha256.h"
#include <stdlib.h>
#include <string.h>

/* __extension__: pedantic ISO C has no 128-bit integers. */
__extension__ typedef unsigned __int128 us_u128;

struct part {
  const int32_t *ids;
  const uint8_t *loss;
  const uint64_t *documents; /* (n_documents + 1) */
  size_t n, n_documents;
  uint64_t text_bytes;
};

struct us_shards {
  struct us_h5 *file;
  struct part parts[US_N_PARTS];
  int32_t vocab;
  char tokenizer_sha256[US_SHA256_HEX];
};

enum us_status us_window_init(struct us_window *window, size_t length, struct us_err *err) {
  *window = (struct us_window){.length = length};
  if (length == 0 || length > SIZE_MAX / 16)
    return us_err_set(err, US_ERR_USAGE, "a window of %zu tokens", length);
  window->ids = calloc(length, sizeof *window->ids);
  window->loss = calloc(length, sizeof *window->loss);
  window->document = calloc(length, sizeof *window->document);
  if (window->ids && window->loss && window->document) return US_OK;
  us_window_release(window);
  return us_err_memory(err, "a window", length * 9);
}

void us_window_release(struct us_window *window) {
  free(window->ids);
  free(window->loss);
  free(window->document);
  *window = (struct us_window){0};
}

static enum us_status open_header(struct us_shards *shards, const char *path, struct us_err *err) {
  const char *text = us_h5_text(shards->file, "header"), *hex;
  json_t *header = NULL, *bytes;
  int64_t vocab = 0;
  if (text == NULL) return us_err_set(err, US_ERR_INPUT, "%s: header: missing", path);
  enum us_status status = us_json_parse(text, strlen(text), path, &header, err);
  if (status == US_OK) status = us_json_int(header, path, "vocab", 1, INT32_MAX, &vocab, err);
  if (status == US_OK) status = us_json_str(header, path, "tokenizer_sha256", &hex, err);
  if (status == US_OK && !us_sha256_is_hex(hex))
    status = us_err_set(err, US_ERR_INPUT, "%s: tokenizer_sha256: not a SHA-256", path);
  if (status == US_OK) memcpy(shards->tokenizer_sha256, hex, US_SHA256_HEX);
  if (status == US_OK) status = us_json_array(header, path, "text_bytes", US_N_PARTS, &bytes, err);
  for (int part = 0; part < US_N_PARTS && status == US_OK; part++) {
    const json_t *value = json_array_get(bytes, (size_t)part);
    if (!json_is_integer(value) || json_integer_value(value) < 0)
      status = us_err_set(err, US_ERR_INPUT, "%s: text_bytes[%d]: not a number of bytes", path, part);
    else
      shards->parts[part].text_bytes = (uint64_t)json_integer_value(value);
  }
  shards->vocab = (int32_t)vocab;
  json_decref(header);
  return status;
}

static enum us_status open_part(struct us_shards *shards, const char *path, const char *name,
                                struct part *part, struct us_err *err) {
  const struct us_h5_dataset *ids, *loss, *documents;
  char field[3][32];
  snprintf(field[0], 32, "%s/ids", name);
  snprintf(field[1], 32, "%s/loss", name);
  snprintf(field[2], 32, "%s/documents", name);
  enum us_status status = us_h5_get(shards->file, field[0], US_H5_I32, 1, NULL, &ids, err);
  if (status == US_OK) status = us_h5_get(shards->file, field[1], US_H5_U8, 1, &ids->dims[0], &loss, err);
  if (status == US_OK) status = us_h5_get(shards->file, field[2], US_H5_U64, 1, NULL, &documents, err);
  if (status != US_OK) return status;
  *part = (struct part){.ids = ids->data,
                        .loss = loss->data,
                        .documents = documents->data,
                        .n = ids->count,
                        .n_documents = documents->count - 1,
                        .text_bytes = part->text_bytes};
  if (documents->count == 0 || loss->count != ids->count || part->documents[0] != 0 ||
      part->documents[part->n_documents] != part->n)
    return us_err_set(err, US_ERR_INPUT, "%s: %s: does not cover the %zu ids", path, field[2], part->n);
  for (size_t i = 0; i < part->n_documents; i++)
    if (part->documents[i] >= part->documents[i + 1])
      return us_err_set(err, US_ERR_INPUT, "%s: %s[%zu]: not ascending", path, field[2], i);
  for (size_t i = 0; i < part->n; i++)
    if (part->ids[i] < 0 || part->ids[i] >= shards->vocab || part->loss[i] > 1)
      return us_err_set(err, US_ERR_INPUT, "%s: %s[%zu]: id %d or its loss mark is out of range", path,
                        field[0], i, part->ids[i]);
  return US_OK;
}

enum us_status us_shards_open(const char *path, struct us_shards **ret_shards, struct us_err *err) {
  struct us_shards *shards = calloc(1, sizeof *shards);
  if (shards == NULL) return us_err_memory(err, "token shards", sizeof *shards);
  enum us_status status = us_h5_open(path, "tokens", &shards->file, err);
  if (status == US_OK) status = open_header(shards, path, err);
  if (status == US_OK) status = open_part(shards, path, "train", &shards->parts[US_PART_TRAIN], err);
  if (status == US_OK) status = open_part(shards, path, "heldout", &shards->parts[US_PART_HELDOUT], err);
  if (status == US_OK && us_h5_text(shards->file, "tokenizer") == NULL)
    status = us_err_set(err, US_ERR_INPUT, "%s: tokenizer: missing", path);
  if (status == US_OK)
    *ret_shards = shards;
  else
    us_shards_close(shards);
  return status;
}

void us_shards_close(struct us_shards *shards) {
  if (shards == NULL) return;
  us_h5_close(shards->file);
  free(shards);
}

size_t us_shards_tokens(const struct us_shards *shards, enum us_part part) {
  return shards->parts[part].n;
}
size_t us_shards_documents(const struct us_shards *shards, enum us_part part) {
  return shards->parts[part].n_documents;
}
int32_t us_shards_vocab(const struct us_shards *shards) {
  return shards->vocab;
}
const char *us_shards_tokenizer_sha256(const struct us_shards *shards) {
  return shards->tokenizer_sha256;
}
const char *us_shards_tokenizer(const struct us_shards *shards) {
  return us_h5_text(shards->file, "tokenizer");
}
uint64_t us_shards_text_bytes(const struct us_shards *shards, enum us_part part) {
  return shards->parts[part].text_bytes;
}

void us_shards_document(const struct us_shards *shards, enum us_part part, size_t i, size_t *ret_begin,
                        size_t *ret_end) {
  *ret_begin = shards->parts[part].documents[i];
  *ret_end = shards->parts[part].documents[i + 1];
}

/* The document that token `at` belongs to. */
static size_t document_at(const struct part *part, size_t at) {
  size_t low = 0, high = part->n_documents;
  while (high - low > 1) {
    size_t middle = low + (high - low) / 2;
    if (part->documents[middle] <= at)
      low = middle;
    else
      high = middle;
  }
  return low;
}

void us_shards_copy(const struct us_shards *shards, enum us_part part_index, size_t begin,
                    struct us_window *window) {
  const struct part *part = &shards->parts[part_index];
  size_t left = begin < part->n ? part->n - begin : 0;
  window->n = left < window->length ? left : window->length;
  if (window->n == 0) return;
  memcpy(window->ids, part->ids + begin, window->n * sizeof *window->ids);
  memcpy(window->loss, part->loss + begin, window->n);
  size_t first = document_at(part, begin), document = first;
  for (size_t i = 0; i < window->n; i++) {
    if (begin + i == part->documents[document + 1]) document++;
    window->document[i] = (int32_t)(document - first);
  }
}

bool us_shards_can_sample(const struct us_shards *shards, size_t length) {
  return length > 0 && length <= shards->parts[US_PART_TRAIN].n;
}

/* Counter: (step, index, their upper halves, stream). The 64-bit draw times the range, upper half: a bias below 2^-32 for
 * any corpus, and no rejection loop. */
void us_shards_sample_across(const struct us_shards *shards, uint64_t seed, uint64_t step, uint64_t index,
                             double across, struct us_window *window) {
  struct us_philox_key key = us_philox_key(seed);
  uint32_t counter[4] = {(uint32_t)step, (uint32_t)index,
                         (uint32_t)(step >> 32) ^ (uint32_t)(index >> 32) << 16, US_STREAM_SHUFFLE};
  uint32_t word[4];
  us_philox4x32(counter, key.word, word);
  uint64_t range = shards->parts[US_PART_TRAIN].n - window->length + 1;
  uint64_t draw = (uint64_t)word[1] << 32 | word[0];
  us_shards_copy(shards, US_PART_TRAIN, (size_t)((us_u128)draw * range >> 64), window);
  if ((double)word[2] * 0x1p-32 < across) memset(window->document, 0, window->n * sizeof *window->document);
}

void us_shards_sample(const struct us_shards *shards, uint64_t seed, uint64_t step, uint64_t index,
                      struct us_window *window) {
  us_shards_sample_across(shards, seed, step, index, 0.0, window);
}

size_t us_shards_n_heldout(const struct us_shards *shards, size_t length) {
  size_t n = shards->parts[US_PART_HELDOUT].n;
  return n < 2 || length < 2 ? 0 : (n - 2) / (length - 1) + 1;
}

void us_shards_heldout(const struct us_shards *shards, size_t i, struct us_window *window) {
  us_shards_copy(shards, US_PART_HELDOUT, i * (window->length - 1), window);
}
