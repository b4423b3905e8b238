/* us-pretrain: a base model from scratch, or from another model's weights, on token shards. */
#include "base/buffer.h"
#include "base/plot.h"
#include "base/progress.h"
#include "base/provenance.h"
#include "base/record.h"
#include "base/table.h"
#include "model/checkpoint.h"
#include "tools/tool.h"
#include "tools/train_learner.h"
#include "tools/train_opts.h"
#include "training/pretrain.h"
#include "training/run_log.h"

#include <stdlib.h>
#include <string.h>

#define MAX_TOKENIZER ((size_t)256 << 20)

static const struct us_opt opts[] = {
    US_OPT_ARG("shape", "SHAPE", "shape: a name, a JSON file or a folder with config.json", .required = true),
    US_OPT_FILE("data", 0, "FILE", "token shards, or - for their record on stdin", .required = true),
    US_OPT_FILE("tokenizer", 0, "FILE", "tokenizer.json that the shards were made with; goes into the model"),
    US_OPT_FILE("init", 0, "FILE", "begin at the weights of this model of the same shape, unquantized"),
    US_OPT_FILE("output", 'o', "FILE", "model to write: an .h5 file, or a folder in the published layout",
                .required = true, .writes = US_OPT_WRITES_CHECKPOINT),
    US_OPT_GROUP("Training"),
    US_OPT_INT("steps", 'n', "N", "optimizer steps; 0: as many as the time allows", .def = "1000"),
    US_OPT_NUM("minutes", 0, "M", "stop after so many minutes, with the schedule cut to fit; 0: no limit",
               .def = "0"),
    US_OPT_INT("batch", 'b', "N", "sequences a step", .def = "16", .min = 1, .max = 65536),
    US_OPT_INT("length", 'l', "N", "tokens a sequence", .def = "512", .min = 2, .max = 131072),
    US_OPT_INT("micro", 0, "N", "sequences a forward pass; 0: as many as 16,384 rows hold, on a GPU 32,768",
               .def = "0", .max = 65536),
    US_OPT_TRAIN_OPTIMIZER("muon"),
    US_OPT_NUM("lr", 0, "X", "peak learning rate", .def = "0.003", .above_min = true),
    US_OPT_TRAIN_SCHEDULE("0.02", "0.05", "0.1"),
    US_OPT_NUM("balance", 0, "X",
               "step of the router bias towards even expert loads, falls with the learning rate",
               .def = "0.01"),
    US_OPT_NUM("score-decay", 0, "X",
               "weight of what draws routing scores to --score-target, so that gates are steep; 0: none",
               .def = "0"),
    US_OPT_NUM("score-target", 0, "S", "where it draws them", .def = "0.05", .max = 1),
    US_OPT_NUM(
        "margin", 0, "M",
        "keep routing scores M logits from where choices of experts tip, from 0.3 of the run on; 0: none",
        .def = "0", .max = 20),
    US_OPT_NUM("margin-weight", 0, "X", "of what keeps them there", .def = "0.001"),
    US_OPT_NUM("deviation", 0, "X", "of the initial weights; 0: 1/sqrt(inputs) of each matrix", .def = "0"),
    US_OPT_ENUM("loss", 0, "all|marked", "train on all tokens, or on those that the shards mark",
                .def = "all"),
    US_OPT_TRAIN_ACROSS,
    US_OPT_FLAG("recompute", 0, "keep one layer's activations and compute the others again: less memory"),
    US_OPT_GROUP("Progress"),
    US_OPT_TRAIN_PROGRESS,
    US_OPT_INT("eval-every", 0, "N", "steps between evaluations on held-out text; 0: at the end alone",
               .def = "0"),
    US_OPT_INT("eval-windows", 0, "N", "held-out sequences of an evaluation on the way", .def = "32",
               .min = 1),
    US_OPT_FILE("log", 0, "FILE.tsv", "write the log as TSV", .writes = US_OPT_WRITES_FILE),
    US_OPT_FILE("run", 0, "FILE.h5", "write the log as an HDF5 run artefact", .writes = US_OPT_WRITES_FILE),
    US_OPT_GROUP("Common options"),
    US_OPT_INT("seed", 0, "N", "seed of everything random", .def = "1"),
    US_OPT_TRAIN_WHERE,
    US_OPT_INT("threads", 0, "N", "CPU threads; 0 uses every core", .def = "0", .max = 256),
    US_OPT_COMMON_OUT,
    US_OPT_COMMON_TALK,
    US_OPT_END,
};

