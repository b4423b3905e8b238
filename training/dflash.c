/* dflash.c: distil a DFlash drafter from a frozen target.
 *
 * Contents: sequences; a pass; a step; evaluation; the run.
 */
#include "training/dflash.h"

#include "base/philox.h"
#include "model/precision.h"
#include "training/rows.h"

#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 8192 /* block rows: 32 tasks of US_SEQ_BLOCK, and 250 MB of activations at pico's size */

/* What a lane fills its passes from. */
struct lane {
  struct us_window window;
  struct us_rows rows;
  struct us_draft_blocks blocks;
  uint64_t tokens, block_rows; /* of the step */
};

/* Everything a run holds beside its parameters. */
struct session {
  struct us_dflash *run;
  struct us_pool *pool;
  struct us_learner *learner;
  struct us_params target_params;
  struct us_learner_set *target_set, *set;
  struct us_learner_model *target;
  struct us_learner_draft *draft;
  struct lane *lanes;
  size_t micro;
  size_t sequences;            /* of the evaluation */
  struct us_draft_tally since; /* the last line */
  uint64_t rows_then, tokens_then;
  double seconds_then;
};

/* --- sequences --- */

/* Sequence `index` of a step into the window. */
static void draw_sequence(const struct us_dflash *run, struct lane *lane, uint64_t step, uint64_t index) {
  uint32_t word[4];
  us_philox_quad(us_philox_key(run->seed), (uint32_t)step, (uint32_t)index, UINT32_MAX, US_STREAM_SHUFFLE,
                 word);
  double u = (double)word[0] * 0x1p-32, v = (double)(((uint64_t)word[1] << 32 | word[2]) >> 11) * 0x1p-53;
  if (run->answers && (u >= run->text_share || !run->shards))
    us_responses_window(run->answers, (size_t)(v * (double)run->answers->n), &lane->window);
  else
    us_shards_sample_across(run->shards, run->seed, step, index, run->across, &lane->window);
}

/* Put the window's rows and blocks behind those of the pass. */
static void add_sequence(const struct us_dflash *run, struct lane *lane, uint64_t step, uint64_t index) {
  size_t first = lane->rows.R, n = us_rows_add(&lane->rows, &lane->window, true);
  us_draft_cut_labels(&lane->rows, first, &lane->window);
  us_draft_blocks_add(&lane->blocks, &lane->rows, first, n, run->anchors, run->seed, step, index);
}

/* --- a pass --- */

/* Forward of target and drafter over what was added; loss, and with `gradient` the backward pass. */
static enum us_status run_pass(struct session *s, uint32_t lane, bool gradient, struct us_err *err) {
  struct lane *own = &s->lanes[lane];
  struct us_batch batch = us_rows_batch(&own->rows);
  if (!own->blocks.n) return US_OK;
  us_draft_blocks_aim(&own->blocks, own->rows.R);
  return us_learner_draft_pass(s->draft, lane, &batch, &own->blocks, gradient, err);
}

static void clear_pass(struct lane *lane) {
  lane->rows.R = 0;
  lane->blocks.n = 0;
}

/* --- a step --- */

static enum us_status step_lane(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  struct us_dflash *run = s->run;
  struct lane *own = &s->lanes[lane];
  uint64_t step = run->trainer.step;
  size_t i, end;
  enum us_status status = US_OK;
  us_learner_share(s->learner, lane, run->batch, &i, &end);
  own->tokens = own->block_rows = 0;
  while (i < end && status == US_OK) {
    clear_pass(own);
    for (size_t j = 0; j < s->micro && i < end; j++, i++) {
      draw_sequence(run, own, step, i);
      add_sequence(run, own, step, i);
    }
    own->tokens += own->rows.R;
    own->block_rows += own->blocks.n * own->blocks.B;
    status = run_pass(s, lane, true, err);
  }
  return status;
}

