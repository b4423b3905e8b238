/* philox_cases.h: the (seed, subsequence, offset) triples at which our generator is compared with cuRAND's, and the
 * comparison itself; for the host (philox_curand_host.cu) and the device (philox_curand.cu).
 *
 * cuRAND's counter is (offset / 4 low, offset / 4 high, subsequence low, subsequence high), its key the seed.
 */
#ifndef US_TESTS_PHILOX_CASES_H
#define US_TESTS_PHILOX_CASES_H

#include "base/philox.h"
#include <curand_kernel.h>

#define PHILOX_CASES 65536
#define PHILOX_WORDS 24 /* a case: 3 blocks of 4 words, then the uniforms of 12 words */

struct philox_case {
  uint64_t seed, subsequence, offset;
};

/* Edges first, then whatever a generator of another family (splitmix64) gives. */
static __host__ __device__ inline uint64_t philox_mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

static __host__ __device__ inline struct philox_case philox_get_case(uint32_t i) {
  const uint64_t edges[4] = {0, 1, 0xffffffffull, 0x100000000ull};
  struct philox_case c;
  if (i < 64) {
    c.seed = edges[i & 3];
    c.subsequence = edges[i >> 2 & 3];
    c.offset = 4 * edges[i >> 4 & 3];
    return c;
  }
  c.seed = philox_mix(3 * (uint64_t)i);
  c.subsequence = philox_mix(3 * (uint64_t)i + 1);
  c.offset =
      philox_mix(3 * (uint64_t)i + 2) >> 8 << 2; /* whole blocks, no overflow of the counter's low half */
  return c;
}

/* Words of case i as cuRAND gives them. QUALIFIERS is cuRAND's macro: static, device, unless defined before. */
QUALIFIERS void philox_curand(uint32_t i, uint32_t words[PHILOX_WORDS]) {
  struct philox_case c = philox_get_case(i);
  curandStatePhilox4_32_10_t state;
  curand_init(c.seed, c.subsequence, c.offset, &state);
  for (int block = 0; block < 3; block++) {
    uint4 four = curand4(&state);
    words[4 * block + 0] = four.x;
    words[4 * block + 1] = four.y;
    words[4 * block + 2] = four.z;
    words[4 * block + 3] = four.w;
  }
  curand_init(c.seed, c.subsequence, c.offset, &state);
  for (int block = 0; block < 3; block++) {
    float4 four = curand_uniform4(&state);
    words[12 + 4 * block + 0] = us_float_bits(four.x);
    words[12 + 4 * block + 1] = us_float_bits(four.y);
    words[12 + 4 * block + 2] = us_float_bits(four.z);
    words[12 + 4 * block + 3] = us_float_bits(four.w);
  }
}

/* Words of case i as philox.h gives them. */
static __host__ __device__ inline void philox_ours(uint32_t i, uint32_t words[PHILOX_WORDS]) {
  struct philox_case c = philox_get_case(i);
  struct us_philox_key key = us_philox_key(c.seed);
  for (uint32_t block = 0; block < 3; block++) {
    uint64_t at = c.offset / 4 + block;
    uint64_t subsequence = c.subsequence;
    us_philox_quad(key, (uint32_t)at, (uint32_t)(at >> 32), (uint32_t)subsequence,
                   (uint32_t)(subsequence >> 32), words + 4 * block);
  }
  for (int j = 0; j < 12; j++) words[12 + j] = us_float_bits(us_uniform_curand(words[j]));
}

#endif
