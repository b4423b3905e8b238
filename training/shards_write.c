/* shards_write.c: documents to token shards. */
#include "training/shards_write.h"
#include "base/h5.h"
#include "base/intern.h"
#include "base/sha256.h"
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

struct entry {
  uint8_t digest[US_SHA256_BYTES];
  size_t begin, end; /* in ids and loss */
  enum us_part part;
};

struct us_shards_writer {
  const struct us_tokenizer *tokenizer;
  const char *tokenizer_json;
  double heldout;
  int32_t end_of_text;
  struct us_decontaminator *filter;
  void (*removed)(void *arg, const char *source, const char *words);
  void *removed_arg;
  struct us_intern digests;
  struct entry *entries; /* one a digest */
  size_t n_entries, capacity;
  struct us_ids ids;
  struct us_buffer loss;
  struct us_shards_counts counts;
};

enum us_status us_shards_writer_create(const struct us_tokenizer *tokenizer, const char *tokenizer_json,
                                       double heldout, struct us_shards_writer **ret_writer,
                                       struct us_err *err) {
  int32_t end_of_text = us_tokenizer_id(tokenizer, "<|endoftext|>");
  if (end_of_text < 0) return us_err_set(err, US_ERR_INPUT, "the tokenizer has no <|endoftext|>");
  if (!(heldout >= 0 && heldout <= 1))
    return us_err_set(err, US_ERR_USAGE, "held-out share %g is not in 0..1", heldout);
  struct us_shards_writer *writer = calloc(1, sizeof *writer);
  if (writer == NULL) return us_err_memory(err, "token shards", sizeof *writer);
  writer->tokenizer = tokenizer;
  writer->tokenizer_json = tokenizer_json;
  writer->heldout = heldout;
  writer->end_of_text = end_of_text;
  *ret_writer = writer;
  return US_OK;
}

void us_shards_writer_free(struct us_shards_writer *writer) {
  if (writer == NULL) return;
  us_intern_release(&writer->digests);
  us_ids_release(&writer->ids);
  us_buffer_release(&writer->loss);
  free(writer->entries);
  free(writer);
}

void us_shards_writer_filter(struct us_shards_writer *writer, struct us_decontaminator *filter,
                             void (*removed)(void *arg, const char *source, const char *words), void *arg) {
  writer->filter = filter;
  writer->removed = removed;
  writer->removed_arg = arg;
}

const struct us_shards_counts *us_shards_writer_counts(const struct us_shards_writer *writer) {
  return &writer->counts;
}

static enum us_status overlaps(struct us_shards_writer *writer, const struct us_document *document,
                               bool *ret_overlaps, struct us_err *err) {
  struct us_buffer words = {0};
  *ret_overlaps = false;
  if (writer->filter == NULL) return US_OK;
  enum us_status status =
      us_decontaminator_check(writer->filter, document->text, document->bytes, ret_overlaps, &words, err);
  if (status == US_OK && *ret_overlaps) {
    writer->counts.overlaps++;
    if (writer->removed) writer->removed(writer->removed_arg, document->source, words.data);
  }
  us_buffer_release(&words);
  return status;
}

/* Append ids and loss marks of the document, and its end. The end of text is learned like the rest of plain text. */
static enum us_status tokenise(struct us_shards_writer *writer, const struct us_document *document,
                               struct us_err *err) {
  enum us_status status = US_OK;
  bool loss = true;
  for (size_t i = 0; i < document->n_segments && status == US_OK; i++) {
    const struct us_segment *segment = &document->segments[i];
    loss = segment->loss;
    status = us_tokenizer_encode(writer->tokenizer, document->text + segment->begin,
                                 segment->end - segment->begin, document->formatted, &writer->ids, err);
    if (status == US_OK)
      status = us_buffer_reserve(&writer->loss, writer->ids.count - writer->loss.size, err);
    if (status != US_OK) break;
    memset(writer->loss.data + writer->loss.size, loss, writer->ids.count - writer->loss.size);
    writer->loss.size = writer->ids.count;
  }
  if (status == US_OK) status = us_ids_append(&writer->ids, &writer->end_of_text, 1, err);
  char mark = (char)loss;
  return status == US_OK ? us_buffer_append(&writer->loss, &mark, 1, err) : status;
}

static enum us_part part_of(const struct us_shards_writer *writer, const uint8_t digest[US_SHA256_BYTES]) {
  uint64_t leading = 0;
  for (int i = 0; i < 8; i++) leading = leading << 8 | digest[i];
  return (double)(leading >> 11) * 0x1p-53 < writer->heldout ? US_PART_HELDOUT : US_PART_TRAIN;
}