/* Context tokens and block rows of all ranks' passes. */
static enum us_status count_rows(struct session *s, uint64_t *ret_tokens, struct us_err *err) {
  double sums[2] = {0.0, 0.0};
  for (uint32_t i = 0; i < s->learner->lanes; i++) {
    sums[0] += (double)s->lanes[i].tokens;
    sums[1] += (double)s->lanes[i].block_rows;
  }
  enum us_status status = us_learner_sum(s->learner, sums, 2, err);
  *ret_tokens = (uint64_t)sums[0];
  s->run->last.rows += (uint64_t)sums[1];
  return status;
}

static enum us_status take_step(void *arg, struct us_err *err) {
  struct session *s = arg;
  struct us_dflash *run = s->run;
  struct us_draft_tally sum = {0};
  uint64_t tokens = 0;
  enum us_status status = us_trainer_open_step(&run->trainer, err);
  if (status == US_OK) status = us_learner_each(s->learner, step_lane, s, err);
  if (status == US_OK) status = us_learner_draft_tally(s->draft, &sum, err);
  if (status == US_OK) status = count_rows(s, &tokens, err);
  if (status != US_OK) return status;
  /* The weights' sum is known only now that every block has told its confidence. */
  if (sum.weight > 0.0) us_learner_scale_grad(s->set, (float)(1.0 / sum.weight));
  us_draft_tally_add(&s->since, &sum);
  double loss = sum.weight > 0.0 ? us_draft_tally_loss(&sum) : 0.0;
  return us_trainer_close_step(&run->trainer, loss, tokens, err);
}

/* --- evaluation --- */

static size_t heldout_count(const struct us_dflash *run) {
  size_t count = run->heldout  ? run->heldout->n
                 : run->shards ? us_shards_n_heldout(run->shards, run->length + 1)
                               : 0;
  return run->eval_sequences && run->eval_sequences < count ? run->eval_sequences : count;
}

static enum us_status evaluate_lane(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  struct us_dflash *run = s->run;
  struct lane *own = &s->lanes[lane];
  size_t i, end;
  enum us_status status = US_OK;
  us_learner_share(s->learner, lane, s->sequences, &i, &end);
  while (i < end && status == US_OK) {
    clear_pass(own);
    for (size_t j = 0; j < s->micro && i < end; j++, i++) {
      if (run->heldout)
        us_responses_window(run->heldout, i, &own->window);
      else
        us_shards_heldout(run->shards, i, &own->window);
      add_sequence(run, own, UINT32_MAX, i);
    }
    status = run_pass(s, lane, false, err);
  }
  return status;
}

/* On held-out sequences, each with the anchors of a step that is never taken. */
static enum us_status evaluate(struct session *s, struct us_err *err) {
  s->sequences = heldout_count(s->run);
  enum us_status status = us_learner_refresh(s->set, err);
  if (status == US_OK) status = us_learner_each(s->learner, evaluate_lane, s, err);
  return status == US_OK ? us_learner_draft_tally(s->draft, &s->run->last.heldout, err) : status;
}

/* --- the run --- */

static double gigaflops(const struct us_dflash *run, uint64_t rows, uint64_t tokens) {
  double keys = 0.5 * (double)run->length, blocks = (double)rows / run->shape.block;
  return 1e-9 * (blocks * us_draft_train_block_flops(&run->shape, keys) +
                 (double)tokens * (us_draft_train_context_flops(&run->shape) +
                                   us_model_train_flops(&run->target->shape, keys)));
}

static void write_log(struct session *s) {
  struct us_dflash *run = s->run;
  struct us_dflash_log *log = &run->last;
  double now = us_trainer_seconds(&run->trainer), spent = now - s->seconds_then;
  log->step = run->trainer.step, log->tokens = run->trainer.tokens, log->seconds = now;
  log->rate = run->trainer.rate, log->norm = run->trainer.norm;
  if (s->since.weight > 0.0) {
    log->train = s->since;
    log->rows_per_second = spent > 0.0 ? (double)(log->rows - s->rows_then) / spent : 0.0;
    log->gflops =
        spent > 0.0 ? gigaflops(run, log->rows - s->rows_then, log->tokens - s->tokens_then) / spent : 0.0;
    log->mfu = s->learner->peak > 0.0 ? 1e9 * log->gflops / s->learner->peak : (double)NAN;
  }
  if (run->on_log) run->on_log(run->log_arg, log);
  s->since = (struct us_draft_tally){0};
  s->rows_then = log->rows, s->tokens_then = log->tokens;
  s->seconds_then = us_trainer_seconds(&run->trainer);
}

