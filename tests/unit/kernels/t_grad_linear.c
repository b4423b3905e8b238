/* t_grad_linear.c: y = x W^T and its gradients against the triple loop in double. */
#include "kernels/linear/linear_grad.h"
#include "gradcheck.h"

struct linear_case {
  size_t R, N, K;
  double *x, *w, *weight;
};

static double y_at(const struct linear_case *c, size_t r, size_t n) {
  double y = 0.0;
  for (size_t k = 0; k < c->K; k++) y += c->x[r * c->K + k] * c->w[n * c->K + k];
  return y;
}

static double loss(void *arg) {
  const struct linear_case *c = arg;
  double sum = 0.0;
  for (size_t r = 0; r < c->R; r++)
    for (size_t n = 0; n < c->N; n++) sum += c->weight[r * c->N + n] * y_at(c, r, n);
  return sum;
}

static struct linear_case make_case(size_t R, size_t N, size_t K) {
  return (struct linear_case){R, N, K, gc_random(R * K, 1), gc_random(N * K, 1), gc_random(R * N, 1)};
}

START_TEST(products_and_gradients_follow_the_formula) {
  struct linear_case c = make_case(6, 7, 9);
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_linear dims = {.R = 6, .N = 7, .K = 9};
  float *x = gc_float(c.x, 54), *w = gc_float(c.w, 63), *dy = gc_float(c.weight, 42);
  float *y = gc_zeros(42), *dx = gc_zeros(54), *dw = gc_zeros(63);
  us_linear_seq(&seq, &dims, x, w, y);
  for (size_t r = 0; r < 6; r++)
    for (size_t n = 0; n < 7; n++) ck_assert_double_eq_tol((double)y[r * 7 + n], y_at(&c, r, n), 2e-6);
  us_linear_grad_x(&seq, &dims, dy, w, 0.0f, dx);
  us_linear_grad_w(&seq, &dims, dy, x, dw);
  gc_check("dx", loss, &c, c.x, 54, dx, 1e-6);
  gc_check("dw", loss, &c, c.w, 63, dw, 1e-6);
  us_linear_grad_x(&seq, &dims, dy, w, 1.0f, dx);
  us_linear_grad_w(&seq, &dims, dy, x, dw);
  for (size_t i = 0; i < 54; i++) dx[i] *= 0.5f;
  for (size_t i = 0; i < 63; i++) dw[i] *= 0.5f;
  gc_check("dx added to dx", loss, &c, c.x, 54, dx, 1e-6);
  gc_check("dw added to dw", loss, &c, c.w, 63, dw, 1e-6);
  us_seq_release(&seq);
}
END_TEST

START_TEST(strided_rows_leave_the_gaps_alone) {
  struct linear_case c = make_case(3, 4, 5);
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_linear dims = {.R = 3, .N = 4, .K = 5, .x_stride = 8, .y_stride = 6};
  float *x = gc_zeros(24), *w = gc_float(c.w, 20), *y = gc_zeros(18);
  for (size_t i = 0; i < 15; i++) x[i / 5 * 8 + i % 5] = (float)c.x[i];
  for (size_t i = 0; i < 18; i++) y[i] = 77.0f;
  us_linear_seq(&seq, &dims, x, w, y);
  for (size_t r = 0; r < 3; r++) {
    for (size_t n = 0; n < 4; n++) ck_assert_double_eq_tol((double)y[r * 6 + n], y_at(&c, r, n), 2e-6);
    ck_assert(y[r * 6 + 4] == 77.0f && y[r * 6 + 5] == 77.0f);
  }
  us_seq_release(&seq);
}
END_TEST

static void all_outputs(struct us_seq *seq, void *arg, float *out) {
  const struct linear_case *c = arg;
  struct us_linear dims = {.R = c->R, .N = c->N, .K = c->K};
  float *x = gc_float(c->x, c->R * c->K), *w = gc_float(c->w, c->N * c->K),
        *dy = gc_float(c->weight, c->R * c->N);
  us_linear_seq(seq, &dims, x, w, out);
  us_linear_grad_x(seq, &dims, dy, w, 0.0f, out + c->R * c->N);
  us_linear_grad_w(seq, &dims, dy, x, out + c->R * (c->N + c->K));
  free(x);
  free(w);
  free(dy);
}

START_TEST(many_rows_sum_right_and_threads_do_not_matter) {
  /* 2,500 rows: three partial sums of dW; 300 x 300 weights: the path without them */
  struct linear_case cases[2] = {make_case(2500, 24, 40), make_case(300, 300, 300)};
  for (int i = 0; i < 2; i++) {
    struct linear_case *c = &cases[i];
    size_t at = c->R * (c->N + c->K), total = at + c->N * c->K;
    gc_threads(all_outputs, c, total, US_SEQ_ROUND_NONE);
    struct us_seq seq;
    us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
    float *out = gc_zeros(total);
    all_outputs(&seq, c, out);
    for (size_t n = 0; n < c->N; n += 5)
      for (size_t k = 0; k < c->K; k += 7) {
        double sum = 0.0;
        for (size_t r = 0; r < c->R; r++) sum += c->weight[r * c->N + n] * c->x[r * c->K + k];
        ck_assert_double_eq_tol((double)out[at + n * c->K + k], sum, 2e-4); /* 2^-24 * 2500 terms below 1 */
      }
    us_seq_release(&seq);
  }
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("linear");
  tcase_add_test(c, products_and_gradients_follow_the_formula);
  tcase_add_test(c, strided_rows_leave_the_gaps_alone);
  tcase_add_test(c, many_rows_sum_right_and_threads_do_not_matter);
  return us_suite("grad_linear", c);
}

US_TEST_MAIN(make_suite)
