/* rmsnorm_impl.h: the implementations behind us_rmsnorm. */
#ifndef US_KERNELS_RMSNORM_IMPL_H
#define US_KERNELS_RMSNORM_IMPL_H

#include "kernels/rmsnorm/rmsnorm.h"

void us_rmsnorm_plain(const struct us_rmsnorm_args *args);
void us_rmsnorm_avx2(const struct us_rmsnorm_args *args);
void us_rmsnorm_avx512(const struct us_rmsnorm_args *args);

#endif
