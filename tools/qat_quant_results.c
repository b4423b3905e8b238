/* qat_quant_results.c: what qat-quant makes of a result.
 *
 * Contents: measuring; provenance; what comes out.
 */
#include "tools/qat_quant_results.h"

#include "base/json.h"
#include "base/plot.h"
#include "base/provenance.h"
#include "base/table.h"
#include "model/checkpoint.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- measuring --- */

static void say_result(const struct us_qat_quant *job, size_t m, const char *name) {
  const struct us_metrics_model *r = &job->metrics.models[m];
  char closed[64] = "";
  if (isfinite(job->closed) && m == 2)
    snprintf(closed, sizeof closed, ", %.1f +- %.1f %% of the gap closed", 100.0 * job->closed,
             100.0 * job->closed_error);
  us_log_notice(job->run->log,
                "%s: KL %.5f +- %.5f nats a token (99 %%: %.4f), same token %.2f %%, same experts %.2f %%, "
                "perplexity %.4f = %.4f times the original's%s",
                name, r->kl, r->kl_error, r->kl_99, 100.0 * r->top1, 100.0 * r->router, r->perplexity,
                exp(r->ln_ratio), closed);
}

enum us_status us_qat_quant_measure(struct us_qat_quant *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  bool chosen = us_qat_quant_is_chosen(job);
  job->closed = job->closed_error = (double)NAN;
  if (!job->shards || us_opt_flag(o, "no-eval")) return US_OK;
  struct us_metrics_job m = {.learner = job->learner,
                             .models = {job->model, chosen ? job->ptq : job->result, job->result},
                             .n = chosen ? 3 : 2,
                             .shards = job->shards,
                             .length = (size_t)us_opt_int(o, "eval-length"),
                             .windows = (size_t)us_opt_int(o, "eval-windows"),
                             .interrupted = us_tool_interrupted};
  enum us_status status = US_OK;
  if (chosen) status = us_model_convert(job->model, &job->convert, job->pool, &job->ptq, err);
  m.models[1] = chosen ? job->ptq : job->result;
  if (status == US_OK) status = us_metrics_run(&m, job->pool, &job->metrics, err);
  if (status != US_OK) return status;
  if (chosen) us_metrics_gap(&job->metrics, 1, 2, &job->closed, &job->closed_error);
  say_result(job, 1, "PTQ");
  if (chosen) say_result(job, 2, us_qat_quant_is_trained(job) ? "QAT" : "GPTQ");
  return US_OK;
}

static enum us_status write_metrics(struct us_qat_quant *job, const char *path, struct us_err *err) {
  const char *const names[] = {"original", "ptq", us_qat_quant_is_trained(job) ? "qat" : "gptq"};
  const struct us_model *models[] = {job->model, job->ptq ? job->ptq : job->result, job->result};
  size_t length = strlen(path);
  bool json = length > 6 && strcmp(path + length - 6, ".jsonl") == 0;
  struct us_table *table = NULL;
  FILE *file = fopen(path, "w");
  if (!file) return us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
  enum us_status status = us_table_open(file, us_metrics_columns, US_METRICS_COLUMNS, json, &table, err);
  for (size_t m = 0; m < job->metrics.n && status == US_OK; m++) {
    uint64_t bytes = 0;
    status = us_model_bytes(models[m], &bytes, err);
    us_metrics_put(table, &job->metrics, m, names[m], bytes, m == 2 ? job->closed : (double)NAN,
                   m == 2 ? job->closed_error : (double)NAN);
  }
  if (status == US_OK && (status = us_table_close(table, err)) != US_OK) us_err_prefix(err, "%s", path);
  if (fclose(file) != 0 && status == US_OK) status = us_err_errno(err, US_ERR_IO, "cannot write '%s'", path);
  return status;
}

/* --- provenance --- */

/* NULL for what is not finite, as JSON has no word for it. */
static json_t *number(double value) {
  return isfinite(value) ? json_real(value) : json_null();
}

