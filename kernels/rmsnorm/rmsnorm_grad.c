/* rmsnorm_grad.c: RMSNorm over rows and its gradients. */
#include "kernels/rmsnorm/rmsnorm_grad.h"

/* Rows that share one partial sum of the gain's gradient. */
#define GAIN_ROWS 64

struct rmsnorm_task {
  struct us_rmsnorm_rows rows;
  const float *x, *gain, *dy;
  float *y, *inverse, *dx, *dgain, *partial;
  float beta;
  bool round;
};

static struct us_rmsnorm_rows with_defaults(const struct us_rmsnorm_rows *rows) {
  struct us_rmsnorm_rows r = *rows;
  if (!r.heads) r.heads = 1;
  if (!r.stride) r.stride = r.heads * r.D;
  return r;
}

US_SEQ_CLONES static void forward_items(void *arg, size_t begin, size_t end, int worker) {
  const struct rmsnorm_task *t = arg;
  const struct us_rmsnorm_rows *r = &t->rows;
  for (size_t i = begin; i < end; i++) {
    size_t at = i / r->heads * r->stride + i % r->heads * r->D;
    const float *x = t->x + at;
    float *y = t->y + at;
    float inverse = 1.0f / sqrtf(us_seq_dot(x, x, r->D) / (float)r->D + r->eps);
    t->inverse[i] = inverse;
    if (t->round)
      for (size_t k = 0; k < r->D; k++) y[k] = us_bf16_round(x[k] * inverse * t->gain[k]);
    else
      for (size_t k = 0; k < r->D; k++) y[k] = x[k] * inverse * t->gain[k];
  }
}

void us_rmsnorm_seq(struct us_seq *seq, const struct us_rmsnorm_rows *rows, const float *x, const float *gain,
                    float *y, float *inverse) {
  struct rmsnorm_task t = {.rows = with_defaults(rows), .x = x, .gain = gain, .y = y, .inverse = inverse};
  t.round = seq->rounding == US_SEQ_ROUND_BF16 && !rows->keep_f32;
  us_pool_for(seq->pool, t.rows.R * t.rows.heads, US_SEQ_BLOCK, forward_items, &t);
}

static inline void grad_item(const struct rmsnorm_task *t, size_t i, float *dgain) {
  const struct us_rmsnorm_rows *r = &t->rows;
  size_t at = i / r->heads * r->stride + i % r->heads * r->D, D = r->D;
  const float *x = t->x + at, *dy = t->dy + at, *gain = t->gain;
  float *dx = t->dx + at, inverse = t->inverse[i];
  float lane[US_SEQ_LANES] = {0};
  size_t k = 0;
  for (; k + US_SEQ_LANES <= D; k += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] += dy[k + l] * gain[k + l] * x[k + l];
  for (int l = 0; k < D; k++, l++) lane[l] += dy[k] * gain[k] * x[k];
  float pull = us_seq_sum_lanes(lane) * inverse * inverse / (float)D;
  if (dgain)
    for (k = 0; k < D; k++) dgain[k] += dy[k] * x[k] * inverse;
  if (t->beta == 0.0f)
    for (k = 0; k < D; k++) dx[k] = inverse * (dy[k] * gain[k] - x[k] * pull);
  else
    for (k = 0; k < D; k++) dx[k] += inverse * (dy[k] * gain[k] - x[k] * pull);
}

US_SEQ_CLONES static void grad_blocks(void *arg, size_t begin, size_t end, int worker) {
  const struct rmsnorm_task *t = arg;
  size_t items = t->rows.R * t->rows.heads;
  for (size_t b = begin; b < end; b++) {
    float *dgain = t->partial ? t->partial + b * t->rows.D : NULL;
    if (dgain) memset(dgain, 0, t->rows.D * sizeof *dgain);
    size_t last = (b + 1) * GAIN_ROWS < items ? (b + 1) * GAIN_ROWS : items;
    for (size_t i = b * GAIN_ROWS; i < last; i++) grad_item(t, i, dgain);
  }
}

void us_rmsnorm_grad(struct us_seq *seq, const struct us_rmsnorm_rows *rows, const float *x,
                     const float *gain, const float *inverse, const float *dy, float beta, float *dx,
                     float *dgain) {
  struct rmsnorm_task t = {
      .rows = with_defaults(rows), .x = x, .gain = gain, .dy = dy, .dx = dx, .beta = beta};
  t.inverse = (float *)inverse;
  size_t blocks = us_seq_blocks(t.rows.R * t.rows.heads, GAIN_ROWS);
  if (dgain && !(t.partial = us_seq_scratch(seq, blocks * t.rows.D))) return;
  us_pool_for(seq->pool, blocks, 1, grad_blocks, &t);
  if (!dgain) return;
  for (size_t b = 0; b < blocks; b++)
    for (size_t k = 0; k < t.rows.D; k++) dgain[k] += t.partial[b * t.rows.D + k];
}
