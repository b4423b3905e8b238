/* run_log.h: the log of a training run: kept in memory, written as TSV line by line, as an HDF5 artefact at the end.
 *
 *     static const char *const columns[] = {"step", "tokens", "loss"};
 *     struct us_run_log log;
 *     us_run_log_open(&log, columns, 3, "run.tsv", false, &err);           // path NULL: memory alone
 *     us_run_log_add(&log, (const double[]){step, tokens, loss});          // whole numbers are written without a point
 *     us_run_log_close(&log, &err);                                        // was everything written?
 *     us_run_log_write(&log, "run.h5", provenance, &err);                  // dataset log/<column> each, kind training-run
 *     us_run_log_column(&log, 2, y);
 *     us_run_log_release(&log);
 *
 * A value that is not finite is no value: an empty cell. The first column is the step, which rises from row to row.
 */
#ifndef US_TRAINING_RUN_LOG_H
#define US_TRAINING_RUN_LOG_H

#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

struct us_run_log {
  const char *const *columns; /* (n) borrowed */
  size_t n, count, capacity;
  double *rows; /* (count, n) */
  bool failed;  /* a row did not fit in memory */
  bool resumed; /* the rows are an earlier process's */
  bool uncut;   /* rows that were taken back are still in the file */
  char path[1024];
  FILE *file;
  struct us_table *table;
};

/* With `append` an existing TSV is continued, and its rows are in memory: where the first row added is of an earlier step than the last of
 * them, because a resumed run goes back to its last save, those from its step on are taken back; one of the same step, as when a run is
 * resumed that had ended, lends the values that the new one has not. A last line that was cut short is dropped.
 * US_ERR_INPUT when the file is no log with these columns; US_ERR_IO, US_ERR_MEMORY. */
US_CHECKED enum us_status us_run_log_open(struct us_run_log *log, const char *const *columns, size_t n,
                                          const char *opt_path, bool append, struct us_err *err);

/* Add a row (n); what goes wrong shows at close. */
void us_run_log_add(struct us_run_log *log, const double *row);

/* End the TSV. US_ERR_IO when something was not written, US_ERR_MEMORY when a row was dropped. */
US_CHECKED enum us_status us_run_log_close(struct us_run_log *log, struct us_err *err);

US_CHECKED enum us_status us_run_log_write(const struct us_run_log *log, const char *path,
                                           const char *provenance, struct us_err *err);

/* Values of column i (count). */
void us_run_log_column(const struct us_run_log *log, size_t i, double *ret_values);

/* Points of column y over column x: the rows where y has a value (at most count). Returns how many. */
size_t us_run_log_points(const struct us_run_log *log, size_t x, size_t y, double *ret_x, double *ret_y);

/* Also closes what is open. */
void us_run_log_release(struct us_run_log *log);

#endif
