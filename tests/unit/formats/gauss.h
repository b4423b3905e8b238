/* gauss.h: reproducible random weights for tests: splitmix64 and Box-Muller. */
#ifndef US_TESTS_GAUSS_H
#define US_TESTS_GAUSS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "formats/bf16.h"

static inline uint64_t test_next(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static inline double test_uniform(uint64_t *state) {
  return ((double)(test_next(state) >> 11) + 0.5) * 0x1p-53;
}

/* n normal values of standard deviation 0.02, rounded to bf16, as published weights are; n is even. */
static inline void test_gauss_bf16(uint64_t *state, size_t n, float *values) {
  for (size_t i = 0; i + 1 < n; i += 2) {
    double r = 0.02 * sqrt(-2 * log(test_uniform(state))), angle = 6.283185307179586 * test_uniform(state);
    values[i] = us_bf16_round((float)(r * cos(angle)));
    values[i + 1] = us_bf16_round((float)(r * sin(angle)));
  }
}

#endif
