/* train_target.c: losses and gradients of a target on both sides. */
#include "train_parity.h"

#include "kernels/head_loss/head_loss.h"

#include <math.h>

/* Of the routers' scores beside KL: large enough to weigh in the routers' gradients. */
#define LESSON 0x1p-8f

/* Head sizes that the attention kernels take. */
static void fit(struct us_shape *s) {
  if (s->full.qk_dim % 16 == 0) return;
  s->full.qk_dim = s->swa.qk_dim = 32;
}

static void draw_rows(struct us_rows *rows, size_t longest, uint32_t vocab, struct us_err *err) {
  need(us_rows_init(rows, ROWS, err), err, "rows");
  lab_fill_rows(rows, ROWS - 7, longest, vocab, 77); /* a number of rows that no tile divides */
}

static void note_margins(struct target *t, enum us_seq_rounding rounding, float *margins) {
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(&t->rows);
  t->seq.rounding = rounding;
  need(us_model_train_forward(t->cpu, &batch, &t->tap, &err), &err, t->name);
  need(us_model_train_forward(t->teacher, &batch, NULL, &err), &err, t->name);
  for (size_t i = 0; i < t->rows.R; i++)
    margins[i] = fminf(margins[i], fminf(lab_margin(t->cpu, i), lab_margin(t->teacher, i)));
}

/* Draw the first doubtful token of every document anew until there is none, in target and teacher, with the CPU's roundings and
 * without: rows before it do not change. */
static size_t settle(struct target *t) {
  struct lab_random random = {4711};
  float *margins = take(t->rows.R, sizeof *margins);
  size_t left = 1;
  for (int tries = 0; tries < 1000 && left; tries++) {
    for (size_t i = 0; i < t->rows.R; i++) margins[i] = INFINITY;
    note_margins(t, US_SEQ_ROUND_NONE, margins);
    note_margins(t, US_SEQ_ROUND_BF16, margins);
    left = 0;
    for (size_t i = 0, settled = SIZE_MAX; i < t->rows.R; i++) {
      if (t->rows.document[i] == settled || margins[i] >= MARGIN) continue;
      settled = t->rows.document[i];
      t->rows.token[i] = (int32_t)(lab_word(&random) % t->shape.vocab);
      if (i > settled) t->rows.label[i - 1] = t->rows.token[i];
      left++;
    }
  }
  free(margins);
  return left;
}

static void prepare(struct us_params *params, struct us_pool *pool, uint64_t seed, bool quantised) {
  struct us_err err = {0};
  lab_stir_vectors(params, seed);
  for (size_t i = 0; quantised && i < params->count; i++) {
    struct us_param *p = &params->items[i];
    if (strcmp(p->family, "experts") == 0) p->encoding.format = US_FORMAT_MXFP4;
    bool projection = strcmp(p->family, "qkv") == 0 || strcmp(p->family, "o_proj") == 0;
    /* Powers of two as scales: what FP8 decodes to is bf16 then, and both sides multiply by the same values. */
    if (projection || strcmp(p->family, "dense") == 0)
      p->encoding.format = US_FORMAT_FP8, p->encoding.fp8_scale = US_FP8_SCALE_UE8M0;
  }
  need(us_params_refresh(params, pool, US_SEQ_ROUND_BF16, &err), &err, "weights");
}

static struct us_head_loss head_of(struct target *t, bool kl, const struct us_head_teacher *teacher) {
  return (struct us_head_loss){.R = t->rows.R,
                               .D = t->shape.hidden,
                               .N = t->shape.vocab,
                               .x = t->cpu->hidden,
                               .head = t->cpu->head->compute,
                               .label = t->rows.label,
                               .weight = t->rows.weight,
                               .teacher = kl ? teacher : NULL,
                               .scale = 0x1p-8f,
                               .dx = t->cpu->dhidden,
                               .dhead = us_param_grad(t->cpu->head),
                               .row_loss = t->row_loss};
}

/* Gradients of the CPU's side in params.grad. Backward overwrites what forward saved, so each needs a pass. */
static void run_once(struct target *t, bool kl) {
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(&t->rows);
  us_params_zero_grad(&t->params, t->pool);
  us_model_train_clear_load(t->cpu);
  need(us_model_train_forward(t->cpu, &batch, &t->tap, &err), &err, t->name);
  if (kl) need(us_model_train_forward(t->teacher, &batch, NULL, &err), &err, t->name);
  struct us_head_teacher teacher = {
      .x = t->teacher->hidden, .D = t->shape.hidden, .head = t->teacher->head->compute};
  struct us_head_loss head = head_of(t, kl, &teacher);
  us_head_loss(&t->seq, &head);
  t->loss[kl] = head.total;
  t->cpu->routers = (struct us_router_lesson){
      .opt_teacher = kl ? t->teacher : NULL, .target = 0.05f, .opt_weight = t->rows.weight, .scale = LESSON};
  need(us_model_train_backward(t->cpu, &err), &err, t->name);
}