static json_t *metrics_object(const struct us_qat_quant *job) {
  const struct us_metrics_model *base = &job->metrics.models[0],
                                *last = &job->metrics.models[job->metrics.n - 1];
  json_t *root = json_object();
  bool whole = true;
  const struct {
    const char *key;
    double value;
  } items[] = {{"kl", last->kl},
               {"kl_error", last->kl_error},
               {"kl_ptq", job->metrics.models[1].kl},
               {"kl_ptq_error", job->metrics.models[1].kl_error},
               {"gap_closed", job->closed},
               {"gap_closed_error", job->closed_error},
               {"top1", last->top1},
               {"router", last->router},
               {"perplexity", last->perplexity},
               {"perplexity_original", base->perplexity},
               {"perplexity_ptq", job->metrics.models[1].perplexity},
               {"ln_ratio", last->ln_ratio},
               {"ln_ratio_error", last->ln_ratio_error},
               {"bits_per_byte", last->bits_per_byte},
               {"tokens", (double)job->metrics.tokens}};
  for (size_t i = 0; i < sizeof items / sizeof items[0]; i++)
    us_json_set(root, items[i].key, number(items[i].value), &whole);
  if (!whole) json_decref(root), root = NULL;
  return root;
}

static json_t *precision_object(const struct us_model *model) {
  const struct us_precision *p = &model->shape.precision;
  return json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:s}", "embed", us_format_name(p->embed), "head",
                   us_format_name(p->head), "qkv", us_format_name(p->qkv), "o_proj",
                   us_format_name(p->o_proj), "dense", us_format_name(p->dense), "experts",
                   us_format_name(p->experts), "router", us_format_name(p->router));
}

