/* muon_train.cu: orthogonalised momentum for batches of equal matrices (Jordan 2024; Polar Express: arXiv 2505.16932).
 *
 * Contents: rows of a tensor; momentum; normalisation; update; products; entry points.
 *
 * A batch goes through: momentum and the update's norm (12 bytes a value), the update over its norm in bf16 (10), five steps of
 * three products, the master's update (10). With m = min(rows, cols), n = max: s = x x^T, t = b s + c s s, x = a x + t x, or the
 * mirrored products for tall matrices, so nothing is transposed in memory: 2 m m (2 n + m) operations a step. s and t are
 * symmetric. x alternates between two buffers because cublasLt adds C into another D.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/optim/muon_train.h"
#include <cmath>
#include <cublasLt.h>
#include <cublas_v2.h>

#define THREADS   256
#define SLICES    32                 /* blocks of a matrix, and partial sums of its norm */
#define WORKSPACE ((size_t)32 << 20) /* cuBLAS asks for as much on Hopper */

/* The same tables as training/muon.c. */
static const float newton_schulz[5][3] = {{3.4445f, -4.7750f, 2.0315f},
                                          {3.4445f, -4.7750f, 2.0315f},
                                          {3.4445f, -4.7750f, 2.0315f},
                                          {3.4445f, -4.7750f, 2.0315f},
                                          {3.4445f, -4.7750f, 2.0315f}};
static const float polar_express[5][3] = {
    {8.156554524902461f, -22.48329292557795f, 15.878769915207462f},
    {4.042929935166739f, -2.808917465908714f, 0.5000178451051316f},
    {3.8916678022926607f, -2.772484153217685f, 0.5060648178503393f},
    {3.285753657755655f, -2.3681294933425376f, 0.46449024233003106f},
    {2.3465413258596377f, -1.7097828382687081f, 0.42323551169305323f},
};

/* --- rows of a tensor --- */

struct batch_args {
  struct us_muon_train m;
  double *partial; /* (batch, SLICES) sums of squares */
  uint16_t *x;     /* (batch, rows, cols) */
  uint32_t a_row;  /* pieces of 4 values a row */
  uint32_t pieces; /* of a matrix */
};

/* Arena index of the matrix's piece i. */
static __device__ __forceinline__ uint64_t piece_place(const struct batch_args &b,
                                                       const struct us_muon_matrix &m, uint32_t i) {
  uint32_t row = i / b.a_row, column = i % b.a_row * 4;
  uint64_t in_tensor = (uint64_t)(row / m.run) * m.step + m.first + row % m.run;
  return m.offset + in_tensor * b.m.cols + column;
}

/* The step that is orthogonalised, from the new momentum. */
static __device__ __forceinline__ float muon_step(const struct batch_args &b, float g, float moment) {
  return b.m.nesterov ? g + (float)b.m.momentum * moment : moment;
}

/* --- momentum --- */

static __global__ void __launch_bounds__(THREADS) add_momentum(const __grid_constant__ struct batch_args b) {
  __shared__ double warps[THREADS / 32];
  struct us_muon_matrix matrix = b.m.matrices[blockIdx.y];
  float mu = (float)b.m.momentum, factor = b.m.opt_factor ? *b.m.opt_factor : 1.0f;
  double sum = 0.0;
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < b.pieces; i += SLICES * THREADS) {
    uint64_t at = piece_place(b, matrix, i);
    struct us_four g = us_load_four(b.m.grad + at), moment = us_load_four(b.m.moment + at);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      g.v[j] *= factor;
      moment.v[j] = mu * moment.v[j] + g.v[j];
      double u = (double)muon_step(b, g.v[j], moment.v[j]);
      sum = fma(u, u, sum);
    }
    us_store_four(b.m.moment + at, moment);
  }
  sum = us_block_sum<THREADS>(sum, warps);
  if (threadIdx.x == 0) b.partial[blockIdx.y * SLICES + blockIdx.x] = sum;
}

/* --- normalisation --- */

static __global__ void __launch_bounds__(THREADS) normalise(const __grid_constant__ struct batch_args b) {
  struct us_muon_matrix matrix = b.m.matrices[blockIdx.y];
  double norm = sqrt(us_warp_sum(b.partial[blockIdx.y * SLICES + threadIdx.x % 32]));
  double divisor = b.m.newton == US_MUON_POLAR_EXPRESS ? 1.02 * norm + 1e-6 : norm + 1e-7;
  float inverse = (float)(1.0 / divisor), factor = b.m.opt_factor ? *b.m.opt_factor : 1.0f;
  uint16_t *x = b.x + blockIdx.y * b.m.rows * b.m.cols;
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < b.pieces; i += SLICES * THREADS) {
    uint64_t at = piece_place(b, matrix, i);
    struct us_four g = us_load_four(b.m.grad + at), moment = us_load_four(b.m.moment + at);
#pragma unroll
    for (int j = 0; j < 4; j++) g.v[j] = muon_step(b, g.v[j] * factor, moment.v[j]) * inverse;
    us_store_four(x + (size_t)i * 4, g);
  }
}