static double tap_distance(const struct target *t, int i, const float *got) {
  size_t D = t->shape.hidden, n = t->rows.R * D;
  float *a = take(n, sizeof *a), *b = take(n, sizeof *b);
  for (size_t r = 0; r < t->rows.R; r++) {
    memcpy(a + r * D, got + (r * 3 + (size_t)i) * D, D * sizeof *a);
    memcpy(b + r * D, t->taps + (r * 3 + (size_t)i) * D, D * sizeof *b);
  }
  double distance = lab_distance(a, b, n);
  free(a);
  free(b);
  return distance;
}

/* Without roundings, then with them: what is left is the latter. */
static void run_cpu(struct target *t, bool kl) {
  size_t floats = t->params.floats, R = t->rows.R, taps = R * 3 * t->shape.hidden;
  float *grad = take(floats, sizeof *grad), *tap = take(taps, sizeof *tap), *row = take(R, sizeof *row);
  double sum = 0.0;
  t->seq.rounding = US_SEQ_ROUND_NONE;
  run_once(t, kl);
  memcpy(grad, t->params.grad, floats * sizeof *grad);
  memcpy(tap, t->taps, taps * sizeof *tap);
  memcpy(row, t->row_loss, R * sizeof *row);
  t->seq.rounding = US_SEQ_ROUND_BF16;
  run_once(t, kl);
  free(t->noise.tensor);
  t->noise = lab_noise_of(&t->params, grad);
  for (int i = 0; i < 3; i++) t->tap_noise[i] = tap_distance(t, i, tap);
  t->row_most = 0.0;
  for (size_t i = 0; i < R; i++) {
    double noise = fabs((double)(row[i] - t->row_loss[i]));
    sum += noise * noise;
    t->row_most = fmax(t->row_most, noise);
  }
  t->row_noise = sqrt(sum / (double)R);
  free(grad);
  free(tap);
  free(row);
}

struct target open_target(const char *name, struct us_cuda *cuda) {
  struct us_err err = {0};
  struct target t = {.name = name, .cuda = cuda};
  bool quantised = strcmp(name, "pico") == 0;
  need(us_shape_load(name, &t.shape, &err), &err, name);
  fit(&t.shape);
  need(us_shape_check(&t.shape, &err), &err, name);
  need(us_pool_create(0, &t.pool, &err), &err, name);
  us_seq_init(&t.seq, t.pool, US_SEQ_ROUND_BF16);
  need(us_params_init_fresh(&t.params, &t.shape, 11, 0.0f, &err), &err, name);
  need(us_params_init_fresh(&t.teacher_params, &t.shape, 12, 0.0f, &err), &err, name);
  prepare(&t.params, t.pool, 21, quantised);
  prepare(&t.teacher_params, t.pool, 22, false);
  draw_rows(&t.rows, 3 * t.shape.swa.window + 40, t.shape.vocab,
            &err); /* many rows see less than their document */
  t.tap = (struct us_train_taps){.count = 3, .layer = {0, 2, t.shape.layers - 1}};
  t.tap.out = t.taps = take(ROWS * 3 * (size_t)t.shape.hidden, sizeof(float));
  t.row_loss = take(ROWS, sizeof(float));
  return t;
}

size_t open_executors(struct target *t) {
  struct us_err err = {0};
  need(us_model_train_create(&t->shape, &t->params, &t->seq, ROWS, US_TRAIN_SAVE, &t->cpu, &err), &err,
       t->name);
  need(us_model_train_create(&t->shape, &t->teacher_params, &t->seq, ROWS, US_TRAIN_SAVE, &t->teacher, &err),
       &err, t->name);
  return settle(t);
}

void close_target(struct target *t) {
  us_model_train_free(t->cpu);
  us_model_train_free(t->teacher);
  us_params_release(&t->params);
  us_params_release(&t->teacher_params);
  us_rows_release(&t->rows);
  us_seq_release(&t->seq);
  us_pool_free(t->pool);
  free(t->taps);
  free(t->row_loss);
  free(t->noise.tensor);
}

