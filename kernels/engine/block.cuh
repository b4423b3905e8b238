/* block.cuh: what every role of a block of the engine shares: shared memory, waiting, hand-offs, the watchdog.
 *
 *     us_engine_wait_done(b, op->wait);            // compute warps, all threads: the input stands in memory
 *     ...
 *     us_engine_finish(b);                         // compute warps, all threads: this block's part of the operation is done
 *
 * Memory model: data written by any thread of a block before us_engine_finish (or the epilogue's) is seen by any thread of the
 * rank after us_engine_wait_done: block barrier, then a release by one thread; an acquire by one thread, then a block barrier.
 * Data that other blocks of a rank wrote in this launch is read with ordinary or __ldcg loads, never with __ldg.
 */
#ifndef US_KERNELS_ENGINE_BLOCK_CUH
#define US_KERNELS_ENGINE_BLOCK_CUH

#include "kernels/engine/engine.h"
#include "kernels/gpu/async.cuh"
#include <stddef.h>

#define US_ENGINE_STAGES  5
#define US_ENGINE_THREADS 640 /* 20 warps, of which one idles: registers are shared out to groups of 4 */
#define US_ENGINE_COMPUTE (US_ENGINE_COMPUTE_WARPS * 32)
/* Behind the streaming warp: the first thread of two epilogue warps. */
#define US_ENGINE_EPILOGUE  (US_ENGINE_COMPUTE + 32)
#define US_ENGINE_EPILOGUES 2
#define US_ENGINE_FILLERS                                                                                    \
  2 /* threads that a stage of the ring waits for before its bytes count as complete */
/* Partial sums of a compute warp: the second half of a tile starts 16 banks after the first. */
#define US_ENGINE_PARTIAL 272
#define US_ENGINE_SCRATCH 14336
/* Tiles whose items are written down (gemm.cuh). A tile's place is written two tiles ahead, when its block has streamed at most a
 * ring beyond what the compute warps are at, and these at most two tiles beyond what the epilogue has read: 11 in all. */
#define US_ENGINE_ITEMS 16

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

/* DOWN: what a stage of the ring holds: one or two steps (down.cuh: US_DOWN_...), the slots of their experts (16 bits each), where
 * their rows lie. */
struct us_engine_down_stage {
  alignas(16) uint32_t slots;
  uint32_t count, rows[2];
};

/* Rows that were routed last (route.cuh). */
struct us_engine_routed {
  uint64_t seed[US_ENGINE_ROWS];
  uint32_t exists[US_ENGINE_ROWS], position[US_ENGINE_ROWS], sample[US_ENGINE_ROWS];
  uint32_t pass; /* round, program and row tile; 0: none yet */
};

struct us_engine_shared;

/* One warp's view, in shared memory: the same for all its lanes. (On the stack it would be 640 copies, more than the first-level
 * cache holds beside the ring.) */
struct us_engine_block {
  struct us_engine_shared *shared;
  const struct us_engine_launch *launch; /* without its ranks */
  const struct us_engine_rank *rank;
  uint32_t index, blocks; /* of this rank's blocks */
  uint32_t grid_block;    /* in the launch */
  uint32_t role;
  uint32_t round; /* of the launch */
  uint32_t op_index;
  uint32_t stage, phase; /* cursor in the ring */
  uint32_t tile;         /* of products: how many this role has passed, and so partial-sum buffers used */
  uint32_t routes;       /* ROUTE operations passed */
  uint32_t attentions;   /* ATTENTION operations passed that may take the ring (attention_ring.cuh) */
  uint32_t seen[2], seen_round; /* warp 0: operations of a round that it last found done, plus 1 */
  uint32_t spans;               /* engine_profile.cu: intervals of this role so far */
};

#define US_ENGINE_FETCHED                                                                                    \
  4 /* operations in shared memory: the last one, this one, the next, and the one being fetched */