/* --- update --- */

static __global__ void __launch_bounds__(THREADS) update_values(const __grid_constant__ struct batch_args b) {
  struct us_muon_matrix matrix = b.m.matrices[blockIdx.y];
  double rate = b.m.rate * (double)matrix.rate_scale, wide = (double)max(b.m.rows, b.m.cols);
  float keep = (float)(1.0 - rate * b.m.decay), scale = (float)(rate * 0.2 * sqrt(wide));
  const uint16_t *x = b.x + blockIdx.y * b.m.rows * b.m.cols;
  for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < b.pieces; i += SLICES * THREADS) {
    uint64_t at = piece_place(b, matrix, i);
    struct us_four value = us_load_four(b.m.value + at), step = us_load_four(x + (size_t)i * 4);
#pragma unroll
    for (int j = 0; j < 4; j++) value.v[j] = value.v[j] * keep - scale * step.v[j];
    us_store_four(b.m.value + at, value);
  }
}

/* --- products --- */

/* D (m, n) = alpha op(A) op(B) + beta C, column-major as cuBLAS counts, C as D; batches packed. */
struct product {
  cublasLtMatmulDesc_t operation;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulAlgo_t algorithm;
};

static void release_product(struct product *p) {
  if (p->operation) cublasLtMatmulDescDestroy(p->operation);
  if (p->a) cublasLtMatrixLayoutDestroy(p->a);
  if (p->b) cublasLtMatrixLayoutDestroy(p->b);
  if (p->d) cublasLtMatrixLayoutDestroy(p->d);
}

/* Layout of `count` packed bf16 matrices of height x width values. */
static bool new_layout(cublasLtMatrixLayout_t *layout, size_t height, size_t width, size_t count) {
  int32_t batch = (int32_t)count;
  int64_t stride = (int64_t)(height * width);
  return !cublasLtMatrixLayoutCreate(layout, CUDA_R_16BF, height, width, (int64_t)height) &&
         !cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
                                           sizeof batch) &&
         !cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                           sizeof stride);
}

static bool choose_algorithm(cublasLtHandle_t handle, struct product *p) {
  cublasLtMatmulPreference_t preference = NULL;
  cublasLtMatmulHeuristicResult_t found;
  size_t workspace = WORKSPACE;
  int count = 0;
  if (cublasLtMatmulPreferenceCreate(&preference)) return false;
  bool ok = !cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                  &workspace, sizeof workspace) &&
            !cublasLtMatmulAlgoGetHeuristic(handle, p->operation, p->a, p->b, p->d, p->d, preference, 1,
                                            &found, &count) &&
            count == 1;
  if (ok) p->algorithm = found.algo;
  cublasLtMatmulPreferenceDestroy(preference);
  return ok;
}

/* Column-major: a is (ah, aw) as stored, and so on. */
struct product_shape {
  bool transpose_a, transpose_b;
  size_t ah, aw, bh, bw, dh, dw;
};

static bool new_product(cublasLtHandle_t handle, const struct product_shape &s, size_t count,
                        struct product *p) {
  cublasOperation_t a = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                    b = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  return !cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F) &&
         !cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a) &&
         !cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b) &&
         new_layout(&p->a, s.ah, s.aw, count) && new_layout(&p->b, s.bh, s.bw, count) &&
         new_layout(&p->d, s.dh, s.dw, count) && choose_algorithm(handle, p);
}

/* A row-major (rows, cols) matrix is a column-major (cols, rows) one. */
struct products {
  struct product square, polynomial, apply;
};

static bool new_products(cublasLtHandle_t handle, size_t rows, size_t cols, size_t count,
                         struct products *p) {
  bool tall = rows > cols;
  size_t m = tall ? cols : rows;
  struct product_shape square = {!tall, tall, cols, rows, cols, rows, m, m};
  struct product_shape polynomial = {false, false, m, m, m, m, m, m};
  struct product_shape wide_apply = {false, false, cols, rows, m, m, cols, rows};
  struct product_shape tall_apply = {false, false, m, m, cols, rows, cols, rows};
  *p = {};
  return new_product(handle, square, count, &p->square) &&
         new_product(handle, polynomial, count, &p->polynomial) &&
         new_product(handle, tall ? tall_apply : wide_apply, count, &p->apply);
}

static void release_products(struct products *p) {
  release_product(&p->square);
  release_product(&p->polynomial);
  release_product(&p->apply);
}

struct buffers {
  uint16_t *x, *y, *s, *t;
  void *workspace;
};