static enum us_status report(void *arg, bool evaluates, struct us_err *err) {
  struct session *s = arg;
  s->run->last.heldout = (struct us_draft_tally){0};
  enum us_status status = evaluates ? evaluate(s, err) : US_OK;
  if (status == US_OK) write_log(s);
  return status;
}

static enum us_status train(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  struct us_trainer_loop loop = {.arg = s,
                                 .step = take_step,
                                 .report = report,
                                 .log_every = run->log_every,
                                 .eval_every = run->eval_every,
                                 .interrupted = run->interrupted};
  return us_trainer_run(&run->trainer, &loop, err);
}

/* Fresh layers begin close to the identity: the embedding of an anchor (RMS 0.05 in pico) is not drowned by branches of
 * RMS 1. After 150 steps the held-out loss was 4.64 instead of 4.74. */
static void quiet_branches(struct us_params *params) {
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    if (!strstr(p->name, "o_proj") && !strstr(p->name, "down_proj") && !strstr(p->name, "markov_out"))
      continue;
    for (size_t k = 0; k < p->rows * p->cols; k++) p->value[k] *= 0.1f;
  }
}

/* The drafter's tensors from `init`, whose head may be another than the run's. */
static enum us_status continue_from(struct us_dflash *run, struct us_draft *init, struct us_err *err) {
  struct us_draft *other = NULL;
  enum us_status status = US_OK;
  if (run->shape.head != init->shape.head)
    status = us_draft_with_head(init, run->head ? &run->target->head : NULL, run->head, NULL, &other, err);
  if (status == US_OK) status = us_params_init_draft(&run->params, other ? other : init, false, err);
  us_draft_free(other);
  return status;
}

/* The loss of a frozen head's rows is what it would be when drafting: the copy is rounded before it is multiplied. */
static void copy_head(struct us_dflash *run) {
  struct us_param *head = us_params_find(&run->params, "lm_head.weight");
  if (!head) return;
  head->frozen = true;
  if (!run->head) return;
  us_matrix_decode(&run->target->head, head->value);
  head->encoding = *run->head;
}

static enum us_status open_params(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  enum us_status status = us_params_init_model(&s->target_params, run->target, s->pool, true, err);
  if (status == US_OK)
    status = run->init ? continue_from(run, run->init, err)
                       : us_params_init_fresh_draft(&run->params, &run->shape, run->seed, 0.0f, err);
  if (status != US_OK) return status;
  if (!run->init) quiet_branches(&run->params);
  for (size_t i = 0; run->encoding && i < run->params.count; i++)
    if (strcmp(run->params.items[i].family, "draft") == 0) run->params.items[i].encoding = *run->encoding;
  copy_head(run);
  struct us_param *mask = us_params_find(&run->params, "mask_embedding");
  if (mask && run->fixed_mask) mask->frozen = true;
  return US_OK;
}

static enum us_status open_lane(const struct session *s, struct lane *lane, struct us_err *err) {
  const struct us_dflash *run = s->run;
  enum us_status status = us_window_init(&lane->window, run->length + 1, err);
  if (status == US_OK) status = us_rows_init(&lane->rows, s->micro * run->length, err);
  if (status == US_OK)
    status = us_draft_blocks_init(&lane->blocks, &run->shape, s->micro * run->anchors, err);
  return status;
}

