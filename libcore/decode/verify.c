/* verify.c: residual rejection sampling and block verification on probabilities. */
#include "decode/verify.h"

#include <string.h>

static const char *const rule_names[] = {"match", "reject", "block"};

const char *us_verify_name(enum us_verify_rule rule) {
  return rule_names[rule];
}

bool us_verify_parse(const char *name, enum us_verify_rule *ret_rule) {
  for (int i = 0; i < 3; i++)
    if (!strcmp(name, rule_names[i])) {
      *ret_rule = (enum us_verify_rule)i;
      return true;
    }
  return false;
}

static double p_of(const struct us_verify *v, uint32_t slot) {
  return v->p[slot * v->N + (size_t)v->tokens[slot]];
}

static double q_of(const struct us_verify *v, uint32_t slot, size_t token) {
  if (!v->q) return (size_t)v->tokens[slot] == token ? 1.0 : 0.0;
  return v->q[slot * v->N + token];
}

/* sum over tokens of (pi p_slot - q_slot)+, in any order. */
static double residual_mass(const struct us_verify *v, uint32_t slot, double pi) {
  const double *p = v->p + slot * v->N;
  uint64_t sum = 0;
  for (size_t i = 0; i < v->N; i++) sum += us_verify_residual_units(pi * p[i] - q_of(v, slot, i));
  return (double)sum * 0x1p-62;
}

void us_verify_thresholds(enum us_verify_rule rule, const struct us_verify *v, double *h) {
  double pi = 1.0;
  for (uint32_t i = 0; i < v->drafts; i++) {
    double before = rule == US_VERIFY_BLOCK ? pi : 1.0;
    pi = us_verify_pi(before, p_of(v, i), q_of(v, i, (size_t)v->tokens[i]));
    h[i] = pi;
    /* Stopping after slot i emits from (pi p_{i+1} - q_{i+1})+; after the last slot everything is kept with pi. */
    if (rule == US_VERIFY_BLOCK && i + 1 < v->drafts) h[i] = us_verify_h(pi, residual_mass(v, i + 1, pi));
  }
}

void us_verify_emission(enum us_verify_rule rule, const struct us_verify *v, uint32_t accepted,
                        double *weights) {
  const double *p = v->p + accepted * v->N;
  double pi = 1.0, sum = 0.0;
  if (rule == US_VERIFY_BLOCK)
    for (uint32_t i = 0; i < accepted; i++)
      pi = us_verify_pi(pi, p_of(v, i), q_of(v, i, (size_t)v->tokens[i]));
  bool all = accepted == v->drafts;
  for (size_t i = 0; i < v->N; i++) {
    double r = all ? p[i] : pi * p[i] - q_of(v, accepted, i);
    weights[i] = r > 0.0 ? r : 0.0;
    sum += weights[i];
  }
  /* A rejection implies residual mass; if rounding took it, p and q were equal and p is the law. */
  if (!(sum > 0.0)) memcpy(weights, p, v->N * sizeof *weights);
}