struct us_cuda_params *place(struct us_cuda *cuda, struct us_params *params) {
  struct us_err err = {0};
  struct us_cuda_params *set;
  need(us_cuda_params_create(cuda, params, (struct us_owned){0, params->floats}, &set, &err), &err,
       "parameters");
  us_cuda_params_refresh(set);
  us_cuda_params_zero_grad(set);
  return set;
}

static void check_routes(struct target *t, struct us_cuda_model *model) {
  struct us_err err = {0};
  uint32_t E = t->shape.experts;
  size_t pairs = t->rows.R * t->shape.top_k, loads = (size_t)t->shape.layers * E, bad = 0, checked = 0;
  uint32_t *id = take(pairs, sizeof *id);
  uint64_t *load = take(loads, sizeof *load), wrong = 0;
  for (uint32_t l = 0; l < t->shape.layers; l++) {
    const uint32_t *expected = us_model_train_routed(t->cpu, l);
    if (!expected) continue;
    need(us_cuda_model_routed(model, l, id, &err), &err, t->name);
    for (size_t i = 0; i < pairs; i++) bad += id[i] != expected[i];
    checked += pairs;
  }
  record(t->name, "experts chosen are those of the CPU", checked, bad, "");
  need(us_cuda_model_fetch_load(model, load, &err), &err, t->name);
  for (size_t i = 0; i < loads; i++) wrong += load[i] != t->cpu->load[i];
  record(t->name, "loads are those of the CPU", loads, wrong, "");
  free(id);
  free(load);
}

static void check_taps(struct target *t, const uint16_t *device) {
  size_t bad = 0;
  float *got = lab_fetch_bf16(t->cuda, device, t->rows.R * 3 * t->shape.hidden);
  char note[96];
  double worst = 0.0;
  for (int i = 0; i < 3; i++) {
    /* they are rounded themselves: 2^-9 at most, 0.42 2^-9 in the mean */
    double over = tap_distance(t, i, got) / (FORWARD_FACTOR * fmax(t->tap_noise[i], 0.42 * 0x1p-9));
    bad += !(over <= 1.0);
    worst = fmax(worst, over);
  }
  snprintf(note, sizeof note, "worst %.3f of its bound", worst);
  record(t->name, "taps are near the CPU's", 3, bad, note);
  free(got);
}

struct result run_gpu(struct target *t, const struct variant *v, bool checks) {
  struct us_err err = {0};
  struct us_cuda_params *set = place(t->cuda, &t->params), *teacher_set = NULL;
  struct us_cuda_model *model, *teacher = NULL;
  struct us_cuda_loss *loss;
  void *taps;
  size_t D = t->shape.hidden, R = v->rows.R;
  need(us_cuda_model_create(t->cuda, &v->shape, set, ROWS, v->memory, &model, &err), &err, t->name);
  need(us_cuda_loss_create(t->cuda, ROWS, D, t->shape.vocab, v->kl ? D : 0, &loss, &err), &err, t->name);
  need(us_cuda_take(t->cuda, ROWS * 3 * D * sizeof(uint16_t), "taps", &taps, &err), &err, t->name);
  loss->chunk = 128; /* several chunks, the last of them short */
  struct us_batch batch = us_rows_batch(&v->rows);
  struct us_cuda_taps tap = {.count = 3, .out = taps};
  memcpy(tap.layer, t->tap.layer, sizeof tap.layer);
  need(us_cuda_model_forward(model, &batch, &tap, &err), &err, t->name);
  struct us_cuda_head_teacher from = {.D = D};
  if (v->kl) {
    teacher_set = place(t->cuda, &t->teacher_params);
    need(us_cuda_model_create(t->cuda, &t->shape, teacher_set, ROWS, US_TRAIN_FORWARD, &teacher, &err), &err,
         t->name);
    need(us_cuda_model_forward(teacher, &batch, NULL, &err), &err, t->name);
    from.x = teacher->hidden, from.head = teacher->head;
  }
  struct us_cuda_head_loss head = {.R = R,
                                   .x = model->hidden,
                                   .head = model->head,
                                   .label = v->rows.label,
                                   .weight = v->rows.weight,
                                   .opt_teacher = v->kl ? &from : NULL,
                                   .scale = 0x1p-8f,
                                   .dx = model->dhidden,
                                   .dhead = model->head_grad,
                                   .rows = true};
  need(us_cuda_loss_add(loss, &head, &err), &err, t->name);
  model->routers = (struct us_cuda_router_lesson){
      .opt_teacher = teacher, .target = 0.05f, .opt_weight = loss->weight, .scale = LESSON};
  need(us_cuda_model_backward(model, &err), &err, t->name);
  struct result result = {.row_loss = take(R, sizeof(float))};
  need(us_cuda_loss_collect(loss, &result.loss, &result.counted, &err), &err, t->name);
  memcpy(result.row_loss, loss->row_loss, R * sizeof(float));
  result.grad = lab_fetch(t->cuda, set->grad, set->floats);
  if (checks) check_routes(t, model);
  if (checks) check_taps(t, taps);
  us_cuda_model_free(model);
  us_cuda_model_free(teacher);
  us_cuda_loss_free(loss);
  us_cuda_params_free(set);
  us_cuda_params_free(teacher_set);
  us_cuda_give(taps);
  return result;
}

