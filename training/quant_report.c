/* quant_report.c: what quantization did, tensor by tensor and to the model. */
#include "training/quant_report.h"

#include "base/atomic.h"
#include "base/h5.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- tensors --- */

struct report {
  const struct us_qat *run;
  const struct us_tensor_ref *before, *after;
  const size_t *tensor; /* (count) index of each row's tensor */
  struct us_quant_row *rows;
  size_t failed; /* a tensor did not fit in memory */
};

static double relative_move(const float *master, const float *original, size_t n) {
  double moved = 0.0, power = 0.0;
  for (size_t i = 0; i < n; i++) {
    double d = (double)master[i] - (double)original[i];
    moved += d * d;
    power += (double)original[i] * (double)original[i];
  }
  return power > 0.0 ? sqrt(moved / power) : 0.0;
}

static void report_tensor(struct report *t, size_t i) {
  const struct us_tensor_ref *before = &t->before[t->tensor[i]], *after = &t->after[t->tensor[i]];
  const struct us_param *p = t->run->params.count ? &t->run->params.items[t->tensor[i]] : NULL;
  struct us_quant_row *row = &t->rows[i];
  size_t n = before->rows * before->cols;
  float *original = malloc(n * sizeof *original);
  if (!original) {
    __atomic_store_n(&t->failed, n * sizeof *original, __ATOMIC_RELAXED);
    return;
  }
  us_matrix_decode(before->matrix, original);
  const float *master = p && !p->frozen ? p->value : original;
  us_quant_stats_init(&row->stats);
  us_quant_stats_add(&row->stats, master, after->matrix, 0, after->rows);
  us_quant_stats_finish(&row->stats);
  row->moved = master == original ? 0.0 : relative_move(master, original, n);
  free(original);
}

static void report_tensors(void *arg, size_t begin, size_t end, int worker) {
  (void)worker;
  for (size_t i = begin; i < end; i++) report_tensor(arg, i);
}

static uint64_t matrix_bytes(const struct us_matrix *w) {
  return us_matrix_data_bytes(w->format, w->rows, w->cols) +
         us_matrix_scale_bytes(w->format, w->rows, w->cols, w->scale_chunk_rows);
}

static size_t choose_rows(struct report *t, size_t count, size_t *tensor) {
  size_t n = 0;
  for (size_t i = 0; i < count; i++) {
    const struct us_tensor_ref *before = &t->before[i], *after = &t->after[i];
    bool trained = t->run->params.count && !t->run->params.items[i].frozen;
    if (!before->matrix || (before->matrix->format == after->matrix->format && !trained)) continue;
    struct us_quant_row *row = &t->rows[n];
    *row = (struct us_quant_row){.family = before->family,
                                 .layer = before->layer,
                                 .rows = before->rows,
                                 .cols = before->cols,
                                 .from = before->matrix->format,
                                 .to = after->matrix->format,
                                 .from_bytes = matrix_bytes(before->matrix),
                                 .to_bytes = matrix_bytes(after->matrix)};
    memcpy(row->name, before->name, sizeof row->name);
    tensor[n++] = i;
  }
  return n;
}

enum us_status us_quant_report(const struct us_qat *run, struct us_model *stored, struct us_pool *pool,
                               struct us_quant_row **ret_rows, size_t *ret_count, struct us_err *err) {
  struct us_tensor_ref *before = NULL, *after = NULL;
  size_t count = 0, others = 0, *tensor = NULL;
  struct report t = {.run = run};
  enum us_status status = us_model_tensors(run->original, &before, &count, err);
  if (status == US_OK) status = us_model_tensors(stored, &after, &others, err);
  if (status == US_OK && count != others)
    status = us_err_set(err, US_ERR_USAGE, "%zu tensors, %zu in the original", others, count);
  if (status == US_OK) {
    t.rows = calloc(count, sizeof *t.rows);
    tensor = calloc(count, sizeof *tensor);
    if (!t.rows || !tensor) status = us_err_memory(err, "report", count * sizeof *t.rows);
  }
  if (status == US_OK) {
    t.before = before, t.after = after, t.tensor = tensor;
    *ret_count = choose_rows(&t, count, tensor);
    us_pool_for(pool, *ret_count, 1, report_tensors, &t);
    if (t.failed) status = us_err_memory(err, "report", t.failed);
  }
  free(before);
  free(after);
  free(tensor);
  if (status != US_OK) free(t.rows);
  *ret_rows = status == US_OK ? t.rows : NULL;
  return status;
}

