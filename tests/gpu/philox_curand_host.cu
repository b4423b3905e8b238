/* philox_curand_host.cu: our Philox against cuRAND's, both on the host: runs where there is nvcc and no GPU.
 *
 * cuRAND's device functions are inline and take their qualifiers from a macro.
 */
#define QUALIFIERS static inline __host__ __device__
#include "philox_cases.h"
#include "gpu_test.h"

#include <vector>

int main() {
  const size_t n = (size_t)PHILOX_CASES * PHILOX_WORDS;
  std::vector<uint32_t> ours(n), curand(n);
  for (uint32_t i = 0; i < PHILOX_CASES; i++) {
    philox_ours(i, ours.data() + (size_t)i * PHILOX_WORDS);
    philox_curand(i, curand.data() + (size_t)i * PHILOX_WORDS);
  }
  us_gpu_compare("philox: cuRAND on the host = ours", ours.data(), curand.data(), n);
  return us_gpu_status();
}
