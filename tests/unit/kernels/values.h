/* values.h: reproducible test values and weight matrices in every format. */
#ifndef US_TESTS_KERNELS_VALUES_H
#define US_TESTS_KERNELS_VALUES_H

#include "formats/bf16.h"
#include "formats/matrix.h"
#include "kernels/cpu/isa.h"
#include "suite.h"
#include <stdlib.h>
#include <string.h>

/* splitmix64: the state is the counter, so a test can be repeated from its seed. */
static inline uint64_t next_random(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

/* Uniform in [-1, 1). */
static inline float next_value(uint64_t *state) {
  return (float)((double)(next_random(state) >> 11) * 0x1p-52 - 1.0);
}

static inline void fill_values(float *values, size_t n, float scale, uint64_t *state) {
  for (size_t i = 0; i < n; i++) values[i] = next_value(state) * scale;
}

static inline float *new_values(size_t n, float scale, uint64_t *state) {
  float *values = calloc(n ? n : 1, sizeof *values);
  ck_assert_ptr_nonnull(values);
  fill_values(values, n, scale, state);
  return values;
}

/* A matrix of random codes in `format`; free with release_matrix. FP8 avoids the NaN codes, MXFP4 uses scales near 1. */
static inline struct us_matrix new_matrix(enum us_format format, size_t N, size_t K, uint64_t *state) {
  size_t bytes = us_matrix_data_bytes(format, N, K), scale_bytes = us_matrix_scale_bytes(format, N, K, 0);
  uint8_t *data = malloc(bytes), *scales = scale_bytes ? malloc(scale_bytes) : NULL;
  for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)next_random(state);
  if (format == US_FORMAT_F32) fill_values((float *)(void *)data, N * K, 1, state);
  if (format == US_FORMAT_BF16)
    for (size_t i = 0; i < N * K; i++) ((uint16_t *)(void *)data)[i] = us_bf16_from_f32(next_value(state));
  if (format == US_FORMAT_FP8)
    for (size_t i = 0; i < bytes; i++)
      if ((data[i] & 0x7f) == 0x7f) data[i] = 0x31;
  if (format == US_FORMAT_FP8) fill_values((float *)(void *)scales, scale_bytes / 4, 0.01f, state);
  if (format == US_FORMAT_MXFP4)
    for (size_t i = 0; i < scale_bytes; i++) scales[i] = (uint8_t)(120 + next_random(state) % 8);
  return (struct us_matrix){.format = format, .rows = N, .cols = K, .data = data, .scales = scales};
}

static inline void release_matrix(struct us_matrix *w) {
  free((void *)(uintptr_t)w->data);
  free((void *)(uintptr_t)w->scales);
  *w = (struct us_matrix){0};
}

/* Bit equality, so that -0 and 0 differ and a NaN equals itself. */
static inline void assert_same_bits(const float *a, const float *b, size_t n, const char *what) {
  for (size_t i = 0; i < n; i++)
    ck_assert_msg(us_f32_bits(a[i]) == us_f32_bits(b[i]), "%s: value %zu is %.9g (%08x), not %.9g (%08x)",
                  what, i, (double)a[i], us_f32_bits(a[i]), (double)b[i], us_f32_bits(b[i]));
}

/* The instruction sets of this machine besides plain C. */
static inline size_t fast_isas(enum us_isa *isas) {
  size_t n = 0;
  if (us_isa_supported(US_ISA_AVX2)) isas[n++] = US_ISA_AVX2;
  if (us_isa_supported(US_ISA_AVX512)) isas[n++] = US_ISA_AVX512;
  return n;
}

#endif
