/* linear.cu: FP8 weights times 8 rows. Bound: bytes of weights from HBM; figures in docs/perf.md. A code becomes f16 by one or
 * two LOP3 and shifts (times 2^-8), products are exact, 128 columns are summed by the tensor core before their scale is
 * applied in FP32. */
#include "kernels/gpu/ksplit.cuh"
#include "kernels/linear/linear_gpu.h"

#define WARPS 16

struct store_rows {
  const float *unscale;
  float *y;
  uint32_t N;

  __device__ __forceinline__ float undo(int token) const {
    return unscale[token] * (1.0f / US_PAGES_FP8_UNIT);
  }
  __device__ __forceinline__ int prepare(int, const struct us_ksplit_cursor &) const { return 0; }
  __device__ __forceinline__ void store(float value, int, int row, int token,
                                        const struct us_ksplit_cursor &at, int) const {
    y[((size_t)at.matrix * US_ROWS + token) * N + at.tile * 16 + row] = value;
  }
};

struct us_pages us_linear_pages(enum us_format format, uint32_t N, uint32_t K) {
  struct us_pages pages = {format, N, K, 16, K / WARPS};
  if (format != US_FORMAT_FP8 || N % 16 || (K != 6144 && K != 4096)) pages.format = US_FORMAT_NONE;
  return pages;
}

template <int GROUPS, int STAGES, bool RESIDENT>
static cudaError_t launch(const struct us_linear_gpu *args, cudaStream_t stream) {
  using Page = us_fp8_page<GROUPS>;
  auto kernel = us_ksplit<Page, WARPS, STAGES, store_rows, RESIDENT>;
  int bytes = us_ksplit_shared<Page, WARPS>::bytes(STAGES), device, blocks;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  struct us_ksplit_work work = {
      (const uint8_t *)args->weights, us_pages_bytes(&args->pages), args->opt_index, args->matrices,
      args->pages.rows / 16,          (const uint4 *)args->operand};
  struct store_rows epilogue = {args->unscale, args->y, args->pages.rows};
  kernel<<<blocks, WARPS * 32, bytes, stream>>>(work, epilogue);
  return cudaGetLastError();
}

cudaError_t us_linear_gpu(const struct us_linear_gpu *args, cudaStream_t stream) {
  struct us_pages want = us_linear_pages(args->pages.format, args->pages.rows, args->pages.cols);
  if (want.format != US_FORMAT_FP8 || want.slice_cols != args->pages.slice_cols ||
      args->pages.tile_rows != 16)
    return cudaErrorInvalidValue;
  if (args->pages.cols == 6144)
    return args->resident ? launch<12, 2, true>(args, stream) : launch<12, 2, false>(args, stream);
  return args->resident ? launch<8, 3, true>(args, stream) : launch<8, 3, false>(args, stream);
}
