/* gptq_train.cu: GPTQ for all matrices of a part of a layer at once.
 *
 * Factor, solve and aims are right- or left-looking over panels of 32 columns: a small kernel does what is sequential, cuBLAS the
 * rest, in FP32. Matrices of 64 experts of mini (1,024 inputs, 768 rows) are some 0.4 T operations a layer.
 *
 * Contents: inputs; memory; order; factor; correction; aims.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/optim/gptq_train.h"

#include "formats/fp8.h"
#include "formats/matrix.h"
#include "formats/mxfp4.h"
#include <cublas_v2.h>

#define THREADS 256
#define PANEL   32    /* columns at a time */
#define ROWS    128   /* rows, a thread each, of a block that walks a panel */
#define DAMPING 0.01f /* as training/gptq.c */

static unsigned blocks_for(uint64_t n, uint32_t each) {
  return (unsigned)((n + each - 1) / each);
}

/* --- inputs --- */

static __global__ void __launch_bounds__(THREADS)
    lose_inputs(const __grid_constant__ struct us_gptq_train_inputs in) {
  uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
  uint32_t row = (uint32_t)(i / (in.cols / 4)), col = (uint32_t)(i % (in.cols / 4)) * 4;
  if (row >= in.rows) return;
  uint64_t source = (uint64_t)(in.opt_row ? in.opt_row[row] : row) * in.cols + col,
           place = (uint64_t)row * in.cols + col;
  float w = in.opt_pair ? in.opt_weight[in.opt_pair[row]] : 1.0f;
  struct us_four from = us_load_four(in.from + source), to = us_load_four(in.to + source);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    to.v[j] = us_bf16_round(w * to.v[j]);
    from.v[j] = w * from.v[j] - to.v[j];
  }
  us_store_four(in.x + place, to);
  us_store_four(in.lost + place, from);
}

int us_gptq_train_inputs(const struct us_gptq_train_inputs *inputs, cudaStream_t stream) {
  if (!inputs->cols || inputs->cols % 8) return cudaErrorInvalidValue;
  uint64_t n = (uint64_t)inputs->rows * (inputs->cols / 4);
  if (n) lose_inputs<<<blocks_for(n, THREADS), THREADS, 0, stream>>>(*inputs);
  return cudaGetLastError();
}

static __global__ void __launch_bounds__(THREADS)
    lose_stream(const __grid_constant__ struct us_gptq_train_stream s) {
  uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
  uint32_t row = (uint32_t)(i / (s.cols / 4)), col = (uint32_t)(i % (s.cols / 4)) * 4;
  if (row >= s.rows) return;
  uint64_t source = (uint64_t)(s.opt_row ? s.opt_row[row] : row) * s.cols + col;
  struct us_four from = us_load_four(s.from + source), to = us_load_four(s.to + source);
#pragma unroll
  for (int j = 0; j < 4; j++) from.v[j] = s.share * (from.v[j] - to.v[j]);
  us_store_four(s.lost + (uint64_t)row * s.cols + col, from);
}

int us_gptq_train_stream(const struct us_gptq_train_stream *lost, cudaStream_t stream) {
  if (!lost->cols || lost->cols % 8) return cudaErrorInvalidValue;
  uint64_t n = (uint64_t)lost->rows * (lost->cols / 4);
  if (n) lose_stream<<<blocks_for(n, THREADS), THREADS, 0, stream>>>(*lost);
  return cudaGetLastError();
}

/* --- memory --- */

/* What factor, correct and round have in the scratch, one after another: the first has a damping for each group before it. */
struct buffers {
  float *damping; /* (groups) */
  float *square;  /* (groups, K, K) factor: moments in their order */
  float *rows[2]; /* (groups, N, K) each */
  float *errors;  /* (groups, N, PANEL) */
};

static size_t rounded_up(size_t n) {
  return (n + 63) / 64 * 64;
}

