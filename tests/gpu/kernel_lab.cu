/* kernel_lab.cu: the engine's operations, checked and timed: one JSON line an operation and shape, its correctness beside its GB/s
 * and its fraction of the streaming ceiling measured in the same run.
 *
 * The ceiling: device/ceiling.h. Truth: weights as stored, products and sums in
 * double; what may be off is followed through the engine's order of sums (lab_dot), not chosen. Weights are made on the device. */
extern "C" {
#include "device/ceiling.h"
}
#include "lab_engine.h"

#include <cstring>

/* The ceiling that everything else measures too. */
static void measure_ceiling(void) {
  if (us_gpu_patience()) return;
  size_t bytes = (size_t)16 << 30;
  struct us_err err = {};
  uint8_t *data;
  US_CUDA(cudaMalloc(&data, bytes));
  US_CUDA(cudaMemset(data, 0x5a, bytes));
  if (us_device_ceiling(data, bytes, 0, &lab_ceiling, &err) != US_OK) {
    fprintf(stderr, "%s\n", err.message);
    exit(1);
  }
  printf("{\"ceiling\": \"HBM read\", \"device\": \"%s\", \"gbs\": %.0f}\n", us_gpu_name, lab_ceiling * 1e-9);
  US_CUDA(cudaFree(data));
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
