/* pretrain.c: a base model from scratch, or from another model's weights, on token shards.
 *
 * Contents: evaluation; a step; the run.
 */
#include "training/pretrain.h"
#include "training/lanes.h"

#include <math.h>
#include <stdlib.h>

#define MOST_ROWS 16384

/* Shares of a run between which the margin's weight climbs from 0: a fresh router's choice, kept as it is, would be one for all tokens. */
#define MARGIN_FROM  0.3
#define MARGIN_WHOLE 0.4

/* Everything a run holds beside its parameters. */
struct session {
  struct us_pretrain *run;
  struct us_pool *pool;
  struct us_learner *learner;
  struct us_learner_set *set;
  struct us_learner_model *model;
  struct us_lanes lanes;
  size_t windows;      /* of the evaluation */
  double labels;       /* of the step */
  float margin_weight; /* of the step */
  double loss_sum;     /* since the last line */
  uint64_t loss_steps, tokens_then;
  double seconds_then;
};

/* --- evaluation --- */

static enum us_status run_pass(struct session *s, uint32_t lane, float scale, bool gradient,
                               struct us_err *err) {
  const struct us_rows *rows = &s->lanes.lane[lane].rows;
  struct us_learner_pass pass = {.batch = us_rows_batch(rows),
                                 .label = rows->label,
                                 .weight = rows->weight,
                                 .scale = scale,
                                 .routers = s->run->score_decay,
                                 .router_target = s->run->score_target,
                                 .margin = s->run->margin,
                                 .margin_weight = s->margin_weight,
                                 .gradient = gradient};
  return us_learner_pass(s->model, lane, &pass, err);
}

static enum us_status evaluate_pass(void *arg, uint32_t lane, struct us_err *err) {
  return run_pass(arg, lane, 1.0f, false, err);
}

static enum us_status evaluate_lane(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  return us_lanes_heldout(&s->lanes, lane, s->windows, s->windows, evaluate_pass, s, err);
}

/* Nats a token over the first `windows` held-out windows (0: all); the weights in use are those of the last refresh. */
static enum us_status evaluate(struct session *s, size_t windows, struct us_pretrain_log *log,
                               struct us_err *err) {
  struct us_pretrain *run = s->run;
  double total = 0.0, counted = 0.0;
  s->windows = us_shards_n_heldout(run->shards, run->length + 1);
  log->heldout = log->bits_per_byte = (double)NAN;
  if (windows && windows < s->windows) s->windows = windows;
  enum us_status status = us_learner_refresh(s->set, err);
  if (status == US_OK) status = us_learner_each(s->learner, evaluate_lane, s, err);
  if (status == US_OK) status = us_learner_total(s->model, &total, &counted, err);
  us_learner_clear_load(s->model);
  if (status != US_OK || !(counted > 0.0)) return status;
  log->heldout = total / counted;
  double tokens = (double)us_shards_tokens(run->shards, US_PART_HELDOUT);
  double bytes = (double)us_shards_text_bytes(run->shards, US_PART_HELDOUT);
  log->bits_per_byte = log->heldout * tokens / bytes * 1.4426950408889634;
  return US_OK;
}

/* --- a step --- */

/* Each forward pass knows its share of the mean over the step. */
static enum us_status step_pass(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  return run_pass(s, lane, s->labels > 0.0 ? (float)(1.0 / s->labels) : 0.0f, true, err);
}

static enum us_status step_lane(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  return us_lanes_step(&s->lanes, lane, s->run->trainer.step, s->run->batch, step_pass, s, err);
}

/* The bias moves fast while the experts find their roles and settles with the learning rate. */
static enum us_status balance(struct session *s, struct us_err *err) {
  struct us_pretrain *run = s->run;
  const struct us_schedule *schedule = &run->trainer.schedule;
  double progress = 0.0;
  float rate = run->balance_rate;
  enum us_status status = us_trainer_agree(&run->trainer, &progress, err);
  if (progress >= schedule->warmup && schedule->peak > 0.0)
    rate = (float)((double)rate * us_schedule_rate(schedule, progress) / schedule->peak);
  return status == US_OK ? us_learner_balance(s->model, rate, &run->last.imbalance, err) : status;
}

/* The step's. */
static enum us_status weigh_margin(struct session *s, struct us_err *err) {
  double progress = 0.0;
  if (!(s->run->margin > 0.0f)) return US_OK;
  enum us_status status = us_trainer_agree(&s->run->trainer, &progress, err);
  double share = (progress - MARGIN_FROM) / (MARGIN_WHOLE - MARGIN_FROM);
  s->margin_weight = s->run->margin_weight * (float)fmin(fmax(share, 0.0), 1.0);
  return status;
}