static enum us_status set_object(struct us_provenance *provenance, const char *key, json_t *object,
                                 struct us_err *err) {
  char *text = object ? us_json_dump(object, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
  json_decref(object);
  if (!text) return us_err_memory(err, key, 0);
  enum us_status status = us_provenance_set_json(provenance, key, text, err);
  free(text);
  return status;
}

static enum us_status make_provenance(struct us_qat_quant *job, struct us_err *err) {
  struct us_provenance *p = NULL;
  struct us_opts *o = job->run->opts;
  bool trained = us_qat_quant_is_trained(job);
  enum us_status status = us_tool_provenance(job->run, job->qat.seed, &p, err);
  if (status == US_OK) status = us_tool_add_parent(p, job->model_record.path, "model", err);
  if (status == US_OK && job->begin) status = us_tool_add_parent(p, job->begin_record.path, "model", err);
  if (status == US_OK && job->shards) status = us_tool_add_parent(p, job->data_record.path, "tokens", err);
  if (status == US_OK)
    status = us_provenance_set_text(p, "method",
                                    trained                 ? "qat"
                                    : job->qat.gptq_windows ? "gptq"
                                                            : "ptq",
                                    err);
  if (status == US_OK) status = set_object(p, "precision", precision_object(job->result), err);
  if (status == US_OK) status = us_provenance_set_text(p, "scale_rule", us_opt_str(o, "scale-rule"), err);
  if (status == US_OK) status = us_provenance_set_text(p, "fp8_scale", us_opt_str(o, "fp8-scale"), err);
  if (status == US_OK && trained)
    status = set_object(p, "finetuning",
                        json_pack("{s:s,s:s,s:I,s:I}", "loss", us_opt_str(o, "loss"), "train",
                                  us_opt_str(o, "train"), "steps", (json_int_t)job->qat.trainer.step,
                                  "tokens", (json_int_t)job->qat.trainer.tokens),
                        err);
  if (status == US_OK && job->metrics.n) status = set_object(p, "metrics", metrics_object(job), err);
  if (status == US_OK && !(job->provenance = us_provenance_text(p, err))) status = err->status;
  us_provenance_free(p);
  return status;
}

/* --- what comes out --- */

static enum us_status draw_training(const struct us_qat_quant *job, const char *path, struct us_err *err) {
  size_t n = job->log.count;
  double *x = malloc((4 * n + 1) * sizeof *x);
  if (!x) return us_err_memory(err, "plot", 4 * n * sizeof *x);
  size_t steps = us_run_log_points(&job->log, 0, 3, x, x + n);
  size_t probes = us_run_log_points(&job->log, 0, 4, x + 2 * n, x + 3 * n);
  bool kl = job->qat.loss == US_QAT_KL;
  struct us_plot_axes axes = {.title = "Finetuning through the rounding",
                              .x_title = "step",
                              .y_title = kl ? "KL to the original (nats a token)" : "loss (nats a token)",
                              .y_from_zero = kl};
  struct us_plot_series series[2] = {
      {.name = "training", .x = x, .y = x + n, .n = steps},
      {.name = "held out", .style = US_PLOT_LINE_POINTS, .x = x + 2 * n, .y = x + 3 * n, .n = probes}};
  enum us_status status = us_plot_xy(path, &axes, series, 2, job->provenance, err);
  free(x);
  return status;
}

/* Without training: the error of each tensor that was rounded, by family. */
static enum us_status draw_tensors(const struct us_qat_quant *job, const char *path, struct us_err *err) {
  double *x = malloc((2 * job->count + 1) * sizeof *x), *y = x ? x + job->count : NULL;
  struct us_plot_series series[16];
  size_t families = 0, at = 0;
  if (!x) return us_err_memory(err, "plot", 2 * job->count * sizeof *x);
  for (size_t i = 0; i < job->count && families < 16; i++) {
    size_t k = 0;
    while (k < families && strcmp(series[k].name, job->rows[i].family) != 0) k++;
    if (k < families) continue;
    size_t first = at;
    for (size_t j = i; j < job->count; j++) {
      if (strcmp(job->rows[j].family, job->rows[i].family) != 0) continue;
      x[at] = job->rows[j].layer == UINT32_MAX ? -1.0 : (double)job->rows[j].layer;
      y[at++] = job->rows[j].stats.sqnr_db;
    }
    series[families++] = (struct us_plot_series){.name = job->rows[i].family,
                                                 .style = US_PLOT_POINTS,
                                                 .x = x + first,
                                                 .y = y + first,
                                                 .n = at - first};
  }
  struct us_plot_axes axes = {
      .title = "Rounding error by tensor", .x_title = "layer", .y_title = "signal to noise (dB)"};
  enum us_status status = US_OK;
  if (families)
    status = us_plot_xy(path, &axes, series, families, job->provenance, err);
  else
    us_log_warning(job->run->log, "no tensor was rounded: '%s' is not drawn", path);
  free(x);
  return status;
}

/* The file must multiply as the student did: read it back and compare every weight. */
static enum us_status check_file(struct us_qat_quant *job, const char *path, struct us_err *err) {
  struct us_model *written = NULL;
  enum us_status status = us_model_open(path, &written, err);
  if (status == US_OK) status = us_qat_check(&job->qat, written, job->pool, err);
  if (status == US_ERR_CHECK) us_err_prefix(err, "%s", path);
  us_model_free(written);
  return status;
}

static enum us_status write_model(struct us_qat_quant *job, const char *path, struct us_err *err) {
  size_t n = strlen(path);
  bool artefact = n > 3 && strcmp(path + n - 3, ".h5") == 0;
  return artefact ? us_model_write(path, job->result, job->provenance, err)
                  : us_model_write_folder(path, job->result, job->provenance,
                                          (uint64_t)us_opt_int(job->run->opts, "shard"), err);
}

static enum us_status write_outputs(struct us_qat_quant *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  const char *path = us_opt_str(o, "output");
  bool drawn = us_opt_given(o, "plot"), trained = us_qat_quant_is_trained(job);
  enum us_status status = US_OK;
  if (us_opt_given(o, "report") || (drawn && !trained))
    status = us_quant_report(&job->qat, job->result, job->pool, &job->rows, &job->count, err);
  if (status == US_OK && us_opt_given(o, "report"))
    status = us_quant_report_write(us_opt_str(o, "report"), job->rows, job->count, job->provenance, err);
  if (status == US_OK && us_opt_given(o, "metrics") && job->metrics.n)
    status = write_metrics(job, us_opt_str(o, "metrics"), err);
  if (status == US_OK && us_opt_given(o, "run") && trained)
    status = us_run_log_write(&job->log, us_opt_str(o, "run"), job->provenance, err);
  if (status == US_OK && drawn)
    status = trained ? draw_training(job, us_opt_str(o, "plot"), err)
                     : draw_tensors(job, us_opt_str(o, "plot"), err);
  if (status == US_OK) status = write_model(job, path, err);
  if (status == US_OK) status = check_file(job, path, err);
  return status == US_OK ? us_record_emit(job->run->out, us_opt_flag(o, "json"), path, "model", err) : status;
}

enum us_status us_qat_quant_write(struct us_qat_quant *job, struct us_err *err) {
  enum us_status status = make_provenance(job, err);
  return status == US_OK ? write_outputs(job, err) : status;
}
