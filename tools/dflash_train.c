/* dflash_train.c: distil a DFlash drafter from a model.
 *
 * Contents: log; what goes in; answers; what comes out.
 */
#include "base/plot.h"
#include "base/progress.h"
#include "base/provenance.h"
#include "base/record.h"
#include "base/table.h"
#include "model/checkpoint.h"
#include "tools/dflash_answers.h"
#include "tools/dflash_drafter.h"
#include "tools/tool.h"
#include "tools/train_learner.h"
#include "tools/train_opts.h"
#include "training/dflash.h"
#include "training/run_log.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct us_opt opts[] = {
    US_OPT_FILE("target", 't', "FILE", "model to draft for; - reads its record from stdin", .required = true),
    US_OPT_FILE("output", 'o', "FILE", "drafter to write: an .h5 file, or a folder in the published layout",
                .writes = US_OPT_WRITES_CHECKPOINT),
    US_OPT_GROUP("Text"),
    US_OPT_FILE("data", 0, "FILE", "token shards: text to train on, or prompts with --generate"),
    US_DFLASH_ANSWERS_OPTIONS,
    US_OPT_TRAIN_ACROSS,
    US_DFLASH_DRAFTER_OPTIONS,
    US_OPT_GROUP("Training"),
    US_OPT_INT("anchors", 0, "N", "blocks a sequence", .def = "512", .min = 1, .max = 4096),
    US_OPT_ENUM("loss", 0, "ce|kl", "learn the tokens, or the target's distribution over them", .def = "ce"),
    US_OPT_ENUM("weights", 0, "exp|dpace|uniform", "weights of the slots", .def = "dpace"),
    US_OPT_NUM("gamma", 0, "G", "decay of --weights exp; 0: 4 to 7, by the block", .def = "0"),
    US_OPT_NUM("alpha", 0, "A", "smoothing of --weights dpace", .def = "0.5", .max = 1),
    US_OPT_INT("steps", 'n', "N",
               "optimizer steps; 0: as many as the time allows, or without --minutes none: --init is only "
               "rounded to --format and --head",
               .def = "1000"),
    US_OPT_NUM("minutes", 0, "M", "stop after so many minutes of training; 0: no limit", .def = "0"),
    US_OPT_INT("batch", 'b', "N", "sequences a step", .def = "4", .min = 1, .max = 65536),
    US_OPT_INT("length", 'l', "N", "tokens a sequence", .def = "512", .min = 8, .max = 131072),
    US_OPT_INT("micro", 0, "N", "sequences a pass; 0: as many as 8,192 block rows hold, on a GPU 32,768",
               .def = "0", .max = 65536),
    US_OPT_TRAIN_OPTIMIZER("muon"),
    US_OPT_NUM("lr", 0, "X", "peak learning rate; AdamW alone wants a tenth", .def = "0.02",
               .above_min = true),
    US_OPT_TRAIN_SCHEDULE("0.04", "0", "0.01"),
    US_OPT_GROUP("Progress"),
    US_OPT_TRAIN_PROGRESS,
    US_OPT_INT("eval-every", 0, "N", "steps between evaluations on what is held out; 0: at the end alone",
               .def = "0"),
    US_OPT_INT("eval-sequences", 0, "N", "held-out sequences of an evaluation; 0: all", .def = "32"),
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

/* Fixed columns, then accuracy_1 .. accuracy_15 of the training blocks. */
enum { FIXED = 12, COLUMNS = FIXED + US_MAX_BLOCK - 1 };
static const char *const columns[COLUMNS] = {
    "step",        "tokens",      "seconds",     "loss",        "length",      "rate",       "norm",
    "heldout",     "heldout_len", "rows_per_s",  "gflops",      "mfu",         "accuracy_1", "accuracy_2",
    "accuracy_3",  "accuracy_4",  "accuracy_5",  "accuracy_6",  "accuracy_7",  "accuracy_8", "accuracy_9",
    "accuracy_10", "accuracy_11", "accuracy_12", "accuracy_13", "accuracy_14", "accuracy_15"};

struct job {
  struct us_tool_run *run;
  struct us_record target_record;
  struct us_model *target;
  struct us_dflash_drafter drafter;
  struct us_shards *shards;
  struct us_dflash_answers answers;
  struct us_pool *pool;
  struct us_learner *learner;
  bool leads; /* of several processes one writes */
  struct us_dflash train;
  struct us_run_log log;
  struct us_progress progress;
  char options[2048];
};

