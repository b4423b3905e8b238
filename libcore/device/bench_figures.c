/* bench_figures.c: what a run may be, how far it will go, and what its times come to: no GPU. */
#include "device/bench.h"

#include <stdlib.h>

enum us_status us_bench_check(const struct us_executor *ex, uint32_t batch, uint32_t block, bool replays,
                              struct us_err *err) {
  if (!batch || batch > US_ENGINE_SEQUENCES)
    return us_err_set(err, US_ERR_USAGE, "%u sequences together; the engine runs 1 to %d", batch,
                      US_ENGINE_SEQUENCES);
  if (block > 1 && !ex->draft && !replays)
    return us_err_set(err, US_ERR_USAGE, "block %u needs a drafter, or rates to replay", block);
  if (ex->draft && block > ex->draft->shape.block)
    return us_err_set(err, US_ERR_USAGE, "block %u; the drafter's is %u", block, ex->draft->shape.block);
  if (!block || block > US_MAX_BLOCK)
    return us_err_set(err, US_ERR_USAGE, "a block of %u rows; 1 to %d", block, US_MAX_BLOCK);
  return US_OK;
}

uint32_t us_bench_replayed(const struct us_bench_options *o) {
  uint32_t rounds = o->warmup + o->rounds, most = (rounds + 2) * o->block;
  double length = 1, kept = 1;
  for (uint32_t slot = 0; slot + 1 < o->block; slot++) {
    kept *= o->accept[slot < o->accept_count ? slot : o->accept_count - 1];
    length += kept;
  }
  double wanted = 1.1 * length * rounds + 4.0 * o->block;
  return wanted < most ? (uint32_t)wanted : most;
}

uint32_t us_bench_positions(const struct us_bench_options *options) {
  uint32_t tokens = options->accept && options->block > 1
                        ? us_bench_replayed(options)
                        : (options->warmup + options->rounds + 2) * options->block;
  return options->context + tokens + US_MAX_BLOCK;
}

static int by_value(const void *a, const void *b) {
  double x = ((const struct us_bench_sample *)a)->value, y = ((const struct us_bench_sample *)b)->value;
  return (x > y) - (x < y);
}

/* The value below which that share of the weight lies. */
static double quantile(const struct us_bench_sample *samples, size_t n, double share) {
  double sum = 0, whole = 0;
  for (size_t i = 0; i < n; i++) whole += samples[i].weight;
  for (size_t i = 0; i < n; i++)
    if ((sum += samples[i].weight) >= share * whole) return samples[i].value;
  return n ? samples[n - 1].value : 0;
}

struct us_bench_spread us_bench_spread_of(struct us_bench_sample *samples, size_t n) {
  double sum = 0, whole = 0;
  for (size_t i = 0; i < n; i++) sum += samples[i].value * samples[i].weight, whole += samples[i].weight;
  qsort(samples, n, sizeof *samples, by_value);
  return (struct us_bench_spread){.mean = whole > 0 ? sum / whole : 0,
                                  .p50 = quantile(samples, n, 0.5),
                                  .p95 = quantile(samples, n, 0.95),
                                  .p99 = quantile(samples, n, 0.99)};
}
