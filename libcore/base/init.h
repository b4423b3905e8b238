/* init.h: random initial weights: a value is a function of (seed, tensor name, row, column), the same bits on CPU and GPU.
 *
 *     struct us_init init = {us_philox_key(seed), us_init_name("model.embed_tokens.weight"), .middle = 0, .half = 1.7f};
 *     float quad[4];
 *     us_init_quad(&init, row, column / 4, quad);      // columns 4q .. 4q + 3: uniform in middle +- half
 *
 * Counter = (row, column / 4, FNV-1a of the name, US_STREAM_INIT): tensors of different names never share a number unless
 * their hashes collide, which for the 160,000 names of the largest model would repeat a few tensors and harm nothing.
 */
#ifndef US_BASE_INIT_H
#define US_BASE_INIT_H

#include "base/philox.h"

struct us_init {
  struct us_philox_key key;
  uint32_t name;
  float middle, half;
};

/* FNV-1a. */
static US_HD uint32_t us_init_name(const char *name) {
  uint32_t hash = 2166136261u;
  for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 16777619u;
  return hash;
}

static US_HD void us_init_quad(const struct us_init *init, uint32_t row, uint32_t quad, float ret_values[4]) {
  uint32_t words[4];
  us_philox_quad(init->key, row, quad, init->name, US_STREAM_INIT, words);
  for (int i = 0; i < 4; i++)
    ret_values[i] = fmaf(2.0f * us_uniform(words[i]) - 1.0f, init->half, init->middle);
}

#endif
