/* train_parity.c: training on a GPU against training on the CPU, from the same masters: losses and every gradient.
 *
 *   Targets | Drafters | Cases
 *
 * Usage: train_parity [CASE...], of tiny, tiny-pro, pico; train_parity speed SHAPE [LAYERS [ROWS [LENGTH]]].
 * Exit 0, 1, 5, 77.
 *
 * Bound. Both sides compute the same graph with FP32 sums and differ in what they round to bf16 on the way. The CPU says what
 * that does to each tensor: it runs with its roundings (norms, attention, SwiGLU, keys and values: 5 a layer) and without any,
 * and the distance of the two gradients (Frobenius, relative) is the tensor's noise. The GPU has up to 17 roundings a layer more:
 * qkv before and after norm and rotation, attention's probabilities, gate_up and the experts' rows forward; dx twice, da, a w,
 * dgate_up, the experts' dx, dattention, the scores' gradients, dqkv before and after rotation and norm back. Those 5 that both
 * have part where their inputs fall on two sides of an edge, which adds no more than one rounding each. Errors of roundings are
 * independent and add in squares: the GPU's distance from the CPU is expected at sqrt(22 / 5) = 2.1 noises at most. Half as much
 * again is allowed, and since distance and noise of n values are each known to a part in sqrt(2 n), three standard errors of their
 * ratio, 3 / sqrt(n). Where a tensor's own noise is below the mean of all tensors, the mean counts.
 * pico's experts are MXFP4 and its other matrices FP8, whose decoded values the GPU rounds to bf16 for its products.
 * Forward alone there are 5 roundings on each side: taps and losses are expected within sqrt(10 / 5) noises, and half as much
 * again is allowed. A row's loss has no distance but its own: it may differ by the largest noise of any row, times the same.
 *
 * Where two experts nearly tie, the sides may choose differently. A score's slope is 1/4 at most, so an error of a logit of 2^-7,
 * five times what is seen, moves it by 2^-9: rows are drawn anew until every choice has a margin of 2^-7, after which ids
 * and loads must be equal.
 */
#include "train_lab.h"

#include "kernels/head_loss/head_loss.h"
#include "training/draft_train.h"
#include "training/model_train_state.h"

#include <math.h>
#include <signal.h>

#define ROWS            384
#define MARGIN          0x1p-7f
#define BLOCKS          40
#define GRADIENT_FACTOR 2.1 /* sqrt(22 / 5): lab_compare allows half as much again and what scatters */
#define FORWARD_FACTOR  2.2 /* 1.5 sqrt(10 / 5) */

/* Targets */

struct target {
  const char *name;
  struct us_shape shape;
  struct us_params params, teacher_params;
  struct us_pool *pool;
  struct us_seq seq;
  struct us_rows rows;
  struct us_model_train *cpu, *teacher;
  float *taps; /* (R, taps * D) of the CPU */
  struct us_train_taps tap;
  double loss[2]; /* cross-entropy, KL */
  float *row_loss;
  struct lab_noise noise;
  double tap_noise[3], row_noise, row_most; /* of the loss of a row: root mean square, largest */
  struct us_cuda *cuda;
};

/* What a mutation of the GPU's side may change. */
struct variant {
  struct us_shape shape;
  struct us_rows rows;
  enum us_train_memory memory;
  bool kl;
};

/* What the GPU gives for it. */
struct result {
  double loss;
  size_t counted;
  float *grad;     /* (floats) */
  float *row_loss; /* (R) */
};

/* Head sizes that the attention kernels take. */
static void fit(struct us_shape *s) {
  if (s->full.qk_dim % 16 == 0) return;
  s->full.qk_dim = s->swa.qk_dim = 32;
}

static void draw_rows(struct us_rows *rows, size_t longest, uint32_t vocab, struct us_err *err) {
  need(us_rows_init(rows, ROWS, err), err, "rows");
  lab_fill_rows(rows, ROWS - 7, longest, vocab, 77); /* a number of rows that no tile divides */
}

