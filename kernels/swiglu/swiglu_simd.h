/* swiglu_simd.h: silu(gate) * up over 16 lanes. Bound: the polynomial and one division a value; a thousandth of the
 * experts' time. */
#include "kernels/cpu/vec16.h"
#include "kernels/swiglu/swiglu_impl.h"

#include <string.h>

#define LANES 16

VEC16_INLINE vec16 swiglu16(vec16 gate, vec16 up, bool round_bf16) {
  vec16 minus = vec16_mul(gate, vec16_set1(-1.0f));
  vec16 silu = vec16_div(gate, vec16_add(vec16_set1(1.0f), vec16_exp(minus)));
  vec16 value = vec16_mul(silu, up);
  return round_bf16 ? vec16_round_bf16(value) : value;
}

static void swiglu_any(const struct us_swiglu_args *args) {
  size_t i = 0;
  for (; i + LANES <= args->n; i += LANES)
    vec16_store(args->y + i,
                swiglu16(vec16_load(args->gate + i), vec16_load(args->up + i), args->round_bf16));
  if (i == args->n) return;
  float gate[LANES] = {0}, up[LANES] = {0}, y[LANES];
  memcpy(gate, args->gate + i, (args->n - i) * sizeof *gate);
  memcpy(up, args->up + i, (args->n - i) * sizeof *up);
  vec16_store(y, swiglu16(vec16_load(gate), vec16_load(up), args->round_bf16));
  memcpy(args->y + i, y, (args->n - i) * sizeof *y);
}
