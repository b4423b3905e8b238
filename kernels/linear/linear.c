/* linear.c: packing of activations, and the choice of an implementation. */
#include "kernels/linear/linear_impl.h"

#include <string.h>

static void pack_row(const float *x, size_t K, float *packed) {
  size_t whole = K / US_LINEAR_GROUP * US_LINEAR_GROUP;
  for (size_t k = 0; k < whole; k += US_LINEAR_GROUP) {
    for (size_t l = 0; l < US_LINEAR_GROUP / 2; l++) {
      packed[k + l] = x[k + 2 * l];
      packed[k + US_LINEAR_GROUP / 2 + l] = x[k + 2 * l + 1];
    }
  }
  if (whole == K) return;
  memset(packed + whole, 0, US_LINEAR_GROUP * sizeof *packed);
  for (size_t k = whole; k < K; k++) packed[us_linear_packed_index(k)] = x[k];
}

void us_linear_pack(const float *x, size_t R, size_t K, size_t x_stride, float *packed,
                    size_t packed_stride) {
  for (size_t r = 0; r < R; r++) pack_row(x + r * x_stride, K, packed + r * packed_stride);
}

void us_linear(const struct us_linear_args *args) {
#if defined(__x86_64__)
  enum us_isa isa = us_isa_resolve(args->isa);
  if (isa == US_ISA_AVX512) {
    us_linear_avx512(args);
    return;
  }
  if (isa == US_ISA_AVX2) {
    us_linear_avx2(args);
    return;
  }
#endif
  us_linear_plain(args);
}