/* --- log --- */

static void on_log(void *arg, const struct us_dflash_log *log) {
  struct job *job = arg;
  char mfu[32] = "";
  double length = us_draft_tally_length(&log->train), loss = us_draft_tally_loss(&log->train);
  double heldout = us_draft_tally_loss(&log->heldout), heldout_length = us_draft_tally_length(&log->heldout);
  double row[COLUMNS] = {
      (double)log->step, (double)log->tokens,  log->seconds, loss,    length, log->rate, log->norm, heldout,
      heldout_length,    log->rows_per_second, log->gflops,  log->mfu};
  if (!job->leads) return;
  if (isfinite(log->mfu)) snprintf(mfu, sizeof mfu, ", MFU %.1f %%", 100.0 * log->mfu);
  for (uint32_t j = 1; j < US_MAX_BLOCK; j++) row[FIXED + j - 1] = us_draft_tally_accuracy(&log->train, j);
  us_run_log_add(&job->log, row);
  us_progress_note(&job->progress, "loss %.3f, length %.2f", loss, length);
  us_progress_set(&job->progress, log->step);
  if (loss != loss) /* a resumed run that had ended is evaluated alone */
    us_log_notice(job->run->log, "step %llu: held out %.4f, length %.3f", (unsigned long long)log->step,
                  heldout, heldout_length);
  else if (heldout_length == heldout_length)
    us_log_notice(job->run->log, "step %llu: loss %.4f, length %.3f; held out %.4f, length %.3f",
                  (unsigned long long)log->step, loss, length, heldout, heldout_length);
  else
    us_log_info(job->run->log,
                "step %llu: loss %.4f, length %.3f, norm %.3f, rate %.2e, %.0f rows/s, %.1f GFLOP/s%s",
                (unsigned long long)log->step, loss, length, log->norm, log->rate, log->rows_per_second,
                log->gflops, mfu);
}

/* Slot accuracies, first to last, of what is held out. */
static void say_accuracy(const struct job *job) {
  char text[US_MAX_BLOCK * 8] = "";
  size_t used = 0;
  for (uint32_t j = 1; j < job->train.shape.block; j++)
    used += (size_t)snprintf(text + used, sizeof text - used, " %.3f",
                             us_draft_tally_accuracy(&job->train.last.heldout, j));
  if (job->train.last.heldout.blocks) us_log_notice(job->run->log, "held-out accuracy by slot:%s", text);
}

static enum us_status draw(const struct job *job, const char *path, const char *provenance,
                           struct us_err *err) {
  size_t n = job->log.count;
  double *x = malloc((3 * n + 1) * sizeof *x);
  if (!x) return us_err_memory(err, "plot", 3 * n * sizeof *x);
  us_run_log_column(&job->log, 0, x);
  us_run_log_column(&job->log, 4, x + n);
  us_run_log_column(&job->log, 8, x + 2 * n);
  struct us_plot_axes axes = {.title = "Drafter distillation",
                              .x_title = "steps",
                              .y_title = "simulated acceptance length (tokens a round)"};
  struct us_plot_series series[2] = {
      {.name = "training", .x = x, .y = x + n, .n = n},
      {.name = "held out", .style = US_PLOT_LINE_POINTS, .x = x, .y = x + 2 * n, .n = n}};
  enum us_status status = us_plot_xy(path, &axes, series, 2, provenance, err);
  free(x);
  return status;
}

/* --- what goes in --- */

