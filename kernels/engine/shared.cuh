/* shared.cuh: a block's shared memory, and how a thread finds its block, operation, rank and launch there.
 *
 *     struct us_engine_block *b = us_engine_self();           // this warp's view
 *     const struct us_engine_op *op = us_engine_fetched_op(b);  // compute warps: their operation
 *
 * Nothing that an operation needs is kept by the one before. A value kept across an operation lies on the stack, since the loops want all
 * registers; an acquire has emptied the first-level cache of it, so that it comes from L2, a quarter to half a microsecond a word. What is
 * found anew is found by constants and the thread's number.
 */
#ifndef US_KERNELS_ENGINE_SHARED_CUH
#define US_KERNELS_ENGINE_SHARED_CUH

#include "kernels/engine/engine.h"
#include "kernels/gpu/async.cuh"
#include <stddef.h>

#define US_ENGINE_STAGES  5
#define US_ENGINE_THREADS 640 /* 20 warps: registers are shared out to groups of 4 */
#define US_ENGINE_COMPUTE (US_ENGINE_COMPUTE_WARPS * 32)
/* Behind the streaming warp: the first thread of two epilogue warps. */
#define US_ENGINE_EPILOGUE  (US_ENGINE_COMPUTE + 32)
#define US_ENGINE_EPILOGUES 2
/* The last warp plans attention ahead (attention_ahead.cuh). */
#define US_ENGINE_PLANNER (US_ENGINE_THREADS - 32)
#define US_ENGINE_FILLERS                                                                                    \
  2 /* threads that a stage of the ring waits for before its bytes count as complete */
/* Partial sums of a compute warp: the second half of a tile starts 16 banks after the first. */
#define US_ENGINE_PARTIAL 272
#define US_ENGINE_SCRATCH 14336
/* Tiles whose items are written down (gemm.cuh). A tile's place is written two tiles ahead, when its block has streamed at most a
 * ring beyond what the compute warps are at, and these at most two tiles beyond what the epilogue has read: 11 in all. */
#define US_ENGINE_ITEMS 16

/* Where code lies. An SM's instruction cache holds some 128 KB of code that is run through again and again; a layer has about as much, and
 * what lies scattered evicts itself. Called functions stand in the machine code in the order of their mangled names, so those that a layer
 * of a published model does not call (once a round, other head sizes and formats, long contexts, reports) are in this namespace,
 * whose names come last: the others stand side by side behind the kernel's own code. */
namespace us_rare {}

/* The experts that rows chose, ascending id, in slots. Pairs are numbered expert by expert, rows ascending. Of one row tile: a slot an
 * expert. Of several (gather.cuh): a slot up to 8 pairs of an expert, whose weights and rows lie by their numbers. */
struct us_engine_active {
  union {
    alignas(16) float weight[US_ENGINE_ACTIVE][US_ENGINE_ROWS]; /* routing weight, or 0 */
    float pair_weight[US_ENGINE_SLOTS];
  };
  union {
    int16_t pair[US_ENGINE_ACTIVE][US_ENGINE_ROWS]; /* number, or -1: the row does not use this expert */
    uint8_t row[US_ENGINE_SLOTS];
  };
  uint16_t expert[US_ENGINE_ACTIVE];
  uint32_t brief[US_ENGINE_SLOTS]; /* us_engine_brief: what streaming needs of it, in one load */
  uint32_t count;
};
/* An expert, its slot's first pair, and how many pairs the slot has. */
static __device__ __forceinline__ uint32_t us_engine_brief(uint32_t expert, uint32_t first, uint32_t pairs) {
  return expert | first << 16 | pairs << 28;
}
static __device__ __forceinline__ uint32_t us_engine_brief_expert(uint32_t brief) {
  return brief & 0xffffu;
}
static __device__ __forceinline__ uint32_t us_engine_brief_first(uint32_t brief) {
  return brief >> 16 & 0xfffu;
}
static __device__ __forceinline__ uint32_t us_engine_brief_pairs(uint32_t brief) {
  return brief >> 28;
}