/* Dynamic shared memory. An acquire empties the first-level cache, so what an operation reads again and again about itself, its
 * rank and its launch lies here: from memory, each first look would cost a microsecond. Compute warps may use `partial` and
 * `scratch` (contiguous, us_engine_scratch) inside an operation other than GEMM and DOWN, after us_engine_drain. */
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
  struct us_engine_block warp[US_ENGINE_THREADS / 32];
  uint32_t stop; /* no further round */
  uint32_t decided, takes; /* ATTENTION operations that may take the ring: how many have said so, and of the last 32 which do */
  uint32_t item
      [US_ENGINE_ITEMS]; /* of tile t of the launch, at t % US_ENGINE_ITEMS: US_ENGINE_NONE ends a product */
  float row[4][US_ENGINE_ROWS]; /* small things of one operation */
  struct us_engine_down_stage down[US_ENGINE_STAGES];
  struct us_engine_routed rows;
  struct us_engine_rank rank;
  alignas(16) struct us_engine_op op[US_ENGINE_FETCHED];
  alignas(16) uint8_t launch[offsetof(struct us_engine_launch, rank)];
};
static_assert(sizeof(struct us_engine_shared) <= 232448, "shared memory of a block");

/* The block's shared memory, by its symbol: a pointer read from memory would be a generic one, whose loads cost twice as much. */
static __device__ __forceinline__ struct us_engine_shared *us_engine_shared_of(
    const struct us_engine_block *) {
  extern __shared__ __align__(128) uint8_t us_engine_dynamic[];
  return (struct us_engine_shared *)us_engine_dynamic;
}

/* The same as an address that the compiler keeps: it would compute it again and again, each time asking for the block's place in its
 * cluster. For us_shared_load*, whose order among asm statements stands as written. */
static __device__ __forceinline__ uint32_t us_engine_shared_base(const struct us_engine_block *b) {
  uint32_t address = us_shared_address(us_engine_shared_of(b));
  asm volatile("" : "+r"(address));
  return address;
}
static __device__ __forceinline__ uint4 us_shared_load16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
static __device__ __forceinline__ int us_shared_load_s16(uint32_t address) {
  int v;
  asm volatile("ld.shared.s16 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
/* One thread arrives for `n`. */
static __device__ __forceinline__ void us_barrier_arrive_many(uint32_t barrier, uint32_t n) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n) : "memory");
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

/* ---- watchdog ---------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint64_t us_engine_now(void) {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

/* Counts the tries of one wait. A wait longer than the launch's timeout writes down where it stands, gives the other roles
 * half a second to do the same, and stops the GPU's context. Inline and ending in an exit: a call would take the waiting
 * loop's registers away. */
struct us_engine_watch {
  uint32_t tries;
  uint64_t since;
};

static __device__ __forceinline__ void us_engine_stop_stuck(const struct us_engine_block *b, uint32_t what,
                                                            uint32_t index, uint64_t have, uint64_t want) {
  volatile struct us_engine_stuck *s = &b->rank->stuck[b->grid_block * US_ENGINE_ROLES + b->role];
  uint64_t now = us_engine_now();
  s->op = b->op_index, s->round = b->round, s->index = index, s->have = have, s->want = want;
  __threadfence_system();
  s->what = what;
  __threadfence_system();
  while (us_engine_now() - now < 500000000ull) __nanosleep(1000);
  asm volatile("trap; exit;");
}

/* One more try of a wait of one thread. */
static __device__ __forceinline__ void us_engine_watch_try(const struct us_engine_block *b,
                                                           struct us_engine_watch *w, uint32_t what,
                                                           uint32_t index, uint64_t have, uint64_t want) {
  if (__builtin_expect((++w->tries & 1023u) != 0, 1)) return;
  uint64_t now = us_engine_now();
  if (!w->since) w->since = now;
  if (__builtin_expect(now - w->since > b->launch->timeout_ns, 0))
    us_engine_stop_stuck(b, what, index, have, want);
}

static __device__ __forceinline__ bool us_barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}

/* The same without ever suspending the thread. */
static __device__ __forceinline__ bool us_barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

/* ---- profile ------------------------------------------------------------------------------------------------------ */

/* Recording costs registers and instructions in the loops that stream, so it is a kernel of its own: engine_profile.cu compiles
 * this code with US_ENGINE_PROFILED 1; in engine.cu nothing is left of it. */
#ifndef US_ENGINE_PROFILED
#define US_ENGINE_PROFILED 0
#endif

/* Operations of several row tiles would take registers from the loops of one row tile, so they are another kernel's too:
 * engine_several.cu compiles this code with US_ENGINE_SEVERAL 1. The kernel that records has them. */
#ifndef US_ENGINE_SEVERAL
#define US_ENGINE_SEVERAL US_ENGINE_PROFILED
#endif

