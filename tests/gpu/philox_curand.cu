/* philox_curand.cu: our Philox on the device, on the host, and cuRAND's on the device: the same bits. */
#include "philox_cases.h"
#include "gpu_test.h"

#include <vector>

static __global__ void run_curand(uint32_t *words) {
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  philox_curand(i, words + (size_t)i * PHILOX_WORDS);
}

static __global__ void run_ours(uint32_t *words) {
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  philox_ours(i, words + (size_t)i * PHILOX_WORDS);
}

int main() {
  us_gpu_begin();
  const size_t n = (size_t)PHILOX_CASES * PHILOX_WORDS;
  std::vector<uint32_t> host(n), device(n), curand(n);
  for (uint32_t i = 0; i < PHILOX_CASES; i++) philox_ours(i, host.data() + (size_t)i * PHILOX_WORDS);
  uint32_t *words;
  US_CUDA(cudaMalloc(&words, n * sizeof *words));
  run_ours<<<PHILOX_CASES / 256, 256>>>(words);
  US_CUDA(cudaGetLastError());
  US_CUDA(cudaMemcpy(device.data(), words, n * sizeof *words, cudaMemcpyDeviceToHost));
  run_curand<<<PHILOX_CASES / 256, 256>>>(words);
  US_CUDA(cudaGetLastError());
  US_CUDA(cudaMemcpy(curand.data(), words, n * sizeof *words, cudaMemcpyDeviceToHost));
  US_CUDA(cudaFree(words));
  us_gpu_compare("philox: device = host", host.data(), device.data(), n);
  us_gpu_compare("philox: cuRAND on the device = host", host.data(), curand.data(), n);
  return us_gpu_status();
}
