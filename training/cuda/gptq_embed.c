/* gptq_embed.c: how much the loss minds errors of the embedding, on a GPU: training/gptq_state.h says what is summed. */
#include "training/cuda/gptq_embed.h"

#include "kernels/quant/quant_train.h"
#include "training/cuda/gemm.h"
#include "training/cuda/loss.h"
#include "training/cuda/model_state.h"
#include "training/gptq_state.h"

#define PASS_ROWS 16384

static enum us_status pass(struct us_cuda_model *model, struct us_cuda_loss *loss, const struct us_rows *rows,
                           float *moments, struct us_err *err) {
  struct us_batch batch = us_rows_batch(rows);
  struct us_cuda_model_state *s = model->state;
  size_t R = rows->R, D = model->shape.hidden;
  enum us_status status = us_cuda_model_forward(model, &batch, NULL, err);
  struct us_cuda_head_loss head = {.R = R,
                                   .x = model->hidden,
                                   .head = model->head,
                                   .label = rows->label,
                                   .weight = rows->weight,
                                   .scale = 1.0f,
                                   .dx = model->dhidden};
  if (status == US_OK) status = us_cuda_loss_add(loss, &head, err);
  if (status == US_OK) status = us_cuda_model_backward(model, err);
  if (status != US_OK) return status;
  us_cuda_did(model->cuda, us_bf16_train(R * D, s->dx, s->dx_rounded, model->cuda->stream),
              "gradients of the embedding");
  us_cuda_linear_grad_w(model->cuda, &(struct us_cuda_linear){.R = R, .N = D, .K = D}, s->dx_rounded,
                        s->dx_rounded, moments);
  return us_cuda_failed(model->cuda, err);
}

enum us_status us_cuda_gptq_embed_moments(struct us_cuda *cuda, const struct us_gptq *gptq,
                                          const struct us_shape *shape, struct us_cuda_params *original,
                                          float *moments, struct us_err *err) {
  size_t count = us_gptq_embed_windows(gptq), each = PASS_ROWS / gptq->length;
  struct us_cuda_model *model = NULL;
  struct us_cuda_loss *loss = NULL;
  if (!each) each = 1;
  if (each > count) each = count;
  enum us_status status =
      us_cuda_model_create(cuda, shape, original, each * gptq->length, US_TRAIN_RECOMPUTE, &model, err);
  if (status == US_OK)
    status = us_cuda_loss_create(cuda, each * gptq->length, shape->hidden, shape->vocab, 0, &loss, err);
  for (size_t first = 0; first < count && status == US_OK; first += each) {
    struct us_rows rows = {0};
    status = us_gptq_draw(gptq, first, count - first < each ? count - first : each, &rows, err);
    if (status == US_OK) status = pass(model, loss, &rows, moments, err);
    us_rows_release(&rows);
  }
  if (status == US_OK) status = us_cuda_sync(cuda, err);
  if (status != US_OK) (void)cudaStreamSynchronize(cuda->stream); /* what is queued reads what is freed */
  us_cuda_loss_free(loss);
  us_cuda_model_free(model);
  return status;
}
