/* router_ref.c: sigmoid scores, biased selection, unbiased weights. */
#include "kernels/router/router.h"

#include "kernels/cpu/exp.h"

static float sigmoid(float logit) {
  return 1.0f / (1.0f + us_expf(-logit));
}

/* A NaN choice counts as -Inf; among equals the id decides. */
static float choice_of(const struct us_router_args *args, uint32_t e) {
  float choice = sigmoid(args->logits[e]) + (args->bias ? args->bias[e] : 0.0f);
  return isnan(choice) ? -INFINITY : choice;
}

/* Insert expert e into the best list, kept in falling order of choice; equals stay behind earlier (lower) ids. */
static uint32_t insert(uint32_t *ids, float *choices, uint32_t used, uint32_t K, uint32_t e, float choice) {
  uint32_t at = used;
  while (at > 0 && choices[at - 1] < choice) at--;
  if (at == K) return used;
  uint32_t last = used < K ? used : K - 1;
  for (uint32_t i = last; i > at; i--) {
    ids[i] = ids[i - 1];
    choices[i] = choices[i - 1];
  }
  ids[at] = e;
  choices[at] = choice;
  return used < K ? used + 1 : K;
}

static void sort_ids(uint32_t *ids, uint32_t K) {
  for (uint32_t i = 1; i < K; i++) {
    uint32_t id = ids[i], at = i;
    for (; at > 0 && ids[at - 1] > id; at--) ids[at] = ids[at - 1];
    ids[at] = id;
  }
}

void us_router_select(const struct us_router_args *args, uint32_t *ids, float *weights) {
  float choices[US_ROUTER_MAX_K];
  uint32_t used = 0;
  for (uint32_t e = 0; e < args->E; e++) used = insert(ids, choices, used, args->K, e, choice_of(args, e));
  sort_ids(ids, args->K);
  float sum = 0;
  for (uint32_t i = 0; i < args->K; i++) {
    weights[i] = sigmoid(args->logits[ids[i]]);
    sum = sum + weights[i];
  }
  for (uint32_t i = 0; i < args->K; i++) {
    if (args->normalise) weights[i] = weights[i] / (sum + 1e-20f);
    weights[i] = weights[i] * args->scaling;
  }
}
