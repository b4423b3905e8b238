/* kernel_lab.cu: the engine's operations, checked and timed: one JSON line an operation and shape, its correctness beside its GB/s
 * and its fraction of the streaming ceiling measured in the same run.
 *
 * The ceiling: what HBM gives to every SM reading through a ring of bulk copies. Truth: weights as stored, products and sums in
 * double; what may be off is followed through the engine's order of sums (lab_dot), not chosen. Weights are made on the device. */
#include "kernels/gpu/async.cuh"
#include "lab_engine.h"

#include <cstring>

/* The ceiling: every SM streams chunks through a ring and looks at each 16 bytes once. */
template <int CHUNK, int STAGES>
static __global__ void __launch_bounds__(160, 1)
    stream_ceiling(const uint8_t *data, size_t chunks, uint32_t *out) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  if (threadIdx.x == 0)
    for (int s = 0; s < STAGES; s++) {
      us_barrier_init(us_shared_address(&full[s]), 1);
      us_barrier_init(us_shared_address(&empty[s]), 4);
    }
  us_barrier_init_fence();
  __syncthreads();
  int stage = 0;
  uint32_t phase = 0, mixed = 0;
  for (size_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    uint32_t f = us_shared_address(&full[stage]), e = us_shared_address(&empty[stage]);
    if (threadIdx.x == 128) {
      us_barrier_wait(e, phase ^ 1);
      us_barrier_expect(f, CHUNK);
      us_bulk_load(us_shared_address(ring + stage * CHUNK), data + c * CHUNK, CHUNK, f);
    } else if (threadIdx.x < 128) {
      us_barrier_wait(f, phase);
      const uint4 *chunk = (const uint4 *)(ring + stage * CHUNK);
      for (int i = threadIdx.x; i < CHUNK / 16; i += 128)
        mixed ^= chunk[i].x ^ chunk[i].y ^ chunk[i].z ^ chunk[i].w;
      __syncwarp();
      if (threadIdx.x % 32 == 0) us_barrier_arrive(e);
    }
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  if (mixed == 0x12345u) *out = mixed;
}

template <int CHUNK, int STAGES> static void try_ceiling(const uint8_t *data, size_t bytes, uint32_t *out) {
  auto kernel = stream_ceiling<CHUNK, STAGES>;
  int blocks, device;
  US_CUDA(cudaGetDevice(&device));
  US_CUDA(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
  US_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, CHUNK * STAGES));
  double us = lab_median_us([&]() {
    kernel<<<blocks, 160, CHUNK * STAGES>>>(data, bytes / CHUNK, out);
    return cudaGetLastError();
  });
  double rate = (double)bytes / us * 1e6;
  if (rate > lab_ceiling) lab_ceiling = rate;
  printf("{\"ceiling\": \"HBM read, %d KB x %d\", \"device\": \"%s\", \"us\": %.1f, \"gbs\": %.0f}\n",
         CHUNK >> 10, STAGES, us_gpu_name, us, rate * 1e-9);
}

/* The best of three rings: which one it is differs between machines. */
static void measure_ceiling(void) {
  if (us_gpu_patience()) return;
  size_t bytes = (size_t)16 << 30;
  uint8_t *data;
  uint32_t *out;
  US_CUDA(cudaMalloc(&data, bytes));
  US_CUDA(cudaMalloc(&out, sizeof *out));
  US_CUDA(cudaMemset(data, 0x5a, bytes));
  try_ceiling<32768, 6>(data, bytes, out);
  try_ceiling<16384, 12>(data, bytes, out);
  try_ceiling<8192, 8>(data, bytes, out);
  US_CUDA(cudaFree(data));
  US_CUDA(cudaFree(out));
}

struct part {
  const char *name;
  void (*run)(uint64_t seed);
};

static const struct part parts[] = {{"gemm", lab_gemm},     {"route", lab_route}, {"experts", lab_experts},
                                    {"gather", lab_gather}, {"wide", lab_wide},   {"reduce", lab_reduce},
                                    {"chain", lab_chain}};

/* kernel_lab [SEED [PART...]] */
int main(int argc, char **argv) {
  us_gpu_begin();
  us_gpu_watchdog(110);
  uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20261120u;
  fprintf(stderr, "seed %llu\n", (unsigned long long)seed);
  measure_ceiling();
  for (const struct part &part : parts) {
    bool wanted = argc <= 2;
    for (int i = 2; i < argc; i++) wanted = wanted || !strcmp(argv[i], part.name);
    if (wanted) part.run(seed);
  }
  return us_gpu_status();
}
