/* codec_bits.cu: the scalar codecs of bf16, FP8 and MXFP4: the device gives the host's bits, and CUDA's own
 * conversions agree where they exist. Every float whose low 7 bits are 0 or 1: 2^26 of them, ties and neighbours
 * included; every code and every scale byte. */
#include "formats/bf16.h"
#include "formats/fp8.h"
#include "formats/mxfp4.h"
#include "gpu_test.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <vector>

#define CHUNK (1u << 22)
#define TOTAL (1u << 26)

static __host__ __device__ inline uint32_t float_word(uint32_t i) {
  return (i >> 1) << 7 | (i & 1u);
}

/* All conversions of one float, mixed into a word so that a difference in any shows. */
static __host__ __device__ inline uint32_t encode_all(uint32_t word) {
  float x = us_f32_from_bits(word);
  uint32_t magnitude = word & 0x7fffffffu, mixed = us_bf16_from_f32(x);
  mixed = mixed * 0x9e3779b1u + us_fp8_from_f32(x);
  if (magnitude > 0x7f800000u) return mixed;
  mixed = mixed * 0x9e3779b1u + us_e2m1_from_f32(x);
  if (magnitude == 0x7f800000u) return mixed;
  float amax = us_f32_from_bits(magnitude);
  for (int rule = 0; rule < US_SCALE_RULE_COUNT; rule++)
    mixed = mixed * 0x9e3779b1u + us_mxfp4_scale_byte(amax, (enum us_scale_rule)rule);
  for (int kind = 0; kind < US_FP8_SCALE_COUNT; kind++)
    mixed = mixed * 0x9e3779b1u + us_f32_bits(us_fp8_block_scale(amax, (enum us_fp8_scale)kind));
  return mixed;
}

static __host__ __device__ inline uint32_t decode_all(uint32_t i) {
  uint32_t mixed = us_f32_bits(us_fp8_to_f32((uint8_t)i));
  mixed = mixed * 0x9e3779b1u + us_f32_bits(us_e2m1_to_f32((uint8_t)(i & 15u)));
  mixed = mixed * 0x9e3779b1u + us_f32_bits(us_e8m0_to_f32((uint8_t)i));
  mixed = mixed * 0x9e3779b1u + us_f32_bits(us_e8m0_inverse((uint8_t)i));
  return mixed * 0x9e3779b1u + us_f32_bits(us_bf16_to_f32((uint16_t)i));
}

static __global__ void run_encode(uint32_t first, uint32_t *results) {
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  results[i] = encode_all(float_word(first + i));
}

static __global__ void run_decode(uint32_t *results) {
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  results[i] = decode_all(i);
}

/* Count the floats that CUDA's intrinsics convert differently (NaN patterns are CUDA's own, so left out). */
static __global__ void run_intrinsics(uint32_t first, unsigned long long *bad) {
  uint32_t word = float_word(first + blockIdx.x * blockDim.x + threadIdx.x);
  if ((word & 0x7fffffffu) > 0x7f800000u) return;
  float x = us_f32_from_bits(word);
  bool bf16 = __bfloat16_as_ushort(__float2bfloat16_rn(x)) == us_bf16_from_f32(x);
  bool fp8 = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3) == us_fp8_from_f32(x);
  if (!bf16 || !fp8) atomicAdd(bad, 1ull);
}

int main() {
  us_gpu_begin();
  std::vector<uint32_t> results(CHUNK), expected(65536);
  uint32_t *device;
  unsigned long long *device_bad, differing = 0;
  US_CUDA(cudaMalloc(&device, CHUNK * sizeof *device));
  US_CUDA(cudaMalloc(&device_bad, sizeof *device_bad));
  US_CUDA(cudaMemset(device_bad, 0, sizeof *device_bad));
  uint64_t bad = 0, first_bad = 0;
  for (uint32_t first = 0; first < TOTAL; first += CHUNK) {
    run_encode<<<CHUNK / 256, 256>>>(first, device);
    run_intrinsics<<<CHUNK / 256, 256>>>(first, device_bad);
    US_CUDA(cudaGetLastError());
    US_CUDA(cudaMemcpy(results.data(), device, CHUNK * sizeof *device, cudaMemcpyDeviceToHost));
    for (uint32_t i = 0; i < CHUNK; i++)
      if (results[i] != encode_all(float_word(first + i)) && bad++ == 0) first_bad = float_word(first + i);
  }
  us_gpu_report("bf16, fp8, mxfp4 encode: device = host", TOTAL, bad, first_bad);
  US_CUDA(cudaMemcpy(&differing, device_bad, sizeof differing, cudaMemcpyDeviceToHost));
  us_gpu_report("bf16, fp8 encode: CUDA's conversions = ours", TOTAL, differing, 0);
  run_decode<<<65536 / 256, 256>>>(device);
  US_CUDA(cudaGetLastError());
  US_CUDA(cudaMemcpy(results.data(), device, 65536 * sizeof *device, cudaMemcpyDeviceToHost));
  for (uint32_t i = 0; i < 65536; i++) expected[i] = decode_all(i);
  us_gpu_compare("bf16, fp8, mxfp4 decode: device = host", expected.data(), results.data(), 65536);
  US_CUDA(cudaFree(device));
  US_CUDA(cudaFree(device_bad));
  return us_gpu_status();
}
