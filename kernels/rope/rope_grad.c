/* rope_grad.c: rotary positions over rows; the gradient of a rotation is the rotation by the opposite angle. */
#include "kernels/rope/rope_grad.h"

struct rope_task {
  const struct us_rope_rows *rows;
  const float *table;
  const uint32_t *position;
  float *x;
  float sign; /* of the sine */
  uint32_t width;
  float scale;
  bool round;
};

US_SEQ_CLONES static void rotate_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct rope_task *t = arg;
  size_t half = t->rows->rotary / 2;
  for (size_t r = begin; r < end; r++) {
    const float *cosine = t->table + (size_t)t->position[r] * 2 * half, *sine = cosine + half;
    for (size_t h = 0; h < t->rows->heads; h++) {
      float *a = t->x + r * t->rows->stride + t->rows->offset[h], *b = a + half;
      for (size_t i = 0; i < half; i++) {
        float c = cosine[i], s = sine[i] * t->sign, a_i = a[i], b_i = b[i];
        a[i] = a_i * c - b_i * s;
        b[i] = b_i * c + a_i * s;
      }
    }
  }
}

void us_rope_seq(struct us_seq *seq, const struct us_rope_rows *rows, const float *table,
                 const uint32_t *position, float *x) {
  struct rope_task t = {.rows = rows, .table = table, .position = position, .x = x, .sign = 1.0f};
  us_pool_for(seq->pool, rows->R, US_SEQ_BLOCK, rotate_rows, &t);
}

void us_rope_grad(struct us_seq *seq, const struct us_rope_rows *rows, const float *table,
                  const uint32_t *position, float *dx) {
  struct rope_task t = {.rows = rows, .table = table, .position = position, .x = dx, .sign = -1.0f};
  us_pool_for(seq->pool, rows->R, US_SEQ_BLOCK, rotate_rows, &t);
}

US_SEQ_CLONES static void scale_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct rope_task *t = arg;
  for (size_t r = begin; r < end; r++)
    for (size_t h = 0; h < t->rows->heads; h++) {
      float *x = t->x + r * t->rows->stride + t->rows->offset[h];
      if (t->round)
        for (size_t i = 0; i < t->width; i++) x[i] = us_bf16_round(x[i] * t->scale);
      else
        for (size_t i = 0; i < t->width; i++) x[i] *= t->scale;
    }
}

void us_scale_heads_seq(struct us_seq *seq, const struct us_rope_rows *rows, uint32_t width, float scale,
                        bool round, float *x) {
  struct rope_task t = {.rows = rows, .x = x, .width = width, .scale = scale};
  t.round = round && seq->rounding == US_SEQ_ROUND_BF16;
  if (scale == 1.0f && !t.round) return;
  us_pool_for(seq->pool, rows->R, US_SEQ_BLOCK, scale_rows, &t);
}
