/* adamw_train.cu: AdamW over spans of an arena.
 *
 * Bound: bytes, 28 a value (four arrays read, three written). SLICES blocks share a span; a thread has four values at a time. The
 * square root and both divisions are IEEE's, for the CPU's bits.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/optim/adamw_train.h"
#include <cmath>

#define THREADS 256
#define SLICES  8

struct adamw_args {
  struct us_adamw_train a;
  double bias1; /* 1 - beta1^step */
  float beta1, beta2, rest1, rest2, second, epsilon;
};

struct moments {
  float m, v;
};

static __device__ __forceinline__ float update(const struct adamw_args &c, float step, float keep,
                                               float value, float g, struct moments *ret_moments) {
  float m = c.beta1 * ret_moments->m + c.rest1 * g;
  float v = c.beta2 * ret_moments->v + c.rest2 * g * g;
  *ret_moments = {m, v};
  return value * keep - step * m / (sqrtf(v * c.second) + c.epsilon);
}

static __global__ void __launch_bounds__(THREADS) adamw_spans(const __grid_constant__ struct adamw_args c) {
  struct us_adamw_span span = c.a.spans[blockIdx.x / SLICES];
  double rate = c.a.rate * (double)span.rate_scale;
  float step = (float)(rate / c.bias1), keep = (float)(1.0 - rate * span.decay);
  float factor = c.a.opt_factor ? *c.a.opt_factor : 1.0f;
  uint32_t i = (blockIdx.x % SLICES * THREADS + threadIdx.x) * 4;
  for (; i + 4 <= span.n; i += SLICES * THREADS * 4) {
    uint64_t at = span.offset + i;
    struct us_four value = us_load_four(c.a.value + at), g = us_load_four(c.a.grad + at),
                   m = us_load_four(c.a.moment1 + at), v = us_load_four(c.a.moment2 + at);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      struct moments both = {m.v[j], v.v[j]};
      value.v[j] = update(c, step, keep, value.v[j], g.v[j] * factor, &both);
      m.v[j] = both.m, v.v[j] = both.v;
    }
    us_store_four(c.a.value + at, value);
    us_store_four(c.a.moment1 + at, m);
    us_store_four(c.a.moment2 + at, v);
  }
  for (; i < span.n; i++) { /* one thread: the last values of a span that is no multiple of 4 */
    uint64_t at = span.offset + i;
    struct moments both = {c.a.moment1[at], c.a.moment2[at]};
    c.a.value[at] = update(c, step, keep, c.a.value[at], c.a.grad[at] * factor, &both);
    c.a.moment1[at] = both.m, c.a.moment2[at] = both.v;
  }
}

int us_adamw_train(const struct us_adamw_train *adamw, cudaStream_t stream) {
  if (!adamw->step || adamw->count >= (1u << 31) / SLICES) return cudaErrorInvalidValue;
  double step = (double)adamw->step;
  struct adamw_args c = {*adamw,
                         1.0 - pow(adamw->beta1, step),
                         (float)adamw->beta1,
                         (float)adamw->beta2,
                         1.0f - (float)adamw->beta1,
                         (float)(1.0 - adamw->beta2),
                         (float)(1.0 / (1.0 - pow(adamw->beta2, step))),
                         (float)adamw->epsilon};
  if (adamw->count) adamw_spans<<<(unsigned)adamw->count * SLICES, THREADS, 0, stream>>>(c);
  return cudaGetLastError();
}
