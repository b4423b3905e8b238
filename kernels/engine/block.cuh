/* block.cuh: what every role of a block of the engine shares: waiting, hand-offs, the watchdog (shared memory: shared.cuh).
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

#include "kernels/engine/shared.cuh"

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

namespace us_rare {
static __device__ __noinline__ __attribute__((noreturn)) void us_engine_stop_stuck(
    const struct us_engine_block *b, uint32_t what, uint32_t index, uint64_t have, uint64_t want) {
  volatile struct us_engine_stuck *s = &b->rank->stuck[b->grid_block * US_ENGINE_ROLES + b->role];
  uint64_t now = us_engine_now();
  if (!s->what) { /* the first warp of a role to report speaks for it */
    s->op = b->op_index, s->round = b->round, s->index = index, s->have = have, s->want = want;
    __threadfence_system();
    s->what = what;
    __threadfence_system();
  }
  while (us_engine_now() - now < 500000000ull) __nanosleep(1000);
  asm volatile("trap; exit;");
  __builtin_unreachable();
}
} // namespace us_rare
using us_rare::us_engine_stop_stuck;

/* One more try of a wait of one thread. */
static __device__ __forceinline__ void us_engine_watch_try(const struct us_engine_block *b,
                                                           struct us_engine_watch *w, uint32_t what,
                                                           uint32_t index, uint64_t have, uint64_t want) {
  if (__builtin_expect((++w->tries & 1023u) != 0, 1)) return;
  uint64_t now = us_engine_now();
  if (!w->since) w->since = now;
  if (__builtin_expect(now - w->since > us_engine_launch_of(b)->timeout_ns, 0))
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
 * engine_several.cu compiles this code with US_ENGINE_SEVERAL 1, and so does engine_profile_several.cu. */
#ifndef US_ENGINE_SEVERAL
#define US_ENGINE_SEVERAL 0
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

/* Nothing here may wait for memory, or the role would: its place is in shared memory, the interval one store that nobody reads in
 * this launch. In line: a call would take the registers of the loops around it. Returns the end. */
static __device__ __forceinline__ uint64_t us_engine_span_write(const struct us_engine_block *b,
                                                                uint32_t what, uint64_t begin) {
  struct us_engine_block *view = us_engine_view(b);
  uint32_t at = view->span, room = view->span_end;
  uint64_t end = us_engine_now();
  if (at < room)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(us_engine_profile_of(b)->spans + at),
                 "r"((uint32_t)begin), "r"((uint32_t)(begin >> 32)), "r"((uint32_t)(end - begin)),
                 "r"(view->op_index | what << 16));
  if (room) view->span = at + 1; /* what found no room is counted too */
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

/* Where a role's intervals lie: lane after lane, `capacity` each. */
static __device__ __forceinline__ uint32_t us_engine_spans_lane(const struct us_engine_block *b) {
  const struct us_engine_block *view = us_engine_view(b);
  return view->grid_block * US_ENGINE_ROLES + view->role;
}
/* A role comes to a round: those before `first` are not recorded. */
static __device__ __forceinline__ void us_engine_spans_round(const struct us_engine_block *b) {
  const struct us_engine_profile *p = us_engine_profile_of(b);
  struct us_engine_block *view = us_engine_view(b);
  if (US_ENGINE_PROFILED && us_engine_leads(b) && view->round == p->first)
    view->span_end = (us_engine_spans_lane(b) + 1) * p->capacity;
}
/* A role begins and ends its launch: the count goes on from the launch before. */
static __device__ __forceinline__ void us_engine_spans_open(const struct us_engine_block *b) {
  const struct us_engine_profile *p = us_engine_profile_of(b);
  if (!US_ENGINE_PROFILED || !us_engine_leads(b)) return;
  uint32_t lane = us_engine_spans_lane(b);
  us_engine_view(b)->span = lane * p->capacity + p->counts[lane];
  us_engine_spans_round(b);
}
static __device__ __forceinline__ void us_engine_spans_close(const struct us_engine_block *b) {
  const struct us_engine_profile *p = us_engine_profile_of(b);
  if (!US_ENGINE_PROFILED || !us_engine_leads(b)) return;
  uint32_t lane = us_engine_spans_lane(b);
  p->counts[lane] = us_engine_view(b)->span - lane * p->capacity;
}

/* ---- barriers of a block ------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void us_engine_barrier_wait_at(const struct us_engine_block *b,
                                                                 uint32_t address, uint32_t parity,
                                                                 uint32_t what) {
  if (US_ENGINE_PROFILED && us_barrier_test(address, parity))
    return; /* a wait is what does not end at once */
  uint64_t begin = us_engine_span_begin(b);
  if (!us_barrier_try(address, parity)) {
    struct us_engine_watch watch = {0, 0};
    while (!us_barrier_try(address, parity)) us_engine_watch_try(b, &watch, what, 0, parity, 0);
  }
  us_engine_span_end(b, what, begin);
}

static __device__ __forceinline__ void us_engine_barrier_wait(const struct us_engine_block *b,
                                                              const uint64_t *barrier, uint32_t parity,
                                                              uint32_t what) {
  us_engine_barrier_wait_at(b, us_shared_address(barrier), parity, what);
}

