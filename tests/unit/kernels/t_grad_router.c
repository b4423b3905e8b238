/* t_grad_router.c: expert choice against sorting, gradients against differences, and the balancing rule. */
#include "kernels/router/router_grad.h"
#include "gradcheck.h"

enum { R = 5, D = 6, E = 7, K = 3 };

struct router_case {
  double *x, *w, *bias, *weight;
  uint32_t id[R * K];
  bool normalise;
  double scaling;
  double *theirs; /* (R, E) a teacher's scores; NULL: none */
};

static double score(const struct router_case *c, int r, uint32_t e) {
  double logit = 0.0;
  for (int k = 0; k < D; k++) logit += c->x[r * D + k] * c->w[e * D + (uint32_t)k];
  return 1.0 / (1.0 + exp(-logit));
}

/* With the choice held: the gradient goes through the chosen scores, and with a teacher through all of them. */
static double loss(void *arg) {
  const struct router_case *c = arg;
  double sum = 0.0;
  for (int r = 0; r < R; r++) {
    double total = 0.0;
    for (int k = 0; k < K; k++) total += score(c, r, c->id[r * K + k]);
    for (int k = 0; k < K; k++) {
      double s = score(c, r, c->id[r * K + k]);
      sum += c->weight[r * K + k] * (c->normalise ? s / (total + 1e-20) : s) * c->scaling;
    }
    for (uint32_t e = 0; c->theirs && e < E; e++) {
      double s = score(c, r, e), t = c->theirs[(uint32_t)r * E + e];
      sum -= 0.75 * (r + 1) * (t * log(s) + (1.0 - t) * log(1.0 - s));
    }
  }
  return sum;
}

static void check_case(bool normalise, double scaling, bool taught, bool same) {
  struct router_case c = {gc_random(R * D, 1), gc_random(E * D, 1),    gc_random(E, 0.3),
                          gc_random(R * K, 1), .normalise = normalise, .scaling = scaling};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_router_rows router = {
      .R = R, .D = D, .E = E, .K = K, .normalise = normalise, .scaling = (float)scaling};
  float *x = gc_float(c.x, R * D), *w = gc_float(c.w, E * D), *bias = gc_float(c.bias, E);
  float scores[R * E], weight[R * K], *dweight = gc_float(c.weight, R * K), *dx = gc_zeros(R * D),
                                      *dw = gc_zeros(E * D);
  us_router_seq(&seq, &router, x, w, bias, scores, c.id, weight);
  for (int r = 0; r < R; r++)
    for (int k = 0; k < K; k++) {
      uint32_t id = c.id[r * K + k];
      ck_assert(k == 0 || id > c.id[r * K + k - 1]);
      int better = 0;
      for (uint32_t e = 0; e < E; e++) better += score(&c, r, e) + c.bias[e] > score(&c, r, id) + c.bias[id];
      ck_assert_int_lt(better, K);
    }
  double sum = 0.0;
  for (int i = 0; i < R * K; i++) sum += c.weight[i] * (double)weight[i];
  ck_assert_double_eq_tol(sum, loss(&c), 1e-6);
  float theirs[R * E], row_weight[R];
  struct us_router_teacher teacher = {
      .opt_scores = same ? NULL : theirs, .target = 0.25f, .opt_weight = row_weight, .scale = 0.75f};
  if (taught) c.theirs = gc_random(R * E, 1);
  for (int i = 0; taught && i < R * E; i++)
    c.theirs[i] = same ? 0.25 : (double)(theirs[i] = (float)(0.5 + 0.4 * sin(c.theirs[i])));
  for (int r = 0; r < R; r++) row_weight[r] = (float)(r + 1);
  us_router_grad(&seq, &router, x, w, scores, c.id, dweight, taught ? &teacher : NULL, dx, dw);
  gc_check("dx", loss, &c, c.x, R * D, dx, 5e-6);
  gc_check("dw", loss, &c, c.w, E * D, dw, 5e-6);
  us_seq_release(&seq);
}

START_TEST(normalised_weights) {
  check_case(true, 1.0, false, false);
}
END_TEST

START_TEST(plain_weights_with_a_scale) {
  check_case(false, 2.5, false, false);
}
END_TEST

START_TEST(a_teacher_pulls_every_score_by_the_weight_of_its_row) {
  check_case(true, 1.0, true, false);
  check_case(false, 2.5, true, false);
}
END_TEST

START_TEST(without_a_teachers_scores_all_are_drawn_to_one_target) {
  check_case(true, 1.0, true, true);
  check_case(false, 2.5, true, true);
}
END_TEST

/* Downwards. The least of the chosen and the most of the others, with their biases, tell where each expert's logit tips. */
static double push_of(const struct router_case *c, int r, uint32_t e, const float *scores, double margin) {
  double least = INFINITY, most = -INFINITY;
  bool chosen = false;
  for (uint32_t i = 0; i < E; i++) {
    bool in = false;
    for (int k = 0; k < K; k++) in = in || c->id[r * K + k] == i;
    double own = (double)scores[r * E + (int)i] + c->bias[i];
    if (in) least = fmin(least, own);
    if (!in) most = fmax(most, own);
    if (i == e) chosen = in;
  }
  double s = (double)scores[r * E + (int)e], t = 0.5 * (least + most) - c->bias[e];
  if (t <= 0.0 || t >= 1.0) return 0.0;
  double d = fabs(log(s / (1.0 - s)) - log(t / (1.0 - t)));
  double push = fmax(0.0, 1.0 - tanh(d / 2.0) / tanh(margin / 2.0));
  return chosen ? -push : push;
}