/* --- writing --- */

enum { TEXTS = 4, NUMBERS = 17 };
static const char *const columns[TEXTS + NUMBERS] = {
    "tensor",     "family",        "from",         "to",          "layer",         "rows",
    "cols",       "from_bytes",    "to_bytes",     "sqnr_db",     "relative_rmse", "cosine",
    "max_error",  "clipped_share", "zeroed_share", "zero_blocks", "scale_min",     "scale_max",
    "scale_span", "moved",         "blocks"};

static void texts_of(const struct us_quant_row *row, const char *texts[TEXTS]) {
  texts[0] = row->name, texts[1] = row->family;
  texts[2] = us_format_name(row->from), texts[3] = us_format_name(row->to);
}

static void numbers_of(const struct us_quant_row *row, double numbers[NUMBERS]) {
  const struct us_quant_stats *s = &row->stats;
  bool scaled = s->scale_min >= 0;
  const double values[NUMBERS] = {row->layer == UINT32_MAX ? (double)NAN : (double)row->layer,
                                  (double)row->rows,
                                  (double)row->cols,
                                  (double)row->from_bytes,
                                  (double)row->to_bytes,
                                  s->sqnr_db,
                                  s->relative_rmse,
                                  s->cosine,
                                  s->max_abs_error,
                                  s->clipped_share,
                                  s->zeroed_share,
                                  (double)s->zero_blocks,
                                  scaled ? (double)s->scale_min : (double)NAN,
                                  scaled ? (double)s->scale_max : (double)NAN,
                                  row->to == US_FORMAT_MXFP4 && scaled ? (double)s->max_tile_span
                                                                       : (double)NAN,
                                  row->moved,
                                  (double)s->blocks};
  memcpy(numbers, values, sizeof values);
}

static enum us_status write_tsv(const char *path, const struct us_quant_row *rows, size_t count,
                                struct us_err *err) {
  struct us_atomic out;
  struct us_table *table = NULL;
  enum us_status status = us_atomic_open(path, &out, err);
  if (status != US_OK) return status;
  FILE *file = fdopen(dup(out.fd), "w");
  if (!file) status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
  if (status == US_OK) status = us_table_open(file, columns, TEXTS + NUMBERS, false, &table, err);
  for (size_t i = 0; i < count && status == US_OK; i++) {
    const char *texts[TEXTS];
    double numbers[NUMBERS];
    texts_of(&rows[i], texts);
    numbers_of(&rows[i], numbers);
    for (int k = 0; k < TEXTS; k++) us_table_text(table, texts[k]);
    for (int k = 0; k < NUMBERS; k++) us_table_num(table, numbers[k]);
  }
  if (table) {
    struct us_err closing = {0};
    if (us_table_close(table, &closing) != US_OK && status == US_OK)
      status = us_err_set(err, closing.status, "%s: %s", path, closing.message);
  }
  if (file && fclose(file) != 0 && status == US_OK)
    status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
  if (status == US_OK) return us_atomic_commit(&out, err);
  us_atomic_abandon(&out);
  return status;
}

static enum us_status put_texts(struct us_h5_writer *out, const struct us_quant_row *rows, size_t count,
                                struct us_err *err) {
  const size_t width = sizeof rows->name;
  char *cells = calloc(count ? count : 1, width), name[64];
  if (!cells) return us_err_memory(err, "report", count * width);
  enum us_status status = US_OK;
  for (int k = 0; k < TEXTS && status == US_OK; k++) {
    memset(cells, 0, (count ? count : 1) * width);
    for (size_t i = 0; i < count; i++) {
      const char *texts[TEXTS];
      texts_of(&rows[i], texts);
      memcpy(cells + i * width, texts[k], strnlen(texts[k], width - 1));
    }
    snprintf(name, sizeof name, "tensors/%s", columns[k]);
    status = us_h5_put(out, name, US_H5_U8, 2, (size_t[]){count, width}, cells, err);
  }
  free(cells);
  return status;
}

