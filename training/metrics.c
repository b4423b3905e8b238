/* metrics.c: models against each other on the same held-out tokens.
 *
 * Contents: rows of logits; experts; windows; sums to figures; the run.
 */
#include "training/metrics.h"

#include <stdlib.h>

#define MOST_ROWS   2048       /* a forward pass */
#define TASK_LOGITS (1u << 18) /* of one model in one worker: 1 MB, so that both models' stay in L2 */
#define TASK_ROWS   64

/* What a row's logits say. */
struct row_figures {
  double nll, kl, overlap;
  bool agree, hit, finite;
};

struct session {
  const struct us_metrics_job *job;
  struct us_metrics *metrics;
  struct us_learner *learner;
  struct us_pool *pool;
  struct us_params params[US_METRICS_MODELS];
  struct us_learner_set *set[US_METRICS_MODELS];
  struct us_learner_model *model[US_METRICS_MODELS];
  struct us_window window;
  struct us_rows rows;
  size_t *window_of;           /* (capacity) window of each row */
  size_t held, micro;          /* windows held out; windows a pass */
  struct row_figures *figures; /* (n, capacity) */
  float *logits;               /* (workers, 2, task rows, N) */
  size_t task_rows, N;
  struct us_err *errs; /* (workers) */
  bool routers;        /* the MoE layers are alike */
};

/* --- rows of logits --- */

struct softmax {
  double log_sum; /* ln sum exp, the maximum included */
  float max;
  size_t argmax; /* ties to the lowest id */
};

