/* seq.c: context of the sequence operations. */
#include "kernels/seq/seq.h"

#include <cblas.h>
#include <stdlib.h>

void us_seq_init(struct us_seq *seq, struct us_pool *pool, enum us_seq_rounding rounding) {
  *seq = (struct us_seq){.pool = pool, .rounding = rounding};
  openblas_set_num_threads(1);
}

void us_seq_release(struct us_seq *seq) {
  free(seq->scratch);
  *seq = (struct us_seq){0};
}

float *us_seq_scratch(struct us_seq *seq, size_t floats) {
  if (floats <= seq->scratch_floats) return seq->scratch;
  free(seq->scratch);
  size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  seq->scratch = floats < SIZE_MAX / 8 ? aligned_alloc(64, bytes) : NULL;
  seq->scratch_floats = seq->scratch ? floats : 0;
  if (!seq->scratch) seq->failed = true;
  return seq->scratch;
}

void us_seq_gemm(bool transpose_a, bool transpose_b, size_t M, size_t N, size_t K, float alpha,
                 const float *a, size_t lda, const float *b, size_t ldb, float beta, float *c, size_t ldc) {
  cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans,
              (blasint)M, (blasint)N, (blasint)K, alpha, a, (blasint)lda, b, (blasint)ldb, beta, c,
              (blasint)ldc);
}

struct add_task {
  const float *a, *b;
  float *out;
};

US_SEQ_CLONES static void add_range(void *arg, size_t begin, size_t end, int worker) {
  const struct add_task *t = arg;
  for (size_t i = begin; i < end; i++) t->out[i] = t->a[i] + t->b[i];
}

void us_seq_add(struct us_seq *seq, size_t n, const float *a, const float *b, float *out) {
  struct add_task t = {.a = a, .b = b, .out = out};
  us_pool_for(seq->pool, n, 16384, add_range, &t);
}
