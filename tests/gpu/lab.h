/* lab.h: what the kernel lab's parts share: time, the ceiling, samples of error, one JSON line a case.
 *
 *     struct lab_result r = {"qkv", "(6784, 6144) x 8", "fp8"};
 *     lab_sample(&r, error, allowed, magnitude);              // each compared output
 *     lab_mutation(&r, "a scale one step up", ratios);        // the median must exceed 1
 *     r.us = lab_median_us(run);                              // run() queues the work and returns a cudaError_t
 *     lab_report(&r);
 */
#ifndef US_TESTS_GPU_LAB_H
#define US_TESTS_GPU_LAB_H

#include "gpu_test.h"

#include <algorithm>
#include <cmath>
#include <unistd.h>
#include <vector>

#define LAB_REPEATS 15
#define LAB_WARM_MS 100
#define LAB_RESTS   5   /* runs behind a rest each, */
#define LAB_REST_MS 300 /* so long, */
#define LAB_WAKE_MS 4   /* and as much work that is not timed: the clock comes up */

struct lab_result {
  const char *op, *shape, *format;
  double worst = 0; /* largest error / allowed */
  double units = 0,
         units_most = 0;         /* largest error, and largest allowed, in 2^-24 of the sum of magnitudes */
  unsigned samples = 0, bad = 0; /* bad: not a number, or beyond what is allowed */
  const char *mutation[8] = {};
  double ratio[8] = {};
  unsigned mutations = 0;
  double us = 0, bytes = 0, flops = 0; /* of one operation, steady */
  double rested_us = 0;   /* the same where the chip is not at its power limit; 0: not measured */
  double chained_us = 0;  /* the same, each waiting for the one before; 0: not measured */
  double resident_us = 0; /* the same on pages that already lie in shared memory */
};

inline double lab_ceiling; /* bytes/s of the streaming kernel in this run */

/* Every output compared: |error| against what is allowed; a NaN is bad. magnitude 0: no sum. */
static inline void lab_sample(struct lab_result *r, double error, double allowed, double magnitude) {
  double ratio = std::fabs(error) / allowed;
  r->samples++;
  if (!(ratio <= 1)) r->bad++;
  if (!(ratio <= r->worst)) r->worst = ratio;
  if (magnitude <= 0) return;
  r->units = std::fmax(r->units, std::fabs(error) / magnitude * 0x1p24);
  r->units_most = std::fmax(r->units_most, allowed / magnitude * 0x1p24);
}

/* A mistake must show: ratios are error / allowed of an oracle that makes it. */
static inline void lab_mutation(struct lab_result *r, const char *name, std::vector<double> ratios) {
  std::sort(ratios.begin(), ratios.end());
  r->mutation[r->mutations] = name;
  r->ratio[r->mutations++] = ratios.empty() ? 0 : ratios[ratios.size() / 2];
}

/* Times runs one by one; their median, microseconds. */
struct lab_clock {
  cudaEvent_t start, stop;
  std::vector<float> times;
  lab_clock() {
    US_CUDA(cudaEventCreate(&start));
    US_CUDA(cudaEventCreate(&stop));
  }
  ~lab_clock() { (void)cudaEventDestroy(start), (void)cudaEventDestroy(stop); }
  template <class Run> float once_ms(Run run) {
    float ms;
    US_CUDA(cudaEventRecord(start));
    US_CUDA(run());
    US_CUDA(cudaEventRecord(stop));
    US_CUDA(cudaEventSynchronize(stop));
    US_CUDA(cudaEventElapsedTime(&ms, start, stop));
    return ms;
  }
  double median_us() {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3;
  }
};

/* Median of LAB_REPEATS runs, microseconds, after LAB_WARM_MS of the same work: an idle GPU drops to a fifth of its clock
 * within milliseconds and takes as long to come back. */
template <class Run> static double lab_median_us(Run run) {
  if (us_gpu_patience()) { /* nobody times under a checker */
    US_CUDA(run());
    US_CUDA(cudaDeviceSynchronize());
    return 1;
  }
  struct lab_clock clock;
  for (float warm = 0; clock.times.size() < LAB_REPEATS;) {
    float ms = clock.once_ms(run);
    if (warm >= LAB_WARM_MS) clock.times.push_back(ms);
    warm += ms;
  }
  return clock.median_us();
}

/* The same behind rests: work that goes on brings an H200 to its power limit, and its clock down by up to a fifth. */
template <class Run> static double lab_rested_us(Run run) {
  if (us_gpu_patience()) return lab_median_us(run);
  struct lab_clock clock;
  while (clock.times.size() < LAB_RESTS) {
    usleep(LAB_REST_MS * 1000);
    for (float awake = 0; awake < LAB_WAKE_MS;) awake += clock.once_ms(run);
    clock.times.push_back(clock.once_ms(run));
  }
  return clock.median_us();
}

static inline void lab_report(const struct lab_result *r) {
  bool ok = r->samples > 0 && r->bad == 0;
  for (unsigned i = 0; i < r->mutations; i++) ok = ok && r->ratio[i] > 1;
  if (!ok) us_gpu_failed = true;
  printf("{\"op\": \"%s\", \"shape\": \"%s\", \"format\": \"%s\", \"ok\": %s, \"device\": \"%s\", ", r->op,
         r->shape, r->format, ok ? "true" : "false", us_gpu_name);
  printf("\"samples\": %u, \"bad\": %u, \"error\": %.3g, \"error_units\": %.3g, \"allowed_units\": %.3g, "
         "\"mutations\": {",
         r->samples, r->bad, r->worst, r->units, r->units_most);
  for (unsigned i = 0; i < r->mutations; i++)
    printf("%s\"%s\": %.3g", i ? ", " : "", r->mutation[i], r->ratio[i]);
  printf("}");
  double rate = r->us > 0 ? r->bytes / r->us * 1e-3 : 0;
  if (r->us > 0)
    printf(", \"us\": %.2f, \"gbs\": %.0f, \"ceiling_gbs\": %.0f, \"fraction\": %.4f, \"gflops\": %.0f",
           r->us, rate, lab_ceiling * 1e-9, rate / (lab_ceiling * 1e-9), r->flops / r->us * 1e-3);
  if (r->chained_us > 0)
    printf(", \"chained_us\": %.2f, \"chained_gbs\": %.0f", r->chained_us, r->bytes / r->chained_us * 1e-3);
  if (r->rested_us > 0)
    printf(", \"rested_gbs\": %.0f, \"rested_fraction\": %.4f", r->bytes / r->rested_us * 1e-3,
           r->bytes / r->rested_us * 1e9 / (lab_ceiling * 1e3));
  if (r->resident_us > 0) printf(", \"resident_gbs\": %.0f", r->bytes / r->resident_us * 1e-3);
  printf("}\n");
  fflush(stdout);
}

/* A yes-or-no check on many values. */
static inline void lab_same_bits(const char *check, const void *a, const void *b, size_t words) {
  us_gpu_compare(check, (const uint32_t *)a, (const uint32_t *)b, words);
}

template <class T> static T *lab_upload(const std::vector<T> &host) {
  T *device;
  US_CUDA(cudaMalloc(&device, host.size() * sizeof(T)));
  US_CUDA(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

template <class T> static std::vector<T> lab_download(const T *device, size_t n) {
  std::vector<T> host(n);
  US_CUDA(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

/* splitmix64, for shapes of routing and activations. */
static inline uint64_t lab_random(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

#endif
