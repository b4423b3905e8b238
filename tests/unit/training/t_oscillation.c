/* t_oscillation.c: weights whose codes go to and fro: what counts, when they are fixed and where, and that they stay. */
#include "training/optim.h"

#include "tiny.h"

#define MEMORY 0.9f

/* One weight over the rounded values of its steps; returns the step at which it was fixed, 0 if it was not. */
static size_t watch(const float *rounded, size_t steps, float threshold, struct us_oscillation *ret_last) {
  struct us_oscillation_rule rule = {.memory = MEMORY, .threshold = threshold};
  struct us_oscillation o = {0};
  size_t fixed = 0;
  for (size_t i = 1; i < steps; i++) {
    float value = us_oscillation_watch(&rule, rounded[i - 1], rounded[i], 99.0f, &o);
    if (!fixed && value != 99.0f) fixed = i;
    if (fixed) ck_assert(value == o.mean);
  }
  *ret_last = o;
  return fixed;
}

/* The paper's formulas, in double, from the codes alone. */
static void reference(const float *rounded, size_t steps, double *ret_share, double *ret_mean) {
  double share = 0.0, mean = (double)rounded[0], memory = (double)MEMORY;
  int turn = 0;
  for (size_t i = 1; i < steps; i++) {
    int now = (rounded[i] > rounded[i - 1]) - (rounded[i] < rounded[i - 1]);
    bool back = now && turn && now != turn;
    if (now) turn = now;
    share = memory * share + (1.0 - memory) * (back ? 1.0 : 0.0);
    mean = memory * mean + (1.0 - memory) * (double)rounded[i];
  }
  *ret_share = share, *ret_mean = mean;
}

START_TEST(shares_and_means_are_those_of_the_paper) {
  uint64_t state = us_test_seed();
  for (int trial = 0; trial < 50; trial++) {
    float rounded[40], code = 3.0f;
    for (int i = 0; i < 40; i++) {
      state = tiny_mix(state);
      if (state % 3 == 0) code += state & 256 ? 0.5f : -0.5f;
      rounded[i] = code;
    }
    struct us_oscillation o;
    double share, mean;
    ck_assert_uint_eq(watch(rounded, 40, INFINITY, &o), 0);
    reference(rounded, 40, &share, &mean);
    ck_assert_double_eq_tol((double)o.share, share, 1e-6);
    ck_assert_double_eq_tol((double)o.mean, mean, 1e-5);
  }
}
END_TEST

START_TEST(a_code_that_goes_to_and_fro_is_fixed_between_its_two_places) {
  float rounded[40];
  struct us_oscillation o;
  for (int i = 0; i < 40; i++) rounded[i] = i % 2 ? 1.0f : 1.5f;
  size_t fixed = watch(rounded, 40, 0.5f, &o);
  /* From the second move on every step is a way back: 1 - 0.9^n > 0.5 at n = 7. */
  ck_assert_uint_eq(fixed, 8);
  ck_assert(o.turn == US_OSCILLATION_HELD);
  ck_assert_double_gt((double)o.mean, 1.0);
  ck_assert_double_lt((double)o.mean, 1.5);
}
END_TEST

START_TEST(a_code_that_goes_on_or_rests_is_not_fixed) {
  float on[40], rests[40], once[40];
  struct us_oscillation o;
  for (int i = 0; i < 40; i++) on[i] = 0.5f * (float)i, rests[i] = 2.0f, once[i] = i == 20 ? 1.5f : 1.0f;
  ck_assert_uint_eq(watch(on, 40, 1e-6f, &o), 0);
  ck_assert_uint_eq(watch(rests, 40, 1e-6f, &o), 0);
  ck_assert(o.turn == 0.0f && o.mean == 2.0f);
  ck_assert_uint_eq(watch(once, 40, 0.2f, &o), 0);
  ck_assert_uint_eq(watch(once, 40, 0.05f, &o), 21);
}
END_TEST

