/* gptq_inputs.c: the inputs that matrices have on text in the model rounded so far, beside the original's, and sums over them.
 *
 * Contents: what a part of a layer feeds; what its inputs have lost; inputs; sums over them.
 */
#include "training/gptq_state.h"

#include <stdlib.h>

#define SUM_ROWS  128 /* of a sum, a task */
#define COPY_ROWS 256 /* of inputs, a task */

void *us_gptq_take(struct us_gptq_session *s, size_t count, size_t bytes) {
  void *memory = calloc(count ? count : 1, bytes);
  if (!memory) __atomic_store_n(&s->failed, true, __ATOMIC_RELAXED);
  return memory;
}

/* --- what a part of a layer feeds --- */

bool us_gptq_rounds(const struct us_param *p) {
  bool encoded = p->encoding.format == US_FORMAT_MXFP4 || p->encoding.format == US_FORMAT_FP8;
  return encoded && !p->frozen && !p->vector;
}

static struct us_gptq_input input_of(size_t K, size_t rows, const float *x, const float *lost,
                                     const float *opt_stream) {
  return (struct us_gptq_input){.K = K, .rows = rows, .x = x, .lost = lost, .opt_stream = opt_stream};
}

/* The `count` matrices that lie behind each other from `first` on and multiply x. */
static void feed(struct us_gptq_session *s, struct us_param *first, size_t count,
                 struct us_gptq_input input) {
  size_t before = s->matrix_count;
  for (size_t i = 0; i < count; i++)
    if (us_gptq_rounds(first + i))
      s->matrices[s->matrix_count++] = (struct us_gptq_matrix){.master = first + i, .input = s->input_count};
  if (s->matrix_count > before) s->inputs[s->input_count++] = input;
}

static void feed_experts(struct us_gptq_session *s) {
  const struct us_shape *shape = &s->student->shape;
  const struct us_layer_saved *o = &s->original->state->saved[s->layer],
                              *q = &s->student->state->saved[s->layer];
  bool down = s->part == US_PART_MLP;
  for (uint32_t e = 0; e < shape->experts; e++) {
    struct us_param *expert = s->student->state->roles[s->layer].experts + 3 * (size_t)e;
    size_t first = q->plan.start[e], K = down ? shape->expert_inner : shape->hidden;
    const float *x = (down ? q->experts.a : q->experts.x) + first * K,
                *lost = (down ? o->experts.a : o->experts.x) + first * K;
    const float *stream = down ? q->experts.x + first * shape->hidden : NULL;
    feed(s, down ? expert + 2 : expert, down ? 1 : 2,
         input_of(K, q->plan.start[e + 1] - first, x, lost, stream));
  }
}

static void feed_all(struct us_gptq_session *s) {
  const struct us_model_train *o = s->original, *q = s->student;
  const struct us_shape *shape = &q->shape;
  const struct us_layer_roles *roles = &q->state->roles[s->layer];
  const struct us_layer_saved *from = &o->state->saved[s->layer], *to = &q->state->saved[s->layer];
  const struct us_attention_shape *a = us_shape_attention(shape, s->layer);
  size_t R = q->batch.R, D = shape->hidden, heads = (size_t)a->q_heads * a->v_dim;
  s->input_count = s->matrix_count = 0;
  switch (s->part) {
  case US_PART_ATTENTION_INPUTS:
    feed(s, roles->qkv, 1, input_of(D, R, to->norm1, from->norm1, NULL));
    break;
  case US_PART_ATTENTION:
    feed(s, roles->o_proj, 1, input_of(heads, R, to->attention, from->attention, q->state->branch));
    break;
  case US_PART_MLP_INPUTS:
    if (shape->moe_layer[s->layer])
      feed_experts(s);
    else
      feed(s, roles->gate_up, 2, input_of(D, R, to->norm2, from->norm2, NULL));
    break;
  case US_PART_MLP:
    if (shape->moe_layer[s->layer])
      feed_experts(s);
    else
      feed(s, roles->down, 1, input_of(shape->dense_inner, R, to->a, from->a, q->state->branch));
    break;
  }
}

