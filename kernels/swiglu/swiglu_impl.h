/* swiglu_impl.h: the implementations behind us_swiglu. */
#ifndef US_KERNELS_SWIGLU_IMPL_H
#define US_KERNELS_SWIGLU_IMPL_H

#include "kernels/swiglu/swiglu.h"

void us_swiglu_plain(const struct us_swiglu_args *args);
void us_swiglu_avx2(const struct us_swiglu_args *args);
void us_swiglu_avx512(const struct us_swiglu_args *args);

#endif
