/* isa.c: which instruction set the CPU kernels use. */
#include "kernels/cpu/isa.h"

const char *us_isa_name(enum us_isa isa) {
  static const char *const names[US_ISA_COUNT] = {"best", "plain", "avx2", "avx512"};
  return (unsigned)isa < US_ISA_COUNT ? names[isa] : "unknown";
}

bool us_isa_supported(enum us_isa isa) {
#if defined(__x86_64__)
  if (isa == US_ISA_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == US_ISA_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa == US_ISA_BEST || isa == US_ISA_PLAIN;
}

enum us_isa us_isa_resolve(enum us_isa isa) {
  if (isa != US_ISA_BEST) return us_isa_supported(isa) ? isa : US_ISA_PLAIN;
  if (us_isa_supported(US_ISA_AVX512)) return US_ISA_AVX512;
  return us_isa_supported(US_ISA_AVX2) ? US_ISA_AVX2 : US_ISA_PLAIN;
}
