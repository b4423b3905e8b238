/* synthetic.cu: random weights, made and encoded on the device by the CPU's own inline functions. Bound: 10 Philox rounds a
 * quad and the encoder's comparisons; a rank's share of a model of 500 GB takes seconds. */
#include "formats/mxfp4_group.h"
#include "kernels/pages/pages_gpu.h"

/* One thread a group of 32. */
static __global__ void make_mxfp4(struct us_synthetic s, const struct us_init *inits, uint8_t *codes,
                                  uint8_t *scales) {
  uint32_t groups = s.window_cols / US_MXFP4_GROUP, index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= s.window_rows * groups) return;
  uint32_t row = s.first_row + index / groups, group = s.first_col / US_MXFP4_GROUP + index % groups;
  struct us_init init = inits[blockIdx.y];
  float values[US_MXFP4_GROUP];
  uint32_t code[US_MXFP4_GROUP], word[4] = {0, 0, 0, 0};
  for (uint32_t q = 0; q < 8; q++) us_init_quad(&init, row, group * 8 + q, values + 4 * q);
  scales[blockIdx.y * s.scale_stride + index] =
      us_mxfp4_group_encode(values, us_mxfp4_group_max(values), US_SCALE_MSE, code);
  for (int i = 0; i < US_MXFP4_GROUP; i++) word[i / 8] |= code[i] << 4 * (i % 8);
  ((uint4 *)(codes + blockIdx.y * s.data_stride))[index] = make_uint4(word[0], word[1], word[2], word[3]);
}

/* A block of 128 x 128 (less at the edges) of a tensor that the window touches. */
struct fp8_block {
  uint32_t row, row_end, col, col_end; /* in the tensor */
};

/* The tensor, as far as us_matrix_scale_row asks. */
static __host__ __device__ struct us_matrix fp8_grid(const struct us_synthetic *s) {
  struct us_matrix w = {US_FORMAT_FP8, s->rows, s->cols, NULL, NULL, s->scale_chunk_rows};
  return w;
}

