/* train_draft.c: losses and gradients of a drafter on both sides, from the same features and teachers: the GPU's. */
#include "train_parity.h"

#include "training/draft_train.h"

#include <math.h>

#define BLOCKS 40

struct drafter {
  struct target *t;
  struct us_draft_shape shape;
  struct us_params params;
  struct us_draft_blocks blocks;
  struct us_draft_train *cpu;
  struct us_cuda_params *target_set, *set;
  struct us_cuda_model *target;
  struct us_cuda_draft *gpu;
  float *taps, *hidden; /* the GPU's, on the host: both sides start from them */
};

/* The drafter's own head in MXFP4, of the target's values. */
static void copy_head(struct drafter *d) {
  struct us_param *head = us_params_find(&d->params, "lm_head.weight");
  if (!head) return;
  memcpy(head->value, tensor(d->t, "lm_head.weight")->value, head->rows * head->cols * sizeof *head->value);
  head->encoding.format = d->shape.head;
  head->frozen = true;
}

static struct drafter open_drafter(struct target *t, uint32_t markov, enum us_format head) {
  struct us_err err = {0};
  struct drafter d = {.t = t, .shape = draft_shape(&t->shape, 2, 8)};
  d.shape.tap_layer[2] = t->shape.layers - 1;
  d.shape.markov = markov, d.shape.head = head;
  size_t R = t->rows.R, D = t->shape.hidden, first = 0;
  need(us_draft_shape_check(&d.shape, &t->shape, &err), &err, t->name);
  need(us_params_init_fresh_draft(&d.params, &d.shape, 31, 0.0f, &err), &err, t->name);
  lab_stir_vectors(&d.params, 32);
  copy_head(&d);
  need(us_params_refresh(&d.params, t->pool, US_SEQ_ROUND_BF16, &err), &err, t->name);
  need(us_draft_blocks_init(&d.blocks, &d.shape, BLOCKS, &err), &err, t->name);
  for (size_t half = R / 2; first < R; first = half, half = R)
    us_draft_blocks_add(&d.blocks, &t->rows, first, half - first, BLOCKS / 2, 5, 0, first);
  us_draft_blocks_aim(&d.blocks, R);
  d.target_set = place(t->cuda, &t->params);
  need(us_cuda_model_create(t->cuda, &t->shape, d.target_set, ROWS, US_TRAIN_FORWARD, &d.target, &err), &err,
       t->name);
  d.set = place(t->cuda, &d.params);
  need(us_cuda_draft_create(t->cuda, &d.shape, d.set,
                            us_cuda_param_compute(d.target_set, tensor(t, "model.embed_tokens.weight")), ROWS,
                            BLOCKS, &d.gpu, &err),
       &err, t->name);
  struct us_batch batch = us_rows_batch(&t->rows);
  struct us_cuda_taps tap = {.count = d.shape.taps, .out = d.gpu->taps};
  memcpy(tap.layer, d.shape.tap_layer, sizeof tap.layer);
  need(us_cuda_model_forward(d.target, &batch, &tap, &err), &err, t->name);
  d.taps = lab_fetch_bf16(t->cuda, d.gpu->taps, R * d.shape.taps * D);
  d.hidden = lab_fetch_bf16(t->cuda, d.target->hidden, R * D);
  return d;
}

static void close_drafter(struct drafter *d) {
  us_draft_train_free(d->cpu);
  us_cuda_draft_free(d->gpu);
  us_cuda_model_free(d->target);
  us_cuda_params_free(d->set);
  us_cuda_params_free(d->target_set);
  us_draft_blocks_release(&d->blocks);
  us_params_release(&d->params);
  free(d->taps);
  free(d->hidden);
}

/* rows gets the losses of the labelled rows. */
static struct us_draft_tally run_draft_once(struct drafter *d, const struct us_draft_loss *options,
                                            float *rows) {
  struct us_err err = {0};
  struct target *t = d->t;
  struct us_draft_loss loss = *options;
  size_t D = t->shape.hidden;
  need(us_draft_loss_init(&loss, BLOCKS, d->shape.block, D, &err), &err, t->name);
  us_params_zero_grad(&d->params, t->pool);
  need(us_draft_train_forward(d->cpu, d->taps, t->rows.R, t->rows.position, &d->blocks, &err), &err, t->name);
  const struct us_param *own_head = us_params_find(&d->params, "lm_head.weight");
  const float *head = own_head ? own_head->compute : t->cpu->head->compute;
  us_draft_loss(&t->seq, &loss, &d->blocks, d->cpu->hidden, head, D, t->shape.vocab, d->hidden,
                t->cpu->head->compute, d->cpu->dhidden);
  need(us_draft_train_backward(d->cpu, &err), &err, t->name);
  struct us_draft_tally sum = loss.sum;
  memcpy(rows, loss.loss, loss.capacity * sizeof *rows);
  us_draft_loss_release(&loss);
  return sum;
}

