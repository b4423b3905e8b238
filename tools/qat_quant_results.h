/* qat_quant_results.h: what qat-quant makes of a result: measurements, provenance, tables, pictures, the model itself.
 *
 *     struct us_qat_quant job = {.run = run, ...};              // qat_quant.c fills it, up to the result
 *     us_qat_quant_measure(&job, &err);                         // on held-out text: original, PTQ, result
 *     us_qat_quant_write(&job, &err);                           // every file that was asked for; the model last, read back and compared
 */
#ifndef US_TOOLS_QAT_QUANT_RESULTS_H
#define US_TOOLS_QAT_QUANT_RESULTS_H

#include "base/progress.h"
#include "base/record.h"
#include "tools/tool.h"
#include "training/quant_report.h"
#include "training/run_log.h"

/* A run of the tool. */
struct us_qat_quant {
  struct us_tool_run *run;
  struct us_record model_record, data_record, begin_record;
  struct us_model *model, *begin, *ptq,
      *result; /* begin: if --begin is given; ptq: only beside a result that was chosen otherwise */
  struct us_shards *shards;
  struct us_precision_rules rules;
  struct us_convert convert;
  struct us_qat qat;
  char options[1024]; /* what must be the same when a run is resumed */
  struct us_pool *pool;
  struct us_learner *learner;
  bool leads; /* of several processes one writes */
  struct us_run_log log;
  struct us_progress progress;
  struct us_metrics metrics;
  double closed, closed_error; /* share of PTQ's KL; NAN without training */
  struct us_quant_row *rows;
  size_t count;
  char *provenance;
};

static inline bool us_qat_quant_is_trained(const struct us_qat_quant *job) {
  return job->qat.trainer.steps || job->qat.trainer.minutes > 0.0;
}

/* Whether the result is something else than rounding to nearest, which is then measured beside it. */
static inline bool us_qat_quant_is_chosen(const struct us_qat_quant *job) {
  return us_qat_quant_is_trained(job) || job->qat.gptq_windows;
}

/* Fill metrics and closed, and say them; nothing without --data or with --no-eval. */
US_CHECKED enum us_status us_qat_quant_measure(struct us_qat_quant *job, struct us_err *err);

/* US_ERR_CHECK when the file does not multiply as what was trained. */
US_CHECKED enum us_status us_qat_quant_write(struct us_qat_quant *job, struct us_err *err);

#endif
