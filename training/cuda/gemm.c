/* gemm.c: dense products by cublasLt, and the choices of algorithm for the shapes seen so far.
 *
 * The library counts columns first: a row-major (R, N) matrix is its (N, R) matrix of leading dimension N, so that
 *   y^T  (N, R) = w^T' x'      w transposed, x plain        inner K
 *   dx^T (K, R) = w' dy'       both plain                   inner N
 *   dw^T (K, N) = x' dy'^T     x plain, dy transposed       inner R
 */
#include "training/cuda/gemm.h"

#include <stdlib.h>
#include <string.h>

#define MOST_PLANS 512
#define ALIGNMENT  16 /* bytes: what TMA asks of a matrix and every stride here keeps */

enum product { PRODUCT_Y, PRODUCT_DX, PRODUCT_DW };

/* What the choice depends on. */
struct key {
  uint64_t kind, m, n, k, lda, ldb, ldd, f32, adds;
};

struct plan {
  struct key key;
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulAlgo_t algorithm;
};

struct us_cuda_plans {
  size_t count;
  struct plan plan[MOST_PLANS];
};

enum us_status us_cuda_plans_create(struct us_cuda_plans **ret_plans, struct us_err *err) {
  *ret_plans = calloc(1, sizeof **ret_plans);
  return *ret_plans ? US_OK : us_err_memory(err, "products", sizeof **ret_plans);
}

static void release_plan(struct plan *plan) {
  if (plan->product) (void)cublasLtMatmulDescDestroy(plan->product);
  if (plan->a) (void)cublasLtMatrixLayoutDestroy(plan->a);
  if (plan->b) (void)cublasLtMatrixLayoutDestroy(plan->b);
  if (plan->d) (void)cublasLtMatrixLayoutDestroy(plan->d);
  *plan = (struct plan){0};
}

void us_cuda_plans_free(struct us_cuda_plans *plans) {
  if (!plans) return;
  for (size_t i = 0; i < plans->count; i++) release_plan(&plans->plan[i]);
  free(plans);
}

static cublasStatus_t set_number(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t which,
                                 uint32_t value) {
  return cublasLtMatmulPreferenceSetAttribute(p, which, &value, sizeof value);
}

