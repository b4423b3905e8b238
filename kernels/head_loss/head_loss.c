/* head_loss.c: head product, softmax, loss and gradients of a chunk of rows at a time. */
#include "kernels/head_loss/head_loss.h"

/* Rows of one task: 64 x 4096 logits are 1 MB and stay in L2 from product to gradient. */
#define TASK_ROWS 64
#define GRAD_ROWS 128 /* rows of dhead a task */

/* Rows whose logits exist at once, by the vocabulary alone: 4 M logits (16 MB), whole tasks. */
static size_t chunk_rows(size_t N) {
  size_t rows = ((size_t)1 << 22) / N / TASK_ROWS * TASK_ROWS;
  return rows < 2 * TASK_ROWS ? 2 * TASK_ROWS : rows > 2048 ? 2048 : rows;
}

struct head_task {
  struct us_head_loss *loss;
  float *logits, *teacher; /* (chunk, N) */
  float *keep;             /* a worker: two rows of logits, a task's gathered teacher rows */
  size_t keep_floats;
  double *sum;        /* (R) weighted loss of each row */
  size_t first, rows; /* of the chunk */
};

static inline float row_max(const float *x, size_t n) {
  float lane[US_SEQ_LANES];
  for (int l = 0; l < US_SEQ_LANES; l++) lane[l] = -INFINITY;
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (int l = 0; i < n; i++, l++) lane[l] = x[i] > lane[l] ? x[i] : lane[l];
  for (int l = 1; l < US_SEQ_LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  return lane[0];
}

/* Logits become probabilities; returns log(sum exp) including the maximum. Sums of a vocabulary in 16 lanes of FP32 err
 * by about N/16 * 2^-24, 1.5e-5 at 4096 and 6e-4 at 152 K if all terms were equal; real ones are not. */
US_SEQ_CLONES static double softmax_row(float *x, size_t n) {
  float m = row_max(x, n), lane[US_SEQ_LANES] = {0};
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) {
      float e = us_expf(x[i + l] - m);
      x[i + l] = e;
      lane[l] += e;
    }
  for (int l = 0; i < n; i++, l++) {
    x[i] = us_expf(x[i] - m);
    lane[l] += x[i];
  }
  double sum = 0.0;
  for (int l = 0; l < US_SEQ_LANES; l++) sum += (double)lane[l];
  float inverse = (float)(1.0 / sum);
  for (i = 0; i < n; i++) x[i] *= inverse;
  return (double)m + log(sum);
}

/* KL(t || s) = sum t (log t - log s) with log s = s_logit - s_log_sum; teacher logits become probabilities. */
static double kl_row(const float *student, double student_log_sum, float *teacher, float *keep, size_t n) {
  memcpy(keep, teacher, n * sizeof *keep);
  double teacher_log_sum = softmax_row(teacher, n), kl = 0.0, shift = student_log_sum - teacher_log_sum;
  for (size_t i = 0; i < n; i++) kl += (double)teacher[i] * ((double)keep[i] - (double)student[i] + shift);
  return kl > 0.0 ? kl : 0.0;
}

US_SEQ_CLONES static void scale_difference(float *p, const float *target, float scale, size_t n) {
  for (size_t i = 0; i < n; i++) p[i] = scale * (p[i] - target[i]);
}

US_SEQ_CLONES static void scale_row(float *p, float scale, size_t n) {
  for (size_t i = 0; i < n; i++) p[i] *= scale;
}

static size_t argmax(const float *x, size_t n) {
  float m = row_max(x, n);
  for (size_t i = 0; i < n; i++)
    if (x[i] == m) return i;
  return 0;
}

static double loss_row(const struct head_task *t, size_t i, float *keep) {
  struct us_head_loss *loss = t->loss;
  size_t r = t->first + i, N = loss->N;
  float *x = t->logits + i * N, weight = loss->weight ? loss->weight[r] : 1.0f;
  int32_t label = loss->label ? loss->label[r] : -1;
  bool counts = weight != 0.0f && (loss->teacher || label >= 0);
  if (loss->row_hit) loss->row_hit[r] = label >= 0 && argmax(x, N) == (size_t)label;
  float label_logit = label >= 0 ? x[label] : 0.0f;
  float *target = loss->teacher ? t->teacher + i * N : NULL;
  if (target) memcpy(keep, x, N * sizeof *keep);
  double log_sum = softmax_row(x, N), value = 0.0;
  if (loss->row_logprob) loss->row_logprob[r] = label >= 0 ? (float)((double)label_logit - log_sum) : 0.0f;
  if (counts) value = target ? kl_row(keep, log_sum, target, keep + N, N) : log_sum - (double)label_logit;
  if (loss->row_loss) loss->row_loss[r] = (float)value;
  float scale = counts ? weight * loss->scale : 0.0f;
  if (loss->dx) {
    if (target && counts) {
      scale_difference(x, target, scale, N);
    } else {
      scale_row(x, scale, N);
      if (counts) x[label] -= scale;
    }
  }
  return value * (double)weight * (double)loss->scale;
}

