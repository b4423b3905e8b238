/* draft_loss_train.cu: rows moved by index, and slot weights, a thread a block of the drafter.
 *
 * Bound by HBM: gather moves 4 D bytes a row, scatter 8 D; both in 16-byte accesses. The weights are a few hundred KB.
 */
#include "kernels/draft_loss/draft_loss_train.h"

#include <cuda_runtime.h>

namespace {

constexpr unsigned THREADS = 256;

unsigned blocks_for(size_t threads) {
  return (unsigned)((threads + THREADS - 1) / THREADS);
}

__global__ void gather(size_t pieces, unsigned per_row, const uint32_t *row, const uint4 *in, uint4 *out) {
  size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
  if (i < pieces) out[i] = in[(size_t)row[i / per_row] * per_row + i % per_row];
}

__global__ void scatter(size_t pieces, unsigned per_row, const int32_t *index, const float *weight,
                        const float4 *in, float4 *out) {
  size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= pieces) return;
  int32_t from = index[i / per_row];
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (from >= 0) {
    float w = weight[from];
    x = in[(size_t)from * per_row + i % per_row];
    x = make_float4(w * x.x, w * x.y, w * x.z, w * x.w);
  }
  out[i] = x;
}

/* us_draft_slot_weights of one block: products forward, their sum backward, in double. */
__global__ void slot_weights(struct us_draft_weights_train w) {
  size_t block = (size_t)blockIdx.x * THREADS + threadIdx.x;
  if (block >= w.blocks) return;
  uint32_t first = w.start[block], n = w.start[block + 1] - first;
  double prefix[US_DRAFT_TRAIN_SLOTS], product = 1.0, suffix = 0.0, alpha = (double)w.alpha;
  for (uint32_t i = 0; i < n; i++) {
    if (w.kind == US_DRAFT_TRAIN_FIXED) {
      w.weight[first + i] = w.fixed[i];
    } else {
      product *= (1.0 - alpha) * exp((double)w.logprob[first + i]) + alpha;
      prefix[i] = product;
    }
  }
  if (w.kind == US_DRAFT_TRAIN_FIXED) return;
  for (uint32_t i = n; i-- > 0;) {
    suffix += prefix[i];
    w.weight[first + i] = (float)suffix;
  }
}

} // namespace

extern "C" int us_rows_gather_train(size_t n, size_t D, const uint32_t *row, const uint16_t *in,
                                    uint16_t *out, cudaStream_t stream) {
  if (D % 8) return cudaErrorInvalidValue;
  if (!n) return cudaSuccess;
  gather<<<blocks_for(n * (D / 8)), THREADS, 0, stream>>>(n * (D / 8), (unsigned)(D / 8), row,
                                                          (const uint4 *)in, (uint4 *)out);
  return cudaGetLastError();
}

extern "C" int us_rows_scatter_train(size_t rows, size_t D, const int32_t *index, const float *weight,
                                     const float *in, float *out, cudaStream_t stream) {
  if (D % 8) return cudaErrorInvalidValue;
  if (!rows) return cudaSuccess;
  scatter<<<blocks_for(rows * (D / 4)), THREADS, 0, stream>>>(rows * (D / 4), (unsigned)(D / 4), index,
                                                              weight, (const float4 *)in, (float4 *)out);
  return cudaGetLastError();
}

extern "C" int us_draft_weights_train(const struct us_draft_weights_train *weights, cudaStream_t stream) {
  if (!weights->blocks) return cudaSuccess;
  slot_weights<<<blocks_for(weights->blocks), THREADS, 0, stream>>>(*weights);
  return cudaGetLastError();
}
