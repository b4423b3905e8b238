/* gptq_start.c: masters that begin where GPTQ rounds a model's matrices, one after another.
 *
 * Contents: aims; a layer; the start.
 */
#include "training/gptq_state.h"

#include <stdlib.h>

#define TASK_ROWS   16 /* of a matrix */
#define COPY_BLOCK  65536
#define MOST_TOKENS (1 << 25) /* a batch's limit is twice that */

/* --- aims --- */

/* w <- w + (shares of w crossed + made up) H^-1: what makes the products of the inputs as they are nearest to the original's,
 * were the shares 1. */
static void correct_rows(void *arg, size_t begin, size_t end, int worker) {
  struct us_gptq_session *s = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    const struct us_gptq_matrix *m = &s->matrices[s->tasks[i].index];
    const struct us_param *p = m->master;
    const struct us_gptq_input *in = &s->inputs[m->input];
    size_t row = s->tasks[i].row, rows = p->rows - row < TASK_ROWS ? p->rows - row : TASK_ROWS,
           n = rows * p->cols;
    float *w = p->value + row * p->cols, *change = us_gptq_take(s, 2 * n, sizeof *change);
    if (!change) return;
    us_seq_gemm(false, false, rows, in->K, in->K, US_GPTQ_OF_INPUTS, w, in->K, in->crossed, in->K, 0.0f,
                change, in->K);
    for (size_t k = 0; in->opt_made_up && k < n; k++)
      change[k] += US_GPTQ_OF_STREAM * in->opt_made_up[row * in->K + k];
    us_gptq_solve(change, rows, in->K, in->moments, in->at, change + n);
    for (size_t k = 0; k < n; k++) w[k] += change[k];
    free(change);
  }
}

static void round_rows(void *arg, size_t begin, size_t end, int worker) {
  struct us_gptq_session *s = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    const struct us_gptq_matrix *m = &s->matrices[s->tasks[i].index];
    const struct us_param *p = m->master;
    const struct us_gptq_input *in = &s->inputs[m->input];
    size_t row = s->tasks[i].row, last = row + TASK_ROWS < p->rows ? row + TASK_ROWS : p->rows;
    float *lost = us_gptq_take(s, (last - row) * p->cols, sizeof *lost);
    if (lost)
      us_gptq_round(p->value, p->rows, p->cols, &p->encoding, m->scales, in->moments, in->at, row, last,
                    lost);
    free(lost);
  }
}

static enum us_status find_scales(struct us_gptq_matrix *m, struct us_err *err) {
  const struct us_param *p = m->master;
  const struct us_matrix_encoding *e = &p->encoding;
  void *codes = malloc(us_matrix_data_bytes(e->format, p->rows, p->cols));
  m->scales = malloc(us_matrix_scale_bytes(e->format, p->rows, p->cols, e->scale_chunk_rows));
  enum us_status status = codes && m->scales
                              ? us_matrix_encode(p->value, p->rows, p->cols, e, codes, m->scales, err)
                              : us_err_memory(err, p->name, p->rows * p->cols);
  free(codes);
  return status;
}

/* One that fails has none, and says why when it is asked again. */
static void find_all_scales(void *arg, size_t begin, size_t end, int worker) {
  struct us_gptq_session *s = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    struct us_gptq_matrix *m = &s->matrices[i];
    if (find_scales(m, NULL) == US_OK) continue;
    free(m->scales);
    m->scales = NULL;
  }
}

/* From now on the student multiplies by what the aims are rounded to. */
static void use_aims(void *arg, size_t begin, size_t end, int worker) {
  struct us_gptq_session *s = arg;
  (void)worker;
  for (size_t i = begin; i < end; i++) {
    if (us_param_refresh(s->matrices[i].master, s->seq.rounding, NULL) != US_OK)
      __atomic_store_n(&s->failed, true, __ATOMIC_RELAXED);
  }
}

