/* pretrain.c: a base model from scratch on token shards.
 *
 * Contents: evaluation; a step; the run.
 */
#include "training/pretrain.h"
#include "kernels/head_loss/head_loss.h"
#include "training/rows.h"

#define MOST_ROWS 16384

/* Everything a run holds beside its parameters. */
struct session {
  struct us_pretrain *run;
  struct us_seq seq;
  struct us_model_train *train;
  struct us_window window;
  struct us_rows rows;
  size_t micro;    /* sequences of a forward pass */
  double loss_sum; /* since the last line */
  uint64_t loss_steps, tokens_then;
  double seconds_then;
};

static struct us_head_loss head_of(const struct session *s) {
  const struct us_shape *shape = s->run->shape;
  return (struct us_head_loss){.R = s->rows.R,
                               .D = shape->hidden,
                               .N = shape->vocab,
                               .x = s->train->hidden,
                               .head = s->train->head->compute,
                               .label = s->rows.label,
                               .weight = s->rows.weight,
                               .scale = 1.0f};
}

/* --- evaluation --- */

/* Nats a token over the first `windows` held-out windows (0: all); the weights in use are those of the last refresh. */
static enum us_status evaluate(struct session *s, size_t windows, struct us_pretrain_log *log,
                               struct us_err *err) {
  struct us_pretrain *run = s->run;
  size_t count = us_shards_n_heldout(run->shards, run->length + 1), counted = 0;
  double total = 0.0;
  log->heldout = log->bits_per_byte = (double)NAN;
  if (windows && windows < count) count = windows;
  enum us_status status = us_params_refresh(&run->params, s->seq.pool, s->seq.rounding, err);
  for (size_t i = 0; i < count && status == US_OK;) {
    s->rows.R = 0;
    for (size_t j = 0; j < s->micro && i < count; j++, i++) {
      us_shards_heldout(run->shards, i, &s->window);
      us_rows_add(&s->rows, &s->window, false);
    }
    if (!s->rows.R) continue;
    struct us_batch batch = us_rows_batch(&s->rows);
    status = us_model_train_forward(s->train, &batch, NULL, err);
    struct us_head_loss head = head_of(s);
    us_head_loss(&s->seq, &head);
    total += head.total;
    counted += head.counted;
  }
  us_model_train_clear_load(s->train);
  if (status != US_OK || !counted) return status;
  log->heldout = total / (double)counted;
  double tokens = (double)us_shards_tokens(run->shards, US_PART_HELDOUT);
  double bytes = (double)us_shards_text_bytes(run->shards, US_PART_HELDOUT);
  log->bits_per_byte = log->heldout * tokens / bytes * 1.4426950408889634;
  return US_OK;
}

/* --- a step --- */

/* Weight of all labels of the step, so that each forward pass knows its share of the mean. */
static double count_labels(struct session *s, uint64_t step) {
  struct us_pretrain *run = s->run;
  if (!run->marked_only) return (double)run->batch * (double)run->length;
  double labels = 0.0;
  for (size_t i = 0; i < run->batch; i++) {
    us_shards_sample(run->shards, run->seed, step, i, &s->window);
    for (size_t k = 1; k < s->window.n; k++) labels += s->window.loss[k];
  }
  return labels;
}

static enum us_status micro_step(struct session *s, size_t first, size_t sequences, double labels,
                                 double *loss, struct us_err *err) {
  struct us_pretrain *run = s->run;
  s->rows.R = 0;
  for (size_t i = first; i < first + sequences; i++) {
    us_shards_sample(run->shards, run->seed, run->trainer.step, i, &s->window);
    us_rows_add(&s->rows, &s->window, run->marked_only);
  }
  struct us_batch batch = us_rows_batch(&s->rows);
  enum us_status status = us_model_train_forward(s->train, &batch, NULL, err);
  if (status != US_OK) return status;
  struct us_head_loss head = head_of(s);
  head.scale = labels > 0.0 ? (float)(1.0 / labels) : 0.0f;
  head.dx = s->train->dhidden;
  head.dhead = us_param_grad(s->train->head);
  us_head_loss(&s->seq, &head);
  *loss += head.total;
  return us_model_train_backward(s->train, err);
}

static double imbalance_of(const struct us_model_train *train) {
  double worst = 0.0;
  for (uint32_t l = 0; l < train->shape.layers; l++) {
    uint64_t total = 0, largest = 0;
    for (uint32_t e = 0; e < train->shape.experts; e++) {
      uint64_t load = train->load[(size_t)l * train->shape.experts + e];
      total += load;
      if (load > largest) largest = load;
    }
    double ratio = total ? (double)largest * train->shape.experts / (double)total : 0.0;
    if (ratio > worst) worst = ratio;
  }
  return worst;
}

/* The bias moves fast while the experts find their roles and settles with the learning rate. */
static float balance_now(const struct us_pretrain *run) {
  const struct us_schedule *schedule = &run->trainer.schedule;
  double progress = us_trainer_progress(&run->trainer);
  if (progress < schedule->warmup || !(schedule->peak > 0.0)) return run->balance_rate;
  return (float)((double)run->balance_rate * us_schedule_rate(schedule, progress) / schedule->peak);
}

