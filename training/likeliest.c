/* likeliest.c: a model's K likeliest tokens on held-out windows, and another model against them.
 *
 * Contents: rows of logits; passes; measuring; comparing.
 */
#include "training/likeliest.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TASK_ROWS 16

/* What is done with one row's logits, on any thread. */
typedef void row_body(void *arg, size_t row, const float *logits);

struct passes {
  struct us_learner *learner, *own; /* own: made here */
  struct us_pool *pool;
  struct us_params params;
  struct us_learner_set *set;
  struct us_learner_model *model;
  struct us_rows rows;
  size_t N;
  float *logits;       /* (workers, TASK_ROWS, N) */
  struct us_err *errs; /* (workers) */
  size_t first;        /* row of the whole that the pass begins with */
  row_body *body;
  void *arg;
};

/* Rows of logits */

/* ln sum exp, in FP64. */
static double log_sum(const float *x, size_t n) {
  float max = x[0];
  double sum = 0;
  for (size_t i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
  for (size_t i = 0; i < n; i++) sum += exp((double)x[i] - (double)max);
  return (double)max + log(sum);
}

struct candidate {
  float x;
  uint32_t id;
};

static bool likelier(struct candidate a, struct candidate b) {
  return a.x != b.x ? a.x > b.x : a.id < b.id;
}

/* The k likeliest, likeliest first: a sorted list, since few tokens get past its end. */
static void choose(const float *x, size_t n, uint32_t k, struct candidate *best) {
  uint32_t count = 0;
  for (uint32_t id = 0; id < n; id++) {
    struct candidate c = {x[id], id};
    if (count == k && !likelier(c, best[k - 1])) continue;
    uint32_t at = count < k ? count++ : k - 1;
    for (; at > 0 && likelier(c, best[at - 1]); at--) best[at] = best[at - 1];
    best[at] = c;
  }
}

/* Passes */

static enum us_status open_passes(struct passes *p, struct us_model *model, size_t capacity,
                                  struct us_err *err) {
  size_t workers = (size_t)us_pool_threads(p->pool);
  enum us_status status = US_OK;
  if (!p->learner) status = us_learner_create_cpu(p->pool, &p->own, err);
  if (!p->learner) p->learner = p->own;
  p->N = model->shape.vocab;
  p->logits = malloc(workers * TASK_ROWS * p->N * sizeof *p->logits);
  p->errs = calloc(workers, sizeof *p->errs);
  if (status == US_OK && (!p->logits || !p->errs))
    status = us_err_memory(err, "logits", workers * TASK_ROWS * p->N * sizeof *p->logits);
  if (status == US_OK) status = us_params_init_model(&p->params, model, p->pool, true, err);
  if (status == US_OK) status = us_learner_place(p->learner, &p->params, &p->set, err);
  if (status == US_OK)
    status = us_learner_model_create(p->set, &model->shape, capacity, US_TRAIN_FORWARD, &p->model, err);
  return status == US_OK ? us_rows_init(&p->rows, capacity, err) : status;
}

static void close_passes(struct passes *p) {
  us_learner_model_free(p->model);
  us_learner_remove(p->set);
  us_params_release(&p->params);
  us_rows_release(&p->rows);
  us_learner_free(p->own);
  free(p->logits), free(p->errs);
}

static void task(void *arg, size_t begin, size_t end, int worker) {
  struct passes *p = arg;
  float *x = p->logits + (size_t)worker * TASK_ROWS * p->N;
  for (size_t t = begin; t < end; t++) {
    size_t first = t * TASK_ROWS, rows = p->rows.R - first < TASK_ROWS ? p->rows.R - first : TASK_ROWS;
    struct us_err err = {0};
    if (us_learner_logits(p->model, first, rows, x, &err) != US_OK) {
      p->errs[worker] = err;
      return;
    }
    for (size_t r = 0; r < rows; r++) p->body(p->arg, p->first + first + r, x + r * p->N);
  }
}

/* Window by window, so that little memory is enough for any model. */
static enum us_status run_windows(struct passes *p, const struct us_likeliest *l, struct us_err *err) {
  for (size_t w = 0; w < l->windows; w++) {
    struct us_window window = {.length = l->length,
                               .n = l->length,
                               .ids = l->token + w * l->length,
                               .document = l->document + w * l->length};
    p->rows.R = 0;
    p->first = w * (l->length - 1);
    us_rows_add(&p->rows, &window, false);
    struct us_batch batch = us_rows_batch(&p->rows);
    enum us_status status = us_learner_forward(p->model, &batch, err);
    if (status != US_OK) return status;
    us_pool_for(p->pool, (p->rows.R + TASK_ROWS - 1) / TASK_ROWS, 1, task, p);
    for (int i = 0; i < us_pool_threads(p->pool); i++)
      if (p->errs[i].status != US_OK) return us_err_set(err, p->errs[i].status, "%s", p->errs[i].message);
  }
  return US_OK;
}

/* Measuring */

static enum us_status make_room(struct us_likeliest *l, struct us_err *err) {
  l->token = calloc(l->windows * l->length, sizeof *l->token);
  l->document = calloc(l->windows * l->length, sizeof *l->document);
  l->entry = calloc(l->rows * l->k, sizeof *l->entry);
  l->rest = calloc(l->rows, sizeof *l->rest);
  l->label_logprob = calloc(l->rows, sizeof *l->label_logprob);
  if (l->token && l->document && l->entry && l->rest && l->label_logprob) return US_OK;
  return us_err_memory(err, "likeliest tokens", l->rows * l->k * sizeof *l->entry);
}

static enum us_status copy_windows(struct us_likeliest *l, const struct us_shards *shards, size_t held,
                                   struct us_err *err) {
  struct us_window window;
  enum us_status status = us_window_init(&window, l->length, err);
  if (status != US_OK) return status;
  for (size_t w = 0; w < l->windows; w++) {
    us_shards_heldout(shards, w * held / l->windows, &window);
    memcpy(l->token + w * l->length, window.ids, l->length * sizeof *l->token);
    memcpy(l->document + w * l->length, window.document, l->length * sizeof *l->document);
  }
  us_window_release(&window);
  return US_OK;
}

static int32_t label_of(const struct us_likeliest *l, size_t row) {
  size_t w = row / (l->length - 1);
  return l->token[row + w + 1];
}

static void keep_row(void *arg, size_t row, const float *x) {
  struct us_likeliest *l = arg;
  struct candidate best[US_LIKELIEST_MOST_K];
  double sum = log_sum(x, l->vocab), mass = 0;
  choose(x, l->vocab, l->k, best);
  for (uint32_t i = 0; i < l->k; i++) {
    double nats = sum - (double)best[i].x, steps = round(nats / US_LIKELIEST_STEP);
    l->entry[row * l->k + i] = best[i].id << 16 | (uint32_t)(steps < 65535 ? steps : 65535);
    mass += exp(-nats);
  }
  l->rest[row] =
      (float)(mass > 1 ? 0 : 1 - mass); /* rounding may pass the end; what is no number stays none */
  double own = (double)x[label_of(l, row)] - sum;
  l->label_logprob[row] = (float)(own > 0 ? 0 : own);
}

static enum us_status check_finite(const struct us_likeliest *l, const struct us_model *model,
                                   struct us_err *err) {
  for (size_t r = 0; r < l->rows; r++)
    if (!isfinite(l->rest[r]) || !isfinite(l->label_logprob[r]))
      return us_err_set(err, US_ERR_CHECK, "%s: logits of held-out token %zu are not finite", model->path, r);
  return US_OK;
}

enum us_status us_likeliest_measure(const struct us_likeliest_job *job, struct us_pool *pool,
                                    struct us_likeliest *ret_likeliest, struct us_err *err) {
  struct us_likeliest *l = ret_likeliest;
  uint32_t vocab = job->model->shape.vocab;
  *l = (struct us_likeliest){.vocab = vocab, .k = job->k, .windows = job->windows, .length = job->length};
  if (!l->k || l->k > US_LIKELIEST_MOST_K || l->k > vocab || l->length < 2 || !l->windows)
    return us_err_set(err, US_ERR_USAGE, "%u likeliest of %zu windows of %zu tokens", l->k, l->windows,
                      l->length);
  if (vocab > 65536)
    return us_err_set(err, US_ERR_INPUT, "%s: ids of %u tokens do not fit 16 bits", job->model->path, vocab);
  size_t tokens = us_shards_tokens(job->shards, US_PART_HELDOUT),
         held = tokens ? (tokens - 1) / (l->length - 1) : 0;
  if (held < l->windows)
    return us_err_set(err, US_ERR_INPUT, "the shards hold out %zu windows of %zu tokens, not %zu", held,
                      l->length, l->windows);
  l->rows = l->windows * (l->length - 1);
  memcpy(l->tokenizer_sha256, us_shards_tokenizer_sha256(job->shards), sizeof l->tokenizer_sha256);
  struct passes p = {.learner = job->learner, .pool = pool, .body = keep_row, .arg = l};
  enum us_status status = us_rows_check_vocabulary(job->shards, job->model, err);
  if (status == US_OK) status = make_room(l, err);
  if (status == US_OK) status = copy_windows(l, job->shards, held, err);
  if (status == US_OK) status = open_passes(&p, job->model, l->length - 1, err);
  if (status == US_OK) status = run_windows(&p, l, err);
  if (status == US_OK) status = check_finite(l, job->model, err);
  close_passes(&p);
  if (status != US_OK) us_likeliest_release(l);
  return status;
}

/* Comparing */

struct row_result {
  double kl, nll;
  bool agrees;
};

struct comparison {
  const struct us_likeliest *base;
  struct row_result *row; /* (rows) */
};

/* sum p (ln p - ln q) over the base's tokens and over all others together. A q of 0 among the others is as small as FP64 shows. */
static void compare_row(void *arg, size_t row, const float *x) {
  const struct comparison *c = arg;
  const struct us_likeliest *l = c->base;
  const uint32_t *entry = l->entry + row * l->k;
  double sum = log_sum(x, l->vocab), kl = 0, p_mass = 0, q_mass = 0;
  struct candidate best;
  choose(x, l->vocab, 1, &best);
  for (uint32_t i = 0; i < l->k; i++) {
    double ln_p = -(double)(entry[i] & 0xffff) * US_LIKELIEST_STEP, ln_q = (double)x[entry[i] >> 16] - sum;
    kl += exp(ln_p) * (ln_p - ln_q);
    p_mass += exp(ln_p), q_mass += exp(ln_q);
  }
  double rest = (double)l->rest[row], other = q_mass < 1 ? 1 - q_mass : 0;
  if (rest > 0) kl += rest * (log(rest) - log(other > 1e-12 ? other : 1e-12));
  /* The rounded p need not sum to one: with p of mass m, kl + 1 - m is the divergence that is 0 for equal ones. */
  kl += 1 - p_mass - rest;
  c->row[row] = (struct row_result){
      .kl = kl, .nll = sum - (double)x[label_of(l, row)], .agrees = best.id == entry[0] >> 16};
}

/* Mean of the rows' values and its error over windows of equal size. */
static void mean_of(const struct comparison *c, double (*value)(const struct comparison *, size_t),
                    double *ret_mean, double *ret_error) {
  const struct us_likeliest *l = c->base;
  size_t each = l->rows / l->windows;
  double total = 0, squares = 0;
  for (size_t r = 0; r < l->rows; r++) total += value(c, r);
  *ret_mean = total / (double)l->rows;
  for (size_t w = 0; w < l->windows; w++) {
    double sum = 0;
    for (size_t r = w * each; r < (w + 1) * each; r++) sum += value(c, r);
    squares += (sum / (double)each - *ret_mean) * (sum / (double)each - *ret_mean);
  }
  double n = (double)l->windows;
  *ret_error = l->windows > 1 ? sqrt(squares / (n * (n - 1))) : (double)NAN;
}

static double kl_of(const struct comparison *c, size_t r) {
  return c->row[r].kl;
}
static double nll_of(const struct comparison *c, size_t r) {
  return c->row[r].nll;
}
static double ratio_of(const struct comparison *c, size_t r) {
  return c->row[r].nll + (double)c->base->label_logprob[r];
}
static double agrees(const struct comparison *c, size_t r) {
  return c->row[r].agrees;
}

static enum us_status finish(const struct comparison *c, const struct us_model *model,
                             struct us_likeliest_figures *f, struct us_err *err) {
  double nll, unused;
  f->tokens = c->base->rows;
  mean_of(c, kl_of, &f->kl, &f->kl_error);
  mean_of(c, agrees, &f->top1, &unused);
  mean_of(c, nll_of, &nll, &unused);
  mean_of(c, ratio_of, &f->ln_ratio, &f->ln_ratio_error);
  f->top1_error = sqrt(f->top1 * (1 - f->top1) / (double)f->tokens);
  f->perplexity = exp(nll);
  f->base = exp(nll - f->ln_ratio);
  if (isfinite(f->kl) && isfinite(nll)) return US_OK;
  return us_err_set(err, US_ERR_CHECK, "%s: logits are not finite", model->path);
}

static enum us_status check_model(const struct us_likeliest *base, const struct us_model *model,
                                  struct us_err *err) {
  if (model->shape.vocab != base->vocab)
    return us_err_set(err, US_ERR_INPUT, "%s has %u tokens, the recorded model %u", model->path,
                      model->shape.vocab, base->vocab);
  if (!model->tokenizer_json) return US_OK;
  uint8_t digest[US_SHA256_BYTES];
  char hex[US_SHA256_HEX];
  enum us_status status = us_sha256_bytes(model->tokenizer_json, strlen(model->tokenizer_json), digest, err);
  if (status != US_OK) return status;
  us_sha256_hex(digest, hex);
  if (strcmp(hex, base->tokenizer_sha256) == 0) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s has another tokenizer than the recorded model", model->path);
}

enum us_status us_likeliest_compare(const struct us_likeliest *base, struct us_model *model,
                                    struct us_learner *opt_learner, struct us_pool *pool,
                                    struct us_likeliest_figures *ret_figures, struct us_err *err) {
  struct comparison c = {.base = base, .row = calloc(base->rows, sizeof *c.row)};
  struct passes p = {.learner = opt_learner, .pool = pool, .body = compare_row, .arg = &c};
  *ret_figures = (struct us_likeliest_figures){0};
  enum us_status status = c.row ? US_OK : us_err_memory(err, "rows", base->rows * sizeof *c.row);
  if (status == US_OK) status = check_model(base, model, err);
  if (status == US_OK) status = open_passes(&p, model, base->length - 1, err);
  if (status == US_OK) status = run_windows(&p, base, err);
  if (status == US_OK) status = finish(&c, model, ret_figures, err);
  close_passes(&p);
  free(c.row);
  return status;
}
