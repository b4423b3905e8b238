/* t_likeliest.c: a recorded model against another: figures of metrics.h (t_metrics.c checks those) are the truth. */
#include "base/h5.h"
#include "model/precision.h"
#include "training/likeliest.h"
#include "training/metrics.h"

#include "tiny_shards.h"

#include <math.h>

enum { LENGTH = 49 };

static struct tiny_world world;
static struct us_model *quantized;
static char path[96];

static void open_all(void) {
  struct us_err err = {0};
  struct us_precision_rules rules;
  open_world(&world);
  US_OK_OR_FAIL(us_precision_parse("all=mxfp4", &rules, &err));
  struct us_convert convert = {.rules = &rules, .scale_rule = US_SCALE_MSE};
  US_OK_OR_FAIL(us_model_convert(world.model, &convert, NULL, &quantized, &err));
  snprintf(path, sizeof path, "%s/top.h5", world.folder);
}

static void close_all(void) {
  unlink(path);
  us_model_free(quantized);
  close_world(&world);
}

static struct us_likeliest record(uint32_t k, size_t windows) {
  struct us_err err = {0};
  struct us_likeliest l;
  struct us_likeliest_job job = {
      .model = world.model, .shards = world.shards, .windows = windows, .length = LENGTH, .k = k};
  US_OK_OR_FAIL(us_likeliest_measure(&job, world.pool, &l, &err));
  return l;
}

static struct us_likeliest_figures compare(const struct us_likeliest *l, struct us_model *model) {
  struct us_err err = {0};
  struct us_likeliest_figures f;
  US_OK_OR_FAIL(us_likeliest_compare(l, model, NULL, world.pool, &f, &err));
  return f;
}

/* 256 of 288 tokens, by a random model: the rest has at most a tenth of the mass, and hides a part of the divergence in
 * proportion. Never more is seen than there is, but for rounding by 1/4096 nat. */
START_TEST(figures_are_those_of_both_models_side_by_side) {
  struct us_err err = {0};
  struct us_metrics m;
  struct us_metrics_job job = {
      .models = {world.model, quantized}, .n = 2, .shards = world.shards, .length = LENGTH - 1, .windows = 1};
  US_OK_OR_FAIL(us_metrics_run(&job, world.pool, &m, &err));
  struct us_likeliest l = record(256, 1);
  struct us_likeliest_figures f = compare(&l, quantized);
  ck_assert_uint_eq(f.tokens, LENGTH - 1);
  ck_assert_double_gt(m.models[1].kl, 0.005);
  ck_assert_double_lt(f.kl, m.models[1].kl + 1.0 / 4096);
  ck_assert_double_gt(f.kl, 0.95 * m.models[1].kl);
  ck_assert_double_eq_tol(f.top1, m.models[1].top1, 1e-12);
  ck_assert_double_eq_tol(f.perplexity / m.models[1].perplexity, 1, 1e-6);
  ck_assert_double_eq_tol(f.base / m.models[0].perplexity, 1, 1e-6);
  ck_assert_double_eq_tol(f.ln_ratio, m.models[1].ln_ratio, 1e-6);
  us_likeliest_release(&l);
  us_metrics_release(&m);
}
END_TEST

START_TEST(a_model_agrees_with_itself) {
  struct us_likeliest l = record(16, 3);
  struct us_likeliest_figures f = compare(&l, world.model);
  ck_assert_uint_eq(f.tokens, 3 * (LENGTH - 1));
  ck_assert(f.kl >= 0 && f.kl < 1e-6); /* second order in the rounding of 2.4e-4 */
  ck_assert(f.top1 == 1 && fabs(f.ln_ratio) < 1e-6);
  us_likeliest_release(&l);
}
END_TEST

START_TEST(fewer_tokens_show_less_divergence_never_more) {
  double last = 1e9;
  for (uint32_t k = 256; k; k /= 4) {
    struct us_likeliest l = record(k, 3);
    double kl = compare(&l, quantized).kl;
    ck_assert_double_lt(kl, last + 5e-4);
    ck_assert_double_gt(kl, -1e-6);
    last = kl;
    us_likeliest_release(&l);
  }
}
END_TEST

START_TEST(a_file_gives_back_what_was_written) {
  struct us_err err = {0};
  struct us_likeliest l = record(64, 2), back;
  US_OK_OR_FAIL(us_likeliest_write(&l, path, "{}", &err));
  US_OK_OR_FAIL(us_likeliest_open(path, &back, &err));
  ck_assert(back.vocab == l.vocab && back.k == 64 && back.windows == 2 && back.length == LENGTH &&
            back.rows == l.rows);
  ck_assert_str_eq(back.tokenizer_sha256, l.tokenizer_sha256);
  ck_assert_mem_eq(back.token, l.token, 2 * LENGTH * sizeof *l.token);
  ck_assert_mem_eq(back.document, l.document, 2 * LENGTH * sizeof *l.document);
  ck_assert_mem_eq(back.entry, l.entry, l.rows * 64 * sizeof *l.entry);
  ck_assert_mem_eq(back.rest, l.rest, l.rows * sizeof *l.rest);
  ck_assert_mem_eq(back.label_logprob, l.label_logprob, l.rows * sizeof *l.rest);
  us_likeliest_release(&l), us_likeliest_release(&back);
}
END_TEST

