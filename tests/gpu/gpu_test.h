/* gpu_test.h: what the GPU test programs share: one JSON line a check on stdout, and an exit status.
 *
 *     int main() {
 *       us_gpu_begin();                                            // exits 77 (skipped) without a GPU
 *       us_gpu_report("philox_curand", checked, mismatches, first_bad);
 *       return us_gpu_status();                                    // 0 all well, 1 a check failed
 *     }
 *
 * us_gpu_watchdog(60) ends a program whose kernel hangs, with status 5.
 * US_CUDA(call) ends the program with status 5 when a CUDA call fails.
 */
#ifndef US_TESTS_GPU_TEST_H
#define US_TESTS_GPU_TEST_H

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <csignal>
#include <cuda_runtime.h>
#include <unistd.h>

#define US_GPU_SKIPPED 77

inline bool us_gpu_failed; /* one for all parts of a program */
inline char us_gpu_name[256] = "none";

#define US_CUDA(call)                                                                                        \
  do {                                                                                                       \
    cudaError_t us_error = (call);                                                                           \
    if (us_error != cudaSuccess) {                                                                           \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(us_error));           \
      exit(5);                                                                                               \
    }                                                                                                        \
  } while (0)

static inline void us_gpu_begin(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    fprintf(stderr, "no GPU: skipped\n");
    exit(US_GPU_SKIPPED);
  }
  cudaDeviceProp properties;
  US_CUDA(cudaGetDeviceProperties(&properties, 0));
  snprintf(us_gpu_name, sizeof us_gpu_name, "%s", properties.name);
}

static void us_gpu_hung(int) {
  static const char message[] = "a kernel hangs: the watchdog ends the program\n";
  if (write(2, message, sizeof message - 1) < 0) _exit(4);
  _exit(5);
}

/* Under a checker ($US_TEST_WATCHDOG, seconds) everything takes longer and times mean nothing: shapes are small, and few. */
static inline unsigned us_gpu_patience(void) {
  const char *text = getenv("US_TEST_WATCHDOG");
  return text && atoi(text) > 0 ? (unsigned)atoi(text) : 0;
}

/* End the program with status 5 after so many seconds: the driver then frees a GPU that a kernel would occupy for ever. */
static inline void us_gpu_watchdog(unsigned seconds) {
  signal(SIGALRM, us_gpu_hung);
  alarm(us_gpu_patience() ? us_gpu_patience() : seconds);
}

/* A launch's watchdog, ns. */
static inline uint64_t us_gpu_timeout(uint64_t usual) {
  return us_gpu_patience() ? us_gpu_patience() * UINT64_C(1000000000) : usual;
}

/* One record: how many values were compared, how many differed, and where the first difference was. */
static inline void us_gpu_report(const char *check, uint64_t checked, uint64_t mismatches,
                                 uint64_t first_bad) {
  bool ok = checked > 0 && mismatches == 0;
  if (!ok) us_gpu_failed = true;
  printf("{\"check\": \"%s\", \"ok\": %s, \"device\": \"%s\", \"checked\": %llu, \"mismatches\": %llu", check,
         ok ? "true" : "false", us_gpu_name, (unsigned long long)checked, (unsigned long long)mismatches);
  if (mismatches) printf(", \"first_bad\": %llu", (unsigned long long)first_bad);
  printf("}\n");
  fflush(stdout);
}

static inline int us_gpu_status(void) {
  return us_gpu_failed ? 1 : 0;
}

/* Compare two arrays of words and report. */
static inline void us_gpu_compare(const char *check, const uint32_t *expected, const uint32_t *got,
                                  uint64_t n) {
  uint64_t bad = 0, first = 0;
  for (uint64_t i = 0; i < n; i++)
    if (expected[i] != got[i] && bad++ == 0) first = i;
  us_gpu_report(check, n, bad, first);
}

#endif
