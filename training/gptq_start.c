/* gptq_start.c: the inputs that a model's matrices have on text, and masters that begin at what GPTQ rounds them to.
 *
 * Contents: what is rounded; second moments; rounding; the start.
 */
#include "training/gptq.h"
#include "training/model_train_state.h"
#include "training/rows.h"

#include <stdlib.h>

#define MOST_ROWS 4096 /* of a forward pass */
#define TASK_ROWS 16   /* of a matrix */

/* What one or several matrices multiply. */
struct input {
  size_t K;
  float *h;     /* (K, K) second moments, then their factor */
  uint32_t *at; /* (K) */
  const float *x;
  size_t rows; /* x (rows, K): of the pass at hand */
};

struct matrix {
  struct us_param *master;
  size_t input;
  void *scales;
};

struct task {
  uint32_t matrix, row;
};

struct session {
  const struct us_gptq *gptq;
  struct us_params *masters, frozen; /* frozen: the original's */
  struct us_seq seq;
  struct us_model_train *train;
  struct input *inputs;
  struct matrix *matrices;
  struct task *tasks;
  size_t input_count, matrix_count, task_count;
  bool failed;
};

/* --- what is rounded --- */

static struct us_param *master_of(const struct session *s, const struct us_param *frozen) {
  struct us_param *p = &s->masters->items[frozen - s->frozen.items];
  bool rounded = p->encoding.format == US_FORMAT_MXFP4 || p->encoding.format == US_FORMAT_FP8;
  return rounded && !p->frozen && !p->vector ? p : NULL;
}

/* The `count` matrices that lie behind each other from `first` on and multiply the same x (rows, K). Twice with s->inputs NULL
 * and not, to count and to list; then once a pass, to point at x. */
static void visit(struct session *s, const struct us_param *first, size_t count, size_t K, const float *x,
                  size_t rows) {
  size_t before = s->matrix_count;
  for (size_t i = 0; i < count; i++) {
    struct us_param *p = master_of(s, first + i);
    if (!p) continue;
    if (s->matrices) s->matrices[s->matrix_count].master = p;
    if (s->matrices) s->matrices[s->matrix_count].input = s->input_count;
    s->matrix_count++;
  }
  if (s->matrix_count == before) return;
  if (s->inputs) {
    struct input *in = &s->inputs[s->input_count];
    in->K = K, in->x = x, in->rows = rows;
  }
  s->input_count++;
}

static void visit_experts(struct session *s, uint32_t l) {
  const struct us_shape *shape = &s->train->shape;
  const struct us_layer_saved *saved = &s->train->state->saved[l];
  for (uint32_t e = 0; e < shape->experts; e++) {
    const struct us_param *expert = s->train->state->roles[l].experts + 3 * (size_t)e;
    size_t first = saved->plan.start[e], rows = saved->plan.start[e + 1] - first;
    visit(s, expert, 2, shape->hidden, saved->experts.x + first * shape->hidden, rows);
    visit(s, expert + 2, 1, shape->expert_inner, saved->experts.a + first * shape->expert_inner, rows);
  }
}

static void visit_all(struct session *s) {
  const struct us_model_train *train = s->train;
  const struct us_shape *shape = &train->shape;
  size_t R = train->batch.R;
  s->input_count = s->matrix_count = 0;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const struct us_layer_roles *roles = &train->state->roles[l];
    const struct us_layer_saved *saved = &train->state->saved[l];
    const struct us_attention_shape *a = us_shape_attention(shape, l);
    visit(s, roles->qkv, 1, shape->hidden, saved->norm1, R);
    visit(s, roles->o_proj, 1, (size_t)a->q_heads * a->v_dim, saved->attention, R);
    if (shape->moe_layer[l]) {
      visit_experts(s, l);
    } else {
      visit(s, roles->gate_up, 2, shape->hidden, saved->norm2, R);
      visit(s, roles->down, 1, shape->dense_inner, saved->a, R);
    }
  }
  visit(s, train->state->model.head, 1, shape->hidden, train->hidden, R);
}