/* From the factors; with `lost` what was lost is made up for first. */
static enum us_status aim(struct us_gptq_session *s, bool lost, struct us_err *err) {
  enum us_status status = US_OK;
  size_t blocks = 0;
  for (size_t i = 0; i < s->matrix_count; i++)
    blocks += us_seq_blocks(s->matrices[i].master->rows, TASK_ROWS);
  s->tasks = us_gptq_take(s, blocks, sizeof *s->tasks);
  s->task_count = 0;
  for (size_t i = 0; i < s->matrix_count && !s->failed; i++)
    for (size_t row = 0; row < s->matrices[i].master->rows; row += TASK_ROWS)
      s->tasks[s->task_count++] = (struct us_gptq_task){.index = (uint32_t)i, .row = (uint32_t)row};
  if (lost) us_pool_for(s->seq.pool, s->task_count, 1, correct_rows, s);
  us_pool_for(s->seq.pool, s->matrix_count, 1, find_all_scales, s);
  for (size_t i = 0; i < s->matrix_count && status == US_OK; i++)
    if (!s->matrices[i].scales) status = find_scales(&s->matrices[i], err);
  if (status == US_OK && !s->failed) us_pool_for(s->seq.pool, s->task_count, 1, round_rows, s);
  if (status != US_OK || s->failed) return status;
  us_pool_for(s->seq.pool, s->matrix_count, 1, use_aims, s);
  for (size_t i = 0; s->failed && i < s->matrix_count && status == US_OK; i++) /* again, for the message */
    status = us_param_refresh(s->matrices[i].master, s->seq.rounding, err);
  return status;
}

/* --- a layer --- */

static enum us_status round_inputs(struct us_gptq_session *s, struct us_err *err) {
  enum us_status status = US_OK;
  if (s->matrix_count) us_gptq_sum_inputs(s);
  if (s->matrix_count && !s->failed) status = aim(s, true, err);
  us_gptq_forget_inputs(s);
  return status == US_OK && (s->failed || s->seq.failed) ? us_err_memory(err, "GPTQ", 0) : status;
}

/* The same rows for the same experts, or inputs could not be compared. */
static void follow_routes(struct us_gptq_session *s) {
  const struct us_shape *shape = &s->student->shape;
  struct us_layer_saved *to = &s->student->state->saved[s->layer];
  size_t n = s->student->batch.R * shape->top_k;
  struct us_experts_rows experts = us_model_train_experts(s->student, s->layer);
  memcpy(s->student->state->id[s->layer], s->original->state->id[s->layer], n * sizeof(uint32_t));
  memcpy(to->weight, s->original->state->saved[s->layer].weight, n * sizeof(float));
  us_experts_sort(&experts, s->student->state->id[s->layer], &to->plan);
}

static enum us_status round_layer(struct us_gptq_session *s, struct us_err *err) {
  enum us_status status = US_OK;
  us_model_train_layer(s->original, s->layer);
  for (s->part = US_PART_ATTENTION_INPUTS; s->part <= US_PART_MLP && status == US_OK; s->part++) {
    us_model_train_part(s->student, s->layer, s->part);
    if (s->part == US_PART_MLP_INPUTS && s->student->shape.moe_layer[s->layer]) follow_routes(s);
    us_gptq_inputs(s);
    status = round_inputs(s, err);
  }
  us_model_train_part(s->student, s->layer, US_PART_MLP); /* again, by what `down` is now */
  return status;
}

static enum us_status round_head(struct us_gptq_session *s, struct us_err *err) {
  enum us_status status = us_model_train_end(s->original, err);
  if (status == US_OK) status = us_model_train_end(s->student, err);
  if (status != US_OK) return status;
  us_gptq_head_inputs(s);
  return round_inputs(s, err);
}

/* --- the start --- */

static void copy_block(void *arg, size_t begin, size_t end, int worker) {
  const struct us_params *params = arg;
  (void)worker;
  memcpy(params->compute + begin, params->value + begin, (end - begin) * sizeof *params->compute);
}

static enum us_status round_embed(struct us_gptq_session *s, struct us_err *err) {
  struct us_param *p = s->student->state->model.embed;
  size_t D = p->cols;
  if (!us_gptq_rounds(p)) return US_OK;
  s->input_count = s->matrix_count = 1;
  s->matrices[0] = (struct us_gptq_matrix){.master = p};
  struct us_gptq_input *in = &s->inputs[0];
  *in = (struct us_gptq_input){.K = D,
                               .moments = us_gptq_take(s, D * D, sizeof *in->moments),
                               .at = us_gptq_take(s, D, sizeof *in->at)};
  float *scratch = us_gptq_take(s, D * D + 1, sizeof *scratch);
  enum us_status status = s->failed ? us_err_memory(err, "GPTQ", D * D)
                                    : us_gptq_embed_moments(s->gptq, &s->original->shape, s->original->params,
                                                            &s->seq, in->moments, err);
  if (status == US_OK) {
    us_gptq_factor(in->moments, D, in->at, scratch);
    status = aim(s, false, err);
  }
  free(scratch);
  us_gptq_forget_inputs(s);
  return status == US_OK && s->failed ? us_err_memory(err, "GPTQ", p->rows * D) : status;
}