static enum us_status take_step(void *arg, struct us_err *err) {
  struct session *s = arg;
  struct us_pretrain *run = s->run;
  double loss = 0.0, counted = 0.0;
  s->labels = us_lanes_labels(&s->lanes, run->trainer.step, run->batch);
  enum us_status status = us_trainer_open_step(&run->trainer, err);
  if (status == US_OK) status = weigh_margin(s, err);
  if (status == US_OK) status = us_learner_each(s->learner, step_lane, s, err);
  if (status == US_OK) status = us_learner_total(s->model, &loss, &counted, err);
  if (status == US_OK) status = balance(s, err); /* before the save that may follow */
  if (status != US_OK) return status;
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
    log->mfu = s->learner->peak > 0.0 ? 1e9 * log->gflops / s->learner->peak : (double)NAN;
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
  enum us_status status = us_lanes_open(&s->lanes, err);
  if (status == US_OK)
    status = run->init
                 ? us_params_init_model(&run->params, run->init, s->pool, false, err)
                 : us_params_init_fresh_on(&run->params, run->shape, s->pool, run->seed, run->deviation, err);
  if (status == US_OK) status = us_learner_place(s->learner, &run->params, &s->set, err);
  if (status == US_OK)
    status = us_learner_model_create(s->set, run->shape, s->lanes.micro * run->length, run->memory, &s->model,
                                     err);
  return status;
}

static void close_session(struct session *s) {
  us_learner_model_free(s->model);
  us_learner_remove(s->set);
  us_lanes_close(&s->lanes);
}

static enum us_status check_run(const struct us_pretrain *run, struct us_err *err) {
  if (!run->batch || !run->length || run->length > MOST_ROWS * 8)
    return us_err_set(err, US_ERR_USAGE, "%zu sequences of %zu tokens a step", run->batch, run->length);
  if (!us_shards_can_sample(run->shards, run->length + 1))
    return us_err_set(err, US_ERR_INPUT, "the shards hold fewer than %zu training tokens", run->length + 1);
  if ((uint32_t)us_shards_vocab(run->shards) > run->shape->vocab)
    return us_err_set(err, US_ERR_INPUT, "the shards use %d tokens, the shape has %u",
                      us_shards_vocab(run->shards), run->shape->vocab);
  return US_OK;
}

static enum us_status run_session(struct session *s, struct us_err *err) {
  struct us_pretrain *run = s->run;
  s->lanes = (struct us_lanes){
      .learner = s->learner,
      .shards = run->shards,
      .micro = us_learner_micro(s->learner, run->micro, MOST_ROWS, run->length, run->batch),
      .length = run->length,
      .seed = run->seed,
      .across = run->across,
      .marked_only = run->marked_only,
  };
  enum us_status status = us_learner_check_batch(s->learner, run->batch, err);
  if (status == US_OK) status = open_session(s, err);
  run->trainer.set = s->set;
  if (status == US_OK) status = us_trainer_start(&run->trainer, run->resume, err);
  run->last = (struct us_pretrain_log){
      .loss = (double)NAN, /* until a step is taken: a run that had ended takes none */
      .tokens_per_second = (double)NAN,
      .gflops = (double)NAN,
      .mfu = (double)NAN,
      .imbalance = (double)NAN};
  s->tokens_then = run->trainer.tokens;
  s->seconds_then = status == US_OK ? us_trainer_seconds(&run->trainer) : 0.0;
  if (status == US_OK) status = train(s, err);
  if (status == US_OK) status = us_learner_fetch(s->set, false, err);
  if (status == US_OK) us_learner_part(s->learner);
  close_session(s);
  run->trainer.set = NULL;
  return status;
}

enum us_status us_pretrain(struct us_pretrain *run, struct us_pool *pool, struct us_err *err) {
  struct session s = {.run = run, .pool = pool, .learner = run->learner};
  struct us_learner *cpu = NULL;
  enum us_status status = check_run(run, err);
  if (status == US_OK && !s.learner) status = us_learner_create_cpu(pool, &cpu, err);
  if (!s.learner) s.learner = cpu;
  if (status == US_OK) status = run_session(&s, err);
  us_learner_free(cpu);
  return status;
}

void us_pretrain_release(struct us_pretrain *run) {
  us_params_release(&run->params);
}
