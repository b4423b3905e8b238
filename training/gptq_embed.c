/* gptq_embed.c: how much the loss minds errors of the embedding, whose rows multiply nothing. */
#include "kernels/head_loss/head_loss.h"
#include "training/gptq_state.h"

#define PASS_ROWS 8192
#define SUM_ROWS  64 /* of the sum, a task */

struct sum {
  const struct us_model_train *train;
  float *moments;
};

static void add_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct sum *s = arg;
  size_t D = s->train->shape.hidden;
  const float *dx = s->train->state->dx;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    size_t row = i * SUM_ROWS, rows = D - row < SUM_ROWS ? D - row : SUM_ROWS;
    us_seq_gemm(true, false, rows, D, s->train->batch.R, 1.0f, dx + row, D, dx, D, 1.0f, s->moments + row * D,
                D);
  }
}

/* The text's own tokens are the labels. */
static enum us_status pass(struct us_model_train *train, const struct us_rows *rows, struct us_err *err) {
  struct us_batch batch = us_rows_batch(rows);
  enum us_status status = us_model_train_forward(train, &batch, NULL, err);
  if (status != US_OK) return status;
  struct us_head_loss head = {.R = rows->R,
                              .D = train->shape.hidden,
                              .N = train->shape.vocab,
                              .x = train->hidden,
                              .head = train->head->compute,
                              .label = rows->label,
                              .weight = rows->weight,
                              .scale = 1.0f,
                              .dx = train->dhidden};
  us_head_loss(train->seq, &head);
  return us_model_train_backward(train, err);
}

enum us_status us_gptq_embed_moments(const struct us_gptq *gptq, const struct us_shape *shape,
                                     struct us_params *original, struct us_seq *seq, float *moments,
                                     struct us_err *err) {
  size_t count = us_gptq_embed_windows(gptq), each = PASS_ROWS / gptq->length;
  struct us_model_train *train = NULL;
  if (!each) each = 1;
  if (each > count) each = count;
  enum us_status status =
      us_model_train_create(shape, original, seq, each * gptq->length, US_TRAIN_RECOMPUTE, &train, err);
  for (size_t first = 0; first < count && status == US_OK; first += each) {
    struct us_rows rows = {0};
    status = us_gptq_draw(gptq, first, count - first < each ? count - first : each, &rows, err);
    if (status == US_OK) status = pass(train, &rows, err);
    struct sum sum = {.train = train, .moments = moments};
    if (status == US_OK) us_pool_for(seq->pool, us_seq_blocks(shape->hidden, SUM_ROWS), 1, add_rows, &sum);
    us_rows_release(&rows);
  }
  us_model_train_free(train);
  return status;
}
