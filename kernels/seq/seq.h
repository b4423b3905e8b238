/* seq.h: what the sequence operations (forward and backward over many rows) share: pool, scratch, rounding.
 *
 *     struct us_seq seq;
 *     us_seq_init(&seq, pool, US_SEQ_ROUND_BF16);
 *     us_linear_seq(&seq, x, w, &dims, y);             // operations never fail one by one:
 *     if (seq.failed) return us_err_memory(...);       // out of scratch memory is sticky and checked once a step
 *     us_seq_release(&seq);
 *
 * Rows are FP32 in memory; where DESIGN says bf16 the value is rounded to bf16 and kept in FP32, so that one product
 * serves everything. Every reduction is cut by shape alone (row blocks of US_SEQ_BLOCK), never by the number of threads, and
 * every dense product is a us_gemm on one such block: results are the same bits for any pool.
 */
#ifndef US_KERNELS_SEQ_H
#define US_KERNELS_SEQ_H

#include "base/pool.h"
#include "formats/bf16.h"
#include "kernels/cpu/exp.h"
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Rows of one task and of one partial sum. 256 rows x 128 columns of FP32 fill 128 KB of L2 and amortise the packing
 * that sgemm does. */
#define US_SEQ_BLOCK 256

enum us_seq_rounding {
  US_SEQ_ROUND_BF16, /* outputs of norm, attention, SwiGLU and the K/V rows are rounded once to bf16; gradient straight through */
  US_SEQ_ROUND_NONE, /* FP32 throughout: gradient checks, parity */
};

struct us_seq {
  struct us_pool *pool; /* borrowed; NULL: this thread alone */
  enum us_seq_rounding rounding;
  bool failed; /* scratch memory ran out: some operation did nothing */
  float *scratch;
  size_t scratch_floats;
};

/* Prepare a context; the pool is what parallelises. */
void us_seq_init(struct us_seq *seq, struct us_pool *pool, enum us_seq_rounding rounding);
void us_seq_release(struct us_seq *seq);

/* At least `floats` of 64-byte aligned scratch, valid until the next call; NULL (and seq->failed) when memory is out. */
float *us_seq_scratch(struct us_seq *seq, size_t floats);

/* Run body over [0, n) in blocks of `block` items: block b covers [b * block, min(n, (b + 1) * block)). */
static inline size_t us_seq_blocks(size_t n, size_t block) {
  return (n + block - 1) / block;
}

/* C (M, N) = alpha * op(A) op(B) + beta * C, row-major: gemm.h. */
void us_seq_gemm(bool transpose_a, bool transpose_b, size_t M, size_t N, size_t K, float alpha,
                 const float *a, size_t lda, const float *b, size_t ldb, float beta, float *c, size_t ldc);

/* out = a + b over n values; out may be either. */
void us_seq_add(struct us_seq *seq, size_t n, const float *a, const float *b, float *out);

/* Vector bodies: the same plain C compiled for each instruction set and chosen at load time. Without contraction or
 * reassociation all clones give the same bits. Sanitizers dislike the resolver, so they get the plain function. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) &&     \
    !defined(__SANITIZE_THREAD__)
#define US_SEQ_CLONES                                                                                        \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define US_SEQ_CLONES
#endif

#define US_SEQ_LANES 16

/* The lanes are halved until one is left; they are overwritten. */
static inline float us_seq_sum_lanes(float lane[US_SEQ_LANES]) {
  for (int width = US_SEQ_LANES / 2; width; width /= 2)
    for (int l = 0; l < width; l++) lane[l] += lane[l + width];
  return lane[0];
}

/* Sum of a_i b_i in lanes: the same bits however wide the machine adds. */
static inline float us_seq_dot(const float *a, const float *b, size_t n) {
  float lane[US_SEQ_LANES] = {0};
  size_t i = 0;
  for (; i + US_SEQ_LANES <= n; i += US_SEQ_LANES)
    for (int l = 0; l < US_SEQ_LANES; l++) lane[l] += a[i + l] * b[i + l];
  for (int l = 0; i < n; i++, l++) lane[l] += a[i] * b[i];
  return us_seq_sum_lanes(lane);
}

#endif
