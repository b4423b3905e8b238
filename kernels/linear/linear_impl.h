/* linear_impl.h: the implementations behind us_linear; tests name them through us_linear's isa. */
#ifndef US_KERNELS_LINEAR_LINEAR_IMPL_H
#define US_KERNELS_LINEAR_LINEAR_IMPL_H

#include "kernels/linear/linear.h"

void us_linear_plain(const struct us_linear_args *args);
void us_linear_avx2(const struct us_linear_args *args);
void us_linear_avx512(const struct us_linear_args *args);

/* Packed row that output row r reads. */
static inline const float *us_linear_x_row(const struct us_linear_args *args, size_t r) {
  return args->x + (args->opt_x_rows ? args->opt_x_rows[r] : r) * args->x_stride;
}

#endif
