/* t_model_train.c: forward and backward of whole models: against PyTorch in float64 (goldens), against the reference
 * executor, and properties: threads, recomputation, an overfit. */
#include "training/model_train.h"
#include "kernels/head_loss/head_loss.h"
#include "model/executor.h"
#include "training/trainer.h"

#include "grad_goldens.h"
#include "tiny.h"

#include <math.h>
#include <stdlib.h>

struct model {
  struct us_shape shape;
  struct us_params params;
  struct us_pool *pool;
  struct us_seq seq;
  struct us_model_train *train;
  struct tiny_rows rows;
};

static void open_model(struct model *m, struct us_shape shape, int threads, enum us_seq_rounding rounding,
                       enum us_train_memory memory) {
  struct us_err err = {0};
  *m = (struct model){.shape = shape};
  ck_assert_msg(us_params_init_fresh(&m->params, &m->shape, 1, 0.02f, &err) == US_OK, "%s", err.message);
  tiny_fill(&m->params);
  tiny_rows_fill(&m->rows);
  ck_assert_int_eq(us_pool_create(threads, &m->pool, &err), US_OK);
  us_seq_init(&m->seq, m->pool, rounding);
  ck_assert_int_eq(us_params_refresh(&m->params, m->pool, rounding, &err), US_OK);
  ck_assert_msg(us_model_train_create(&m->shape, &m->params, &m->seq, 64, memory, &m->train, &err) == US_OK,
                "%s", err.message);
}

static void close_model(struct model *m) {
  us_model_train_free(m->train);
  us_seq_release(&m->seq);
  us_pool_free(m->pool);
  us_params_release(&m->params);
}

/* Forward, loss and backward with these weights and teacher; the loss's weights sum to 1 / scale. */
static double run(struct model *m, const float *weight, const struct us_head_teacher *teacher, float scale) {
  struct us_err err = {0};
  struct us_batch batch = tiny_batch(&m->rows);
  ck_assert_msg(us_model_train_forward(m->train, &batch, NULL, &err) == US_OK, "%s", err.message);
  struct us_head_loss loss = {.R = TINY_ROWS,
                              .D = 32,
                              .N = 96,
                              .x = m->train->hidden,
                              .head = m->train->head->compute,
                              .label = m->rows.label,
                              .weight = weight,
                              .teacher = teacher,
                              .scale = scale,
                              .dx = m->train->dhidden,
                              .dhead = us_param_grad(m->train->head)};
  us_params_zero_grad(&m->params, m->pool);
  us_head_loss(&m->seq, &loss);
  ck_assert_int_eq(us_model_train_backward(m->train, &err), US_OK);
  return loss.total;
}

/* --- PyTorch --- */

/* FP32 against float64: sums of up to 96 terms a product, 12 products deep. Measured 6e-7 of a tensor's norm; 8 times. */
#define GOLDEN_TOLERANCE 5e-6

static void compare(const struct model *m, const struct grad_golden *golden, size_t count, double loss,
                    double expected) {
  ck_assert_double_eq_tol(loss, expected, 1e-5);
  for (size_t i = 0; i < count; i++) {
    const struct us_param *p = us_params_find(&m->params, golden[i].name);
    ck_assert_msg(p != NULL, "%s is missing", golden[i].name);
    size_t n = p->rows * p->cols, at[3] = {0, n / 2, n - 1};
    double norm = 0.0;
    for (size_t k = 0; k < n; k++) norm += (double)p->grad[k] * (double)p->grad[k];
    norm = sqrt(norm);
    ck_assert_msg(fabs(norm - golden[i].norm) <= GOLDEN_TOLERANCE * golden[i].norm,
                  "%s: norm %.9g, expected %.9g", p->name, norm, golden[i].norm);
    for (int s = 0; s < 3; s++)
      ck_assert_msg(fabs((double)p->grad[at[s]] - golden[i].sample[s]) <= GOLDEN_TOLERANCE * golden[i].norm,
                    "%s[%zu]: %.9g, expected %.9g", p->name, at[s], (double)p->grad[at[s]],
                    golden[i].sample[s]);
  }
}

