/* head_pass.c: head product, loss and its two products, a chunk of rows at a time. */
#include "training/cuda/head_pass.h"

#include "kernels/head_loss/head_loss_train.h"
#include "training/cuda/gemm.h"

/* Large enough for full waves of the products and few sums into dhead, small beside the activations. On an H200 a step of nano with
 * 65,536 rows takes 40.1 ms so, 41.6 ms with chunks of 32 MB that stay in L2, 43.0 with 16 MB. */
#define CHUNK_BYTES ((size_t)256 << 20)
#define CHUNK_ROWS  128 /* rows of a product's tile */

size_t us_cuda_head_chunk(size_t R, size_t N) {
  size_t rows = CHUNK_BYTES / (N * sizeof(float)) / CHUNK_ROWS * CHUNK_ROWS;
  if (rows < CHUNK_ROWS) rows = CHUNK_ROWS;
  return rows < R ? rows : R;
}

static void run_chunk(struct us_cuda *cuda, const struct us_cuda_head_pass *p, size_t first, size_t rows) {
  size_t N = p->N;
  struct us_cuda_linear head = {.R = rows, .N = N, .K = p->D};
  us_cuda_linear_f32(cuda, &head, p->x + first * p->D, p->head, p->logits);
  if (p->opt_teacher)
    us_cuda_linear_f32(cuda, &(struct us_cuda_linear){.R = rows, .N = N, .K = p->opt_teacher->D},
                       p->opt_teacher->x + first * p->opt_teacher->D, p->opt_teacher->head,
                       p->teacher_logits);
  uint16_t *dlogits = p->opt_dx ? (uint16_t *)p->logits : NULL;
  struct us_head_loss_train loss = {
      .rows = rows,
      .N = N,
      .logits = p->logits,
      .stride = N,
      .label = p->label ? p->label + first : NULL,
      .weight = p->opt_weight ? p->opt_weight + first : NULL,
      .opt_teacher = p->opt_teacher ? p->teacher_logits : NULL,
      .teacher_stride = N,
      .scale = p->scale,
      .opt_dlogits = dlogits,
      .dlogits_stride = 2 * N,
      .opt_row_loss = p->opt_row_loss ? p->opt_row_loss + first : NULL,
      .opt_row_logprob = p->opt_row_logprob ? p->opt_row_logprob + first : NULL,
      .opt_row_hit = p->opt_row_hit ? p->opt_row_hit + first : NULL,
      .opt_total = p->opt_total,
      .opt_counted = p->opt_counted,
      .scratch = p->scratch,
  };
  us_cuda_did(cuda, us_head_loss_train(&loss, cuda->stream), "loss");
  if (!p->opt_dx) return;
  head.y_stride = 2 * N;
  us_cuda_linear_grad_x_f32(cuda, &head, dlogits, p->head, 0.0f, p->opt_dx + first * p->D);
  us_cuda_linear_grad_w(cuda, &head, dlogits, p->x + first * p->D, p->opt_dhead);
}

void us_cuda_head_pass(struct us_cuda *cuda, const struct us_cuda_head_pass *pass) {
  for (size_t first = 0; first < pass->R; first += pass->chunk)
    run_chunk(cuda, pass, first, pass->R - first < pass->chunk ? pass->R - first : pass->chunk);
}