void release_result(struct result *r) {
  free(r->grad);
  free(r->row_loss);
}

static void check_loss(const struct target *t, const struct result *r, bool kl, const char *what) {
  double n = (double)r->counted, off = fabs(r->loss - t->loss[kl]) / 0x1p-8 / n;
  double one = FORWARD_FACTOR * t->row_noise, allowed = 3.0 * one / sqrt(n);
  uint64_t bad = 0, expected = 0;
  char note[160], name[64];
  for (size_t i = 0; i < t->rows.R; i++) {
    bad += !(fabs((double)(r->row_loss[i] - t->row_loss[i])) <= FORWARD_FACTOR * t->row_most);
    expected += t->rows.weight[i] != 0.0f;
  }
  snprintf(note, sizeof note, "mean %.6f, CPU %.6f, off %.2e of %.2e allowed", r->loss / 0x1p-8 / n,
           t->loss[kl] / 0x1p-8 / n, off, allowed);
  snprintf(name, sizeof name, "%s: loss", what);
  record(t->name, name, 1, !(off <= allowed) + (expected != r->counted), note);
  snprintf(name, sizeof name, "%s: losses of rows", what);
  record(t->name, name, t->rows.R, bad, "");
}

void check_gradients(const char *name, const struct us_params *params, const float *grad,
                     const struct lab_noise *noise, const char *what) {
  struct lab_difference d = lab_compare(params, grad, noise, GRADIENT_FACTOR);
  char note[256], check[64];
  snprintf(note, sizeof note, "worst %.3f of its bound: %s; mean %.3f noises of %.4f", d.worst, d.name,
           d.mean, noise->mean);
  snprintf(check, sizeof check, "%s: gradients", what);
  record(name, check, d.tensors, d.beyond, note);
}

static void check_same(const struct target *t, const struct result *a, const struct result *b,
                       const char *what) {
  uint64_t bad = a->loss != b->loss;
  for (size_t i = 0; i < t->params.floats; i++) bad += memcmp(&a->grad[i], &b->grad[i], sizeof(float)) != 0;
  record(t->name, what, t->params.floats + 1, bad, "");
}

struct us_param *tensor(struct target *t, const char *name) {
  struct us_err err = {.message = "a tensor of the test is missing"};
  struct us_param *p = us_params_find(&t->params, name);
  if (!p) need(US_ERR_CHECK, &err, name);
  return p;
}

void check_target(struct target *t) {
  struct variant v = {.shape = t->shape, .rows = t->rows, .memory = US_TRAIN_SAVE};
  run_cpu(t, false);
  struct result saved = run_gpu(t, &v, true), again = run_gpu(t, &v, false);
  check_loss(t, &saved, false, "cross-entropy");
  check_gradients(t->name, &t->params, saved.grad, &t->noise, "cross-entropy");
  check_same(t, &saved, &again, "two runs give the same bits");
  v.memory = US_TRAIN_RECOMPUTE;
  struct result recomputed = run_gpu(t, &v, false);
  check_same(t, &saved, &recomputed, "both memory modes give the same bits");
  check_mutations(t);
  v.memory = US_TRAIN_SAVE;
  v.kl = true;
  run_cpu(t, true);
  struct result kl = run_gpu(t, &v, false);
  check_loss(t, &kl, true, "KL");
  check_gradients(t->name, &t->params, kl.grad, &t->noise, "KL");
  release_result(&saved);
  release_result(&again);
  release_result(&recomputed);
  release_result(&kl);
}
