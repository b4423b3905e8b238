/* sample.h: from logits to a token: filters, and Gumbel-max with counter-based noise, for every executor.
 *
 *     struct us_sampling sampling = {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.0f};
 *     struct us_noise noise = us_noise_target(seed, position, sample);
 *     int32_t token = us_sample_token(logits, N, &sampling, noise);
 *
 * Filters apply in this order: temperature, top-k, top-p, min-p, each to what the one before it kept. Every filter keeps
 * a prefix of the vocabulary ordered by (logit descending, id ascending), so the filtered set is that prefix, and two
 * numbers describe it: struct us_cut. Ties go to the lowest id everywhere. Masses are compared as integers (the weight
 * exp((logit - max) / T) in units of 2^-40), whose sums do not depend on the order of addition: one thread here and a
 * thousand on the GPU (kernels/engine/select.cuh) find the same cut.
 *
 * The draw is argmax over the filtered set of logit / T + Gumbel noise. The noise is a function of (seed, position,
 * sample, token id, stream) and of nothing else, so plain and speculative decoding, and any batch, share it. A greedy
 * draw (temperature 0) is argmax alone. Nothing here allocates; everything compiles for host and device.
 */
#ifndef US_BASE_SAMPLE_H
#define US_BASE_SAMPLE_H

#include "base/hd.h"
#include "base/philox.h"
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct us_sampling {
  float temperature; /* 0: greedy, the filters do not matter */
  uint32_t top_k;    /* keep the k largest logits; 0: off */
  float top_p;       /* keep the smallest prefix whose mass is at least top_p; 1 (or 0): off */
  float min_p;       /* keep tokens at least min_p times as likely as the likeliest; 0: off */
};

/* Where a draw's noise comes from: the words of the Philox counter but the token's. */
struct us_noise {
  struct us_philox_key key;
  uint32_t position, sample, stream;
};

/* Noise of the target's draw of the token at `position`: the same for plain and speculative decoding. */
static US_HD struct us_noise us_noise_target(uint64_t seed, uint32_t position, uint32_t sample) {
  struct us_noise noise = {us_philox_key(seed), position, sample, US_STREAM_SAMPLE};
  return noise;
}

/* Noise of `stream` for slot `slot` of the round anchored at `anchor`. A position can be drafted in several rounds, and
 * what was rejected conditions the noise it was drawn with, so reject and block need fresh noise every round; anchors
 * of a sequence are distinct. */
static US_HD struct us_noise us_noise_round(uint64_t seed, uint32_t anchor, uint32_t slot, uint32_t sample,
                                            uint32_t stream) {
  struct us_noise noise = {us_philox_key(seed), anchor, sample, stream | slot << 8};
  return noise;
}

/* What a replay proposes instead of a recorded token: that token with probability `rate`, else another one, uniformly. */
static US_HD int32_t us_noise_corrupt(struct us_noise noise, int32_t token, float rate, uint32_t N) {
  uint32_t words[4];
  us_philox_quad(noise.key, noise.position, noise.sample, 0, noise.stream, words);
  double uniform = ((double)words[0] + 0.5) * 0x1p-32;
  if (uniform < (double)rate || N < 2) return token;
  return (int32_t)(((uint32_t)token + 1 + us_uniform_index(words[1], N - 1)) % N);
}

/* Uniform in [0, 1) with 53 bits. */
static US_HD double us_noise_uniform(struct us_noise noise) {
  uint32_t out[4];
  us_philox_quad(noise.key, noise.position, noise.sample, 0, noise.stream, out);
  return (double)(((uint64_t)out[0] << 32 | out[1]) >> 11) * 0x1p-53;
}

