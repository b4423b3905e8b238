/* grouped_forward.cu: rows times the transpose of their group's matrix: both operands lie along the sum. */
#include "kernels/experts/grouped_launch.cuh"

static struct grouped_operand rows_of(const struct us_grouped *g, const uint16_t *x) {
  struct grouped_operand o = {x, g->rows, g->K, 1, 0, 0, false};
  return o;
}

static struct grouped_operand matrices_of(const struct us_grouped *g, const uint16_t *w, uint64_t stride) {
  struct grouped_operand o = {w, g->N, g->K, g->groups, stride, 0, false};
  return o;
}

int us_grouped_forward(const struct us_grouped *g, const uint16_t *x, const uint16_t *w, uint64_t w_stride,
                       uint16_t *y, cudaStream_t stream) {
  if (!valid(g, w_stride)) return cudaErrorInvalidValue;
  if (!g->rows) return cudaSuccess;
  struct grouped_operand left = rows_of(g, x), right = matrices_of(g, w, w_stride);
  struct grouped_args a = arguments(g, g->N, g->K, y);
  return choose<GROUPED_FORWARD>(g, &a, &left, &right, stream);
}

int us_grouped_forward_swiglu(const struct us_grouped *g, const uint16_t *x, const uint16_t *w,
                              uint64_t w_stride, uint16_t *opt_y, uint16_t *a, cudaStream_t stream) {
  if (!valid(g, w_stride) || g->N % 32) return cudaErrorInvalidValue;
  if (!g->rows) return cudaSuccess;
  struct grouped_operand left = rows_of(g, x), right = matrices_of(g, w, w_stride);
  struct grouped_args args = arguments(g, g->N, g->K, opt_y);
  args.gated = a;
  return choose<GROUPED_SWIGLU>(g, &args, &left, &right, stream);
}

/* For the router alone, 3 x 64 columns: one tile, one kernel. */
int us_grouped_forward_f32(const struct us_grouped *g, const uint16_t *x, const uint16_t *w,
                           uint64_t w_stride, float *y, cudaStream_t stream) {
  if (!valid(g, w_stride)) return cudaErrorInvalidValue;
  if (!g->rows) return cudaSuccess;
  struct grouped_operand left = rows_of(g, x), right = matrices_of(g, w, w_stride);
  struct grouped_args a = arguments(g, g->N, g->K, y);
  return launch<grouped_shape<GROUPED_FORWARD, 192, 1, false, true>>(&a, &left, &right, stream);
}
