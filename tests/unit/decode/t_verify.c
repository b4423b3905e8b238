/* t_verify.c: the verification rules by exhaustive enumeration: V = 4 tokens, 3 drafts, random target tables for every
 * prefix, random independent drafter rows. The truth is the autoregressive law of the first 4 tokens, computed from the
 * tables alone; the code under test is integrated exactly over its uniforms.
 */
#include "decode/verify.h"
#include "base/philox.h"
#include "suite.h"

#include <math.h>
#include <string.h>

enum { V = 4, DRAFTS = 3, OUTCOMES = V * V * V * V };

struct tables {
  double p[1 + V + V * V + V * V * V][V]; /* row of a prefix: first[length] + its digits in base V */
  double q[DRAFTS][V];
};

static const size_t first[] = {0, 1, 1 + V, 1 + V + V *V};

static const double *target_row(const struct tables *t, const int32_t *prefix, uint32_t length) {
  size_t at = 0;
  for (uint32_t i = 0; i < length; i++) at = at * V + (size_t)prefix[i];
  return t->p[first[length] + at];
}

/* A random law; now and then with zeros, as filters make them. */
static void random_law(uint32_t seed, uint32_t row, double *law) {
  uint32_t words[4], counter[4] = {row, seed, 0, 99};
  us_philox4x32(counter, us_philox_key(us_test_seed()).word, words);
  double sum = 0.0;
  for (int i = 0; i < V; i++) {
    double u = ((double)words[i] + 0.5) * 0x1p-32;
    law[i] = (row + seed) % 5 == 0 && i == (int)(words[0] % V) ? 0.0 : -log(u);
    sum += law[i];
  }
  for (int i = 0; i < V; i++) law[i] /= sum;
}

static void random_tables(uint32_t seed, struct tables *t) {
  for (uint32_t i = 0; i < sizeof t->p / sizeof *t->p; i++) random_law(seed, i, t->p[i]);
  for (uint32_t i = 0; i < DRAFTS; i++) random_law(seed, 1000 + i, t->q[i]);
}

/* Add `weight` to every completion of `length` committed tokens: what follows a round is the target's own. */
static void complete(const struct tables *t, int32_t *tokens, uint32_t length, double weight, double *law) {
  if (weight == 0.0) return;
  if (length == DRAFTS + 1) {
    size_t at = 0;
    for (int i = 0; i <= DRAFTS; i++) at = at * V + (size_t)tokens[i];
    law[at] += weight;
    return;
  }
  const double *p = target_row(t, tokens, length);
  for (int32_t v = 0; v < V; v++) {
    tokens[length] = v;
    complete(t, tokens, length + 1, weight * p[v], law);
  }
}

static double distance(const double *a, const double *b) {
  double sum = 0.0;
  for (int i = 0; i < OUTCOMES; i++) sum += fabs(a[i] - b[i]);
  return sum / 2.0;
}

struct outcome {
  double law[OUTCOMES];
  double mean; /* tokens committed a round */
};

static void path_rows(const struct tables *t, const int32_t *x, double *p) {
  for (uint32_t i = 0; i <= DRAFTS; i++) memcpy(p + i * V, target_row(t, x, i), V * sizeof *p);
}

/* One draft path of probability `weight`, integrated over the uniforms: each is below its threshold or not. */
static void integrate(enum us_verify_rule rule, const struct tables *t, const struct us_verify *v,
                      double weight, struct outcome *o) {
  double h[DRAFTS], u[DRAFTS], emit[V];
  us_verify_thresholds(rule, v, h);
  for (int pattern = 0; pattern < 1 << DRAFTS; pattern++) {
    double w = weight;
    for (int i = 0; i < DRAFTS; i++) {
      ck_assert(h[i] >= 0.0 && h[i] <= 1.0);
      bool below = pattern >> i & 1;
      w *= below ? h[i] : 1.0 - h[i];
      u[i] = below ? 0.0 : h[i];
    }
    if (w == 0.0) continue;
    uint32_t accepted = us_verify_accepted(rule, h, u, DRAFTS);
    us_verify_emission(rule, v, accepted, emit);
    double sum = 0.0;
    for (int i = 0; i < V; i++) sum += emit[i];
    int32_t tokens[DRAFTS + 1];
    memcpy(tokens, v->tokens, DRAFTS * sizeof *tokens);
    o->mean += w * (accepted + 1.0);
    for (int32_t y = 0; y < V; y++) {
      tokens[accepted] = y;
      complete(t, tokens, accepted + 1, w * emit[y] / sum, o->law);
    }
  }
}

