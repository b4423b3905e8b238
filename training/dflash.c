/* dflash.c: distil a DFlash drafter from a frozen target.
 *
 * Contents: sequences; a pass; a step; evaluation; the run.
 */
#include "training/dflash.h"

#include "base/philox.h"
#include "training/rows.h"

#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 8192 /* block rows: 32 tasks of US_SEQ_BLOCK, and 250 MB of activations at pico's size */

/* Everything a run holds beside its parameters. */
struct session {
  struct us_dflash *run;
  struct us_seq seq;
  struct us_params target_params;
  struct us_model_train *target;
  struct us_draft_train *draft;
  struct us_window window;
  struct us_rows rows;
  struct us_draft_blocks blocks;
  float *taps;
  size_t micro;
  const float *embed, *head;
  struct us_draft_tally since; /* the last line */
  uint64_t rows_then, tokens_then;
  double seconds_then;
};

/* --- sequences --- */

/* Sequence `index` of a step into the window. */
static void draw_sequence(struct session *s, uint64_t step, uint64_t index) {
  const struct us_dflash *run = s->run;
  uint32_t word[4];
  us_philox_quad(us_philox_key(run->seed), (uint32_t)step, (uint32_t)index, UINT32_MAX, US_STREAM_SHUFFLE,
                 word);
  double u = (double)word[0] * 0x1p-32, v = (double)(((uint64_t)word[1] << 32 | word[2]) >> 11) * 0x1p-53;
  if (run->answers && (u >= run->text_share || !run->shards))
    us_responses_window(run->answers, (size_t)(v * (double)run->answers->n), &s->window);
  else
    us_shards_sample(run->shards, run->seed, step, index, &s->window);
}

/* Put the window's rows and blocks behind those of the pass. */
static void add_sequence(struct session *s, uint64_t step, uint64_t index) {
  size_t first = s->rows.R, n = us_rows_add(&s->rows, &s->window, true);
  us_draft_cut_labels(&s->rows, first, &s->window);
  us_draft_blocks_add(&s->blocks, &s->rows, first, n, s->run->anchors, s->run->seed, step, index);
}

/* --- a pass --- */

/* Forward of target and drafter over what was added; loss, and with `gradient` the backward pass. */
static enum us_status run_pass(struct session *s, bool gradient, struct us_err *err) {
  struct us_dflash *run = s->run;
  struct us_batch batch = us_rows_batch(&s->rows);
  struct us_train_taps taps = {.count = run->shape.taps, .out = s->taps};
  memcpy(taps.layer, run->shape.tap_layer, sizeof taps.layer);
  if (!s->blocks.n) return US_OK;
  us_draft_blocks_aim(&s->blocks, s->rows.R);
  enum us_status status = us_model_train_forward(s->target, &batch, &taps, err);
  if (status == US_OK)
    status = us_draft_train_forward(s->draft, s->taps, s->rows.R, s->rows.position, &s->blocks, err);
  if (status != US_OK) return status;
  us_draft_loss(&s->seq, &run->loss, &s->blocks, s->draft->hidden, s->head, run->shape.hidden,
                run->target->shape.vocab, s->target->hidden, gradient ? s->draft->dhidden : NULL);
  return gradient ? us_draft_train_backward(s->draft, err) : US_OK;
}

static void clear_pass(struct session *s) {
  s->rows.R = 0;
  s->blocks.n = 0;
}

/* --- a step --- */

static enum us_status take_step(void *arg, struct us_err *err) {
  struct session *s = arg;
  struct us_dflash *run = s->run;
  uint64_t step = run->trainer.step, tokens = 0;
  run->loss.sum = (struct us_draft_tally){0};
  enum us_status status = us_trainer_open_step(&run->trainer, err);
  for (size_t i = 0; i < run->batch && status == US_OK;) {
    clear_pass(s);
    for (size_t j = 0; j < s->micro && i < run->batch; j++, i++) {
      draw_sequence(s, step, i);
      add_sequence(s, step, i);
    }
    tokens += s->rows.R;
    run->last.rows += s->blocks.n * s->blocks.B;
    status = run_pass(s, true, err);
  }
  if (status != US_OK) return status;
  /* The weights' sum is known only now that every block has told its confidence. */
  if (run->loss.sum.weight > 0.0)
    us_params_scale_grad(&run->params, s->seq.pool, (float)(1.0 / run->loss.sum.weight));
  us_draft_tally_add(&s->since, &run->loss.sum);
  double loss = run->loss.sum.weight > 0.0 ? us_draft_tally_loss(&run->loss.sum) : 0.0;
  return us_trainer_close_step(&run->trainer, loss, tokens, err);
}

