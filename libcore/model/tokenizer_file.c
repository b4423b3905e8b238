/* tokenizer_file.c: reading a tokenizer from a file or a model. */
#include "model/tokenizer_file.h"

#include "model/checkpoint.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_TOKENIZER ((size_t)256 << 20)

static bool is_model_file(const char *path) {
  size_t n = strlen(path);
  return n > 3 && !strcmp(path + n - 3, ".h5");
}

static bool is_folder(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

void us_tokenizer_file_name(const char *path, char ret_name[US_TOKENIZER_NAME_MAX]) {
  const char *join = is_model_file(path) ? ": " : is_folder(path) ? "/" : "";
  snprintf(ret_name, US_TOKENIZER_NAME_MAX, "%s%s%s", path, join, *join ? "tokenizer.json" : "");
}

static enum us_status read_model(const char *path, struct us_buffer *json, struct us_err *err) {
  struct us_model *model;
  enum us_status status = us_model_open(path, &model, err);
  if (status != US_OK) return status;
  if (model->tokenizer_json)
    status = us_buffer_append(json, model->tokenizer_json, model->tokenizer_bytes, err);
  else
    status = us_err_set(err, US_ERR_INPUT, "%s: has no tokenizer", path);
  us_model_free(model);
  return status;
}

enum us_status us_tokenizer_file_read(const char *path, struct us_buffer *json, struct us_err *err) {
  if (is_model_file(path)) return read_model(path, json, err);
  if (!is_folder(path)) return us_buffer_read_file(json, path, MAX_TOKENIZER, err);
  char inside[4096];
  if (snprintf(inside, sizeof inside, "%s/tokenizer.json", path) >= (int)sizeof inside)
    return us_err_set(err, US_ERR_USAGE, "the path of a model's folder is too long");
  return us_buffer_read_file(json, inside, MAX_TOKENIZER, err);
}
