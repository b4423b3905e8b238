/* draft_replay.c: a drafter's rounds over recorded answers.
 *
 * Contents: passes; the walk; the run.
 */
#include "training/draft_replay.h"

#include "model/checkpoint.h"
#include "training/rows.h"

#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 8192 /* block rows of a pass on the CPU */

struct session {
  const struct us_draft_replay *replay;
  struct us_draft_shape shape;
  struct us_params target_params, params;
  struct us_learner_set *target_set, *set;
  struct us_learner_model *target;
  struct us_learner_draft *draft;
  struct us_rows rows;
  struct us_draft_blocks blocks;
  struct us_window window;
  uint8_t *survived; /* (all anchors) slots before the first miss */
};

/* --- passes --- */

/* Anchors of an answer: each of its tokens that is followed by one. */
static size_t anchors_of(const struct us_run_entry *entry) {
  return entry->prompt_count && entry->count ? entry->count - 1 : 0;
}

static size_t rows_of(const struct us_run_entry *entry) {
  return anchors_of(entry) ? entry->prompt_count + entry->count - 1 : 0;
}

static void add_entry(struct session *s, const struct us_run_entry *entry) {
  size_t first = s->rows.R, n = entry->prompt_count + entry->count;
  memcpy(s->window.ids, entry->prompt, entry->prompt_count * sizeof *entry->prompt);
  memcpy(s->window.ids + entry->prompt_count, entry->ids, entry->count * sizeof *entry->ids);
  memset(s->window.document, 0, n * sizeof *s->window.document);
  s->window.n = n;
  size_t end = first + us_rows_add(&s->rows, &s->window, false);
  for (size_t row = first + entry->prompt_count; row < end; row++)
    us_draft_blocks_put(&s->blocks, &s->rows, row, end);
}

static enum us_status run_pass(void *arg, uint32_t lane, struct us_err *err) {
  struct session *s = arg;
  struct us_batch batch = us_rows_batch(&s->rows);
  us_draft_blocks_aim(&s->blocks, s->rows.R);
  return us_learner_draft_pass(s->draft, lane, &batch, &s->blocks, false, err);
}

/* All entries, as many a pass as fit. */
static enum us_status run_passes(struct session *s, const struct us_run_entry *entries, size_t n,
                                 struct us_err *err) {
  enum us_status status = US_OK;
  for (size_t i = 0; i < n && status == US_OK;) {
    s->rows.R = s->blocks.n = 0;
    for (; i < n; i++) {
      if (s->rows.R + rows_of(&entries[i]) > s->rows.capacity ||
          s->blocks.n + anchors_of(&entries[i]) > s->blocks.capacity)
        break;
      if (anchors_of(&entries[i])) add_entry(s, &entries[i]);
    }
    if (s->blocks.n) status = us_learner_each(s->replay->learner, run_pass, s, err);
  }
  struct us_draft_tally sum;
  return status == US_OK ? us_learner_draft_tally(s->draft, &sum, err) : status;
}

/* --- the walk --- */

/* survived: of the entry's anchors, in order. The tokens that an answer may still have end a round of an answer that ran into its
 * limit; others end in the middle of a round. */
static void walk(struct us_run_entry *entry, const uint8_t *survived, uint32_t block) {
  struct us_decode_stats *stats = &entry->stats;
  size_t anchors = anchors_of(entry);
  *stats = (struct us_decode_stats){0};
  for (size_t at = 0; at < anchors;) {
    size_t left = anchors - at, drafts = block - 1, accepted = survived[at];
    if (entry->finish == US_FINISH_LENGTH && drafts > left - 1) drafts = left - 1;
    if (accepted > drafts) accepted = drafts;
    size_t committed = accepted + 1 < left ? accepted + 1 : left;
    stats->rounds++;
    stats->committed += committed;
    stats->histogram[accepted]++;
    for (size_t i = 0; i < drafts; i++) stats->offered[i]++;
    for (size_t i = 0; i < accepted; i++) stats->accepted[i]++;
    at += committed;
  }
}

/* --- the run --- */

