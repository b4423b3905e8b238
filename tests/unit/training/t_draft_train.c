/* t_draft_train.c: training passes draft what decoding drafts: same weights, same features, same anchors. */
#include "model/small.h"
#include "training/draft_train.h"

#include <math.h>

enum { N = 97, D = 64, T = 90, B = 8, TAPS = 2 * D, BLOCKS = 12 };

struct bench {
  struct small small;
  float *taps; /* (T, TAPS) of the executor's own pass */
  struct us_params params, target;
  struct us_seq seq;
  struct us_rows rows;
  struct us_draft_blocks blocks;
  struct us_draft_train *train;
};

static void open_bench(struct bench *x, uint32_t window, enum us_rounding rounding) {
  struct us_err err = {0};
  enum us_seq_rounding seq_rounding = rounding == US_ROUND_NONE ? US_SEQ_ROUND_NONE : US_SEQ_ROUND_BF16;
  *x = (struct bench){.small = open_small(window, 2, rounding)};
  struct us_kv *kv = new_kv(&x->small);
  x->taps = calloc(T * TAPS, sizeof *x->taps);
  run_rows(&x->small, kv, 0, T, NULL, x->taps);
  us_kv_free(kv);
  us_seq_init(&x->seq, x->small.pool, seq_rounding);
  ck_assert_int_eq(us_params_init_draft(&x->params, x->small.draft, false, &err), US_OK);
  ck_assert_int_eq(us_params_init_model(&x->target, x->small.model, NULL, true, &err), US_OK);
  ck_assert_int_eq(us_params_refresh(&x->params, x->small.pool, seq_rounding, &err), US_OK);
  ck_assert_int_eq(us_rows_init(&x->rows, T, &err), US_OK);
  x->rows.R = T;
  for (uint32_t r = 0; r < T; r++) {
    x->rows.token[r] = small_token(r), x->rows.label[r] = small_token(r + 1);
    x->rows.position[r] = r, x->rows.weight[r] = 1.0f;
  }
  const struct us_draft_shape *shape = &x->small.draft->shape;
  const float *embed = us_params_find(&x->target, "model.embed_tokens.weight")->compute;
  ck_assert_int_eq(us_draft_blocks_init(&x->blocks, shape, BLOCKS, &err), US_OK);
  ck_assert_msg(us_draft_train_create(shape, &x->params, embed, &x->seq, T, BLOCKS, &x->train, &err) == US_OK,
                "%s", err.message);
  us_draft_blocks_add(&x->blocks, &x->rows, 0, T, BLOCKS, us_test_seed(), 0, 0);
  ck_assert_uint_eq(x->blocks.n, BLOCKS);
  us_draft_blocks_aim(&x->blocks, T);
}

static void close_bench(struct bench *x) {
  us_draft_train_free(x->train);
  us_draft_blocks_release(&x->blocks);
  us_rows_release(&x->rows);
  us_params_release(&x->params);
  us_params_release(&x->target);
  us_seq_release(&x->seq);
  free(x->taps);
  close_small(&x->small);
}

static void run(struct bench *x) {
  struct us_err err = {0};
  ck_assert_msg(us_draft_train_forward(x->train, x->taps, T, x->rows.position, &x->blocks, &err) == US_OK,
                "%s", err.message);
}

/* Hidden rows (B, D) that decoding has at an anchor; opt_logits (B - 1, N). */
static void decode_logits(const struct bench *x, uint32_t anchor, float *hidden, float *opt_logits) {
  struct us_err err = {0};
  struct us_kv *kv = new_draft_kv(&x->small);
  struct us_executor *ex = x->small.ex;
  struct us_draft_context context = {.kv = kv, .R = anchor, .taps = x->taps};
  struct us_draft_pass pass = {.kv = kv,
                               .anchor = small_token(anchor),
                               .position = anchor,
                               .block = B,
                               .hidden = hidden,
                               .logits = opt_logits};
  ck_assert_msg(ex->ops->draft_context(ex, &context, &err) == US_OK, "%s", err.message);
  ck_assert_msg(ex->ops->draft(ex, &pass, &err) == US_OK, "%s", err.message);
  us_kv_free(kv);
}

static void decode(const struct bench *x, uint32_t anchor, float *hidden) {
  decode_logits(x, anchor, hidden, NULL);
}

/* Largest difference over the largest value. */
static double distance(const struct bench *x) {
  double largest = 0.0, difference = 0.0;
  float hidden[B * D];
  for (size_t b = 0; b < x->blocks.n; b++) {
    decode(x, x->blocks.anchor[b], hidden);
    for (size_t i = 0; i < B * D; i++) {
      largest = fmax(largest, fabs((double)hidden[i]));
      difference = fmax(difference, fabs((double)hidden[i] - (double)x->train->hidden[b * B * D + i]));
    }
  }
  return difference / largest;
}

/* FP32 sums of at most 128 terms in another order: 128 * 2^-24 = 8e-6 a product, a few of them on top of each other. */
static const double fp32_bound = 5e-5;

START_TEST(in_fp32_it_is_what_decoding_drafts) {
  static const uint32_t windows[] = {200, 30, 5}; /* all, some, fewer than a block */
  for (int i = 0; i < 3; i++) {
    struct bench x;
    open_bench(&x, windows[i], US_ROUND_NONE);
    run(&x);
    double d = distance(&x);
    ck_assert_msg(d <= fp32_bound, "window %u: %g", windows[i], d);
    close_bench(&x);
  }
}
END_TEST

/* Where both round to bf16, sums that differ in their last bits now and then round apart, by 2^-8 of a value that is then
 * one of tens in a sum: a few times 2^-8 of the largest at the end. */
