/* philox.h: counter-based random numbers (Philox4x32-10) and the noise of sampling, the same bits on CPU and GPU.
 *
 *     struct us_philox_key key = us_philox_key(request_seed);
 *     uint32_t bits = us_philox_token(key, position, sample, token, US_STREAM_SAMPLE);
 *     float score = logit / temperature + us_gumbel_bits(bits);    // the largest score is a draw from the softmax
 *
 * Nothing has a state: a number is a function of (seed, position, sample index, token id, stream), so the
 * order of evaluation, the number of rows and the device do not matter. Generator: Salmon et al., "Parallel
 * random numbers: as easy as 1, 2, 3", SC 2011; bit-equal to Random123 and to cuRAND's
 * curandStatePhilox4_32_10_t.
 */
#ifndef US_BASE_PHILOX_H
#define US_BASE_PHILOX_H

#include "base/hd.h"
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Independent streams of one request; the last word of the counter. New ones are appended, never renumbered.
 */
enum us_stream {
  US_STREAM_SAMPLE = 0,   /* Gumbel noise of the target's draw */
  US_STREAM_DRAFT = 1,    /* Gumbel noise of the drafter's draw */
  US_STREAM_ACCEPT = 2,   /* the accept test of reject and block verification */
  US_STREAM_RESIDUAL = 3, /* the draw from the residual after a rejection */
  US_STREAM_CORRUPT = 4,  /* synthetic acceptance: whether and how a proposal is corrupted */
  US_STREAM_ROUTE = 5,    /* uniform routing of synthetic runs */
  US_STREAM_INIT = 16,    /* weight initialisation */
  US_STREAM_SHUFFLE = 17, /* data order */
  US_STREAM_ANCHOR = 18,  /* block anchors of drafter training */
};

struct us_philox_key {
  uint32_t word[2];
};

static US_HD void us_philox_round(uint32_t c[4], uint32_t key0, uint32_t key1) {
  uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
  uint32_t c1 = c[1], c3 = c[3];
  c[0] = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
  c[1] = (uint32_t)p1;
  c[2] = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
  c[3] = (uint32_t)p0;
}

/* The same, and the next round's key. */
#define US_PHILOX_ROUNDS 10
static US_HD void us_philox_step(uint32_t c[4], uint32_t key[2]) {
  us_philox_round(c, key[0], key[1]);
  key[0] += 0x9E3779B9u; /* Weyl sequence: golden ratio, sqrt(3) - 1 */
  key[1] += 0xBB67AE85u;
}

/* The block function: four words for a counter and a key; `out` may be `counter`. */
static US_HD void us_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  uint32_t k[2] = {key[0], key[1]};
  for (int round = 0; round < US_PHILOX_ROUNDS; round++) us_philox_step(c, k);
  for (int i = 0; i < 4; i++) out[i] = c[i];
}

/* Key of a 64-bit seed: low word first, as curand_init(seed, ...) does. */
static US_HD struct us_philox_key us_philox_key(uint64_t seed) {
  struct us_philox_key key = {{(uint32_t)seed, (uint32_t)(seed >> 32)}};
  return key;
}

/* Words of the tokens 4 * quad .. 4 * quad + 3: counter = (position, sample, quad, stream). */
static US_HD void us_philox_quad(struct us_philox_key key, uint32_t position, uint32_t sample, uint32_t quad,
                                 uint32_t stream, uint32_t out[4]) {
  uint32_t counter[4] = {position, sample, quad, stream};
  us_philox4x32(counter, key.word, out);
}

/* The word of one token. Over a whole vocabulary us_philox_quad costs a quarter of this. */
static US_HD uint32_t us_philox_token(struct us_philox_key key, uint32_t position, uint32_t sample,
                                      uint32_t token, uint32_t stream) {
  uint32_t out[4];
  us_philox_quad(key, position, sample, token / 4, stream, out);
  uint32_t which = token % 4;
  return which == 0 ? out[0] : which == 1 ? out[1] : which == 2 ? out[2] : out[3];
}