static enum us_status open_models(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  enum us_status status = us_learner_place(s->learner, &s->target_params, &s->target_set, err);
  if (status == US_OK) status = us_learner_place(s->learner, &run->params, &s->set, err);
  if (status == US_OK)
    status = us_learner_model_create(s->target_set, &run->target->shape, s->micro * run->length,
                                     US_TRAIN_FORWARD, &s->target, err);
  if (status == US_OK)
    status = us_learner_draft_create(s->set, &run->shape, s->target, &run->loss, s->micro * run->anchors,
                                     &s->draft, err);
  return status;
}

static enum us_status open_session(struct session *s, struct us_err *err) {
  s->lanes = calloc(s->learner->lanes, sizeof *s->lanes);
  enum us_status status = s->lanes ? US_OK : us_err_memory(err, "lanes", sizeof *s->lanes);
  for (uint32_t i = 0; i < s->learner->lanes && status == US_OK; i++)
    status = open_lane(s, &s->lanes[i], err);
  if (status == US_OK) status = open_params(s, err);
  return status == US_OK ? open_models(s, err) : status;
}

static void close_session(struct session *s) {
  us_learner_draft_free(s->draft);
  us_learner_model_free(s->target);
  us_learner_remove(s->set);
  us_learner_remove(s->target_set);
  us_params_release(&s->target_params);
  for (uint32_t i = 0; s->lanes && i < s->learner->lanes; i++) {
    us_draft_blocks_release(&s->lanes[i].blocks);
    us_rows_release(&s->lanes[i].rows);
    us_window_release(&s->lanes[i].window);
  }
  free(s->lanes);
}

static enum us_status check_run(const struct us_dflash *run, struct us_err *err) {
  if (!run->batch || run->length < 2 || !run->anchors)
    return us_err_set(err, US_ERR_USAGE, "%zu sequences of %zu tokens and %zu anchors a step", run->batch,
                      run->length, run->anchors);
  if (!run->shards && !run->answers) return us_err_set(err, US_ERR_USAGE, "neither text nor answers");
  if (run->answers && run->answers->length > run->length + 1)
    return us_err_set(err, US_ERR_USAGE, "answers of %zu tokens in sequences of %zu", run->answers->length,
                      run->length);
  if (run->shards && !us_shards_can_sample(run->shards, run->length + 1))
    return us_err_set(err, US_ERR_INPUT, "the shards hold fewer than %zu training tokens", run->length + 1);
  if (run->shards) {
    enum us_status status = us_rows_check_vocabulary(run->shards, run->target, err);
    if (status != US_OK) return status;
  }
  return us_draft_shape_check(&run->shape, &run->target->shape, err);
}

static enum us_status run_session(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  s->micro = us_learner_micro(s->learner, run->micro, PASS_ROWS, run->anchors * run->shape.block, run->batch);
  enum us_status status = us_learner_check_batch(s->learner, run->batch, err);
  if (status == US_OK) status = open_session(s, err);
  run->trainer.set = s->set;
  if (status == US_OK) status = us_trainer_start(&run->trainer, run->resume, err);
  run->last = (struct us_dflash_log){.rows_per_second = (double)NAN, /* until a step is taken */
                                     .gflops = (double)NAN,
                                     .mfu = (double)NAN};
  s->tokens_then = run->trainer.tokens;
  s->seconds_then = status == US_OK ? us_trainer_seconds(&run->trainer) : 0.0;
  if (status == US_OK) status = train(s, err);
  if (status == US_OK) status = us_learner_fetch(s->set, false, err);
  if (status == US_OK) us_learner_part(s->learner);
  close_session(s);
  run->trainer.set = NULL;
  return status;
}

enum us_status us_dflash(struct us_dflash *run, struct us_pool *pool, struct us_err *err) {
  struct session s = {.run = run, .pool = pool, .learner = run->learner};
  struct us_learner *cpu = NULL;
  enum us_status status = check_run(run, err);
  if (status == US_OK && !s.learner) status = us_learner_create_cpu(pool, &cpu, err);
  if (!s.learner) s.learner = cpu;
  if (status == US_OK) status = run_session(&s, err);
  us_learner_free(cpu);
  return status;
}

void us_dflash_release(struct us_dflash *run) {
  us_params_release(&run->params);
}