static int32_t argmax(const double *row) {
  int32_t best = 0;
  for (int32_t i = 1; i < V; i++)
    if (row[i] > row[best]) best = i;
  return best;
}

/* Enumerate every draft path; argmax drafts are one path of point masses. */
static void enumerate(enum us_verify_rule rule, const struct tables *t, bool argmax_drafts,
                      struct outcome *o) {
  memset(o, 0, sizeof *o);
  for (int path = 0; path < V * V * V; path++) {
    int32_t x[DRAFTS] = {path / (V * V), path / V % V, path % V};
    double weight = 1.0, p[(DRAFTS + 1) * V];
    for (int i = 0; i < DRAFTS; i++) weight *= argmax_drafts ? x[i] == argmax(t->q[i]) : t->q[i][x[i]];
    if (weight == 0.0) continue;
    path_rows(t, x, p);
    struct us_verify v = {
        .N = V, .drafts = DRAFTS, .tokens = x, .p = p, .q = argmax_drafts ? NULL : &t->q[0][0]};
    integrate(rule, t, &v, weight, o);
  }
}

/* match, integrated over the target's own draws at every slot. */
static void enumerate_match(const struct tables *t, bool argmax_drafts, struct outcome *o) {
  memset(o, 0, sizeof *o);
  for (int path = 0; path < V * V * V; path++) {
    int32_t x[DRAFTS] = {path / (V * V), path / V % V, path % V};
    double weight = 1.0, p[(DRAFTS + 1) * V];
    for (int i = 0; i < DRAFTS; i++) weight *= argmax_drafts ? x[i] == argmax(t->q[i]) : t->q[i][x[i]];
    if (weight == 0.0) continue;
    path_rows(t, x, p);
    for (int draws = 0; draws < OUTCOMES; draws++) {
      int32_t y[DRAFTS + 1] = {draws / (V * V * V), draws / (V * V) % V, draws / V % V, draws % V};
      double w = weight;
      for (int i = 0; i <= DRAFTS; i++) w *= p[i * V + y[i]];
      uint32_t accepted = us_verify_match(x, y, DRAFTS);
      o->mean += w * (accepted + 1.0);
      complete(t, y, accepted + 1, w, o->law);
    }
  }
}

static void plain_law(const struct tables *t, double *law) {
  int32_t tokens[DRAFTS + 1];
  memset(law, 0, OUTCOMES * sizeof *law);
  complete(t, tokens, 0, 1.0, law);
}

/* Sum over slots of E[pi_i]: pi_i = prod min(1, p/q) for reject, min(1, pi_{i-1} p/q) for block. From the tables. */
static double expected_tokens(const struct tables *t, bool block) {
  double tokens = 1.0;
  for (int path = 0; path < V * V * V; path++) {
    int32_t x[DRAFTS] = {path / (V * V), path / V % V, path % V};
    double weight = t->q[0][x[0]] * t->q[1][x[1]] * t->q[2][x[2]], pi = 1.0;
    for (uint32_t i = 0; weight > 0.0 && i < DRAFTS; i++) {
      double ratio = target_row(t, x, i)[x[i]] / t->q[i][x[i]];
      pi = block ? fmin(1.0, pi * ratio) : pi * fmin(1.0, ratio);
      tokens += weight * pi;
    }
  }
  return tokens;
}

START_TEST(every_rule_keeps_the_law_of_the_target) {
  struct tables t;
  struct outcome o;
  double law[OUTCOMES];
  for (uint32_t seed = 0; seed < 40; seed++) {
    random_tables(seed, &t);
    plain_law(&t, law);
    for (int argmax_drafts = 0; argmax_drafts < 2; argmax_drafts++) {
      enumerate(US_VERIFY_REJECT, &t, argmax_drafts, &o);
      ck_assert_double_lt(distance(o.law, law), 1e-12);
      enumerate(US_VERIFY_BLOCK, &t, argmax_drafts, &o);
      ck_assert_double_lt(distance(o.law, law), 1e-12);
      enumerate_match(&t, argmax_drafts, &o);
      ck_assert_double_lt(distance(o.law, law), 1e-12);
    }
  }
}
END_TEST

START_TEST(mean_tokens_are_what_the_tables_say_and_block_never_commits_fewer) {
  struct tables t;
  struct outcome token, block;
  double gain = 0.0;
  for (uint32_t seed = 0; seed < 40; seed++) {
    random_tables(seed, &t);
    enumerate(US_VERIFY_REJECT, &t, false, &token);
    enumerate(US_VERIFY_BLOCK, &t, false, &block);
    ck_assert_double_eq_tol(token.mean, expected_tokens(&t, false), 1e-12);
    ck_assert_double_eq_tol(block.mean, expected_tokens(&t, true), 1e-12);
    ck_assert_double_ge(block.mean, token.mean - 1e-12);
    gain += block.mean - token.mean;
  }
  ck_assert_double_gt(gain, 0.1);
}
END_TEST

