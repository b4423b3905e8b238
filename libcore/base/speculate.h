/* speculate.h: the scalar decisions of speculative decoding, the same bits on host and device.
 *
 *     double pi = us_verify_pi(1.0, p, q);                                  // a proposal survives alone
 *     sum += us_verify_residual_units(pi * p - q);                          // residual mass, in any order
 *     uint32_t kept = us_verify_accepted(US_VERIFY_BLOCK, h, u, drafts);
 *     uint32_t n = us_adaptive_length(&cost, confidence, drafts);
 *
 * Masses are sums of integers: one thread here and thousands on a GPU find the same. What they decide is described in
 * decode/verify.h and decode/adaptive.h.
 */
#ifndef US_BASE_SPECULATE_H
#define US_BASE_SPECULATE_H

#include "base/hd.h"
#include <stdint.h>

enum us_verify_rule { US_VERIFY_MATCH, US_VERIFY_REJECT, US_VERIFY_BLOCK };

/* Probability that the block rule keeps the prefix up to a slot (pi_i = min(1, pi_{i-1} p / q)). */
static US_HD double us_verify_pi(double pi, double p, double q) {
  double ratio = q > 0.0 ? pi * p / q : 0.0;
  return ratio < 1.0 ? ratio : 1.0;
}

/* The threshold of stopping there, given the residual mass R_i. */
static US_HD double us_verify_h(double pi, double residual) {
  return pi >= 1.0 ? 1.0 : residual / (residual + 1.0 - pi);
}

/* A share of a residual's mass, at most 1, in units of 2^-62; 0 for what is not positive. */
static US_HD uint64_t us_verify_residual_units(double share) {
  return share > 0.0 ? (uint64_t)(share * 0x1p62) : 0;
}

/* Number of accepted proposals: reject stops at the first u[i] >= h[i]; block keeps the longest prefix that ends in a
 * slot with u[i] < h[i]. */
static US_HD uint32_t us_verify_accepted(enum us_verify_rule rule, const double *h, const double *u,
                                         uint32_t drafts) {
  uint32_t accepted = 0;
  for (uint32_t i = 0; i < drafts; i++) {
    if (u[i] < h[i])
      accepted = i + 1;
    else if (rule != US_VERIFY_BLOCK)
      break;
  }
  return accepted;
}

struct us_verify_cost {
  double fixed; /* bytes a round streams whatever its rows: attention, dense layers, routers, head, drafter */
  double experts; /* bytes of all experts of all layers */
  double idle;    /* probability that one row leaves a given expert alone: 1 - K/E */
};

/* Bytes of a round with this many target rows. */
static US_HD double us_verify_cost_bytes(const struct us_verify_cost *cost, uint32_t rows) {
  double idle = 1.0;
  for (uint32_t r = 0; r < rows; r++) idle *= cost->idle;
  return cost->fixed + cost->experts * (1.0 - idle);
}

/* The number of drafts in [0, drafts] with the most expected tokens a byte; the larger of equals. confidence (drafts). */
static US_HD uint32_t us_adaptive_length(const struct us_verify_cost *cost, const float *confidence,
                                         uint32_t drafts) {
  double tokens = 1.0, survive = 1.0, best_tokens = 1.0, best_bytes = us_verify_cost_bytes(cost, 1);
  uint32_t best = 0;
  for (uint32_t n = 1; n <= drafts; n++) {
    survive *= (double)confidence[n - 1];
    tokens += survive;
    double bytes = us_verify_cost_bytes(cost, n + 1);
    if (tokens * best_bytes >= best_tokens * bytes) best = n, best_tokens = tokens, best_bytes = bytes;
  }
  return best;
}

#endif