/* Uniform in (0, 1] exactly as curand_uniform: float(bits) * 2^-32 + 2^-33; 1.0f can occur, 0.0f cannot. */
static US_HD float us_uniform_curand(uint32_t bits) {
  return fmaf((float)bits, 0x1p-32f, 0x1p-33f);
}

/* Uniform in the open (0, 1): an odd multiple of 2^-24, exact, symmetric about 1/2. */
static US_HD float us_uniform(uint32_t bits) {
  return (float)(bits >> 8 | 1u) * 0x1p-24f;
}

/* Uniform index in [0, n), n > 0: the high word of bits * n. The bias is below n / 2^32. */
static US_HD uint32_t us_uniform_index(uint32_t bits, uint32_t n) {
  return (uint32_t)((uint64_t)bits * n >> 32);
}

static US_HD uint32_t us_float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static US_HD float us_float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* exponent * ln 2 + log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], as f - f^2 / 2 + f^3 P(f). P was fitted
 * for the least relative error of the logarithm (Lawson's iteration): 0.05 ulp with its coefficients rounded
 * to float. */
static US_HD float us_log_reduced(float f, float exponent) {
  float p = 0x1.14573ep-4f;
  p = fmaf(p, f, -0x1.de3bf8p-4f);
  p = fmaf(p, f, 0x1.e6f08cp-4f);
  p = fmaf(p, f, -0x1.fc220ep-4f);
  p = fmaf(p, f, 0x1.233766p-3f);
  p = fmaf(p, f, -0x1.555c4ep-3f);
  p = fmaf(p, f, 0x1.99a4b6p-3f);
  p = fmaf(p, f, -0x1.000006p-2f);
  p = fmaf(p, f, 0x1.555548p-2f);
  float square = f * f;
  float tail = fmaf(p, f, -0.5f);
  /* ln 2 in two parts: the first has 9 bits, so exponent times it is exact. */
  float low = fmaf(exponent, -0x1.bd0106p-13f, square * tail);
  return fmaf(exponent, 0x1.63p-1f, f + low);
}

/* Natural logarithm, the same bits on every machine and device. Error at most 0.86 ulp for every positive x,
 * subnormals included (tests/unit/base/t_philox.c). log(0) = -Inf, log(x < 0) = NaN, Inf and NaN pass
 * through. */
static US_HD float us_logf(float x) {
  uint32_t bits = us_float_bits(x);
  if (bits - 1u >= 0x7f7fffffu) { /* not a positive finite number */
    if (bits << 1 == 0) return us_float_from_bits(0xff800000u);
    return bits == 0x7f800000u || bits << 1 > 0xff000000u ? x : us_float_from_bits(0x7fc00000u);
  }
  int exponent = 0;
  if (bits < 0x00800000u) {
    bits = us_float_bits(x * 0x1p23f);
    exponent = -23;
  }
  /* Move the mantissa into [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2). */
  uint32_t shifted = bits - 0x3f3504f3u;
  exponent += (int)shifted >> 23;
  float mantissa = us_float_from_bits((shifted & 0x007fffffu) + 0x3f3504f3u);
  return us_log_reduced(mantissa - 1.0f, (float)exponent);
}

/* Exponential variate with mean 1, -log(1 - w) for w = (bits + 1/2) 2^-32. The values near 0, which decide a
 * draw, have full float precision: a race between 150,000 tokens is not blurred by the grid of a 24-bit
 * uniform. Range [1.16e-10, 22.9]. */
static US_HD float us_exponential_bits(uint32_t bits) {
  if (bits < 0x40000000u) return -us_log_reduced(-fmaf((float)bits, 0x1p-32f, 0x1p-33f), 0.0f);
  return -us_logf(fmaf((float)~bits, 0x1p-32f, 0x1p-33f));
}

/* Standard Gumbel noise from 32 random bits: -log(exponential). Range [-3.14, 22.9]. Use this one for
 * sampling. */
static US_HD float us_gumbel_bits(uint32_t bits) {
  return -us_logf(us_exponential_bits(bits));
}

/* Standard Gumbel noise from a uniform u in (0, 1): -log(-log(u)). */
static US_HD float us_gumbel(float u) {
  return -us_logf(-us_logf(u));
}

#endif
