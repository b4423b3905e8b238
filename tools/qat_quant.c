/* qat_quant.c: quantize a model by rules, after finetuning it through the rounding.
 *
 * Contents: what goes in; dry run; training; the tool.
 */
#include "base/table.h"
#include "model/checkpoint.h"
#include "tools/qat_quant_results.h"
#include "tools/train_learner.h"
#include "tools/train_opts.h"

#include <math.h>
#include <stdlib.h>

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
    US_OPT_FILE("begin", 0, "FILE",
                "begin at that model's weights, an earlier result's say, instead of the original's"),
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
    US_OPT_FLAG("original-experts", 0,
                "while it learns, let tokens visit the experts that the original chose (with --loss kl)"),
    US_OPT_ENUM("train", 0, "rounded|all|experts", "which weights move: those whose format changes, ...",
                .def = "rounded"),
    US_OPT_TRAIN_OPTIMIZER("adamw"),
    US_OPT_NUM("lr", 0, "X", "peak learning rate", .def = "0.0003", .above_min = true),
    US_OPT_NUM("beta2", 0, "X", "memory of AdamW's second moments", .def = "0.95", .max = 0.9999),
    US_OPT_TRAIN_SCHEDULE("0.05", "0.1", "0"),
    US_OPT_NUM("freeze", 0, "SHARE",
               "fix a weight whose code moved back in more than that share of the last steps; 0: none",
               .def = "0", .max = 1),
    US_OPT_NUM("freeze-last", 0, "SHARE", "what --freeze has come down to at the end, as a share of it",
               .def = "0.2", .max = 1),
    US_OPT_NUM("freeze-memory", 0, "X", "memory of that share: 1 / (1 - X) steps", .def = "0.99",
               .max = 0.9999),
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

/* --- what goes in --- */

static enum us_status open_begin(struct us_qat_quant *job, struct us_err *err) {
  const char *path = us_opt_str(job->run->opts, "begin");
  if (!us_opt_given(job->run->opts, "data"))
    return us_err_set(err, US_ERR_USAGE, "--begin needs --data to learn from");
  enum us_status status = us_record_resolve(path, stdin, "model", &job->begin_record, err);
  if (status == US_OK) status = us_model_open(job->begin_record.path, &job->begin, err);
  if (status == US_OK) status = us_model_check(job->begin, err);
  return status == US_OK ? US_OK : us_err_prefix(err, "%s", path);
}

static enum us_status open_inputs(struct us_qat_quant *job, struct us_err *err) {
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
  if (status == US_OK && us_opt_given(o, "begin")) status = open_begin(job, err);
  if (status != US_OK || !us_opt_given(o, "data")) return status;
  status = us_record_resolve(us_opt_str(o, "data"), stdin, "tokens", &job->data_record, err);
  if (status == US_OK) status = us_shards_open(job->data_record.path, &job->shards, err);
  if (status == US_OK) status = us_rows_check_vocabulary(job->shards, job->model, err);
  return status == US_OK ? US_OK : us_err_prefix(err, "%s", us_opt_str(o, "data"));
}

static void on_log(void *arg, const struct us_qat_log *log);

