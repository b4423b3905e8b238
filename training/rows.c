/* rows.c: windows of token shards as the rows of a forward pass. */
#include "training/rows.h"

#include "base/sha256.h"

#include <stdlib.h>

enum us_status us_rows_init(struct us_rows *rows, size_t capacity, struct us_err *err) {
  *rows = (struct us_rows){.capacity = capacity};
  rows->token = calloc(capacity, sizeof *rows->token);
  rows->label = calloc(capacity, sizeof *rows->label);
  rows->position = calloc(capacity, sizeof *rows->position);
  rows->document = calloc(capacity, sizeof *rows->document);
  rows->weight = calloc(capacity, sizeof *rows->weight);
  if (rows->token && rows->label && rows->position && rows->document && rows->weight) return US_OK;
  us_rows_release(rows);
  return us_err_memory(err, "rows", capacity * 20);
}

void us_rows_release(struct us_rows *rows) {
  free(rows->token);
  free(rows->label);
  free(rows->position);
  free(rows->document);
  free(rows->weight);
  *rows = (struct us_rows){0};
}

size_t us_rows_add(struct us_rows *rows, const struct us_window *w, bool marked_only) {
  size_t at = rows->R, n = w->n ? w->n - 1 : 0;
  uint32_t start = (uint32_t)at;
  for (size_t i = 0; i < n; i++) {
    if (i > 0 && w->document[i] != w->document[i - 1]) start = (uint32_t)(at + i);
    rows->token[at + i] = w->ids[i];
    rows->label[at + i] = w->ids[i + 1];
    rows->position[at + i] = (uint32_t)(at + i) - start;
    rows->document[at + i] = start;
    rows->weight[at + i] = marked_only ? (float)w->loss[i + 1] : 1.0f;
  }
  rows->R += n;
  return n;
}

enum us_status us_rows_check_vocabulary(const struct us_shards *shards, const struct us_model *model,
                                        struct us_err *err) {
  const char *name = model->path[0] ? model->path : "the model";
  uint8_t digest[US_SHA256_BYTES];
  char hex[US_SHA256_HEX];
  if ((uint32_t)us_shards_vocab(shards) > model->shape.vocab)
    return us_err_set(err, US_ERR_INPUT, "the shards use %d tokens, %s has %u", us_shards_vocab(shards), name,
                      model->shape.vocab);
  if (!model->tokenizer_json) return US_OK;
  enum us_status status = us_sha256_bytes(model->tokenizer_json, model->tokenizer_bytes, digest, err);
  if (status != US_OK) return status;
  us_sha256_hex(digest, hex);
  if (strcmp(hex, us_shards_tokenizer_sha256(shards)) == 0) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s has tokenizer %.16s, the shards were made with %.16s", name, hex,
                    us_shards_tokenizer_sha256(shards));
}
