/* rmsnorm_ref.c: RMS normalisation in plain C, the definition, and the choice of an implementation. */
#include "kernels/rmsnorm/rmsnorm_impl.h"

#include "formats/bf16.h"
#include <math.h>

#define LANES 16

static float sum_of_squares(const float *x, size_t D) {
  float lane[LANES] = {0};
  for (size_t k = 0; k < D; k++) lane[k % LANES] = fmaf(x[k], x[k], lane[k % LANES]);
  for (size_t width = LANES / 2; width; width /= 2)
    for (size_t l = 0; l < width; l++) lane[l] = lane[l] + lane[l + width];
  return lane[0];
}

void us_rmsnorm_plain(const struct us_rmsnorm_args *args) {
  for (size_t r = 0; r < args->R; r++) {
    const float *x = args->x + r * args->x_stride;
    float *y = args->y + r * args->y_stride;
    float scale = 1.0f / sqrtf(sum_of_squares(x, args->D) / (float)args->D + args->eps);
    for (size_t k = 0; k < args->D; k++) {
      float value = x[k] * scale * args->weight[k];
      y[k] = args->round_bf16 ? us_bf16_round(value) : value;
    }
  }
}

void us_rmsnorm(const struct us_rmsnorm_args *args) {
#if defined(__x86_64__)
  enum us_isa isa = us_isa_resolve(args->isa);
  if (isa == US_ISA_AVX512) {
    us_rmsnorm_avx512(args);
    return;
  }
  if (isa == US_ISA_AVX2) {
    us_rmsnorm_avx2(args);
    return;
  }
#endif
  us_rmsnorm_plain(args);
}
