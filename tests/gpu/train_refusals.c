/* train_refusals.c: what CUDA training does not take, and what it says. */
#include "train_parity.h"

static void refuse(const char *name, enum us_status got, enum us_status expected, const struct us_err *err,
                   const char *part) {
  char check[96];
  snprintf(check, sizeof check, "refused: %s", part);
  record(name, check, 1, got != expected || !strstr(err->message, part), err->message);
}

static void check_shapes(const struct target *t, struct us_cuda_params *set) {
  struct us_err err = {0};
  struct us_cuda_model *model;
  struct us_cuda *none;
  struct us_shape shape = t->shape;
  enum us_status status = us_cuda_model_create(t->cuda, &shape, set, 0, US_TRAIN_SAVE, &model, &err);
  refuse(t->name, status, US_ERR_USAGE, &err, "0 rows a batch");
  status = us_cuda_model_create(t->cuda, &shape, set, 20000000, US_TRAIN_SAVE, &model, &err);
  refuse(t->name, status, US_ERR_MEMORY, &err, "MiB of device memory wanted");
  shape.full.qk_dim = 24;
  status = us_cuda_model_create(t->cuda, &shape, set, ROWS, US_TRAIN_SAVE, &model, &err);
  refuse(t->name, status, US_ERR_USAGE, &err, "layer 0: heads of 24");
  shape = t->shape, shape.hidden = 12288;
  status = us_cuda_model_create(t->cuda, &shape, set, ROWS, US_TRAIN_SAVE, &model, &err);
  refuse(t->name, status, US_ERR_USAGE, &err, "a hidden size of 12288; on a GPU up to 8192");
  refuse(t->name, us_cuda_open(99, &none, &err), US_ERR_DEVICE, &err, "no GPU 99");
}

static void check_batches(struct target *t, struct us_cuda_model *model) {
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(&t->rows);
  struct us_cuda_taps twice = {.count = 2, .layer = {1, 1}};
  uint32_t id;
  int32_t kept = t->rows.token[5];
  batch.R = ROWS + 1;
  refuse(t->name, us_cuda_model_forward(model, &batch, NULL, &err), US_ERR_USAGE, &err,
         "rows in a batch of at most");
  batch.R = t->rows.R;
  refuse(t->name, us_cuda_model_forward(model, &batch, &twice, &err), US_ERR_USAGE, &err,
         "layer 1 is tapped twice");
  t->rows.token[5] = (int32_t)t->shape.vocab;
  refuse(t->name, us_cuda_model_forward(model, &batch, NULL, &err), US_ERR_INPUT, &err, "row 5: token");
  t->rows.token[5] = kept;
  refuse(t->name, us_cuda_model_backward(model, &err), US_ERR_USAGE, &err, "made for forward passes alone");
  refuse(t->name, us_cuda_model_routed(model, 0, &id, &err), US_ERR_USAGE, &err, "layer 0 has no experts");
}

void check_refusals(struct target *t) {
  struct us_err err = {0};
  struct us_cuda_params *set = place(t->cuda, &t->params);
  struct us_cuda_model *model;
  struct us_cuda_loss *loss;
  size_t D = t->shape.hidden;
  need(us_cuda_model_create(t->cuda, &t->shape, set, ROWS, US_TRAIN_FORWARD, &model, &err), &err, t->name);
  need(us_cuda_loss_create(t->cuda, ROWS, D, t->shape.vocab, 0, &loss, &err), &err, t->name);
  check_batches(t, model);
  struct us_cuda_head_teacher teacher = {.x = model->hidden, .D = D, .head = model->head};
  struct us_cuda_head_loss head = {.R = 8, .x = model->hidden, .head = model->head, .opt_teacher = &teacher};
  refuse(t->name, us_cuda_loss_add(loss, &head, &err), US_ERR_USAGE, &err, "no room for a teacher");
  head.R = ROWS + 1;
  refuse(t->name, us_cuda_loss_add(loss, &head, &err), US_ERR_USAGE, &err, "rows in a loss of at most");
  check_shapes(t, set);
  us_cuda_loss_free(loss);
  us_cuda_model_free(model);
  us_cuda_params_free(set);
}
