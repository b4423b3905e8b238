/* bpe_train.h: train a byte-level BPE vocabulary from text and write it as tokenizer.json.
 *
 *     struct us_bpe_trainer *trainer;
 *     us_bpe_trainer_create(&trainer, &err);
 *     us_bpe_trainer_add(trainer, text, bytes, &err);         // as often as there are documents
 *     us_bpe_trainer_finish(trainer, 4096, &json, &err);      // struct us_buffer json: the file's content
 *     us_bpe_trainer_free(trainer);
 *
 * Words are the pieces of Qwen2's pattern after NFC; in each step the most frequent pair of neighbouring
 * symbols becomes a new symbol; ties go to the pair whose left bytes, then right bytes, compare lowest, so
 * the result depends on the text alone, not on its order. Ids: 256 bytes in order of their value, merges,
 * special tokens last.
 */
#ifndef US_TRAINING_BPE_TRAIN_H
#define US_TRAINING_BPE_TRAIN_H

#include "base/buffer.h"

struct us_bpe_trainer;

/* Special tokens of every vocabulary made here, in the order of their ids. */
#define US_BPE_N_SPECIAL 10
extern const char *const us_bpe_special[US_BPE_N_SPECIAL];

US_CHECKED enum us_status us_bpe_trainer_create(struct us_bpe_trainer **ret_trainer, struct us_err *err);
void us_bpe_trainer_free(struct us_bpe_trainer *trainer);

/* Count the words of a text; invalid UTF-8 as in tokenizer.h. Special tokens in the text are cut out, not
 * counted. */
US_CHECKED enum us_status us_bpe_trainer_add(struct us_bpe_trainer *trainer, const char *text, size_t bytes,
                                             struct us_err *err);

/* Add the counts of another trainer, which has counted other texts (on another thread). */
US_CHECKED enum us_status us_bpe_trainer_join(struct us_bpe_trainer *trainer,
                                              const struct us_bpe_trainer *other, struct us_err *err);

/* Merge until the vocabulary, special tokens included, has `vocab` entries (266 to 2^20); append
 * tokenizer.json to json. US_ERR_USAGE for another size; US_ERR_INPUT if the text runs out of pairs that
 * occur twice (it says at what size). */
US_CHECKED enum us_status us_bpe_trainer_finish(struct us_bpe_trainer *trainer, int32_t vocab,
                                                struct us_buffer *json, struct us_err *err);

#endif
