/* synthetic.cu: random weights, made and encoded on the device by the CPU's own inline functions. Bound: 10 Philox rounds a
 * quad and the encoder's comparisons; a model of 500 GB takes seconds. */
#include "formats/mxfp4_group.h"
#include "kernels/pages/pages_gpu.h"

/* One thread a group of 32. */
static __global__ void make_mxfp4(const struct us_init *inits, uint32_t rows, uint32_t cols, uint8_t *codes,
                                  uint8_t *scales) {
  uint32_t groups = cols / US_MXFP4_GROUP, index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= rows * groups) return;
  uint32_t row = index / groups, group = index % groups;
  struct us_init init = inits[blockIdx.y];
  size_t at = (size_t)blockIdx.y * rows * groups + index;
  float values[US_MXFP4_GROUP];
  uint32_t code[US_MXFP4_GROUP];
  for (uint32_t q = 0; q < 8; q++) us_init_quad(&init, row, group * 8 + q, values + 4 * q);
  scales[at] = us_mxfp4_group_encode(values, us_mxfp4_group_max(values), US_SCALE_MSE, code);
  for (int i = 0; i < US_MXFP4_GROUP / 2; i++)
    codes[at * (US_MXFP4_GROUP / 2) + i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
}

/* One block of threads a 128 x 128 block (less at the edges): the values are made twice, for the scale and for the codes. */
static __global__ void make_fp8(const struct us_init *inits, uint32_t rows, uint32_t cols, uint32_t chunk,
                                uint8_t *codes, float *scales) {
  __shared__ uint32_t largest;
  uint32_t scale_cols = (cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK,
           per_chunk = (chunk + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  uint32_t scale_row = blockIdx.x / scale_cols, col0 = blockIdx.x % scale_cols * US_FP8_BLOCK;
  uint32_t start = scale_row / per_chunk * chunk, row0 = start + scale_row % per_chunk * US_FP8_BLOCK;
  uint32_t row_end = row0 + US_FP8_BLOCK < start + chunk ? row0 + US_FP8_BLOCK : start + chunk;
  uint32_t col_end = col0 + US_FP8_BLOCK < cols ? col0 + US_FP8_BLOCK : cols;
  if (row_end > rows) row_end = rows;
  struct us_init init = inits[blockIdx.y];
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  uint32_t quads = (col_end - col0) / 4, total = (row_end - row0) * quads;
  float values[4];
  for (uint32_t i = threadIdx.x; i < total; i += blockDim.x) {
    us_init_quad(&init, row0 + i / quads, col0 / 4 + i % quads, values);
    for (int j = 0; j < 4; j++) atomicMax(&largest, us_f32_bits(values[j]) & 0x7fffffffu);
  }
  __syncthreads();
  float scale = us_fp8_block_scale(us_f32_from_bits(largest), US_FP8_SCALE_F32);
  if (threadIdx.x == 0) scales[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = scale;
  for (uint32_t i = threadIdx.x; i < total; i += blockDim.x) {
    uint32_t row = row0 + i / quads, col = col0 + i % quads * 4;
    us_init_quad(&init, row, col / 4, values);
    for (uint32_t j = 0; j < 4; j++)
      codes[((size_t)blockIdx.y * rows + row) * cols + col + j] = us_fp8_from_f32(values[j] / scale);
  }
}

/* BF16 and F32: one thread a quad. */
static __global__ void make_plain(const struct us_init *inits, uint32_t rows, uint32_t cols, bool bf16,
                                  void *data) {
  uint32_t quads = cols / 4, index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= rows * quads) return;
  size_t at = ((size_t)blockIdx.y * rows * quads + index) * 4;
  struct us_init init = inits[blockIdx.y];
  float values[4];
  us_init_quad(&init, index / quads, index % quads, values);
  for (int j = 0; j < 4; j++)
    if (bf16)
      ((uint16_t *)data)[at + j] = us_bf16_from_f32(values[j]);
    else
      ((float *)data)[at + j] = values[j];
}

cudaError_t us_synthetic_gpu(enum us_format format, const struct us_init *inits, uint32_t count,
                             uint32_t rows, uint32_t cols, uint32_t scale_chunk_rows, void *data,
                             void *scales, cudaStream_t stream) {
  uint32_t unit = format == US_FORMAT_MXFP4 ? US_MXFP4_GROUP : 4;
  uint64_t threads = (uint64_t)rows * (cols / unit);
  if (cols % unit || count > 65535 || threads > 0x7fffffffu) return cudaErrorInvalidValue;
  dim3 grid((unsigned)((threads + 127) / 128), count);
  if (!count || !threads) return cudaSuccess;
  if (format == US_FORMAT_MXFP4) {
    make_mxfp4<<<grid, 128, 0, stream>>>(inits, rows, cols, (uint8_t *)data, (uint8_t *)scales);
  } else if (format == US_FORMAT_FP8) {
    uint32_t chunk = scale_chunk_rows ? scale_chunk_rows : rows;
    grid.x =
        (unsigned)(us_fp8_scale_rows(rows, scale_chunk_rows) * ((cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK));
    make_fp8<<<grid, 256, 0, stream>>>(inits, rows, cols, chunk, (uint8_t *)data, (float *)scales);
  } else {
    make_plain<<<grid, 128, 0, stream>>>(inits, rows, cols, format == US_FORMAT_BF16, data);
  }
  return cudaGetLastError();
}