US_SEQ_CLONES static float row_max(const float *x, size_t n) {
  float lane[US_SEQ_LANES];
  for (int l = 0; l < US_SEQ_LANES; l++) lane[l] = -INFINITY;
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (; i < n; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
  for (int l = 1; l < US_SEQ_LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  return lane[0];
}

US_SEQ_CLONES static double exp_sum(const float *x, size_t n, float max) {
  double lane[US_SEQ_LANES] = {0};
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] += (double)us_expf(x[i + l] - max);
  for (; i < n; i++) lane[0] += (double)us_expf(x[i] - max);
  for (int l = 1; l < US_SEQ_LANES; l++) lane[0] += lane[l];
  return lane[0];
}

static struct softmax softmax_of(const float *x, size_t n) {
  struct softmax s = {.max = row_max(x, n)};
  while (s.argmax + 1 < n && x[s.argmax] != s.max) s.argmax++;
  s.log_sum = (double)s.max + log(exp_sum(x, n, s.max));
  return s;
}

/* sum p (ln p - ln q) and sum min(p, q); ln p = x - log_sum. The exponentials carry 2 ulp of FP32, the logarithms FP64. */
US_SEQ_CLONES static void compare_rows(const float *base, const struct softmax *p, const float *other,
                                       const struct softmax *q, size_t n, double *ret_kl,
                                       double *ret_overlap) {
  double kl[US_SEQ_LANES] = {0}, overlap[US_SEQ_LANES] = {0}, shift = q->log_sum - p->log_sum;
  float p_log = (float)p->log_sum, q_log = (float)q->log_sum;
  for (size_t first = 0; first < n; first += US_SEQ_LANES) {
    size_t count = n - first < US_SEQ_LANES ? n - first : US_SEQ_LANES;
    for (size_t l = 0; l < count; l++) {
      float x = base[first + l], y = other[first + l], a = us_expf(x - p_log), b = us_expf(y - q_log);
      kl[l] += (double)a * ((double)x - (double)y + shift);
      overlap[l] += (double)(a < b ? a : b);
    }
  }
  for (int l = 1; l < US_SEQ_LANES; l++) kl[0] += kl[l], overlap[0] += overlap[l];
  *ret_kl = kl[0] > 0.0 ? kl[0] : 0.0;
  *ret_overlap = overlap[0];
}

/* A row whose logits could not be had is not finite: measure() has the reason. */
static void figure_row(struct session *s, size_t m, size_t r, const float *row, const float *base,
                       struct softmax *p) {
  struct row_figures *f = &s->figures[m * s->rows.capacity + r];
  int32_t label = s->rows.label[r];
  struct softmax q = softmax_of(row, s->N);
  if (!m) *p = q;
  *f = (struct row_figures){.nll = q.log_sum - (double)row[label],
                            .agree = q.argmax == p->argmax,
                            .hit = q.argmax == (size_t)label,
                            .finite = isfinite(q.log_sum)};
  if (m) compare_rows(base, p, row, &q, s->N, &f->kl, &f->overlap);
}

/* Rows of a task, one model after another against the base's logits. */
static void figure_rows(void *arg, size_t begin, size_t end, int worker) {
  struct session *s = arg;
  float *base = s->logits + (size_t)worker * 2 * s->task_rows * s->N, *other = base + s->task_rows * s->N;
  struct softmax p[TASK_ROWS];
  for (size_t task = begin; task < end; task++) {
    size_t first = task * s->task_rows;
    size_t rows = s->rows.R - first < s->task_rows ? s->rows.R - first : s->task_rows;
    for (size_t m = 0; m < s->metrics->n; m++) {
      float *x = m ? other : base;
      struct us_err err = {0};
      if (us_learner_logits(s->model[m], first, rows, x, &err) != US_OK) {
        s->errs[worker] = err;
        return;
      }
      for (size_t r = 0; r < rows; r++) figure_row(s, m, first + r, x + r * s->N, base + r * s->N, &p[r]);
    }
  }
}

/* --- experts --- */

static bool same_routers(const struct us_shape *a, const struct us_shape *b) {
  if (a->layers != b->layers || a->experts != b->experts || a->top_k != b->top_k) return false;
  return memcmp(a->moe_layer, b->moe_layer, a->layers) == 0;
}

static bool same_set(const uint32_t *a, const uint32_t *b, uint32_t k) {
  for (uint32_t i = 0; i < k; i++) {
    uint32_t j = 0;
    while (j < k && b[j] != a[i]) j++;
    if (j == k) return false;
  }
  return true;
}

/* The passes of all models are done, so that both models' choices of the same rows are at hand. */
static enum us_status compare_experts(struct session *s, size_t model, struct us_err *err) {
  const struct us_shape *shape = &s->model[0]->shape;
  uint32_t K = shape->top_k;
  for (uint32_t l = 0; l < shape->layers; l++) {
    const uint32_t *a = NULL, *b = NULL;
    enum us_status status = us_learner_routed(s->model[0], l, &a, err);
    if (status == US_OK) status = us_learner_routed(s->model[model], l, &b, err);
    if (status != US_OK) return status;
    for (size_t r = 0; a && b && r < s->rows.R; r++) {
      struct us_metrics_window *w = &s->metrics->models[model].window[s->window_of[r]];
      w->set_pairs += 1.0;
      w->sets += same_set(a + r * K, b + r * K, K);
    }
  }
  return US_OK;
}

/* --- windows --- */

static enum us_status add_figures(struct session *s, struct us_err *err) {
  struct us_metrics *metrics = s->metrics;
  for (size_t m = 0; m < metrics->n; m++) {
    struct us_metrics_model *model = &metrics->models[m];
    for (size_t r = 0; r < s->rows.R; r++) {
      const struct row_figures *f = &s->figures[m * s->rows.capacity + r];
      struct us_metrics_window *w = &model->window[s->window_of[r]];
      if (!f->finite)
        return us_err_set(err, US_ERR_CHECK, "%s: logits of held-out token %zu are not finite",
                          s->job->models[m]->path, metrics->tokens + r);
      w->tokens += 1.0;
      w->nll += f->nll;
      w->hits += f->hit;
      w->agree += f->agree;
      w->kl += f->kl;
      w->overlap += f->overlap;
      if (model->token_kl) model->token_kl[metrics->tokens + r] = (float)f->kl;
    }
    enum us_status status = m && s->routers ? compare_experts(s, m, err) : US_OK;
    if (status != US_OK) return status;
  }
  metrics->tokens += s->rows.R;
  return US_OK;
}

/* Windows [first, first + micro) of those measured: all models forward, then their logits row by row. */
static enum us_status measure(struct session *s, size_t first, struct us_err *err) {
  size_t end = first + s->micro < s->metrics->windows ? first + s->micro : s->metrics->windows;
  s->rows.R = 0;
  for (size_t i = first; i < end; i++) {
    us_shards_heldout(s->job->shards, i * s->held / s->metrics->windows, &s->window);
    size_t at = s->rows.R, n = us_rows_add(&s->rows, &s->window, false);
    for (size_t r = at; r < at + n; r++) s->window_of[r] = i;
  }
  if (!s->rows.R) return US_OK;
  struct us_batch batch = us_rows_batch(&s->rows);
  for (size_t m = 0; m < s->metrics->n; m++) {
    enum us_status status = us_learner_forward(s->model[m], &batch, err);
    if (status != US_OK) return status;
  }
  us_pool_for(s->pool, us_seq_blocks(s->rows.R, s->task_rows), 1, figure_rows, s);
  for (int w = 0; w < us_pool_threads(s->pool); w++)
    if (s->errs[w].status != US_OK) return us_err_set(err, s->errs[w].status, "%s", s->errs[w].message);
  return add_figures(s, err);
}

/* --- sums to figures --- */

/* Mean of sum / weight over windows and its error; offsets are those of the two doubles in us_metrics_window. */
static void ratio(const struct us_metrics_window *w, size_t n, size_t sum_offset, size_t weight_offset,
                  double *ret_mean, double *ret_error) {
  double sum = 0.0, weight = 0.0, squares = 0.0;
  const char *at = (const char *)w;
  for (size_t i = 0; i < n; i++) {
    sum += *(const double *)(at + i * sizeof *w + sum_offset);
    weight += *(const double *)(at + i * sizeof *w + weight_offset);
  }
  *ret_mean = weight > 0.0 ? sum / weight : (double)NAN;
  for (size_t i = 0; i < n; i++) {
    double d = *(const double *)(at + i * sizeof *w + sum_offset) -
               *ret_mean * *(const double *)(at + i * sizeof *w + weight_offset);
    squares += d * d;
  }
  *ret_error = n > 1 && weight > 0.0 ? sqrt(squares * (double)n / (double)(n - 1)) / weight : (double)NAN;
}

#define RATIO(model, n, sum, weight, ret_mean, ret_error)                                                    \
  ratio((model)->window, n, offsetof(struct us_metrics_window, sum),                                         \
        offsetof(struct us_metrics_window, weight), ret_mean, ret_error)

static double binomial_error(double share, double n) {
  return n > 0.0 ? sqrt(share * (1.0 - share) / n) : (double)NAN;
}

static int ascending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

double us_metrics_quantile(const float *sorted, size_t n, double q) {
  if (!n) return (double)NAN;
  double at = q * (double)(n - 1);
  size_t i = (size_t)at;
  if (i + 1 >= n) return (double)sorted[n - 1];
  return (double)sorted[i] + (at - (double)i) * ((double)sorted[i + 1] - (double)sorted[i]);
}

static void compare_with_base(struct us_metrics *metrics, size_t m) {
  struct us_metrics_model *model = &metrics->models[m];
  const struct us_metrics_model *base = &metrics->models[0];
  size_t W = metrics->windows, T = metrics->tokens;
  double unused;
  RATIO(model, W, kl, tokens, &model->kl, &model->kl_error);
  RATIO(model, W, agree, tokens, &model->top1, &unused);
  RATIO(model, W, overlap, tokens, &model->overlap, &model->overlap_error);
  RATIO(model, W, sets, set_pairs, &model->router, &model->router_error);
  model->top1_error = binomial_error(model->top1, (double)T);
  qsort(model->token_kl, T, sizeof *model->token_kl, ascending);
  model->kl_median = us_metrics_quantile(model->token_kl, T, 0.5);
  model->kl_90 = us_metrics_quantile(model->token_kl, T, 0.9);
  model->kl_95 = us_metrics_quantile(model->token_kl, T, 0.95);
  model->kl_99 = us_metrics_quantile(model->token_kl, T, 0.99);
  model->kl_999 = us_metrics_quantile(model->token_kl, T, 0.999);
  model->kl_max = us_metrics_quantile(model->token_kl, T, 1.0);
  double squares = 0.0, tokens = 0.0;
  model->ln_ratio = model->nll - base->nll;
  for (size_t i = 0; i < W; i++) {
    double d = model->window[i].nll - base->window[i].nll - model->ln_ratio * base->window[i].tokens;
    squares += d * d;
    tokens += base->window[i].tokens;
  }
  model->ln_ratio_error = W > 1 ? sqrt(squares * (double)W / (double)(W - 1)) / tokens : (double)NAN;
}

static void finish(struct us_metrics *metrics, const struct us_shards *shards) {
  double tokens = (double)us_shards_tokens(shards, US_PART_HELDOUT);
  double bytes = (double)us_shards_text_bytes(shards, US_PART_HELDOUT), unused;
  for (size_t m = 0; m < metrics->n; m++) {
    struct us_metrics_model *model = &metrics->models[m];
    RATIO(model, metrics->windows, nll, tokens, &model->nll, &model->nll_error);
    RATIO(model, metrics->windows, hits, tokens, &model->accuracy, &unused);
    model->perplexity = exp(model->nll);
    /* The bytes of a window's tokens are not recorded: the part's mean bytes a token stands for them. */
    model->bits_per_byte = bytes > 0.0 ? model->nll / log(2.0) * tokens / bytes : (double)NAN;
    if (m) compare_with_base(metrics, m);
  }
}

void us_metrics_gap(const struct us_metrics *metrics, size_t before, size_t after, double *ret_closed,
                    double *ret_error) {
  const struct us_metrics_model *a = &metrics->models[before], *b = &metrics->models[after];
  size_t W = metrics->windows;
  double left = b->kl / a->kl, total = 0.0, squares = 0.0;
  for (size_t i = 0; i < W; i++) {
    double d = b->window[i].kl - left * a->window[i].kl;
    squares += d * d;
    total += a->window[i].kl;
  }
  *ret_closed = total > 0.0 ? 1.0 - left : (double)NAN;
  *ret_error = total > 0.0 && W > 1 ? sqrt(squares * (double)W / (double)(W - 1)) / total : (double)NAN;
}

/* --- the run --- */

static enum us_status follow_base(struct session *s, size_t m, struct us_err *err) {
  if (!s->routers)
    return us_err_set(err, US_ERR_INPUT, "%s has other MoE layers than %s", s->job->models[m]->path,
                      s->job->models[0]->path);
  s->model[m]->opt_follow = s->model[0];
  return US_OK;
}

static enum us_status open_models(struct session *s, size_t capacity, struct us_err *err) {
  const struct us_metrics_job *job = s->job;
  enum us_status status = US_OK;
  s->routers = true;
  for (size_t m = 0; m < job->n && status == US_OK; m++) {
    struct us_model *model = job->models[m];
    if (model->shape.vocab != job->models[0]->shape.vocab)
      return us_err_set(err, US_ERR_INPUT, "%s has %u tokens, %s %u", model->path, model->shape.vocab,
                        job->models[0]->path, job->models[0]->shape.vocab);
    s->routers = s->routers && same_routers(&model->shape, &job->models[0]->shape);
    status = us_rows_check_vocabulary(job->shards, model, err);
    if (status == US_OK) status = us_params_init_model(&s->params[m], model, s->pool, true, err);
    if (status == US_OK) status = us_learner_place(s->learner, &s->params[m], &s->set[m], err);
    if (status == US_OK)
      status =
          us_learner_model_create(s->set[m], &model->shape, capacity, US_TRAIN_FORWARD, &s->model[m], err);
    if (status == US_OK && m && job->base_experts) status = follow_base(s, m, err);
  }
  return status;
}

static enum us_status open_buffers(struct session *s, size_t capacity, struct us_err *err) {
  struct us_metrics *metrics = s->metrics;
  size_t n = s->job->n, workers = (size_t)us_pool_threads(s->pool);
  s->N = s->job->models[0]->shape.vocab;
  s->task_rows = TASK_LOGITS / s->N < 1 ? 1 : TASK_LOGITS / s->N > TASK_ROWS ? TASK_ROWS : TASK_LOGITS / s->N;
  s->window_of = calloc(capacity, sizeof *s->window_of);
  s->figures = calloc(n * capacity, sizeof *s->figures);
  s->logits = malloc(workers * 2 * s->task_rows * s->N * sizeof *s->logits);
  s->errs = calloc(workers, sizeof *s->errs);
  bool complete = s->window_of && s->figures && s->logits && s->errs;
  for (size_t m = 0; m < n; m++) {
    struct us_metrics_model *model = &metrics->models[m];
    model->window = calloc(metrics->windows, sizeof *model->window);
    if (m) model->token_kl = calloc(metrics->windows * s->job->length, sizeof *model->token_kl);
    complete = complete && model->window && (!m || model->token_kl);
  }
  if (!complete) return us_err_memory(err, "metrics", metrics->windows * s->job->length * n * sizeof(float));
  enum us_status status = us_window_init(&s->window, s->job->length + 1, err);
  return status == US_OK ? us_rows_init(&s->rows, capacity, err) : status;
}

static void close_session(struct session *s) {
  for (size_t m = 0; m < US_METRICS_MODELS; m++) {
    us_learner_model_free(s->model[m]);
    us_learner_remove(s->set[m]);
    us_params_release(&s->params[m]);
  }
  us_window_release(&s->window);
  us_rows_release(&s->rows);
  free(s->errs);
  free(s->window_of);
  free(s->figures);
  free(s->logits);
}

static enum us_status measure_all(struct session *s, struct us_err *err) {
  const struct us_metrics_job *job = s->job;
  for (size_t i = 0; i < s->metrics->windows; i += s->micro) {
    if (job->interrupted && job->interrupted()) return us_err_set(err, US_INTERRUPTED, "interrupted");
    enum us_status status = measure(s, i, err);
    if (status != US_OK) return status;
    if (job->on_progress) job->on_progress(job->arg, i, s->metrics->windows);
  }
  return US_OK;
}

static enum us_status run_session(struct session *s, struct us_err *err) {
  size_t capacity = s->micro * s->job->length;
  enum us_status status = open_models(s, capacity, err);
  if (status == US_OK) status = open_buffers(s, capacity, err);
  if (status == US_OK) status = measure_all(s, err);
  if (status == US_OK) finish(s->metrics, s->job->shards);
  close_session(s);
  return status;
}

enum us_status us_metrics_run(const struct us_metrics_job *job, struct us_pool *pool,
                              struct us_metrics *ret_metrics, struct us_err *err) {
  struct session s = {.job = job, .metrics = ret_metrics, .learner = job->learner, .pool = pool};
  struct us_learner *cpu = NULL;
  *ret_metrics = (struct us_metrics){.n = job->n};
  if (!job->n || job->n > US_METRICS_MODELS || !job->length || job->length > UINT32_MAX / 64)
    return us_err_set(err, US_ERR_USAGE, "%zu models on windows of %zu tokens", job->n, job->length);
  s.held = us_shards_n_heldout(job->shards, job->length + 1);
  if (!s.held) return us_err_set(err, US_ERR_INPUT, "the shards hold nothing out to measure on");
  ret_metrics->windows = job->windows && job->windows < s.held ? job->windows : s.held;
  enum us_status status = US_OK;
  if (!s.learner) status = us_learner_create_cpu(pool, &cpu, err);
  if (!s.learner) s.learner = cpu;
  if (status == US_OK)
    s.micro = us_learner_micro(s.learner, 0, MOST_ROWS, job->length, ret_metrics->windows * s.learner->ranks);
  if (status == US_OK) status = run_session(&s, err);
  us_learner_free(cpu);
  if (status != US_OK) us_metrics_release(ret_metrics);
  return status;
}

void us_metrics_release(struct us_metrics *metrics) {
  for (size_t m = 0; m < US_METRICS_MODELS; m++) {
    free(metrics->models[m].window);
    free(metrics->models[m].token_kl);
  }
  *metrics = (struct us_metrics){0};
}