static enum us_status check(const struct us_draft_replay *replay, const struct us_run_entry *entries,
                            size_t n, struct us_err *err) {
  uint32_t vocab = replay->target->shape.vocab;
  if (replay->learner->ranks != 1)
    return us_err_set(err, US_ERR_USAGE, "answers are replayed by one rank, not %u", replay->learner->ranks);
  if (replay->block == 1 || replay->block > US_MAX_BLOCK)
    return us_err_set(err, US_ERR_USAGE, "a block of %u: 2 to %d", replay->block, US_MAX_BLOCK);
  for (size_t i = 0; i < n; i++)
    for (size_t k = 0; k < entries[i].prompt_count + entries[i].count; k++) {
      int32_t id =
          k < entries[i].prompt_count ? entries[i].prompt[k] : entries[i].ids[k - entries[i].prompt_count];
      if (id < 0 || (uint32_t)id >= vocab)
        return us_err_set(err, US_ERR_INPUT, "answer '%s': token %d is not in the target's vocabulary of %u",
                          entries[i].id, id, vocab);
    }
  return us_draft_check_target(replay->draft, replay->target, err);
}

/* Room for the longest answer, or for as many as keep the learner busy. */
static enum us_status open_buffers(struct session *s, const struct us_run_entry *entries, size_t n,
                                   size_t *ret_rows, struct us_err *err) {
  size_t busy = s->replay->learner->busy, rows = busy ? busy : PASS_ROWS, blocks = rows / s->shape.block,
         all = 0;
  for (size_t i = 0; i < n; i++) {
    if (rows_of(&entries[i]) > rows) rows = rows_of(&entries[i]);
    if (anchors_of(&entries[i]) > blocks) blocks = anchors_of(&entries[i]);
    all += anchors_of(&entries[i]);
  }
  *ret_rows = rows;
  s->survived = calloc(all + 1, sizeof *s->survived);
  if (!s->survived) return us_err_memory(err, "anchors", all);
  enum us_status status = us_rows_init(&s->rows, rows, err);
  if (status == US_OK) status = us_window_init(&s->window, rows + 1, err);
  return status == US_OK ? us_draft_blocks_init(&s->blocks, &s->shape, blocks, err) : status;
}

static enum us_status open_models(struct session *s, size_t rows, struct us_err *err) {
  const struct us_draft_replay *replay = s->replay;
  struct us_draft_loss loss = {.kind = US_DRAFT_CE, .weights = US_DRAFT_UNIFORM, .survived = s->survived};
  enum us_status status = us_params_init_model(&s->target_params, replay->target, replay->pool, true, err);
  if (status == US_OK) status = us_params_init_draft(&s->params, replay->draft, true, err);
  if (status == US_OK) status = us_learner_place(replay->learner, &s->target_params, &s->target_set, err);
  if (status == US_OK) status = us_learner_place(replay->learner, &s->params, &s->set, err);
  if (status == US_OK)
    status = us_learner_model_create(s->target_set, &replay->target->shape, rows, US_TRAIN_FORWARD,
                                     &s->target, err);
  if (status == US_OK)
    status = us_learner_draft_create(s->set, &s->shape, s->target, &loss, s->blocks.capacity, &s->draft, err);
  return status;
}

static void close_session(struct session *s) {
  us_learner_draft_free(s->draft);
  us_learner_model_free(s->target);
  us_learner_remove(s->set);
  us_learner_remove(s->target_set);
  us_params_release(&s->params);
  us_params_release(&s->target_params);
  us_draft_blocks_release(&s->blocks);
  us_window_release(&s->window);
  us_rows_release(&s->rows);
  free(s->survived);
}

enum us_status us_draft_replay(const struct us_draft_replay *replay, struct us_run_entry *entries, size_t n,
                               struct us_err *err) {
  struct session s = {.replay = replay, .shape = replay->draft->shape};
  size_t rows = 0, at = 0;
  if (replay->block) s.shape.block = replay->block;
  enum us_status status = check(replay, entries, n, err);
  if (status == US_OK) status = open_buffers(&s, entries, n, &rows, err);
  if (status == US_OK) status = open_models(&s, rows, err);
  if (status == US_OK) status = run_passes(&s, entries, n, err);
  for (size_t i = 0; i < n && status == US_OK; i++) {
    walk(&entries[i], s.survived + at, s.shape.block);
    at += anchors_of(&entries[i]);
  }
  close_session(&s);
  return status;
}