START_TEST(rejection_of_a_point_mass_accepts_like_match) {
  struct tables t;
  struct outcome reject, match, block;
  for (uint32_t seed = 0; seed < 40; seed++) {
    random_tables(seed, &t);
    enumerate(US_VERIFY_REJECT, &t, true, &reject);
    enumerate_match(&t, true, &match);
    enumerate(US_VERIFY_BLOCK, &t, true, &block);
    ck_assert_double_eq_tol(reject.mean, match.mean, 1e-12);
    ck_assert_double_eq_tol(block.mean, match.mean, 1e-12);
  }
}
END_TEST

START_TEST(matching_a_sampled_draft_accepts_less_than_the_ratio_test) {
  struct tables t;
  struct outcome reject, match;
  double wasted = 0.0;
  for (uint32_t seed = 0; seed < 40; seed++) {
    random_tables(seed, &t);
    enumerate(US_VERIFY_REJECT, &t, false, &reject);
    enumerate_match(&t, false, &match);
    wasted += reject.mean - match.mean;
  }
  ck_assert_double_gt(wasted / 40, 0.1);
}
END_TEST

START_TEST(equal_laws_accept_everything) {
  struct tables t;
  struct outcome o;
  for (uint32_t seed = 0; seed < 8; seed++) {
    random_tables(seed, &t);
    for (uint32_t i = 0; i < sizeof t.p / sizeof *t.p; i++)
      memcpy(t.p[i], t.q[i == 0 ? 0 : i < first[2] ? 1 : 2], sizeof t.p[i]);
    enumerate(US_VERIFY_REJECT, &t, false, &o);
    ck_assert_double_eq_tol(o.mean, DRAFTS + 1.0, 1e-12);
    enumerate(US_VERIFY_BLOCK, &t, false, &o);
    ck_assert_double_eq_tol(o.mean, DRAFTS + 1.0, 1e-12);
  }
}
END_TEST

START_TEST(a_q_that_is_not_what_was_sampled_shows) {
  /* The power of the enumeration: tell the rule a q with another temperature than the drafts were drawn with. */
  struct tables t, told;
  double law[OUTCOMES];
  random_tables(3, &t);
  told = t;
  for (int i = 0; i < DRAFTS; i++) {
    double sum = 0.0;
    for (int j = 0; j < V; j++) sum += told.q[i][j] = sqrt(t.q[i][j]);
    for (int j = 0; j < V; j++) told.q[i][j] /= sum;
  }
  plain_law(&t, law);
  for (enum us_verify_rule rule = US_VERIFY_REJECT; rule <= US_VERIFY_BLOCK; rule++) {
    struct outcome o = {0};
    for (int path = 0; path < V * V * V; path++) {
      int32_t x[DRAFTS] = {path / (V * V), path / V % V, path % V};
      double p[(DRAFTS + 1) * V];
      path_rows(&t, x, p);
      struct us_verify v = {.N = V, .drafts = DRAFTS, .tokens = x, .p = p, .q = &told.q[0][0]};
      integrate(rule, &t, &v, t.q[0][x[0]] * t.q[1][x[1]] * t.q[2][x[2]], &o);
    }
    ck_assert_double_gt(distance(o.law, law), 1e-3);
  }
}
END_TEST

START_TEST(rules_have_names) {
  enum us_verify_rule rule;
  ck_assert(us_verify_parse("block", &rule) && rule == US_VERIFY_BLOCK);
  ck_assert(us_verify_parse("match", &rule) && rule == US_VERIFY_MATCH);
  ck_assert(!us_verify_parse("typical", &rule));
  ck_assert_str_eq(us_verify_name(US_VERIFY_REJECT), "reject");
}
END_TEST

static Suite *make_suite(void) {
  TCase *c = tcase_create("verify");
  tcase_add_test(c, every_rule_keeps_the_law_of_the_target);
  tcase_add_test(c, mean_tokens_are_what_the_tables_say_and_block_never_commits_fewer);
  tcase_add_test(c, rejection_of_a_point_mass_accepts_like_match);
  tcase_add_test(c, matching_a_sampled_draft_accepts_less_than_the_ratio_test);
  tcase_add_test(c, equal_laws_accept_everything);
  tcase_add_test(c, a_q_that_is_not_what_was_sampled_shows);
  tcase_add_test(c, rules_have_names);
  return us_suite("verify", c);
}
US_TEST_MAIN(make_suite)