static enum us_status take_step(void *arg, struct us_err *err) {
  struct session *s = arg;
  struct us_pretrain *run = s->run;
  double labels = count_labels(s, run->trainer.step), loss = 0.0;
  enum us_status status = us_trainer_open_step(&run->trainer, err);
  for (size_t i = 0; i < run->batch && status == US_OK; i += s->micro)
    status = micro_step(s, i, run->batch - i < s->micro ? run->batch - i : s->micro, labels, &loss, err);
  if (status != US_OK) return status;
  run->last.imbalance = imbalance_of(s->train);
  us_model_train_balance(s->train, balance_now(run)); /* before the save that may follow */
  status = us_trainer_close_step(&run->trainer, loss, run->batch * run->length, err);
  s->loss_sum += loss;
  s->loss_steps++;
  return status;
}

/* --- the run --- */

static void write_log(struct session *s) {
  struct us_pretrain *run = s->run;
  struct us_pretrain_log *log = &run->last;
  double now = us_trainer_seconds(&run->trainer), spent = now - s->seconds_then;
  log->step = run->trainer.step, log->tokens = run->trainer.tokens, log->seconds = now;
  log->rate = run->trainer.rate, log->norm = run->trainer.norm;
  if (s->loss_steps) {
    log->loss = s->loss_sum / (double)s->loss_steps;
    log->tokens_per_second = spent > 0.0 ? (double)(log->tokens - s->tokens_then) / spent : 0.0;
    log->gflops = 3e-9 * us_model_train_flops(run->shape, 0.5 * (double)run->length) * log->tokens_per_second;
  }
  if (run->on_log) run->on_log(run->log_arg, log);
  s->loss_sum = 0.0, s->loss_steps = 0, s->tokens_then = log->tokens;
  s->seconds_then = us_trainer_seconds(&run->trainer);
}

static enum us_status report(void *arg, bool evaluates, struct us_err *err) {
  struct session *s = arg;
  struct us_pretrain *run = s->run;
  size_t windows = us_trainer_done(&run->trainer) ? 0 : run->eval_windows;
  run->last.heldout = run->last.bits_per_byte = (double)NAN;
  enum us_status status = evaluates ? evaluate(s, windows, &run->last, err) : US_OK;
  if (status == US_OK) write_log(s);
  return status;
}

static enum us_status train(struct session *s, struct us_err *err) {
  struct us_pretrain *run = s->run;
  struct us_trainer_loop loop = {.arg = s,
                                 .step = take_step,
                                 .report = report,
                                 .log_every = run->log_every,
                                 .eval_every = run->eval_every,
                                 .interrupted = run->interrupted};
  return us_trainer_run(&run->trainer, &loop, err);
}

static enum us_status open_session(struct session *s, struct us_err *err) {
  struct us_pretrain *run = s->run;
  size_t rows = s->micro * run->length;
  enum us_status status = us_window_init(&s->window, run->length + 1, err);
  if (status == US_OK) status = us_rows_init(&s->rows, rows, err);
  if (status == US_OK)
    status = us_params_init_fresh(&run->params, run->shape, run->seed, run->deviation, err);
  if (status == US_OK)
    status = us_model_train_create(run->shape, &run->params, &s->seq, rows, run->memory, &s->train, err);
  return status;
}

static void close_session(struct session *s) {
  us_model_train_free(s->train);
  us_window_release(&s->window);
  us_rows_release(&s->rows);
  us_seq_release(&s->seq);
}

enum us_status us_pretrain(struct us_pretrain *run, struct us_pool *pool, struct us_err *err) {
  struct session s = {.run = run};
  if (!run->batch || !run->length || run->length > MOST_ROWS * 8)
    return us_err_set(err, US_ERR_USAGE, "%zu sequences of %zu tokens a step", run->batch, run->length);
  if (!us_shards_can_sample(run->shards, run->length + 1))
    return us_err_set(err, US_ERR_INPUT, "the shards hold fewer than %zu training tokens", run->length + 1);
  if ((uint32_t)us_shards_vocab(run->shards) > run->shape->vocab)
    return us_err_set(err, US_ERR_INPUT, "the shards use %d tokens, the shape has %u",
                      us_shards_vocab(run->shards), run->shape->vocab);
  s.micro = run->micro ? run->micro : run->length < MOST_ROWS ? MOST_ROWS / run->length : 1;
  if (s.micro > run->batch) s.micro = run->batch;
  us_seq_init(&s.seq, pool, US_SEQ_ROUND_BF16);
  enum us_status status = open_session(&s, err);
  run->trainer.params = &run->params;
  run->trainer.seq = &s.seq;
  if (status == US_OK) status = us_trainer_start(&run->trainer, run->resume, err);
  s.tokens_then = run->trainer.tokens;
  s.seconds_then = status == US_OK ? us_trainer_seconds(&run->trainer) : 0.0;
  if (status == US_OK) status = train(&s, err);
  close_session(&s);
  run->trainer.seq = NULL;
  return status;
}

void us_pretrain_release(struct us_pretrain *run) {
  us_params_release(&run->params);
}
