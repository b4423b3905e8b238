/* shards_write.c: documents to token shards.
 *
 * Contents: the writer; work on one document; what becomes of it; the file.
 */
#include "training/shards_write.h"
#include "base/h5.h"
#include "base/intern.h"
#include "base/sha256.h"
#include "training/corpus_batch.h"
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

struct entry {
  uint8_t digest[US_SHA256_BYTES];
  size_t begin, end; /* in ids and loss */
  enum us_part part;
};

/* What a thread made of a document. */
struct result {
  uint8_t digest[US_SHA256_BYTES];
  bool overlaps;
  struct us_buffer words; /* that overlap */
  struct us_ids ids;
  struct us_buffer loss;
};

struct worker {
  struct us_encoder *encoder;
  struct us_decontaminator *filter; /* shares the writer's */
};

struct us_shards_writer {
  const struct us_tokenizer *tokenizer;
  const char *tokenizer_json;
  double heldout;
  int32_t end_of_text;
  struct us_decontaminator *filter;
  void (*removed)(void *arg, const char *source, const char *words);
  void *removed_arg;
  struct us_corpus_batch batch;
  struct worker *workers; /* (n_workers) */
  int n_workers;
  struct result *results; /* (n_results) by place in the batch */
  size_t n_results;
  struct us_intern digests;
  struct entry *entries; /* one a digest */
  size_t n_entries, capacity;
  struct us_ids ids;
  struct us_buffer loss;
  struct us_shards_counts counts;
};

/* The writer */

static us_corpus_batch_begin prepare;
static us_corpus_batch_work work;
static us_corpus_batch_done keep;

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
  us_corpus_batch_init(&writer->batch, NULL, prepare, work, keep, writer);
  *ret_writer = writer;
  return US_OK;
}