static void read_training(struct job *job) {
  struct us_opts *o = job->run->opts;
  struct us_dflash *t = &job->train;
  double gamma = us_opt_num(o, "gamma");
  t->target = job->target;
  t->shards = job->shards;
  t->text_share = us_opt_num(o, "text-share");
  t->across = us_opt_num(o, "across");
  t->batch = (size_t)us_opt_int(o, "batch");
  t->length = (size_t)us_opt_int(o, "length");
  t->anchors = (size_t)us_opt_int(o, "anchors");
  if (t->anchors > t->length) t->anchors = t->length;
  t->micro = (size_t)us_opt_int(o, "micro");
  t->seed = (uint64_t)us_opt_int(o, "seed");
  t->fixed_mask = us_opt_flag(o, "fixed-mask");
  t->loss.kind = us_opt_choice(o, "loss") == 0 ? US_DRAFT_CE : US_DRAFT_KL;
  t->loss.weights = (enum us_draft_weights)us_opt_choice(o, "weights");
  t->loss.alpha = (float)us_opt_num(o, "alpha");
  /* The paper's 4, 5, 7 for blocks of 8, 10, 16. */
  t->loss.gamma = (float)(gamma > 0.0 ? gamma : t->shape.block > 10 ? 7.0 : t->shape.block > 8 ? 5.0 : 4.0);
  t->log_every = (uint64_t)us_opt_int(o, "log-every");
  t->eval_every = (uint64_t)us_opt_int(o, "eval-every");
  t->eval_sequences = (size_t)us_opt_int(o, "eval-sequences");
  t->resume = us_opt_flag(o, "resume");
  t->on_log = on_log;
  t->log_arg = job;
  t->interrupted = us_tool_interrupted;
}

/* What must be the same when a run is resumed, as text that a message can show. */
static enum us_status describe(struct job *job, struct us_err *err) {
  static const char *const words[] = {"taps",   "loss",     "weights", "optimizer",
                                      "newton", "schedule", "format",  "head"};
  static const char *const numbers[] = {
      "generate", "max-tokens", "temperature", "top-p",    "text-share", "across",  "layers", "block",
      "window",   "inner",      "heads",       "kv-heads", "head-dim",   "mask-id", "markov", "anchors",
      "gamma",    "alpha",      "steps",       "minutes",  "batch",      "length",  "micro",  "lr",
      "warmup",   "floor",      "decay",       "clip",     "seed"};
  struct us_opts *o = job->run->opts;
  char data[US_SHA256_HEX] = "none", init[US_SHA256_HEX] = "none", target[US_SHA256_HEX] = "none",
       answers[US_SHA256_HEX] = "none", prompts[US_SHA256_HEX] = "none";
  char *text = job->options;
  size_t size = sizeof job->options;
  enum us_status status = us_record_hash(job->target_record.path, target, err);
  if (status == US_OK && job->shards) status = us_record_hash(us_opt_str(o, "data"), data, err);
  if (status == US_OK && job->drafter.init) status = us_record_hash(us_opt_str(o, "init"), init, err);
  if (status == US_OK && us_opt_str(o, "answers"))
    status = us_record_hash(us_opt_str(o, "answers"), answers, err);
  if (status == US_OK && us_opt_str(o, "prompts"))
    status = us_record_hash(us_opt_str(o, "prompts"), prompts, err);
  if (status != US_OK) return status;
  size_t used = (size_t)snprintf(
      text, size,
      "target=%.16s data=%.16s answers=%.16s prompts=%.16s init=%.16s fixed-mask=%d ignore-end=%d", target,
      data, answers, prompts, init, us_opt_flag(o, "fixed-mask"), us_opt_flag(o, "ignore-end"));
  for (size_t i = 0; i < sizeof words / sizeof words[0] && used < size; i++) {
    const char *word = us_opt_str(o, words[i]);
    used += (size_t)snprintf(text + used, size - used, " %s=%s", words[i], word ? word : "default");
  }
  for (size_t i = 0; i < sizeof numbers / sizeof numbers[0] && used < size; i++)
    used += (size_t)snprintf(text + used, size - used, " %s=%.10g", numbers[i], us_opt_num(o, numbers[i]));
  return US_OK;
}

static enum us_status open_inputs(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  enum us_status status = us_dflash_answers_check(o, err);
  if (status == US_OK) status = us_dflash_drafter_check(o, err);
  if (status == US_OK)
    status = us_record_resolve(us_opt_str(o, "target"), stdin, "model", &job->target_record, err);
  if (status == US_OK) status = us_model_open(job->target_record.path, &job->target, err);
  job->drafter = (struct us_dflash_drafter){.opts = o, .target = job->target, .train = &job->train};
  if (status == US_OK) status = us_dflash_drafter_init(&job->drafter, err);
  if (status == US_OK && us_opt_given(o, "data"))
    status = us_shards_open(us_opt_str(o, "data"), &job->shards, err);
  if (status == US_OK && job->shards) status = us_rows_check_vocabulary(job->shards, job->target, err);
  if (status != US_OK) return status;
  if (!job->shards && !job->target->shape.stop_count && !us_dflash_drafter_only_rounds(o))
    return us_err_set(err, US_ERR_USAGE,
                      "without --data the target must have an end-of-text token to begin with");
  read_training(job);
  us_tool_read_trainer(o, &job->train.trainer);
  job->train.trainer.options = job->options;
  return describe(job, err);
}

