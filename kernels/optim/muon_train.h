/* muon_train.h: Muon over many matrices of one shape on the GPU.
 *
 *     struct us_muon_matrix m = us_muon_whole(p->offset, rows);                 // or us_muon_part for q, k or v of a fused qkv
 *     size_t bytes = us_muon_train_scratch(rows, cols, batch);
 *     us_muon_train(&(struct us_muon_train){.rows = rows, .cols = cols, .matrices = matrices, .count = count, .batch = batch,
 *                                           .value = value, .grad = grad, .moment = moment1, .rate = 3e-4, .momentum = .95,
 *                                           .decay = .1, .nesterov = true, .scratch = scratch, .scratch_bytes = bytes,
 *                                           .cublas = handle}, stream);
 *
 * As us_muon_update (training/optim.h): momentum and the master's update in FP32 (the moments have the CPU's bits), the five
 * steps of Newton-Schulz or Polar Express as bf16 products with FP32 sums, C = a X added inside the product. Matrices of equal
 * shape, all experts of all layers say, are multiplied in batches. Pointers are device memory unless said.
 */
#ifndef US_KERNELS_MUON_TRAIN_H
#define US_KERNELS_MUON_TRAIN_H

#include "kernels/gpu/stream.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cublasContext;

/* Row i of the matrix is row (i / run) * step + first + i % run of the tensor (rows of `cols` values) at `offset`. */
struct us_muon_matrix {
  uint64_t offset; /* in the arenas, a multiple of 4 */
  uint32_t first, run, step;
  float rate_scale;
};

static inline struct us_muon_matrix us_muon_whole(uint64_t offset, size_t rows) {
  struct us_muon_matrix m = {offset, 0, (uint32_t)rows, (uint32_t)rows, 1.0f};
  return m;
}

/* One of q, k, v: `run` rows from row `first` on of every chunk of `step` rows. */
static inline struct us_muon_matrix us_muon_part(uint64_t offset, uint32_t first, uint32_t run,
                                                 uint32_t step) {
  struct us_muon_matrix m = {offset, first, run, step, 1.0f};
  return m;
}

enum us_muon_newton { US_MUON_NEWTON_SCHULZ5, US_MUON_POLAR_EXPRESS }; /* as enum us_newton */

struct us_muon_train {
  size_t rows, cols; /* of each matrix; cols a multiple of 8, and rows too if rows < cols */
  const struct us_muon_matrix *matrices; /* (count) */
  size_t count, batch;                   /* matrices in all, and multiplied at once */
  float *value;                          /* the arenas */
  const float *grad;
  float *moment;
  double rate; /* with the factor for Muon's tensors, without rate_scale */
  double momentum, decay;
  bool nesterov;
  enum us_muon_newton newton;
  const float *opt_factor; /* (1) device: gradients are multiplied by it first (clipping); NULL: 1 */
  void *scratch;           /* us_muon_train_scratch bytes, 256-byte aligned */
  size_t scratch_bytes;
  struct cublasContext *cublas; /* cublasHandle_t, of the current device */
};
size_t us_muon_train_scratch(size_t rows, size_t cols, size_t batch);

/* A cudaError_t: cudaErrorInvalidValue for sizes or scratch, cudaErrorUnknown where cuBLAS refused a product. */
int us_muon_train(const struct us_muon_train *muon, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