static struct buffers buffers_of(const struct us_gptq_train *g) {
  size_t rows = rounded_up((size_t)g->groups * g->N * g->K);
  float *from = g->scratch + rounded_up(g->groups);
  return {g->scratch, from, {from, from + rows}, from + 2 * rows};
}

size_t us_gptq_train_scratch(uint32_t groups, uint32_t N, uint32_t K) {
  size_t square = (size_t)groups * K * K,
         rows = 2 * rounded_up((size_t)groups * N * K) + (size_t)groups * N * PANEL;
  return rounded_up(groups) + (square > rows ? square : rows);
}

static bool is_valid(const struct us_gptq_train *g) {
  return g->groups && g->groups <= 65535 && g->N && g->N % 8 == 0 && g->K && g->K % 8 == 0 &&
         g->stride % 8 == 0;
}

/* D = alpha op(A) op(B) + beta D of every group, as cuBLAS counts: column-major. */
struct product {
  bool transpose_a;
  uint32_t m, n, k;
  float alpha, beta;
  const float *a, *b;
  float *d;
  uint32_t lda, ldb, ldd;
  uint64_t stride_a, stride_b, stride_d;
};

static int multiply(const struct us_gptq_train *g, const struct product &p) {
  if (!p.m || !p.n) return cudaSuccess;
  cublasStatus_t status = cublasSgemmStridedBatched(
      g->cublas, p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, (int)p.m, (int)p.n, (int)p.k,
      &p.alpha, p.a, (int)p.lda, (long long)p.stride_a, p.b, (int)p.ldb, (long long)p.stride_b, &p.beta, p.d,
      (int)p.ldd, (long long)p.stride_d, (int)g->groups);
  return status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}

/* --- order --- */

/* A column's place is how many columns have less moment, or as much and a lower index. */
static __global__ void __launch_bounds__(THREADS) order(const __grid_constant__ struct us_gptq_train g,
                                                        float *damping) {
  extern __shared__ float moment[]; /* (K) */
  __shared__ double warps[THREADS / 32];
  const float *h = g.moments + (uint64_t)blockIdx.x * g.K * g.K;
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < g.K; i += THREADS) {
    moment[i] = h[(uint64_t)i * g.K + i];
    sum += (double)moment[i];
  }
  sum = us_block_sum<THREADS>(sum, warps); /* also: all moments are there */
  for (uint32_t i = threadIdx.x; i < g.K; i += THREADS) {
    uint32_t place = 0;
    for (uint32_t j = 0; j < g.K; j++)
      place += moment[j] < moment[i] || (moment[j] == moment[i] && j < i) ? 1 : 0;
    g.at[(uint64_t)blockIdx.x * g.K + place] = i;
  }
  if (threadIdx.x == 0) damping[blockIdx.x] = DAMPING * (float)(sum / g.K) + 1e-20f;
}

/* Block (row, group): the moments in their order, damped. */
static __global__ void __launch_bounds__(THREADS)
    permute_moments(const __grid_constant__ struct us_gptq_train g, const float *damping, float *square) {
  const uint32_t *at = g.at + (uint64_t)blockIdx.y * g.K;
  const float *h = g.moments + (uint64_t)blockIdx.y * g.K * g.K + (uint64_t)at[blockIdx.x] * g.K;
  float *to = square + (uint64_t)blockIdx.y * g.K * g.K + (uint64_t)blockIdx.x * g.K;
  for (uint32_t j = threadIdx.x; j < g.K; j += THREADS)
    to[j] = h[at[j]] + (j == blockIdx.x ? damping[blockIdx.y] : 0.0f);
}

/* --- factor --- */