/* Without roundings, then with them; what they do to gradients and (root mean square) to the loss of a row. */
static struct us_draft_tally run_draft_cpu(struct drafter *d, const struct us_draft_loss *options,
                                           struct lab_noise *ret_noise, double *ret_row_noise) {
  size_t floats = d->params.floats, most = BLOCKS * (d->shape.block - 1), n = 0;
  float *grad = take(floats, sizeof *grad), *rows[2] = {take(most, sizeof(float)), take(most, sizeof(float))};
  double sum = 0.0;
  d->t->seq.rounding = US_SEQ_ROUND_NONE;
  (void)run_draft_once(d, options, rows[0]);
  memcpy(grad, d->params.grad, floats * sizeof *grad);
  d->t->seq.rounding = US_SEQ_ROUND_BF16;
  struct us_draft_tally tally = run_draft_once(d, options, rows[1]);
  *ret_noise = lab_noise_of(&d->params, grad);
  for (size_t b = 0; b < d->blocks.n; b++) n += d->blocks.labels[b];
  for (size_t i = 0; i < n; i++) sum += pow((double)(rows[0][i] - rows[1][i]), 2.0);
  *ret_row_noise = sqrt(sum / (double)n);
  free(grad);
  free(rows[0]);
  free(rows[1]);
  return tally;
}

static struct us_draft_tally run_draft_gpu(struct drafter *d, const struct us_draft_loss *options,
                                           float **ret_grad) {
  struct us_err err = {0};
  struct target *t = d->t;
  struct us_cuda_draft_loss *loss;
  struct us_draft_tally sum;
  need(us_cuda_draft_loss_create(t->cuda, &d->shape, options, BLOCKS, &loss, &err), &err, t->name);
  us_cuda_params_zero_grad(d->set);
  need(us_cuda_draft_forward(d->gpu, t->rows.R, t->rows.position, &d->blocks, &err), &err, t->name);
  const struct us_param *own_head = us_params_find(&d->params, "lm_head.weight");
  struct us_cuda_draft_teacher teacher = {.head = d->target->head,
                                          .hidden = d->target->hidden,
                                          .own_head =
                                              own_head ? us_cuda_param_compute(d->set, own_head) : NULL};
  need(us_cuda_draft_loss_add(loss, d->gpu, &d->blocks, &teacher, true, &err), &err, t->name);
  need(us_cuda_draft_backward(d->gpu, &err), &err, t->name);
  need(us_cuda_draft_loss_collect(loss, &sum, &err), &err, t->name);
  us_cuda_draft_loss_free(loss);
  *ret_grad = lab_fetch(t->cuda, d->set->grad, d->set->floats);
  return sum;
}

/* Hits may differ where two logits nearly tie; the counts of rows and blocks may not. */
static void check_tally(const struct drafter *d, const struct us_draft_tally *got,
                        const struct us_draft_tally *expected, double row_noise, const char *what) {
  double one = FORWARD_FACTOR * row_noise, n = 0.0, off_by = 0.0;
  uint64_t bad = got->blocks != expected->blocks, hits = 0;
  char note[160];
  for (uint32_t j = 0; j < US_MAX_BLOCK; j++) {
    bad += got->rows[j] != expected->rows[j];
    n += (double)expected->rows[j];
    hits += got->hits[j] > expected->hits[j] ? got->hits[j] - expected->hits[j]
                                             : expected->hits[j] - got->hits[j];
  }
  off_by = fabs(got->loss / got->weight - expected->loss / expected->weight);
  bad += !(off_by <= 3.0 * one / sqrt(n));
  bad += !(fabs(got->weight / expected->weight - 1.0) <= one);
  bad += (double)hits > 0.02 * n;
  snprintf(note, sizeof note, "mean %.6f, CPU %.6f, %llu hits differ", got->loss / got->weight,
           expected->loss / expected->weight, (unsigned long long)hits);
  char name[64];
  snprintf(name, sizeof name, "drafter %s: tally", what);
  record(d->t->name, name, (uint64_t)n, bad, note);
}

