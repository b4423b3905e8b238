/* t_grad_rope.c: rotation over rows against complex multiplication in double, and back. */
#include "kernels/rope/rope.h"
#include "kernels/rope/rope_grad.h"
#include "gradcheck.h"

enum { R = 4, STRIDE = 40, ROTARY = 8, POSITIONS = 300 };
static const uint32_t offset[2] = {3, 20}, position[R] = {0, 1, 17, 299};

struct rope_case {
  double *x, *weight;
};

static double loss(void *arg) {
  const struct rope_case *c = arg;
  double sum = 0.0;
  for (int i = 0; i < R * STRIDE; i++) sum += c->weight[i] * c->x[i];
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < ROTARY / 2; i++) {
        int a = r * STRIDE + (int)offset[h] + i, b = a + ROTARY / 2;
        double angle = (double)position[r] * pow(10000.0, -2.0 * i / ROTARY), s = sin(angle), k = cos(angle);
        sum += c->weight[a] * (c->x[a] * k - c->x[b] * s - c->x[a]);
        sum += c->weight[b] * (c->x[b] * k + c->x[a] * s - c->x[b]);
      }
  return sum;
}

START_TEST(rotation_and_gradient_follow_the_angles) {
  struct rope_case c = {gc_random(R * STRIDE, 1), gc_random(R * STRIDE, 1)};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  float *table = gc_zeros(POSITIONS * ROTARY), *x = gc_float(c.x, R * STRIDE),
        *dx = gc_float(c.weight, R * STRIDE);
  for (uint32_t p = 0; p < POSITIONS; p++) us_rope_table(10000.0, ROTARY, p, table + p * ROTARY);
  struct us_rope_rows rows = {.R = R, .stride = STRIDE, .offset = offset, .heads = 2, .rotary = ROTARY};
  us_rope_seq(&seq, &rows, table, position, x);
  double sum = 0.0;
  for (int i = 0; i < R * STRIDE; i++) sum += c.weight[i] * (double)x[i];
  ck_assert_double_eq_tol(sum, loss(&c), 1e-5);
  us_rope_grad(&seq, &rows, table, position, dx);
  gc_check("dx", loss, &c, c.x, R * STRIDE, dx, 1e-6);
  us_seq_release(&seq);
}
END_TEST

START_TEST(values_are_scaled_then_rounded) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  double *x = gc_random(R * STRIDE, 1);
  float *y = gc_float(x, R * STRIDE);
  struct us_rope_rows rows = {.R = R, .stride = STRIDE, .offset = offset, .heads = 2};
  us_scale_heads_seq(&seq, &rows, 5, 0.612f, true, y);
  for (int i = 0; i < R * STRIDE; i++) {
    int column = i % STRIDE;
    bool inside = (column >= 3 && column < 8) || (column >= 20 && column < 25);
    ck_assert(y[i] == (inside ? us_bf16_round((float)x[i] * 0.612f) : (float)x[i]));
  }
  us_seq_release(&seq);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("rope");
  tcase_add_test(c, rotation_and_gradient_follow_the_angles);
  tcase_add_test(c, values_are_scaled_then_rounded);
  return us_suite("grad_rope", c);
}

US_TEST_MAIN(make_suite)