/* The diagonal block of a panel, a warp a group: lane r has row r, columns are finished from the left. */
static __global__ void __launch_bounds__(32)
    factor_diagonal(float *square, uint32_t K, uint32_t first, uint32_t width, const float *damping) {
  __shared__ float a[PANEL][PANEL + 1];
  float *from = square + (uint64_t)blockIdx.x * K * K + (uint64_t)first * K + first,
        least = 0.25f * damping[blockIdx.x];
  uint32_t lane = threadIdx.x;
  for (uint32_t r = 0; r < width; r++)
    if (lane < width) a[r][lane] = from[(uint64_t)r * K + lane];
  __syncwarp();
  for (uint32_t j = 0; j < width; j++) {
    float root = sqrtf(fmaxf(a[j][j], least)), mine = a[lane][j];
    __syncwarp();
    if (lane == j) mine = root;
    if (lane > j && lane < width) mine /= root;
    a[lane][j] = mine;
    __syncwarp();
    for (uint32_t c = j + 1; c < width; c++)
      if (lane >= c && lane < width) a[lane][c] -= mine * a[c][j];
    __syncwarp();
  }
  for (uint32_t r = 0; r < width; r++)
    if (lane <= r) from[(uint64_t)r * K + lane] = a[r][lane];
}

/* Rows below the diagonal block, a thread each: x L^T = row. */
static __global__ void __launch_bounds__(ROWS)
    factor_panel(float *square, uint32_t K, uint32_t first, uint32_t width) {
  __shared__ float l[PANEL][PANEL + 1];
  float *base = square + (uint64_t)blockIdx.y * K * K;
  for (uint32_t i = threadIdx.x; i < width * width; i += ROWS)
    l[i / width][i % width] = base[(uint64_t)(first + i / width) * K + first + i % width];
  __syncthreads();
  uint32_t row = first + width + blockIdx.x * ROWS + threadIdx.x;
  if (row >= K) return;
  float *to = base + (uint64_t)row * K + first, x[PANEL];
#pragma unroll
  for (uint32_t j = 0; j < PANEL; j++) {
    if (j >= width) break;
    float sum = to[j];
#pragma unroll
    for (uint32_t k = 0; k < j; k++) sum -= x[k] * l[j][k];
    to[j] = x[j] = sum / l[j][j];
  }
}

/* Block (row, group): L, and zeros beyond its diagonal. */
static __global__ void __launch_bounds__(THREADS)
    keep_factor(const __grid_constant__ struct us_gptq_train g, const float *square) {
  uint64_t from = ((uint64_t)blockIdx.y * g.K + blockIdx.x) * g.K;
  for (uint32_t j = threadIdx.x; j < g.K; j += THREADS)
    g.moments[from + j] = j <= blockIdx.x ? square[from + j] : 0.0f;
}

int us_gptq_train_factor(const struct us_gptq_train *gptq, cudaStream_t stream) {
  struct buffers b = buffers_of(gptq);
  uint32_t K = gptq->K, groups = gptq->groups;
  if (!is_valid(gptq) || K * sizeof(float) > 96 * 1024) return cudaErrorInvalidValue;
  int code = cudaFuncSetAttribute(order, cudaFuncAttributeMaxDynamicSharedMemorySize, 96 * 1024);
  if (code) return code;
  order<<<groups, THREADS, K * sizeof(float), stream>>>(*gptq, b.damping);
  permute_moments<<<dim3(K, groups), THREADS, 0, stream>>>(*gptq, b.damping, b.square);
  for (uint32_t first = 0; first < K && !code; first += PANEL) {
    uint32_t width = K - first < PANEL ? K - first : PANEL, below = K - first - width;
    const float *panel = b.square + (uint64_t)(first + width) * K + first;
    factor_diagonal<<<groups, 32, 0, stream>>>(b.square, K, first, width, b.damping);
    if (below)
      factor_panel<<<dim3(blocks_for(below, ROWS), groups), ROWS, 0, stream>>>(b.square, K, first, width);
    uint64_t square = (uint64_t)K * K;
    code = multiply(gptq, {true, below, below, width, -1.0f, 1.0f, panel, panel,
                           b.square + (uint64_t)(first + width) * (K + 1), K, K, K, square, square, square});
  }
  keep_factor<<<dim3(K, groups), THREADS, 0, stream>>>(*gptq, b.square);
  return code ? code : cudaGetLastError();
}