/* Split sums are added in FP32 in the workspace, never in the output's type. */
static cublasStatus_t choose(struct us_cuda *cuda, struct plan *plan) {
  cublasLtMatmulPreference_t p = NULL;
  cublasLtMatmulHeuristicResult_t found;
  size_t workspace = cuda->workspace_bytes;
  int count = 0;
  cublasStatus_t s = cublasLtMatmulPreferenceCreate(&p);
  if (!s)
    s = cublasLtMatmulPreferenceSetAttribute(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                             sizeof workspace);
  if (!s) s = set_number(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, ALIGNMENT);
  if (!s) s = set_number(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, ALIGNMENT);
  if (!s) s = set_number(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, ALIGNMENT);
  if (!s) s = set_number(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, ALIGNMENT);
  if (!s)
    s = set_number(p, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
  if (!s)
    s = cublasLtMatmulAlgoGetHeuristic(cuda->lt, plan->product, plan->a, plan->b, plan->d, plan->d, p, 1,
                                       &found, &count);
  if (!s && !count) s = CUBLAS_STATUS_NOT_SUPPORTED;
  if (!s) plan->algorithm = found.algo;
  if (p) (void)cublasLtMatmulPreferenceDestroy(p);
  return s;
}

static cublasStatus_t describe(struct us_cuda *cuda, const struct key *key, struct plan *plan) {
  bool transpose_a = key->kind == PRODUCT_Y, transpose_b = key->kind == PRODUCT_DW;
  int32_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  *plan = (struct plan){.key = *key};
  cublasStatus_t s = cublasLtMatmulDescCreate(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (!s) s = cublasLtMatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
  if (!s) s = cublasLtMatmulDescSetAttribute(plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
  if (!s)
    s = cublasLtMatrixLayoutCreate(&plan->a, CUDA_R_16BF, transpose_a ? key->k : key->m,
                                   transpose_a ? key->m : key->k, (int64_t)key->lda);
  if (!s)
    s = cublasLtMatrixLayoutCreate(&plan->b, CUDA_R_16BF, transpose_b ? key->n : key->k,
                                   transpose_b ? key->k : key->n, (int64_t)key->ldb);
  if (!s)
    s = cublasLtMatrixLayoutCreate(&plan->d, key->f32 ? CUDA_R_32F : CUDA_R_16BF, key->m, key->n,
                                   (int64_t)key->ldd);
  return s ? s : choose(cuda, plan);
}

/* NULL, and a failure kept, when the library has nothing for the product. */
static struct plan *find_plan(struct us_cuda *cuda, const struct key *key) {
  struct us_cuda_plans *plans = cuda->plans;
  for (size_t i = 0; i < plans->count; i++)
    if (memcmp(&plans->plan[i].key, key, sizeof *key) == 0) return &plans->plan[i];
  if (plans->count == MOST_PLANS) release_plan(&plans->plan[--plans->count]);
  struct plan *plan = &plans->plan[plans->count];
  if (describe(cuda, key, plan) != CUBLAS_STATUS_SUCCESS) {
    release_plan(plan);
    us_cuda_did(cuda, cudaErrorNotSupported, "choosing a product's algorithm");
    return NULL;
  }
  plans->count++;
  return plan;
}

/* d = a b + beta c in the library's terms. */
static void multiply(struct us_cuda *cuda, const struct key *key, const uint16_t *a, const uint16_t *b,
                     float beta, const void *c, void *d) {
  const float one = 1.0f;
  if (!key->m || !key->n || !key->k) return;
  struct plan *plan = find_plan(cuda, key);
  if (!plan) return;
  cublasStatus_t s =
      cublasLtMatmul(cuda->lt, plan->product, &one, a, plan->a, b, plan->b, &beta, c, plan->d, d, plan->d,
                     &plan->algorithm, cuda->workspace, cuda->workspace_bytes, cuda->stream);
  static const char *const name[] = {"dense product", "dense product, gradient of rows",
                                     "dense product, gradient of weights"};
  us_cuda_did(cuda, s == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorLaunchFailure, name[key->kind]);
}

static struct us_cuda_linear with_strides(const struct us_cuda_linear *dims) {
  struct us_cuda_linear d = *dims;
  if (!d.x_stride) d.x_stride = d.K;
  if (!d.y_stride) d.y_stride = d.N;
  return d;
}

static struct key key_y(const struct us_cuda_linear *dims, bool f32, bool adds) {
  struct us_cuda_linear d = with_strides(dims);
  return (struct key){.kind = PRODUCT_Y,
                      .m = d.N,
                      .n = d.R,
                      .k = d.K,
                      .lda = d.K,
                      .ldb = d.x_stride,
                      .ldd = d.y_stride,
                      .f32 = f32,
                      .adds = adds};
}

static struct key key_dx(const struct us_cuda_linear *dims, bool f32, bool adds) {
  struct us_cuda_linear d = with_strides(dims);
  return (struct key){.kind = PRODUCT_DX,
                      .m = d.K,
                      .n = d.R,
                      .k = d.N,
                      .lda = d.K,
                      .ldb = d.y_stride,
                      .ldd = d.x_stride,
                      .f32 = f32,
                      .adds = adds};
}

void us_cuda_linear(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *x,
                    const uint16_t *w, uint16_t *y) {
  struct key key = key_y(dims, false, false);
  multiply(cuda, &key, w, x, 0.0f, y, y);
}

void us_cuda_linear_f32(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *x,
                        const uint16_t *w, float *y) {
  struct key key = key_y(dims, true, false);
  multiply(cuda, &key, w, x, 0.0f, y, y);
}

void us_cuda_linear_add(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *x,
                        const uint16_t *w, const float *residual, float *out) {
  struct key key = key_y(dims, true, true);
  multiply(cuda, &key, w, x, 1.0f, residual, out);
}

void us_cuda_linear_grad_x(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *dy,
                           const uint16_t *w, uint16_t *dx) {
  struct key key = key_dx(dims, false, false);
  multiply(cuda, &key, w, dy, 0.0f, dx, dx);
}

void us_cuda_linear_grad_x_f32(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *dy,
                               const uint16_t *w, float beta, float *dx) {
  struct key key = key_dx(dims, true, beta != 0.0f);
  multiply(cuda, &key, w, dy, beta, dx, dx);
}

void us_cuda_linear_grad_w(struct us_cuda *cuda, const struct us_cuda_linear *dims, const uint16_t *dy,
                           const uint16_t *x, float *dw) {
  struct us_cuda_linear d = with_strides(dims);
  struct key key = {.kind = PRODUCT_DW,
                    .m = d.K,
                    .n = d.N,
                    .k = d.R,
                    .lda = d.x_stride,
                    .ldb = d.y_stride,
                    .ldd = d.K,
                    .f32 = true,
                    .adds = true};
  if (dw) multiply(cuda, &key, x, dy, 1.0f, dw, dw);
}
