/* t_grad_swiglu.c: SwiGLU over rows against its formula in double. */
#include "kernels/swiglu/swiglu_grad.h"
#include "gradcheck.h"

enum { R = 3, F = 21 };

struct swiglu_case {
  double *gate_up, *weight;
};

static double value(const double *row, int i) {
  return row[i] / (1.0 + exp(-row[i])) * row[F + i];
}

static double loss(void *arg) {
  const struct swiglu_case *c = arg;
  double sum = 0.0;
  for (int r = 0; r < R; r++)
    for (int i = 0; i < F; i++) sum += c->weight[r * F + i] * value(c->gate_up + r * 2 * F, i);
  return sum;
}

START_TEST(values_and_gradients_follow_the_formula) {
  struct swiglu_case c = {gc_random(R * 2 * F, 4), gc_random(R * F, 1)};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  float *h = gc_float(c.gate_up, R * 2 * F), *da = gc_float(c.weight, R * F), *a = gc_zeros(R * F);
  us_swiglu_seq(&seq, R, F, h, a);
  for (int i = 0; i < R * F; i++) {
    double expected = value(c.gate_up + i / F * 2 * F, i % F);
    ck_assert_double_eq_tol((double)a[i], expected, 1e-6 * (1.0 + fabs(expected)));
  }
  us_swiglu_grad(&seq, R, F, h, da, h);
  gc_check("d gate_up", loss, &c, c.gate_up, R * 2 * F, h, 1e-6);
  us_seq_release(&seq);
}
END_TEST

START_TEST(far_gates_neither_overflow_nor_clamp) {
  float h[8] = {-1000.0f, -90.0f, 90.0f, 1000.0f, 2.0f, 2.0f, 2.0f, 2.0f}, a[4], da[4] = {1, 1, 1, 1}, dh[8];
  us_swiglu_rows(&(struct us_seq){.rounding = US_SEQ_ROUND_NONE}, 1, 4, h, a);
  us_swiglu_grad_rows(1, 4, h, da, dh);
  for (int i = 0; i < 4; i++) ck_assert(isfinite(a[i]) && isfinite(dh[i]) && isfinite(dh[4 + i]));
  ck_assert(a[3] == 2000.0f && a[2] == 180.0f && fabsf(a[0]) < 1e-30f);
  ck_assert(dh[3] == 2.0f && dh[7] == 1000.0f);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("swiglu");
  tcase_add_test(c, values_and_gradients_follow_the_formula);
  tcase_add_test(c, far_gates_neither_overflow_nor_clamp);
  return us_suite("grad_swiglu", c);
}

US_TEST_MAIN(make_suite)
