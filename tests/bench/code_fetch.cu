/* code_fetch.cu: what running through code costs an SM, by how much code is run through again and again.
 *
 *     code_fetch [PASSES]        # TSV on stdout: code_kb, warps, streaming, kb_per_us
 *
 * The engine's warps run through the code of a dozen operations a layer. Code that an instruction cache holds issues at
 * the warps' rate; beyond that it comes from L2, a line of 128 bytes at a time, and an operation takes what its code
 * weighs (docs/perf.md). Here 1 or 16 warps a block, one block an SM, run through the first N KB of straight-line code
 * that issues an instruction a cycle; the median pass is reported, alone and beside 8 warps that read HBM. Where kb_per_us
 * falls is the size that the code of a layer has to keep below. Nothing is asserted: it is a benchmark.
 */
#include "gpu_test.h"

#include <algorithm>
#include <vector>

enum {
  SECTION_KB = 4,
  SECTIONS = 64,
  INSTRUCTIONS = SECTION_KB * 1024 / 16,
  CHAINS = 8, /* independent sums, so that latency does not hide what a fetch takes */
  STREAM_WARPS = 8,
  MAX_WARPS = 16,
};

/* 4 KB of code: volatile, so that no two sections become one and none is left out. */
static __device__ __forceinline__ void run_section(float (&sum)[CHAINS], float factor) {
#pragma unroll
  for (int i = 0; i < INSTRUCTIONS; i++)
    asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(sum[i % CHAINS]) : "f"(factor));
}

/* Read HBM round and round until the other warps of the block have done. */
static __device__ void stream(const uint4 *data, size_t words, volatile int *done, uint32_t *sink) {
  uint32_t kept = 0;
  size_t step = (size_t)gridDim.x * STREAM_WARPS * 32;
  size_t at = (size_t)blockIdx.x * STREAM_WARPS * 32 + threadIdx.x % (STREAM_WARPS * 32);
  while (!*done) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      uint4 v = __ldcs(data + (at + i * step) % words);
      kept ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    at += 8 * step;
  }
  if (kept == 0x9e3779b9) *sink = kept; /* keeps the loads */
}

/* `warps` warps run through `sections` sections `passes` times; cycles[block * passes + pass] is what warp 0 took. */
__global__ void __launch_bounds__((MAX_WARPS + STREAM_WARPS) * 32)
    run_code(int warps, int sections, int passes, const uint4 *data, size_t words, uint32_t *cycles,
             uint32_t *sink) {
  __shared__ int done;
  if (threadIdx.x == 0) done = 0;
  __syncthreads();
  if (threadIdx.x >= warps * 32) {
    stream(data, words, &done, sink);
    return;
  }
  float sum[CHAINS] = {};
  for (int pass = 0; pass < passes; pass++) {
    asm volatile("bar.sync 1, %0;" ::"r"(warps * 32) : "memory");
    long long start = clock64();
#pragma unroll
    for (int s = 0; s < SECTIONS; s++) {
      if (s == sections) break;
      run_section(sum, 0.5f);
    }
    if (threadIdx.x == 0) cycles[blockIdx.x * passes + pass] = (uint32_t)(clock64() - start);
  }
  float all = 0;
  for (float s : sum) all += s;
  if (all < 0) *sink = 1; /* the sums tend to 1 */
  __syncwarp();
  if (threadIdx.x == 0) done = 1;
}

struct bench {
  int blocks, passes;
  double ghz;
  uint4 *data;
  size_t words;
  uint32_t *cycles, *sink;
};

static double median_cycles(const bench &b, int warps, int sections, bool streaming) {
  int threads = (warps + (streaming ? STREAM_WARPS : 0)) * 32;
  run_code<<<b.blocks, threads>>>(warps, sections, b.passes, b.data, b.words, b.cycles, b.sink);
  US_CUDA(cudaGetLastError());
  US_CUDA(cudaDeviceSynchronize());
  std::vector<uint32_t> all((size_t)b.blocks * b.passes);
  US_CUDA(cudaMemcpy(all.data(), b.cycles, all.size() * sizeof all[0], cudaMemcpyDeviceToHost));
  std::vector<uint32_t> warm;
  for (size_t i = 0; i < all.size(); i++)
    if (i % b.passes > 0) warm.push_back(all[i]);
  std::nth_element(warm.begin(), warm.begin() + warm.size() / 2, warm.end());
  return warm[warm.size() / 2];
}

int main(int argc, char **argv) {
  us_gpu_begin();
  us_gpu_watchdog(60);
  bench b = {};
  b.passes = argc > 1 ? atoi(argv[1]) : 32;
  if (b.passes < 2 || b.passes > 1000) {
    fprintf(stderr, "code_fetch: PASSES is %s, not 2 to 1000\n", argv[1]);
    return 2;
  }
  int khz;
  US_CUDA(cudaDeviceGetAttribute(&b.blocks, cudaDevAttrMultiProcessorCount, 0));
  US_CUDA(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
  b.ghz = khz / 1e6;
  b.words = ((size_t)1 << 31) / sizeof *b.data;
  US_CUDA(cudaMalloc(&b.data, b.words * sizeof *b.data));
  US_CUDA(cudaMemset(b.data, 0, b.words * sizeof *b.data));
  US_CUDA(cudaMalloc(&b.cycles, (size_t)b.blocks * b.passes * sizeof *b.cycles));
  US_CUDA(cudaMalloc(&b.sink, sizeof *b.sink));

  fprintf(stderr, "%s, %d SMs, %.2f GHz\n", us_gpu_name, b.blocks, b.ghz);
  printf("code_kb\twarps\tstreaming\tkb_per_us\n");
  for (int streaming = 0; streaming < 2; streaming++)
    for (int warps : {1, (int)MAX_WARPS})
      for (int sections = 2; sections <= SECTIONS; sections += sections < 16 ? 2 : 4) {
        double kb = sections * SECTION_KB;
        double us = median_cycles(b, warps, sections, streaming) / b.ghz / 1000;
        printf("%.0f\t%d\t%d\t%.2f\n", kb, warps, streaming, kb / us);
      }
  return 0;
}
