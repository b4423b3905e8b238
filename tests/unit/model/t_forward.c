/* t_forward.c: a row of the target pass has the same bits whatever runs with it. What the bits mean is tests/parity. */
#include "small.h"

#include <math.h>

enum { N = 97, D = 64, T = 150 };

static void assert_rows(const float *a, const float *b, size_t n, const char *what) {
  for (size_t i = 0; i < n; i++)
    ck_assert_msg(memcmp(&a[i], &b[i], sizeof *a) == 0, "%s: row %zu value %zu: %.9g, not %.9g", what, i / N,
                  i % N, (double)a[i], (double)b[i]);
}

/* Logits of all T positions in one pass. */
static float *prefill(const struct small *m) {
  float *logits = calloc(T * N, sizeof *logits);
  struct us_kv *kv = new_kv(m);
  run_rows(m, kv, 0, T, logits, NULL);
  us_kv_free(kv);
  return logits;
}

static const uint32_t windows[] = {16, 70};

START_TEST(prefill_equals_step_by_step_bit_for_bit) {
  for (int rounding = US_ROUND_BF16; rounding <= US_ROUND_NONE; rounding++) {
    struct small m = open_small(windows[_i], 2, (enum us_rounding)rounding);
    float *all = prefill(&m), step[N], size = 0;
    struct us_kv *kv = new_kv(&m);
    for (uint32_t p = 0; p < T; p++) {
      run_rows(&m, kv, p, p + 1, step, NULL);
      assert_rows(step, all + p * N, N, "step");
    }
    for (int i = 0; i < T * N; i++) size = fmaxf(size, fabsf(all[i]));
    ck_assert(isfinite(size) && size > 0.1f);
    us_kv_free(kv);
    free(all);
    close_small(&m);
  }
}
END_TEST

START_TEST(any_grouping_of_rows_gives_the_same_bits) {
  struct small m = open_small(windows[_i], 2, US_ROUND_BF16);
  float *all = prefill(&m), part[16 * N];
  for (uint32_t R = 2; R <= 16; R++) {
    struct us_kv *kv = new_kv(&m);
    for (uint32_t p = 0; p < T; p += R) {
      uint32_t end = p + R < T ? p + R : T;
      run_rows(&m, kv, p, end, part, NULL);
      assert_rows(part, all + p * N, (end - p) * N, "group");
    }
    us_kv_free(kv);
  }
  free(all);
  close_small(&m);
}
END_TEST

START_TEST(threads_do_not_change_a_bit) {
  struct small one = open_small(windows[_i], 1, US_ROUND_BF16);
  float *truth = prefill(&one);
  for (int threads = 2; threads <= 4; threads++) {
    struct small m = open_small(windows[_i], threads, US_ROUND_BF16);
    float *logits = prefill(&m);
    assert_rows(logits, truth, T * N, "threads");
    free(logits);
    close_small(&m);
  }
  free(truth);
  close_small(&one);
}
END_TEST

START_TEST(sequences_that_share_a_pass_do_not_see_each_other) {
  struct small m = open_small(windows[_i], 2, US_ROUND_BF16);
  float *all = prefill(&m), *mixed = calloc(3 * 20 * N, sizeof *mixed);
  struct us_kv *kv[3];
  struct us_row rows[60];
  struct us_err err = {0};
  const uint32_t start[3] = {0, 33, 100};
  for (int s = 0; s < 3; s++) {
    kv[s] = new_kv(&m);
    if (start[s]) run_rows(&m, kv[s], 0, start[s], NULL, NULL);
  }
  for (uint32_t i = 0; i < 60; i++) { /* interleaved */
    uint32_t s = i % 3, p = start[s] + i / 3;
    rows[i] = (struct us_row){.token = small_token(p), .position = p, .kv = kv[s]};
  }
  ck_assert_int_eq(m.ex->ops->forward(m.ex, &(struct us_pass){.rows = rows, .R = 60, .logits = mixed}, &err),
                   US_OK);
  for (uint32_t i = 0; i < 60; i++) assert_rows(mixed + i * N, all + rows[i].position * N, N, "mixed");
  for (int s = 0; s < 3; s++) us_kv_free(kv[s]);
  free(mixed);
  free(all);
  close_small(&m);
}
END_TEST