enum us_status us_shards_writer_take(const struct us_document *document, void *arg, struct us_err *err) {
  struct us_shards_writer *writer = arg;
  uint8_t digest[US_SHA256_BYTES];
  uint32_t index;
  bool added, overlap;
  writer->counts.read++;
  enum us_status status = us_sha256_bytes(document->text, document->bytes, digest, err);
  if (status == US_OK) status = us_intern_add(&writer->digests, digest, sizeof digest, &index, &added, err);
  if (status != US_OK) return status;
  if (!added) return writer->counts.duplicates++, US_OK;
  if ((status = overlaps(writer, document, &overlap, err)) != US_OK || overlap) return status;
  if (writer->n_entries == writer->capacity) {
    size_t capacity = writer->capacity ? 2 * writer->capacity : 1024;
    struct entry *entries = realloc(writer->entries, capacity * sizeof *entries);
    if (entries == NULL) return us_err_memory(err, "documents", capacity * sizeof *entries);
    writer->entries = entries;
    writer->capacity = capacity;
  }
  struct entry entry = {.begin = writer->ids.count, .part = part_of(writer, digest)};
  memcpy(entry.digest, digest, sizeof digest);
  if ((status = tokenise(writer, document, err)) != US_OK) return us_err_prefix(err, "%s", document->source);
  entry.end = writer->ids.count;
  writer->entries[writer->n_entries++] = entry;
  writer->counts.documents[entry.part]++;
  writer->counts.tokens[entry.part] += entry.end - entry.begin;
  writer->counts.bytes[entry.part] += document->bytes;
  for (size_t i = entry.begin; i < entry.end; i++)
    writer->counts.loss[entry.part] += (uint64_t)writer->loss.data[i];
  return US_OK;
}

static int by_digest(const void *a, const void *b) {
  return memcmp(((const struct entry *)a)->digest, ((const struct entry *)b)->digest, US_SHA256_BYTES);
}

static enum us_status write_part(const struct us_shards_writer *writer, struct us_h5_writer *out,
                                 enum us_part part, struct us_err *err) {
  const char *names[US_N_PARTS][3] = {{"train/ids", "train/loss", "train/documents"},
                                      {"heldout/ids", "heldout/loss", "heldout/documents"}};
  size_t n = writer->counts.tokens[part], edges = writer->counts.documents[part] + 1, slots[3];
  enum us_status status = us_h5_reserve(out, names[part][0], US_H5_I32, 1, &n, &slots[0], err);
  if (status == US_OK) status = us_h5_reserve(out, names[part][1], US_H5_U8, 1, &n, &slots[1], err);
  if (status == US_OK) status = us_h5_reserve(out, names[part][2], US_H5_U64, 1, &edges, &slots[2], err);
  uint64_t at = 0;
  size_t document = 0;
  if (status == US_OK) status = us_h5_write(out, slots[2], 0, 1, &at, err);
  for (size_t i = 0; i < writer->n_entries && status == US_OK; i++) {
    const struct entry *entry = &writer->entries[i];
    if (entry->part != part) continue;
    size_t count = entry->end - entry->begin;
    status = us_h5_write(out, slots[0], at, count, writer->ids.ids + entry->begin, err);
    if (status == US_OK)
      status = us_h5_write(out, slots[1], at, count, writer->loss.data + entry->begin, err);
    at += count;
    if (status == US_OK) status = us_h5_write(out, slots[2], ++document, 1, &at, err);
  }
  return status;
}

/* What the reader checks the datasets against. */
static enum us_status write_header(const struct us_shards_writer *writer, struct us_h5_writer *out,
                                   struct us_err *err) {
  const struct us_shards_counts *counts = &writer->counts;
  uint8_t digest[US_SHA256_BYTES];
  char hex[US_SHA256_HEX];
  enum us_status status =
      us_sha256_bytes(writer->tokenizer_json, strlen(writer->tokenizer_json), digest, err);
  if (status != US_OK) return status;
  us_sha256_hex(digest, hex);
  json_t *header =
      json_pack("{s:i, s:i, s:s, s:[I, I], s:I, s:I}", "vocab", (int)us_tokenizer_size(writer->tokenizer),
                "end_of_text", (int)writer->end_of_text, "tokenizer_sha256", hex, "text_bytes",
                (json_int_t)counts->bytes[0], (json_int_t)counts->bytes[1], "duplicates",
                (json_int_t)counts->duplicates, "overlaps", (json_int_t)counts->overlaps);
  char *text = header ? json_dumps(header, JSON_COMPACT) : NULL;
  json_decref(header);
  status = text ? us_h5_put_text(out, "header", text, err) : us_err_memory(err, "header", 256);
  free(text);
  return status == US_OK ? us_h5_put_text(out, "tokenizer", writer->tokenizer_json, err) : status;
}

enum us_status us_shards_writer_finish(struct us_shards_writer *writer, const char *path,
                                       const char *provenance_json, struct us_err *err) {
  struct us_h5_writer *out = NULL;
  if (writer->counts.tokens[US_PART_TRAIN] == 0)
    return us_err_set(err, US_ERR_INPUT,
                      "no document is left to train on: %llu read, %llu duplicates, %llu overlapping",
                      (unsigned long long)writer->counts.read, (unsigned long long)writer->counts.duplicates,
                      (unsigned long long)writer->counts.overlaps);
  if (writer->n_entries > 0) qsort(writer->entries, writer->n_entries, sizeof *writer->entries, by_digest);
  if (path == NULL) return US_OK;
  enum us_status status = us_h5_create(path, "tokens", &out, err);
  if (status != US_OK) return status;
  status = us_h5_put_text(out, "provenance", provenance_json, err);
  if (status == US_OK) status = write_header(writer, out, err);
  for (int part = 0; part < US_N_PARTS && status == US_OK; part++)
    status = write_part(writer, out, part, err);
  if (status == US_OK) return us_h5_finish(out, err);
  us_h5_abandon(out);
  return status;
}
