/* train_values.h: what the training programs share: data, device copies, the CPU's functions, comparisons with a bound a value.
 *
 *     std::vector<float> x = train_normal(n, 1);                       // seeded by $US_TEST_SEED
 *     struct train_device<float> d(x);                                 // uploaded, freed at the end of the scope
 *     train_compare(&r, d.host(), expected, bound);                    // all in double
 */
#ifndef US_TESTS_GPU_TRAIN_VALUES_H
#define US_TESTS_GPU_TRAIN_VALUES_H

#include "lab.h"

#include <cmath>
#include <cstring>
#include <math.h>
#include <string.h>

extern "C" {
#include "kernels/embed/embed_grad.h"
#include "kernels/head_loss/head_loss.h"
#include "kernels/rmsnorm/rmsnorm_grad.h"
#include "kernels/rope/rope.h"
#include "kernels/rope/rope_grad.h"
#include "kernels/swiglu/swiglu_grad.h"
}

static inline uint64_t train_seed(void) {
  const char *text = getenv("US_TEST_SEED");
  return text ? strtoull(text, NULL, 0) : 1;
}

/* n values N(0, deviation), nearly: twelve uniform ones added. */
static inline std::vector<float> train_normal(size_t n, uint64_t stream, float deviation = 1.0f) {
  uint64_t state = train_seed() * 1000003 + stream;
  std::vector<float> x(n);
  for (float &v : x) {
    double sum = -6.0;
    for (int i = 0; i < 6; i++) {
      uint64_t word = lab_random(&state);
      sum += (double)(uint32_t)word * 0x1p-32 + (double)(word >> 32) * 0x1p-32;
    }
    v = (float)(sum * (double)deviation);
  }
  return x;
}

static inline std::vector<uint16_t> train_halves(const std::vector<float> &x) {
  std::vector<uint16_t> h(x.size());
  for (size_t i = 0; i < x.size(); i++) h[i] = us_bf16_from_f32(x[i]);
  return h;
}

static inline std::vector<float> train_floats(const std::vector<uint16_t> &h) {
  std::vector<float> x(h.size());
  for (size_t i = 0; i < h.size(); i++) x[i] = us_bf16_to_f32(h[i]);
  return x;
}

static inline double train_value(float x) {
  return (double)x;
}
static inline double train_value(double x) {
  return x;
}
static inline double train_value(uint16_t x) {
  return (double)us_bf16_to_f32(x);
}

/* Device memory of a scope. */
template <class T> struct train_device {
  T *at = NULL;
  size_t n;
  explicit train_device(size_t count) : n(count) {
    US_CUDA(cudaMalloc(&at, (n ? n : 1) * sizeof(T)));
    US_CUDA(cudaMemset(at, 0, (n ? n : 1) * sizeof(T)));
  }
  explicit train_device(const std::vector<T> &host) : n(host.size()) { at = lab_upload(host); }
  train_device(const train_device &) = delete;
  ~train_device() { cudaFree(at); }
  std::vector<T> host() const {
    US_CUDA(cudaDeviceSynchronize());
    return lab_download((const T *)at, n);
  }
  void set(const std::vector<T> &host) {
    US_CUDA(cudaMemcpy(at, host.data(), n * sizeof(T), cudaMemcpyHostToDevice));
  }
};

/* Every value against its bound. */
template <class T>
static void train_compare(struct lab_result *r, const std::vector<T> &got,
                          const std::vector<double> &expected, const std::vector<double> &bound) {
  for (size_t i = 0; i < got.size(); i++) lab_sample(r, train_value(got[i]) - expected[i], bound[i], 0);
}

/* What a wrong oracle would show; values that must be equal (bound 0) are left out. */
template <class T>
static void train_mutation(struct lab_result *r, const char *name, const std::vector<T> &got,
                           const std::vector<double> &wrong, const std::vector<double> &bound) {
  std::vector<double> ratios;
  for (size_t i = 0; i < got.size(); i++)
    if (bound[i] > 0) ratios.push_back(std::fabs(train_value(got[i]) - wrong[i]) / bound[i]);
  lab_mutation(r, name, ratios);
}

template <class T>
static void train_same(const char *check, const std::vector<T> &expected, const std::vector<T> &got) {
  uint64_t bad = 0, first = 0;
  for (size_t i = 0; i < expected.size(); i++)
    if (memcmp(&expected[i], &got[i], sizeof(T)) != 0 && bad++ == 0) first = i;
  us_gpu_report(check, expected.size(), bad, first);
}

/* A mutation of something that is compared bit by bit. */
template <class T>
static void train_differs(const char *check, const std::vector<T> &wrong, const std::vector<T> &got) {
  us_gpu_report(check, wrong.size(), memcmp(wrong.data(), got.data(), wrong.size() * sizeof(T)) == 0, 0);
}

#endif
