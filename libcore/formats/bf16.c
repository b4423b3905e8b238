/* bf16.c: bf16 arrays. */
#include "formats/bf16.h"

void us_bf16_encode(const float *values, size_t n, uint16_t *halves) {
  for (size_t i = 0; i < n; i++) halves[i] = us_bf16_from_f32(values[i]);
}

void us_bf16_decode(const uint16_t *halves, size_t n, float *values) {
  for (size_t i = 0; i < n; i++) values[i] = us_bf16_to_f32(halves[i]);
}

void us_bf16_round_all(const float *values, size_t n, float *rounded) {
  for (size_t i = 0; i < n; i++) rounded[i] = us_bf16_round(values[i]);
}