/* --- second moments --- */

/* An expert's output counts with its routing weight: so do its inputs. */
static void weigh(struct us_model_train *train, uint32_t l) {
  struct us_layer_saved *saved = &train->state->saved[l];
  size_t D = train->shape.hidden, F = train->shape.expert_inner;
  for (size_t i = 0; i < train->batch.R * train->shape.top_k; i++) {
    float *x = saved->experts.x + saved->plan.slot[i] * D, *a = saved->experts.a + saved->plan.slot[i] * F;
    for (size_t k = 0; k < D; k++) x[k] *= saved->weight[i];
    for (size_t k = 0; k < F; k++) a[k] *= saved->weight[i];
  }
}

static void add_squares(void *arg, size_t begin, size_t end, int worker) {
  const struct session *s = arg;
  for (size_t i = begin; i < end; i++) {
    const struct input *in = &s->inputs[i];
    us_seq_gemm(true, false, in->K, in->K, in->rows, 1.0f, in->x, in->K, in->x, in->K, 1.0f, in->h, in->K);
  }
}

static size_t windows_of_pass(const struct us_gptq *g) {
  return g->length < MOST_ROWS ? MOST_ROWS / g->length : 1;
}

static enum us_status run_pass(struct session *s, const struct us_rows *rows, struct us_err *err) {
  struct us_batch batch = us_rows_batch(rows);
  enum us_status status = us_model_train_forward(s->train, &batch, NULL, err);
  if (status != US_OK) return status;
  for (uint32_t l = 0; l < s->train->shape.layers; l++)
    if (s->train->shape.moe_layer[l]) weigh(s->train, l);
  visit_all(s);
  us_pool_for(s->seq.pool, s->input_count, 1, add_squares, s);
  return US_OK;
}

static enum us_status gather(struct session *s, struct us_err *err) {
  const struct us_gptq *g = s->gptq;
  struct us_window window = {0};
  struct us_rows rows = {0};
  enum us_status status = us_window_init(&window, g->length + 1, err);
  if (status == US_OK) status = us_rows_init(&rows, windows_of_pass(g) * g->length, err);
  for (size_t i = 0; i < g->windows && status == US_OK;) {
    rows.R = 0;
    for (size_t j = 0; j < windows_of_pass(g) && i < g->windows; j++, i++) {
      us_shards_sample_across(g->shards, g->seed, 0, i, g->across, &window);
      us_rows_add(&rows, &window, false);
    }
    status = run_pass(s, &rows, err);
  }
  us_window_release(&window);
  us_rows_release(&rows);
  return status;
}

/* --- rounding --- */

static float *take(struct session *s, size_t floats) {
  float *memory = calloc(floats, sizeof *memory);
  if (!memory) __atomic_store_n(&s->failed, true, __ATOMIC_RELAXED);
  return memory;
}

static void factor_inputs(void *arg, size_t begin, size_t end, int worker) {
  struct session *s = arg;
  for (size_t i = begin; i < end; i++) {
    struct input *in = &s->inputs[i];
    float *scratch = take(s, in->K * in->K + 1);
    if (scratch) us_gptq_factor(in->h, in->K, in->at, scratch);
    free(scratch);
  }
}

static void round_rows(void *arg, size_t begin, size_t end, int worker) {
  struct session *s = arg;
  for (size_t i = begin; i < end; i++) {
    const struct matrix *m = &s->matrices[s->tasks[i].matrix];
    const struct us_param *p = m->master;
    const struct input *in = &s->inputs[m->input];
    size_t row = s->tasks[i].row, last = row + TASK_ROWS < p->rows ? row + TASK_ROWS : p->rows;
    float *lost = take(s, (last - row) * p->cols);
    if (lost)
      us_gptq_round(p->value, p->rows, p->cols, &p->encoding, m->scales, in->h, in->at, row, last, lost);
    free(lost);
  }
}

