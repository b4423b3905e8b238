/* swiglu_train.cu: silu(gate) * up over bf16 rows and its gradient.
 *
 * Bound: bytes, 6 a value forward and 10 backward, with some 45 instructions beside them: the exponential is ours and the division
 * IEEE's, so that the bits are the CPU's. At 4.6 TB/s an H200 has 38 instructions to spare for 6 bytes.
 */
#include "kernels/cpu/exp.h"
#include "kernels/gpu/rows.cuh"
#include "kernels/swiglu/swiglu_train.h"

#define THREADS 256

struct eight {
  float v[8];
};

static __device__ __forceinline__ struct eight load_eight(const uint16_t *p) {
  uint4 bits = *(const uint4 *)p;
  return {{us_low_half(bits.x), us_high_half(bits.x), us_low_half(bits.y), us_high_half(bits.y),
           us_low_half(bits.z), us_high_half(bits.z), us_low_half(bits.w), us_high_half(bits.w)}};
}

static __device__ __forceinline__ void store_eight(uint16_t *p, const struct eight &x) {
  *(uint4 *)p = make_uint4(us_pair_bf16(x.v[0], x.v[1]), us_pair_bf16(x.v[2], x.v[3]),
                           us_pair_bf16(x.v[4], x.v[5]), us_pair_bf16(x.v[6], x.v[7]));
}

static __global__ void __launch_bounds__(THREADS)
    swiglu_rows(uint32_t pieces, uint32_t a_row, const uint16_t *gate_up, uint16_t *a) {
  uint32_t i = blockIdx.x * THREADS + threadIdx.x, row = i / a_row;
  size_t F = (size_t)a_row * 8;
  if (i >= pieces) return;
  const uint16_t *p = gate_up + (size_t)row * 2 * F + i % a_row * 8;
  struct eight g = load_eight(p), u = load_eight(p + F);
#pragma unroll
  for (int k = 0; k < 8; k++) g.v[k] = g.v[k] / (1.0f + us_expf(-g.v[k])) * u.v[k];
  store_eight(a + (size_t)i * 8, g);
}

static __global__ void __launch_bounds__(THREADS)
    grad_rows(uint32_t pieces, uint32_t a_row, const uint16_t *gate_up, const uint16_t *da,
              uint16_t *d_gate_up, uint16_t *opt_a) {
  uint32_t i = blockIdx.x * THREADS + threadIdx.x, row = i / a_row;
  size_t F = (size_t)a_row * 8;
  if (i >= pieces) return;
  size_t at = (size_t)row * 2 * F + i % a_row * 8;
  struct eight g = load_eight(gate_up + at), u = load_eight(gate_up + at + F),
               d = load_eight(da + (size_t)i * 8), a;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    float gate = g.v[k], up = u.v[k], plus = 1.0f + us_expf(-gate), s = 1.0f / plus;
    if (opt_a) a.v[k] = gate / plus * up;
    g.v[k] = d.v[k] * up * s * (1.0f + gate * (1.0f - s));
    u.v[k] = d.v[k] * gate * s;
  }
  store_eight(d_gate_up + at, g);
  store_eight(d_gate_up + at + F, u);
  if (opt_a) store_eight(opt_a + (size_t)i * 8, a);
}

int us_swiglu_train(size_t R, size_t F, const uint16_t *gate_up, uint16_t *a, cudaStream_t stream) {
  size_t pieces = R * (F / 8), blocks = (pieces + THREADS - 1) / THREADS;
  if (F % 8 || blocks >= (1u << 31) / THREADS) return cudaErrorInvalidValue; /* 32-bit divisions */
  if (blocks)
    swiglu_rows<<<(unsigned)blocks, THREADS, 0, stream>>>((uint32_t)pieces, (uint32_t)(F / 8), gate_up, a);
  return cudaGetLastError();
}

int us_swiglu_train_grad(size_t R, size_t F, const uint16_t *gate_up, const uint16_t *da, uint16_t *d_gate_up,
                         uint16_t *opt_a, cudaStream_t stream) {
  size_t pieces = R * (F / 8), blocks = (pieces + THREADS - 1) / THREADS;
  if (F % 8 || blocks >= (1u << 31) / THREADS) return cudaErrorInvalidValue; /* 32-bit divisions */
  if (blocks)
    grad_rows<<<(unsigned)blocks, THREADS, 0, stream>>>((uint32_t)pieces, (uint32_t)(F / 8), gate_up, da,
                                                        d_gate_up, opt_a);
  return cudaGetLastError();
}
