/* train_experts.h: what the parts of train_experts share: device arrays, random values, comparisons with derived bounds. */
#ifndef US_TESTS_TRAIN_EXPERTS_H
#define US_TESTS_TRAIN_EXPERTS_H

#include "gpu_test.h"
#include "formats/bf16.h"
#include "kernels/experts/grouped_gemm.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

/* An array on the device, with the values of one on the host if given. */
template <class T> struct device_array {
  T *at = NULL;
  size_t count = 0;
  explicit device_array(size_t n) : count(n) { US_CUDA(cudaMalloc(&at, (n ? n : 1) * sizeof(T))); }
  explicit device_array(const std::vector<T> &values) : device_array(values.size()) { put(values); }
  device_array(const device_array &) = delete;
  ~device_array() { cudaFree(at); }
  void put(const std::vector<T> &values) {
    US_CUDA(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> values(count);
    US_CUDA(cudaMemcpy(values.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
};

/* splitmix64: the numbers of a test are a function of its seed. */
struct random_stream {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u, z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  float unit() { return (float)(next() >> 40) * 0x1p-23f - 1.0f; } /* [-1, 1) */
  uint32_t below(uint32_t n) { return (uint32_t)(next() % n); }
};

static inline std::vector<uint16_t> random_halves(size_t n, uint64_t seed, float scale = 1.0f) {
  random_stream random = {seed};
  std::vector<uint16_t> v(n);
  for (uint16_t &x : v) x = us_bf16_from_f32(random.unit() * scale);
  return v;
}

static inline std::vector<float> random_floats(size_t n, uint64_t seed, float scale = 1.0f) {
  random_stream random = {seed};
  std::vector<float> v(n);
  for (float &x : v) x = random.unit() * scale;
  return v;
}

/* K distinct ascending ids below E a row. `skip` is never drawn. */
static inline std::vector<uint32_t> random_ids(uint32_t R, uint32_t E, uint32_t K, uint32_t skip,
                                               uint64_t seed) {
  random_stream random = {seed};
  std::vector<uint32_t> id(R * (size_t)K);
  for (uint32_t r = 0; r < R; r++) {
    uint32_t *row = &id[r * (size_t)K], have = 0;
    while (have < K) {
      uint32_t e = random.below(E);
      if (e != skip && std::find(row, row + have, e) == row + have) row[have++] = e;
    }
    std::sort(row, row + K);
  }
  return id;
}

/* Values against a reference with a bound each: reports how many are beyond, and returns it. */
struct bound_check {
  uint64_t checked = 0, bad = 0, first = 0;
  double worst = 0;
  void value(double got, double expected, double allowed) {
    double ratio = std::fabs(got - expected) / allowed;
    if (!(ratio <= 1) && !(got == expected) && bad++ == 0) first = checked;
    if (ratio > worst) worst = ratio;
    checked++;
  }
  void report(const std::string &name) const {
    us_gpu_report((name + ", worst " + std::to_string(worst).substr(0, 5)).c_str(), checked, bad, first);
  }
  /* The reference made a mistake: it must have been seen. */
  void report_mutation(const std::string &name) const {
    us_gpu_report(
        ("seen: " + name + " (" + std::to_string(bad) + " of " + std::to_string(checked) + ")").c_str(),
        checked, bad == 0, 0);
  }
};

template <class T>
static void report_same(const std::string &name, const std::vector<T> &expected, const std::vector<T> &got) {
  uint64_t bad = 0, first = 0;
  for (size_t i = 0; i < expected.size(); i++)
    if (memcmp(&expected[i], &got[i], sizeof(T)) && bad++ == 0) first = i;
  us_gpu_report(name.c_str(), expected.size(), bad, first);
}

static inline enum us_grouped_schedule schedule_of(bool turns) {
  return turns ? US_GROUPED_TURNS : US_GROUPED_TOGETHER;
}

/* A rounding to bf16 and to FP32, relative; and a step of 16 products on the tensor cores, whose adders keep at least 23 bits of the
 * largest term and truncate, relative to the sum of magnitudes. */
#define ROUND_BF16   0x1p-8
#define ROUND_F32    0x1p-24
#define ROUND_TENSOR 0x1p-22

void test_grouped(void);
void test_experts_rows(void);
void test_experts_layer(void);
void test_router(void);
void time_grouped(void);
void time_rows(void);

#endif
