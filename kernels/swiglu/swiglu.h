/* swiglu.h: y = silu(gate) * up, unclamped.
 *
 *     us_swiglu(&(struct us_swiglu_args){.gate = g, .up = u, .y = y, .n = F, .round_bf16 = true});
 *
 * silu(g) = g / (1 + us_expf(-g)); FP32 inside, one rounding to bf16 at the end.
 */
#ifndef US_KERNELS_SWIGLU_SWIGLU_H
#define US_KERNELS_SWIGLU_SWIGLU_H

#include "kernels/cpu/isa.h"
#include <stddef.h>

struct us_swiglu_args {
  const float *gate, *up; /* (n) */
  float *y;               /* (n); may be gate or up */
  size_t n;
  bool round_bf16;
  enum us_isa isa;
};

void us_swiglu(const struct us_swiglu_args *args);

#endif
