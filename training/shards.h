/* shards.h: tokenised text for training: an HDF5 file of ids, document edges and loss masks, train and
 * held-out.
 *
 *     struct us_shards *shards;
 *     if (us_shards_open("text.h5", &shards, &err) != US_OK) return err.status;
 *     struct us_window window;
 *     us_window_init(&window, 513, &err);                 // 512 inputs and their labels
 *     for (step...) for (index < batch...) us_shards_sample(shards, seed, step, index, &window);
 *     for (size_t i = 0; i < us_shards_n_heldout(shards, 513); i++) us_shards_heldout(shards, i, &window);
 *     us_window_release(&window); us_shards_close(shards);
 *
 * A document never lies in both parts: the part is decided by the hash of its text. Documents of a part
 * follow each other in the order of their hashes (a fixed shuffle), each ended by the end-of-text token.
 * File: docs/formats.md.
 */
#ifndef US_TRAINING_SHARDS_H
#define US_TRAINING_SHARDS_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum us_part { US_PART_TRAIN, US_PART_HELDOUT, US_N_PARTS };

/* One sequence. document[i] counts from 0 and rises by one where a new document begins: attention, and the
 * label of position i (ids[i + 1]), may be cut there. */
struct us_window {
  size_t length;
  size_t n;      /* tokens filled: length, or fewer at the end of a held-out part */
  int32_t *ids;  /* (length) */
  uint8_t *loss; /* (length) 1 where a loss on predicting this token counts (assistant or answer text; all of
                    plain text) */
  int32_t *document; /* (length) */
};

US_CHECKED enum us_status us_window_init(struct us_window *window, size_t length, struct us_err *err);
void us_window_release(struct us_window *window);

struct us_shards;

/* Open and check a file (user block, shapes, offsets ascending, every id < vocabulary). US_ERR_IO,
 * US_ERR_INPUT. */
US_CHECKED enum us_status us_shards_open(const char *path, struct us_shards **ret_shards, struct us_err *err);
void us_shards_close(struct us_shards *shards);

size_t us_shards_tokens(const struct us_shards *shards, enum us_part part);
size_t us_shards_documents(const struct us_shards *shards, enum us_part part);
int32_t us_shards_vocab(const struct us_shards *shards);

/* SHA-256, in hexadecimal, of the tokenizer.json the ids were made with: compare with the model's. */
const char *us_shards_tokenizer_sha256(const struct us_shards *shards);

/* That tokenizer.json itself, NUL-terminated: a model trained on the shards takes it along. */
const char *us_shards_tokenizer(const struct us_shards *shards);

/* Text bytes that the tokens of a part came from: bits a byte = nats a token * tokens / bytes / ln 2. */
uint64_t us_shards_text_bytes(const struct us_shards *shards, enum us_part part);

/* Fill the window from the training part: its start is drawn from Philox(seed; step, index), uniform over all
 * starts that leave a full window; the same arguments give the same window on any machine and any rank.
 * window->length must be at most us_shards_tokens(TRAIN), which the caller checks once
 * (us_shards_can_sample). */
void us_shards_sample(const struct us_shards *shards, uint64_t seed, uint64_t step, uint64_t index,
                      struct us_window *window);
/* The same window; with probability `across`, drawn from the same arguments, as one document: attention goes on over the edges
 * inside it and positions do not restart, as when a model is asked to write on behind an end of text. */
void us_shards_sample_across(const struct us_shards *shards, uint64_t seed, uint64_t step, uint64_t index,
                             double across, struct us_window *window);
bool us_shards_can_sample(const struct us_shards *shards, size_t length);

/* Held-out windows of `length` tokens follow each other, overlapping by one token (the label of one is the
 * first input of the next), so that every held-out token but the first is predicted once. */
size_t us_shards_n_heldout(const struct us_shards *shards, size_t length);
void us_shards_heldout(const struct us_shards *shards, size_t i, struct us_window *window);

/* Token range of document i < us_shards_documents(part). */
void us_shards_document(const struct us_shards *shards, enum us_part part, size_t i, size_t *ret_begin,
                        size_t *ret_end);

/* Fill the window with the tokens from `begin` on; window->n is less than length where the part ends. */
void us_shards_copy(const struct us_shards *shards, enum us_part part, size_t begin,
                    struct us_window *window);

#endif