START_TEST(rejected_rows_leave_no_trace) {
  struct small m = open_small(windows[_i], 2, US_ROUND_BF16);
  float *all = prefill(&m), step[N];
  struct us_kv *kv = new_kv(&m);
  struct us_err err = {0};
  for (uint32_t p = 0; p < T; p++) {
    struct us_row rows[US_MAX_BLOCK];
    for (uint32_t j = 0; j < US_MAX_BLOCK; j++)
      rows[j] = (struct us_row){.token = (int32_t)(p + j) % 90, .position = p + j, .kv = kv};
    ck_assert_int_eq(m.ex->ops->forward(m.ex, &(struct us_pass){.rows = rows, .R = US_MAX_BLOCK}, &err),
                     US_OK);
    run_rows(&m, kv, p, p + 1, step, NULL);
    assert_rows(step, all + p * N, N, "after a rejected block");
  }
  us_kv_free(kv);
  free(all);
  close_small(&m);
}
END_TEST

START_TEST(forks_of_a_prompt_continue_as_the_prompt_would) {
  struct small m = open_small(windows[_i], 2, US_ROUND_BF16);
  float *all = prefill(&m), step[N];
  struct us_kv *parent = new_kv(&m), *child;
  struct us_err err = {0};
  run_rows(&m, parent, 0, 100, NULL, NULL);
  ck_assert_int_eq(us_kv_fork(parent, &child, &err), US_OK);
  struct us_row other = {.token = 3, .position = 100, .kv = parent};
  ck_assert_int_eq(m.ex->ops->forward(m.ex, &(struct us_pass){.rows = &other, .R = 1}, &err), US_OK);
  for (uint32_t p = 100; p < T; p++) {
    run_rows(&m, child, p, p + 1, step, NULL);
    assert_rows(step, all + p * N, N, "fork");
  }
  us_kv_free(parent);
  us_kv_free(child);
  free(all);
  close_small(&m);
}
END_TEST

START_TEST(only_wanted_logits_are_written) {
  struct small m = open_small(16, 2, US_ROUND_BF16);
  float *all = prefill(&m), *some = calloc(T * N, sizeof *some);
  struct us_kv *kv = new_kv(&m);
  struct us_row rows[T];
  uint8_t want[T];
  struct us_err err = {0};
  for (uint32_t p = 0; p < T; p++) {
    rows[p] = (struct us_row){.token = small_token(p), .position = p, .kv = kv};
    want[p] = p % 7 < 2 || p == T - 1;
  }
  ck_assert_int_eq(
      m.ex->ops->forward(m.ex, &(struct us_pass){.rows = rows, .R = T, .logits = some, .want_logits = want},
                         &err),
      US_OK);
  for (uint32_t p = 0; p < T; p++) {
    if (want[p])
      assert_rows(some + p * N, all + p * N, N, "wanted");
    else
      for (int i = 0; i < N; i++) ck_assert(some[p * N + (uint32_t)i] == 0);
  }
  us_kv_free(kv);
  free(some);
  free(all);
  close_small(&m);
}
END_TEST

/* ---- Observing ---- */

struct log {
  char text[4096];
  int calls, stop_after; /* stop_after calls; 0: never */
  float residual[4][3 * D];
};

static bool note(void *arg, const char *op, uint32_t layer, const float *values, size_t R, size_t width) {
  struct log *log = arg;
  size_t used = strlen(log->text);
  snprintf(log->text + used, sizeof log->text - used, "%s%d:%s", used ? " " : "", (int)layer, op);
  for (size_t i = 0; i < R * width; i++) ck_assert(isfinite(values[i]));
  if (strcmp(op, "residual") == 0) memcpy(log->residual[layer], values, R * width * sizeof *values);
  return ++log->calls != log->stop_after;
}

START_TEST(operations_are_observed_in_order_and_a_pass_stops_after_any_of_them) {
  static const char expected[] =
      "0:attn_norm 0:qkv 0:attention 0:o_proj 0:residual 0:mlp_norm 0:dense 0:residual "
      "1:attn_norm 1:qkv 1:attention 1:o_proj 1:residual 1:mlp_norm 1:router 1:experts 1:residual "
      "2:attn_norm 2:qkv 2:attention 2:o_proj 2:residual 2:mlp_norm 2:router 2:experts 2:residual "
      "3:attn_norm 3:qkv 3:attention 3:o_proj 3:residual 3:mlp_norm 3:router 3:experts 3:residual "
      "-1:final_norm -1:head";
  struct small m = open_small(16, 2, US_ROUND_BF16);
  float logits[3 * N];
  struct us_err err = {0};
  int ops = 0;
  for (const char *c = expected; *c; c++) ops += *c == ':';
  for (int stop = 0; stop <= ops; stop++) {
    struct log log = {.stop_after = stop};
    struct us_observer observer = {.after_op = note, .arg = &log};
    struct us_kv *kv = new_kv(&m);
    struct us_row rows[3];
    for (uint32_t p = 0; p < 3; p++)
      rows[p] = (struct us_row){.token = small_token(p), .position = p, .kv = kv};
    struct us_pass pass = {.rows = rows, .R = 3, .logits = logits, .observer = &observer};
    ck_assert_int_eq(m.ex->ops->forward(m.ex, &pass, &err), US_OK);
    ck_assert_int_eq(log.calls, stop ? stop : ops);
    ck_assert_int_eq(strncmp(log.text, expected, strlen(log.text)), 0);
    us_kv_free(kv);
  }
  close_small(&m);
}
END_TEST