/* --- answers --- */

static enum us_status make_answers(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_dflash_answers *a = &job->answers;
  *a = (struct us_dflash_answers){.run = job->run,
                                  .learner = job->learner,
                                  .pool = job->pool,
                                  .target = job->target,
                                  .shards = job->shards,
                                  .length = job->train.length,
                                  .seed = job->train.seed};
  enum us_status status = us_dflash_answers_make(a, err);
  if (status == US_OK && job->leads && us_opt_str(o, "answers-out")) status = us_dflash_answers_write(a, err);
  if (status == US_OK && a->train.n) job->train.answers = &a->train, job->train.heldout = &a->heldout;
  return status;
}

/* --- what comes out --- */

static enum us_status make_provenance(struct job *job, char **ret_text, struct us_err *err) {
  struct us_provenance *p = NULL;
  struct us_opts *o = job->run->opts;
  *ret_text = NULL;
  enum us_status status = us_tool_provenance(job->run, job->train.seed, &p, err);
  if (status == US_OK) status = us_tool_add_parent(p, job->target_record.path, "model", err);
  if (status == US_OK && job->shards) status = us_tool_add_parent(p, us_opt_str(o, "data"), "tokens", err);
  if (status == US_OK && job->drafter.init)
    status = us_tool_add_parent(p, us_opt_str(o, "init"), "draft", err);
  if (status == US_OK) status = us_dflash_drafter_conventions(&job->train.shape, p, err);
  if (status == US_OK && !(*ret_text = us_provenance_text(p, err))) status = err->status;
  us_provenance_free(p);
  return status;
}

static enum us_status write_outputs(struct job *job, const char *provenance, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  const char *path = us_opt_str(o, "output");
  enum us_status status = us_dflash_drafter_write(&job->drafter, job->pool, path, provenance, err);
  if (status == US_OK && us_opt_str(o, "run"))
    status = us_run_log_write(&job->log, us_opt_str(o, "run"), provenance, err);
  if (status == US_OK && us_opt_str(o, "plot")) status = draw(job, us_opt_str(o, "plot"), provenance, err);
  return status == US_OK ? us_record_emit(job->run->out, us_opt_flag(o, "json"), path, "draft", err) : status;
}

static enum us_status train(struct job *job, struct us_err *err) {
  struct us_opts *o = job->run->opts;
  struct us_err log_err = {0};
  bool trains = us_opt_str(o, "output");
  enum us_status status = us_pool_create((int)us_opt_int(o, "threads"), &job->pool, err);
  if (status == US_OK) status = us_tool_open_learner(job->run, job->pool, &job->learner, err);
  job->train.learner = job->learner;
  job->leads = status == US_OK && us_learner_leads(job->learner);
  if (us_dflash_drafter_only_rounds(o)) return status;
  if (status == US_OK && trains) status = us_trainer_check(&job->train.trainer, job->train.resume, err);
  if (status == US_OK) status = make_answers(job, err);
  if (status == US_OK && trains)
    status = us_run_log_open(&job->log, columns, FIXED + job->train.shape.block - 1,
                             job->leads ? us_opt_str(o, "log") : NULL, job->train.resume, err);
  if (status != US_OK || !trains) return status;
  us_progress_start(&job->progress, job->run->quiet || !job->leads ? NULL : stderr, "distilling", "steps",
                    job->train.trainer.steps);
  job->progress.limit = 60 * job->train.trainer.minutes;
  status = us_dflash(&job->train, job->pool, err);
  us_progress_end(&job->progress);
  if (us_run_log_close(&job->log, &log_err) != US_OK && status == US_OK)
    status = us_err_set(err, log_err.status, "%s", log_err.message);
  if (status == US_OK && job->leads) say_accuracy(job);
  return status;
}

static double own_head_bytes(const struct us_draft_shape *s) {
  return (double)(us_matrix_data_bytes(s->head, s->vocab, s->hidden) +
                  us_matrix_scale_bytes(s->head, s->vocab, s->hidden, 0));
}