/* --- correction --- */

static __device__ __forceinline__ bool is_rounded(uint8_t format) {
  return format == US_FORMAT_MXFP4 || format == US_FORMAT_FP8;
}

/* Block (row, group): to = from in the factor's order, and what is made up for. */
static __global__ void __launch_bounds__(THREADS)
    permute_changes(const __grid_constant__ struct us_gptq_train g, float of_stream, const float *from,
                    float *to) {
  const uint32_t *at = g.at + (uint64_t)blockIdx.y * g.K;
  uint64_t row = ((uint64_t)blockIdx.y * g.N + blockIdx.x) * g.K;
  for (uint32_t i = threadIdx.x; i < g.K; i += THREADS) {
    float made_up = g.opt_made_up ? of_stream * g.opt_made_up[row + at[i]] : 0.0f;
    to[row + i] = from[row + at[i]] + made_up;
  }
}

static __global__ void __launch_bounds__(THREADS)
    add_changes(const __grid_constant__ struct us_gptq_train g, const float *changes) {
  const uint32_t *at = g.at + (uint64_t)blockIdx.y * g.K;
  uint64_t row = (uint64_t)blockIdx.y * g.N + blockIdx.x;
  if (!is_rounded(g.format[row])) return;
  float *value = g.value + blockIdx.y * g.stride + (uint64_t)blockIdx.x * g.K;
  for (uint32_t i = threadIdx.x; i < g.K; i += THREADS) value[at[i]] += changes[row * g.K + i];
}

/* L z^T = rows^T, then L^T x^T = z^T; in cuBLAS' columns L is an upper triangle, transposed. */
static int solve(const struct us_gptq_train *g, float *rows) {
  const float one = 1.0f;
  const cublasOperation_t sides[2] = {CUBLAS_OP_T, CUBLAS_OP_N};
  for (uint32_t i = 0; i < g->groups; i++)
    for (int side = 0; side < 2; side++)
      if (cublasStrsm(g->cublas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, sides[side], CUBLAS_DIAG_NON_UNIT,
                      (int)g->K, (int)g->N, &one, g->moments + (size_t)i * g->K * g->K, (int)g->K,
                      rows + (size_t)i * g->N * g->K, (int)g->K) != CUBLAS_STATUS_SUCCESS)
        return cudaErrorUnknown;
  return cudaSuccess;
}

int us_gptq_train_correct(const struct us_gptq_train *gptq, float of_inputs, float of_stream,
                          cudaStream_t stream) {
  struct buffers b = buffers_of(gptq);
  uint32_t K = gptq->K, N = gptq->N;
  dim3 every_row(N, gptq->groups);
  if (!is_valid(gptq)) return cudaErrorInvalidValue;
  int code = multiply(gptq, {false, K, N, K, of_inputs, 0.0f, gptq->crossed, gptq->value, b.rows[0], K, K, K,
                             (uint64_t)K * K, gptq->stride, (uint64_t)N * K});
  permute_changes<<<every_row, THREADS, 0, stream>>>(*gptq, of_stream, b.rows[0], b.rows[1]);
  if (!code) code = solve(gptq, b.rows[1]);
  add_changes<<<every_row, THREADS, 0, stream>>>(*gptq, b.rows[1]);
  return code ? code : cudaGetLastError();
}

/* --- aims --- */

/* Block (row, group): the matrices' columns in the factor's order. */
static __global__ void __launch_bounds__(THREADS)
    permute_rows(const __grid_constant__ struct us_gptq_train g, float *to) {
  const uint32_t *at = g.at + (uint64_t)blockIdx.y * g.K;
  const float *value = g.value + blockIdx.y * g.stride + (uint64_t)blockIdx.x * g.K;
  uint64_t row = ((uint64_t)blockIdx.y * g.N + blockIdx.x) * g.K;
  for (uint32_t i = threadIdx.x; i < g.K; i += THREADS) to[row + i] = value[at[i]];
}

