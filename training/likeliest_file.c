/* likeliest_file.c: the artefact of kind "likeliest". */
#include "training/likeliest.h"
#include "base/h5.h"
#include "base/json.h"

#include <stdlib.h>
#include <string.h>

void us_likeliest_release(struct us_likeliest *l) {
  free(l->token), free(l->document), free(l->entry), free(l->rest), free(l->label_logprob);
  *l = (struct us_likeliest){0};
}

static enum us_status write_header(const struct us_likeliest *l, struct us_h5_writer *out,
                                   struct us_err *err) {
  char text[256];
  snprintf(text, sizeof text, "{\"vocab\":%u,\"steps_a_nat\":2048,\"tokenizer_sha256\":\"%s\"}", l->vocab,
           l->tokenizer_sha256);
  return us_h5_put_text(out, "header", text, err);
}

enum us_status us_likeliest_write(const struct us_likeliest *l, const char *path, const char *provenance_json,
                                  struct us_err *err) {
  struct us_h5_writer *out = NULL;
  size_t tokens[2] = {l->windows, l->length}, entries[2] = {l->rows, l->k};
  enum us_status status = us_h5_create(path, "likeliest", &out, err);
  if (status != US_OK) return status;
  status = us_h5_put_text(out, "provenance", provenance_json, err);
  if (status == US_OK) status = write_header(l, out, err);
  if (status == US_OK) status = us_h5_put(out, "token", US_H5_I32, 2, tokens, l->token, err);
  if (status == US_OK) status = us_h5_put(out, "document", US_H5_I32, 2, tokens, l->document, err);
  if (status == US_OK) status = us_h5_put(out, "entry", US_H5_U32, 2, entries, l->entry, err);
  if (status == US_OK) status = us_h5_put(out, "rest", US_H5_F32, 1, entries, l->rest, err);
  if (status == US_OK) status = us_h5_put(out, "label_logprob", US_H5_F32, 1, entries, l->label_logprob, err);
  if (status == US_OK) return us_h5_finish(out, err);
  us_h5_abandon(out);
  return status;
}

static enum us_status bad(const struct us_h5 *file, struct us_err *err, const char *what) {
  return us_err_set(err, US_ERR_INPUT, "%s: %s", us_h5_path(file), what);
}

static enum us_status read_header(const struct us_h5 *file, struct us_likeliest *l, struct us_err *err) {
  const char *text = us_h5_text(file, "header");
  json_t *header = NULL;
  if (!text) return bad(file, err, "header: missing");
  enum us_status status = us_json_parse(text, strlen(text), us_h5_path(file), &header, err);
  if (status != US_OK) return status;
  json_int_t vocab = json_integer_value(json_object_get(header, "vocab"));
  const char *sha = json_string_value(json_object_get(header, "tokenizer_sha256"));
  if (vocab < 2 || vocab > 65536)
    status = bad(file, err, "header: vocab is not 2 to 65536");
  else if (!sha || strlen(sha) + 1 != sizeof l->tokenizer_sha256)
    status = bad(file, err, "header: tokenizer_sha256 is no hash");
  else
    l->vocab = (uint32_t)vocab, memcpy(l->tokenizer_sha256, sha, sizeof l->tokenizer_sha256);
  json_decref(header);
  return status;
}

static void *copy_of(const struct us_h5_dataset *d) {
  void *copy = malloc(d->bytes + 1);
  if (copy) memcpy(copy, d->data, d->bytes);
  return copy;
}

/* Ids inside the vocabulary, documents that never fall, probabilities that are some. */
static enum us_status check(const struct us_h5 *file, const struct us_likeliest *l, struct us_err *err) {
  for (size_t i = 0; i < l->windows * l->length; i++) {
    bool first = i % l->length == 0;
    if (l->token[i] < 0 || (uint32_t)l->token[i] >= l->vocab)
      return bad(file, err, "token: an id is not in the vocabulary");
    if (l->document[i] < 0 ||
        (!first && (l->document[i] < l->document[i - 1] || l->document[i] > l->document[i - 1] + 1)))
      return bad(file, err, "document: numbers do not rise by 0 or 1");
  }
  for (size_t i = 0; i < l->rows * l->k; i++)
    if (l->entry[i] >> 16 >= l->vocab) return bad(file, err, "entry: an id is not in the vocabulary");
  for (size_t r = 0; r < l->rows; r++) {
    if (!(l->rest[r] >= 0 && l->rest[r] <= 1)) return bad(file, err, "rest: not in 0..1");
    if (!(l->label_logprob[r] <= 0 && l->label_logprob[r] > -1e30f))
      return bad(file, err, "label_logprob: not a logarithm of a probability");
  }
  return US_OK;
}

static enum us_status read_all(const struct us_h5 *file, struct us_likeliest *l, struct us_err *err) {
  const struct us_h5_dataset *token, *document, *entry, *rest, *label;
  enum us_status status = us_h5_get(file, "token", US_H5_I32, 2, NULL, &token, err);
  if (status == US_OK) status = us_h5_get(file, "document", US_H5_I32, 2, token->dims, &document, err);
  if (status == US_OK) status = us_h5_get(file, "entry", US_H5_U32, 2, NULL, &entry, err);
  if (status == US_OK) status = us_h5_get(file, "rest", US_H5_F32, 1, entry->dims, &rest, err);
  if (status == US_OK) status = us_h5_get(file, "label_logprob", US_H5_F32, 1, entry->dims, &label, err);
  if (status != US_OK) return status;
  l->windows = token->dims[0], l->length = token->dims[1];
  l->rows = entry->dims[0];
  if (!l->windows || l->length < 2 || l->rows != l->windows * (l->length - 1))
    return bad(file, err, "entry: rows are not those of the windows");
  if (!entry->dims[1] || entry->dims[1] > US_LIKELIEST_MOST_K || entry->dims[1] > l->vocab)
    return bad(file, err, "entry: not 1 to 256 tokens a row");
  l->k = (uint32_t)entry->dims[1];
  l->token = copy_of(token), l->document = copy_of(document), l->entry = copy_of(entry);
  l->rest = copy_of(rest), l->label_logprob = copy_of(label);
  if (!l->token || !l->document || !l->entry || !l->rest || !l->label_logprob)
    return us_err_memory(err, "likeliest tokens", entry->bytes);
  return check(file, l, err);
}

enum us_status us_likeliest_open(const char *path, struct us_likeliest *ret_likeliest, struct us_err *err) {
  struct us_h5 *file = NULL;
  *ret_likeliest = (struct us_likeliest){0};
  enum us_status status = us_h5_open(path, "likeliest", &file, err);
  if (status == US_OK) status = read_header(file, ret_likeliest, err);
  if (status == US_OK) status = read_all(file, ret_likeliest, err);
  us_h5_close(file);
  if (status != US_OK) us_likeliest_release(ret_likeliest);
  return status;
}