static void expect_refused(struct us_likeliest *l, const char *why) {
  struct us_err err = {0};
  struct us_likeliest back;
  US_OK_OR_FAIL(us_likeliest_write(l, path, "{}", &err));
  ck_assert_int_eq(us_likeliest_open(path, &back, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, why), "%s", err.message);
}

START_TEST(bad_files_are_refused_by_field) {
  struct us_err err = {0};
  struct us_likeliest l = record(4, 2), back;
  l.token[3] += 288;
  expect_refused(&l, "token: an id");
  l.token[3] -= 288;
  l.document[5] += 2;
  expect_refused(&l, "document: numbers");
  l.document[5] -= 2;
  l.entry[9] |= 300u << 16;
  expect_refused(&l, "entry: an id");
  l.entry[9] = 1u << 16;
  l.rest[1] = NAN;
  expect_refused(&l, "rest: not in 0..1");
  l.rest[1] = 0.5f;
  l.label_logprob[2] = 0.1f;
  expect_refused(&l, "label_logprob: not");
  l.label_logprob[2] = -0.1f;
  l.rows--;
  expect_refused(&l, "entry: rows are not");
  ck_assert_int_eq(us_likeliest_open("/nonexistent.h5", &back, &err), US_ERR_IO);
  us_likeliest_release(&l);
}
END_TEST

START_TEST(other_vocabularies_tokenizers_and_sizes_are_refused) {
  struct us_err err = {0};
  struct us_likeliest l = record(4, 1), other;
  struct us_likeliest_figures f;
  l.vocab = 300;
  ck_assert_int_eq(us_likeliest_compare(&l, world.model, NULL, world.pool, &f, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "288 tokens"), "%s", err.message);
  us_likeliest_release(&l);
  struct us_likeliest_job job = {
      .model = world.model, .shards = world.shards, .windows = 1 << 20, .length = LENGTH, .k = 4};
  ck_assert_int_eq(us_likeliest_measure(&job, world.pool, &other, &err), US_ERR_INPUT);
  ck_assert_msg(strstr(err.message, "the shards hold out"), "%s", err.message);
  job.windows = 1, job.k = 0;
  ck_assert_int_eq(us_likeliest_measure(&job, world.pool, &other, &err), US_ERR_USAGE);
}
END_TEST

/* The first weight of the final norm, of which every logit is made. */
static float *norm_of(struct us_model *model) {
  struct us_err err = {0};
  struct us_tensor_ref *refs = NULL;
  float *norm = NULL;
  size_t count = 0;
  US_OK_OR_FAIL(us_model_tensors(model, &refs, &count, &err));
  for (size_t i = 0; i < count; i++)
    if (strcmp(refs[i].name, "model.norm.weight") == 0) norm = *refs[i].vector;
  free(refs);
  ck_assert(norm != NULL);
  return norm;
}

START_TEST(logits_that_are_no_numbers_are_neither_recorded_nor_compared) {
  struct us_err err = {0};
  struct us_likeliest l = record(16, 2), other;
  struct us_likeliest_figures f;
  struct us_likeliest_job job = {
      .model = world.model, .shards = world.shards, .windows = 2, .length = LENGTH, .k = 16};
  float *norm = norm_of(world.model), before = *norm;
  *norm = NAN;
  enum us_status measured = us_likeliest_measure(&job, world.pool, &other, &err);
  enum us_status compared = us_likeliest_compare(&l, world.model, NULL, world.pool, &f, &err);
  *norm = before;
  ck_assert_int_eq(measured, US_ERR_CHECK);
  ck_assert_int_eq(compared, US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, "not finite") != NULL, "%s", err.message);
  us_likeliest_release(&l);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("likeliest");
  tcase_add_unchecked_fixture(c, open_all, close_all);
  tcase_add_test(c, figures_are_those_of_both_models_side_by_side);
  tcase_add_test(c, a_model_agrees_with_itself);
  tcase_add_test(c, fewer_tokens_show_less_divergence_never_more);
  tcase_add_test(c, a_file_gives_back_what_was_written);
  tcase_add_test(c, bad_files_are_refused_by_field);
  tcase_add_test(c, other_vocabularies_tokenizers_and_sizes_are_refused);
  tcase_add_test(c, logits_that_are_no_numbers_are_neither_recorded_nor_compared);
  return us_suite("likeliest", c);
}

US_TEST_MAIN(make_suite)