/* --- what its inputs have lost --- */

struct span {
  float *out;
  const float *from, *less;
};

static void subtract(void *arg, size_t begin, size_t end, int worker) {
  const struct span *v = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) v->out[i] = v->from[i] - v->less[i];
}

/* The original's inputs become what the student's lack: they are not needed again. */
static void lose(struct us_gptq_session *s, float *original, const float *student, size_t cols) {
  struct span span = {original, original, student};
  us_pool_for(s->seq.pool, s->student->batch.R * cols, COPY_ROWS * cols, subtract, &span);
}

/* What the stream that the part's product is added to has lost, into the student's `branch`, which its product fills later. */
static void lose_stream(struct us_gptq_session *s, const float *original, const float *student) {
  struct span span = {s->student->state->branch, original, student};
  size_t D = s->student->shape.hidden;
  us_pool_for(s->seq.pool, s->student->batch.R * D, COPY_ROWS * D, subtract, &span);
}

/* An expert's output counts with its routing weight: so do its inputs. */
static void expert_inputs(void *arg, size_t begin, size_t end, int worker) {
  const struct us_gptq_session *s = arg;
  const struct us_shape *shape = &s->student->shape;
  const struct us_layer_saved *o = &s->original->state->saved[s->layer],
                              *q = &s->student->state->saved[s->layer];
  size_t D = shape->hidden;
  (void)worker;
  for (size_t i = begin * shape->top_k; i < end * shape->top_k; i++) {
    const float *from = o->norm2 + i / shape->top_k * D, *to = q->norm2 + i / shape->top_k * D;
    float *lost = o->experts.x + q->plan.slot[i] * D, *x = q->experts.x + q->plan.slot[i] * D;
    for (size_t k = 0; k < D; k++) {
      x[k] = q->weight[i] * to[k];
      lost[k] = q->weight[i] * from[k] - x[k];
    }
  }
}

/* And each of a row's experts makes up for an equal part of what the stream lost. */
static void expert_inner(void *arg, size_t begin, size_t end, int worker) {
  const struct us_gptq_session *s = arg;
  const struct us_shape *shape = &s->student->shape;
  const struct us_layer_saved *o = &s->original->state->saved[s->layer],
                              *q = &s->student->state->saved[s->layer];
  size_t D = shape->hidden, F = shape->expert_inner;
  float share = 1.0f / (float)shape->top_k;
  (void)worker;
  for (size_t i = begin * shape->top_k; i < end * shape->top_k; i++) {
    size_t slot = q->plan.slot[i];
    const float *stream = s->student->state->branch + i / shape->top_k * D;
    float *lost = o->experts.a + slot * F, *x = q->experts.a + slot * F, *spread = q->experts.x + slot * D;
    for (size_t k = 0; k < F; k++) {
      x[k] *= q->weight[i];
      lost[k] = q->weight[i] * lost[k] - x[k];
    }
    for (size_t k = 0; k < D; k++) spread[k] = share * stream[k];
  }
}

static void lose_all(struct us_gptq_session *s) {
  const struct us_model_train_state *o = s->original->state, *q = s->student->state;
  const struct us_layer_saved *from = &o->saved[s->layer], *to = &q->saved[s->layer];
  const struct us_shape *shape = &s->student->shape;
  const struct us_attention_shape *a = us_shape_attention(shape, s->layer);
  size_t R = s->student->batch.R;
  bool moe = shape->moe_layer[s->layer];
  switch (s->part) {
  case US_PART_ATTENTION_INPUTS:
    lose(s, from->norm1, to->norm1, shape->hidden);
    break;
  case US_PART_ATTENTION:
    lose(s, from->attention, to->attention, (size_t)a->q_heads * a->v_dim);
    lose_stream(s, o->residual[s->layer], q->residual[s->layer]);
    break;
  case US_PART_MLP_INPUTS:
    if (moe)
      us_pool_for(s->seq.pool, R, COPY_ROWS, expert_inputs, s);
    else
      lose(s, from->norm2, to->norm2, shape->hidden);
    break;
  case US_PART_MLP:
    lose_stream(s, from->middle, to->middle);
    if (moe)
      us_pool_for(s->seq.pool, R, COPY_ROWS, expert_inner, s);
    else
      lose(s, from->a, to->a, shape->dense_inner);
    break;
  }
}

