/* loss.c: the loss of a target's rows: labels to the device, chunks, and one number back a step. */
#include "training/cuda/loss.h"

#include "kernels/head_loss/head_loss_train.h"
#include "training/arena.h"
#include "training/cuda/head_pass.h"
#include "training/cuda/staging.h"

#include <stdlib.h>
#include <string.h>

/* What comes back once a step. */
struct sums {
  double total;
  uint64_t counted;
};

struct us_cuda_loss_state {
  bool with_teacher;
  struct us_cuda_staging staging;
  void *memory, *host; /* device; pinned */
  float *logits, *teacher_logits;
  int32_t *label;
  float *weight, *row_loss, *row_logprob;
  uint8_t *row_hit;
  struct sums *sums, *sums_host;
  void *scratch;
};

static void take_all(struct us_arena *t, const struct us_cuda_loss *loss, size_t teacher_D,
                     struct us_cuda_loss_state *s) {
  size_t R = loss->capacity;
  US_ARENA_TAKE(t, s->logits, loss->chunk * loss->N);
  US_ARENA_TAKE(t, s->teacher_logits, teacher_D ? loss->chunk * loss->N : 0);
  US_ARENA_TAKE(t, s->label, R);
  US_ARENA_TAKE(t, s->weight, R);
  US_ARENA_TAKE(t, s->row_loss, R);
  US_ARENA_TAKE(t, s->row_logprob, R);
  US_ARENA_TAKE(t, s->row_hit, R);
  US_ARENA_TAKE(t, s->sums, 1);
  s->scratch = us_arena_take(t, us_head_loss_train_scratch(loss->chunk), 1);
}

static struct us_cuda_loss describe(struct us_cuda *cuda, size_t capacity, size_t D, size_t N) {
  return (struct us_cuda_loss){
      .cuda = cuda, .capacity = capacity, .D = D, .N = N, .chunk = us_cuda_head_chunk(capacity, N)};
}

size_t us_cuda_loss_bytes(size_t capacity, size_t D, size_t N, size_t teacher_D) {
  struct us_cuda_loss counted = describe(NULL, capacity, D, N);
  struct us_cuda_loss_state state;
  struct us_arena t = {0};
  take_all(&t, &counted, teacher_D, &state);
  return t.used;
}

/* Rows come back into pinned memory behind the sums. */
static enum us_status take_host(struct us_cuda_loss *loss, struct us_err *err) {
  struct us_cuda_loss_state *s = loss->state;
  size_t R = loss->capacity, bytes = sizeof *s->sums_host + R * (2 * sizeof(float) + 1);
  enum us_status status = us_cuda_take_pinned(bytes, "pinned memory", &s->host, err);
  if (status != US_OK) return status;
  s->sums_host = s->host;
  loss->row_loss = (const float *)(s->sums_host + 1);
  loss->row_logprob = loss->row_loss + R;
  loss->row_hit = (const uint8_t *)(loss->row_logprob + R);
  return us_cuda_staging_create(loss->cuda, 2 * (R * sizeof(float) + 64), &s->staging, err);
}

static enum us_status build(struct us_cuda_loss *loss, size_t teacher_D, struct us_err *err) {
  loss->state = calloc(1, sizeof *loss->state);
  if (!loss->state) return us_err_memory(err, "loss", sizeof *loss->state);
  size_t bytes = us_cuda_loss_bytes(loss->capacity, loss->D, loss->N, teacher_D);
  enum us_status status = us_cuda_take(loss->cuda, bytes, "logits", &loss->state->memory, err);
  if (status != US_OK) return status;
  struct us_arena t = {.base = loss->state->memory};
  take_all(&t, loss, teacher_D, loss->state);
  loss->state->with_teacher = teacher_D > 0;
  return take_host(loss, err);
}

enum us_status us_cuda_loss_create(struct us_cuda *cuda, size_t capacity, size_t D, size_t N,
                                   size_t teacher_D, struct us_cuda_loss **ret_loss, struct us_err *err) {
  *ret_loss = NULL;
  if (!capacity || !N) return us_err_set(err, US_ERR_USAGE, "a loss of %zu rows of %zu logits", capacity, N);
  struct us_cuda_loss *loss = calloc(1, sizeof *loss);
  if (!loss) return us_err_memory(err, "loss", sizeof *loss);
  *loss = describe(cuda, capacity, D, N);
  enum us_status status = build(loss, teacher_D, err);
  if (status != US_OK) {
    us_cuda_loss_free(loss);
    return status;
  }
  *ret_loss = loss;
  return US_OK;
}

