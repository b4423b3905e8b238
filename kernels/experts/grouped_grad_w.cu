/* grouped_grad_w.cu: the sum over a group's rows of their outer products: both operands lie across it. */
#include "kernels/experts/grouped_launch.cuh"

int us_grouped_grad_w(const struct us_grouped *g, const uint16_t *dy, const uint16_t *x, float *dw,
                      uint64_t dw_stride, cudaStream_t stream) {
  if (!valid(g, dw_stride)) return cudaErrorInvalidValue;
  if (!g->rows) return cudaSuccess;
  struct grouped_operand left = {dy, g->rows, g->N, 1, 0, 0, false},
                         right = {x, g->rows, g->K, 1, 0, 0, false};
  struct grouped_args a = arguments(g, g->K, 0, dw);
  a.output_rows = g->N, a.out_stride = dw_stride;
  return choose<GROUPED_GRAD_W>(g, &a, &left, &right, stream);
}