/* The run, and the text that a resumed one must repeat. */
static enum us_status read_options(struct us_qat_quant *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_qat *q = &job->qat;
  char model[US_SHA256_HEX], data[US_SHA256_HEX], begin[US_SHA256_HEX] = "original";
  job->convert = (struct us_convert){.rules = &job->rules,
                                     .scale_rule = (enum us_scale_rule)us_opt_choice(o, "scale-rule"),
                                     .fp8_scale = (enum us_fp8_scale)us_opt_choice(o, "fp8-scale")};
  *q = (struct us_qat){.original = job->model,
                       .begin = job->begin,
                       .convert = &job->convert,
                       .shards = job->shards,
                       .loss = (enum us_qat_loss)us_opt_choice(o, "loss"),
                       .routers = us_opt_num(o, "routers"),
                       .original_experts = us_opt_flag(o, "original-experts"),
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
  double freeze = us_opt_num(o, "freeze");
  q->trainer.freeze = (struct us_freeze){.first = freeze,
                                         .last = freeze * us_opt_num(o, "freeze-last"),
                                         .memory = us_opt_num(o, "freeze-memory")};
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
  if ((q->routers != 0.0 || q->original_experts) && q->loss != US_QAT_KL)
    return us_err_set(err, US_ERR_USAGE, "%s needs --loss kl: the original is not run for cross-entropy",
                      q->routers != 0.0 ? "--routers" : "--original-experts");
  enum us_status status = us_record_hash(job->model_record.path, model, err);
  if (status == US_OK) status = us_record_hash(job->data_record.path, data, err);
  if (status == US_OK && job->begin) status = us_record_hash(job->begin_record.path, begin, err);
  if (status != US_OK) return status;
  snprintf(
      job->options, sizeof job->options,
      "model=%.16s begin=%.16s data=%.16s precision=%.200s scale_rule=%s fp8_scale=%s seed=%llu steps=%llu "
      "minutes=%g "
      "gptq=%zu routers=%g original_experts=%d loss=%d scope=%d optimizer=%d newton=%d beta2=%g batch=%zu "
      "length=%zu micro=%zu "
      "marked=%d "
      "across=%g "
      "lr=%g "
      "schedule=%d "
      "warmup=%g floor=%g "
      "decay=%g clip=%g freeze=%g freeze_last=%g freeze_memory=%g",
      model, begin, data, us_opt_str(o, "precision"), us_opt_str(o, "scale-rule"), us_opt_str(o, "fp8-scale"),
      (unsigned long long)q->seed, (unsigned long long)q->trainer.steps, q->trainer.minutes, q->gptq_windows,
      q->routers, (int)q->original_experts, (int)q->loss, (int)q->scope, (int)q->trainer.optim.kind,
      (int)q->trainer.optim.newton, q->trainer.optim.beta2, q->batch, q->length, q->micro,
      (int)q->marked_only, q->across, q->trainer.schedule.peak, (int)q->trainer.schedule.kind,
      q->trainer.schedule.warmup, q->trainer.schedule.floor, q->trainer.optim.adamw_decay, q->trainer.clip,
      q->trainer.freeze.first, q->trainer.freeze.last, q->trainer.freeze.memory);
  return US_OK;
}

/* --- dry run --- */

static enum us_status print_plan(struct us_qat_quant *job, struct us_err *err) {
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
  struct us_qat_quant *job = arg;
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

/* A rate that is too high leaves the model worse than rounding alone would, which the log of a run shows and a glance at it misses. */
static void warn_if_worse(const struct us_qat_quant *job) {
  double before = (double)NAN, after = (double)NAN;
  for (size_t i = 0; i < job->log.count; i++) {
    const double *row = job->log.rows + i * COLUMNS;
    if (row[0] == 0.0) before = row[4];
    if (isfinite(row[4])) after = row[4];
  }
  if (after > before)
    us_log_warning(job->run->log,
                   "held out %.5f nats a token after finetuning, %.5f before it: a lower --lr may do better",
                   after, before);
}

static enum us_status train(struct us_qat_quant *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_err log_err = {0};
  enum us_status status = us_trainer_check(&job->qat.trainer, job->qat.resume, err);
  if (status == US_OK)
    status = us_run_log_open(&job->log, columns, COLUMNS, job->leads ? us_opt_str(o, "log") : NULL,
                             job->qat.resume, err);
  if (status != US_OK) return status;
  us_progress_start(&job->progress, job->run->quiet || !job->leads ? NULL : stderr, "finetuning", "steps",
                    job->qat.trainer.steps);
  job->progress.limit = 60 * job->qat.trainer.minutes;
  status = us_qat(&job->qat, job->pool, err);
  us_progress_end(&job->progress);
  if (us_run_log_close(&job->log, &log_err) != US_OK && status == US_OK)
    status = us_err_set(err, log_err.status, "%s", log_err.message);
  if (status == US_OK && job->leads) warn_if_worse(job);
  if (status == US_OK && job->leads && job->qat.trainer.freeze.first > 0.0)
    us_log_notice(job->run->log, "%.1f %% of the rounded weights were fixed", 100.0 * job->qat.held);
  return status;
}

/* --- the tool --- */

static enum us_status quantize(struct us_qat_quant *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  enum us_status status = open_inputs(job, err);
  if (status != US_OK) return status;
  if (us_opt_flag(o, "dry-run")) return print_plan(job, err);
  status = read_options(job, err);
  if (status == US_OK) status = us_pool_create((int)us_opt_int(o, "threads"), &job->pool, err);
  if (status == US_OK) status = us_tool_open_learner(job->run, job->pool, &job->learner, err);
  job->qat.learner = job->learner;
  job->leads = status == US_OK && us_learner_leads(job->learner);
  if (status == US_OK && us_qat_quant_is_trained(job)) status = train(job, err);
  if (status == US_OK && !us_qat_quant_is_trained(job) && job->qat.gptq_windows)
    status = us_qat_start(&job->qat, job->pool, err);
  if (status != US_OK || !job->leads) return status;
  if (status == US_OK) status = us_qat_export(&job->qat, job->pool, &job->result, err);
  if (status == US_OK) status = us_qat_quant_measure(job, err);
  return status == US_OK ? us_qat_quant_write(job, err) : status;
}

static enum us_status run_tool(struct us_tool_run *tool_run, struct us_err *err) {
  struct us_qat_quant job = {.run = tool_run};
  enum us_status status = quantize(&job, err);
  us_qat_release(&job.qat);
  us_metrics_release(&job.metrics);
  us_run_log_release(&job.log);
  us_model_free(job.result); /* they share the original's tensors */
  us_model_free(job.ptq);
  us_model_free(job.model);
  us_model_free(job.begin);
  us_shards_close(job.shards);
  us_learner_free(job.learner);
  us_pool_free(job.pool);
  us_record_release(&job.model_record);
  us_record_release(&job.data_record);
  us_record_release(&job.begin_record);
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
        "each matrix on some of the text change least, one weight making up for another, and one matrix for "
        "those before it. With --freeze, weights whose codes go to and fro are fixed on the way. With "
        "--begin a run begins at another model's weights, an earlier result's say.\n\n"
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
        "# go on from there\n"
        "qat-quant pico.h5 --begin gptq.h5 --data text.h5 -o q.h5\n"
        "# what would rules do?\n"
        "qat-quant pico.h5 --dry-run -p experts=mxfp4,attn.qkv=fp8,layers.1.experts=bf16",
    .opts = opts,
    .run = run_tool,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