static __device__ __forceinline__ float nearest(uint8_t format, float x, float scale) {
  if (format == US_FORMAT_MXFP4) return us_e2m1_to_f32(us_e2m1_from_f32(x / scale)) * scale;
  return us_fp8_to_f32(us_fp8_from_f32(x / scale)) * scale;
}

/* Columns [first, first + width) of ROWS rows, a thread each, from the last to the first. lost: what the columns behind them passed on;
 * errors: theirs, for those before them. */
static __global__ void __launch_bounds__(ROWS)
    round_panel(const __grid_constant__ struct us_gptq_train g, uint32_t first, uint32_t width,
                const float *values, const float *lost, float *errors) {
  __shared__ float l[PANEL][PANEL + 1];
  __shared__ uint32_t at[PANEL];
  const float *L = g.moments + (uint64_t)blockIdx.y * g.K * g.K;
  for (uint32_t i = threadIdx.x; i < PANEL * PANEL; i += ROWS) {
    uint32_t r = i / PANEL, c = i % PANEL;
    l[r][c] = r < width && c < width ? L[(uint64_t)(first + r) * g.K + first + c] : 0.0f;
  }
  if (threadIdx.x < width) at[threadIdx.x] = g.at[(uint64_t)blockIdx.y * g.K + first + threadIdx.x];
  __syncthreads();
  uint32_t n = blockIdx.x * ROWS + threadIdx.x;
  if (n >= g.N) return;
  uint64_t row = (uint64_t)blockIdx.y * g.N + n, in_arena = blockIdx.y * g.stride + (uint64_t)n * g.K;
  uint8_t format = g.format[row];
  bool rounded = is_rounded(format);
  float largest = format == US_FORMAT_MXFP4 ? 6.0f : US_FP8_MAX, error[PANEL];
#pragma unroll
  for (int i = PANEL - 1; i >= 0; i--) {
    error[i] = 0.0f;
    if (i >= (int)width || !rounded) continue;
    float passed = lost[row * g.K + first + i], value = values[row * g.K + first + i];
#pragma unroll
    for (int k = PANEL - 1; k > i; k--) passed += l[k][i] * error[k];
    float scale = g.scale[(in_arena + at[i]) / 8], aim = value + passed / l[i][i];
    error[i] = value - nearest(format, aim, scale);
    g.value[in_arena + at[i]] = fminf(fmaxf(aim, -largest * scale), largest * scale);
  }
#pragma unroll
  for (int i = 0; i < PANEL; i++) errors[row * PANEL + i] = error[i];
}

int us_gptq_train_round(const struct us_gptq_train *gptq, cudaStream_t stream) {
  struct buffers b = buffers_of(gptq);
  uint32_t K = gptq->K, N = gptq->N, groups = gptq->groups;
  uint64_t all = (uint64_t)groups * N * K, rows = (uint64_t)N * K, square = (uint64_t)K * K;
  if (!is_valid(gptq)) return cudaErrorInvalidValue;
  permute_rows<<<dim3(N, groups), THREADS, 0, stream>>>(*gptq, b.rows[0]);
  int code = cudaMemsetAsync(b.rows[1], 0, all * sizeof(float), stream);
  for (uint32_t end = K; end && !code;) {
    uint32_t width = end % PANEL ? end % PANEL : PANEL, first = end - width;
    round_panel<<<dim3(blocks_for(N, ROWS), groups), ROWS, 0, stream>>>(*gptq, first, width, b.rows[0],
                                                                        b.rows[1], b.errors);
    code = multiply(gptq,
                    {false, first, N, width, 1.0f, 1.0f, gptq->moments + (uint64_t)first * K, b.errors,
                     b.rows[1], K, PANEL, K, square, (uint64_t)N * PANEL, rows});
    end = first;
  }
  return code ? code : cudaGetLastError();
}