/* --- evaluation --- */

static size_t heldout_count(const struct us_dflash *run) {
  size_t count = run->heldout  ? run->heldout->n
                 : run->shards ? us_shards_n_heldout(run->shards, run->length + 1)
                               : 0;
  return run->eval_sequences && run->eval_sequences < count ? run->eval_sequences : count;
}

/* On held-out sequences, each with the anchors of a step that is never taken. */
static enum us_status evaluate(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  size_t count = heldout_count(run);
  run->loss.sum = (struct us_draft_tally){0};
  enum us_status status = us_params_refresh(&run->params, s->seq.pool, s->seq.rounding, err);
  for (size_t i = 0; i < count && status == US_OK;) {
    clear_pass(s);
    for (size_t j = 0; j < s->micro && i < count; j++, i++) {
      if (run->heldout)
        us_responses_window(run->heldout, i, &s->window);
      else
        us_shards_heldout(run->shards, i, &s->window);
      add_sequence(s, UINT32_MAX, i);
    }
    status = run_pass(s, false, err);
  }
  run->last.heldout = run->loss.sum;
  return status;
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
    if (!strstr(p->name, "o_proj") && !strstr(p->name, "down_proj")) continue;
    for (size_t k = 0; k < p->rows * p->cols; k++) p->value[k] *= 0.1f;
  }
}

static enum us_status open_params(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  enum us_status status = us_params_init_model(&s->target_params, run->target, true, err);
  if (status == US_OK)
    status = run->init ? us_params_init_draft(&run->params, run->init, false, err)
                       : us_params_init_fresh_draft(&run->params, &run->shape, run->seed, 0.0f, err);
  if (status != US_OK) return status;
  if (!run->init) quiet_branches(&run->params);
  struct us_param *mask = us_params_find(&run->params, "mask_embedding");
  if (mask && run->fixed_mask) mask->frozen = true;
  s->embed = us_params_find(&s->target_params, "model.embed_tokens.weight")->compute;
  s->head = us_params_find(&s->target_params, "lm_head.weight")->compute;
  return US_OK;
}

static enum us_status open_session(struct session *s, struct us_err *err) {
  struct us_dflash *run = s->run;
  size_t rows = s->micro * run->length, blocks = s->micro * run->anchors;
  size_t floats = rows * run->shape.taps * run->shape.hidden;
  enum us_status status = us_window_init(&s->window, run->length + 1, err);
  if (status == US_OK) status = us_rows_init(&s->rows, rows, err);
  if (status == US_OK) status = us_draft_blocks_init(&s->blocks, &run->shape, blocks, err);
  if (status == US_OK)
    status = us_draft_loss_init(&run->loss, blocks, run->shape.block, run->shape.hidden, err);
  if (status == US_OK && !(s->taps = calloc(floats, sizeof *s->taps)))
    status = us_err_memory(err, "features", floats * sizeof *s->taps);
  if (status == US_OK) status = open_params(s, err);
  if (status == US_OK)
    status = us_model_train_create(&run->target->shape, &s->target_params, &s->seq, rows, US_TRAIN_FORWARD,
                                   &s->target, err);
  if (status == US_OK)
    status =
        us_draft_train_create(&run->shape, &run->params, s->embed, &s->seq, rows, blocks, &s->draft, err);
  return status;
}

static void close_session(struct session *s) {
  us_draft_train_free(s->draft);
  us_model_train_free(s->target);
  us_params_release(&s->target_params);
  us_draft_blocks_release(&s->blocks);
  us_draft_loss_release(&s->run->loss);
  us_rows_release(&s->rows);
  us_window_release(&s->window);
  us_seq_release(&s->seq);
  free(s->taps);
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

enum us_status us_dflash(struct us_dflash *run, struct us_pool *pool, struct us_err *err) {
  struct session s = {.run = run};
  enum us_status status = check_run(run, err);
  if (status != US_OK) return status;
  s.micro = run->micro ? run->micro : PASS_ROWS / (run->anchors * run->shape.block);
  if (!s.micro) s.micro = 1;
  if (s.micro > run->batch) s.micro = run->batch;
  us_seq_init(&s.seq, pool, US_SEQ_ROUND_BF16);
  status = open_session(&s, err);
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

void us_dflash_release(struct us_dflash *run) {
  us_params_release(&run->params);
}
