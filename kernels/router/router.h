/* router.h: which experts a row goes to, and how much each counts.
 *
 *     struct us_router_args args = {.logits = logits, .bias = bias, .E = 384, .K = 8,
 *                                   .normalise = true, .scaling = 1};
 *     us_router_select(&args, ids, weights);            // logits: us_linear with the router's weights
 *
 * score = sigmoid(logit) = 1 / (1 + us_expf(-logit)); chosen are the K largest of score + bias, ties to the
 * lowest id; weights are the unbiased scores of the chosen, divided by (their sum + 1e-20) when normalise is
 * set, times scaling. The sum runs over ascending ids. (Hugging Face MiMoV2Flash, noaux_tc with one group.)
 */
#ifndef US_KERNELS_ROUTER_ROUTER_H
#define US_KERNELS_ROUTER_ROUTER_H

#include <stdbool.h>
#include <stdint.h>

#define US_ROUTER_MAX_K 64

struct us_router_args {
  const float *logits; /* (E) of one row */
  const float *bias;   /* (E) for selection only; NULL: none */
  uint32_t E, K;       /* K <= E, K <= US_ROUTER_MAX_K */
  bool normalise;
  float scaling;
};

/* ids (K) ascending; weights (K). A NaN score is never chosen before a number. */
void us_router_select(const struct us_router_args *args, uint32_t *ids, float *weights);

#endif
