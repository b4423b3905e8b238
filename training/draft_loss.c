/* draft_loss.c: loss and gradient of a drafter's labelled rows. */
#include "training/draft_loss.h"

#include "kernels/head_loss/head_loss.h"

#include <stdlib.h>

enum us_status us_draft_loss_init(struct us_draft_loss *loss, size_t blocks, uint32_t B, size_t D,
                                  struct us_err *err) {
  size_t n = blocks * (B - 1);
  loss->capacity = n;
  loss->sum = (struct us_draft_tally){0};
  loss->row = calloc(n, sizeof *loss->row);
  loss->teacher_row = calloc(n, sizeof *loss->teacher_row);
  loss->label = calloc(n, sizeof *loss->label);
  loss->x = calloc(n * D, sizeof *loss->x);
  loss->dx = calloc(n * D, sizeof *loss->dx);
  loss->loss = calloc(n, sizeof *loss->loss);
  loss->logprob = calloc(n, sizeof *loss->logprob);
  loss->weight = calloc(n, sizeof *loss->weight);
  loss->hit = calloc(n, sizeof *loss->hit);
  if (loss->row && loss->teacher_row && loss->label && loss->x && loss->dx && loss->loss && loss->logprob &&
      loss->weight && loss->hit)
    return US_OK;
  us_draft_loss_release(loss);
  return us_err_memory(err, "labelled rows", n * D * 2 * sizeof(float));
}

void us_draft_loss_release(struct us_draft_loss *loss) {
  free(loss->row);
  free(loss->teacher_row);
  free(loss->label);
  free(loss->x);
  free(loss->dx);
  free(loss->loss);
  free(loss->logprob);
  free(loss->weight);
  free(loss->hit);
  *loss = (struct us_draft_loss){.kind = loss->kind, .weights = loss->weights};
}

void us_draft_slot_weights(const struct us_draft_loss *loss, const float *logprob, uint32_t n,
                           float *weight) {
  double prefix[US_MAX_BLOCK], product = 1.0, suffix = 0.0, alpha = (double)loss->alpha;
  for (uint32_t i = 0; i < n; i++) {
    if (loss->weights == US_DRAFT_UNIFORM) weight[i] = 1.0f;
    if (loss->weights == US_DRAFT_EXP) weight[i] = (float)exp(-(double)i / (double)loss->gamma);
    if (loss->weights != US_DRAFT_DPACE) continue;
    product *= (1.0 - alpha) * exp((double)logprob[i]) + alpha;
    prefix[i] = product;
  }
  if (loss->weights != US_DRAFT_DPACE) return;
  for (uint32_t i = n; i-- > 0;) weight[i] = (float)(suffix += prefix[i]);
}

/* Labelled rows, block by block; slots of a block are 1 .. labels. */
static size_t list_rows(struct us_draft_loss *loss, const struct us_draft_blocks *blocks) {
  size_t n = 0;
  for (size_t b = 0; b < blocks->n; b++)
    for (uint32_t j = 1; j <= blocks->labels[b]; j++, n++) {
      loss->row[n] = (uint32_t)(b * blocks->B + j);
      loss->teacher_row[n] = blocks->anchor[b] + j - 1;
      loss->label[n] = blocks->label[b * blocks->B + j];
    }
  return n;
}

struct row_task {
  const struct us_draft_loss *loss;
  const float *hidden;
  float *dhidden;
  size_t D;
};

static void gather_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct row_task *t = arg;
  for (size_t i = begin; i < end; i++)
    memcpy(t->loss->x + i * t->D, t->hidden + t->loss->row[i] * t->D, t->D * sizeof(float));
}

/* A row's gradient is linear in its weight, so one product serves weights that depend on its result. */
US_SEQ_CLONES static void scatter_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct row_task *t = arg;
  for (size_t i = begin; i < end; i++) {
    const float *from = t->loss->dx + i * t->D;
    float *to = t->dhidden + t->loss->row[i] * t->D, weight = t->loss->weight[i];
    for (size_t k = 0; k < t->D; k++) to[k] = weight * from[k];
  }
}

void us_draft_loss_tally(struct us_draft_loss *loss, size_t n_blocks, uint32_t B, const uint32_t *labels) {
  struct us_draft_tally *sum = &loss->sum;
  size_t i = 0;
  for (size_t b = 0; b < n_blocks; b++) {
    uint32_t n = labels[b], accepted = 0;
    us_draft_slot_weights(loss, loss->logprob + i, n, loss->weight + i);
    for (uint32_t j = 1; j <= n; j++, i++) {
      sum->loss += (double)loss->weight[i] * (double)loss->loss[i];
      sum->weight += (double)loss->weight[i];
      sum->rows[j]++;
      sum->hits[j] += loss->hit[i];
      if (accepted + 1 == j && loss->hit[i]) accepted = j;
    }
    if (loss->survived) *loss->survived++ = (uint8_t)accepted;
    if (n + 1 != B) continue;
    sum->blocks++;
    sum->accepted += accepted;
  }
}

void us_draft_loss(struct us_seq *seq, struct us_draft_loss *loss, const struct us_draft_blocks *blocks,
                   const float *hidden, const float *head, size_t D, size_t N, const float *teacher,
                   const float *teacher_head, float *dhidden) {
  size_t n = list_rows(loss, blocks);
  struct row_task task = {.loss = loss, .hidden = hidden, .dhidden = dhidden, .D = D};
  us_pool_for(seq->pool, n, US_SEQ_BLOCK, gather_rows, &task);
  struct us_head_teacher distribution = {
      .x = teacher, .D = D, .head = teacher_head, .row = loss->teacher_row};
  struct us_head_loss args = {.R = n,
                              .D = D,
                              .N = N,
                              .x = loss->x,
                              .head = head,
                              .label = loss->label,
                              .teacher = loss->kind == US_DRAFT_KL ? &distribution : NULL,
                              .scale = 1.0f,
                              .dx = dhidden ? loss->dx : NULL,
                              .row_loss = loss->loss,
                              .row_logprob = loss->logprob,
                              .row_hit = loss->hit};
  us_head_loss(seq, &args);
  us_draft_loss_tally(loss, blocks->n, blocks->B, blocks->labels);
  if (!dhidden) return;
  memset(dhidden, 0, blocks->n * blocks->B * D * sizeof *dhidden);
  us_pool_for(seq->pool, n, US_SEQ_BLOCK, scatter_rows, &task);
}

/* --- what the sums tell --- */

double us_draft_tally_loss(const struct us_draft_tally *tally) {
  return tally->weight > 0.0 ? tally->loss / tally->weight : (double)NAN;
}

double us_draft_tally_accuracy(const struct us_draft_tally *tally, uint32_t slot) {
  return tally->rows[slot] ? (double)tally->hits[slot] / (double)tally->rows[slot] : (double)NAN;
}

double us_draft_tally_length(const struct us_draft_tally *tally) {
  return tally->blocks ? 1.0 + (double)tally->accepted / (double)tally->blocks : (double)NAN;
}

void us_draft_tally_add(struct us_draft_tally *sum, const struct us_draft_tally *more) {
  sum->loss += more->loss;
  sum->weight += more->weight;
  sum->blocks += more->blocks;
  sum->accepted += more->accepted;
  for (uint32_t j = 0; j < US_MAX_BLOCK; j++) {
    sum->rows[j] += more->rows[j];
    sum->hits[j] += more->hits[j];
  }
}