/* The same out of line, one copy for all roles that do not multiply: what runs a few times a layer is fetched anew each time. */
static __device__ __noinline__ void us_engine_barrier_await(uint32_t address, uint32_t parity,
                                                            uint32_t what) {
  us_engine_barrier_wait_at(us_engine_self(), address, parity, what);
}

/* ---- loads and stores between blocks and GPUs ------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t us_load_acquire(const uint32_t *p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
/* A look that keeps what the first-level cache holds: what is read behind it must come from L2 (__ldcg). */
static __device__ __forceinline__ uint32_t us_load_relaxed(const uint32_t *p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
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
/* Words that carry their own flag within a GPU. */
static __device__ __forceinline__ uint2 us_load_gpu8(const void *p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
static __device__ __forceinline__ uint4 us_load_gpu16(const void *p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
static __device__ __forceinline__ void us_store_gpu4(void *p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
/* Four words, relaxed and of system scope as well: sums that are their own flags, the mailbox. */
static __device__ __forceinline__ uint4 us_load_system16(const void *p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

/* Quotient of numbers below 2^21: x + 1/2 is farther from a multiple than the approximation errs. A third of a division's code. */
static __device__ __forceinline__ uint32_t us_engine_quotient(uint32_t x, uint32_t by) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"((float)by));
  return (uint32_t)(((float)x + 0.5f) * r);
}

/* A warp's lanes together: one more. */
static __device__ __forceinline__ void us_engine_count(uint32_t *counter) {
  uint32_t lanes = __activemask();
  __syncwarp(lanes);
  if (us_engine_lane() == 0) *(volatile uint32_t *)counter += 1;
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
namespace us_rare {
static __device__ __noinline__ void us_engine_delay(const struct us_engine_block *b) {
  uint64_t start = us_engine_now();
  uint32_t h =
      (uint32_t)start ^ b->grid_block * 0x9e3779b9u ^ b->op_index * 0x85ebca6bu ^ b->round * 0xc2b2ae35u;
  h ^= h >> 15, h *= 0x2c1b3c6du, h ^= h >> 12;
  uint32_t wait = h % us_engine_launch_of(b)->jitter;
  while (us_engine_now() - start < wait) __nanosleep(64);
}
} // namespace us_rare
using us_rare::us_engine_delay;
static __device__ __forceinline__ void us_engine_jitter(const struct us_engine_block *b) {
  if (us_engine_launch_of(b)->jitter) us_engine_delay(b);
}

/* Whether `op` runs in this launch before the current operation, and what its count then is. An operation outside of the launch
 * is done; one that stands at or after the current one means the round before. */
static __device__ __forceinline__ uint32_t us_engine_target(const struct us_engine_block *b, uint32_t op) {
  const struct us_engine_launch *launch = us_engine_launch_of(b);
  if (op - launch->first >= launch->last - launch->first) return 0;
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
  us_engine_poll(b, us_engine_rank_of(b)->done + op, op, us_engine_target(b, op));
}

/* Thread 0: whether it has found an earlier operation of this round done already; else it is about to. A look costs a microsecond. */
static __device__ __forceinline__ bool us_engine_seen(const struct us_engine_block *b, uint32_t op) {
  struct us_engine_block *view = &us_engine_shared_of(b)->warp[0];
  if (view->seen_round != b->round) view->seen[0] = view->seen[1] = 0, view->seen_round = b->round;
  if (view->seen[0] == op + 1 || view->seen[1] == op + 1) return true;
  if (op < b->op_index) view->seen[1] = view->seen[0], view->seen[0] = op + 1;
  return false;
}

/* All compute threads: what `op` wrote is visible. op may be US_ENGINE_NONE. A function for all operations: what runs once a layer runs at
 * the rate at which its code is fetched, and a copy of this in each would be new every time. */
static __device__ __noinline__ void us_engine_wait_done(const struct us_engine_block *, uint32_t op) {
  const struct us_engine_block *b = us_engine_self();
  if (threadIdx.x == 0 && op != US_ENGINE_NONE && !us_engine_seen(b, op)) us_engine_poll_done(b, op);
  us_engine_meet();
}

/* One thread: a counter hears that what its block or warp has to write is written. */
static __device__ __noinline__ void us_engine_tell(uint32_t *counter) {
  us_engine_jitter(us_engine_self());
  us_add_release(counter, 1);
}

/* All compute threads: this block has written its part of the operation. */
static __device__ __noinline__ void us_engine_finish(const struct us_engine_block *) {
  const struct us_engine_block *b = us_engine_self();
  us_engine_meet();
  if (!threadIdx.x) us_engine_tell(us_engine_rank_of(b)->done + b->op_index);
}

/* All compute threads, before they use us_engine_scratch: the epilogue warps have read all partial sums. */
static __device__ __noinline__ void us_engine_drain(const struct us_engine_block *) {
  const struct us_engine_block *b = us_engine_self();
#pragma unroll 1
  for (uint32_t i = 0; i < 2; i++) { /* a buffer used n times is free after n phases */
    uint32_t used = (b->tile + 1 - i) / 2;
    us_engine_barrier_wait(b, &us_engine_shared_of(b)->sums_empty[i], (used & 1) ^ 1, US_ENGINE_WAIT_SUMS);
  }
}

#endif
