/* quant_report.h: what quantization did, tensor by tensor and to the model: tables and artefacts.
 *
 *     struct us_quant_row *rows;
 *     us_quant_report(&qat, quantized, pool, &rows, &count, &err);
 *     us_quant_report_write("report.tsv", rows, count, provenance, &err);      // or .h5
 *     free(rows);
 *
 *     us_table_open(out, us_metrics_columns, US_METRICS_COLUMNS, json, &table, &err);
 *     us_metrics_put(table, &metrics, 1, "ptq", bytes, closed, error);
 *
 * A tensor's error is that of rounding: its stored values against the masters they were rounded from, which without
 * training are the original's. How far training moved the masters is told apart.
 */
#ifndef US_TRAINING_QUANT_REPORT_H
#define US_TRAINING_QUANT_REPORT_H

#include "base/table.h"
#include "formats/quant_stats.h"
#include "training/metrics.h"
#include "training/qat.h"

/* A matrix that changed its format or was trained. */
struct us_quant_row {
  char name[128];
  const char *family;
  uint32_t layer; /* UINT32_MAX outside the layers */
  size_t rows, cols;
  enum us_format from, to;
  uint64_t from_bytes, to_bytes; /* codes and scales */
  struct us_quant_stats stats;   /* stored against masters */
  double moved;                  /* |masters - original| / |original| */
};

/* *ret_rows is malloc'ed. `stored` is what us_qat_export gave, or the same read back. */
US_CHECKED enum us_status us_quant_report(const struct us_qat *run, struct us_model *stored,
                                          struct us_pool *pool, struct us_quant_row **ret_rows,
                                          size_t *ret_count, struct us_err *err);

/* A path ending in .h5 becomes an HDF5 artefact of kind "quant-report" (dataset tensors/<column>, names as rows of 128
 * bytes); any other a TSV file. Written whole or not at all. */
US_CHECKED enum us_status us_quant_report_write(const char *path, const struct us_quant_row *rows,
                                                size_t count, const char *provenance, struct us_err *err);

/* -- Models -- */

enum { US_METRICS_COLUMNS = 27 };
extern const char *const us_metrics_columns[US_METRICS_COLUMNS];

/* A row: model m of the metrics, called `name`. bytes 0 and closed NAN are no value. */
void us_metrics_put(struct us_table *table, const struct us_metrics *metrics, size_t m, const char *name,
                    uint64_t bytes, double closed, double closed_error);

/* Bytes of all tensors as they are stored: codes and scales; vectors in FP32. */
US_CHECKED enum us_status us_model_bytes(const struct us_model *model, uint64_t *ret_bytes,
                                         struct us_err *err);

#endif