/* What is rounded in its turn is the original's until then. */
static enum us_status begin_student(struct us_gptq_session *s, struct us_err *err) {
  enum us_status status = US_OK;
  us_pool_for(s->seq.pool, s->masters->floats, COPY_BLOCK, copy_block, s->masters);
  for (size_t i = 0; i < s->masters->count && status == US_OK; i++) {
    const struct us_param *p = &s->masters->items[i];
    if (!us_gptq_rounds(p)) status = us_param_refresh(p, s->seq.rounding, err);
  }
  return status == US_OK ? round_embed(s, err) : status;
}

enum us_status us_gptq_check(const struct us_gptq *gptq, struct us_err *err) {
  if (!us_shards_can_sample(gptq->shards, gptq->length + 1))
    return us_err_set(err, US_ERR_INPUT, "the shards hold fewer than %zu training tokens", gptq->length + 1);
  if (gptq->windows <= MOST_TOKENS / gptq->length) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "GPTQ: %zu sequences of %zu tokens are more than %d", gptq->windows,
                    gptq->length, MOST_TOKENS);
}

enum us_status us_gptq_draw(const struct us_gptq *gptq, size_t first, size_t count, struct us_rows *rows,
                            struct us_err *err) {
  struct us_window window = {0};
  enum us_status status = us_window_init(&window, gptq->length + 1, err);
  if (status == US_OK) status = us_rows_init(rows, count * gptq->length, err);
  for (size_t i = first; i < first + count && status == US_OK; i++) {
    us_shards_sample_across(gptq->shards, gptq->seed, 0, i, gptq->across, &window);
    us_rows_add(rows, &window, false);
  }
  us_window_release(&window);
  return status;
}

static enum us_status open_models(struct us_gptq_session *s, const struct us_shape *shape,
                                  struct us_params *original, struct us_err *err) {
  size_t rows = s->gptq->windows * s->gptq->length;
  enum us_status status =
      us_model_train_create(shape, original, &s->seq, rows, US_TRAIN_FORWARD, &s->original, err);
  if (status == US_OK)
    status = us_model_train_create(shape, s->masters, &s->seq, rows, US_TRAIN_FORWARD, &s->student, err);
  s->inputs = us_gptq_take(s, shape->experts + 1, sizeof *s->inputs);
  s->matrices = us_gptq_take(s, 2 * ((size_t)shape->experts + 1), sizeof *s->matrices);
  return status == US_OK && s->failed ? us_err_memory(err, "GPTQ", 0) : status;
}

static enum us_status run(struct us_gptq_session *s, struct us_err *err) {
  struct us_batch batch = us_rows_batch(&s->rows);
  enum us_status status = begin_student(s, err);
  if (status == US_OK) status = us_model_train_begin(s->original, &batch, err);
  if (status == US_OK) status = us_model_train_begin(s->student, &batch, err);
  for (s->layer = 0; s->layer < s->student->shape.layers && status == US_OK; s->layer++)
    status = round_layer(s, err);
  return status == US_OK ? round_head(s, err) : status;
}

enum us_status us_gptq_start(const struct us_gptq *gptq, const struct us_shape *shape,
                             struct us_params *original, struct us_params *params, struct us_pool *pool,
                             struct us_err *err) {
  struct us_gptq_session s = {.gptq = gptq, .masters = params};
  enum us_status status = us_gptq_check(gptq, err);
  if (status != US_OK) return status;
  us_seq_init(&s.seq, pool, US_SEQ_ROUND_BF16);
  status = us_gptq_draw(gptq, 0, gptq->windows, &s.rows, err);
  if (status == US_OK) status = open_models(&s, shape, original, err);
  if (status == US_OK) status = run(&s, err);
  free(s.inputs);
  free(s.matrices);
  us_model_train_free(s.student);
  us_model_train_free(s.original);
  us_rows_release(&s.rows);
  us_seq_release(&s.seq);
  return status;
}
