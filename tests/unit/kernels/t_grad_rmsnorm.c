/* t_grad_rmsnorm.c: RMSNorm over rows and heads against its formula in double. */
#include "kernels/rmsnorm/rmsnorm_grad.h"
#include "gradcheck.h"

struct norm_case {
  size_t R, heads, D, stride;
  double *x, *gain, *weight, eps;
};

static double loss(void *arg) {
  const struct norm_case *c = arg;
  double sum = 0.0;
  for (size_t i = 0; i < c->R * c->heads; i++) {
    size_t at = i / c->heads * c->stride + i % c->heads * c->D;
    double square = 0.0;
    for (size_t k = 0; k < c->D; k++) square += c->x[at + k] * c->x[at + k];
    double inverse = 1.0 / sqrt(square / (double)c->D + c->eps);
    for (size_t k = 0; k < c->D; k++) sum += c->weight[at + k] * c->x[at + k] * inverse * c->gain[k];
  }
  return sum;
}

static void check_case(size_t R, size_t heads, size_t D, size_t stride) {
  size_t n = R * stride;
  struct norm_case c = {R, heads, D, stride, gc_random(n, 1), gc_random(D, 1), gc_random(n, 1), 1e-3};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_rmsnorm_rows rows = {.R = R, .D = D, .heads = heads, .stride = stride, .eps = 1e-3f};
  float *x = gc_float(c.x, n), *gain = gc_float(c.gain, D), *dy = gc_float(c.weight, n),
        *inverse = gc_zeros(R * heads);
  float *y = gc_zeros(n), *dx = gc_zeros(n), *dgain = gc_zeros(D);
  us_rmsnorm_seq(&seq, &rows, x, gain, y, inverse);
  double sum = 0.0;
  for (size_t i = 0; i < n; i++) sum += c.weight[i] * (double)y[i];
  ck_assert_double_eq_tol(sum, loss(&c), 1e-5);
  us_rmsnorm_grad(&seq, &rows, x, gain, inverse, dy, 0.0f, dx, dgain);
  gc_check("dx", loss, &c, c.x, n, dx, 3e-6);
  gc_check("dgain", loss, &c, c.gain, D, dgain, 3e-6);
  us_rmsnorm_grad(&seq, &rows, x, gain, inverse, dy, 1.0f, dx, NULL);
  for (size_t i = 0; i < n; i++) dx[i] *= 0.5f;
  gc_check("dx added to dx", loss, &c, c.x, n, dx, 3e-6);
  us_seq_release(&seq);
}

START_TEST(gradients_of_whole_rows) {
  check_case(5, 1, 37, 37);
}
END_TEST

START_TEST(gradients_of_heads_inside_longer_rows) {
  check_case(3, 2, 16, 50);
}
END_TEST

START_TEST(output_is_rounded_to_bf16_once) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  double *x = gc_random(64, 1), *gain = gc_random(64, 1);
  float *xf = gc_float(x, 64), *gf = gc_float(gain, 64), y[64], inverse;
  us_rmsnorm_seq(&seq, &(struct us_rmsnorm_rows){.R = 1, .D = 64, .eps = 1e-5f}, xf, gf, y, &inverse);
  for (int k = 0; k < 64; k++) {
    ck_assert(us_bf16_round(y[k]) == y[k]);
    ck_assert_double_eq_tol((double)y[k], x[k] * (double)inverse * gain[k], fabs((double)y[k]) * 0x1p-8);
  }
  us_seq_release(&seq);
}
END_TEST

static void outputs(struct us_seq *seq, void *arg, float *out) {
  const struct norm_case *c = arg;
  size_t n = c->R * c->D;
  struct us_rmsnorm_rows rows = {.R = c->R, .D = c->D, .eps = 1e-5f};
  float *x = gc_float(c->x, n), *gain = gc_float(c->gain, c->D), *dy = gc_float(c->weight, n),
        *inverse = gc_zeros(c->R);
  us_rmsnorm_seq(seq, &rows, x, gain, out, inverse);
  us_rmsnorm_grad(seq, &rows, x, gain, inverse, dy, 0.0f, out + n, out + 2 * n);
  free(x), free(gain), free(dy), free(inverse);
}

START_TEST(threads_do_not_matter) {
  struct norm_case c = {1000, 1, 24, 24, gc_random(24000, 1), gc_random(24, 1), gc_random(24000, 1), 1e-5};
  gc_threads(outputs, &c, 2 * 24000 + 24, US_SEQ_ROUND_BF16);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("rmsnorm");
  tcase_add_test(c, gradients_of_whole_rows);
  tcase_add_test(c, gradients_of_heads_inside_longer_rows);
  tcase_add_test(c, output_is_rounded_to_bf16_once);
  tcase_add_test(c, threads_do_not_matter);
  return us_suite("grad_rmsnorm", c);
}

US_TEST_MAIN(make_suite)
