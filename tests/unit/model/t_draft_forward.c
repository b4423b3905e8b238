/* t_draft_forward.c: the drafter's passes: invariances and visibility. What the bits mean is tests/parity. */
#include "small.h"

#include <math.h>

enum { N = 97, D = 64, T = 120, B = 8, TAPS = 2 * D };

static float *taps_of(const struct small *m) {
  float *taps = calloc(T * TAPS, sizeof *taps);
  struct us_kv *kv = new_kv(m);
  run_rows(m, kv, 0, T, NULL, taps);
  us_kv_free(kv);
  return taps;
}

static void add_context(const struct small *m, struct us_kv *kv, const float *taps, uint32_t from,
                        uint32_t to) {
  struct us_err err = {0};
  struct us_draft_context context = {.kv = kv, .position = from, .R = to - from, .taps = taps + from * TAPS};
  ck_assert_msg(m->ex->ops->draft_context(m->ex, &context, &err) == US_OK, "%s", err.message);
}

static void draft(const struct small *m, struct us_kv *kv, int32_t anchor, uint32_t position, uint32_t block,
                  float *logits) {
  struct us_err err = {0};
  struct us_draft_pass pass = {
      .kv = kv, .anchor = anchor, .position = position, .block = block, .logits = logits};
  ck_assert_msg(m->ex->ops->draft(m->ex, &pass, &err) == US_OK, "%s", err.message);
}

static bool same(const float *a, const float *b, size_t n) {
  return memcmp(a, b, n * sizeof *a) == 0;
}

START_TEST(context_may_arrive_in_any_pieces_and_threads_do_not_matter) {
  struct small m = open_small(30, 1, US_ROUND_BF16), many = open_small(30, 3, US_ROUND_BF16);
  float *taps = taps_of(&m), truth[7 * N], logits[7 * N];
  struct us_kv *kv = new_draft_kv(&m);
  add_context(&m, kv, taps, 0, T);
  draft(&m, kv, 5, T, B, truth);
  for (int i = 0; i < 7 * N; i++) ck_assert(isfinite(truth[i]));
  us_kv_free(kv);
  for (uint32_t step = 1; step < 20; step += 6) {
    kv = new_draft_kv(&many);
    for (uint32_t p = 0; p < T; p += step) add_context(&many, kv, taps, p, p + step < T ? p + step : T);
    draft(&many, kv, 5, T, B, logits);
    ck_assert(same(logits, truth, 7 * N));
    us_kv_free(kv);
  }
  free(taps);
  close_small(&m);
  close_small(&many);
}
END_TEST

START_TEST(drafting_leaves_the_cache_as_it_was) {
  struct small m = open_small(30, 2, US_ROUND_BF16);
  float *taps = taps_of(&m), first[7 * N], second[7 * N];
  struct us_kv *kv = new_draft_kv(&m);
  add_context(&m, kv, taps, 0, 60);
  draft(&m, kv, 5, 60, B, first);
  draft(&m, kv, 6, 60, B, second);
  ck_assert(!same(first, second, 7 * N)); /* every mask row sees the anchor */
  draft(&m, kv, 5, 60, B, second);
  ck_assert(same(first, second, 7 * N));
  us_kv_free(kv);
  free(taps);
  close_small(&m);
}
END_TEST

START_TEST(a_block_row_sees_the_rows_after_it) {
  struct small m = open_small(30, 2, US_ROUND_BF16);
  float *taps = taps_of(&m), eight[7 * N], four[3 * N];
  struct us_kv *kv = new_draft_kv(&m);
  add_context(&m, kv, taps, 0, 60);
  draft(&m, kv, 5, 60, 8, eight);
  draft(&m, kv, 5, 60, 4, four);
  for (int j = 0; j < 3; j++) ck_assert(!same(eight + j * N, four + j * N, N));
  us_kv_free(kv);
  free(taps);
  close_small(&m);
}
END_TEST

START_TEST(context_outside_the_window_does_not_matter_and_inside_it_does) {
  struct small m = open_small(30, 2, US_ROUND_BF16);
  float *taps = taps_of(&m), truth[7 * N], logits[7 * N];
  /* Query 80 sees keys from 51 on; the other queries fewer. */
  for (uint32_t changed = 45; changed < 80; changed++) {
    struct us_kv *kv = new_draft_kv(&m);
    add_context(&m, kv, taps, 0, 80);
    if (changed == 45) draft(&m, kv, 5, 80, B, truth);
    taps[changed * TAPS + 3] += 2.0f;
    add_context(&m, kv, taps, changed, changed + 1);
    taps[changed * TAPS + 3] -= 2.0f;
    draft(&m, kv, 5, 80, B, logits);
    ck_assert_msg(same(logits, truth, 7 * N) == (changed < 51), "context position %u", changed);
    us_kv_free(kv);
  }
  free(taps);
  close_small(&m);
}
END_TEST

START_TEST(no_context_and_a_block_of_one_are_allowed) {
  struct small m = open_small(30, 2, US_ROUND_BF16);
  float logits[7 * N], hidden[D];
  struct us_kv *kv = new_draft_kv(&m);
  struct us_err err = {0};
  draft(&m, kv, 5, 0, B, logits);
  for (int i = 0; i < 7 * N; i++) ck_assert(isfinite(logits[i]));
  struct us_draft_pass one = {
      .kv = kv, .anchor = 5, .position = 0, .block = 1, .logits = logits, .hidden = hidden};
  ck_assert_int_eq(m.ex->ops->draft(m.ex, &one, &err), US_OK);
  for (int i = 0; i < D; i++) ck_assert(isfinite(hidden[i]));
  us_kv_free(kv);
  close_small(&m);
}
END_TEST

START_TEST(bad_passes_are_refused) {
  struct small m = open_small(30, 1, US_ROUND_BF16);
  struct us_kv *kv = new_draft_kv(&m), *target_kv = new_kv(&m);
  float logits[16 * N];
  struct us_err err = {0};
  const struct us_draft_pass bad[] = {{.kv = kv, .anchor = 97, .block = 8, .logits = logits},
                                      {.kv = kv, .anchor = 0, .block = 0, .logits = logits},
                                      {.kv = kv, .anchor = 0, .block = 17, .logits = logits},
                                      {.kv = target_kv, .anchor = 0, .block = 8, .logits = logits}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    ck_assert_int_eq(m.ex->ops->draft(m.ex, &bad[i], &err), US_ERR_USAGE);
  us_kv_free(kv);
  us_kv_free(target_kv);
  close_small(&m);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("draft_forward");
  tcase_add_test(c, context_may_arrive_in_any_pieces_and_threads_do_not_matter);
  tcase_add_test(c, drafting_leaves_the_cache_as_it_was);
  tcase_add_test(c, a_block_row_sees_the_rows_after_it);
  tcase_add_test(c, context_outside_the_window_does_not_matter_and_inside_it_does);
  tcase_add_test(c, no_context_and_a_block_of_one_are_allowed);
  tcase_add_test(c, bad_passes_are_refused);
  return us_suite("draft_forward", c);
}
US_TEST_MAIN(make_suite)
