/* swiglu_ref.c: silu(gate) * up in plain C, the definition, and the choice of an implementation. */
#include "kernels/swiglu/swiglu_impl.h"

#include "kernels/cpu/exp.h"

void us_swiglu_plain(const struct us_swiglu_args *args) {
  for (size_t i = 0; i < args->n; i++) {
    float gate = args->gate[i];
    float value = gate / (1.0f + us_expf(-gate)) * args->up[i];
    args->y[i] = args->round_bf16 ? us_bf16_round(value) : value;
  }
}

void us_swiglu(const struct us_swiglu_args *args) {
#if defined(__x86_64__)
  enum us_isa isa = us_isa_resolve(args->isa);
  if (isa == US_ISA_AVX512) {
    us_swiglu_avx512(args);
    return;
  }
  if (isa == US_ISA_AVX2) {
    us_swiglu_avx2(args);
    return;
  }
#endif
  us_swiglu_plain(args);
}
