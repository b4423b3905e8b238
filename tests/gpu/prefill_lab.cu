/* prefill_lab.cu: the operations of a prompt pass, checked and timed: one JSON line a check, one a time.
 *
 * Truth: weights as stored, sums in double; what may be off is followed through the kernels' order of sums. Bits: a row alone gives
 * what it gives among 512. Speed beside a cuBLAS bf16 product of the same sizes, measured in the same run. */
#include "formats/bf16.h"
#include "prefill_lab.h"

#include <cstring>
#include <cublas_v2.h>
#include <dlfcn.h>

double lab_peak;

struct lab_many lab_many_rows(uint32_t rows, uint32_t K, uint64_t *state) {
  static const float scale[16] = {1, 1, 1e5f, 1, 1e-6f, 1, 1, 0.01f, 1, 3, 1, 0.1f, 1, 1, 1, 1};
  struct lab_many many = {rows, K, {}, NULL};
  std::vector<uint16_t> bits((size_t)rows * K);
  many.x.resize(bits.size());
  for (size_t i = 0; i < bits.size(); i++) {
    float uniform = (float)(lab_random(state) >> 40) * 0x1p-23f - 1.0f;
    bool outlier = i / K % 16 == 7 && i % K == 11;
    many.x[i] = us_bf16_round(uniform * scale[i / K % 16] * (outlier ? 4000.0f : 1.0f));
    bits[i] = us_bf16_from_f32(many.x[i] * US_ENGINE_OPERAND_UNIT);
  }
  many.operand = lab_upload(bits);
  return many;
}

void lab_same_rows(const char *check, const void *a, const void *b, size_t words) {
  std::vector<uint32_t> left = lab_download((const uint32_t *)a, words),
                        right = lab_download((const uint32_t *)b, words);
  lab_same_bits(check, left.data(), right.data(), words);
}

void lab_time_report(const struct lab_time *t) {
  double tflops = t->flops / t->us * 1e-6, gbs = t->bytes / t->us * 1e-3;
  printf("{\"time\": \"%s\", \"shape\": \"%s\", \"format\": \"%s\", \"device\": \"%s\", \"us\": %.1f, "
         "\"tflops\": %.0f, "
         "\"gbs\": %.0f, \"of_hbm\": %.3f",
         t->op, t->shape, t->format, us_gpu_name, t->us, tflops, gbs, gbs * 1e9 / LAB_HBM);
  if (lab_peak > 0) printf(", \"of_peak\": %.3f", tflops * 1e12 / lab_peak);
  if (t->peer_us > 0) printf(", \"cublas_us\": %.1f, \"times_cublas\": %.2f", t->peer_us, t->us / t->peer_us);
  printf("}\n");
  fflush(stdout);
}

/* ---- the peer ---------------------------------------------------------------------------------------------------- */

/* cuBLAS, opened when the program runs: the machine may not have it. */
typedef cublasStatus_t (*gemm_function)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                                        const void *, const void *, cudaDataType, int, const void *,
                                        cudaDataType, int, const void *, void *, cudaDataType, int,
                                        cublasComputeType_t, cublasGemmAlgo_t);
struct peer {
  decltype(&cublasCreate) create;
  gemm_function gemm;
  cublasHandle_t handle;
};

static const struct peer *open_peer(void) {
  static struct peer peer;
  static bool tried;
  if (tried) return peer.gemm ? &peer : NULL;
  tried = true;
  void *library = dlopen("libcublas.so.13", RTLD_NOW);
  if (!library) library = dlopen("libcublas.so.12", RTLD_NOW);
  if (!library) return fprintf(stderr, "no cuBLAS to compare with: %s\n", dlerror()), nullptr;
  peer.create = (decltype(peer.create))dlsym(library, "cublasCreate_v2");
  gemm_function gemm = (gemm_function)dlsym(library, "cublasGemmEx");
  if (!peer.create || !gemm || peer.create(&peer.handle) != CUBLAS_STATUS_SUCCESS) return NULL;
  peer.gemm = gemm;
  return &peer;
}

double lab_peer_us(uint32_t M, uint32_t N, uint32_t K) {
  const struct peer *peer = open_peer();
  if (!peer) return 0;
  uint64_t state = 5;
  size_t left = (size_t)M * K, right = (size_t)N * K;
  std::vector<uint16_t> bits(1 << 20); /* random, since power and so the clock depend on the data */
  for (uint16_t &b : bits) b = us_bf16_from_f32((float)(lab_random(&state) >> 40) * 0x1p-23f - 1.0f);
  uint16_t *x, *w;
  float *y;
  US_CUDA(cudaMalloc(&x, left * 2));
  US_CUDA(cudaMalloc(&w, right * 2));
  US_CUDA(cudaMalloc(&y, (size_t)M * N * 4));
  for (size_t i = 0; i < left; i += bits.size())
    US_CUDA(cudaMemcpy(x + i, bits.data(), std::min(bits.size(), left - i) * 2, cudaMemcpyHostToDevice));
  for (size_t i = 0; i < right; i += bits.size())
    US_CUDA(cudaMemcpy(w + i, bits.data(), std::min(bits.size(), right - i) * 2, cudaMemcpyHostToDevice));
  float one = 1, zero = 0;
  double us = lab_median_us([&]() {
    cublasStatus_t status = peer->gemm(peer->handle, CUBLAS_OP_T, CUBLAS_OP_N, (int)N, (int)M, (int)K, &one,
                                       w, CUDA_R_16BF, (int)K, x, CUDA_R_16BF, (int)K, &zero, y, CUDA_R_32F,
                                       (int)N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
  });
  US_CUDA(cudaFree(x));
  US_CUDA(cudaFree(w));
  US_CUDA(cudaFree(y));
  return us;
}

static void measure_peak(void) {
  double us = lab_peer_us(8192, 8192, 8192);
  if (us <= 0) return;
  lab_peak = 2.0 * 8192 * 8192 * 8192 / us * 1e6;
  printf("{\"peak\": \"cuBLAS bf16, 8192 cubed\", \"device\": \"%s\", \"us\": %.1f, \"tflops\": %.0f}\n",
         us_gpu_name, us, lab_peak * 1e-12);
  fflush(stdout);
}

/* ------------------------------------------------------------------------------------------------------------------ */

struct part {
  const char *name;
  void (*run)(uint64_t seed);
};

static const struct part parts[] = {{"products", lab_prefill_products},
                                    {"experts", lab_prefill_experts},
                                    {"rows", lab_prefill_rows},
                                    {"attention", lab_prefill_attention}};

/* prefill_lab [SEED [PART...]] */
int main(int argc, char **argv) {
  us_gpu_begin();
  us_gpu_watchdog(90);
  uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20261120u;
  fprintf(stderr, "seed %llu\n", (unsigned long long)seed);
  measure_peak();
  for (const struct part &part : parts) {
    bool wanted = argc <= 2;
    for (int i = 2; i < argc; i++) wanted = wanted || !strcmp(argv[i], part.name);
    if (wanted) part.run(seed);
  }
  return us_gpu_status();
}