/* Rows that were routed last (route.cuh). */
struct us_engine_routed {
  uint64_t seed[US_ENGINE_ROWS];
  uint32_t exists[US_ENGINE_ROWS], position[US_ENGINE_ROWS], sample[US_ENGINE_ROWS];
  uint32_t pass; /* round, program and row tile; 0: none yet */
};

/* One warp's view, in shared memory: the same for all its lanes. (On the stack it would be 640 copies, more than the first-level
 * cache holds beside the ring.) */
struct us_engine_block {
  const struct us_engine_launch *launch; /* without its ranks */
  const struct us_engine_rank *rank;
  uint32_t index, blocks; /* of this rank's blocks */
  uint32_t grid_block;    /* in the launch */
  uint32_t role;
  uint32_t round; /* of the launch */
  uint32_t op_index;
  uint32_t fetched;      /* compute: which of us_engine_shared.op it is */
  uint32_t stage, phase; /* cursor in the ring */
  uint32_t tile;         /* of products: how many this role has passed, and so partial-sum buffers used */
  uint32_t until;        /* of a warp of several row tiles: with which `tile` its slot ends */
  uint32_t routes;       /* ROUTE operations passed */
  uint32_t attentions;   /* ATTENTION operations passed that may take the ring (attention_ring.cuh) */
  uint32_t items[2];     /* compute: a product's tiles that are dealt out to this block */
  uint32_t seen[2], seen_round; /* warp 0: operations of a round that it last found done, plus 1 */
  uint32_t span,
      span_end; /* engine_profile.cu: this role's next interval, and the end of its room; 0: not recorded */
};

#define US_ENGINE_FETCHED                                                                                    \
  4 /* operations in shared memory: the last one, this one, the next, and the one being fetched */

/* Dynamic shared memory. An acquire empties the first-level cache, so what an operation reads again and again about itself, its
 * rank and its launch lies here: from memory, each first look would cost a microsecond. Compute warps may use `partial` and
 * `scratch` (contiguous, us_engine_scratch) inside an operation other than GEMM and DOWN, after us_engine_drain; DOWN has `scratch`
 * (struct us_down_room). */
struct us_engine_shared {
  uint8_t ring[US_ENGINE_STAGES][US_ENGINE_STAGE_BYTES];
  float partial[2][US_ENGINE_COMPUTE_WARPS][US_ENGINE_PARTIAL];
  uint8_t scratch[US_ENGINE_SCRATCH];
  struct us_engine_active active;
  uint64_t full[US_ENGINE_STAGES], empty[US_ENGINE_STAGES]; /* of the ring */
  uint64_t sums_full[2], sums_empty[2];                     /* of partial */
  uint64_t routed;                                          /* one phase a ROUTE operation */
  uint64_t listed; /* the other roles have left the list before a ROUTE operation */
  uint64_t ended;  /* one phase a round */
  uint64_t heard;  /* the other roles know that a round has ended, one phase a round: none falls two behind */
  struct us_engine_block warp[US_ENGINE_THREADS / 32];
  uint32_t stop[2]; /* by the parity of a round: none follows it */
  uint32_t entered; /* the operation of the launch that thread 0 has come to; before the first: -1 */
  uint32_t planned; /* attention up to operation planned - 1 of the launch is planned */
  uint32_t decided,
      takes; /* ATTENTION operations that may take the ring: how many have said so, and of the last 32 which do */
  uint32_t item
      [US_ENGINE_ITEMS]; /* of tile t of the launch, at t % US_ENGINE_ITEMS: US_ENGINE_NONE ends a product */
  float row[4][US_ENGINE_ROWS]; /* small things of one operation */
  struct us_engine_routed rows;
  struct us_engine_rank rank;
  alignas(16) struct us_engine_op op[US_ENGINE_FETCHED];
  struct us_engine_op brought[2]; /* an epilogue warp's operation */
  alignas(16) uint8_t launch[offsetof(struct us_engine_launch, rank)];
};
static_assert(sizeof(struct us_engine_shared) <= 232448, "shared memory of a block");

/* The block's shared memory, by its number: behind the 1024 bytes that CUDA reserves on this architecture, since the kernel has nothing
 * static there (us_engine_check_shared). A pointer read from memory would be a generic one, whose loads cost twice as much; the symbol's
 * address is computed from the block's place in its cluster, a register that every loop would keep or, on the stack, look up. */