#define COMPARE(model, tag, loss)                                                                            \
  compare(model, golden_##tag, sizeof golden_##tag / sizeof golden_##tag[0], loss, golden_loss_##tag)

static double weights_of_slots(float weight[TINY_ROWS]) {
  double sum = 0.0;
  for (int i = 0; i < TINY_ROWS; i++) {
    weight[i] = i % 8 == 0 ? 0.0f : (float)exp(-(i % 8 - 1) / 4.0);
    sum += (double)weight[i];
  }
  return sum;
}

static void check_goldens(bool flash) {
  struct model m;
  float weight[TINY_ROWS], teacher_x[TINY_ROWS * 8], teacher_head[96 * 8];
  double sum = weights_of_slots(weight);
  for (uint64_t k = 0; k < TINY_ROWS * 8; k++) teacher_x[k] = tiny_value(tiny_hash("teacher.x"), k);
  for (uint64_t k = 0; k < 96 * 8; k++) teacher_head[k] = 2.0f * tiny_value(tiny_hash("teacher.head"), k);
  struct us_head_teacher teacher = {.x = teacher_x, .D = 8, .head = teacher_head};
  open_model(&m, flash ? tiny_flash() : tiny_pro(), 1, US_SEQ_ROUND_NONE, US_TRAIN_SAVE);
  double ce = run(&m, NULL, NULL, 1.0f / TINY_ROWS);
  if (flash)
    COMPARE(&m, flash_ce, ce);
  else
    COMPARE(&m, pro_ce, ce);
  double weighted = run(&m, weight, NULL, (float)(1.0 / sum));
  if (flash)
    COMPARE(&m, flash_weighted, weighted);
  else
    COMPARE(&m, pro_weighted, weighted);
  double kl = run(&m, NULL, &teacher, 1.0f / TINY_ROWS);
  if (flash)
    COMPARE(&m, flash_kl, kl);
  else
    COMPARE(&m, pro_kl, kl);
  close_model(&m);
}

START_TEST(fused_model_has_the_gradients_of_pytorch) {
  check_goldens(false);
}
END_TEST

START_TEST(split_model_has_the_gradients_of_pytorch) {
  check_goldens(true);
}
END_TEST

/* --- the reference executor --- */

/* Largest difference of the final hidden states' logits, relative to the largest logit. */
static double executor_difference(struct us_shape shape, bool rounds) {
  struct us_err err = {0};
  struct model m;
  struct us_model *model = NULL;
  struct us_executor *ex = NULL;
  open_model(&m, shape, 2, rounds ? US_SEQ_ROUND_BF16 : US_SEQ_ROUND_NONE, US_TRAIN_FORWARD);
  ck_assert_int_eq(us_model_create(&m.shape, &model, &err), US_OK);
  ck_assert_msg(us_params_export(&m.params, model, &err) == US_OK, "%s", err.message);
  us_params_release(&m.params); /* weights as exported: bf16 */
  ck_assert_int_eq(us_params_init_model(&m.params, model, NULL, true, &err), US_OK);
  us_model_train_free(m.train);
  ck_assert_int_eq(us_model_train_create(&m.shape, &m.params, &m.seq, 64, US_TRAIN_FORWARD, &m.train, &err),
                   US_OK);
  ck_assert_int_eq(
      us_executor_create_reference(model, NULL, m.pool, rounds ? US_ROUND_BF16 : US_ROUND_NONE, &ex, &err),
      US_OK);
  struct us_batch batch = tiny_batch(&m.rows);
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_OK);
  double worst = 0.0, largest = 0.0;
  for (uint32_t first = 0; first < TINY_ROWS; first = first ? TINY_ROWS : TINY_FIRST) {
    uint32_t n = first ? TINY_ROWS - TINY_FIRST : TINY_FIRST;
    struct us_kv *kv = NULL;
    struct us_kv_spec spec = us_kv_spec_of(&shape);
    struct us_row rows[TINY_ROWS];
    float *logits = malloc((size_t)n * 96 * sizeof *logits);
    ck_assert_int_eq(us_kv_create(&spec, 64, rounds ? US_KV_BF16 : US_KV_F32, &kv, &err), US_OK);
    for (uint32_t i = 0; i < n; i++) {
      /* one row a pass: a pass may hold no more rows of a sequence than the ring of a window allows */
      rows[i] = (struct us_row){.token = m.rows.token[first + i], .position = i, .kv = kv};
      struct us_pass pass = {.rows = &rows[i], .R = 1, .logits = logits + (size_t)i * 96};
      ck_assert_msg(ex->ops->forward(ex, &pass, &err) == US_OK, "%s", err.message);
    }
    for (uint32_t i = 0; i < n; i++)
      for (uint32_t v = 0; v < 96; v++) {
        double own = 0.0, other = (double)logits[i * 96 + v];
        for (int d = 0; d < 32; d++)
          own += (double)m.train->hidden[(first + i) * 32 + (uint32_t)d] *
                 (double)m.train->head->value[v * 32 + (uint32_t)d];
        worst = fmax(worst, fabs(own - other));
        largest = fmax(largest, fabs(other));
      }
    us_kv_free(kv);
    free(logits);
  }
  ex->ops->free(ex);
  us_model_free(model);
  close_model(&m);
  return worst / largest;
}

