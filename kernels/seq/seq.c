/* seq.c: context of the sequence operations. */
#include "kernels/seq/seq.h"

#include "kernels/gemm/gemm.h"

#include <stdlib.h>

void us_seq_init(struct us_seq *seq, struct us_pool *pool, enum us_seq_rounding rounding) {
  *seq = (struct us_seq){.pool = pool, .rounding = rounding};
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
  us_gemm(&(struct us_gemm){.M = M,
                            .N = N,
                            .K = K,
                            .a = a,
                            .b = b,
                            .c = c,
                            .c_row = ldc,
                            .alpha = alpha,
                            .beta = beta,
                            .a_row = transpose_a ? 1 : lda,
                            .a_col = transpose_a ? lda : 1,
                            .b_row = transpose_b ? 1 : ldb,
                            .b_col = transpose_b ? ldb : 1});
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
