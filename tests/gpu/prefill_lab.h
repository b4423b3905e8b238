/* prefill_lab.h: what the parts of the prefill lab share: rows, timing lines beside a peer, the parts.
 *
 *     struct lab_many x = lab_many_rows(512, 6144, &state);      // host values and operand rows on the device
 *     struct lab_time t = {"qkv", shape, "fp8", us, bytes, flops, lab_peer_us(M, N, K)};
 *     lab_time_report(&t);                                       // TFLOP/s, GB/s, and both as fractions
 */
#ifndef US_TESTS_GPU_PREFILL_LAB_H
#define US_TESTS_GPU_PREFILL_LAB_H

#include "kernels/prefill/prefill.h"
#include "lab_engine.h"

#define LAB_HBM 4.62e12 /* bytes/s that the streaming kernel of kernel_lab reads */

struct lab_many {
  uint32_t rows, K;
  std::vector<float> x; /* (rows, K) bf16 values: rows of 1e5, of 1e-6 and with an outlier among them */
  uint16_t *operand;    /* (rows, K) */
};
struct lab_many lab_many_rows(uint32_t rows, uint32_t K, uint64_t *state);

/* An operation's time; peer_us 0: there is none. */
struct lab_time {
  const char *op, *shape, *format;
  double us, bytes, flops, peer_us;
};
void lab_time_report(const struct lab_time *t);

/* bf16 GEMM of cuBLAS, (M, K) x (N, K)^T to FP32; 0 if cuBLAS is not there. */
double lab_peer_us(uint32_t M, uint32_t N, uint32_t K);
extern double lab_peak; /* flop/s of the peer at 8192 cubed; 0: no peer */

/* Whether two buffers of rows hold the same bits. */
void lab_same_rows(const char *check, const void *a, const void *b, size_t words);

/* The parts. */
void lab_prefill_products(uint64_t seed);
void lab_prefill_experts(uint64_t seed);
void lab_prefill_rows(uint64_t seed);
void lab_prefill_attention(uint64_t seed);

#endif
