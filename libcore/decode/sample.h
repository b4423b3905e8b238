/* sample.h: a row's distribution: probabilities after the filters, draws from weights, log-probabilities.
 *
 *     us_sample_probs(logits, N, &sampling, probs);               // the law of us_sample_token (base/sample.h)
 *     int32_t token = us_sample_weights(weights, N, noise);
 *     float logprob = us_sample_logprob(logits, N, token);
 *
 * The draw itself is in base/sample.h, which the GPU's engine shares. Nothing here allocates; everything compiles for host
 * and device.
 */
#ifndef US_DECODE_SAMPLE_H
#define US_DECODE_SAMPLE_H

#include "base/sample.h"

/* The distribution that us_sample_token draws from: probs (N), summing to 1, zero outside the filtered set and for what weighs less
 * than 2^-41 of the likeliest. At temperature 0 it is the point mass on the argmax. */
static US_HD void us_sample_probs(const float *logits, size_t N, const struct us_sampling *s, double *probs) {
  int32_t top = us_sample_argmax(logits, N);
  if (!(s->temperature > 0.0f)) {
    for (size_t i = 0; i < N; i++) probs[i] = (int32_t)i == top ? 1.0 : 0.0;
    return;
  }
  struct us_cut cut = us_sample_cut(logits, N, s, logits[top]);
  double inv = 1.0 / (double)s->temperature, sum = (double)us_cut_mass(logits, N, logits[top], inv, cut);
  for (size_t i = 0; i < N; i++) {
    bool kept = us_cut_keeps(cut, logits[i], (uint32_t)i);
    probs[i] = kept ? (double)us_sample_weight(logits[i], logits[top], inv) / sum : 0.0;
  }
}

/* Draw from weights (N) >= 0 that need not sum to 1: argmax of log(weight) + Gumbel noise. */
static US_HD int32_t us_sample_weights(const double *weights, size_t N, struct us_noise noise) {
  float best_score = -INFINITY;
  uint32_t bits[4] = {0, 0, 0, 0};
  size_t best = 0;
  for (size_t i = 0; i < N; i++) {
    if (i % 4 == 0)
      us_philox_quad(noise.key, noise.position, noise.sample, (uint32_t)(i / 4), noise.stream, bits);
    if (!(weights[i] > 0.0)) continue;
    float score = us_logf((float)weights[i]) + us_gumbel_bits(bits[i % 4]);
    if (score > best_score) best_score = score, best = i;
  }
  return (int32_t)best;
}

/* log p(token) under softmax(logits): the model's own distribution, before temperature and filters. */
static US_HD float us_sample_logprob(const float *logits, size_t N, int32_t token) {
  float max = logits[us_sample_argmax(logits, N)];
  uint64_t mass = us_cut_mass(logits, N, max, 1.0, us_cut_everything());
  return us_sample_logprob_of(logits[token], max, mass);
}

#endif