/* The thread that speaks for its role. */
static __device__ __forceinline__ bool us_engine_leads(const struct us_engine_block *b) {
  return threadIdx.x == 0 || threadIdx.x == US_ENGINE_COMPUTE || threadIdx.x == US_ENGINE_EPILOGUE;
}

static __device__ __forceinline__ const struct us_engine_profile *us_engine_profile_of(
    const struct us_engine_block *b) {
  return &((const struct us_engine_launch *)us_engine_shared_of(b)->launch)->profile;
}
static __device__ __forceinline__ struct us_engine_block *us_engine_view(const struct us_engine_block *b) {
  return &us_engine_shared_of(b)->warp[threadIdx.x / 32];
}

/* Nothing here may wait for memory, or the role would: the count is in shared memory, the interval one store that nobody reads in
 * this launch. In line: a call would take the registers of the loops around it. Returns the end. */
static __device__ __forceinline__ uint64_t us_engine_span_write(const struct us_engine_block *b,
                                                                uint32_t what, uint64_t begin) {
  const struct us_engine_profile *p = us_engine_profile_of(b);
  struct us_engine_block *view = us_engine_view(b);
  uint64_t end = us_engine_now();
  uint32_t at = view->spans, lane = view->grid_block * US_ENGINE_ROLES + view->role;
  if (view->round < p->first) return end;
  view->spans = at + 1;
  if (at < p->capacity)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p->spans + (size_t)lane * p->capacity + at),
                 "r"((uint32_t)begin), "r"((uint32_t)(begin >> 32)), "r"((uint32_t)(end - begin)),
                 "r"(view->op_index | what << 16));
  return end;
}

/* The start of an interval, 0 for threads that do not speak for their role and when nobody profiles; and its end, where the next
 * may begin. */
static __device__ __forceinline__ uint64_t us_engine_span_begin(const struct us_engine_block *b) {
  return US_ENGINE_PROFILED && us_engine_leads(b) ? us_engine_now() : 0;
}
static __device__ __forceinline__ uint64_t us_engine_span_end(const struct us_engine_block *b, uint32_t what,
                                                              uint64_t begin) {
  return US_ENGINE_PROFILED && begin ? us_engine_span_write(b, what, begin) : 0;
}

/* A role begins and ends its launch: the count goes on from the launch before. */
static __device__ __forceinline__ void us_engine_spans_open(const struct us_engine_block *b) {
  struct us_engine_block *view = us_engine_view(b);
  if (US_ENGINE_PROFILED && us_engine_leads(b))
    view->spans = us_engine_profile_of(b)->counts[view->grid_block * US_ENGINE_ROLES + view->role];
}
static __device__ __forceinline__ void us_engine_spans_close(const struct us_engine_block *b) {
  const struct us_engine_block *view = us_engine_view(b);
  if (US_ENGINE_PROFILED && us_engine_leads(b))
    us_engine_profile_of(b)->counts[view->grid_block * US_ENGINE_ROLES + view->role] = view->spans;
}

/* ---- barriers of a block ------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void us_engine_barrier_wait(const struct us_engine_block *b,
                                                              const uint64_t *barrier, uint32_t parity,
                                                              uint32_t what) {
  uint32_t address = us_shared_address(barrier);
  if (US_ENGINE_PROFILED && us_barrier_test(address, parity))
    return; /* a wait is what does not end at once */
  uint64_t begin = us_engine_span_begin(b);
  if (!us_barrier_try(address, parity)) {
    struct us_engine_watch watch = {0, 0};
    while (!us_barrier_try(address, parity)) us_engine_watch_try(b, &watch, what, 0, parity, 0);
  }
  us_engine_span_end(b, what, begin);
}

