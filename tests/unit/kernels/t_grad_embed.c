/* t_grad_embed.c: embedding rows and their gradient. */
#include "kernels/embed/embed_grad.h"
#include "gradcheck.h"

enum { R = 9, N = 5, D = 3 };
static const int32_t token[R] = {4, 0, 4, -1, 2, 4, 0, -1, 4};

START_TEST(rows_are_gathered_and_gradients_scattered) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  double *table = gc_random(N * D, 1), *weight = gc_random(R * D, 1);
  float *t = gc_float(table, N * D), *dx = gc_float(weight, R * D), x[R * D], *dtable = gc_zeros(N * D);
  us_embed_seq(&seq, token, R, D, t, x);
  double expected[N * D];
  for (int i = 0; i < N * D; i++) expected[i] = dtable[i] = 0.5f; /* added to */
  for (int r = 0; r < R; r++)
    for (int d = 0; d < D; d++) {
      ck_assert(x[r * D + d] == (token[r] < 0 ? 0.0f : t[token[r] * D + d]));
      if (token[r] >= 0) expected[token[r] * D + d] += weight[r * D + d];
    }
  us_embed_grad(&seq, token, R, N, D, dx, dtable);
  gc_near("dtable", dtable, expected, N * D, 1e-6);
  us_seq_release(&seq);
}
END_TEST

static void scatter(struct us_seq *seq, void *arg, float *out) {
  enum { ROWS = 4000, IDS = 600 };
  static int32_t ids[ROWS];
  for (int i = 0; i < ROWS; i++) ids[i] = (i * 7919) % (i % 3 ? IDS : 5);
  us_embed_grad(seq, ids, ROWS, IDS, 4, arg, out);
}

START_TEST(threads_do_not_matter) {
  float *dx = gc_float(gc_random(16000, 1), 16000);
  gc_threads(scatter, dx, 2400, US_SEQ_ROUND_NONE);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("embed");
  tcase_add_test(c, rows_are_gathered_and_gradients_scattered);
  tcase_add_test(c, threads_do_not_matter);
  return us_suite("grad_embed", c);
}

US_TEST_MAIN(make_suite)
