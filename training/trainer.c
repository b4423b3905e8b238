/* trainer.c: what every training loop does around its forward and backward pass. */
#include "training/trainer.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

static double clock_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Processes on several machines need one file system for the state: say so rather than train apart. */
static enum us_status same_step(const struct us_trainer *t, struct us_err *err) {
  struct us_learner *learner = t->set->learner;
  double sum = (double)t->step;
  enum us_status status = us_learner_sum(learner, &sum, 1, err);
  if (status == US_OK && sum != (double)t->step * (double)learner->processes)
    return us_err_set(err, US_ERR_INPUT,
                      "%s: this process found step %llu, others another: do all see the same files?",
                      t->state_path, (unsigned long long)t->step);
  return status;
}

enum us_status us_trainer_check(const struct us_trainer *t, bool resume, struct us_err *err) {
  if (!t->steps && !(t->minutes > 0.0))
    return us_err_set(err, US_ERR_USAGE, "neither steps nor minutes are given");
  if (t->state_path && !resume && us_train_state_exists(t->state_path))
    return us_err_set(err, US_ERR_USAGE, "%s.0 or .1 holds an earlier run: resume it, or remove both",
                      t->state_path);
  return US_OK;
}

enum us_status us_trainer_start(struct us_trainer *t, bool resume, struct us_err *err) {
  enum us_status status = us_trainer_check(t, resume, err);
  if (status != US_OK) return status;
  t->step = t->tokens = 0;
  t->saved = UINT64_MAX;
  t->under_way = NULL;
  t->rate = t->norm = (double)NAN;
  t->before = 0.0;
  t->slot = 0;
  if (t->state_path && resume) {
    struct us_train_state state = {.params = t->set->params, .options = t->options};
    bool found = false;
    status = us_train_state_read(t->state_path, &state, &found, err);
    if (status != US_OK) return status;
    t->step = state.step, t->tokens = state.tokens, t->before = state.seconds, t->slot = state.slot;
    if (found) t->saved = state.step;
    if (found) status = us_learner_send(t->set, err);
    if (status == US_OK) status = same_step(t, err);
    if (status != US_OK) return status;
  }
  t->started = clock_now();
  return US_OK;
}

double us_trainer_seconds(const struct us_trainer *t) {
  return t->before + clock_now() - t->started;
}

double us_trainer_progress(const struct us_trainer *t) {
  double by_steps = t->steps ? (double)t->step / (double)t->steps : 0.0;
  double by_time = t->minutes > 0.0 ? us_trainer_seconds(t) / (60.0 * t->minutes) : 0.0;
  double progress = by_steps > by_time ? by_steps : by_time;
  return progress < 1.0 ? progress : 1.0;
}

enum us_status us_trainer_agree(const struct us_trainer *t, double *ret_progress, struct us_err *err) {
  *ret_progress = us_learner_leads(t->set->learner) ? us_trainer_progress(t) : 0.0;
  return us_learner_sum(t->set->learner, ret_progress, 1, err);
}

bool us_trainer_done(const struct us_trainer *t) {
  return (t->steps && t->step >= t->steps) ||
         (t->minutes > 0.0 && us_trainer_seconds(t) >= 60.0 * t->minutes);
}

enum us_status us_trainer_open_step(struct us_trainer *t, struct us_err *err) {
  enum us_status status = us_learner_refresh(t->set, err);
  if (status != US_OK) {
    us_err_prefix(err, "step %llu", (unsigned long long)t->step);
    return status;
  }
  us_learner_zero_grad(t->set);
  return US_OK;
}

/* --- saving --- */

/* What the writing thread works on; the trainer's clock goes on meanwhile. */
struct us_trainer_save {
  pthread_t thread;
  const char *path;
  struct us_train_state state;
  enum us_status status;
  struct us_err err;
};

static void *write_state(void *arg) {
  struct us_trainer_save *s = arg;
  s->status = us_train_state_write(s->path, &s->state, &s->err);
  return NULL;
}

enum us_status us_trainer_settle(struct us_trainer *t, struct us_err *err) {
  struct us_trainer_save *s = t->under_way;
  if (!s) return US_OK;
  pthread_join(s->thread, NULL);
  t->under_way = NULL;
  t->slot = s->state.slot;
  enum us_status status = s->status == US_OK ? US_OK : us_err_set(err, s->status, "%s", s->err.message);
  free(s);
  return status;
}

static enum us_status write_meanwhile(struct us_trainer *t, const struct us_train_state *state,
                                      struct us_err *err) {
  struct us_trainer_save *s = calloc(1, sizeof *s);
  if (!s) return us_err_memory(err, "saving", sizeof *s);
  s->path = t->state_path;
  s->state = *state;
  if (pthread_create(&s->thread, NULL, write_state, s) != 0) {
    free(s);
    return us_err_set(err, US_ERR_MEMORY, "cannot start a thread that saves");
  }
  t->under_way = s;
  return US_OK;
}

