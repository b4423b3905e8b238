/* t_metrics.c: every figure against a naive computation in double from the same hidden rows. */
#include "model/precision.h"
#include "training/metrics.h"

#include "tiny_shards.h"

#include <math.h>

enum { LENGTH = 48, WINDOWS = 7 };

static struct tiny_world world;
static struct us_model *quantized;

static void open_all(void) {
  struct us_err err = {0};
  struct us_precision_rules rules;
  open_world(&world);
  US_OK_OR_FAIL(us_precision_parse("all=mxfp4", &rules, &err));
  struct us_convert convert = {.rules = &rules, .scale_rule = US_SCALE_MSE};
  US_OK_OR_FAIL(us_model_convert(world.model, &convert, NULL, &quantized, &err));
}

static void close_all(void) {
  us_model_free(quantized);
  close_world(&world);
}

static struct us_metrics measure(struct us_model *base, struct us_model *other) {
  struct us_err err = {0};
  struct us_metrics metrics;
  struct us_metrics_job job = {.models = {base, other},
                               .n = other ? 2 : 1,
                               .shards = world.shards,
                               .length = LENGTH,
                               .windows = WINDOWS};
  US_OK_OR_FAIL(us_metrics_run(&job, world.pool, &metrics, &err));
  return metrics;
}

/* A window of one model: probabilities (R, N) in double, and the experts chosen. */
struct naive {
  struct us_params params;
  struct us_seq seq;
  struct us_model_train *train;
  double *p; /* (R, N) */
};

static void open_naive(struct naive *n, struct us_model *model) {
  struct us_err err = {0};
  us_seq_init(&n->seq, NULL, US_SEQ_ROUND_BF16);
  US_OK_OR_FAIL(us_params_init_model(&n->params, model, NULL, true, &err));
  US_OK_OR_FAIL(
      us_model_train_create(&model->shape, &n->params, &n->seq, LENGTH, US_TRAIN_FORWARD, &n->train, &err));
  n->p = malloc(LENGTH * (size_t)model->shape.vocab * sizeof *n->p);
}

static void run_naive(struct naive *n, const struct us_batch *batch) {
  struct us_err err = {0};
  size_t D = n->train->shape.hidden, N = n->train->shape.vocab;
  US_OK_OR_FAIL(us_model_train_forward(n->train, batch, NULL, &err));
  for (size_t r = 0; r < batch->R; r++) {
    double sum = 0.0, *p = n->p + r * N;
    for (size_t v = 0; v < N; v++) {
      double logit = 0.0;
      for (size_t k = 0; k < D; k++)
        logit += (double)n->train->hidden[r * D + k] * (double)n->train->head->compute[v * D + k];
      p[v] = exp(logit);
      sum += p[v];
    }
    for (size_t v = 0; v < N; v++) p[v] /= sum;
  }
}

static void close_naive(struct naive *n) {
  us_model_train_free(n->train);
  us_params_release(&n->params);
  us_seq_release(&n->seq);
  free(n->p);
}

static size_t largest(const double *p, size_t n) {
  size_t best = 0;
  for (size_t i = 1; i < n; i++)
    if (p[i] > p[best]) best = i;
  return best;
}

/* What is expected of model 1 against model 0. */
struct expected {
  double kl[WINDOWS], nll[2][WINDOWS], tokens[WINDOWS], overlap, agree, hits[2], sets, pairs,
      all_kl[WINDOWS * LENGTH];
  size_t rows;
};

static bool same_experts(const uint32_t *a, const uint32_t *b, uint32_t K, uint32_t E) {
  for (uint32_t e = 0; e < E; e++) {
    bool in_a = false, in_b = false;
    for (uint32_t k = 0; k < K; k++) in_a |= a[k] == e, in_b |= b[k] == e;
    if (in_a != in_b) return false;
  }
  return true;
}

