/* gemm_impl.h: the variants of us_gemm. Internal. */
#ifndef US_KERNELS_GEMM_IMPL_H
#define US_KERNELS_GEMM_IMPL_H

#include "kernels/gemm/gemm.h"

void us_gemm_plain(const struct us_gemm *args);
void us_gemm_avx2(const struct us_gemm *args);
void us_gemm_avx512(const struct us_gemm *args);

#endif
