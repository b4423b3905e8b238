/* mma.cuh: one tensor-core multiply and the decoding of page words into its operands.
 *
 *     uint32_t a[4];
 *     us_mxfp4_fragment(word, a);            // 16 rows x 16 columns of weights, times 2^-126
 *     us_mma_bf16(d, a, b0, b1, c);          // d (16 rows x 8 tokens, FP32) = a b + c
 *
 * Operand layouts: PTX ISA, mma.m16n8k16. d[0], d[1]: row lane / 4, tokens 2 (lane % 4) and + 1; d[2], d[3]: row + 8.
 * Products of bf16 are exact, subnormal operands included; the sum of one instruction is truncated to about 2^-22 of its
 * largest term.
 */
#ifndef US_KERNELS_GPU_MMA_CUH
#define US_KERNELS_GPU_MMA_CUH

#include <stdint.h>

__device__ __forceinline__ void us_mma_bf16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1,
                                            const float c[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

/* 8 MXFP4 codes (kernels/pages/pages.h) to 4 registers of 2 bf16: 8 instructions, of which the pipe for logic takes 6. The
 * product moves the four bits of register 3, which lie apart, in three steps of which no two meet. */
__device__ __forceinline__ void us_mxfp4_fragment(uint32_t word, uint32_t a[4]) {
  const uint32_t code = 0x81c081c0u;
  uint32_t turned = __funnelshift_l(word, word, 6);
  a[0] = word & code;
  a[1] = (word * 8u) & code;
  a[2] = turned & code;
  a[3] = ((turned & 0x001b001bu) * 0x1084u) & code;
}

/* 4 FP8 codes to 2 registers of 2 bf16: 4 instructions. */
__device__ __forceinline__ void us_fp8_fragment(uint32_t word, uint32_t a[2]) {
  const uint32_t code = 0x87f087f0u;
  a[0] = __funnelshift_l(word, word, 12) & code;
  a[1] = (word ^ word * 16u) & code;
}

#endif