/* exp(x) for x <= 0, the same bits on every machine and device; relative error below 1e-15, 0 below -700. */
static US_HD double us_exp_negative(double x) {
  if (!(x > -700.0)) return 0.0;
  int k = (int)(x * 1.4426950408889634 - 0.5);
  double r = fma((double)-k, 0x1.62e42feep-1, x); /* ln 2 in two parts; k times the first is exact */
  r = fma((double)-k, 0x1.a39ef35793c76p-33, r);
  double sum = 1.0 / 6227020800.0; /* Taylor to r^13 / 13!: |r| <= ln 2 / 2 leaves 4e-18 */
  sum = fma(sum, r, 1.0 / 479001600.0);
  sum = fma(sum, r, 1.0 / 39916800.0);
  sum = fma(sum, r, 1.0 / 3628800.0);
  sum = fma(sum, r, 1.0 / 362880.0);
  sum = fma(sum, r, 1.0 / 40320.0);
  sum = fma(sum, r, 1.0 / 5040.0);
  sum = fma(sum, r, 1.0 / 720.0);
  sum = fma(sum, r, 1.0 / 120.0);
  sum = fma(sum, r, 1.0 / 24.0);
  sum = fma(sum, r, 1.0 / 6.0);
  sum = fma(sum, r, 0.5);
  sum = fma(sum, r, 1.0);
  sum = fma(sum, r, 1.0);
  uint64_t bits = (uint64_t)(1023 + k) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

/* The largest logit's id, the lowest among equals; NaN never wins. 0 if nothing is above -Inf. */
static US_HD int32_t us_sample_argmax(const float *logits, size_t N) {
  size_t best = 0;
  float best_logit = -INFINITY;
  for (size_t i = 0; i < N; i++)
    if (logits[i] > best_logit) best_logit = logits[i], best = i;
  return (int32_t)best;
}

/* Order-preserving bits of a logit: larger logit, larger key; -0 equals +0; NaN is the smallest. */
static US_HD uint32_t us_sample_key(float logit) {
  if (!(logit >= -INFINITY)) return 0;
  uint32_t bits = us_float_bits(logit + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Weight of a token relative to the likeliest, in units of 2^-40. */
static US_HD uint64_t us_sample_weight(float logit, float max, double inv_temperature) {
  return (uint64_t)(us_exp_negative(((double)logit - (double)max) * inv_temperature) * 0x1p40 + 0.5);
}

/* log p of a logit under the softmax of its row: `max` is the row's largest logit, `mass` the sum of all weights at temperature 1. */
static US_HD float us_sample_logprob_of(float logit, float max, uint64_t mass) {
  return (float)((double)logit - (double)max - (double)us_logf((float)((double)mass * 0x1p-40)));
}

/* Largest probability of a row whose weights have this sum. */
static US_HD float us_sample_confidence(uint64_t mass) {
  return (float)(0x1p40 / (double)mass);
}

/* The filtered set: tokens whose key is above `key`, and tokens with that key up to id `last`. */
struct us_cut {
  uint32_t key;
  uint32_t last;
};

static US_HD struct us_cut us_cut_everything(void) {
  struct us_cut cut = {0, UINT32_MAX};
  return cut;
}

static US_HD bool us_cut_keeps(struct us_cut cut, float logit, uint32_t id) {
  uint32_t key = us_sample_key(logit);
  return key > cut.key || (key == cut.key && id <= cut.last);
}

/* The id of the nth (from 0) token with this key. */
static US_HD uint32_t us_cut_nth(const float *logits, size_t N, uint32_t key, uint64_t n) {
  for (size_t i = 0; i < N; i++)
    if (us_sample_key(logits[i]) == key && n-- == 0) return (uint32_t)i;
  return UINT32_MAX;
}

/* The shortest prefix of (logit descending, id ascending), inside `within`, whose measure reaches `target`: the measure
 * is a count of tokens, or the mass if `by_mass`. Radix selection: four passes of 256 buckets, no sorting. */
static US_HD struct us_cut us_cut_reach(const float *logits, size_t N, float max, double inv_temperature,
                                        struct us_cut within, bool by_mass, uint64_t target) {
  uint64_t measure[256];
  uint32_t key = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint32_t above = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    for (int b = 0; b < 256; b++) measure[b] = 0;
    for (size_t i = 0; i < N; i++) {
      uint32_t k = us_sample_key(logits[i]);
      if ((k & above) != key || !us_cut_keeps(within, logits[i], (uint32_t)i)) continue;
      measure[k >> shift & 255] += by_mass ? us_sample_weight(logits[i], max, inv_temperature) : 1;
    }
    int b = 255;
    while (b > 0 && measure[b] < target) target -= measure[b--];
    if (b == 0 && measure[0] < target) return within; /* the whole set does not reach it */
    key |= (uint32_t)b << shift;
  }
  uint64_t each = 1;
  if (by_mass) {
    uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    each = us_sample_weight(us_float_from_bits(bits), max, inv_temperature);
  }
  struct us_cut cut = {key, us_cut_nth(logits, N, key, each ? (target + each - 1) / each - 1 : 0)};
  return cut;
}

static US_HD uint64_t us_cut_mass(const float *logits, size_t N, float max, double inv_temperature,
                                  struct us_cut cut) {
  uint64_t mass = 0;
  for (size_t i = 0; i < N; i++)
    if (us_cut_keeps(cut, logits[i], (uint32_t)i)) mass += us_sample_weight(logits[i], max, inv_temperature);
  return mass;
}

/* min-p: weights fall with the logit, so the set is the tokens whose key is at least the smallest kept one. */
static US_HD struct us_cut us_cut_min_p(const float *logits, size_t N, float max, double inv_temperature,
                                        struct us_cut within, float min_p) {
  uint64_t least = (uint64_t)((double)min_p * 0x1p40);
  uint32_t key = us_sample_key(max);
  for (size_t i = 0; i < N; i++) {
    uint32_t k = us_sample_key(logits[i]);
    if (k < key && us_sample_weight(logits[i], max, inv_temperature) >= least) key = k;
  }
  if (key < within.key || (key == within.key && within.last != UINT32_MAX)) return within;
  struct us_cut cut = {key, UINT32_MAX};
  return cut;
}

/* The filtered set of a row. `max` is the largest logit. At least one token is kept. */
static US_HD struct us_cut us_sample_cut(const float *logits, size_t N, const struct us_sampling *s,
                                         float max) {
  struct us_cut cut = us_cut_everything();
  double inv = 1.0 / (double)s->temperature;
  if (s->top_k && s->top_k < N) cut = us_cut_reach(logits, N, max, inv, cut, false, s->top_k);
  if (s->top_p > 0.0f && s->top_p < 1.0f) {
    uint64_t mass = us_cut_mass(logits, N, max, inv, cut);
    uint64_t target = (uint64_t)((double)mass * (double)s->top_p);
    cut = us_cut_reach(logits, N, max, inv, cut, true, target ? target : 1);
  }
  if (s->min_p > 0.0f) cut = us_cut_min_p(logits, N, max, inv, cut, s->min_p);
  return cut;
}

/* An upper bound of the Gumbel noise of these bits without a logarithm: with w = (bits + 1/2) 2^-32 the noise is
 * -log(-log(1 - w)) <= -log(w) <= (leading zeros + 1) log 2. It spares most of a vocabulary the two logarithms. */
static US_HD float us_gumbel_bound(uint32_t bits) {
#ifdef __CUDA_ARCH__
  int zeros = __clz((int)bits);
#else
  int zeros = bits ? __builtin_clz(bits) : 32;
#endif
  return (float)(zeros + 1) * 0.6932f + 1e-3f;
}

/* Gumbel-max over the tokens that `cut` keeps. */
static US_HD int32_t us_sample_gumbel(const float *logits, size_t N, float temperature, struct us_cut cut,
                                      struct us_noise noise) {
  float inv = 1.0f / temperature, best_score = -INFINITY;
  uint32_t bits[4] = {0, 0, 0, 0};
  size_t best = (size_t)us_sample_argmax(logits, N);
  for (size_t i = 0; i < N; i++) {
    if (i % 4 == 0)
      us_philox_quad(noise.key, noise.position, noise.sample, (uint32_t)(i / 4), noise.stream, bits);
    uint32_t word = bits[i % 4];
    if (fmaf(logits[i], inv, us_gumbel_bound(word)) < best_score ||
        !us_cut_keeps(cut, logits[i], (uint32_t)i))
      continue;
    float score = fmaf(logits[i], inv, us_gumbel_bits(word));
    if (score > best_score) best_score = score, best = i;
  }
  return (int32_t)best;
}

/* Draw a token: greedy at temperature 0, else Gumbel-max over the filtered set. */
static US_HD int32_t us_sample_token(const float *logits, size_t N, const struct us_sampling *s,
                                     struct us_noise noise) {
  int32_t top = us_sample_argmax(logits, N);
  if (!(s->temperature > 0.0f)) return top;
  return us_sample_gumbel(logits, N, s->temperature, us_sample_cut(logits, N, s, logits[top]), noise);
}

#endif
