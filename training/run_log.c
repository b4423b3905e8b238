/* run_log.c: the log of a training run. */
#include "training/run_log.h"

#include "base/h5.h"
#include "base/table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- rows --- */

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

/* --- rows of an earlier process --- */

/* Cells of a line: numbers, empty where there is no value. */
static bool parse_row(const char *line, size_t n, double *row) {
  for (size_t i = 0; i < n; i++) {
    char *end = (char *)line;
    row[i] = *line == '\t' || *line == '\n' ? (double)NAN : strtod(line, &end);
    if (*end != (i + 1 < n ? '\t' : '\n') || (end == line && !isnan(row[i]))) return false;
    line = end + 1;
  }
  return *line == '\0';
}

static bool is_header(const char *line, const char *const *columns, size_t n) {
  for (size_t i = 0; i < n; i++) {
    size_t length = strlen(columns[i]);
    if (strncmp(line, columns[i], length) != 0 || line[length] != (i + 1 < n ? '\t' : '\n')) return false;
    line += length + 1;
  }
  return *line == '\0';
}

/* Keep the rows that are there; a last line that was cut short is cut off. *ret_bytes: of what is whole. */
static enum us_status read_rows(struct us_run_log *log, long *ret_bytes, struct us_err *err) {
  double *row = malloc(log->n * sizeof *row);
  char *line = NULL;
  size_t capacity = 0, number = 0;
  ssize_t length;
  enum us_status status = row ? US_OK : us_err_memory(err, "run log", log->n * sizeof *row);
  *ret_bytes = 0;
  while (status == US_OK && (length = getline(&line, &capacity, log->file)) > 0 && line[length - 1] == '\n') {
    bool good = number++ ? parse_row(line, log->n, row) : is_header(line, log->columns, log->n);
    if (!good)
      status =
          us_err_set(err, US_ERR_INPUT, "%s: line %zu: not of a log of this run, which is to be continued",
                     log->path, number);
    else if (number > 1)
      keep(log, row);
    *ret_bytes += length;
  }
  free(line);
  free(row);
  return status;
}

/* So many rows are left in the file, and writing goes on behind them. */
static bool cut_file(FILE *file, size_t rows) {
  int c;
  rewind(file);
  for (size_t lines = rows + 1; lines && (c = getc(file)) != EOF;) lines -= c == '\n';
  long bytes = ftell(file);
  return bytes >= 0 && ftruncate(fileno(file), bytes) == 0 && fseek(file, 0, SEEK_END) == 0;
}

/* A resumed run begins at its last save: rows from the step of its first one on are taken back. Whether the first of them, which lies
 * behind the rows that are left, is of that very step. */
static bool go_back(struct us_run_log *log, double step) {
  size_t count = log->count;
  log->resumed = false;
  while (count && !(log->rows[log->n * (count - 1)] < step)) count--;
  if (count == log->count) return false;
  log->count = count;
  if (log->file && !cut_file(log->file, count)) log->uncut = true;
  return log->rows[log->n * count] == step;
}

/* --- life --- */

static enum us_status open_file(struct us_run_log *log, bool append, struct us_err *err) {
  long bytes = 0;
  log->file = append ? fopen(log->path, "r+") : NULL;
  append = log->file != NULL;
  if (!append) log->file = fopen(log->path, "w");
  if (!log->file) return us_err_errno(err, US_ERR_IO, "cannot write '%s'", log->path);
  setvbuf(log->file, NULL, _IOLBF, 0);
  enum us_status status = append ? read_rows(log, &bytes, err) : US_OK;
  if (status == US_OK && append &&
      (ftruncate(fileno(log->file), bytes) != 0 || fseek(log->file, bytes, SEEK_SET) != 0))
    status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", log->path);
  if (status != US_OK) return status;
  log->resumed = log->count > 0;
  return bytes ? us_table_continue(log->file, log->columns, log->n, &log->table, err)
               : us_table_open(log->file, log->columns, log->n, false, &log->table, err);
}

enum us_status us_run_log_open(struct us_run_log *log, const char *const *columns, size_t n,
                               const char *opt_path, bool append, struct us_err *err) {
  *log = (struct us_run_log){.columns = columns, .n = n};
  if (!opt_path) return US_OK;
  snprintf(log->path, sizeof log->path, "%s", opt_path);
  enum us_status status = open_file(log, append, err);
  if (status != US_OK) us_run_log_release(log);
  return status;
}

void us_run_log_add(struct us_run_log *log, const double *row) {
  if (log->resumed && go_back(log, row[0])) {
    double *again = log->rows + log->n * log->count++;
    for (size_t i = 0; i < log->n; i++)
      if (isfinite(row[i])) again[i] = row[i];
    row = again;
  } else {
    keep(log, row);
  }
  for (size_t i = 0; log->table && i < log->n; i++) us_table_num(log->table, row[i]);
}

enum us_status us_run_log_close(struct us_run_log *log, struct us_err *err) {
  enum us_status status = US_OK;
  if (log->table && (status = us_table_close(log->table, err)) != US_OK) us_err_prefix(err, "%s", log->path);
  log->table = NULL;
  if (log->file && fclose(log->file) != 0 && status == US_OK)
    status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", log->path);
  log->file = NULL;
  if (status == US_OK && log->uncut)
    status = us_err_set(err, US_ERR_IO, "cannot cut '%s' back to where the run was resumed", log->path);
  if (status == US_OK && log->failed)
    status = us_err_memory(err, "run log", log->count * log->n * sizeof *log->rows);
  return status;
}

/* --- what comes out --- */

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