START_TEST(a_scale_that_drifts_is_no_move) {
  float drifts[40];
  struct us_oscillation o;
  for (int i = 0; i < 40; i++) drifts[i] = -2.0f * (1.0f + 0.01f * (float)(i % 2));
  ck_assert_uint_eq(watch(drifts, 40, 1e-6f, &o), 0);
  ck_assert(o.turn == 0.0f);
  for (int i = 0; i < 40; i++) drifts[i] = i % 2 ? 0.0f : -1e-6f; /* from 0 any move is one */
  ck_assert_uint_ne(watch(drifts, 40, 0.5f, &o), 0);
}
END_TEST

START_TEST(thresholds_fall_from_the_first_to_the_last) {
  struct us_freeze freeze = {.first = 0.1, .last = 0.02, .memory = 0.97};
  ck_assert(isinf(us_freeze_rule(&freeze, 0.0).threshold) &&
            isinf(us_freeze_rule(&freeze, 0.0999).threshold));
  ck_assert_double_eq_tol((double)us_freeze_rule(&freeze, 0.1).threshold, 0.1, 1e-7);
  ck_assert_double_eq_tol((double)us_freeze_rule(&freeze, 0.55).threshold, 0.06, 1e-7);
  ck_assert_double_eq_tol((double)us_freeze_rule(&freeze, 1.0).threshold, 0.02, 1e-7);
  ck_assert_double_eq_tol((double)us_freeze_rule(&freeze, 1.5).threshold, 0.02, 1e-7);
  ck_assert(us_freeze_rule(&freeze, 0.5).memory == 0.97f);
  freeze.first = 0.0;
  ck_assert(us_freeze_rule(&freeze, 0.5).threshold == 0.0f);
}
END_TEST

/* Parameters whose layers are MXFP4 and FP8, that AdamW takes to and fro by a rate far beyond a code's width. */
struct shaken {
  struct us_params params;
  struct us_seq seq;
  struct us_optim optim;
};

static void open_shaken(struct shaken *s, struct us_pool *pool) {
  struct us_shape shape = tiny_pro();
  *s = (struct shaken){.optim = us_optim_default(US_OPTIM_ADAMW)};
  ck_assert_int_eq(us_params_init_fresh(&s->params, &shape, 5, 0.05f, NULL), US_OK);
  for (size_t i = 0; i < s->params.count; i++) {
    struct us_param *p = &s->params.items[i];
    if (strcmp(p->family, "experts") == 0) p->encoding.format = US_FORMAT_MXFP4;
    if (strcmp(p->family, "qkv") == 0) p->encoding.format = US_FORMAT_FP8;
  }
  ck_assert_int_eq(us_params_watch(&s->params, NULL), US_OK);
  us_seq_init(&s->seq, pool, US_SEQ_ROUND_BF16);
}

static void close_shaken(struct shaken *s) {
  us_seq_release(&s->seq);
  us_params_release(&s->params);
}

static void shake(struct shaken *s, int steps, float threshold) {
  for (int i = 0; i < steps; i++) {
    ck_assert_int_eq(us_params_refresh(&s->params, s->seq.pool, US_SEQ_ROUND_BF16, NULL), US_OK);
    s->optim.step++;
    for (size_t k = 0; k < s->params.floats; k++)
      s->params.grad[k] =
          (s->optim.step + k) % 2 ? 1.0f : -1.5f; /* beta1 below its usual: signs turn at once */
    s->optim.beta1 = 0.0;
    s->optim.oscillation = (struct us_oscillation_rule){.memory = 0.9f, .threshold = threshold};
    us_optim_step(&s->optim, &s->params, 0.02, &s->seq);
  }
}