START_TEST(a_margin_pushes_logits_apart_where_the_choice_tips) {
  struct router_case c = {.x = gc_random(R * D, 1), .w = gc_random(E * D, 1), .bias = gc_random(E, 0.3)};
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  struct us_router_rows router = {.R = R, .D = D, .E = E, .K = K, .normalise = true, .scaling = 1.0f};
  float *x = gc_float(c.x, R * D), *w = gc_float(c.w, E * D), *bias = gc_float(c.bias, E);
  float scores[R * E], logits[R * E], weight[R * K], *none = gc_zeros(R * K), *dx = gc_zeros(R * D),
                                                     row_weight[R];
  us_router_seq(&seq, &router, x, w, bias, scores, c.id, weight);
  for (int r = 0; r < R; r++) row_weight[r] = (float)(r + 1);
  struct us_router_teacher teacher = {
      .opt_weight = row_weight, .margin = 1.0f, .margin_scale = 0.5f, .opt_bias = bias};
  memcpy(logits, scores, sizeof logits);
  us_router_grad(&seq, &router, x, w, logits, c.id, none, &teacher, dx, NULL);
  int pushed = 0, past = 0;
  for (uint32_t e = 0; e < E; e++) {
    double mean = 0.0, sum = 0.0;
    for (int r = 0; r < R; r++) mean += (r + 1) * push_of(&c, r, e, scores, 1.0) / (R * (R + 1) / 2);
    for (int r = 0; r < R; r++) {
      double push = push_of(&c, r, e, scores, 1.0), own = (double)logits[r * E + (int)e];
      pushed += push != 0.0, past += push == 0.0, sum += own;
      ck_assert_double_eq_tol(own, 0.5 * (r + 1) * (push - mean), 2e-5);
    }
    ck_assert_double_eq_tol(sum, 0.0, 2e-5);
  }
  ck_assert(pushed > 5 && past > 5);
  us_seq_release(&seq);
}
END_TEST

START_TEST(ties_go_to_the_lowest_id) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  float x[2] = {0, 0}, w[2 * E] = {0}, scores[E], weight[K];
  uint32_t id[K];
  struct us_router_rows router = {.R = 1, .D = 2, .E = E, .K = K, .normalise = true, .scaling = 1};
  us_router_seq(&seq, &router, x, w, NULL, scores, id, weight);
  for (uint32_t k = 0; k < K; k++) ck_assert_uint_eq(id[k], k);
  us_seq_release(&seq);
}
END_TEST

/* Rows visit experts 1, 3, .. whatever their scores; what their weights add up to is the gates' business. */
START_TEST(experts_chosen_elsewhere_get_their_own_gates) {
  struct us_seq seq;
  us_seq_init(&seq, NULL, US_SEQ_ROUND_NONE);
  float x[2 * 2] = {1, -1, 0.5f, 2}, w[2 * E], scores[2 * E], own[2 * K], weight[2 * K];
  uint32_t id[2 * K], chosen[2 * K];
  for (int i = 0; i < 2 * E; i++) w[i] = 0.1f * (float)(i % 7 - 3);
  for (uint32_t i = 0; i < 2 * K; i++) chosen[i] = E - K + i % K;
  struct us_router_rows router = {.R = 2, .D = 2, .E = E, .K = K, .normalise = true, .scaling = 1.5f};
  us_router_seq(&seq, &router, x, w, NULL, scores, id, own);
  ck_assert(memcmp(id, chosen, sizeof id) != 0);
  router.opt_chosen = chosen;
  us_router_seq(&seq, &router, x, w, NULL, scores, id, weight);
  ck_assert(memcmp(id, chosen, sizeof id) == 0);
  for (size_t r = 0; r < 2; r++) {
    float sum = 0.0f;
    for (uint32_t k = 0; k < K; k++) sum += scores[r * E + chosen[r * K + k]];
    for (uint32_t k = 0; k < K; k++)
      ck_assert_float_eq_tol(weight[r * K + k], 1.5f * scores[r * E + chosen[r * K + k]] / sum, 1e-6f);
  }
  us_seq_release(&seq);
}
END_TEST

START_TEST(bias_moves_by_the_sign_of_the_missing_load) {
  float bias[4] = {0, 0, 0, 0};
  uint64_t load[4] = {0, 0, 0, 0};
  us_router_load((const uint32_t[]){0, 0, 0, 1, 1, 2, 3, 3}, 8, 4, load);
  us_router_balance(bias, load, 4, 0.25f);
  ck_assert(bias[0] == -0.25f && bias[1] == 0.0f && bias[2] == 0.25f && bias[3] == 0.0f);
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("router");
  tcase_add_test(c, normalised_weights);
  tcase_add_test(c, plain_weights_with_a_scale);
  tcase_add_test(c, a_teacher_pulls_every_score_by_the_weight_of_its_row);
  tcase_add_test(c, without_a_teachers_scores_all_are_drawn_to_one_target);
  tcase_add_test(c, a_margin_pushes_logits_apart_where_the_choice_tips);
  tcase_add_test(c, ties_go_to_the_lowest_id);
  tcase_add_test(c, experts_chosen_elsewhere_get_their_own_gates);
  tcase_add_test(c, bias_moves_by_the_sign_of_the_missing_load);
  return us_suite("grad_router", c);
}

US_TEST_MAIN(make_suite)
