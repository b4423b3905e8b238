/* pair.c: opening a model, its drafter and its tokenizer. */
#include "decode/pair.h"

#include "model/tokenizer_file.h"

static enum us_status open_all(const char *model_argument, const char *opt_draft_argument, FILE *in,
                               struct us_pair *pair, struct us_err *err) {
  enum us_status status = us_record_resolve(model_argument, in, "model", &pair->model_record, err);
  if (status == US_OK && opt_draft_argument)
    status = us_record_resolve(opt_draft_argument, in, "draft", &pair->draft_record, err);
  if (status == US_OK) status = us_model_open(pair->model_record.path, &pair->model, err);
  if (status == US_OK && opt_draft_argument)
    status = us_draft_open(pair->draft_record.path, &pair->draft, err);
  if (status == US_OK && opt_draft_argument) status = us_draft_check_target(pair->draft, pair->model, err);
  if (status != US_OK) return status;
  if (!pair->model->tokenizer_json)
    return us_err_set(err, US_ERR_INPUT, "%s: has no tokenizer", pair->model_record.path);
  char name[US_TOKENIZER_NAME_MAX];
  us_tokenizer_file_name(pair->model_record.path, name);
  return us_tokenizer_parse(pair->model->tokenizer_json, pair->model->tokenizer_bytes, name, &pair->tokenizer,
                            err);
}

enum us_status us_pair_open(const char *model_argument, const char *opt_draft_argument, FILE *in,
                            struct us_pair *ret_pair, struct us_err *err) {
  *ret_pair = (struct us_pair){0};
  enum us_status status = open_all(model_argument, opt_draft_argument, in, ret_pair, err);
  if (status != US_OK) us_pair_release(ret_pair);
  return status;
}

void us_pair_release(struct us_pair *pair) {
  us_tokenizer_free(pair->tokenizer);
  us_draft_free(pair->draft);
  us_model_free(pair->model);
  us_record_release(&pair->draft_record);
  us_record_release(&pair->model_record);
  *pair = (struct us_pair){0};
}
