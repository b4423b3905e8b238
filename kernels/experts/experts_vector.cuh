/* experts_vector.cuh: eight bf16 values, 16 bytes, as floats and back, and their sigmoid. */
#ifndef US_KERNELS_EXPERTS_VECTOR_CUH
#define US_KERNELS_EXPERTS_VECTOR_CUH

#include <stdint.h>

static __device__ __forceinline__ void unpack_2(uint32_t both, float v[2]) {
  v[0] = __uint_as_float(both << 16), v[1] = __uint_as_float(both & 0xffff0000u);
}

/* Rounded to nearest even. */
static __device__ __forceinline__ uint32_t pack_2(const float v[2]) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(v[1]), "f"(v[0]));
  return both;
}

static __device__ __forceinline__ void unpack_8(uint4 four, float v[8]) {
  unpack_2(four.x, v), unpack_2(four.y, v + 2), unpack_2(four.z, v + 4), unpack_2(four.w, v + 6);
}

static __device__ __forceinline__ uint4 pack_8(const float v[8]) {
  return make_uint4(pack_2(v), pack_2(v + 2), pack_2(v + 4), pack_2(v + 6));
}

/* 1 / (1 + e^-x) within 4 units of the last of 24 bits: the special-function unit, since the accurate one would be as slow as memory. */
static __device__ __forceinline__ float sigmoid(float x) {
  float power, result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

#endif