#define US_ENGINE_SHARED_AT 1024
static __device__ __forceinline__ struct us_engine_shared *us_engine_shared_of(
    const struct us_engine_block *) {
  return (struct us_engine_shared *)__cvta_shared_to_generic(US_ENGINE_SHARED_AT);
}
static __device__ __forceinline__ void us_engine_check_shared(void) {
  extern __shared__ __align__(128) uint8_t us_engine_dynamic[];
  if (us_shared_address(us_engine_dynamic) != US_ENGINE_SHARED_AT) __trap();
}

/* The thread's number and its lane, read again wherever this stands. What the compiler keeps from one operation to the next lies on the
 * stack, since the loops want all registers, and an acquire has emptied the cache of that: each word would take a way to L2. */
static __device__ __forceinline__ uint32_t us_engine_thread(void) {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
static __device__ __forceinline__ uint32_t us_engine_lane(void) {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
/* This warp's view, likewise. */
static __device__ __forceinline__ struct us_engine_block *us_engine_self(void) {
  return &us_engine_shared_of(NULL)->warp[us_engine_thread() / 32];
}
/* Compute warps: their operation. */
static __device__ __forceinline__ const struct us_engine_op *us_engine_fetched_op(
    const struct us_engine_block *b) {
  return &us_engine_shared_of(b)->op[b->fetched];
}
/* An epilogue warp: its own. */
static __device__ __forceinline__ const struct us_engine_op *us_engine_brought_op(void) {
  return &us_engine_shared_of(NULL)->brought[us_engine_thread() / 32 % 2];
}
/* The launch, without its ranks, and the rank: by their places in shared memory, not by a pointer that is read first. */
static __device__ __forceinline__ const struct us_engine_launch *us_engine_launch_of(
    const struct us_engine_block *b) {
  return (const struct us_engine_launch *)us_engine_shared_of(b)->launch;
}
static __device__ __forceinline__ const struct us_engine_rank *us_engine_rank_of(
    const struct us_engine_block *b) {
  return &us_engine_shared_of(b)->rank;
}

/* All threads, when a kernel starts; a barrier follows: launch and rank to where they are found. */
static __device__ __forceinline__ void us_engine_copy_words(void *to, const void *from, uint32_t bytes) {
  for (uint32_t i = threadIdx.x; i < bytes / 4; i += blockDim.x)
    ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
}
static __device__ __forceinline__ void us_engine_keep_launch(const struct us_engine_launch *launch,
                                                             const struct us_engine_rank *rank) {
  us_engine_copy_words(us_engine_shared_of(NULL)->launch, launch, sizeof us_engine_shared_of(NULL)->launch);
  us_engine_copy_words(&us_engine_shared_of(NULL)->rank, rank, sizeof *rank);
}

/* Keeps the compiler from making a value anew wherever it is needed: it stays in a register. */
static __device__ __forceinline__ void us_engine_keep(uint32_t *value) {
  asm volatile("" : "+r"(*value));
}

/* The same as an address, in a register, for us_shared_load*: their order among asm statements stands as written. */
static __device__ __forceinline__ uint32_t us_engine_shared_base(const struct us_engine_block *b) {
  uint32_t address = us_shared_address(us_engine_shared_of(b));
  us_engine_keep(&address);
  return address;
}
static __device__ __forceinline__ uint4 us_shared_load16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
/* One thread arrives for `n`. */
static __device__ __forceinline__ void us_barrier_arrive_many(uint32_t barrier, uint32_t n) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n) : "memory");
}
static __device__ __forceinline__ uint32_t us_shared_load4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
static __device__ __forceinline__ uint2 us_shared_load8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

/* Shared memory for operations of the compute warps, bytes. */
#define US_ENGINE_VECTOR_BYTES                                                                               \
  (sizeof(float) * 2 * US_ENGINE_COMPUTE_WARPS * US_ENGINE_PARTIAL + US_ENGINE_SCRATCH)
static __device__ __forceinline__ void *us_engine_scratch(const struct us_engine_block *b) {
  return us_engine_shared_of(b)->partial;
}

#endif