static enum us_status put_numbers(struct us_h5_writer *out, const struct us_quant_row *rows, size_t count,
                                  struct us_err *err) {
  double *column = calloc(count ? count : 1, sizeof *column), numbers[NUMBERS];
  if (!column) return us_err_memory(err, "report", count * sizeof *column);
  enum us_status status = US_OK;
  for (int k = 0; k < NUMBERS && status == US_OK; k++) {
    char name[64];
    for (size_t i = 0; i < count; i++) {
      numbers_of(&rows[i], numbers);
      column[i] = numbers[k];
    }
    snprintf(name, sizeof name, "tensors/%s", columns[TEXTS + k]);
    status = us_h5_put(out, name, US_H5_F64, 1, (size_t[]){count}, column, err);
  }
  free(column);
  return status;
}

enum us_status us_quant_report_write(const char *path, const struct us_quant_row *rows, size_t count,
                                     const char *provenance, struct us_err *err) {
  size_t length = strlen(path);
  if (length < 3 || strcmp(path + length - 3, ".h5") != 0) return write_tsv(path, rows, count, err);
  struct us_h5_writer *out = NULL;
  enum us_status status = us_h5_create(path, "quant-report", &out, err);
  if (status == US_OK && provenance) status = us_h5_put_text(out, "provenance", provenance, err);
  if (status == US_OK) status = put_texts(out, rows, count, err);
  if (status == US_OK) status = put_numbers(out, rows, count, err);
  if (status == US_OK) return us_h5_finish(out, err);
  us_h5_abandon(out);
  return status;
}

/* --- models --- */

const char *const us_metrics_columns[US_METRICS_COLUMNS] = {"model",
                                                            "bytes",
                                                            "windows",
                                                            "tokens",
                                                            "perplexity",
                                                            "bits_per_byte",
                                                            "nll",
                                                            "nll_error",
                                                            "accuracy",
                                                            "kl",
                                                            "kl_error",
                                                            "kl_median",
                                                            "kl_90",
                                                            "kl_95",
                                                            "kl_99",
                                                            "kl_999",
                                                            "kl_max",
                                                            "top1",
                                                            "top1_error",
                                                            "overlap",
                                                            "overlap_error",
                                                            "router",
                                                            "router_error",
                                                            "ln_ratio",
                                                            "ln_ratio_error",
                                                            "gap_closed",
                                                            "gap_closed_error"};

void us_metrics_put(struct us_table *table, const struct us_metrics *metrics, size_t m, const char *name,
                    uint64_t bytes, double closed, double closed_error) {
  const struct us_metrics_model *r = &metrics->models[m];
  const double own[] = {r->perplexity, r->bits_per_byte, r->nll, r->nll_error, r->accuracy};
  const double against[] = {
      r->kl,     r->kl_error,     r->kl_median, r->kl_90,          r->kl_95,   r->kl_99,
      r->kl_999, r->kl_max,       r->top1,      r->top1_error,     r->overlap, r->overlap_error,
      r->router, r->router_error, r->ln_ratio,  r->ln_ratio_error, closed,     closed_error};
  us_table_text(table, name);
  if (bytes)
    us_table_int(table, (int64_t)bytes);
  else
    us_table_none(table);
  us_table_int(table, (int64_t)metrics->windows);
  us_table_int(table, (int64_t)metrics->tokens);
  for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) us_table_num(table, own[i]);
  for (size_t i = 0; i < sizeof against / sizeof against[0]; i++) {
    if (m)
      us_table_num(table, against[i]);
    else
      us_table_none(table);
  }
}

enum us_status us_model_bytes(const struct us_model *model, uint64_t *ret_bytes, struct us_err *err) {
  struct us_precision_row *rows = NULL;
  size_t count = 0;
  *ret_bytes = 0;
  enum us_status status = us_model_precision(model, NULL, &rows, &count, err);
  for (size_t i = 0; i < count && status == US_OK; i++) *ret_bytes += rows[i].from_bytes;
  free(rows);
  return status;
}
