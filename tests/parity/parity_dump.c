/* parity_dump.c: run a checkpoint's forward pass over given tokens and write the logits as raw FP32, for parity.py.
 *
 *     parity_dump MODEL TOKENS OUT f32|bf16 ROWS [DRAFT POSITION BLOCK]
 *
 * TOKENS is a file of int32. ROWS rows run in each pass (0: all at once). OUT gets logits (T, N); with a drafter, then its
 * logits (BLOCK - 1, N) for the block anchored at POSITION, the context before it being taken from the taps.
 */
#include "model/checkpoint.h"
#include "model/executor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct dump {
  struct us_model *model;
  struct us_draft *draft;
  struct us_pool *pool;
  struct us_executor *ex;
  enum us_rounding rounding;
  int32_t *tokens;
  uint32_t T;
  float *logits, *taps;
  FILE *out;
};

static int fail(const struct us_err *err) {
  fprintf(stderr, "parity_dump: %s\n", err->message);
  return err->status ? (int)err->status : 1;
}

static enum us_status read_tokens(struct dump *d, const char *path, struct us_err *err) {
  FILE *file = fopen(path, "rb");
  if (!file) return us_err_errno(err, US_ERR_IO, "%s", path);
  d->tokens = malloc(sizeof(int32_t) << 16);
  d->T = d->tokens ? (uint32_t)fread(d->tokens, sizeof(int32_t), 1u << 16, file) : 0;
  fclose(file);
  return d->T ? US_OK : us_err_set(err, US_ERR_INPUT, "%s: no tokens", path);
}

static enum us_status new_cache(const struct dump *d, const struct us_kv_spec *spec, struct us_kv **ret_kv,
                                struct us_err *err) {
  return us_kv_create(spec, d->T + US_MAX_BLOCK, d->rounding == US_ROUND_NONE ? US_KV_F32 : US_KV_BF16,
                      ret_kv, err);
}

static enum us_status run_target(struct dump *d, uint32_t rows, struct us_err *err) {
  struct us_kv_spec spec = us_kv_spec_of(&d->model->shape);
  size_t N = d->model->shape.vocab,
         taps = d->draft ? (size_t)d->draft->shape.taps * d->draft->shape.hidden : 0;
  struct us_kv *kv;
  enum us_status status = new_cache(d, &spec, &kv, err);
  if (status != US_OK) return status;
  struct us_row *pass_rows = calloc(d->T, sizeof *pass_rows);
  d->logits = calloc((size_t)d->T * N, sizeof(float));
  d->taps = calloc((size_t)d->T * taps + 1, sizeof(float));
  uint32_t step = rows ? rows : d->T;
  for (uint32_t p = 0; status == US_OK && p < d->T; p += step) {
    uint32_t R = d->T - p < step ? d->T - p : step;
    for (uint32_t r = 0; r < R; r++)
      pass_rows[r] = (struct us_row){.token = d->tokens[p + r], .position = p + r, .kv = kv};
    struct us_pass pass = {
        .rows = pass_rows, .R = R, .logits = d->logits + p * N, .taps = taps ? d->taps + p * taps : NULL};
    status = d->ex->ops->forward(d->ex, &pass, err);
  }
  fwrite(d->logits, sizeof(float), (size_t)d->T * N, d->out);
  free(pass_rows);
  us_kv_free(kv);
  return status;
}

static enum us_status run_draft(struct dump *d, uint32_t position, uint32_t block, struct us_err *err) {
  struct us_kv_spec spec = us_kv_spec_of_draft(&d->draft->shape);
  size_t N = d->model->shape.vocab;
  struct us_kv *kv;
  enum us_status status = new_cache(d, &spec, &kv, err);
  if (status != US_OK) return status;
  struct us_draft_context context = {.kv = kv, .position = 0, .R = position, .taps = d->taps};
  struct us_draft_pass pass = {
      .kv = kv, .anchor = d->tokens[position], .position = position, .block = block, .logits = d->logits};
  status = d->ex->ops->draft_context(d->ex, &context, err);
  if (status == US_OK) status = d->ex->ops->draft(d->ex, &pass, err);
  if (status == US_OK) fwrite(d->logits, sizeof(float), (block - 1) * N, d->out);
  us_kv_free(kv);
  return status;
}

int main(int argc, char **argv) {
  if (argc != 6 && argc != 9) {
    fprintf(stderr, "usage: parity_dump MODEL TOKENS OUT f32|bf16 ROWS [DRAFT POSITION BLOCK]\n");
    return 2;
  }
  struct us_err err = {0};
  struct dump d = {.rounding = strcmp(argv[4], "f32") ? US_ROUND_BF16 : US_ROUND_NONE};
  d.out = fopen(argv[3], "wb");
  if (!d.out) return fail(&(struct us_err){.status = US_ERR_IO, .message = "cannot open the output"});
  enum us_status status = read_tokens(&d, argv[2], &err);
  if (status == US_OK) status = us_model_open(argv[1], &d.model, &err);
  if (status == US_OK && argc == 9) status = us_draft_open(argv[6], &d.draft, &err);
  if (status == US_OK) status = us_pool_create(2, &d.pool, &err);
  if (status == US_OK)
    status = us_executor_create_reference(d.model, d.draft, d.pool, d.rounding, &d.ex, &err);
  if (status == US_OK) status = run_target(&d, (uint32_t)atoi(argv[5]), &err);
  if (status == US_OK && d.draft)
    status = run_draft(&d, (uint32_t)atoi(argv[7]), (uint32_t)atoi(argv[8]), &err);
  if (d.ex) d.ex->ops->free(d.ex);
  us_pool_free(d.pool);
  us_draft_free(d.draft);
  us_model_free(d.model);
  free(d.tokens);
  free(d.logits);
  free(d.taps);
  if (fclose(d.out) != 0 && status == US_OK) status = us_err_errno(&err, US_ERR_IO, "%s", argv[3]);
  return status == US_OK ? 0 : fail(&err);
}
