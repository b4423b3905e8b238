/* run_log.c: the log of a training run. */
#include "training/run_log.h"

#include "base/h5.h"
#include "base/table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum us_status us_run_log_open(struct us_run_log *log, const char *const *columns, size_t n,
                               const char *opt_path, bool append, struct us_err *err) {
  *log = (struct us_run_log){.columns = columns, .n = n};
  if (!opt_path) return US_OK;
  snprintf(log->path, sizeof log->path, "%s", opt_path);
  log->file = fopen(opt_path, append ? "a" : "w");
  if (!log->file) return us_err_errno(err, US_ERR_IO, "cannot write '%s'", opt_path);
  setvbuf(log->file, NULL, _IOLBF, 0);
  bool rows_before = append && fseek(log->file, 0, SEEK_END) == 0 && ftell(log->file) > 0;
  enum us_status status = rows_before ? us_table_continue(log->file, columns, n, &log->table, err)
                                      : us_table_open(log->file, columns, n, false, &log->table, err);
  if (status != US_OK) us_run_log_release(log);
  return status;
}

static void keep(struct us_run_log *log, const double *row) {
  if (log->count == log->capacity) {
    size_t capacity = log->capacity ? 2 * log->capacity : 256;
    double *rows = realloc(log->rows, capacity * log->n * sizeof *rows);
    if (!rows) {
      log->failed = true;
      return;
    }
    log->rows = rows;
    log->capacity = capacity;
  }
  memcpy(log->rows + log->n * log->count++, row, log->n * sizeof *row);
}

void us_run_log_add(struct us_run_log *log, const double *row) {
  keep(log, row);
  for (size_t i = 0; log->table && i < log->n; i++) us_table_num(log->table, row[i]);
}

enum us_status us_run_log_close(struct us_run_log *log, struct us_err *err) {
  enum us_status status = US_OK;
  if (log->table && (status = us_table_close(log->table, err)) != US_OK) us_err_prefix(err, "%s", log->path);
  log->table = NULL;
  if (log->file && fclose(log->file) != 0 && status == US_OK)
    status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", log->path);
  log->file = NULL;
  if (status == US_OK && log->failed)
    status = us_err_memory(err, "run log", log->count * log->n * sizeof *log->rows);
  return status;
}

enum us_status us_run_log_write(const struct us_run_log *log, const char *path, const char *provenance,
                                struct us_err *err) {
  struct us_h5_writer *out = NULL;
  double *column = malloc((log->count ? log->count : 1) * sizeof *column);
  if (!column) return us_err_memory(err, "run log", log->count * sizeof *column);
  enum us_status status = us_h5_create(path, "training-run", &out, err);
  if (status == US_OK && provenance) status = us_h5_put_text(out, "provenance", provenance, err);
  for (size_t i = 0; i < log->n && status == US_OK; i++) {
    char name[64];
    us_run_log_column(log, i, column);
    snprintf(name, sizeof name, "log/%s", log->columns[i]);
    status = us_h5_put(out, name, US_H5_F64, 1, (size_t[]){log->count}, column, err);
  }
  free(column);
  if (status == US_OK) return us_h5_finish(out, err);
  us_h5_abandon(out);
  return status;
}

void us_run_log_column(const struct us_run_log *log, size_t i, double *ret_values) {
  for (size_t r = 0; r < log->count; r++) ret_values[r] = log->rows[r * log->n + i];
}

size_t us_run_log_points(const struct us_run_log *log, size_t x, size_t y, double *ret_x, double *ret_y) {
  size_t n = 0;
  for (size_t r = 0; r < log->count; r++) {
    const double *row = log->rows + r * log->n;
    if (!isfinite(row[y])) continue;
    ret_x[n] = row[x];
    ret_y[n++] = row[y];
  }
  return n;
}

void us_run_log_release(struct us_run_log *log) {
  struct us_err ignored;
  enum us_status status = us_run_log_close(log, &ignored);
  (void)status; /* whoever wants to know has closed it */
  free(log->rows);
  *log = (struct us_run_log){0};
}
