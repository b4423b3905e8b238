/* linear_grad.c: dense products over row blocks, one single-threaded sgemm a task. */
#include "kernels/linear/linear_grad.h"

/* Up to this many weights, dW is summed over row blocks side by side and the partial sums are added in order; beyond it
 * the partial sums would cost more memory traffic than they win, and the rows of dW are many enough to share. */
#define PARTIAL_WEIGHTS 65536
#define PARTIAL_ROWS    1024
#define GRAD_ROWS       128 /* rows of dW a task otherwise */

struct linear_task {
  struct us_linear dims;
  const float *x, *w, *dy;
  float beta;
  float *out, *partial;
};

static struct us_linear with_strides(const struct us_linear *dims) {
  struct us_linear d = *dims;
  if (!d.x_stride) d.x_stride = d.K;
  if (!d.y_stride) d.y_stride = d.N;
  return d;
}

static void forward_block(void *arg, size_t begin, size_t end, int worker) {
  const struct linear_task *t = arg;
  const struct us_linear *d = &t->dims;
  for (size_t b = begin; b < end; b++) {
    size_t r = b * US_SEQ_BLOCK, rows = d->R - r < US_SEQ_BLOCK ? d->R - r : US_SEQ_BLOCK;
    us_seq_gemm(false, true, rows, d->N, d->K, 1.0f, t->x + r * d->x_stride, d->x_stride, t->w, d->K, 0.0f,
                t->out + r * d->y_stride, d->y_stride);
  }
}

void us_linear_seq(struct us_seq *seq, const struct us_linear *dims, const float *x, const float *w,
                   float *y) {
  struct linear_task t = {.dims = with_strides(dims), .x = x, .w = w, .out = y};
  us_pool_for(seq->pool, us_seq_blocks(dims->R, US_SEQ_BLOCK), 1, forward_block, &t);
}

static void grad_x_block(void *arg, size_t begin, size_t end, int worker) {
  const struct linear_task *t = arg;
  const struct us_linear *d = &t->dims;
  for (size_t b = begin; b < end; b++) {
    size_t r = b * US_SEQ_BLOCK, rows = d->R - r < US_SEQ_BLOCK ? d->R - r : US_SEQ_BLOCK;
    us_seq_gemm(false, false, rows, d->K, d->N, 1.0f, t->dy + r * d->y_stride, d->y_stride, t->w, d->K,
                t->beta, t->out + r * d->x_stride, d->x_stride);
  }
}

void us_linear_grad_x(struct us_seq *seq, const struct us_linear *dims, const float *dy, const float *w,
                      float beta, float *dx) {
  struct linear_task t = {.dims = with_strides(dims), .w = w, .dy = dy, .beta = beta, .out = dx};
  us_pool_for(seq->pool, us_seq_blocks(dims->R, US_SEQ_BLOCK), 1, grad_x_block, &t);
}

static void grad_w_partial(void *arg, size_t begin, size_t end, int worker) {
  const struct linear_task *t = arg;
  const struct us_linear *d = &t->dims;
  for (size_t b = begin; b < end; b++) {
    size_t r = b * PARTIAL_ROWS, rows = d->R - r < PARTIAL_ROWS ? d->R - r : PARTIAL_ROWS;
    us_seq_gemm(true, false, d->N, d->K, rows, 1.0f, t->dy + r * d->y_stride, d->y_stride,
                t->x + r * d->x_stride, d->x_stride, 0.0f, t->partial + b * d->N * d->K, d->K);
  }
}

US_SEQ_CLONES static void add_partials(void *arg, size_t begin, size_t end, int worker) {
  const struct linear_task *t = arg;
  size_t weights = t->dims.N * t->dims.K, blocks = us_seq_blocks(t->dims.R, PARTIAL_ROWS);
  for (size_t b = 0; b < blocks; b++)
    for (size_t i = begin; i < end; i++) t->out[i] += t->partial[b * weights + i];
}

static void grad_w_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct linear_task *t = arg;
  const struct us_linear *d = &t->dims;
  for (size_t b = begin; b < end; b++) {
    size_t n = b * GRAD_ROWS, rows = d->N - n < GRAD_ROWS ? d->N - n : GRAD_ROWS;
    us_seq_gemm(true, false, rows, d->K, d->R, 1.0f, t->dy + n, d->y_stride, t->x, d->x_stride, 1.0f,
                t->out + n * d->K, d->K);
  }
}

void us_linear_grad_w(struct us_seq *seq, const struct us_linear *dims, const float *dy, const float *x,
                      float *dw) {
  struct linear_task t = {.dims = with_strides(dims), .x = x, .dy = dy, .out = dw};
  if (!dims->R) return;
  if (dims->N * dims->K > PARTIAL_WEIGHTS) {
    us_pool_for(seq->pool, us_seq_blocks(dims->N, GRAD_ROWS), 1, grad_w_rows, &t);
    return;
  }
  size_t blocks = us_seq_blocks(dims->R, PARTIAL_ROWS);
  t.partial = us_seq_scratch(seq, blocks * dims->N * dims->K);
  if (!t.partial) return;
  us_pool_for(seq->pool, blocks, 1, grad_w_partial, &t);
  us_pool_for(seq->pool, dims->N * dims->K, 4096, add_partials, &t);
}