enum { COLUMNS = 12 };
static const char *const columns[COLUMNS] = {"step",         "tokens", "seconds",   "loss",
                                             "rate",         "norm",   "heldout",   "bits_per_byte",
                                             "tokens_per_s", "gflops", "imbalance", "mfu"};

struct job {
  struct us_tool_run *run;
  struct us_pretrain train;
  struct us_model *init;
  struct us_run_log log;
  struct us_progress progress;
  bool leads; /* of several processes one writes */
};

/* --- log --- */

static void on_log(void *arg, const struct us_pretrain_log *log) {
  struct job *job = arg;
  char mfu[32] = "";
  const double row[COLUMNS] = {
      (double)log->step, (double)log->tokens, log->seconds,           log->loss,   log->rate,      log->norm,
      log->heldout,      log->bits_per_byte,  log->tokens_per_second, log->gflops, log->imbalance, log->mfu};
  if (!job->leads) return;
  if (log->mfu == log->mfu) snprintf(mfu, sizeof mfu, ", MFU %.1f %%", 100.0 * log->mfu);
  us_run_log_add(&job->log, row);
  if (log->loss == log->loss) us_progress_note(&job->progress, "loss %.3f", log->loss);
  us_progress_set(&job->progress, log->step);
  if (log->loss != log->loss) /* a resumed run that had ended is evaluated alone */
    us_log_notice(job->run->log, "step %llu: held out %.4f nats a token, %.4f bits a byte",
                  (unsigned long long)log->step, log->heldout, log->bits_per_byte);
  else if (log->bits_per_byte == log->bits_per_byte)
    us_log_notice(job->run->log, "step %llu: loss %.4f, held out %.4f nats a token, %.4f bits a byte",
                  (unsigned long long)log->step, log->loss, log->heldout, log->bits_per_byte);
  else
    us_log_info(job->run->log, "step %llu: loss %.4f, norm %.3f, rate %.2e, %.0f tokens/s, %.1f GFLOP/s%s",
                (unsigned long long)log->step, log->loss, log->norm, log->rate, log->tokens_per_second,
                log->gflops, mfu);
}

static enum us_status draw(const struct job *job, const char *path, const char *provenance,
                           struct us_err *err) {
  size_t n = job->log.count;
  double *x = malloc((4 * n + 1) * sizeof *x);
  if (!x) return us_err_memory(err, "plot", 4 * n * sizeof *x);
  size_t steps = us_run_log_points(&job->log, 1, 3, x, x + n);
  size_t probes = us_run_log_points(&job->log, 1, 6, x + 2 * n, x + 3 * n);
  struct us_plot_axes axes = {
      .title = "Pretraining", .x_title = "training tokens", .y_title = "loss (nats a token)"};
  struct us_plot_series series[2] = {
      {.name = "training", .x = x, .y = x + n, .n = steps},
      {.name = "held out", .style = US_PLOT_LINE_POINTS, .x = x + 2 * n, .y = x + 3 * n, .n = probes}};
  enum us_status status = us_plot_xy(path, &axes, series, 2, provenance, err);
  free(x);
  return status;
}

/* --- what goes in --- */

/* A shape's name says little where it comes from a file: of all that it says. */
static enum us_status hash_shape(const struct us_shape *shape, char hex[US_SHA256_HEX], struct us_err *err) {
  char *text = NULL;
  uint8_t digest[US_SHA256_BYTES];
  enum us_status status = us_shape_print(shape, &text, err);
  if (status == US_OK) status = us_sha256_bytes(text, strlen(text), digest, err);
  if (status == US_OK) us_sha256_hex(digest, hex);
  free(text);
  return status;
}

