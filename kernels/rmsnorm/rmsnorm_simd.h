/* rmsnorm_simd.h: RMS normalisation over 16 lanes. Bound: two reads of a row that fits the first-level cache; not worth
 * more than one chain of fma. */
#include "kernels/cpu/vec16.h"
#include "kernels/rmsnorm/rmsnorm_impl.h"

#include <math.h>

#define LANES 16

static float sum_of_squares(const float *x, size_t D) {
  vec16 acc = vec16_zero();
  size_t k = 0;
  for (; k + LANES <= D; k += LANES) {
    vec16 v = vec16_load(x + k);
    acc = vec16_fma(v, v, acc);
  }
  float lane[LANES];
  vec16_store(lane, acc);
  for (; k < D; k++) lane[k % LANES] = fmaf(x[k], x[k], lane[k % LANES]);
  return vec16_sum(vec16_load(lane));
}

static void scale_row(const struct us_rmsnorm_args *args, const float *x, float scale, float *y) {
  size_t k = 0;
  for (; k + LANES <= args->D; k += LANES) {
    vec16 v = vec16_mul(vec16_mul(vec16_load(x + k), vec16_set1(scale)), vec16_load(args->weight + k));
    vec16_store(y + k, args->round_bf16 ? vec16_round_bf16(v) : v);
  }
  for (; k < args->D; k++) {
    float value = x[k] * scale * args->weight[k];
    y[k] = args->round_bf16 ? us_bf16_round(value) : value;
  }
}

static void rmsnorm_any(const struct us_rmsnorm_args *args) {
  for (size_t r = 0; r < args->R; r++) {
    const float *x = args->x + r * args->x_stride;
    float scale = 1.0f / sqrtf(sum_of_squares(x, args->D) / (float)args->D + args->eps);
    scale_row(args, x, scale, args->y + r * args->y_stride);
  }
}
