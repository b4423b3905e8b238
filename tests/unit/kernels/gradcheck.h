/* gradcheck.h: gradients against finite differences of an independent double-precision loss.
 *
 *     double *x = gc_random(n, 1.0);                      // the inputs live in double; operations get float copies
 *     gc_check("dx", loss, &arg, x, n, dx, 1e-5);         // dx (float) against d loss / d x
 *
 * The loss is the formula written out in the test, in double: four-point differences with h = 1e-3 err by about
 * h^4 f5 / 30 + 2^-53 / h = 1e-13 of the loss, so the tolerance is what FP32 operations owe: a few 2^-24 times the square
 * root of the sums' lengths, relative to the largest gradient.
 */
#ifndef US_TESTS_GRADCHECK_H
#define US_TESTS_GRADCHECK_H

#include "suite.h"

#include "base/pool.h"
#include "kernels/seq/seq.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef double (*gc_loss)(void *arg);

static uint64_t gc_state;

static inline double gc_uniform(void) { /* splitmix64 in (-1, 1) */
  if (!gc_state) gc_state = us_test_seed();
  uint64_t z = gc_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return (double)(z >> 11) * 0x1p-52 - 1.0;
}

/* Test data lives until the program ends: known to a table, so that a leak checker takes it for what it is. */
static void *gc_kept[65536];
static unsigned gc_count;

static inline void *gc_keep(void *memory) {
  ck_assert_ptr_nonnull(memory);
  return gc_kept[gc_count++ % 65536] = memory;
}

/* n values that are exact in float. */
static inline double *gc_random(size_t n, double scale) {
  double *x = gc_keep(malloc((n ? n : 1) * sizeof *x));
  for (size_t i = 0; i < n; i++) x[i] = (double)(float)(scale * gc_uniform());
  return x;
}

static inline float *gc_float(const double *x, size_t n) {
  float *y = gc_keep(aligned_alloc(64, (n * sizeof *y + 127) / 64 * 64));
  for (size_t i = 0; i < n; i++) y[i] = (float)x[i];
  return y;
}

static inline float *gc_zeros(size_t n) {
  float *y = gc_keep(aligned_alloc(64, (n * sizeof *y + 127) / 64 * 64));
  memset(y, 0, n * sizeof *y);
  return y;
}

static inline double gc_slope(gc_loss loss, void *arg, double *slot) {
  double x = *slot, h = 1e-3, f[4], at[4] = {-2.0, -1.0, 1.0, 2.0};
  for (int i = 0; i < 4; i++) {
    *slot = x + at[i] * h;
    f[i] = loss(arg);
  }
  *slot = x;
  return (8.0 * (f[2] - f[1]) - (f[3] - f[0])) / (12.0 * h);
}

static inline void gc_check(const char *what, gc_loss loss, void *arg, double *x, size_t n,
                            const float *gradient, double tolerance) {
  double *slope = malloc(n * sizeof *slope), largest = 0.0;
  for (size_t i = 0; i < n; i++) {
    slope[i] = gc_slope(loss, arg, &x[i]);
    if (fabs(slope[i]) > largest) largest = fabs(slope[i]);
  }
  ck_assert_msg(largest > 0.0, "%s: the loss does not depend on it", what);
  for (size_t i = 0; i < n; i++)
    ck_assert_msg(fabs((double)gradient[i] - slope[i]) <= tolerance * largest,
                  "%s[%zu]: %.9g, differences say %.9g", what, i, (double)gradient[i], slope[i]);
  free(slope);
}

static inline void gc_near(const char *what, const float *got, const double *expected, size_t n,
                           double tolerance) {
  double largest = 0.0;
  for (size_t i = 0; i < n; i++) largest = fabs(expected[i]) > largest ? fabs(expected[i]) : largest;
  for (size_t i = 0; i < n; i++)
    ck_assert_msg(fabs((double)got[i] - expected[i]) <= tolerance * largest, "%s[%zu]: %.9g, expected %.9g",
                  what, i, (double)got[i], expected[i]);
}

/* Run body with 1, 2, 3 and 5 threads; what it writes to out (n) must be the same bits. */
static inline void gc_threads(void (*body)(struct us_seq *seq, void *arg, float *out), void *arg, size_t n,
                              enum us_seq_rounding rounding) {
  static const int threads[] = {1, 2, 3, 5};
  float *first = gc_zeros(n), *out = gc_zeros(n);
  for (int i = 0; i < 4; i++) {
    struct us_pool *pool = NULL;
    struct us_seq seq;
    ck_assert_int_eq(us_pool_create(threads[i], &pool, NULL), US_OK);
    us_seq_init(&seq, pool, rounding);
    memset(out, 0, n * sizeof *out);
    body(&seq, arg, i ? out : first);
    ck_assert(!seq.failed);
    if (i) ck_assert_msg(memcmp(out, first, n * sizeof *out) == 0, "%d threads give other bits", threads[i]);
    us_seq_release(&seq);
    us_pool_free(pool);
  }
  free(first);
  free(out);
}

#endif