/* --- inputs --- */

void us_gptq_inputs(struct us_gptq_session *s) {
  feed_all(s);
  if (s->matrix_count) lose_all(s);
}

void us_gptq_head_inputs(struct us_gptq_session *s) {
  size_t D = s->student->shape.hidden;
  lose(s, s->original->hidden, s->student->hidden, D);
  s->input_count = s->matrix_count = 0;
  feed(s, s->student->state->model.head, 1,
       input_of(D, s->student->batch.R, s->student->hidden, s->original->hidden, NULL));
}

/* --- sums over them --- */

static void list_sum(struct us_gptq_session *s, size_t index, float *sum, const float *left, size_t rows) {
  for (size_t row = 0; sum && row < rows; row += SUM_ROWS)
    s->tasks[s->task_count++] = (struct us_gptq_task){(uint32_t)index, (uint32_t)row, sum, left, rows};
}

static void add_products(void *arg, size_t begin, size_t end, int worker) {
  const struct us_gptq_session *s = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    const struct us_gptq_task *t = &s->tasks[i];
    const struct us_gptq_input *in = &s->inputs[t->index];
    size_t rows = t->left_cols - t->row < SUM_ROWS ? t->left_cols - t->row : SUM_ROWS;
    us_seq_gemm(true, false, rows, in->K, in->rows, 1.0f, t->left + t->row, t->left_cols, in->x, in->K, 0.0f,
                t->sum + t->row * in->K, in->K);
  }
}

static void factor_inputs(void *arg, size_t begin, size_t end, int worker) {
  struct us_gptq_session *s = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    struct us_gptq_input *in = &s->inputs[i];
    float *scratch = us_gptq_take(s, in->K * in->K + 1, sizeof *scratch);
    if (scratch) us_gptq_factor(in->moments, in->K, in->at, scratch);
    free(scratch);
  }
}

void us_gptq_sum_inputs(struct us_gptq_session *s) {
  size_t D = s->student->shape.hidden, blocks = 0;
  for (size_t i = 0; i < s->input_count; i++) {
    struct us_gptq_input *in = &s->inputs[i];
    in->moments = us_gptq_take(s, in->K * in->K, sizeof *in->moments);
    in->crossed = us_gptq_take(s, in->K * in->K, sizeof *in->crossed);
    if (in->opt_stream) in->opt_made_up = us_gptq_take(s, D * in->K, sizeof *in->opt_made_up);
    in->at = us_gptq_take(s, in->K, sizeof *in->at);
    blocks += 2 * us_seq_blocks(in->K, SUM_ROWS) + us_seq_blocks(D, SUM_ROWS);
  }
  s->tasks = us_gptq_take(s, blocks, sizeof *s->tasks);
  s->task_count = 0;
  for (size_t i = 0; i < s->input_count && !s->failed; i++) {
    struct us_gptq_input *in = &s->inputs[i];
    if (!in->rows) continue;
    list_sum(s, i, in->moments, in->x, in->K);
    list_sum(s, i, in->crossed, in->lost, in->K);
    list_sum(s, i, in->opt_made_up, in->opt_stream, D);
  }
  us_pool_for(s->seq.pool, s->task_count, 1, add_products, s);
  free(s->tasks);
  s->tasks = NULL;
  if (!s->failed) us_pool_for(s->seq.pool, s->input_count, 1, factor_inputs, s);
}

void us_gptq_forget_inputs(struct us_gptq_session *s) {
  for (size_t i = 0; i < s->matrix_count; i++) free(s->matrices[i].scales);
  for (size_t i = 0; i < s->input_count; i++) {
    free(s->inputs[i].moments);
    free(s->inputs[i].crossed);
    free(s->inputs[i].opt_made_up);
    free(s->inputs[i].at);
  }
  free(s->tasks);
  s->tasks = NULL;
  s->input_count = s->matrix_count = 0;
}