/* Scale rows that the window touches times columns of blocks. */
static uint32_t fp8_blocks(const struct us_synthetic *s) {
  struct us_matrix w = fp8_grid(s);
  size_t first = us_matrix_scale_row(&w, s->first_row);
  size_t last = us_matrix_scale_row(&w, s->first_row + s->window_rows - 1);
  return (uint32_t)(last - first + 1) * ((s->window_cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK);
}

static __device__ struct fp8_block fp8_block_at(const struct us_synthetic *s, uint32_t index) {
  struct us_matrix w = fp8_grid(s);
  uint32_t across = (s->window_cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  uint32_t chunk = s->scale_chunk_rows ? s->scale_chunk_rows : s->rows;
  uint32_t per_chunk = (chunk + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  uint32_t scale_row = (uint32_t)us_matrix_scale_row(&w, s->first_row) + index / across;
  uint32_t start = scale_row / per_chunk * chunk;
  struct fp8_block b;
  b.row = start + scale_row % per_chunk * US_FP8_BLOCK, b.col = s->first_col + index % across * US_FP8_BLOCK;
  b.row_end = min(min(b.row + US_FP8_BLOCK, start + chunk), s->rows);
  b.col_end = min(b.col + US_FP8_BLOCK, s->cols);
  return b;
}

/* One block of threads an FP8 block: the values are made twice, whole for the scale, the window's for the codes. */
static __global__ void make_fp8(struct us_synthetic s, const struct us_init *inits, uint8_t *codes,
                                uint8_t *scales) {
  __shared__ uint32_t largest;
  struct fp8_block b = fp8_block_at(&s, blockIdx.x);
  struct us_init init = inits[blockIdx.y];
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  uint32_t quads = (b.col_end - b.col) / 4;
  float values[4];
  for (uint32_t i = threadIdx.x; i < (b.row_end - b.row) * quads; i += blockDim.x) {
    us_init_quad(&init, b.row + i / quads, b.col / 4 + i % quads, values);
    for (int j = 0; j < 4; j++) atomicMax(&largest, us_f32_bits(values[j]) & 0x7fffffffu);
  }
  __syncthreads();
  float scale = us_fp8_block_scale(us_f32_from_bits(largest), US_FP8_SCALE_F32);
  b.row = max(b.row, s.first_row), b.row_end = min(b.row_end, s.first_row + s.window_rows);
  b.col_end = min(b.col_end, s.first_col + s.window_cols), quads = (b.col_end - b.col) / 4;
  uint32_t across = (s.window_cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  float *window_scales = (float *)(scales + blockIdx.y * s.scale_stride);
  for (uint32_t i = threadIdx.x; i < (b.row_end - b.row) * quads; i += blockDim.x) {
    uint32_t row = b.row + i / quads - s.first_row, col = b.col + i % quads * 4 - s.first_col;
    us_init_quad(&init, s.first_row + row, (s.first_col + col) / 4, values);
    for (uint32_t j = 0; j < 4; j++)
      codes[blockIdx.y * s.data_stride + (size_t)row * s.window_cols + col + j] =
          us_fp8_from_f32(values[j] / scale);
    if (i % quads == 0 && row % s.scale_rows == 0)
      window_scales[row / s.scale_rows * across + col / US_FP8_BLOCK] = scale;
  }
}

/* BF16 and F32: one thread a quad. */
static __global__ void make_plain(struct us_synthetic s, const struct us_init *inits, uint8_t *data) {
  uint32_t quads = s.window_cols / 4, index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= s.window_rows * quads) return;
  size_t at = (size_t)index * 4;
  struct us_init init = inits[blockIdx.y];
  float values[4];
  us_init_quad(&init, s.first_row + index / quads, s.first_col / 4 + index % quads, values);
  data += blockIdx.y * s.data_stride;
  for (int j = 0; j < 4; j++)
    if (s.format == US_FORMAT_BF16)
      ((uint16_t *)data)[at + j] = us_bf16_from_f32(values[j]);
    else
      ((float *)data)[at + j] = values[j];
}

/* What a thread of MXFP4, FP8 and the others makes, and so what windows are cut at. */
static bool aligned(const struct us_synthetic *s) {
  uint32_t unit = s->format == US_FORMAT_MXFP4 ? US_MXFP4_GROUP : 4;
  uint32_t start = s->format == US_FORMAT_FP8 ? US_FP8_BLOCK : unit;
  return s->cols % unit == 0 && s->window_cols % unit == 0 && s->first_col % start == 0 &&
         (uint64_t)s->first_row + s->window_rows <= s->rows &&
         (uint64_t)s->first_col + s->window_cols <= s->cols;
}

cudaError_t us_synthetic_window_gpu(const struct us_synthetic *s, const struct us_init *inits, uint32_t count,
                                    void *data, void *scales, cudaStream_t stream) {
  uint32_t unit = s->format == US_FORMAT_MXFP4 ? US_MXFP4_GROUP : 4;
  uint64_t threads = (uint64_t)s->window_rows * (s->window_cols / unit);
  if (!aligned(s) || count > 65535 || threads > 0x7fffffffu) return cudaErrorInvalidValue;
  dim3 grid((unsigned)((threads + 127) / 128), count);
  if (!count || !threads) return cudaSuccess;
  if (s->format == US_FORMAT_MXFP4)
    make_mxfp4<<<grid, 128, 0, stream>>>(*s, inits, (uint8_t *)data, (uint8_t *)scales);
  else if (s->format == US_FORMAT_FP8)
    make_fp8<<<dim3(fp8_blocks(s), count), 256, 0, stream>>>(*s, inits, (uint8_t *)data, (uint8_t *)scales);
  else
    make_plain<<<grid, 128, 0, stream>>>(*s, inits, (uint8_t *)data);
  return cudaGetLastError();
}

/* FP8: the tensor's own grid is a window a chunk, so that a scale for every 128 rows restarts with it. */
cudaError_t us_synthetic_gpu(enum us_format format, const struct us_init *inits, uint32_t count,
                             uint32_t rows, uint32_t cols, uint32_t scale_chunk_rows, void *data,
                             void *scales, cudaStream_t stream) {
  bool fp8 = format == US_FORMAT_FP8;
  uint32_t chunk = fp8 && scale_chunk_rows ? scale_chunk_rows : rows;
  uint64_t unit = format == US_FORMAT_F32    ? 8
                  : format == US_FORMAT_BF16 ? 4
                  : fp8                      ? 2
                                             : 1; /* half bytes a weight */
  uint64_t scale_cols = (cols + US_FP8_BLOCK - 1) / US_FP8_BLOCK;
  struct us_synthetic s = {format, rows, cols, scale_chunk_rows, 0, 0, 0, cols, US_FP8_BLOCK, 0, 0};
  s.data_stride = (uint64_t)rows * cols * unit / 2;
  s.scale_stride =
      fp8 ? us_fp8_scale_rows(rows, scale_chunk_rows) * scale_cols * 4 : (uint64_t)rows * cols / 32;
  for (; s.first_row < rows; s.first_row += chunk) {
    s.window_rows = rows - s.first_row < chunk ? rows - s.first_row : chunk;
    uint64_t scale_row = us_fp8_scale_rows(s.first_row, scale_chunk_rows);
    cudaError_t error =
        us_synthetic_window_gpu(&s, inits, count, (uint8_t *)data + (uint64_t)s.first_row * cols * unit / 2,
                                (float *)scales + (fp8 ? scale_row * scale_cols : 0), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