/* What must be the same when a run is resumed, as text that a message can show. */
static enum us_status describe(const struct job *job, const char *data_sha256, const char *init_sha256,
                               char text[1024], struct us_err *err) {
  const struct us_pretrain *t = &job->train;
  const struct us_trainer *r = &t->trainer;
  char shape_sha256[US_SHA256_HEX];
  enum us_status status = hash_shape(t->shape, shape_sha256, err);
  if (status != US_OK) return status;
  snprintf(text, 1024,
           "shape=%s config=%.16s data=%.16s init=%.16s seed=%llu steps=%llu minutes=%g batch=%zu length=%zu "
           "micro=%zu "
           "optimizer=%d "
           "newton=%d "
           "lr=%g schedule=%d warmup=%g floor=%g decay=%g clip=%g balance=%g score_decay=%g score_target=%g "
           "margin=%g margin_weight=%g "
           "deviation=%g "
           "marked=%d across=%g",
           t->shape->name, shape_sha256, data_sha256, init_sha256, (unsigned long long)t->seed,
           (unsigned long long)r->steps, r->minutes, t->batch, t->length, t->micro, (int)r->optim.kind,
           (int)r->optim.newton, r->schedule.peak, (int)r->schedule.kind, r->schedule.warmup,
           r->schedule.floor, r->optim.muon_decay, r->clip, (double)t->balance_rate, (double)t->score_decay,
           (double)t->score_target, (double)t->margin, (double)t->margin_weight, (double)t->deviation,
           (int)t->marked_only, t->across);
  return US_OK;
}

/* What would be ignored is refused. */
static enum us_status check_options(struct us_opts *o, struct us_err *err) {
  static const char *const needs[][2] = {{"score-target", "score-decay"}, {"margin-weight", "margin"}};
  for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++)
    if (us_opt_given(o, needs[i][0]) && !us_opt_given(o, needs[i][1]))
      return us_err_set(err, US_ERR_USAGE, "--%s needs --%s", needs[i][0], needs[i][1]);
  return US_OK;
}

static void read_options(struct job *job) {
  struct us_opts *o = job->run->opts;
  struct us_pretrain *t = &job->train;
  t->init = job->init;
  t->batch = (size_t)us_opt_int(o, "batch");
  t->length = (size_t)us_opt_int(o, "length");
  t->micro = (size_t)us_opt_int(o, "micro");
  t->seed = (uint64_t)us_opt_int(o, "seed");
  t->deviation = (float)us_opt_num(o, "deviation");
  t->balance_rate = (float)us_opt_num(o, "balance");
  t->score_decay = (float)us_opt_num(o, "score-decay");
  t->score_target = (float)us_opt_num(o, "score-target");
  t->margin = (float)us_opt_num(o, "margin");
  t->margin_weight = (float)us_opt_num(o, "margin-weight");
  t->memory = us_opt_flag(o, "recompute") ? US_TRAIN_RECOMPUTE : US_TRAIN_SAVE;
  t->marked_only = us_opt_choice(o, "loss") == 1;
  t->across = us_opt_num(o, "across");
  t->eval_every = (uint64_t)us_opt_int(o, "eval-every");
  t->eval_windows = (size_t)us_opt_int(o, "eval-windows");
  t->log_every = (uint64_t)us_opt_int(o, "log-every");
  t->resume = us_opt_flag(o, "resume");
  us_tool_read_trainer(o, &t->trainer);
  t->on_log = on_log;
  t->log_arg = job;
  t->interrupted = us_tool_interrupted;
}

static enum us_status read_tokenizer(const char *path, const struct us_shards *shards, struct us_buffer *text,
                                     struct us_err *err) {
  char hex[US_SHA256_HEX];
  if (!path) return US_OK;
  enum us_status status = us_buffer_read_file(text, path, MAX_TOKENIZER, err);
  if (status == US_OK) status = us_sha256_file(path, hex, err);
  if (status == US_OK && strcmp(hex, us_shards_tokenizer_sha256(shards)) != 0)
    return us_err_set(err, US_ERR_INPUT, "%s: sha256 is %s, the shards were made with %s", path, hex,
                      us_shards_tokenizer_sha256(shards));
  return status;
}

static enum us_status make_provenance(const struct job *job, const char *data, char **ret_text,
                                      struct us_err *err) {
  struct us_provenance *provenance = NULL;
  uint64_t seed = (uint64_t)us_opt_int(job->run->opts, "seed");
  enum us_status status = us_tool_provenance(job->run, seed, &provenance, err);
  if (status == US_OK) status = us_tool_add_parent(provenance, data, "tokens", err);
  if (status == US_OK && job->init)
    status = us_tool_add_parent(provenance, us_opt_str(job->run->opts, "init"), "model", err);
  *ret_text = status == US_OK ? us_provenance_text(provenance, err) : NULL;
  if (status == US_OK && !*ret_text) status = err->status;
  us_provenance_free(provenance);
  return status;
}