/* --dry-run: the drafter that would be trained. */
static enum us_status print_plan(const struct job *job, struct us_err *err) {
  static const char *const plan[] = {"layers",   "hidden",        "inner",         "heads",
                                     "kv_heads", "window",        "block",         "parameters",
                                     "bytes",    "rows_per_step", "gflop_per_step"};
  const struct us_dflash *t = &job->train;
  const struct us_attention_shape *a = &t->shape.attention;
  struct us_table *table;
  enum us_status status =
      us_table_open(job->run->out, plan, 11, us_opt_flag(job->run->opts, "json"), &table, err);
  if (status != US_OK) return status;
  double D = t->shape.hidden, width = us_attention_qkv_rows(a), wide = (double)a->q_heads * a->v_dim;
  double layer = D * (width + wide + 3.0 * t->shape.inner) + 2.0 * D + 2.0 * a->qk_dim + a->q_heads;
  double parameters = t->shape.layers * layer + D * D * t->shape.taps + 3.0 * D + 2.0 * D * t->shape.markov;
  double blocks = (double)t->batch * (double)t->anchors;
  us_table_int(table, t->shape.layers);
  us_table_int(table, t->shape.hidden);
  us_table_int(table, t->shape.inner);
  us_table_int(table, a->q_heads);
  us_table_int(table, a->kv_heads);
  us_table_int(table, a->window);
  us_table_int(table, t->shape.block);
  us_table_num(table, parameters);
  us_table_num(table, 2.0 * parameters + own_head_bytes(&t->shape));
  us_table_num(table, blocks * t->shape.block);
  us_table_num(table, 1e-9 * blocks * us_draft_train_block_flops(&t->shape, 0.5 * (double)t->length));
  return us_table_close(table, err);
}

static enum us_status run_tool(struct us_tool_run *tool_run, struct us_err *err) {
  struct job job = {.run = tool_run};
  char *provenance = NULL;
  enum us_status status = open_inputs(&job, err);
  if (status == US_OK && us_opt_flag(tool_run->opts, "dry-run")) {
    status = print_plan(&job, err);
  } else {
    if (status == US_OK) status = make_provenance(&job, &provenance, err);
    if (status == US_OK) status = train(&job, err);
    if (status == US_OK && job.leads && us_opt_str(tool_run->opts, "output"))
      status = write_outputs(&job, provenance, err);
  }
  us_dflash_release(&job.train);
  us_dflash_answers_release(&job.answers);
  us_run_log_release(&job.log);
  us_learner_free(job.learner);
  us_pool_free(job.pool);
  us_shards_close(job.shards);
  us_dflash_drafter_release(&job.drafter);
  us_model_free(job.target);
  us_record_release(&job.target_record);
  free(provenance);
  return status;
}

static const struct us_tool tool = {
    .name = "dflash-train",
    .summary = "distil a DFlash drafter from a model",
    .description =
        "Trains a block drafter for a frozen target. In every step sequences run through the target, the "
        "residual streams after its tapped layers become the drafter's context, and blocks at random anchors "
        "learn the tokens that follow. The sequences are text, or, with --generate, answers that the target "
        "writes to prompts taken from that text; without --data it continues from its end-of-text token. "
        "Only the drafter's own tensors are trained; embedding and head stay the target's, but for --head, "
        "which gives the drafter a copy of the head that it reads instead.\n\n"
        "The log has, for training blocks, the loss, the accuracy of every slot and the simulated acceptance "
        "length: one more than the slots before the first miss, as greedy verification counts them when the "
        "text is the target's own.\n\n"
        "With --state the run is kept in two files that take turns, so that it can be killed at any moment "
        "and resumed to the same bits.",
    .examples =
        "# a drafter of 1.3 MB, distilled from 4,000 answers of the target itself\n"
        "dflash-train -t q.h5 --data text.h5 -g 4000 --temperature 0 --text-share 0.3 --anchors 64 -b 16 -l "
        "320 "
        "-o d.h5 --steps 0 --minutes 8\n"
        "# fit an existing drafter to a quantized target and use it\n"
        "qat-quant pico.h5 -o q.h5 | dflash-train -t - --data text.h5 --init pico-draft.h5 --steps 200 "
        "--lr 0.0007 -o d.h5",
    .opts = opts,
    .run = run_tool,
};

int main(int argc, char **argv) {
  return us_tool_main(&tool, argc, argv);
}
