/* qat_quant.c: quantize a model by rules, after finetuning it through the rounding. */
#include "base/buffer.h"
#include "base/plot.h"
#include "base/progress.h"
#include "base/record.h"
#include "base/table.h"
#include "model/checkpoint.h"
#include "tools/tool.h"
#include "tools/train_learner.h"
#include "tools/train_opts.h"
#include "training/quant_report.h"
#include "training/run_log.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct us_opt opts[] = {
    US_OPT_ARG("model", "MODEL", "checkpoint: a folder or an .h5 file; - reads its record from stdin",
               .required = true),
    US_OPT_FILE("output", 'o', "FILE", "model to write: an .h5 file, or a folder in the published layout",
                .writes = US_OPT_WRITES_CHECKPOINT),
    US_OPT_GROUP("Precision"),
    US_OPT_RULES("precision", 'p', "RULES", "module=format,...; the last match wins", .def = "experts=mxfp4"),
    US_OPT_ENUM("scale-rule", 0, "mse|floor|even|rceil|r7.25", "how MXFP4 scales are chosen", .def = "mse"),
    US_OPT_ENUM("fp8-scale", 0, "f32|ue8m0", "scales of FP8 blocks", .def = "f32"),
    US_OPT_INT("shard", 0, "BYTES",
               "cut a folder's safetensors into files of at most so many bytes; 0: not at all", .def = "4G"),
    US_OPT_INT("gptq", 0, "N",
               "sequences of text by whose inputs GPTQ chooses the roundings that finetuning begins at, with "
               "--steps 0 the result; 0: round to nearest",
               .def = "0", .max = 65536),
    US_OPT_GROUP("Finetuning"),
    US_OPT_FILE("data", 0, "FILE",
                "token shards to learn from and to measure on; - reads their record from stdin"),
    US_OPT_INT("steps", 'n', "N", "optimizer steps; 0 only quantizes, as does no --data", .def = "150"),
    US_OPT_NUM("minutes", 0, "M", "stop after so many minutes, with the schedule cut to fit; 0: no limit",
               .def = "0"),
    US_OPT_ENUM("loss", 0, "kl|ce", "KL to the original's distribution, or cross-entropy on the text",
                .def = "kl"),
    US_OPT_NUM("routers", 0, "X",
               "weight of the original's routing scores beside KL: keeps the choices of experts; 0: none",
               .def = "0"),
    US_OPT_ENUM("train", 0, "rounded|all|experts", "which weights move: those whose format changes, ...",
                .def = "rounded"),
    US_OPT_TRAIN_OPTIMIZER("adamw"),
    US_OPT_NUM("lr", 0, "X", "peak learning rate", .def = "0.0003", .above_min = true),
    US_OPT_NUM("beta2", 0, "X", "memory of AdamW's second moments", .def = "0.95", .max = 0.9999),
    US_OPT_TRAIN_SCHEDULE("0.05", "0.1", "0"),
    US_OPT_INT("batch", 'b', "N", "sequences a step", .def = "8", .min = 1, .max = 65536),
    US_OPT_INT("length", 'l', "N", "tokens a sequence", .def = "256", .min = 2, .max = 131072),
    US_OPT_INT("micro", 0, "N", "sequences a forward pass; 0: as many as 8,192 rows hold, on a GPU 32,768",
               .def = "0", .max = 65536),
    US_OPT_ENUM("tokens", 0, "all|marked", "learn on all tokens, or on those that the shards mark",
                .def = "all"),
    US_OPT_TRAIN_ACROSS,
    US_OPT_FLAG("recompute", 0, "keep one layer's activations and compute the others again: less memory"),
    US_OPT_GROUP("Progress"),
    US_OPT_TRAIN_PROGRESS,
    US_OPT_INT("probe-every", 0, "N", "steps between looks at the held-out loss; 0: first and last alone",
               .def = "50"),
    US_OPT_INT("probe-windows", 0, "N", "held-out sequences of such a look", .def = "16"),
    US_OPT_GROUP("Measuring"),
    US_OPT_INT("eval-windows", 0, "N", "held-out sequences to measure the result on; 0: all", .def = "64"),
    US_OPT_INT("eval-length", 0, "N", "tokens of each", .def = "512", .min = 2, .max = 131072),
    US_OPT_FLAG("no-eval", 0, "do not measure the result"),
    US_OPT_FILE("report", 0, "FILE", "write what rounding did to each tensor: TSV, or an .h5 artefact",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("metrics", 0, "FILE", "write original, PTQ and QAT compared: TSV, or JSON lines (.jsonl)",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("log", 0, "FILE.tsv", "write the training log as TSV", .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("run", 0, "FILE.h5", "write the training log as an HDF5 run artefact",
                .writes = US_OPT_WRITES_FILE),
    US_OPT_GROUP("Common options"),
    US_OPT_INT("seed", 0, "N", "seed of everything random", .def = "1"),
    US_OPT_TRAIN_WHERE,
    US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256),
    US_OPT_COMMON_OUT,
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

enum { COLUMNS = 9 };
static const char *const columns[COLUMNS] = {"step", "tokens", "seconds",      "loss", "heldout",
                                             "rate", "norm",   "tokens_per_s", "mfu"};

struct job {
  struct us_tool_run *run;
  struct us_record model_record, data_record;
  struct us_model *model, *ptq, *result; /* ptq: only beside a result that was chosen otherwise */
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

/* --- what goes in --- */

static enum us_status open_inputs(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  if (!us_opt_flag(o, "dry-run") && !us_opt_given(o, "output"))
    return us_err_set(err, US_ERR_USAGE, "--output is missing");
  enum us_status status = us_precision_parse(us_opt_str(o, "precision"), &job->rules, err);
  if (status == US_OK)
    status = us_record_resolve(us_opt_str(o, "model"), stdin, "model", &job->model_record, err);
  if (status == US_OK) status = us_model_open(job->model_record.path, &job->model, err);
  if (status == US_OK && job->model->notes) us_log_notice(job->run->log, "%s", job->model->notes);
  if (status != US_OK || us_opt_flag(o, "dry-run")) return status;
  status = us_model_check(job->model, err);
  if (status != US_OK || !us_opt_given(o, "data")) return status;
  status = us_record_resolve(us_opt_str(o, "data"), stdin, "tokens", &job->data_record, err);
  if (status == US_OK) status = us_shards_open(job->data_record.path, &job->shards, err);
  if (status == US_OK) status = us_rows_check_vocabulary(job->shards, job->model, err);
  return status == US_OK ? US_OK : us_err_prefix(err, "%s", us_opt_str(o, "data"));
}

static void on_log(void *arg, const struct us_qat_log *log);

/* The run, and the text that a resumed one must repeat. */
static enum us_status read_options(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_qat *q = &job->qat;
  char model[US_SHA256_HEX], data[US_SHA256_HEX];
  job->convert = (struct us_convert){.rules = &job->rules,
                                     .scale_rule = (enum us_scale_rule)us_opt_choice(o, "scale-rule"),
                                     .fp8_scale = (enum us_fp8_scale)us_opt_choice(o, "fp8-scale")};
  *q = (struct us_qat){.original = job->model,
                       .convert = &job->convert,
                       .shards = job->shards,
                       .loss = (enum us_qat_loss)us_opt_choice(o, "loss"),
                       .routers = us_opt_num(o, "routers"),
                       .scope = (enum us_qat_scope)us_opt_choice(o, "train"),
                       .batch = (size_t)us_opt_int(o, "batch"),
                       .length = (size_t)us_opt_int(o, "length"),
                       .micro = (size_t)us_opt_int(o, "micro"),
                       .gptq_windows = (size_t)us_opt_int(o, "gptq"),
                       .seed = (uint64_t)us_opt_int(o, "seed"),
                       .memory = us_opt_flag(o, "recompute") ? US_TRAIN_RECOMPUTE : US_TRAIN_SAVE,
                       .marked_only = us_opt_choice(o, "tokens") == 1,
                       .across = us_opt_num(o, "across"),
                       .eval_every = (uint64_t)us_opt_int(o, "probe-every"),
                       .eval_windows = (size_t)us_opt_int(o, "probe-windows"),
                       .log_every = (uint64_t)us_opt_int(o, "log-every"),
                       .resume = us_opt_flag(o, "resume"),
                       .on_log = on_log,
                       .log_arg = job,
                       .interrupted = us_tool_interrupted};
  us_tool_read_trainer(o, &q->trainer);
  q->trainer.optim.beta2 = us_opt_num(o, "beta2");
  q->trainer.options = job->options;
  if (!job->shards) {
    if (us_opt_given(o, "steps") && q->trainer.steps)
      return us_err_set(err, US_ERR_USAGE, "--steps %llu needs --data to learn from",
                        (unsigned long long)q->trainer.steps);
    if (q->trainer.minutes > 0.0 || q->gptq_windows || us_opt_given(o, "metrics"))
      return us_err_set(err, US_ERR_USAGE, "--minutes, --gptq and --metrics need --data");
    q->trainer.steps = 0;
    return US_OK;
  }
  if (q->routers != 0.0 && q->loss != US_QAT_KL)
    return us_err_set(err, US_ERR_USAGE,
                      "--routers needs --loss kl: the original is not run for cross-entropy");
  enum us_status status = us_record_hash(job->model_record.path, model, err);
  if (status == US_OK) status = us_record_hash(job->data_record.path, data, err);
  if (status != US_OK) return status;
  snprintf(
      job->options, sizeof job->options,
      "model=%.16s data=%.16s precision=%.200s scale_rule=%s fp8_scale=%s seed=%llu steps=%llu minutes=%g "
      "gptq=%zu routers=%g loss=%d scope=%d optimizer=%d newton=%d beta2=%g batch=%zu length=%zu micro=%zu "
      "marked=%d "
      "across=%g "
      "lr=%g "
      "schedule=%d "
      "warmup=%g floor=%g "
      "decay=%g clip=%g",
      model, data, us_opt_str(o, "precision"), us_opt_str(o, "scale-rule"), us_opt_str(o, "fp8-scale"),
      (unsigned long long)q->seed, (unsigned long long)q->trainer.steps, q->trainer.minutes, q->gptq_windows,
      q->routers, (int)q->loss, (int)q->scope, (int)q->trainer.optim.kind, (int)q->trainer.optim.newton,
      q->trainer.optim.beta2, q->batch, q->length, q->micro, (int)q->marked_only, q->across,
      q->trainer.schedule.peak, (int)q->trainer.schedule.kind, q->trainer.schedule.warmup,
      q->trainer.schedule.floor, q->trainer.optim.adamw_decay, q->trainer.clip);
  return US_OK;
}

static bool is_trained(const struct job *job) {
  return job->qat.trainer.steps || job->qat.trainer.minutes > 0.0;
}

/* Whether the result is something else than rounding to nearest, which is then measured beside it. */
static bool is_chosen(const struct job *job) {
  return is_trained(job) || job->qat.gptq_windows;
}

/* --- dry run --- */

static enum us_status print_plan(struct job *job, struct us_err *err) {
  static const char *const plan[] = {"tensor", "family", "layer", "from", "to", "from_bytes", "to_bytes"};
  struct us_precision_row *rows = NULL;
  struct us_table *table = NULL;
  size_t count = 0, changed = 0;
  uint64_t before = 0, after = 0;
  enum us_status status = us_model_precision(job->model, &job->rules, &rows, &count, err);
  if (status == US_OK)
    status = us_table_open(job->run->out, plan, 7, us_opt_flag(job->run->opts, "json"), &table, err);
  for (size_t i = 0; i < count && status == US_OK; i++) {
    us_table_text(table, rows[i].ref.name);
    us_table_text(table, rows[i].ref.family);
    if (rows[i].ref.layer == UINT32_MAX)
      us_table_none(table);
    else
      us_table_int(table, rows[i].ref.layer);
    us_table_text(table, us_format_name(rows[i].from));
    us_table_text(table, us_format_name(rows[i].to));
    us_table_int(table, (int64_t)rows[i].from_bytes);
    us_table_int(table, (int64_t)rows[i].to_bytes);
    changed += rows[i].from != rows[i].to;
    before += rows[i].from_bytes, after += rows[i].to_bytes;
  }
  free(rows);
  if (status != US_OK) return status;
  us_log_notice(job->run->log, "%zu of %zu tensors would change, %llu bytes become %llu", changed, count,
                (unsigned long long)before, (unsigned long long)after);
  return us_table_close(table, err);
}

/* --- training --- */

static void on_log(void *arg, const struct us_qat_log *log) {
  struct job *job = arg;
  const char *loss = job->qat.loss == US_QAT_KL ? "KL" : "loss";
  if (!job->leads) return;
  us_run_log_add(&job->log, (const double[COLUMNS]){(double)log->step, (double)log->tokens, log->seconds,
                                                    log->loss, log->heldout, log->rate, log->norm,
                                                    log->tokens_per_second, log->mfu});
  us_progress_note(&job->progress, "%s %.4f", loss, log->loss);
  us_progress_set(&job->progress, log->step);
  if (isfinite(log->heldout))
    us_log_info(job->run->log, "step %llu: %s %.5f, held out %.5f nats a token",
                (unsigned long long)log->step, loss, log->loss, log->heldout);
  else
    us_log_info(job->run->log, "step %llu: %s %.5f, norm %.3f, rate %.2e, %.0f tokens/s",
                (unsigned long long)log->step, loss, log->loss, log->norm, log->rate, log->tokens_per_second);
}

static enum us_status train(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_err log_err = {0};
  enum us_status status = us_run_log_open(&job->log, columns, COLUMNS,
                                          job->leads ? us_opt_str(o, "log") : NULL, job->qat.resume, err);
  if (status != US_OK) return status;
  us_progress_start(&job->progress, job->run->quiet || !job->leads ? NULL : stderr, "finetuning", "steps",
                    job->qat.trainer.steps);
  job->progress.limit = 60 * job->qat.trainer.minutes;
  status = us_qat(&job->qat, job->pool, err);
  us_progress_end(&job->progress);
  if (us_run_log_close(&job->log, &log_err) != US_OK && status == US_OK)
    status = us_err_set(err, log_err.status, "%s", log_err.message);
  return status;
}

/* --- measuring --- */

static void say_result(const struct job *job, size_t m, const char *name) {
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

static enum us_status measure(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  bool chosen = is_chosen(job);
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
  if (chosen) say_result(job, 2, is_trained(job) ? "QAT" : "GPTQ");
  return US_OK;
}

static enum us_status write_metrics(struct job *job, const char *path, struct us_err *err) {
  const char *const names[] = {"original", "ptq", is_trained(job) ? "qat" : "gptq"};
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

static json_t *metrics_object(const struct job *job) {
  const struct us_metrics_model *base = &job->metrics.models[0],
                                *last = &job->metrics.models[job->metrics.n - 1];
  json_t *root = json_object();
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
    json_object_set_new(root, items[i].key, number(items[i].value));
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
  char *text = object ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
  json_decref(object);
  if (!text) return us_err_memory(err, key, 0);
  enum us_status status = us_provenance_set_json(provenance, key, text, err);
  free(text);
  return status;
}

static enum us_status make_provenance(struct job *job, struct us_err *err) {
  struct us_provenance *p = NULL;
  struct us_opts *o = job->run->opts;
  bool trained = is_trained(job);
  enum us_status status = us_tool_provenance(job->run, job->qat.seed, &p, err);
  if (status == US_OK) status = us_tool_add_parent(p, job->model_record.path, "model", err);
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

static enum us_status draw_training(const struct job *job, const char *path, struct us_err *err) {
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
static enum us_status draw_tensors(const struct job *job, const char *path, struct us_err *err) {
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
static enum us_status check_file(struct job *job, const char *path, struct us_err *err) {
  struct us_model *written = NULL;
  enum us_status status = us_model_open(path, &written, err);
  if (status == US_OK) status = us_qat_check(&job->qat, written, job->pool, err);
  if (status == US_ERR_CHECK) us_err_prefix(err, "%s", path);
  us_model_free(written);
  return status;
}

static enum us_status write_model(struct job *job, const char *path, struct us_err *err) {
  size_t n = strlen(path);
  bool artefact = n > 3 && strcmp(path + n - 3, ".h5") == 0;
  return artefact ? us_model_write(path, job->result, job->provenance, err)
                  : us_model_write_folder(path, job->result, job->provenance,
                                          (uint64_t)us_opt_int(job->run->opts, "shard"), err);
}

static enum us_status write_outputs(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  const char *path = us_opt_str(o, "output");
  bool drawn = us_opt_given(o, "plot"), trained = is_trained(job);
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

static enum us_status quantize(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  enum us_status status = open_inputs(job, err);
  if (status != US_OK) return status;
  if (us_opt_flag(o, "dry-run")) return print_plan(job, err);
  status = read_options(job, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &job->pool, err);
  if (status == US_OK) status = us_tool_open_learner(job->run, job->pool, &job->learner, err);
  job->qat.learner = job->learner;
  job->leads = status == US_OK && us_learner_leads(job->learner);
  if (status == US_OK && is_trained(job)) status = train(job, err);
  if (status == US_OK && !is_trained(job) && job->qat.gptq_windows)
    status = us_qat_start(&job->qat, job->pool, err);
  if (status != US_OK || !job->leads) return status;
  if (status == US_OK) status = us_qat_export(&job->qat, job->pool, &job->result, err);
  if (status == US_OK) status = measure(job, err);
  if (status == US_OK) status = make_provenance(job, err);
  return status == US_OK ? write_outputs(job, err) : status;
}

static enum us_status run_tool(struct us_tool_run *tool_run, struct us_err *err) {
  struct job job = {.run = tool_run};
  enum us_status status = quantize(&job, err);
  us_qat_release(&job.qat);
  us_metrics_release(&job.metrics);
  us_run_log_release(&job.log);
  us_model_free(job.result); /* they share the original's tensors */
  us_model_free(job.ptq);
  us_model_free(job.model);
  us_shards_close(job.shards);
  us_learner_free(job.learner);
  us_pool_free(job.pool);
  us_record_release(&job.model_record);
  us_record_release(&job.data_record);
  free(job.rows);
  free(job.provenance);
  return status;
}

static const struct us_tool tool = {
    .name = "qat-quant",
    .summary = "quantize a model by rules, after finetuning it through the rounding",
    .description =
        "Stores the matrices of a model in the formats that ordered rules name, the last match winning; a "
        "rule "
        "that matches nothing is an error. A rule is [layers.RANGE.]MODULE=FORMAT with MODULE one of all, "
        "embed, "
        "head, attn, attn.qkv, attn.o, mlp, dense, experts, experts.gate_up, experts.down, router, and "
        "FORMAT one "
        "of f32, bf16, fp8, mxfp4.\n\n"
        "With --data and steps, the weights are first finetuned through exactly that rounding "
        "(straight-through "
        "gradients, FP32 masters), by default towards the original's own distribution. Without either, this "
        "is "
        "post-training quantization. The result is the same for any number of threads; with --state a run "
        "can be "
        "killed and resumed to the same bits. With --gptq roundings begin, or with --steps 0 end, where the "
        "products of "
        "each matrix on some of the text change least, one weight making up for another.\n\n"
        "On held-out text the original, PTQ and QAT are compared: KL divergence, agreement of tokens and of "
        "experts, perplexity, and the share of PTQ's KL that finetuning closed. Before the tool ends, the "
        "file is "
        "read back and compared with the weights that were trained, bit for bit.",
    .examples =
        "# experts to MXFP4, nothing else, no finetuning\n"
        "qat-quant pico.h5 -o ptq.h5\n"
        "# the same after finetuning, with reports\n"
        "qat-quant pico.h5 --data text.h5 -o q.h5 --report tensors.tsv --metrics models.tsv --plot kl.png\n"
        "# no finetuning, but roundings chosen by the inputs of 64 sequences\n"
        "qat-quant pico.h5 --data text.h5 -o gptq.h5 --gptq 64 --steps 0\n"
        "# what would rules do?\n"
        "qat-quant pico.h5 --dry-run -p experts=mxfp4,attn.qkv=fp8,layers.1.experts=bf16",
    .opts = opts,
    .run = run_tool,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