START_TEST(what_is_fixed_stays_and_what_is_not_watched_moves) {
  struct shaken s;
  open_shaken(&s, NULL);
  shake(&s, 12, INFINITY);
  ck_assert_double_eq(us_params_held(&s.params), 0.0);
  shake(&s, 1, 0.3f);
  double held = us_params_held(&s.params);
  ck_assert_msg(held > 0.2 && held < 1.0, "%g are fixed", held);
  size_t bytes = s.params.floats * sizeof(float), fixed = 0, moved = 0;
  float *before = malloc(bytes), *turn = malloc(bytes);
  memcpy(before, s.params.value, bytes);
  memcpy(turn, s.params.watch.turn, bytes);
  shake(&s, 1, INFINITY);
  for (size_t i = 0; i < s.params.count; i++) {
    const struct us_param *p = &s.params.items[i];
    bool watched = us_param_is_watched(&s.params, p);
    ck_assert_int_eq(watched, strcmp(p->family, "experts") == 0 || strcmp(p->family, "qkv") == 0);
    for (size_t k = p->offset; k < p->offset + p->rows * p->cols; k++) {
      bool same = memcmp(&before[k], &s.params.value[k], sizeof(float)) == 0;
      if (!watched) ck_assert(turn[k] == 0.0f);
      if (turn[k] == US_OSCILLATION_HELD) {
        fixed++;
        ck_assert_msg(same && before[k] == s.params.watch.mean[k], "%s moved", p->name);
      } else {
        moved += !same;
      }
    }
  }
  ck_assert_uint_gt(fixed, 1000);
  ck_assert_uint_gt(moved, 1000);
  free(before);
  free(turn);
  close_shaken(&s);
}
END_TEST

START_TEST(threads_change_no_bit_and_no_threshold_changes_nothing) {
  struct us_pool *pool = NULL;
  struct shaken one, many, none;
  ck_assert_int_eq(us_pool_create(3, &pool, NULL), US_OK);
  open_shaken(&one, NULL);
  open_shaken(&many, pool);
  open_shaken(&none, NULL);
  shake(&one, 14, 0.3f);
  shake(&many, 14, 0.3f);
  size_t bytes = one.params.floats * sizeof(float);
  ck_assert(memcmp(one.params.value, many.params.value, bytes) == 0);
  ck_assert(memcmp(one.params.watch.share, many.params.watch.share, bytes) == 0);
  ck_assert(memcmp(one.params.watch.mean, many.params.watch.mean, bytes) == 0);
  ck_assert(memcmp(one.params.watch.turn, many.params.watch.turn, bytes) == 0);
  shake(&none, 14, 0.0f);
  ck_assert(memcmp(one.params.value, none.params.value, bytes) != 0);
  for (size_t k = 0; k < none.params.floats; k++) ck_assert(none.params.watch.turn[k] == 0.0f);
  close_shaken(&one);
  close_shaken(&many);
  close_shaken(&none);
  us_pool_free(pool);
}
END_TEST

START_TEST(a_master_that_is_not_finite_is_left_to_the_refresh) {
  struct shaken s;
  open_shaken(&s, NULL);
  shake(&s, 2, 0.3f);
  struct us_err err = {0};
  struct us_param *p = NULL;
  for (size_t i = 0; i < s.params.count && !p; i++)
    if (us_param_is_watched(&s.params, &s.params.items[i])) p = &s.params.items[i];
  ck_assert_ptr_nonnull(p);
  p->value[3] = NAN;
  us_params_hold(&s.params, NULL, &s.optim.oscillation);
  ck_assert_int_eq(us_params_refresh(&s.params, NULL, US_SEQ_ROUND_BF16, &err), US_ERR_CHECK);
  ck_assert_msg(strstr(err.message, p->name) != NULL, "%s", err.message);
  close_shaken(&s);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("oscillation");
  tcase_add_test(c, shares_and_means_are_those_of_the_paper);
  tcase_add_test(c, a_code_that_goes_to_and_fro_is_fixed_between_its_two_places);
  tcase_add_test(c, a_code_that_goes_on_or_rests_is_not_fixed);
  tcase_add_test(c, a_scale_that_drifts_is_no_move);
  tcase_add_test(c, thresholds_fall_from_the_first_to_the_last);
  tcase_add_test(c, what_is_fixed_stays_and_what_is_not_watched_moves);
  tcase_add_test(c, threads_change_no_bit_and_no_threshold_changes_nothing);
  tcase_add_test(c, a_master_that_is_not_finite_is_left_to_the_refresh);
  return us_suite("oscillation", c);
}

US_TEST_MAIN(make_suite)
