/* async.cuh: mbarriers and bulk copies into shared memory: the few PTX instructions that weight streaming needs.
 *
 *     us_barrier_init(full, 1);
 *     us_barrier_expect(full, bytes);                       // one thread: the phase completes when the bytes are there
 *     us_bulk_load(destination, source, bytes, full);       // 16-byte aligned, a multiple of 16 bytes
 *     us_barrier_wait(full, phase);                         // all readers
 *
 * Shared-memory arguments are 32-bit addresses (us_shared_address). PTX ISA 8.0, sections on mbarrier and cp.async.bulk.
 */
#ifndef US_KERNELS_GPU_ASYNC_CUH
#define US_KERNELS_GPU_ASYNC_CUH

#include <stdint.h>

__device__ __forceinline__ uint32_t us_shared_address(const void *pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void us_barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* After the last us_barrier_init, before __syncthreads: the copy engine sees the barriers. */
__device__ __forceinline__ void us_barrier_init_fence(void) {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Arrive, and expect `bytes` of copies in this phase. */
__device__ __forceinline__ void us_barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/* Expect `bytes` more of copies in this phase, without arriving. */
__device__ __forceinline__ void us_barrier_more(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void us_barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Wait until the phase of that parity has completed; the first phase has parity 0. */
__device__ __forceinline__ void us_barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void us_bulk_load(uint32_t destination, const void *source, uint32_t bytes,
                                             uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

/* For what is read once: it makes room in L2 before anything else does. */
__device__ __forceinline__ uint64_t us_read_once(void) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void us_bulk_load_once(uint32_t destination, const void *source, uint32_t bytes,
                                                  uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

#endif
