/* rope_train.cu: rotation of q and k and scaling of v over bf16 rows, in place.
 *
 * Bound: bytes, 4 a touched value; dims that are neither rotated nor scaled are not read. A thread has 8 pairs of a rotated head
 * (two loads of 16 bytes) or 8 values of a scaled one; the row's cosines and sines come from L1 for all its heads.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/rope/rope_train.h"

#define THREADS 256

struct eight {
  float v[8];
};

/* W values at p: one load of 16 bytes where they are aligned. */
template <int W> static __device__ __forceinline__ struct eight load_values(const uint16_t *p, bool aligned) {
  struct eight x = {};
  if (W == 8 && aligned) {
    uint4 bits = *(const uint4 *)p;
    uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x.v[2 * i] = us_low_half(word[i]), x.v[2 * i + 1] = us_high_half(word[i]);
    return x;
  }
#pragma unroll
  for (int i = 0; i < W; i++) x.v[i] = us_bf16_to_f32(p[i]);
  return x;
}

template <int W>
static __device__ __forceinline__ void store_values(uint16_t *p, const struct eight &x, bool aligned) {
  if (W == 8 && aligned) {
    *(uint4 *)p = make_uint4(us_pair_bf16(x.v[0], x.v[1]), us_pair_bf16(x.v[2], x.v[3]),
                             us_pair_bf16(x.v[4], x.v[5]), us_pair_bf16(x.v[6], x.v[7]));
    return;
  }
#pragma unroll
  for (int i = 0; i < W; i++) p[i] = us_bf16_from_f32(x.v[i]);
}

template <int W>
static __device__ __forceinline__ void rotate(const struct us_rope_train &t, uint32_t row, uint32_t head,
                                              uint32_t first, float sign) {
  uint32_t half = t.rotary / 2, offset = t.rotated[head];
  const float *cosine = t.table + (size_t)t.position[row] * t.rotary + first, *sine = cosine + half;
  uint16_t *a = t.x + row * t.stride + offset + first, *b = a + half;
  bool aligned = offset % 8 == 0;
  struct eight low = load_values<W>(a, aligned), high = load_values<W>(b, aligned);
#pragma unroll
  for (int i = 0; i < W; i++) {
    float c = cosine[i], s = sine[i] * sign, x = low.v[i], y = high.v[i];
    low.v[i] = x * c - y * s;
    high.v[i] = y * c + x * s;
  }
  store_values<W>(a, low, aligned);
  store_values<W>(b, high, aligned);
}

/* Pieces of a row: rotated heads' pairs, then scaled heads' values, W at a time. */
template <int W>
static __global__ void __launch_bounds__(THREADS)
    rope_rows(const __grid_constant__ struct us_rope_train t, uint32_t pieces, float sign) {
  uint32_t a_head = t.rotary / 2 / W, rotated = a_head * t.rotated_heads;
  uint32_t index = blockIdx.x * THREADS + threadIdx.x, row = index / pieces, piece = index % pieces;
  if (row >= t.R) return;
  if (piece < rotated) {
    rotate<W>(t, row, piece / a_head, piece % a_head * W, sign);
    return;
  }
  uint32_t v_head = t.scaled_dim / W, offset = t.scaled[(piece - rotated) / v_head];
  uint16_t *p = t.x + row * t.stride + offset + (piece - rotated) % v_head * W;
  struct eight x = load_values<W>(p, offset % 8 == 0);
#pragma unroll
  for (int i = 0; i < W; i++) x.v[i] *= t.scale;
  store_values<W>(p, x, offset % 8 == 0);
}

static int run(const struct us_rope_train *rope, float sign, cudaStream_t stream) {
  struct us_rope_train t = *rope;
  if (t.scale == 1.0f) t.scaled_heads = 0;
  if (!t.scaled_heads) t.scaled_dim = 0;
  if (t.rotary % 2) return cudaErrorInvalidValue;
  bool wide = t.rotary / 2 % 8 == 0 && t.scaled_dim % 8 == 0 && t.stride % 8 == 0 && (uintptr_t)t.x % 16 == 0;
  uint32_t width = wide ? 8 : 1;
  uint32_t pieces = t.rotary / 2 / width * t.rotated_heads + t.scaled_dim / width * t.scaled_heads;
  size_t blocks = (t.R * pieces + THREADS - 1) / THREADS;
  if (!blocks) return cudaSuccess;
  if (blocks >= (1u << 31) / THREADS) return cudaErrorInvalidValue; /* pieces are counted in 32 bits */
  if (wide)
    rope_rows<8><<<(unsigned)blocks, THREADS, 0, stream>>>(t, pieces, sign);
  else
    rope_rows<1><<<(unsigned)blocks, THREADS, 0, stream>>>(t, pieces, sign);
  return cudaGetLastError();
}

int us_rope_train(const struct us_rope_train *rope, cudaStream_t stream) {
  return run(rope, 1.0f, stream);
}

int us_rope_train_grad(const struct us_rope_train *rope, cudaStream_t stream) {
  return run(rope, -1.0f, stream);
}
