/* gemm.c: choice of the instruction set, and the definition in plain C. */
#include "kernels/gemm/gemm_impl.h"

#include <math.h>

void us_gemm_plain(const struct us_gemm *g) {
  for (size_t i = 0; i < g->M; i++)
    for (size_t j = 0; j < g->N; j++) {
      float *c = &g->c[i * g->c_row + j];
      float beta = g->beta;
      size_t k = 0;
      do {
        size_t end = g->K - k < US_GEMM_DEPTH ? g->K : k + US_GEMM_DEPTH;
        float sum = 0.0f;
        for (; k < end; k++)
          sum = fmaf(g->a[i * g->a_row + k * g->a_col], g->b[k * g->b_row + j * g->b_col], sum);
        *c = beta == 0.0f ? g->alpha * sum : g->alpha * sum + beta * *c;
        beta = 1.0f;
      } while (k < g->K);
    }
}

void us_gemm(const struct us_gemm *args) {
  switch (us_isa_resolve(args->isa)) {
#if defined(__x86_64__)
  case US_ISA_AVX512:
    us_gemm_avx512(args);
    return;
  case US_ISA_AVX2:
    us_gemm_avx2(args);
    return;
#endif
  default:
    us_gemm_plain(args);
    return;
  }
}