START_TEST(forward_agrees_with_the_reference_executor) {
  /* FP32 in both: orders of summation differ, a few 2^-24 times sqrt(96) a product. Measured 6e-7. */
  ck_assert_double_lt(executor_difference(tiny_pro(), false), 5e-6);
  ck_assert_double_lt(executor_difference(tiny_flash(), false), 5e-6);
}
END_TEST

START_TEST(rounded_forward_agrees_with_the_reference_executor) {
  /* A sum that lands beside a rounding boundary moves one of about 10^4 activations by 2^-8 of itself: below 1e-3 of the
   * logits. Here none does: measured 6e-8. Without any rounding the difference is 5e-3, with sinks moved by 3 it is 0.14. */
  ck_assert_double_lt(executor_difference(tiny_pro(), true), 1e-3);
  ck_assert_double_lt(executor_difference(tiny_flash(), true), 1e-3);
}
END_TEST

/* --- properties --- */

static float *gradients(int threads, enum us_train_memory memory, size_t *ret_n) {
  struct model m;
  open_model(&m, tiny_pro(), threads, US_SEQ_ROUND_BF16, memory);
  run(&m, NULL, NULL, 1.0f / TINY_ROWS);
  float *copy = malloc(m.params.floats * sizeof *copy);
  memcpy(copy, m.params.grad, m.params.floats * sizeof *copy);
  *ret_n = m.params.floats;
  close_model(&m);
  return copy;
}

START_TEST(threads_and_recomputation_do_not_change_a_bit) {
  size_t n = 0;
  float *first = gradients(1, US_TRAIN_SAVE, &n);
  for (int i = 1; i < 6; i++) {
    float *other = gradients(i, i % 2 ? US_TRAIN_RECOMPUTE : US_TRAIN_SAVE, &n);
    ck_assert_msg(memcmp(first, other, n * sizeof *first) == 0, "%d threads", i);
    free(other);
  }
  free(first);
}
END_TEST

START_TEST(frozen_tensors_get_no_gradient_and_leave_the_others_alone) {
  struct model m;
  size_t n = 0;
  float *all = gradients(1, US_TRAIN_SAVE, &n);
  open_model(&m, tiny_pro(), 1, US_SEQ_ROUND_BF16, US_TRAIN_SAVE);
  for (size_t i = 0; i < m.params.count; i++)
    m.params.items[i].frozen = strcmp(m.params.items[i].family, "experts") != 0;
  run(&m, NULL, NULL, 1.0f / TINY_ROWS);
  for (size_t i = 0; i < m.params.count; i++) {
    const struct us_param *p = &m.params.items[i];
    for (size_t k = 0; k < p->rows * p->cols; k++)
      ck_assert_msg(p->grad[k] == (p->frozen ? 0.0f : all[p->offset + k]), "%s[%zu]", p->name, k);
  }
  close_model(&m);
  free(all);
}
END_TEST

