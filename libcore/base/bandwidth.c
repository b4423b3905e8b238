/* bandwidth.c: read bandwidth by summing a large buffer. */
#include "base/bandwidth.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PASSES       3
#define WORDS_A_LINE 8

struct sweep {
  const uint64_t *words;
  size_t count;
  uint64_t sums[US_POOL_MAX_THREADS];
};

/* Eight independent sums, so that the loop waits for memory and not for its own additions. */
static void sum_share(void *arg, int worker, int workers) {
  struct sweep *sweep = arg;
  size_t lines = sweep->count / WORDS_A_LINE, from = lines * (size_t)worker / (size_t)workers;
  size_t to = lines * ((size_t)worker + 1) / (size_t)workers;
  uint64_t sums[WORDS_A_LINE] = {0};
  for (size_t line = from; line < to; line++)
    for (int i = 0; i < WORDS_A_LINE; i++) sums[i] += sweep->words[line * WORDS_A_LINE + (size_t)i];
  for (int i = 0; i < WORDS_A_LINE; i++) sweep->sums[worker] += sums[i];
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