void us_shards_writer_free(struct us_shards_writer *writer) {
  if (writer == NULL) return;
  us_corpus_batch_release(&writer->batch);
  for (size_t i = 0; i < writer->n_results; i++) {
    us_buffer_release(&writer->results[i].words);
    us_ids_release(&writer->results[i].ids);
    us_buffer_release(&writer->results[i].loss);
  }
  for (int i = 0; i < writer->n_workers; i++) {
    us_encoder_free(writer->workers[i].encoder);
    us_decontaminator_free(writer->workers[i].filter);
  }
  free(writer->results), free(writer->workers);
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

void us_shards_writer_threads(struct us_shards_writer *writer, struct us_pool *pool) {
  writer->batch.pool = pool;
}

/* Work on one document */

static enum us_status make_workers(struct us_shards_writer *writer, struct us_err *err) {
  int n = us_pool_threads(writer->batch.pool);
  if (writer->workers) return US_OK;
  writer->workers = calloc((size_t)n, sizeof *writer->workers);
  if (writer->workers == NULL) return us_err_memory(err, "token shards", (size_t)n * sizeof *writer->workers);
  enum us_status status = US_OK;
  for (int i = 0; i < n && status == US_OK; i++) {
    writer->n_workers = i + 1;
    status = us_encoder_create(writer->tokenizer, &writer->workers[i].encoder, err);
    if (status == US_OK && writer->filter)
      status = us_decontaminator_share(writer->filter, &writer->workers[i].filter, err);
  }
  return status;
}

/* Room for the results of n documents; their buffers are used again. */
static enum us_status prepare(size_t n, void *arg, struct us_err *err) {
  struct us_shards_writer *writer = arg;
  if (n > writer->n_results) {
    struct result *results = realloc(writer->results, n * sizeof *results);
    if (results == NULL) return us_err_memory(err, "documents", n * sizeof *results);
    memset(results + writer->n_results, 0, (n - writer->n_results) * sizeof *results);
    writer->results = results;
    writer->n_results = n;
  }
  return make_workers(writer, err);
}

/* Ids and loss marks of the document, and its end. The end of text is learned like the rest of plain text. */
static enum us_status tokenise(const struct us_shards_writer *writer, struct us_encoder *encoder,
                               const struct us_document *document, struct result *result,
                               struct us_err *err) {
  enum us_status status = US_OK;
  bool loss = true;
  result->ids.count = 0;
  us_buffer_clear(&result->loss);
  for (size_t i = 0; i < document->n_segments && status == US_OK; i++) {
    const struct us_segment *segment = &document->segments[i];
    loss = segment->loss;
    status = us_encoder_encode(encoder, document->text + segment->begin, segment->end - segment->begin,
                               document->formatted, &result->ids, err);
    if (status == US_OK)
      status = us_buffer_reserve(&result->loss, result->ids.count - result->loss.size, err);
    if (status != US_OK) break;
    memset(result->loss.data + result->loss.size, loss, result->ids.count - result->loss.size);
    result->loss.size = result->ids.count;
  }
  if (status == US_OK) status = us_ids_append(&result->ids, &writer->end_of_text, 1, err);
  char mark = (char)loss;
  return status == US_OK ? us_buffer_append(&result->loss, &mark, 1, err) : status;
}

static enum us_status work(const struct us_document *document, size_t index, int worker, void *arg,
                           struct us_err *err) {
  const struct us_shards_writer *writer = arg;
  const struct worker *mine = &writer->workers[worker];
  struct result *result = &writer->results[index];
  result->overlaps = false;
  us_buffer_clear(&result->words);
  enum us_status status = us_sha256_bytes(document->text, document->bytes, result->digest, err);
  if (status == US_OK && mine->filter)
    status = us_decontaminator_check(mine->filter, document->text, document->bytes, &result->overlaps,
                                     &result->words, err);
  if (status != US_OK || result->overlaps) return status;
  status = tokenise(writer, mine->encoder, document, result, err);
  return status == US_OK || err == NULL ? status : us_err_prefix(err, "%s", document->source);
}

/* What becomes of it */

static enum us_part part_of(const struct us_shards_writer *writer, const uint8_t digest[US_SHA256_BYTES]) {
  uint64_t leading = 0;
  for (int i = 0; i < 8; i++) leading = leading << 8 | digest[i];
  return (double)(leading >> 11) * 0x1p-53 < writer->heldout ? US_PART_HELDOUT : US_PART_TRAIN;
}

static enum us_status append(struct us_shards_writer *writer, const struct result *result,
                             struct us_err *err) {
  enum us_status status = us_ids_append(&writer->ids, result->ids.ids, result->ids.count, err);
  return status == US_OK ? us_buffer_append(&writer->loss, result->loss.data, result->loss.size, err)
                         : status;
}

/* In the order of documents: the first of equal ones stays. */
static enum us_status keep(const struct us_document *document, size_t index, void *arg, struct us_err *err) {
  struct us_shards_writer *writer = arg;
  const struct result *result = &writer->results[index];
  uint32_t known;
  bool added;
  writer->counts.read++;
  enum us_status status =
      us_intern_add(&writer->digests, result->digest, sizeof result->digest, &known, &added, err);
  if (status != US_OK) return status;
  if (!added) return writer->counts.duplicates++, US_OK;
  if (result->overlaps) {
    writer->counts.overlaps++;
    if (writer->removed) writer->removed(writer->removed_arg, document->source, result->words.data);
    return US_OK;
  }
  if (writer->n_entries == writer->capacity) {
    size_t capacity = writer->capacity ? 2 * writer->capacity : 1024;
    struct entry *entries = realloc(writer->entries, capacity * sizeof *entries);
    if (entries == NULL) return us_err_memory(err, "documents", capacity * sizeof *entries);
    writer->entries = entries;
    writer->capacity = capacity;
  }
  struct entry entry = {.begin = writer->ids.count, .part = part_of(writer, result->digest)};
  memcpy(entry.digest, result->digest, sizeof entry.digest);
  if ((status = append(writer, result, err)) != US_OK) return status;
  entry.end = writer->ids.count;
  writer->entries[writer->n_entries++] = entry;
  writer->counts.documents[entry.part]++;
  writer->counts.tokens[entry.part] += entry.end - entry.begin;
  writer->counts.bytes[entry.part] += document->bytes;
  for (size_t i = entry.begin; i < entry.end; i++)
    writer->counts.loss[entry.part] += (uint64_t)writer->loss.data[i];
  return US_OK;
}

enum us_status us_shards_writer_take(const struct us_document *document, void *arg, struct us_err *err) {
  struct us_shards_writer *writer = arg;
  return us_corpus_batch_take(document, &writer->batch, err);
}

enum us_status us_shards_writer_flush(struct us_shards_writer *writer, struct us_err *err) {
  return us_corpus_batch_flush(&writer->batch, err);
}

/* The file */

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
  enum us_status status = us_shards_writer_flush(writer, err);
  if (status != US_OK) return status;
  if (writer->counts.tokens[US_PART_TRAIN] == 0)
    return us_err_set(
        err, US_ERR_INPUT,
        "no document is left to train on: %llu read, %llu duplicates, %llu overlapping, %llu held out",
        (unsigned long long)writer->counts.read, (unsigned long long)writer->counts.duplicates,
        (unsigned long long)writer->counts.overlaps,
        (unsigned long long)writer->counts.documents[US_PART_HELDOUT]);
  if (writer->n_entries > 0) qsort(writer->entries, writer->n_entries, sizeof *writer->entries, by_digest);
  if (path == NULL) return US_OK;
  status = us_h5_create(path, "tokens", &out, err);
  if (status != US_OK) return status;
  status = us_h5_put_text(out, "provenance", provenance_json, err);
  if (status == US_OK) status = write_header(writer, out, err);
  for (int part = 0; part < US_N_PARTS && status == US_OK; part++)
    status = write_part(writer, out, part, err);
  if (status == US_OK) return us_h5_finish(out, err);
  us_h5_abandon(out);
  return status;
}