START_TEST(documents_do_not_see_each_other) {
  struct model m;
  struct us_err err = {0};
  open_model(&m, tiny_pro(), 1, US_SEQ_ROUND_BF16, US_TRAIN_FORWARD);
  struct us_batch batch = tiny_batch(&m.rows);
  float before[TINY_ROWS * 32];
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_OK);
  memcpy(before, m.train->hidden, sizeof before);
  m.rows.token[3] = (m.rows.token[3] + 1) % 96;
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_OK);
  ck_assert(memcmp(before, m.train->hidden, 3 * 32 * sizeof(float)) == 0);
  ck_assert(memcmp(before + 96, m.train->hidden + 96, 32 * sizeof(float)) != 0);
  ck_assert(memcmp(before + TINY_FIRST * 32, m.train->hidden + TINY_FIRST * 32, 15 * 32 * sizeof(float)) ==
            0);
  close_model(&m);
}
END_TEST

START_TEST(taps_are_the_stream_after_their_layers) {
  struct model m;
  struct us_err err = {0};
  float taps[TINY_ROWS * 2 * 32];
  open_model(&m, tiny_pro(), 1, US_SEQ_ROUND_NONE, US_TRAIN_FORWARD);
  struct us_batch batch = tiny_batch(&m.rows);
  struct us_train_taps wanted = {.count = 2, .layer = {0, 2}, .out = taps};
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, &wanted, &err), US_OK);
  const float *gain = us_params_find(&m.params, "model.norm.weight")->value;
  for (int r = 0; r < TINY_ROWS; r++) { /* the last layer's tap, normed, is the hidden row */
    double square = 0.0;
    const float *tap = taps + (r * 2 + 1) * 32;
    for (int d = 0; d < 32; d++) square += (double)tap[d] * (double)tap[d];
    for (int d = 0; d < 32; d++)
      ck_assert_double_eq_tol((double)m.train->hidden[r * 32 + d],
                              (double)tap[d] / sqrt(square / 32 + 1e-5) * (double)gain[d], 1e-5);
  }
  close_model(&m);
}
END_TEST

static struct us_learner_set *place(struct model *m) {
  struct us_learner *learner = NULL;
  struct us_learner_set *set = NULL;
  struct us_err err = {0};
  ck_assert_int_eq(us_learner_create_cpu(m->seq.pool, &learner, &err), US_OK);
  ck_assert_int_eq(us_learner_place(learner, &m->params, &set, &err), US_OK);
  return set;
}

static void leave(struct us_learner_set *set) {
  struct us_learner *learner = set->learner;
  us_learner_remove(set);
  us_learner_free(learner);
}

static double overfit(enum us_optim_kind kind, double rate) {
  struct model m;
  struct us_err err = {0};
  open_model(&m, tiny_pro(), 2, US_SEQ_ROUND_BF16, US_TRAIN_SAVE);
  struct us_learner_set *set = place(&m);
  struct us_trainer trainer = {.set = set,
                               .optim = us_optim_default(kind),
                               .clip = 1.0,
                               .schedule = {.kind = US_SCHEDULE_COSINE, .peak = rate, .warmup = 0.1},
                               .steps = 60};
  double loss = 0.0;
  ck_assert_int_eq(us_trainer_start(&trainer, false, &err), US_OK);
  struct us_batch batch = tiny_batch(&m.rows);
  while (!us_trainer_done(&trainer)) {
    ck_assert_int_eq(us_trainer_open_step(&trainer, &err), US_OK);
    ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_OK);
    struct us_head_loss head = {.R = TINY_ROWS,
                                .D = 32,
                                .N = 96,
                                .x = m.train->hidden,
                                .head = m.train->head->compute,
                                .label = m.rows.label,
                                .scale = 1.0f / TINY_ROWS,
                                .dx = m.train->dhidden,
                                .dhead = us_param_grad(m.train->head)};
    us_head_loss(&m.seq, &head);
    ck_assert_int_eq(us_model_train_backward(m.train, &err), US_OK);
    us_model_train_balance(m.train, 1e-3f);
    ck_assert_int_eq(us_trainer_close_step(&trainer, head.total, TINY_ROWS, &err), US_OK);
    loss = head.total;
  }
  leave(set);
  close_model(&m);
  return loss;
}

