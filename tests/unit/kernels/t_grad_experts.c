/* t_grad_experts.c: grouped experts against the loop over rows in double. */
#include "kernels/experts/experts_grad.h"
#include "gradcheck.h"

enum { R = 7, D = 5, F = 6, E = 4, K = 2 };

/* Expert 3 is never chosen; row 0 and row 6 share both experts. */
static const uint32_t id[R * K] = {0, 1, 0, 2, 1, 2, 0, 1, 1, 2, 0, 2, 0, 1};

struct experts_case {
  double *x, *gate_up, *down, *weight, *loss_weight;
};

static double loss(void *arg) {
  const struct experts_case *c = arg;
  double sum = 0.0;
  for (int r = 0; r < R; r++)
    for (int k = 0; k < K; k++) {
      const double *gu = c->gate_up + id[r * K + k] * 2 * F * D, *down = c->down + id[r * K + k] * D * F;
      double a[F];
      for (int f = 0; f < F; f++) {
        double g = 0.0, u = 0.0;
        for (int d = 0; d < D; d++) {
          g += gu[f * D + d] * c->x[r * D + d];
          u += gu[(F + f) * D + d] * c->x[r * D + d];
        }
        a[f] = g / (1.0 + exp(-g)) * u;
      }
      for (int d = 0; d < D; d++) {
        double y = 0.0;
        for (int f = 0; f < F; f++) y += down[d * F + f] * a[f];
        sum += c->loss_weight[r * D + d] * c->weight[r * K + k] * y;
      }
    }
  return sum;
}

struct outputs {
  float y[R * D], dx[R * D], dweight[R * K], dgate_up[E * 2 * F * D], ddown[E * D * F];
};

static void run(struct us_seq *seq, void *arg, float *out) {
  const struct experts_case *c = arg;
  struct outputs *o = (struct outputs *)(void *)out;
  float *x = gc_float(c->x, R * D), *gate_up = gc_float(c->gate_up, E * 2 * F * D),
        *down = gc_float(c->down, E * D * F);
  float *weight = gc_float(c->weight, R * K), *dy = gc_float(c->loss_weight, R * D);
  const float *gu_e[E], *down_e[E];
  float *dgu_e[E], *ddown_e[E], saved_x[R * K * D], saved_h[R * K * 2 * F], saved_a[R * K * F];
  for (int e = 0; e < E; e++) {
    gu_e[e] = gate_up + e * 2 * F * D, down_e[e] = down + e * D * F;
    dgu_e[e] = o->dgate_up + e * 2 * F * D, ddown_e[e] = o->ddown + e * D * F;
  }
  struct us_experts_rows ex = {.R = R, .D = D, .F = F, .E = E, .K = K, .gate_up = gu_e, .down = down_e};
  uint32_t start[E + 1], row[R * K], slot[R * K];
  struct us_experts_plan plan = {start, row, slot};
  struct us_experts_saved saved = {saved_x, saved_h, saved_a};
  us_experts_sort(&ex, id, &plan);
  us_experts_seq(seq, &ex, &plan, x, weight, &saved, o->y);
  us_experts_grad(seq, &ex, &plan, weight, &saved, dy, o->dx, o->dweight,
                  &(struct us_experts_grads){dgu_e, ddown_e});
  free(x), free(gate_up), free(down), free(weight), free(dy);
}

static struct experts_case make_case(void) {
  return (struct experts_case){gc_random(R * D, 1), gc_random(E * 2 * F * D, 1), gc_random(E * D * F, 1),
                               gc_random(R * K, 1), gc_random(R * D, 1)};
}

START_TEST(values_and_gradients_follow_the_formula) {
  struct experts_case c = make_case();
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct outputs o = {0};
  run(&seq, &c, (float *)(void *)&o);
  double sum = 0.0;
  for (int i = 0; i < R * D; i++) sum += c.loss_weight[i] * (double)o.y[i];
  ck_assert_double_eq_tol(sum, loss(&c), 1e-5);
  gc_check("dx", loss, &c, c.x, R * D, o.dx, 3e-6);
  gc_check("dweight", loss, &c, c.weight, R * K, o.dweight, 3e-6);
  gc_check("dgate_up", loss, &c, c.gate_up, E * 2 * F * D, o.dgate_up, 3e-6);
  gc_check("ddown", loss, &c, c.down, E * D * F, o.ddown, 3e-6);
  us_seq_release(&seq);
}
END_TEST

START_TEST(a_plan_lists_each_pair_once_in_row_order) {
  uint32_t start[E + 1], row[R * K], slot[R * K];
  struct us_experts_rows ex = {.R = R, .E = E, .K = K};
  struct us_experts_plan plan = {start, row, slot};
  us_experts_sort(&ex, id, &plan);
  ck_assert_uint_eq(start[0], 0);
  ck_assert_uint_eq(start[E], R * K);
  ck_assert_uint_eq(start[3], start[4]);
  for (int i = 0; i < R * K; i++) {
    ck_assert_uint_eq(row[slot[i]], (uint32_t)i / K);
    ck_assert(slot[i] >= start[id[i]] && slot[i] < start[id[i] + 1]);
  }
  for (uint32_t e = 0; e < E; e++)
    for (uint32_t s = start[e] + 1; s < start[e + 1]; s++) ck_assert(row[s] > row[s - 1]);
}
END_TEST

START_TEST(a_row_does_not_depend_on_its_neighbours) {
  struct experts_case c = make_case();
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_BF16);
  struct outputs before = {0}, after = {0};
  run(&seq, &c, (float *)(void *)&before);
  for (int i = D; i < R * D; i++) c.x[i] = (double)(float)(c.x[i] * 3.0);
  run(&seq, &c, (float *)(void *)&after);
  ck_assert(memcmp(before.y, after.y, D * sizeof(float)) == 0);
  ck_assert(memcmp(before.y + D, after.y + D, D * sizeof(float)) != 0);
  us_seq_release(&seq);
}
END_TEST

START_TEST(threads_do_not_matter) {
  struct experts_case c = make_case();
  gc_threads(run, &c, sizeof(struct outputs) / sizeof(float), US_SEQ_ROUND_BF16);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("experts");
  tcase_add_test(c, values_and_gradients_follow_the_formula);
  tcase_add_test(c, a_plan_lists_each_pair_once_in_row_order);
  tcase_add_test(c, a_row_does_not_depend_on_its_neighbours);
  tcase_add_test(c, threads_do_not_matter);
  return us_suite("grad_experts", c);
}

US_TEST_MAIN(make_suite)
