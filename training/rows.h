/* rows.h: windows of token shards as the rows of a forward pass, with their labels.
 *
 *     struct us_rows rows;
 *     us_rows_init(&rows, windows * length, &err);
 *     rows.R = 0;
 *     us_shards_sample(shards, seed, step, i, &window);          // length + 1 tokens
 *     us_rows_add(&rows, &window, false);                        // `length` rows more
 *     struct us_batch batch = us_rows_batch(&rows);
 *     us_rows_release(&rows);
 *
 * Attention and positions restart at document edges; the first token of a document is predicted from the end of the one
 * before.
 */
#ifndef US_TRAINING_ROWS_H
#define US_TRAINING_ROWS_H

#include "training/model_train.h"
#include "training/shards.h"

struct us_rows {
  size_t R, capacity;
  int32_t *token, *label; /* (capacity) */
  uint32_t *position, *document;
  float *weight; /* 1, or 0 where a label does not count */
};

US_CHECKED enum us_status us_rows_init(struct us_rows *rows, size_t capacity, struct us_err *err);
void us_rows_release(struct us_rows *rows);

/* Put a window behind the first rows->R rows: one fewer than its tokens. The caller leaves room. With marked_only the
 * labels that the shards do not mark get weight 0. Returns the rows added. */
size_t us_rows_add(struct us_rows *rows, const struct us_window *window, bool marked_only);

static inline struct us_batch us_rows_batch(const struct us_rows *rows) {
  return (struct us_batch){
      .R = rows->R, .token = rows->token, .position = rows->position, .document = rows->document};
}

/* Whether the ids of the shards mean to the model what they meant when they were made: its vocabulary holds them, and its
 * tokenizer, if it brings one, is theirs. US_ERR_INPUT says what differs. */
US_CHECKED enum us_status us_rows_check_vocabulary(const struct us_shards *shards,
                                                   const struct us_model *model, struct us_err *err);

#endif
