/* bandwidth.c: read bandwidth by summing a large buffer. */
#include "base/bandwidth.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PASSES       3
#define WORDS_A_LINE 8
#define STREAMS      4
#define UNROLL       4 /* lines of a stream at once */

struct sweep {
  const uint64_t *words;
  size_t count;
  uint64_t sums[US_POOL_MAX_THREADS];
};

/* Wide loads double what one core draws, so the sum is compiled for the widest the machine has, by gcc, which knows how
 * to optimize one function. (Not under sanitizers: their run time is not up when the clones are chosen.) */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) &&    \
    !defined(__SANITIZE_THREAD__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"), optimize("O3")))
#else
#define WIDEST
#endif

typedef uint64_t line __attribute__((vector_size(64), may_alias));

/* Four streams of independent sums, `stride` lines apart, so that the loop waits for memory and not for its own additions. */
WIDEST static uint64_t sum_streams(const line *lines, size_t stride) {
  line sums[STREAMS][UNROLL] = {{{0}}}, all = {0};
  uint64_t total = 0;
  for (size_t at = 0; at + UNROLL <= stride; at += UNROLL)
    for (size_t s = 0; s < STREAMS; s++)
      for (size_t i = 0; i < UNROLL; i++) sums[s][i] += lines[s * stride + at + i];
  for (size_t s = 0; s < STREAMS; s++)
    for (size_t i = 0; i < UNROLL; i++) all += sums[s][i];
  for (size_t i = 0; i < WORDS_A_LINE; i++) total += all[i];
  return total;
}

static void sum_share(void *arg, int worker, int workers) {
  struct sweep *sweep = arg;
  const line *lines = (const line *)(const void *)sweep->words;
  size_t share = sweep->count / WORDS_A_LINE / (size_t)workers;
  sweep->sums[worker] += sum_streams(lines + (size_t)worker * share, share / STREAMS);
}

static double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

enum us_status us_bandwidth_measure(struct us_pool *pool, size_t bytes, double *ret_bytes_per_second,
                                    struct us_err *err) {
  size_t count = bytes / sizeof(uint64_t) / WORDS_A_LINE * WORDS_A_LINE;
  uint64_t *words = aligned_alloc(64, count ? count * sizeof *words : 64);
  struct sweep *sweep = calloc(1, sizeof *sweep);
  if (!words || !sweep) {
    free(words);
    free(sweep);
    return us_err_memory(err, "the bandwidth measurement", bytes);
  }
  memset(words, 1, count * sizeof *words); /* pages exist and differ from the zero page */
  *sweep = (struct sweep){.words = words, .count = count};
  double best = 0;
  for (int pass = 0; pass < PASSES; pass++) {
    double start = seconds_now();
    us_pool_run(pool, sum_share, sweep);
    double rate = (double)(count * sizeof *words) / (seconds_now() - start);
    if (rate > best) best = rate;
  }
  *ret_bytes_per_second = best;
  free(words);
  free(sweep);
  return US_OK;
}
