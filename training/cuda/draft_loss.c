/* draft_loss.c: loss and gradient of a drafter's labelled rows on a GPU, and its tallies on the host.
 *
 * Losses, probabilities and hits of rows come back behind the computation into two slots that take turns, and are tallied when
 * their slot is needed again or the step is collected: by then they have long arrived.
 */
#include "device/device.h"
#include "kernels/draft_loss/draft_loss_train.h"
#include "kernels/head_loss/head_loss_train.h"
#include "training/arena.h"
#include "training/cuda/draft.h"
#include "training/cuda/head_pass.h"
#include "training/cuda/staging.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 2

/* The number of labelled rows changes from step to step; products take it rounded up, so that their shapes, and the algorithms
 * looked up for them, are few. Rows that fill up have no label, and nobody reads their gradient. */
#define ROW_STEP 256

static size_t filled_up(size_t rows) {
  return (rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
}

/* One add on its way back. Pinned memory. */
struct landing {
  cudaEvent_t arrived;
  size_t blocks; /* 0: nothing is under way */
  uint32_t B;
  uint32_t *labels;      /* (blocks) */
  float *loss, *logprob; /* (labelled rows) */
  uint8_t *hit;
};

struct us_cuda_draft_loss_state {
  size_t D, N, blocks, B, rows, chunk; /* rows: labelled, at most, filled up */
  bool with_teacher;
  struct us_cuda_staging staging;
  void *memory, *pinned;
  float *host_weight; /* host (rows): what the tally fills */
  struct landing landing[SLOTS];
  unsigned slot;

  float *logits, *teacher_logits;      /* device from here */
  uint32_t *row, *teacher_row, *start; /* (rows), (rows), (blocks + 1) */
  int32_t *label, *index;              /* (rows), (blocks * B) */
  uint16_t *x, *teacher_x;             /* (rows, D) */
  float *dx, *row_loss, *row_logprob, *weight;
  uint8_t *row_hit;
  void *scratch;
};

static void take_all(struct us_arena *t, struct us_cuda_draft_loss_state *s) {
  US_ARENA_TAKE(t, s->logits, s->chunk * s->N);
  US_ARENA_TAKE(t, s->teacher_logits, s->with_teacher ? s->chunk * s->N : 0);
  US_ARENA_TAKE(t, s->row, s->rows);
  US_ARENA_TAKE(t, s->teacher_row, s->rows);
  US_ARENA_TAKE(t, s->start, s->blocks + 1);
  US_ARENA_TAKE(t, s->label, s->rows);
  US_ARENA_TAKE(t, s->index, s->blocks * s->B);
  US_ARENA_TAKE(t, s->x, s->rows * s->D);
  US_ARENA_TAKE(t, s->teacher_x, s->with_teacher ? s->rows * s->D : 0);
  US_ARENA_TAKE(t, s->dx, s->rows * s->D);
  US_ARENA_TAKE(t, s->row_loss, s->rows);
  US_ARENA_TAKE(t, s->row_logprob, s->rows);
  US_ARENA_TAKE(t, s->weight, s->rows);
  US_ARENA_TAKE(t, s->row_hit, s->rows);
  s->scratch = us_arena_take(t, us_head_loss_train_scratch(s->chunk), 1);
}

static void take_pinned(struct us_arena *t, struct us_cuda_draft_loss_state *s) {
  for (int i = 0; i < SLOTS; i++) {
    US_ARENA_TAKE(t, s->landing[i].labels, s->blocks);
    US_ARENA_TAKE(t, s->landing[i].loss, s->rows);
    US_ARENA_TAKE(t, s->landing[i].logprob, s->rows);
    US_ARENA_TAKE(t, s->landing[i].hit, s->rows);
  }
}

static struct us_cuda_draft_loss_state describe(const struct us_draft_shape *shape, size_t blocks,
                                                bool with_teacher) {
  size_t rows = filled_up(blocks * (shape->block - 1));
  return (struct us_cuda_draft_loss_state){.D = shape->hidden,
                                           .N = shape->vocab,
                                           .blocks = blocks,
                                           .B = shape->block,
                                           .rows = rows,
                                           .chunk = us_cuda_head_chunk(rows, shape->vocab),
                                           .with_teacher = with_teacher};
}

static enum us_status build(struct us_cuda_draft_loss *loss, struct us_err *err) {
  struct us_cuda_draft_loss_state *s = loss->state;
  struct us_arena device = {0}, pinned = {0};
  take_all(&device, s);
  take_pinned(&pinned, s);
  size_t staged = (4 * s->rows + 2 * s->blocks + 1 + s->blocks * s->B) * sizeof(uint32_t) + 8 * 64;
  s->host_weight = calloc(s->rows, sizeof *s->host_weight);
  if (!s->host_weight) return us_err_memory(err, "weights of slots", s->rows * sizeof *s->host_weight);
  us_cuda_use(loss->cuda);
  enum us_status status = us_cuda_take(loss->cuda, device.used, "drafter's logits", &s->memory, err);
  if (status == US_OK) status = us_cuda_take_pinned(pinned.used, "pinned memory", &s->pinned, err);
  if (status == US_OK) status = us_cuda_staging_create(loss->cuda, staged, &s->staging, err);
  for (int i = 0; i < SLOTS && status == US_OK; i++)
    status = us_cuda_status(cudaEventCreateWithFlags(&s->landing[i].arrived, cudaEventDisableTiming), "event",
                            err);
  if (status != US_OK) return status;
  device = (struct us_arena){.base = s->memory};
  pinned = (struct us_arena){.base = s->pinned};
  take_all(&device, s);
  take_pinned(&pinned, s);
  return US_OK;
}

enum us_status us_cuda_draft_loss_create(struct us_cuda *cuda, const struct us_draft_shape *shape,
                                         const struct us_draft_loss *options, size_t blocks,
                                         struct us_cuda_draft_loss **ret_loss, struct us_err *err) {
  *ret_loss = NULL;
  if (!blocks || shape->block < 2 || shape->block > US_DRAFT_TRAIN_SLOTS)
    return us_err_set(err, US_ERR_USAGE, "a loss of %zu blocks of %u", blocks, shape->block);
  struct us_cuda_draft_loss *loss = calloc(1, sizeof *loss);
  if (!loss) return us_err_memory(err, "drafter's loss", sizeof *loss);
  *loss = (struct us_cuda_draft_loss){.cuda = cuda,
                                      .options = {.kind = options->kind,
                                                  .weights = options->weights,
                                                  .gamma = options->gamma,
                                                  .alpha = options->alpha,
                                                  .survived = options->survived}};
  loss->state = calloc(1, sizeof *loss->state);
  enum us_status status = loss->state ? US_OK : us_err_memory(err, "drafter's loss", sizeof *loss->state);
  if (status == US_OK) {
    *loss->state = describe(shape, blocks, options->kind == US_DRAFT_KL);
    status = build(loss, err);
  }
  if (status != US_OK) {
    us_cuda_draft_loss_free(loss);
    return status;
  }
  *ret_loss = loss;
  return US_OK;
}

void us_cuda_draft_loss_free(struct us_cuda_draft_loss *loss) {
  if (!loss) return;
  us_cuda_use(loss->cuda);
  (void)cudaStreamSynchronize(loss->cuda->stream); /* what is queued reads what is freed here */
  struct us_cuda_draft_loss_state *s = loss->state;
  if (s) {
    for (int i = 0; i < SLOTS; i++)
      if (s->landing[i].arrived) (void)cudaEventDestroy(s->landing[i].arrived);
    us_cuda_staging_free(&s->staging);
    us_cuda_give_pinned(s->pinned);
    us_cuda_give(s->memory);
    free(s->host_weight);
  }
  free(s);
  free(loss);
}

/* Labelled rows, block by block; slots of a block are 1 .. labels. Returns how many there are. */
static size_t send_rows(struct us_cuda_draft_loss_state *s, const struct us_draft_blocks *blocks) {
  size_t n = 0, all = blocks->n * blocks->B;
  for (size_t b = 0; b < blocks->n; b++) n += blocks->labels[b];
  size_t filled = filled_up(n);
  uint32_t *row = us_cuda_staging_put(&s->staging, s->row, filled * sizeof *row);
  uint32_t *teacher_row = us_cuda_staging_put(&s->staging, s->teacher_row, filled * sizeof *teacher_row);
  int32_t *label = us_cuda_staging_put(&s->staging, s->label, filled * sizeof *label);
  int32_t *index = us_cuda_staging_put(&s->staging, s->index, all * sizeof *index);
  uint32_t *start = us_cuda_staging_put(&s->staging, s->start, (blocks->n + 1) * sizeof *start);
  n = 0;
  for (size_t b = 0; b < blocks->n; b++) {
    start[b] = (uint32_t)n;
    for (uint32_t j = 0; j < blocks->B; j++) {
      size_t r = b * blocks->B + j;
      bool labelled = j >= 1 && j <= blocks->labels[b];
      index[r] = labelled ? (int32_t)n : -1;
      if (!labelled) continue;
      row[n] = (uint32_t)r;
      teacher_row[n] = blocks->anchor[b] + j - 1;
      label[n++] = blocks->label[r];
    }
  }
  start[blocks->n] = (uint32_t)n;
  for (size_t i = n; i < filled; i++) row[i] = teacher_row[i] = 0, label[i] = -1;
  us_cuda_staging_send(&s->staging);
  return n;
}

static enum us_status tally(struct us_cuda_draft_loss *loss, struct landing *from, struct us_err *err) {
  if (!from->blocks) return US_OK;
  enum us_status status = us_cuda_status(cudaEventSynchronize(from->arrived), "waiting for losses", err);
  if (status != US_OK) return status;
  struct us_draft_loss rows = loss->options;
  rows.loss = from->loss;
  rows.logprob = from->logprob;
  rows.hit = from->hit;
  rows.weight = loss->state->host_weight;
  us_draft_loss_tally(&rows, from->blocks, from->B, from->labels);
  loss->options.sum = rows.sum;
  loss->options.survived = rows.survived;
  from->blocks = 0;
  return US_OK;
}

static void fetch(struct us_cuda_draft_loss *loss, const struct us_draft_blocks *blocks, size_t n) {
  struct us_cuda_draft_loss_state *s = loss->state;
  struct landing *to = &s->landing[s->slot];
  to->blocks = blocks->n;
  to->B = blocks->B;
  memcpy(to->labels, blocks->labels, blocks->n * sizeof *to->labels);
  us_cuda_download(loss->cuda, to->loss, s->row_loss, n * sizeof *to->loss);
  us_cuda_download(loss->cuda, to->logprob, s->row_logprob, n * sizeof *to->logprob);
  us_cuda_download(loss->cuda, to->hit, s->row_hit, n * sizeof *to->hit);
  us_cuda_did(loss->cuda, cudaEventRecord(to->arrived, loss->cuda->stream), "recording losses");
}

/* dhidden = weight * dx in the labelled rows, 0 in the others. */
static void weigh_rows(struct us_cuda_draft_loss *loss, struct us_cuda_draft *draft) {
  struct us_cuda_draft_loss_state *s = loss->state;
  struct us_cuda *cuda = loss->cuda;
  const struct us_draft_loss *options = &loss->options;
  struct us_draft_weights_train weights = {.blocks = draft->blocks,
                                           .start = s->start,
                                           .kind = options->weights == US_DRAFT_DPACE ? US_DRAFT_TRAIN_DPACE
                                                                                      : US_DRAFT_TRAIN_FIXED,
                                           .alpha = options->alpha,
                                           .logprob = s->row_logprob,
                                           .weight = s->weight};
  if (options->weights != US_DRAFT_DPACE)
    us_draft_slot_weights(options, NULL, (uint32_t)s->B - 1, weights.fixed);
  us_cuda_did(cuda, us_draft_weights_train(&weights, cuda->stream), "weights of slots");
  us_cuda_did(cuda,
              us_rows_scatter_train(draft->blocks * s->B, s->D, s->index, s->weight, s->dx, draft->dhidden,
                                    cuda->stream),
              "gradients of labelled rows");
}

static enum us_status check_add(const struct us_cuda_draft_loss *loss, const struct us_cuda_draft *draft,
                                const struct us_draft_blocks *blocks,
                                const struct us_cuda_draft_teacher *teacher, struct us_err *err) {
  const struct us_cuda_draft_loss_state *s = loss->state;
  if (blocks->n > s->blocks || blocks->B != s->B || blocks->n != draft->blocks)
    return us_err_set(err, US_ERR_USAGE, "%zu blocks of %u in a loss of at most %zu of %zu", blocks->n,
                      blocks->B, s->blocks, s->B);
  if (s->with_teacher && !teacher->hidden)
    return us_err_set(err, US_ERR_USAGE, "KL needs the target's hidden rows");
  return US_OK;
}

enum us_status us_cuda_draft_loss_add(struct us_cuda_draft_loss *loss, struct us_cuda_draft *draft,
                                      const struct us_draft_blocks *blocks,
                                      const struct us_cuda_draft_teacher *teacher, bool gradient,
                                      struct us_err *err) {
  struct us_cuda_draft_loss_state *s = loss->state;
  struct us_cuda *cuda = loss->cuda;
  us_cuda_use(cuda);
  s->slot = (s->slot + 1) % SLOTS;
  enum us_status status = check_add(loss, draft, blocks, teacher, err);
  if (status == US_OK) status = tally(loss, &s->landing[s->slot], err);
  if (status == US_OK) status = us_cuda_staging_begin(&s->staging, err);
  if (status != US_OK || !blocks->n) return status;
  size_t n = send_rows(s, blocks);
  size_t filled = filled_up(n);
  us_cuda_did(cuda, us_rows_gather_train(filled, s->D, s->row, draft->hidden, s->x, cuda->stream),
              "labelled rows");
  if (s->with_teacher)
    us_cuda_did(
        cuda, us_rows_gather_train(filled, s->D, s->teacher_row, teacher->hidden, s->teacher_x, cuda->stream),
        "teacher's rows");
  struct us_cuda_head_teacher distribution = {.x = s->teacher_x, .D = s->D, .head = teacher->head};
  struct us_cuda_head_pass pass = {.R = filled,
                                   .D = s->D,
                                   .N = s->N,
                                   .x = s->x,
                                   .head = teacher->own_head ? teacher->own_head : teacher->head,
                                   .label = s->label,
                                   .opt_teacher = s->with_teacher ? &distribution : NULL,
                                   .scale = 1.0f,
                                   .opt_dx = gradient ? s->dx : NULL,
                                   .opt_row_loss = s->row_loss,
                                   .opt_row_logprob = s->row_logprob,
                                   .opt_row_hit = s->row_hit,
                                   .logits = s->logits,
                                   .teacher_logits = s->teacher_logits,
                                   .chunk = s->chunk,
                                   .scratch = s->scratch};
  us_cuda_head_pass(cuda, &pass);
  fetch(loss, blocks, n);
  if (gradient) weigh_rows(loss, draft);
  return us_cuda_failed(cuda, err);
}

enum us_status us_cuda_draft_loss_collect(struct us_cuda_draft_loss *loss, struct us_draft_tally *ret_tally,
                                          struct us_err *err) {
  struct us_cuda_draft_loss_state *s = loss->state;
  us_cuda_use(loss->cuda);
  enum us_status status = us_cuda_sync(loss->cuda, err);
  for (unsigned i = 1; i <= SLOTS && status == US_OK; i++)
    status = tally(loss, &s->landing[(s->slot + i) % SLOTS], err);
  *ret_tally = loss->options.sum;
  loss->options.sum = (struct us_draft_tally){0};
  return status;
}