/* Smallest distance between the last expert chosen and the best one left out, of a row in any layer. */
static float margin(const struct us_model_train *train, size_t row) {
  float smallest = INFINITY;
  uint32_t E = train->shape.experts, K = train->shape.top_k;
  for (uint32_t l = 0; l < train->shape.layers; l++) {
    if (!train->shape.moe_layer[l]) continue;
    const float *scores = train->state->saved[l].scores + row * E;
    const float *bias = train->state->roles[l].router_bias->compute;
    const uint32_t *id = us_model_train_routed(train, l) + row * K;
    float lowest = INFINITY, best = -INFINITY;
    for (uint32_t e = 0, k = 0; e < E; e++) {
      float s = scores[e] + bias[e];
      bool chosen = k < K && id[k] == e;
      k += chosen;
      if (chosen && s < lowest) lowest = s;
      if (!chosen && s > best) best = s;
    }
    if (lowest - best < smallest) smallest = lowest - best;
  }
  return smallest;
}

static void note_margins(struct target *t, enum us_seq_rounding rounding, float *margins) {
  struct us_err err = {0};
  struct us_batch batch = us_rows_batch(&t->rows);
  t->seq.rounding = rounding;
  need(us_model_train_forward(t->cpu, &batch, &t->tap, &err), &err, t->name);
  need(us_model_train_forward(t->teacher, &batch, NULL, &err), &err, t->name);
  for (size_t i = 0; i < t->rows.R; i++)
    margins[i] = fminf(margins[i], fminf(margin(t->cpu, i), margin(t->teacher, i)));
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
    if (projection || strcmp(p->family, "dense") == 0) p->encoding.format = US_FORMAT_FP8;
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

static struct target open_target(const char *name, struct us_cuda *cuda) {
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

/* The executors hold pointers into the struct, so they are made once it stands where it stays. */
static void open_executors(struct target *t) {
  struct us_err err = {0};
  need(us_model_train_create(&t->shape, &t->params, &t->seq, ROWS, US_TRAIN_SAVE, &t->cpu, &err), &err,
       t->name);
  need(us_model_train_create(&t->shape, &t->teacher_params, &t->seq, ROWS, US_TRAIN_SAVE, &t->teacher, &err),
       &err, t->name);
}

static void close_target(struct target *t) {
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

static struct us_cuda_params *place(struct us_cuda *cuda, struct us_params *params) {
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

static struct result run_gpu(struct target *t, const struct variant *v, bool checks) {
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

static void release(struct result *r) {
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

static void check_gradients(const char *name, const struct us_params *params, const float *grad,
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

/* Mutations of the GPU's side; each must be seen. */

struct mutation {
  const char *name;
  void (*apply)(struct target *t, struct variant *v);
};

static struct us_param *tensor(struct target *t, const char *name) {
  struct us_err err = {.message = "a tensor of the test is missing"};
  struct us_param *p = us_params_find(&t->params, name);
  if (!p) need(US_ERR_CHECK, &err, name);
  return p;
}

static void swap_thetas(struct target *t, struct variant *v) {
  v->shape.full.rope_theta = t->shape.swa.rope_theta;
  v->shape.swa.rope_theta = t->shape.full.rope_theta;
}
static void scale_values(struct target *t, struct variant *v) {
  v->shape.value_scale *= 1.0625;
}
static void widen_window(struct target *t, struct variant *v) {
  v->shape.swa.window++;
}
static void scale_routes(struct target *t, struct variant *v) {
  v->shape.routed_scaling *= 1.0625;
}
static void leave_sums(struct target *t, struct variant *v) {
  v->shape.norm_topk_prob = false;
}
static void raise_epsilon(struct target *t, struct variant *v) {
  v->shape.norm_eps = 0.0625;
}
static void shift_positions(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i++) v->rows.position[i] += v->rows.position[i] >= 4;
}
static void join_documents(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i++) v->rows.document[i] -= v->rows.document[i] > 0;
}
static void shift_label(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i += 8) v->rows.label[i] ^= 1;
}
static void count_ends(struct target *t, struct variant *v) {
  for (size_t i = 0; i < v->rows.R; i++) v->rows.weight[i] = 1.0f;
}
static void drop_sinks(struct target *t, struct variant *v) {
  struct us_param *p = tensor(t, "model.layers.1.self_attn.attention_sink_bias");
  for (size_t i = 0; i < p->rows * p->cols; i++) p->value[i] = -64.0f;
}
static void scale_gain(struct target *t, struct variant *v) {
  struct us_param *p = tensor(t, "model.layers.2.post_attention_layernorm.weight");
  for (size_t i = 0; i < p->rows * p->cols; i++) p->value[i] *= 1.0625f;
}
static void swap_experts(struct target *t, struct variant *v) {
  struct us_param *a = tensor(t, "model.layers.1.mlp.experts.0.down_proj.weight");
  struct us_param *b = tensor(t, "model.layers.1.mlp.experts.1.down_proj.weight");
  for (size_t i = 0; i < a->rows * a->cols; i++) {
    float kept = a->value[i];
    a->value[i] = b->value[i], b->value[i] = kept;
  }
}

static const struct mutation mutations[] = {{"thetas swapped", swap_thetas},
                                            {"values scaled by 1/16 more", scale_values},
                                            {"window one wider", widen_window},
                                            {"routes scaled by 1/16 more", scale_routes},
                                            {"weights of experts not normalised", leave_sums},
                                            {"epsilon of norms 1/16", raise_epsilon},
                                            {"positions shifted inside documents", shift_positions},
                                            {"documents joined at one row", join_documents},
                                            {"every eighth label wrong", shift_label},
                                            {"ends of documents counted", count_ends},
                                            {"sinks of a layer dropped", drop_sinks},
                                            {"a gain 1/16 larger", scale_gain},
                                            {"two experts' down swapped", swap_experts}};

static void check_mutations(struct target *t, const struct variant *plain) {
  struct us_err err = {0};
  size_t floats = t->params.floats;
  float *value = take(floats, sizeof *value);
  memcpy(value, t->params.value, floats * sizeof *value);
  for (size_t i = 0; i < sizeof mutations / sizeof mutations[0]; i++) {
    struct variant v = *plain;
    char name[96], note[256];
    need(us_rows_init(&v.rows, ROWS, &err), &err, t->name);
    v.rows.R = plain->rows.R;
    memcpy(v.rows.token, plain->rows.token, v.rows.R * sizeof *v.rows.token);
    memcpy(v.rows.label, plain->rows.label, v.rows.R * sizeof *v.rows.label);
    memcpy(v.rows.position, plain->rows.position, v.rows.R * sizeof *v.rows.position);
    memcpy(v.rows.document, plain->rows.document, v.rows.R * sizeof *v.rows.document);
    memcpy(v.rows.weight, plain->rows.weight, v.rows.R * sizeof *v.rows.weight);
    mutations[i].apply(t, &v);
    struct result r = run_gpu(t, &v, false);
    struct lab_difference d = lab_compare(&t->params, r.grad, &t->noise, GRADIENT_FACTOR);
    snprintf(name, sizeof name, "mutation is seen: %s", mutations[i].name);
    snprintf(note, sizeof note, "%zu of %zu tensors beyond, worst %.1f: %s", d.beyond, d.tensors, d.worst,
             d.name);
    record(t->name, name, 1, d.beyond == 0, note);
    memcpy(t->params.value, value, floats * sizeof *value);
    us_rows_release(&v.rows);
    release(&r);
  }
  free(value);
}

static void check_target(struct target *t) {
  struct variant v = {.shape = t->shape, .rows = t->rows, .memory = US_TRAIN_SAVE};
  run_cpu(t, false);
  struct result saved = run_gpu(t, &v, true), again = run_gpu(t, &v, false);
  check_loss(t, &saved, false, "cross-entropy");
  check_gradients(t->name, &t->params, saved.grad, &t->noise, "cross-entropy");
  check_same(t, &saved, &again, "two runs give the same bits");
  v.memory = US_TRAIN_RECOMPUTE;
  struct result recomputed = run_gpu(t, &v, false);
  check_same(t, &saved, &recomputed, "both memory modes give the same bits");
  v.memory = US_TRAIN_SAVE;
  check_mutations(t, &v);
  v.kl = true;
  run_cpu(t, true);
  struct result kl = run_gpu(t, &v, false);
  check_loss(t, &kl, true, "KL");
  check_gradients(t->name, &t->params, kl.grad, &t->noise, "KL");
  release(&saved);
  release(&again);
  release(&recomputed);
  release(&kl);
}

/* Drafters */

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

static struct drafter open_drafter(struct target *t) {
  struct us_err err = {0};
  struct drafter d = {.t = t, .shape = draft_shape(&t->shape, 2, 8)};
  d.shape.tap_layer[2] = t->shape.layers - 1;
  size_t R = t->rows.R, D = t->shape.hidden, first = 0;
  need(us_draft_shape_check(&d.shape, &t->shape, &err), &err, t->name);
  need(us_params_init_fresh_draft(&d.params, &d.shape, 31, 0.0f, &err), &err, t->name);
  lab_stir_vectors(&d.params, 32);
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
  us_draft_loss(&t->seq, &loss, &d->blocks, d->cpu->hidden, t->cpu->head->compute, D, t->shape.vocab,
                d->hidden, d->cpu->dhidden);
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
  struct us_cuda_draft_teacher teacher = {.head = d->target->head, .hidden = d->target->hidden};
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

static void check_drafter(struct target *t) {
  static const struct {
    const char *name;
    struct us_draft_loss options;
  } losses[] = {{"CE uniform", {.kind = US_DRAFT_CE, .weights = US_DRAFT_UNIFORM}},
                {"CE exp", {.kind = US_DRAFT_CE, .weights = US_DRAFT_EXP, .gamma = 4.0f}},
                {"CE dpace", {.kind = US_DRAFT_CE, .weights = US_DRAFT_DPACE, .alpha = 0.5f}},
                {"KL exp", {.kind = US_DRAFT_KL, .weights = US_DRAFT_EXP, .gamma = 4.0f}}};
  struct us_err err = {0};
  struct drafter d = open_drafter(t);
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
    if (i == 0) check_draft_mutations(&d, &losses[i].options, &noise);
    free(grad);
    free(again);
    free(noise.tensor);
  }
  close_drafter(&d);
}

/* Cases */

static void run_case(const char *name, struct us_cuda *cuda) {
  struct target t = open_target(name, cuda);
  open_executors(&t);
  size_t doubtful = settle(&t);
  record(name, "every choice of experts has its margin", t.rows.R, doubtful, "");
  check_target(&t);
  check_drafter(&t);
  close_target(&t);
}

int main(int count, char **arguments) {
  static const char *const names[] = {"tiny", "tiny-pro", "pico"};
  struct us_err err = {0};
  struct us_cuda *cuda;
  signal(SIGALRM, hung);
  alarm(280);
  if (count > 1 && strcmp(arguments[1], "speed") == 0) return lab_speed(count - 2, arguments + 2);
  need(us_cuda_open(0, &cuda, &err), &err, "GPU");
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    bool wanted = count < 2;
    for (int j = 1; j < count; j++) wanted |= strcmp(arguments[j], names[i]) == 0;
    if (wanted) run_case(names[i], cuda);
  }
  us_cuda_close(cuda);
  return any_failed ? 1 : 0;
}