/* Whether two shapes differ in nothing but name and precision. */
static enum us_status compare_shapes(const struct us_shape *shape, const struct us_shape *other,
                                     bool *ret_same, struct us_err *err) {
  struct us_shape renamed = *other;
  char *a = NULL, *b = NULL;
  snprintf(renamed.name, sizeof renamed.name, "%s", shape->name);
  renamed.precision = shape->precision;
  enum us_status status = us_shape_print(shape, &a, err);
  if (status == US_OK) status = us_shape_print(&renamed, &b, err);
  *ret_same = status == US_OK && strcmp(a, b) == 0;
  free(a);
  free(b);
  return status;
}

/* The model of --init and its hash; "none" without one. */
static enum us_status open_init(struct job *job, const struct us_shape *shape, const struct us_shards *shards,
                                char hex[US_SHA256_HEX], struct us_err *err) {
  const char *path = us_opt_str(job->run->opts, "init");
  snprintf(hex, US_SHA256_HEX, "none");
  if (!path) return US_OK;
  enum us_status status = us_record_hash(path, hex, err);
  if (status == US_OK) status = us_model_open(path, &job->init, err);
  if (status == US_OK) status = us_rows_check_vocabulary(shards, job->init, err);
  bool same = false;
  if (status == US_OK) status = compare_shapes(shape, &job->init->shape, &same, err);
  if (status != US_OK) return status;
  const struct us_precision *p = &job->init->shape.precision;
  if (!same) return us_err_set(err, US_ERR_INPUT, "%s: its shape is not that of %s", path, shape->name);
  if (p->experts != US_FORMAT_BF16 || p->qkv != US_FORMAT_BF16 || p->head != US_FORMAT_BF16)
    return us_err_set(err, US_ERR_INPUT, "%s: is quantized; training goes on from bf16", path);
  return US_OK;
}

/* --- what comes out --- */

static enum us_status write_model(struct job *job, struct us_buffer *tokenizer, const char *provenance,
                                  struct us_err *err) {
  const char *path = us_opt_str(job->run->opts, "output");
  struct us_model *model = NULL;
  enum us_status status = us_model_create(job->train.shape, &model, err);
  if (status == US_OK) status = us_params_export(&job->train.params, model, err);
  if (status == US_OK && tokenizer->size) {
    model->tokenizer_json = strdup(tokenizer->data);
    model->tokenizer_bytes = tokenizer->size;
    if (!model->tokenizer_json) status = us_err_memory(err, "tokenizer", tokenizer->size);
  }
  if (status == US_OK) status = us_model_write(path, model, provenance, err);
  us_model_free(model);
  struct us_opts *o = job->run->opts;
  if (status == US_OK && us_opt_str(o, "run"))
    status = us_run_log_write(&job->log, us_opt_str(o, "run"), provenance, err);
  if (status == US_OK && us_opt_str(o, "plot")) status = draw(job, us_opt_str(o, "plot"), provenance, err);
  if (status != US_OK) return status;
  return us_record_emit(job->run->out, us_opt_flag(o, "json"), path, "model", err);
}

static enum us_status train(struct job *job, struct us_err *err) {
  struct us_pool *pool = NULL;
  struct us_opts *o = job->run->opts;
  struct us_err log_err = {0};
  enum us_status status = us_pool_create((int)us_opt_int(o, "threads"), &pool, err);
  if (status == US_OK) status = us_tool_open_learner(job->run, pool, &job->train.learner, err);
  job->leads = status == US_OK && us_learner_leads(job->train.learner);
  if (status == US_OK) status = us_trainer_check(&job->train.trainer, job->train.resume, err);
  if (status == US_OK)
    status = us_run_log_open(&job->log, columns, COLUMNS, job->leads ? us_opt_str(o, "log") : NULL,
                             job->train.resume, err);
  if (status == US_OK) {
    us_progress_start(&job->progress, job->run->quiet || !job->leads ? NULL : stderr, "training", "steps",
                      job->train.trainer.steps);
    job->progress.limit = 60 * job->train.trainer.minutes;
    status = us_pretrain(&job->train, pool, err);
    us_progress_end(&job->progress);
  }
  if (us_run_log_close(&job->log, &log_err) != US_OK && status == US_OK)
    status = us_err_set(err, log_err.status, "%s", log_err.message);
  us_learner_free(job->train.learner);
  us_pool_free(pool);
  return status;
}

