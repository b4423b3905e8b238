/* experts_inner.cu: gate, up and SwiGLU of the active experts. Bound: bytes of MXFP4 weights from HBM; figures in
 * docs/perf.md. 32-row tiles of 16 gate and 16 up rows: both sums of an output meet in neighbouring threads. 60 experts x 32
 * tiles over 132 SMs is 14.5 tiles each: 3 % of imbalance in a single layer. */
#include "kernels/cpu/exp.h"
#include "kernels/experts/experts_gpu.h"
#include "kernels/gpu/ksplit.cuh"

#define WARPS  16
#define STAGES 2
#define GROUPS 12 /* K = 6144 = 16 warps x 12 groups of 32 */

struct store_swiglu {
  const int32_t *pair;
  const float *unscale;
  uint16_t *inner;
  uint32_t F;

  __device__ __forceinline__ float undo(int token) const {
    return unscale[token] * (1.0f / (US_PAGES_MXFP4_UNIT * US_PAGES_SCALE_UNIT));
  }
  __device__ __forceinline__ int prepare(int token, const struct us_ksplit_cursor &at) const {
    return __ldg(pair + at.matrix * US_ROWS + token);
  }
  __device__ __forceinline__ void store(float value, int half, int row, int,
                                        const struct us_ksplit_cursor &at, int to) const {
    float other = __shfl_xor_sync(0xffffffffu, value, 1);
    if (half || to < 0) return;
    float silu = value / (1.0f + us_expf(-value));
    inner[(size_t)to * F + at.tile * 16 + row] = us_bf16_from_f32(silu * other);
  }
};

struct us_pages us_experts_inner_pages(enum us_format format, uint32_t D, uint32_t F) {
  struct us_pages pages = {format, 2 * F, D, 32, D / WARPS};
  if (format != US_FORMAT_MXFP4 || D != WARPS * GROUPS * 32 || !F || F % 16) pages.format = US_FORMAT_NONE;
  return pages;
}

template <bool RESIDENT> static cudaError_t launch(const struct us_experts_gpu *args, cudaStream_t stream) {
  using Page = us_mxfp4_page<2, GROUPS>;
  auto kernel = us_ksplit<Page, WARPS, STAGES, store_swiglu, RESIDENT>;
  int bytes = us_ksplit_shared<Page, WARPS>::bytes(STAGES), device, blocks;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  struct us_ksplit_work work = {
      (const uint8_t *)args->inner_weights, us_pages_bytes(&args->inner_pages), args->matrix, args->total,
      args->inner_pages.rows / 32,          (const uint4 *)args->operand};
  struct store_swiglu epilogue = {args->global_pair, args->unscale, args->inner, args->inner_pages.rows / 2};
  kernel<<<blocks, WARPS * 32, bytes, stream>>>(work, epilogue);
  return cudaGetLastError();
}

cudaError_t us_experts_inner_gpu(const struct us_experts_gpu *args, cudaStream_t stream) {
  const struct us_pages *p = &args->inner_pages;
  struct us_pages want = us_experts_inner_pages(p->format, p->cols, p->rows / 2);
  if (want.format != US_FORMAT_MXFP4 || want.slice_cols != p->slice_cols || want.tile_rows != p->tile_rows)
    return cudaErrorInvalidValue;
  return args->resident ? launch<true>(args, stream) : launch<false>(args, stream);
}