static bool multiply(cublasLtHandle_t handle, const struct product &p, float alpha, const uint16_t *a,
                     const uint16_t *b, float beta, const uint16_t *c, uint16_t *d, void *workspace,
                     cudaStream_t stream) {
  return !cublasLtMatmul(handle, p.operation, &alpha, a, p.a, b, p.b, &beta, c, p.d, d, p.d, &p.algorithm,
                         workspace, WORKSPACE, stream);
}

/* Five steps; the result is in buffers->x. */
static bool orthogonalise(cublasLtHandle_t handle, const struct products &p, const struct us_muon_train *muon,
                          struct buffers *buffers, cudaStream_t stream) {
  const float(*table)[3] = muon->newton == US_MUON_POLAR_EXPRESS ? polar_express : newton_schulz;
  bool tall = muon->rows > muon->cols;
  for (int step = 0; step < 5; step++) {
    const float *c = table[step];
    struct buffers f = *buffers;
    if (!multiply(handle, p.square, 1.0f, f.x, f.x, 0.0f, f.s, f.s, f.workspace, stream) ||
        !multiply(handle, p.polynomial, c[2], f.s, f.s, c[1], f.s, f.t, f.workspace, stream) ||
        !multiply(handle, p.apply, 1.0f, tall ? f.t : f.x, tall ? f.x : f.t, c[0], f.x, f.y, f.workspace,
                  stream))
      return false;
    buffers->x = f.y;
    buffers->y = f.x;
  }
  return true;
}

/* --- entry points --- */

static size_t padded(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

static size_t narrow(size_t rows, size_t cols) {
  return rows < cols ? rows : cols;
}

size_t us_muon_train_scratch(size_t rows, size_t cols, size_t batch) {
  size_t m = narrow(rows, cols);
  return padded(WORKSPACE) + padded(batch * SLICES * sizeof(double)) + 2 * padded(batch * rows * cols * 2) +
         2 * padded(batch * m * m * 2);
}

static struct buffers cut_scratch(const struct us_muon_train *muon, double **ret_partial) {
  char *at = (char *)muon->scratch;
  size_t m = narrow(muon->rows, muon->cols), wide = padded(muon->batch * muon->rows * muon->cols * 2),
         square = padded(muon->batch * m * m * 2);
  struct buffers b;
  b.workspace = at, at += padded(WORKSPACE);
  *ret_partial = (double *)at, at += padded(muon->batch * SLICES * sizeof(double));
  b.x = (uint16_t *)at, at += wide;
  b.y = (uint16_t *)at, at += wide;
  b.s = (uint16_t *)at, at += square;
  b.t = (uint16_t *)at;
  return b;
}

/* Matrices [first, first + count). */
static bool run_batch(const struct us_muon_train *muon, cublasLtHandle_t handle,
                      const struct products &products, size_t first, size_t count, cudaStream_t stream) {
  struct batch_args b = {*muon, NULL, NULL, (uint32_t)(muon->cols / 4),
                         (uint32_t)(muon->rows * (muon->cols / 4))};
  struct buffers buffers = cut_scratch(muon, &b.partial);
  b.m.matrices += first;
  b.x = buffers.x;
  dim3 grid(SLICES, (unsigned)count);
  add_momentum<<<grid, THREADS, 0, stream>>>(b);
  normalise<<<grid, THREADS, 0, stream>>>(b);
  if (!orthogonalise(handle, products, muon, &buffers, stream)) return false;
  b.x = buffers.x;
  update_values<<<grid, THREADS, 0, stream>>>(b);
  return true;
}

int us_muon_train(const struct us_muon_train *muon, cudaStream_t stream) {
  size_t rows = muon->rows, cols = muon->cols, batch = muon->batch;
  bool wrong = !rows || !cols || rows >= (1u << 30) / cols || cols % 8 || narrow(rows, cols) % 8 || !batch ||
               batch > 65535 || muon->scratch_bytes < us_muon_train_scratch(rows, cols, batch) ||
               (uintptr_t)muon->scratch % 256;
  if (wrong) return cudaErrorInvalidValue;
  cublasLtHandle_t handle =
      (cublasLtHandle_t)muon->cublas; /* documented: a cuBLAS handle is a cublasLt handle */
  struct products products = {};
  size_t prepared = 0; /* matrices the products are for: the last batch may be smaller */
  bool ok = true;
  for (size_t first = 0; ok && first < muon->count; first += batch) {
    size_t count = muon->count - first < batch ? muon->count - first : batch;
    if (count != prepared) {
      release_products(&products);
      ok = new_products(handle, rows, cols, count, &products);
      prepared = count;
    }
    ok = ok && run_batch(muon, handle, products, first, count, stream);
  }
  release_products(&products);
  int status = cudaGetLastError();
  return status ? status : ok ? cudaSuccess : cudaErrorUnknown;
}
