/* grouped_grad_x.cu: rows times their group's matrix: the matrix lies across the sum. */
#include "kernels/experts/grouped_launch.cuh"

int us_grouped_grad_x(const struct us_grouped *g, const uint16_t *dy, const uint16_t *w, uint64_t w_stride,
                      uint16_t *dx, cudaStream_t stream) {
  if (!valid(g, w_stride)) return cudaErrorInvalidValue;
  if (!g->rows) return cudaSuccess;
  struct grouped_operand left = {dy, g->rows, g->N, 1, 0, 0, false},
                         right = {w, g->N, g->K, g->groups, w_stride, 0, false};
  struct grouped_args a = arguments(g, g->K, g->N, dx);
  return choose<GROUPED_GRAD_X>(g, &a, &left, &right, stream);
}
