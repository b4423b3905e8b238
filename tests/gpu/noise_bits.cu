/* noise_bits.cu: logarithm, uniform, exponential and Gumbel noise: the device gives the host's bits.
 *
 * Every 61st of the 2^32 words, as a float for us_logf and as random bits for the others: 70 million of each.
 */
#include "base/philox.h"
#include "gpu_test.h"

#include <vector>

#define STRIDE 61u
#define CHUNK  (1u << 22)

enum { FUNCTIONS = 4 };

/* NaN has many patterns and the device makes another one than the host; all count as one. */
static __host__ __device__ inline uint32_t canonical(float x) {
  return x != x ? 0x7fc00000u : us_float_bits(x);
}

static __host__ __device__ inline uint32_t evaluate(int function, uint32_t word) {
  switch (function) {
  case 0:
    return canonical(us_logf(us_float_from_bits(word)));
  case 1:
    return canonical(us_gumbel_bits(word));
  case 2:
    return canonical(us_exponential_bits(word));
  default:
    return canonical(us_gumbel(us_uniform(word)));
  }
}

static __global__ void run(int function, uint64_t first, uint32_t *results) {
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  results[i] = evaluate(function, (uint32_t)((first + i) * STRIDE));
}

int main() {
  us_gpu_begin();
  static const char *const names[FUNCTIONS] = {"us_logf: device = host", "us_gumbel_bits: device = host",
                                               "us_exponential_bits: device = host",
                                               "us_gumbel: device = host"};
  const uint64_t total = 0x100000000ull / STRIDE / CHUNK * CHUNK;
  std::vector<uint32_t> results(CHUNK);
  uint32_t *device;
  US_CUDA(cudaMalloc(&device, CHUNK * sizeof *device));
  for (int function = 0; function < FUNCTIONS; function++) {
    uint64_t bad = 0, first_bad = 0;
    for (uint64_t first = 0; first < total; first += CHUNK) {
      run<<<CHUNK / 256, 256>>>(function, first, device);
      US_CUDA(cudaGetLastError());
      US_CUDA(cudaMemcpy(results.data(), device, CHUNK * sizeof *device, cudaMemcpyDeviceToHost));
      for (uint32_t i = 0; i < CHUNK; i++) {
        uint32_t word = (uint32_t)((first + i) * STRIDE);
        if (results[i] != evaluate(function, word) && bad++ == 0) first_bad = word;
      }
    }
    us_gpu_report(names[function], total, bad, first_bad);
  }
  US_CUDA(cudaFree(device));
  return us_gpu_status();
}