static enum us_status find_scales(struct matrix *m, struct us_err *err) {
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
  struct session *s = arg;
  for (size_t i = begin; i < end; i++) {
    struct matrix *m = &s->matrices[i];
    if (find_scales(m, NULL) == US_OK) continue;
    free(m->scales);
    m->scales = NULL;
  }
}

static enum us_status round_all(struct session *s, struct us_err *err) {
  enum us_status status = US_OK;
  us_pool_for(s->seq.pool, s->input_count, 1, factor_inputs, s);
  us_pool_for(s->seq.pool, s->matrix_count, 1, find_all_scales, s);
  for (size_t i = 0; i < s->matrix_count && status == US_OK; i++)
    if (!s->matrices[i].scales) status = find_scales(&s->matrices[i], err);
  if (status == US_OK && !s->failed) us_pool_for(s->seq.pool, s->task_count, 1, round_rows, s);
  return status == US_OK && s->failed ? us_err_memory(err, "GPTQ", 0) : status;
}

/* --- the start --- */

static enum us_status list_work(struct session *s, struct us_err *err) {
  visit_all(s);
  s->inputs = calloc(s->input_count + 1, sizeof *s->inputs);
  s->matrices = calloc(s->matrix_count + 1, sizeof *s->matrices);
  if (!s->inputs || !s->matrices) return us_err_memory(err, "GPTQ", s->matrix_count * sizeof *s->matrices);
  visit_all(s);
  for (size_t i = 0; i < s->input_count; i++) {
    struct input *in = &s->inputs[i];
    in->h = calloc(in->K * in->K, sizeof *in->h);
    in->at = calloc(in->K, sizeof *in->at);
    if (!in->h || !in->at) return us_err_memory(err, "second moments", in->K * in->K * sizeof *in->h);
  }
  for (size_t i = 0; i < s->matrix_count; i++)
    s->task_count += (s->matrices[i].master->rows + TASK_ROWS - 1) / TASK_ROWS;
  s->tasks = calloc(s->task_count + 1, sizeof *s->tasks);
  if (!s->tasks) return us_err_memory(err, "GPTQ", s->task_count * sizeof *s->tasks);
  size_t at = 0;
  for (size_t i = 0; i < s->matrix_count; i++)
    for (size_t row = 0; row < s->matrices[i].master->rows; row += TASK_ROWS)
      s->tasks[at++] = (struct task){(uint32_t)i, (uint32_t)row};
  return US_OK;
}

static void release(struct session *s) {
  for (size_t i = 0; s->inputs && i < s->input_count; i++) {
    free(s->inputs[i].h);
    free(s->inputs[i].at);
  }
  for (size_t i = 0; s->matrices && i < s->matrix_count; i++) free(s->matrices[i].scales);
  free(s->inputs);
  free(s->matrices);
  free(s->tasks);
  us_model_train_free(s->train);
  us_params_release(&s->frozen);
  us_seq_release(&s->seq);
}

enum us_status us_gptq_start(const struct us_gptq *gptq, struct us_model *original, struct us_params *params,
                             struct us_pool *pool, struct us_err *err) {
  struct session s = {.gptq = gptq, .masters = params};
  if (!us_shards_can_sample(gptq->shards, gptq->length + 1))
    return us_err_set(err, US_ERR_INPUT, "the shards hold fewer than %zu training tokens", gptq->length + 1);
  us_seq_init(&s.seq, pool, US_SEQ_ROUND_BF16);
  enum us_status status = us_params_init_model(&s.frozen, original, pool, true, err);
  if (status == US_OK)
    status = us_model_train_create(&original->shape, &s.frozen, &s.seq, windows_of_pass(gptq) * gptq->length,
                                   US_TRAIN_SAVE, &s.train, err);
  if (status == US_OK) status = list_work(&s, err);
  if (status == US_OK) status = gather(&s, err);
  if (status == US_OK) status = round_all(&s, err);
  release(&s);
  return status;
}