static void check_draft_mutations(struct drafter *d, const struct us_draft_loss *options,
                                  const struct lab_noise *noise) {
  static const char *const names[] = {"a context that holds the anchor", "a block without its last row",
                                      "a context one row later", "positions of blocks one later"};
  size_t rows = d->blocks.n * d->blocks.B;
  for (int m = 0; m < 4; m++) {
    uint32_t *field = m == 0   ? d->blocks.range[1]
                      : m == 1 ? d->blocks.range[3]
                      : m == 2 ? d->blocks.range[0]
                               : d->blocks.position;
    uint32_t *kept = take(rows, sizeof *kept);
    memcpy(kept, field, rows * sizeof *kept);
    for (size_t i = 0; i < rows; i++)
      field[i] += m == 1 ? UINT32_MAX : m == 2 ? d->blocks.range[1][i] > field[i] : 1u;
    float *grad;
    run_draft_gpu(d, options, &grad);
    struct lab_difference difference = lab_compare(&d->params, grad, noise, GRADIENT_FACTOR);
    char name[96], note[256];
    snprintf(name, sizeof name, "drafter mutation is seen: %s", names[m]);
    snprintf(note, sizeof note, "%zu of %zu tensors beyond, worst %.1f: %s", difference.beyond,
             difference.tensors, difference.worst, difference.name);
    record(d->t->name, name, 1, difference.beyond == 0, note);
    memcpy(field, kept, rows * sizeof *kept);
    free(kept);
    free(grad);
  }
}

static void check_drafter_of(struct target *t, uint32_t markov, enum us_format head) {
  static const struct {
    const char *name;
    struct us_draft_loss options;
  } losses[] = {{"CE uniform", {.kind = US_DRAFT_CE, .weights = US_DRAFT_UNIFORM}},
                {"CE exp", {.kind = US_DRAFT_CE, .weights = US_DRAFT_EXP, .gamma = 4.0f}},
                {"CE dpace", {.kind = US_DRAFT_CE, .weights = US_DRAFT_DPACE, .alpha = 0.5f}},
                {"KL exp", {.kind = US_DRAFT_KL, .weights = US_DRAFT_EXP, .gamma = 4.0f}}};
  struct us_err err = {0};
  struct drafter d = open_drafter(t, markov, head);
  need(us_draft_train_create(&d.shape, &d.params, tensor(t, "model.embed_tokens.weight")->compute, &t->seq,
                             ROWS, BLOCKS, &d.cpu, &err),
       &err, t->name);
  for (size_t i = 0; i < sizeof losses / sizeof losses[0]; i++) {
    float *grad, *again;
    char what[64];
    struct lab_noise noise;
    double row_noise;
    struct us_draft_tally expected = run_draft_cpu(&d, &losses[i].options, &noise, &row_noise);
    struct us_draft_tally got = run_draft_gpu(&d, &losses[i].options, &grad);
    struct us_draft_tally twice = run_draft_gpu(&d, &losses[i].options, &again);
    uint64_t bad = (uint64_t)(memcmp(grad, again, d.params.floats * sizeof *grad) != 0) +
                   (uint64_t)(got.loss != twice.loss);
    snprintf(what, sizeof what, "drafter %s", losses[i].name);
    check_tally(&d, &got, &expected, row_noise, losses[i].name);
    check_gradients(t->name, &d.params, grad, &noise, what);
    record(t->name, "drafter: two runs give the same bits", d.params.floats, bad, losses[i].name);
    if (i == 0 && head == US_FORMAT_NONE) check_draft_mutations(&d, &losses[i].options, &noise);
    free(grad);
    free(again);
    free(noise.tensor);
  }
  close_drafter(&d);
}

void check_drafter(struct target *t) {
  check_drafter_of(t, 0, US_FORMAT_NONE);
  check_drafter_of(t, 32, US_FORMAT_NONE); /* with a Markov head */
  check_drafter_of(t, 0, US_FORMAT_MXFP4);
}