START_TEST(taps_are_the_residual_stream_after_their_layers) {
  struct small m = open_small(16, 2, US_ROUND_BF16);
  struct log *log = calloc(1, sizeof *log);
  struct us_observer observer = {.after_op = note, .arg = log};
  float taps[3 * 2 * D];
  struct us_err err = {0};
  struct us_kv *kv = new_kv(&m);
  struct us_row rows[3];
  for (uint32_t p = 0; p < 3; p++)
    rows[p] = (struct us_row){.token = small_token(p), .position = p, .kv = kv};
  struct us_pass pass = {.rows = rows, .R = 3, .taps = taps, .observer = &observer};
  ck_assert_int_eq(m.ex->ops->forward(m.ex, &pass, &err), US_OK);
  for (int r = 0; r < 3; r++) {
    ck_assert_mem_eq(taps + (r * 2 + 0) * D, log->residual[0] + r * D, D * sizeof *taps);
    ck_assert_mem_eq(taps + (r * 2 + 1) * D, log->residual[3] + r * D, D * sizeof *taps);
  }
  us_kv_free(kv);
  free(log);
  close_small(&m);
}
END_TEST

START_TEST(routed_ids_are_ascending_and_dense_layers_have_none) {
  struct small m = open_small(16, 2, US_ROUND_BF16);
  uint32_t routed[4 * 5 * 3];
  struct us_kv *kv = new_kv(&m);
  struct us_row rows[5];
  struct us_err err = {0};
  for (uint32_t p = 0; p < 5; p++)
    rows[p] = (struct us_row){.token = small_token(p), .position = p, .kv = kv};
  struct us_pass pass = {.rows = rows, .R = 5, .routed = routed};
  ck_assert_int_eq(m.ex->ops->forward(m.ex, &pass, &err), US_OK);
  for (int i = 0; i < 15; i++) ck_assert_uint_eq(routed[i], UINT32_MAX);
  for (int i = 15; i < 60; i += 3)
    ck_assert(routed[i] < routed[i + 1] && routed[i + 1] < routed[i + 2] && routed[i + 2] < 12);
  us_kv_free(kv);
  close_small(&m);
}
END_TEST

START_TEST(bad_rows_are_refused) {
  struct small m = open_small(16, 1, US_ROUND_BF16);
  struct us_kv *kv = new_kv(&m), *draft_kv = new_draft_kv(&m);
  struct us_err err = {0};
  const struct us_row bad[] = {{.token = 97, .kv = kv},
                               {.token = -1, .kv = kv},
                               {.token = 0, .position = 512, .kv = kv},
                               {.token = 0},
                               {.token = 0, .kv = draft_kv}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    ck_assert_int_eq(m.ex->ops->forward(m.ex, &(struct us_pass){.rows = &bad[i], .R = 1}, &err),
                     US_ERR_USAGE);
  ck_assert_int_eq(m.ex->ops->forward(m.ex, &(struct us_pass){.R = 0}, &err), US_OK);
  us_kv_free(kv);
  us_kv_free(draft_kv);
  close_small(&m);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("forward");
  tcase_add_loop_test(c, prefill_equals_step_by_step_bit_for_bit, 0, 2);
  tcase_add_loop_test(c, any_grouping_of_rows_gives_the_same_bits, 0, 2);
  tcase_add_loop_test(c, threads_do_not_change_a_bit, 0, 2);
  tcase_add_loop_test(c, sequences_that_share_a_pass_do_not_see_each_other, 0, 2);
  tcase_add_loop_test(c, rejected_rows_leave_no_trace, 0, 2);
  tcase_add_loop_test(c, forks_of_a_prompt_continue_as_the_prompt_would, 0, 2);
  tcase_add_test(c, only_wanted_logits_are_written);
  tcase_add_test(c, operations_are_observed_in_order_and_a_pass_stops_after_any_of_them);
  tcase_add_test(c, taps_are_the_residual_stream_after_their_layers);
  tcase_add_test(c, routed_ids_are_ascending_and_dense_layers_have_none);
  tcase_add_test(c, bad_rows_are_refused);
  return us_suite("forward", c);
}
US_TEST_MAIN(make_suite)