START_TEST(in_bf16_it_is_what_decoding_drafts) {
  struct bench x;
  open_bench(&x, 30, US_ROUND_BF16);
  run(&x);
  double d = distance(&x);
  ck_assert_msg(d <= 0x1p-6, "%g", d);
  close_bench(&x);
}
END_TEST

/* Largest difference of decoding's logits from the head's products with training's rows, over the largest logit. Labels become what
 * decoding chose, or without `chosen` token 1, so that training sees the tokens before that decoding saw, or others. */
static double logits_distance(struct bench *x, bool chosen) {
  static float logits[BLOCKS][(B - 1) * N], hidden[B * D], weights[D];
  double largest = 0.0, difference = 0.0;
  for (size_t b = 0; b < x->blocks.n; b++) {
    decode_logits(x, x->blocks.anchor[b], hidden, logits[b]);
    for (uint32_t j = 1; j < B; j++) {
      const float *row = logits[b] + (j - 1) * N;
      x->blocks.label[b * B + j] = chosen ? us_sample_argmax(row, N) : 1;
    }
  }
  run(x);
  for (size_t n = 0; n < N; n++) {
    us_matrix_decode_row(&x->small.model->head, n, weights);
    for (size_t i = 0; i < x->blocks.n * B; i++) {
      const float *row = x->train->hidden + i * D;
      double sum = 0.0;
      if (i % B == 0) continue;
      for (size_t d = 0; d < D; d++) sum += (double)weights[d] * (double)row[d];
      largest = fmax(largest, fabs(sum));
      difference = fmax(difference, fabs(sum - (double)logits[i / B][(i % B - 1) * N + n]));
    }
  }
  return difference / largest;
}

START_TEST(a_markov_head_is_what_decoding_drafts) {
  struct bench x;
  small_markov = 32;
  open_bench(&x, 30, US_ROUND_NONE);
  double with = logits_distance(&x, true), without = logits_distance(&x, false);
  ck_assert_msg(with <= fp32_bound, "%g", with);
  ck_assert_msg(without > 100.0 * fp32_bound, "other tokens before change nothing: %g", without);
  close_bench(&x);
  small_markov = 0;
}
END_TEST

START_TEST(seeing_the_anchors_own_feature_shows) {
  struct bench x;
  open_bench(&x, 30, US_ROUND_NONE);
  for (size_t i = 0; i < BLOCKS * B; i++) x.blocks.range[1][i]++;
  run(&x);
  double leak = distance(&x);
  ck_assert_msg(leak > 100.0 * fp32_bound, "%g", leak);
  us_draft_blocks_aim(&x.blocks, T);
  for (size_t i = 0; i < BLOCKS * B; i++) x.blocks.range[0][i]++; /* a window that is too short */
  run(&x);
  ck_assert_double_gt(distance(&x), 10.0 * fp32_bound);
  us_draft_blocks_aim(&x.blocks, T);
  for (size_t i = 0; i < BLOCKS * B; i++) x.blocks.position[i]++; /* labels shifted by a position */
  run(&x);
  ck_assert_double_gt(distance(&x), 10.0 * fp32_bound);
  close_bench(&x);
}
END_TEST

START_TEST(the_anchors_and_later_features_do_not_matter) {
  struct bench x;
  open_bench(&x, 30, US_ROUND_BF16);
  run(&x);
  float *before = calloc(BLOCKS * B * D, sizeof *before);
  memcpy(before, x.train->hidden, BLOCKS * B * D * sizeof *before);
  uint32_t anchor = x.blocks.anchor[BLOCKS / 2];
  for (size_t i = anchor * TAPS; i < T * TAPS; i++) x.taps[i] += 3.0f;
  run(&x);
  size_t half = (BLOCKS / 2 + 1) * B * D;
  ck_assert(memcmp(before, x.train->hidden, half * sizeof *before) == 0);
  ck_assert(memcmp(before, x.train->hidden, BLOCKS * B * D * sizeof *before) !=
            0); /* later anchors do see it */
  x.taps[(anchor - 1) * TAPS] += 3.0f;
  run(&x);
  ck_assert(memcmp(before, x.train->hidden, half * sizeof *before) != 0);
  free(before);
  close_bench(&x);
}
END_TEST

START_TEST(a_pass_that_does_not_fit_is_refused) {
  struct bench x;
  struct us_err err = {0};
  open_bench(&x, 30, US_ROUND_BF16);
  ck_assert_int_eq(us_draft_train_forward(x.train, x.taps, T + 1, x.rows.position, &x.blocks, &err),
                   US_ERR_USAGE);
  x.rows.position[4] = T;
  ck_assert_int_eq(us_draft_train_forward(x.train, x.taps, T, x.rows.position, &x.blocks, &err),
                   US_ERR_USAGE);
  ck_assert_msg(strstr(err.message, "row 4") != NULL, "%s", err.message);
  x.blocks.B = 7;
  ck_assert_int_eq(us_draft_train_forward(x.train, x.taps, T, x.rows.position, &x.blocks, &err),
                   US_ERR_USAGE);
  x.blocks.B = B;
  close_bench(&x);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("draft_train");
  tcase_add_test(c, in_fp32_it_is_what_decoding_drafts);
  tcase_add_test(c, in_bf16_it_is_what_decoding_drafts);
  tcase_add_test(c, a_markov_head_is_what_decoding_drafts);
  tcase_add_test(c, seeing_the_anchors_own_feature_shows);
  tcase_add_test(c, the_anchors_and_later_features_do_not_matter);
  tcase_add_test(c, a_pass_that_does_not_fit_is_refused);
  return us_suite("draft_train", c);
}

US_TEST_MAIN(make_suite)
