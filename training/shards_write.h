/* shards_write.h: documents to token shards.
 *
 *     struct us_shards_writer *writer;
 *     us_shards_writer_create(tokenizer, tokenizer_json, 0.02, &writer, &err);
 *     us_corpus_read("text/", &options, us_shards_writer_take, writer, &err);
 *     us_shards_writer_finish(writer, "text.h5", provenance_json, &err);      // NULL path: nothing is written
 *     us_shards_writer_free(writer);
 *
 * With threads, documents wait for each other in batches (corpus_batch.h): us_shards_writer_flush before counts are read.
 *
 * A document whose text came before is dropped. Its part and place follow from the SHA-256 of its text: bytes 0..7, as a
 * big-endian fraction, below `heldout` is held out; each part is in the order of the whole digest.
 */
#ifndef US_TRAINING_SHARDS_WRITE_H
#define US_TRAINING_SHARDS_WRITE_H

#include "base/pool.h"
#include "formats/tokenizer.h"
#include "training/corpus.h"
#include "training/decontaminate.h"
#include "training/shards.h"

struct us_shards_writer;

struct us_shards_counts {
  uint64_t read, duplicates, overlaps;                /* documents */
  uint64_t documents[US_N_PARTS], tokens[US_N_PARTS]; /* what was kept */
  uint64_t bytes[US_N_PARTS], loss[US_N_PARTS];       /* text bytes; tokens with a loss */
};

/* The tokenizer and its JSON text must outlive the writer. It must have <|endoftext|>: US_ERR_INPUT. heldout in [0, 1]. */
US_CHECKED enum us_status us_shards_writer_create(const struct us_tokenizer *tokenizer,
                                                  const char *tokenizer_json, double heldout,
                                                  struct us_shards_writer **ret_writer, struct us_err *err);
void us_shards_writer_free(struct us_shards_writer *writer);

/* Leave out documents that overlap with a prompt. The filter must outlive the writer. `removed` (NULL allowed) is told of
 * each: its source and the 13 words. */
void us_shards_writer_filter(struct us_shards_writer *writer, struct us_decontaminator *filter,
                             void (*removed)(void *arg, const char *source, const char *words), void *arg);

/* Filter and tokenise on all threads of the pool, which must outlive the writer, with the same result. Before the first document. */
void us_shards_writer_threads(struct us_shards_writer *writer, struct us_pool *pool);

/* Tokenise one document: a us_corpus_take whose arg is the writer. */
US_CHECKED enum us_status us_shards_writer_take(const struct us_document *document, void *writer,
                                                struct us_err *err);

/* Tokenise what is still waiting. */
US_CHECKED enum us_status us_shards_writer_flush(struct us_shards_writer *writer, struct us_err *err);

const struct us_shards_counts *us_shards_writer_counts(const struct us_shards_writer *writer);

/* Write the file (atomically). US_ERR_INPUT if the training part has no token. */
US_CHECKED enum us_status us_shards_writer_finish(struct us_shards_writer *writer, const char *path,
                                                  const char *provenance_json, struct us_err *err);

#endif