static enum us_status save(struct us_trainer *t, struct us_err *err) {
  enum us_status status = us_trainer_settle(t, err);
  if (status == US_OK) status = us_learner_fetch(t->set, true, err);
  if (status != US_OK) return status;
  t->saved = t->step;
  if (!us_learner_leads(t->set->learner)) return US_OK;
  struct us_train_state state = {.params = t->set->params,
                                 .options = t->options,
                                 .step = t->step,
                                 .tokens = t->tokens,
                                 .seconds = us_trainer_seconds(t),
                                 .slot = t->slot};
  if (t->set->learner->apart) return write_meanwhile(t, &state, err);
  status = us_train_state_write(t->state_path, &state, err);
  if (status != US_OK) return status;
  t->slot = state.slot;
  return US_OK;
}

/* --- steps --- */

enum us_status us_trainer_close_step(struct us_trainer *t, double loss, uint64_t tokens, struct us_err *err) {
  const struct us_param *p = NULL;
  double progress = 0.0;
  enum us_status status = us_learner_clip(t->set, t->clip, &t->norm, err);
  if (status == US_OK && (!isfinite(loss) || !isfinite(t->norm))) {
    status = us_learner_nonfinite(t->set, &p, err);
    if (status != US_OK) return status;
    return us_err_set(err, US_ERR_CHECK,
                      "step %llu: loss %g, gradient of %s is not finite; nothing was updated",
                      (unsigned long long)t->step, loss, p ? p->name : "no tensor");
  }
  if (status == US_OK) status = us_trainer_agree(t, &progress, err);
  if (status != US_OK) return status;
  /* The middle of the step: the first rate is not 0, the last not the floor's end. */
  double half = t->steps ? 0.5 / (double)t->steps : 0.0;
  t->rate = us_schedule_rate(&t->schedule, progress + half);
  t->optim.oscillation = us_freeze_rule(&t->freeze, progress + half);
  t->optim.step = t->step + 1;
  status = us_learner_update(t->set, &t->optim, t->rate, err);
  if (status != US_OK) return status;
  t->step++;
  t->tokens += tokens;
  return t->state_path && t->save_every && t->step % t->save_every == 0 ? save(t, err) : US_OK;
}

enum us_status us_trainer_finish(struct us_trainer *t, struct us_err *err) {
  enum us_status status = t->state_path && t->saved != t->step ? save(t, err) : US_OK;
  return status == US_OK ? us_trainer_settle(t, err) : status;
}

/* Whether to go on: one interrupted process stops all, and the leading one's clock ends the run. */
static enum us_status ask(struct us_trainer *t, const struct us_trainer_loop *loop, bool *ret_interrupted,
                          bool *ret_done, struct us_err *err) {
  double votes[2] = {loop->interrupted && loop->interrupted() ? 1.0 : 0.0,
                     us_learner_leads(t->set->learner) && us_trainer_done(t) ? 1.0 : 0.0};
  enum us_status status = us_learner_sum(t->set->learner, votes, 2, err);
  *ret_interrupted = votes[0] > 0.0, *ret_done = votes[1] > 0.0;
  return status;
}

static enum us_status run_steps(struct us_trainer *t, const struct us_trainer_loop *loop,
                                struct us_err *err) {
  bool interrupted = false, done = false;
  enum us_status status = ask(t, loop, &interrupted, &done, err);
  while (status == US_OK && !done) {
    if (interrupted) {
      status = us_trainer_finish(t, err);
      if (status != US_OK) return status;
      return us_err_set(err, US_INTERRUPTED, "interrupted after step %llu", (unsigned long long)t->step);
    }
    status = loop->step(loop->arg, err);
    if (status == US_OK) status = ask(t, loop, &interrupted, &done, err);
    if (status != US_OK || done) break;
    bool evaluates = loop->eval_every && t->step % loop->eval_every == 0;
    if (evaluates || (loop->log_every && t->step % loop->log_every == 0))
      status = loop->report(loop->arg, evaluates, err);
  }
  if (status == US_OK) status = us_trainer_finish(t, err);
  return status == US_OK ? loop->report(loop->arg, true, err) : status;
}

enum us_status us_trainer_run(struct us_trainer *t, const struct us_trainer_loop *loop, struct us_err *err) {
  struct us_err second = {0}; /* the first error is the one to tell */
  enum us_status status = run_steps(t, loop, err);
  enum us_status settled = us_trainer_settle(t, &second);
  if (status != US_OK || settled == US_OK) return status;
  return us_err_set(err, settled, "%s", second.message);
}