void us_cuda_loss_free(struct us_cuda_loss *loss) {
  if (!loss) return;
  us_cuda_use(loss->cuda);
  (void)cudaStreamSynchronize(loss->cuda->stream); /* what is queued reads what is freed here */
  if (loss->state) {
    us_cuda_staging_free(&loss->state->staging);
    us_cuda_give_pinned(loss->state->host);
    us_cuda_give(loss->state->memory);
  }
  free(loss->state);
  free(loss);
}

static enum us_status send_labels(struct us_cuda_loss *loss, const struct us_cuda_head_loss *args,
                                  struct us_err *err) {
  struct us_cuda_loss_state *s = loss->state;
  size_t bytes = args->R * sizeof(float);
  enum us_status status = us_cuda_staging_begin(&s->staging, err);
  if (status != US_OK) return status;
  if (args->label) memcpy(us_cuda_staging_put(&s->staging, s->label, bytes), args->label, bytes);
  if (args->weight) memcpy(us_cuda_staging_put(&s->staging, s->weight, bytes), args->weight, bytes);
  us_cuda_staging_send(&s->staging);
  return US_OK;
}

static void fetch_rows(struct us_cuda_loss *loss, size_t R) {
  const struct us_cuda_loss_state *s = loss->state;
  us_cuda_download(loss->cuda, (void *)loss->row_loss, s->row_loss, R * sizeof(float));
  us_cuda_download(loss->cuda, (void *)loss->row_logprob, s->row_logprob, R * sizeof(float));
  us_cuda_download(loss->cuda, (void *)loss->row_hit, s->row_hit, R);
}

enum us_status us_cuda_loss_add(struct us_cuda_loss *loss, const struct us_cuda_head_loss *args,
                                struct us_err *err) {
  struct us_cuda_loss_state *s = loss->state;
  if (args->R > loss->capacity)
    return us_err_set(err, US_ERR_USAGE, "%zu rows in a loss of at most %zu", args->R, loss->capacity);
  if (args->opt_teacher && !s->with_teacher)
    return us_err_set(err, US_ERR_USAGE, "this loss has no room for a teacher's logits");
  us_cuda_use(loss->cuda);
  enum us_status status = send_labels(loss, args, err);
  loss->weight = args->weight ? s->weight : NULL;
  if (status != US_OK) return status;
  struct us_cuda_head_pass pass = {.R = args->R,
                                   .D = loss->D,
                                   .N = loss->N,
                                   .x = args->x,
                                   .head = args->head,
                                   .label = args->label ? s->label : NULL,
                                   .opt_weight = args->weight ? s->weight : NULL,
                                   .opt_teacher = args->opt_teacher,
                                   .scale = args->scale,
                                   .opt_dx = args->dx,
                                   .opt_dhead = args->dhead,
                                   .opt_row_loss = args->rows ? s->row_loss : NULL,
                                   .opt_row_logprob = args->rows ? s->row_logprob : NULL,
                                   .opt_row_hit = args->rows ? s->row_hit : NULL,
                                   .opt_total = &s->sums->total,
                                   .opt_counted = &s->sums->counted,
                                   .logits = s->logits,
                                   .teacher_logits = s->teacher_logits,
                                   .chunk = loss->chunk,
                                   .scratch = s->scratch};
  us_cuda_head_pass(loss->cuda, &pass);
  if (args->rows) fetch_rows(loss, args->R);
  return us_cuda_failed(loss->cuda, err);
}

enum us_status us_cuda_loss_collect(struct us_cuda_loss *loss, double *ret_total, size_t *ret_counted,
                                    struct us_err *err) {
  struct us_cuda_loss_state *s = loss->state;
  us_cuda_use(loss->cuda);
  us_cuda_download(loss->cuda, s->sums_host, s->sums, sizeof *s->sums);
  us_cuda_did(loss->cuda, cudaMemsetAsync(s->sums, 0, sizeof *s->sums, loss->cuda->stream), "clearing sums");
  enum us_status status = us_cuda_sync(loss->cuda, err);
  *ret_total = s->sums_host->total;
  *ret_counted = s->sums_host->counted;
  return status;
}