/* ---- loads and stores between blocks and GPUs ------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t us_load_acquire(const uint32_t *p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
static __device__ __forceinline__ void us_add_release(uint32_t *p, uint32_t n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
/* Data that carries its own flag: relaxed, system scope, never cached. */
static __device__ __forceinline__ uint64_t us_load_flagged(const uint64_t *p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
static __device__ __forceinline__ void us_store_flagged(uint64_t *p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/* A warp's lanes together: one more. */
static __device__ __forceinline__ void us_engine_count(uint32_t *counter) {
  uint32_t lanes = __activemask();
  __syncwarp(lanes);
  if (threadIdx.x % 32 == 0) *(volatile uint32_t *)counter += 1;
  __syncwarp(lanes);
}

/* ---- hand-offs --------------------------------------------------------------------------------------------------------- */

/* All compute threads. */
static __device__ __forceinline__ void us_engine_meet(void) {
  asm volatile("bar.sync 1, %0;" ::"n"(US_ENGINE_COMPUTE) : "memory");
}

/* The epilogue warps. */
static __device__ __forceinline__ void us_engine_epilogues_meet(void) {
  asm volatile("bar.sync 2, %0;" ::"n"(US_ENGINE_EPILOGUES * 32) : "memory");
}

/* Test: a random delay, so that every order of arrivals occurs. */
static __device__ __noinline__ void us_engine_delay(const struct us_engine_block *b) {
  uint64_t start = us_engine_now();
  uint32_t h =
      (uint32_t)start ^ b->grid_block * 0x9e3779b9u ^ b->op_index * 0x85ebca6bu ^ b->round * 0xc2b2ae35u;
  h ^= h >> 15, h *= 0x2c1b3c6du, h ^= h >> 12;
  uint32_t wait = h % b->launch->jitter;
  while (us_engine_now() - start < wait) __nanosleep(64);
}
static __device__ __forceinline__ void us_engine_jitter(const struct us_engine_block *b) {
  if (b->launch->jitter) us_engine_delay(b);
}

/* Whether `op` runs in this launch before the current operation, and what its count then is. An operation outside of the launch
 * is done; one that stands at or after the current one means the round before. */
static __device__ __forceinline__ uint32_t us_engine_target(const struct us_engine_block *b, uint32_t op) {
  if (op < b->launch->first || op >= b->launch->last) return 0;
  return (op < b->op_index ? b->round + 1 : b->round) * b->blocks;
}

/* One thread: poll until a counter of `op` is there. */
static __device__ __forceinline__ void us_engine_poll(const struct us_engine_block *b,
                                                      const uint32_t *counter, uint32_t op, uint32_t want) {
  uint32_t have;
  if (!want) return;
  struct us_engine_watch watch = {0, 0};
  uint64_t begin = us_engine_span_begin(b);
  while ((int32_t)((have = us_load_acquire(counter)) - want) < 0)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, op, have, want);
  us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
}

/* One thread: until the operation is done. */
static __device__ __forceinline__ void us_engine_poll_done(const struct us_engine_block *b, uint32_t op) {
  us_engine_poll(b, b->rank->done + op, op, us_engine_target(b, op));
}

/* Thread 0: whether it has found an earlier operation of this round done already; else it is about to. A look costs a microsecond. */
static __device__ __forceinline__ bool us_engine_seen(const struct us_engine_block *b, uint32_t op) {
  struct us_engine_block *view = &us_engine_shared_of(b)->warp[0];
  if (view->seen_round != b->round) view->seen[0] = view->seen[1] = 0, view->seen_round = b->round;
  if (view->seen[0] == op + 1 || view->seen[1] == op + 1) return true;
  if (op < b->op_index) view->seen[1] = view->seen[0], view->seen[0] = op + 1;
  return false;
}

/* All compute threads: what `op` wrote is visible. op may be US_ENGINE_NONE. */
static __device__ __forceinline__ void us_engine_wait_done(const struct us_engine_block *b, uint32_t op) {
  if (threadIdx.x == 0 && op != US_ENGINE_NONE && !us_engine_seen(b, op)) us_engine_poll_done(b, op);
  us_engine_meet();
}

/* All compute threads: this block has written its part of the operation. */
static __device__ __forceinline__ void us_engine_finish(const struct us_engine_block *b) {
  us_engine_meet();
  if (threadIdx.x) return;
  us_engine_jitter(b);
  us_add_release(b->rank->done + b->op_index, 1);
}

/* All compute threads, before they use us_engine_scratch: the epilogue warps have read all partial sums. */
static __device__ __forceinline__ void us_engine_drain(const struct us_engine_block *b) {
  for (uint32_t i = 0; i < 2; i++) { /* a buffer used n times is free after n phases */
    uint32_t used = (b->tile + 1 - i) / 2;
    us_engine_barrier_wait(b, &us_engine_shared_of(b)->sums_empty[i], (used & 1) ^ 1, US_ENGINE_WAIT_SUMS);
  }
}

#endif