/* Teacher rows of a task, in one piece: themselves or gathered behind the worker's two rows of logits. */
static const float *teacher_rows(const struct head_task *t, size_t first, size_t rows, float *gathered) {
  const struct us_head_teacher *teacher = t->loss->teacher;
  if (!teacher->row) return teacher->x + first * teacher->D;
  for (size_t r = 0; r < rows; r++)
    memcpy(gathered + r * teacher->D, teacher->x + teacher->row[first + r] * teacher->D,
           teacher->D * sizeof(float));
  return gathered;
}

static void head_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct head_task *t = arg;
  const struct us_head_loss *loss = t->loss;
  const struct us_head_teacher *teacher = loss->teacher;
  size_t N = loss->N;
  float *keep = t->keep + (size_t)worker * t->keep_floats;
  for (size_t b = begin; b < end; b++) {
    size_t i = b * TASK_ROWS, rows = t->rows - i < TASK_ROWS ? t->rows - i : TASK_ROWS, first = t->first + i;
    float *x = t->logits + i * N;
    us_seq_gemm(false, true, rows, N, loss->D, 1.0f, loss->x + first * loss->D, loss->D, loss->head, loss->D,
                0.0f, x, N);
    if (teacher)
      us_seq_gemm(false, true, rows, N, teacher->D, 1.0f, teacher_rows(t, first, rows, keep + 2 * N),
                  teacher->D, teacher->head, teacher->D, 0.0f, t->teacher + i * N, N);
    for (size_t r = i; r < i + rows; r++) t->sum[t->first + r] = loss_row(t, r, keep);
    if (loss->dx)
      us_seq_gemm(false, false, rows, loss->D, N, 1.0f, x, N, loss->head, loss->D, 0.0f,
                  loss->dx + first * loss->D, loss->D);
  }
}

static void head_weights(void *arg, size_t begin, size_t end, int worker) {
  const struct head_task *t = arg;
  const struct us_head_loss *loss = t->loss;
  for (size_t b = begin; b < end; b++) {
    size_t n = b * GRAD_ROWS, rows = loss->N - n < GRAD_ROWS ? loss->N - n : GRAD_ROWS;
    us_seq_gemm(true, false, rows, loss->D, t->rows, 1.0f, t->logits + n, loss->N,
                loss->x + t->first * loss->D, loss->D, 1.0f, loss->dhead + n * loss->D, loss->D);
  }
}

void us_head_loss(struct us_seq *seq, struct us_head_loss *loss) {
  struct head_task t = {.loss = loss};
  size_t chunk = chunk_rows(loss->N), logits = chunk * loss->N, workers = (size_t)us_pool_threads(seq->pool);
  t.keep_floats = 2 * loss->N + (loss->teacher ? TASK_ROWS * loss->teacher->D : 0);
  size_t before = (logits * (loss->teacher ? 2 : 1) + t.keep_floats * workers + 15) / 16 * 16;
  loss->total = 0.0;
  loss->counted = 0;
  if (!(t.logits = us_seq_scratch(seq, before + 2 * loss->R))) return;
  t.teacher = t.logits + logits;
  t.keep = t.logits + logits * (loss->teacher ? 2 : 1);
  t.sum = (double *)(t.logits + before);
  for (t.first = 0; t.first < loss->R; t.first += chunk) {
    t.rows = loss->R - t.first < chunk ? loss->R - t.first : chunk;
    us_pool_for(seq->pool, us_seq_blocks(t.rows, TASK_ROWS), 1, head_rows, &t);
    if (loss->dx && loss->dhead)
      us_pool_for(seq->pool, us_seq_blocks(loss->N, GRAD_ROWS), 1, head_weights, &t);
  }
  for (size_t r = 0; r < loss->R; r++) {
    bool labelled = loss->teacher || (loss->label && loss->label[r] >= 0);
    loss->counted += labelled && (!loss->weight || loss->weight[r] != 0.0f);
    loss->total += t.sum[r];
  }
}