START_TEST(a_small_batch_is_learnt_by_heart) {
  ck_assert_double_lt(overfit(US_OPTIM_ADAMW, 1e-2), 0.5); /* from ln 96 = 4.6 */
  ck_assert_double_lt(overfit(US_OPTIM_MUON, 1e-2), 0.5);
}
END_TEST

START_TEST(a_gradient_that_is_not_finite_stops_the_step_and_is_named) {
  struct model m;
  struct us_err err = {0};
  open_model(&m, tiny_pro(), 1, US_SEQ_ROUND_BF16, US_TRAIN_SAVE);
  struct us_learner_set *set = place(&m);
  struct us_trainer trainer = {
      .set = set, .optim = us_optim_default(US_OPTIM_ADAMW), .steps = 5, .schedule = {.peak = 1e-3}};
  ck_assert_int_eq(us_trainer_start(&trainer, false, &err), US_OK);
  ck_assert_int_eq(us_trainer_open_step(&trainer, &err), US_OK);
  struct us_param *p = us_params_find(&m.params, "model.layers.1.self_attn.o_proj.weight");
  float before = p->value[0];
  p->grad[7] = NAN;
  ck_assert_int_eq(us_trainer_close_step(&trainer, 1.0, 1, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, p->name) != NULL, "%s", err.message);
  ck_assert(p->value[0] == before && trainer.step == 0);
  p->value[3] = INFINITY;
  ck_assert_int_eq(us_trainer_open_step(&trainer, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, p->name) != NULL, "%s", err.message);
  leave(set);
  close_model(&m);
}
END_TEST

START_TEST(batches_that_do_not_fit_are_refused) {
  struct model m;
  struct us_err err = {0};
  open_model(&m, tiny_pro(), 1, US_SEQ_ROUND_BF16, US_TRAIN_FORWARD);
  struct us_batch batch = tiny_batch(&m.rows);
  batch.R = 65;
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_ERR_USAGE);
  batch.R = TINY_ROWS;
  m.rows.token[5] = 96;
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_ERR_INPUT);
  m.rows.token[5] = 0, m.rows.document[5] = 6;
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_ERR_USAGE);
  m.rows.document[5] = 0;
  ck_assert_int_eq(us_model_train_forward(m.train, &batch, NULL, &err), US_OK);
  ck_assert_int_eq(us_model_train_backward(m.train, &err), US_ERR_USAGE);
  close_model(&m);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("model_train");
  tcase_add_test(c, fused_model_has_the_gradients_of_pytorch);
  tcase_add_test(c, split_model_has_the_gradients_of_pytorch);
  tcase_add_test(c, forward_agrees_with_the_reference_executor);
  tcase_add_test(c, rounded_forward_agrees_with_the_reference_executor);
  tcase_add_test(c, threads_and_recomputation_do_not_change_a_bit);
  tcase_add_test(c, frozen_tensors_get_no_gradient_and_leave_the_others_alone);
  tcase_add_test(c, documents_do_not_see_each_other);
  tcase_add_test(c, taps_are_the_stream_after_their_layers);
  tcase_add_test(c, a_small_batch_is_learnt_by_heart);
  tcase_add_test(c, a_gradient_that_is_not_finite_stops_the_step_and_is_named);
  tcase_add_test(c, batches_that_do_not_fit_are_refused);
  return us_suite("model_train", c);
}

US_TEST_MAIN(make_suite)