static void expect_row(struct expected *e, size_t window, struct naive n[2], size_t r, int32_t label) {
  size_t N = world.shape.vocab;
  const double *p = n[0].p + r * N, *q = n[1].p + r * N;
  double kl = 0.0;
  for (size_t v = 0; v < N; v++) {
    kl += p[v] * log(p[v] / q[v]);
    e->overlap += fmin(p[v], q[v]);
  }
  e->kl[window] += kl;
  e->all_kl[e->rows++] = kl;
  e->tokens[window] += 1.0;
  e->nll[0][window] -= log(p[label]);
  e->nll[1][window] -= log(q[label]);
  e->agree += largest(p, N) == largest(q, N);
  e->hits[0] += largest(p, N) == (size_t)label;
  e->hits[1] += largest(q, N) == (size_t)label;
  for (uint32_t l = 0; l < world.shape.layers; l++) {
    if (!world.shape.moe_layer[l]) continue;
    uint32_t K = world.shape.top_k;
    e->pairs += 1.0;
    e->sets += same_experts(us_model_train_routed(n[0].train, l) + r * K,
                            us_model_train_routed(n[1].train, l) + r * K, K, world.shape.experts);
  }
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static struct expected *expect(struct us_model *base, struct us_model *other) {
  struct us_err err = {0};
  struct expected *e = calloc(1, sizeof *e);
  struct naive n[2];
  struct us_window window;
  struct us_rows rows;
  size_t held = us_shards_n_heldout(world.shards, LENGTH + 1);
  ck_assert_uint_gt(held, WINDOWS);
  open_naive(&n[0], base);
  open_naive(&n[1], other);
  US_OK_OR_FAIL(us_window_init(&window, LENGTH + 1, &err));
  US_OK_OR_FAIL(us_rows_init(&rows, LENGTH, &err));
  for (size_t w = 0; w < WINDOWS; w++) {
    us_shards_heldout(world.shards, w * held / WINDOWS, &window);
    rows.R = 0;
    us_rows_add(&rows, &window, false);
    struct us_batch batch = us_rows_batch(&rows);
    for (int m = 0; m < 2; m++) run_naive(&n[m], &batch);
    for (size_t r = 0; r < rows.R; r++) expect_row(e, w, n, r, window.ids[r + 1]);
  }
  qsort(e->all_kl, e->rows, sizeof *e->all_kl, by_value);
  us_rows_release(&rows);
  us_window_release(&window);
  close_naive(&n[0]);
  close_naive(&n[1]);
  return e;
}

static double total(const double *x, size_t n) {
  double sum = 0.0;
  for (size_t i = 0; i < n; i++) sum += x[i];
  return sum;
}

static double ratio_error(const double *sum, const double *weight, size_t n) {
  double mean = total(sum, n) / total(weight, n), squares = 0.0;
  for (size_t i = 0; i < n; i++) squares += (sum[i] - mean * weight[i]) * (sum[i] - mean * weight[i]);
  return sqrt(squares * (double)n / (double)(n - 1)) / total(weight, n);
}

static void near(double value, double expected, const char *what) {
  ck_assert_msg(fabs(value - expected) <= 2e-5 * fabs(expected) + 1e-9, "%s: %.10g, expected %.10g", what,
                value, expected);
}

START_TEST(every_figure_is_that_of_a_naive_computation_in_double) {
  struct us_metrics metrics = measure(world.model, quantized);
  struct expected *e = expect(world.model, quantized);
  const struct us_metrics_model *m = &metrics.models[1];
  double n = (double)e->rows, difference[WINDOWS];
  ck_assert_uint_eq(metrics.tokens, e->rows);
  ck_assert_uint_eq(metrics.windows, WINDOWS);
  near(m->kl, total(e->kl, WINDOWS) / n, "kl");
  near(m->kl_error, ratio_error(e->kl, e->tokens, WINDOWS), "kl error");
  near(m->kl_max, e->all_kl[e->rows - 1], "largest kl");
  double at = 0.9 * (n - 1.0);
  size_t i = (size_t)at;
  near(m->kl_90, e->all_kl[i] + (at - (double)i) * (e->all_kl[i + 1] - e->all_kl[i]), "kl 90 %");
  near(m->top1, e->agree / n, "same token");
  near(m->top1_error, sqrt(m->top1 * (1.0 - m->top1) / n), "error of same token");
  near(m->overlap, e->overlap / n, "overlap");
  near(m->router, e->sets / e->pairs, "same experts");
  ck_assert_msg(e->sets > 0.0 && e->sets < e->pairs, "the routers must differ now and then");
  for (int k = 0; k < 2; k++) {
    near(metrics.models[k].nll, total(e->nll[k], WINDOWS) / n, "nll");
    near(metrics.models[k].nll_error, ratio_error(e->nll[k], e->tokens, WINDOWS), "nll error");
    near(metrics.models[k].perplexity, exp(total(e->nll[k], WINDOWS) / n), "perplexity");
    near(metrics.models[k].accuracy, e->hits[k] / n, "accuracy");
  }
  for (int w = 0; w < WINDOWS; w++) difference[w] = e->nll[1][w] - e->nll[0][w];
  near(m->ln_ratio, total(difference, WINDOWS) / n, "ln ratio");
  near(m->ln_ratio_error, ratio_error(difference, e->tokens, WINDOWS), "error of ln ratio");
  double bytes = (double)us_shards_text_bytes(world.shards, US_PART_HELDOUT);
  double tokens = (double)us_shards_tokens(world.shards, US_PART_HELDOUT);
  near(m->bits_per_byte, log2(m->perplexity) * tokens / bytes, "bits a byte");
  us_metrics_release(&metrics);
  free(e);
}
END_TEST

START_TEST(a_model_agrees_with_itself) {
  struct us_metrics metrics = measure(quantized, quantized);
  const struct us_metrics_model *m = &metrics.models[1];
  ck_assert_double_eq(m->kl, 0.0);
  ck_assert_double_eq(m->kl_max, 0.0);
  ck_assert_double_eq(m->top1, 1.0);
  ck_assert_double_eq(m->router, 1.0);
  ck_assert_double_eq(m->ln_ratio, 0.0);
  ck_assert_double_eq_tol(m->overlap, 1.0, 1e-5);
  us_metrics_release(&metrics);
}
END_TEST

START_TEST(the_figures_do_not_depend_on_the_threads) {
  struct us_err err = {0};
  struct us_metrics one, two = measure(world.model, quantized);
  struct us_metrics_job job = {.models = {world.model, quantized},
                               .n = 2,
                               .shards = world.shards,
                               .length = LENGTH,
                               .windows = WINDOWS};
  US_OK_OR_FAIL(us_metrics_run(&job, NULL, &one, &err));
  ck_assert(memcmp(one.models[1].window, two.models[1].window, WINDOWS * sizeof *one.models[1].window) == 0);
  ck_assert(memcmp(one.models[1].token_kl, two.models[1].token_kl, one.tokens * sizeof(float)) == 0);
  us_metrics_release(&one);
  us_metrics_release(&two);
}
END_TEST

START_TEST(zero_windows_take_everything_held_out_once) {
  struct us_err err = {0};
  struct us_metrics metrics;
  struct us_metrics_job job = {.models = {world.model}, .n = 1, .shards = world.shards, .length = LENGTH};
  US_OK_OR_FAIL(us_metrics_run(&job, world.pool, &metrics, &err));
  ck_assert_uint_eq(metrics.tokens, us_shards_tokens(world.shards, US_PART_HELDOUT) - 1);
  us_metrics_release(&metrics);
}
END_TEST

START_TEST(the_share_of_the_gap_is_a_ratio_of_sums_with_a_paired_error) {
  struct us_metrics_window ptq[3] = {{.kl = 2}, {.kl = 4}, {.kl = 6}},
                           qat[3] = {{.kl = 1}, {.kl = 1}, {.kl = 4}};
  struct us_metrics metrics = {
      .n = 3, .windows = 3, .models = {{0}, {.kl = 12, .window = ptq}, {.kl = 6, .window = qat}}};
  double closed, error;
  us_metrics_gap(&metrics, 1, 2, &closed, &error);
  ck_assert_double_eq_tol(closed, 0.5, 1e-12);
  /* residuals 0, -1, 1 */
  ck_assert_double_eq_tol(error, sqrt(2.0 * 3.0 / 2.0) / 12.0, 1e-12);
}
END_TEST

START_TEST(quantiles_are_linear_between_neighbours) {
  const float x[] = {1, 2, 4, 8};
  ck_assert_double_eq(us_metrics_quantile(x, 4, 0.0), 1.0);
  ck_assert_double_eq(us_metrics_quantile(x, 4, 0.5), 3.0);
  ck_assert_double_eq_tol(us_metrics_quantile(x, 4, 0.9), 4.0 + 0.7 * 4.0, 1e-12);
  ck_assert_double_eq(us_metrics_quantile(x, 4, 1.0), 8.0);
  ck_assert(isnan(us_metrics_quantile(x, 0, 0.5)));
}
END_TEST

START_TEST(models_of_other_vocabularies_and_weights_that_are_not_finite_are_refused) {
  struct us_err err = {0};
  struct us_metrics metrics;
  struct us_shape wide = world.shape;
  struct us_model *other;
  wide.vocab = 320;
  US_OK_OR_FAIL(us_model_random(&wide, 1, NULL, &other, &err));
  struct us_metrics_job job = {
      .models = {world.model, other}, .n = 2, .shards = world.shards, .length = LENGTH, .windows = 1};
  ck_assert_int_eq(us_metrics_run(&job, NULL, &metrics, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "320") && strstr(err.message, "288"), "%s", err.message);
  other->final_norm[3] = INFINITY;
  job = (struct us_metrics_job){
      .models = {other}, .n = 1, .shards = world.shards, .length = LENGTH, .windows = 1};
  ck_assert_int_eq(us_metrics_run(&job, NULL, &metrics, &err), US_ERR_CHECK);
  us_model_free(other);
}
END_TEST

/* The world's weights, with a bias of its own that decides alone which experts are visited. */
static struct us_model *with_choices(float bias) {
  struct us_err err = {0};
  struct us_params params;
  struct us_model *model;
  US_OK_OR_FAIL(us_params_init_model(&params, world.model, NULL, false, &err));
  for (size_t i = 0; i < params.count; i++)
    for (size_t k = 0; params.items[i].group == US_PARAM_BIAS && k < params.items[i].rows; k++)
      params.items[i].value[k] = k % 2 ? bias : -bias;
  US_OK_OR_FAIL(us_model_create(&world.shape, &model, &err));
  US_OK_OR_FAIL(us_params_export(&params, model, &err));
  us_params_release(&params);
  return model;
}

START_TEST(what_choices_alone_differ_in_is_gone_with_the_bases_experts) {
  struct us_err err = {0};
  struct us_model *base = with_choices(0.0f), *other = with_choices(0.3f);
  struct us_metrics own = measure(base, other), forced;
  struct us_metrics_job job = {.models = {base, other, quantized},
                               .n = 3,
                               .shards = world.shards,
                               .base_experts = true,
                               .length = LENGTH,
                               .windows = WINDOWS};
  US_OK_OR_FAIL(us_metrics_run(&job, world.pool, &forced, &err));
  ck_assert_double_gt(own.models[1].kl, 1e-6);
  ck_assert_double_lt(own.models[1].router, 0.9);
  ck_assert_double_eq(forced.models[1].kl, 0.0);
  ck_assert_double_eq(forced.models[1].router, 1.0);
  ck_assert_double_gt(forced.models[2].kl, 0.0); /* rounding is still there */
  us_metrics_release(&own);
  own = measure(base, other); /* and a later run goes its own ways again */
  ck_assert_double_gt(own.models[1].kl, 1e-6);
  us_metrics_release(&own);
  us_metrics_release(&forced);
  us_model_free(base);
  us_model_free(other);
}
END_TEST

START_TEST(the_bases_experts_want_moe_layers_like_its_own) {
  struct us_err err = {0};
  struct us_metrics metrics;
  struct us_shape narrow = world.shape;
  struct us_model *other;
  narrow.top_k = 1;
  US_OK_OR_FAIL(us_model_random(&narrow, 1, NULL, &other, &err));
  struct us_metrics_job job = {.models = {world.model, other},
                               .n = 2,
                               .shards = world.shards,
                               .base_experts = true,
                               .length = LENGTH,
                               .windows = 1};
  ck_assert_int_eq(us_metrics_run(&job, NULL, &metrics, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "other MoE layers") != NULL, "%s", err.message);
  us_model_free(other);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("metrics");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, every_figure_is_that_of_a_naive_computation_in_double);
  tcase_add_test(c, a_model_agrees_with_itself);
  tcase_add_test(c, the_figures_do_not_depend_on_the_threads);
  tcase_add_test(c, zero_windows_take_everything_held_out_once);
  tcase_add_test(c, the_share_of_the_gap_is_a_ratio_of_sums_with_a_paired_error);
  tcase_add_test(c, quantiles_are_linear_between_neighbours);
  tcase_add_test(c, models_of_other_vocabularies_and_weights_that_are_not_finite_are_refused);
  tcase_add_test(c, what_choices_alone_differ_in_is_gone_with_the_bases_experts);
  tcase_add_test(c, the_bases_experts_want_moe_layers_like_its_own);
  return us_suite("metrics", c);
}

US_TEST_MAIN(make_suite)
