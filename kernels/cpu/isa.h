/* isa.h: which instruction set the CPU kernels use.
 *
 *     enum us_isa isa = us_isa_resolve(US_ISA_BEST);     // once, when an executor is created
 *     us_linear(&(struct us_linear_args){..., .isa = isa});
 *
 * All of them give the same bits: 16 FP32 lanes, fma where written, a fixed tree (docs/numerics.md). Tests
 * and benchmarks name one; everything else says US_ISA_BEST (0).
 */
#ifndef US_KERNELS_CPU_ISA_H
#define US_KERNELS_CPU_ISA_H

#include <stdbool.h>

enum us_isa { US_ISA_BEST, US_ISA_PLAIN, US_ISA_AVX2, US_ISA_AVX512, US_ISA_COUNT };

/* "best", "plain", "avx2", "avx512". */
const char *us_isa_name(enum us_isa isa);

/* Whether this machine and this build can run it. */
bool us_isa_supported(enum us_isa isa);

/* The instruction set that will run: the widest supported one for US_ISA_BEST, plain C for an unsupported
 * one. */
enum us_isa us_isa_resolve(enum us_isa isa);

#endif
