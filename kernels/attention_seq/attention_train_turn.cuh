/* attention_train_turn.cuh: stages in shared memory between a group of four warps that copies and the groups that multiply.
 *
 *     us_turn<STAGES> turn(0);                                // a multiplying group; 1: the copying one
 *     us_turn_wait(full, turn);                               // the stage's copies have arrived: the tensor cores may read
 *     us_turn_release(empty, turn.stage, lane);               // this warp's multiplies of the stage are done
 *     turn.advance();
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_TURN_CUH
#define US_KERNELS_ATTENTION_TRAIN_TURN_CUH

#include "kernels/gpu/async.cuh"

template <int STAGES> struct us_turn {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit us_turn(uint32_t first) : stage(0), parity(first) {}
  __device__ __forceinline__ void advance(void) {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

/* Full and empty barriers of `stages` stages, one after the other: 128 copying threads, 4 GROUPS multiplying warps. */
template <int GROUPS>
static __device__ __forceinline__ void us_turn_init(uint32_t barriers, uint32_t stages) {
  if (threadIdx.x >= stages) return;
  us_barrier_init(barriers + threadIdx.x * 8, 128);
  us_barrier_init(barriers + (stages + threadIdx.x) * 8, GROUPS * 4);
}

/* Arrive when this thread's copies so far have. */
static __device__ __forceinline__ void us_turn_copied(uint32_t full) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
}

template <int STAGES>
static __device__ __forceinline__ void us_turn_wait(uint32_t full, const us_turn<STAGES> &turn) {
  us_barrier_wait(full + turn.stage * 8, turn.parity);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ void us_turn_release(uint32_t empty, uint32_t stage, uint32_t lane) {
  __syncwarp();
  if (lane == 0) us_barrier_arrive(empty + stage * 8);
}

/* Registers a thread: of the 65,536 of a multiprocessor the copying group takes 40, the others share the rest. */
template <int GROUPS> static __device__ __forceinline__ void us_turn_registers(bool copies) {
  constexpr int rest = (512 - 40) / GROUPS / 8 * 8;
  if (copies)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(rest < 240 ? rest : 240));
}

#endif
