/* train_experts_cpu.h: the CPU's functions for C++; their own headers are C. What those include is C++ already, so it comes first. */
#ifndef US_TESTS_TRAIN_EXPERTS_CPU_H
#define US_TESTS_TRAIN_EXPERTS_CPU_H

#include "formats/bf16.h"
#include "base/err.h"
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <vector>

extern "C" {
#include "kernels/experts/experts_grad.h"
#include "kernels/router/router_grad.h"
#include "kernels/swiglu/swiglu_grad.h"
}

static inline std::vector<float> widen(const std::vector<uint16_t> &v) {
  std::vector<float> wide(v.size());
  for (size_t i = 0; i < v.size(); i++) wide[i] = us_bf16_to_f32(v[i]);
  return wide;
}

#endif
