/* rope_ref.c: rotary position embedding. */
#include "kernels/rope/rope.h"

#include <math.h>

void us_rope_table(double theta, uint32_t rotary_dim, uint32_t position, float *table) {
  uint32_t half = rotary_dim / 2;
  for (uint32_t i = 0; i < half; i++) {
    double angle = (double)position * pow(theta, -2.0 * i / rotary_dim);
    table[i] = (float)cos(angle);
    table[half + i] = (float)sin(angle);
  }
}

void us_rope_apply(const float *table, uint32_t rotary_dim, float *x) {
  uint32_t half = rotary_dim / 2;
  for (uint32_t i = 0; i < half; i++) {
    float a = x[i], b = x[half + i], c = table[i], s = table[half + i];
    x[i] = a * c - b * s;
    x[half + i] = b * c + a * s;
  }
}