/* --dry-run: what the run would be. */
static enum us_status print_plan(const struct job *job, struct us_err *err) {
  static const char *const plan[] = {"shape",  "train_tokens", "heldout_tokens",
                                     "tokens", "epochs",       "gflop_per_token"};
  const struct us_pretrain *t = &job->train;
  struct us_table *table;
  enum us_status status =
      us_table_open(job->run->out, plan, 6, us_opt_flag(job->run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  double tokens = (double)t->trainer.steps * (double)t->batch * (double)t->length;
  double available = (double)us_shards_tokens(t->shards, US_PART_TRAIN);
  us_table_text(table, t->shape->name);
  us_table_int(table, (int64_t)available);
  us_table_int(table, (int64_t)us_shards_tokens(t->shards, US_PART_HELDOUT));
  us_table_num(table, tokens);
  us_table_num(table, tokens / available);
  us_table_num(table, 3e-9 * us_model_train_flops(t->shape, 0.5 * (double)t->length));
  return us_table_close(table, err);
}

static enum us_status run_tool(struct us_tool_run *tool_run, struct us_err *err) {
  struct us_opts *o = tool_run->opts;
  struct job job = {.run = tool_run};
  struct us_shape shape;
  struct us_record data = {0};
  struct us_shards *shards = NULL;
  struct us_buffer tokenizer = {0};
  char *provenance = NULL, hex[US_SHA256_HEX], init_hex[US_SHA256_HEX], options[1024];
  enum us_status status = check_options(o, err);
  if (status == US_OK) status = us_shape_load(us_opt_str(o, "shape"), &shape, err);
  if (status == US_OK) status = us_record_resolve(us_opt_str(o, "data"), stdin, "tokens", &data, err);
  if (status == US_OK) status = us_shards_open(data.path, &shards, err);
  if (status == US_OK) status = read_tokenizer(us_opt_str(o, "tokenizer"), shards, &tokenizer, err);
  if (status == US_OK) status = us_record_hash(data.path, hex, err);
  if (status == US_OK) status = open_init(&job, &shape, shards, init_hex, err);
  if (status == US_OK) {
    shape.precision = (struct us_precision){US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16,
                                            US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_F32,  US_FORMAT_BF16};
    job.train.shape = &shape;
    job.train.shards = shards;
    read_options(&job);
    status = describe(&job, hex, init_hex, options, err);
    job.train.trainer.options = options;
  }
  if (status == US_OK && us_opt_flag(o, "dry-run")) {
    status = print_plan(&job, err);
  } else {
    if (status == US_OK) status = make_provenance(&job, data.path, &provenance, err);
    if (status == US_OK) status = train(&job, err);
    if (status == US_OK && job.leads) status = write_model(&job, &tokenizer, provenance, err);
  }
  us_pretrain_release(&job.train);
  us_model_free(job.init);
  us_buffer_release(&tokenizer);
  us_shards_close(shards);
  us_record_release(&data);
  free(provenance);
  us_run_log_release(&job.log);
  return status;
}

static const struct us_tool tool = {
    .name = "us-pretrain",
    .summary = "train a base model on token shards, anew or from another's weights",
    .description =
        "Draws sequences from the training part of token shards, minimises the cross-entropy of the next "
        "token, and "
        "writes the model in bf16 (router in f32). Matrices of the layers are trained by Muon, the rest by "
        "AdamW; "
        "expert loads are evened out by the router's selection bias. The result is the same for any number "
        "of "
        "threads.\n\n"
        "With --state the run is kept in two files that take turns, so that it can be killed at any moment "
        "and resumed "
        "to the same bits; a run limited by --minutes depends on the clock and is resumed without that "
        "promise. A loss "
        "or gradient that is not finite ends the run with the tensor's name; the last saved state stays.",
    .examples =
        "# 20 minutes on shards made by us-data\n"
        "us-pretrain pico --data text.h5 --tokenizer tokenizer.json -o pico.h5 --steps 0 --minutes 20\n"
        "# then on longer sequences, from those weights\n"
        "us-pretrain pico --init pico.h5 --data text.h5 -l 4096 -b 4 --lr 0.001 --steps 100 -o longer.h5\n"
        "# a run that can be killed and resumed\n"
        "us-pretrain pico --data text.h5 -o pico.h5 --steps 4000 --state pico.state --resume\n"
        "# on four GPUs of this machine, or one process a GPU under a scheduler\n"
        "us-pretrain nano --data text.h5 -o nano.h5 -b 128 -l 2048 --device cuda --gpus 4\n"
        "srun --ntasks-per-node 4 us-pretrain nano --data text.h5 -o nano.h5 -b 128 -l 2048 --device cuda",
    .opts = opts,
    .run = run_tool,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
