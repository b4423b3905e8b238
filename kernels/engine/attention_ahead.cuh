/* attention_ahead.cuh: a warp that plans attention while the projection before it still runs.
 *
 *     us_engine_attention_ahead(b, op, n, after_product);    // the planning warp: operation n of the launch
 *     us_attention_await_plan(b);                            // all compute threads
 *
 * A plan is three loads from L2 one after the other and some 700 instructions, 4 us that nobody has to wait for: rows and page tables
 * stand since op->attention.ready. It lies behind the 34 KB that a product's sums take, where products have nothing, so it may be
 * written when the compute warps come to the product before the attention; behind anything else when they come to the attention. The
 * block's first pages go to L2 meanwhile.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_AHEAD_CUH
#define US_KERNELS_ENGINE_ATTENTION_AHEAD_CUH

#include "kernels/engine/attention_ring.cuh"

static_assert(offsetof(struct us_attention_shared, a) >=
                  sizeof(float) * 2 * US_ENGINE_COMPUTE_WARPS * US_ENGINE_PARTIAL,
              "a plan lies behind a product's sums");

static __device__ __forceinline__ uint32_t us_attention_look(const uint32_t *p) {
  uint32_t v;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(us_shared_address(p)) : "memory");
  return v;
}
static __device__ __forceinline__ void us_attention_say(uint32_t *p, uint32_t v) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(us_shared_address(p)), "r"(v) : "memory");
}

/* Thread 0: comes to operation n of the launch. */
static __device__ __forceinline__ void us_attention_enter(const struct us_engine_block *b, uint32_t n) {
  us_attention_say(&us_engine_shared_of(b)->entered, n);
}

/* All compute threads: the operation that they are at is planned. */
static __device__ __forceinline__ void us_attention_await_plan(const struct us_engine_block *b) {
  uint32_t ops = b->launch->last - b->launch->first,
           want = b->round * ops + b->op_index - b->launch->first + 1;
  const uint32_t *planned = &us_engine_shared_of(b)->planned;
  struct us_engine_watch watch = {0, 0};
  while ((int32_t)(us_attention_look(planned) - want) < 0)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, 0, want);
}

/* This block's first job. */
static __device__ __forceinline__ uint32_t us_attention_first(const struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  return (b->index + b->blocks - op->shift % b->blocks) % b->blocks;
}

static __device__ __forceinline__ void us_attention_fetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* One warp: ask for what the first job will read: its leaves of one KV head if they are one a unit, rope rows of the new positions, norms. */
static __device__ __forceinline__ void us_attention_fetch_job(const struct us_attention_shared *sh) {
  const struct us_engine_attention *a = &sh->a;
  const struct us_attention_row *row = sh->row + sh->job.row;
  uint32_t lane = threadIdx.x % 32, Q = a->Q, V = a->V, lines = us_engine_k_stride(Q); /* of 64 keys */
#pragma unroll 1
  for (uint32_t u = 0; u < US_ATTENTION_UNITS && sh->job.leaf == US_ENGINE_NONE; u++) {
    const uint8_t *page = sh->leaf[u].page;
    if (!page) continue;
    const uint8_t *keys = page + us_head_key_offset(Q, sh->job.g, 0),
                  *values = page + us_head_value_offset(a->G, Q, V, sh->job.g, 0);
#pragma unroll 1
    for (uint32_t i = lane; i < lines + V; i += 32)
      us_attention_fetch(i < lines ? keys + i * 128 : values + (i - lines) * 128);
  }
#pragma unroll 1
  for (uint32_t i = lane; i <= row->count * a->rotary / 32; i += 32)
    us_attention_fetch(a->rope + (size_t)row->fresh * a->rotary + i * 32);
  if (a->q_norm && lane * 32 < Q) us_attention_fetch(a->q_norm + lane * 32);
  if (a->k_norm && lane * 32 < Q) us_attention_fetch(a->k_norm + lane * 32);
}

/* The operation itself, what it waits for, rows, the block's first job. */
static __device__ __forceinline__ void us_attention_plan(const struct us_engine_block *b,
                                                         const struct us_engine_op *op,
                                                         struct us_attention_shared *sh) {
  uint32_t lane = threadIdx.x % 32, first = us_attention_first(b, op);
#pragma unroll 1
  for (uint32_t word = lane; word < sizeof sh->a / 4; word += 32)
    ((uint32_t *)&sh->a)[word] = ((const uint32_t *)&op->attention)[word];
  __syncwarp();
#pragma unroll 1
  for (uint32_t head = lane; head < sh->a.H; head += 32)
    sh->sink[head] = sh->a.sink ? sh->a.sink[head] * US_ATTENTION_LOG2E : -CUDART_INF_F;
  us_attention_plan_rows(b, op, sh);
  __syncwarp();
  if (lane == 0) {
    bool waits = op->wait != US_ENGINE_NONE;
    sh->input = b->rank->done + (waits ? op->wait : 0), sh->want = waits ? us_engine_target(b, op->wait) : 0;
  }
  bool exists = first < sh->jobs, unset = exists && us_attention_is_shared(sh, first);
  if (lane == 0) sh->unset = unset;
  if (!exists || unset) return;
  us_attention_set_job(b, sh, first);
  __syncwarp();
  if (sh->row[sh->job.row].sequence != US_ENGINE_NONE) us_attention_fetch_job(sh);
}

/* The planning warp. `after_product`: the operation before is in the launch and leaves shared memory behind its sums alone. */
static __device__ __noinline__ void us_engine_attention_ahead(struct us_engine_block *b,
                                                              const struct us_engine_op *op, uint32_t n,
                                                              bool after_product) {
  struct us_attention_shared *sh = (struct us_attention_shared *)us_engine_scratch(b);
  struct us_engine_shared *s = us_engine_shared_of(b);
  uint32_t when = after_product ? n - 1 : n, stands = op->attention.ready, have, want;
  struct us_engine_watch watch = {0, 0};
  while ((int32_t)((have = us_attention_look(&s->entered)) - when) < 0) {
    __nanosleep(100);
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, when);
  }
  if (stands == US_ENGINE_NONE) stands = op->wait;
  want = stands == US_ENGINE_NONE ? 0 : us_engine_target(b, stands);
  while (want && (int32_t)((have = us_load_relaxed(b->rank->done + stands)) - want) < 0)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, stands, have, want);
  __syncwarp();
  us_attention_plan(b, op, sh);
  if (us_engine_attention_is_long(&sh->a)) {
    if (threadIdx.x % 32 == 0) us_attention_decide(b, sh->ring);
    us_engine_count(&b->attentions);
  }
  __syncwarp();
  if (threadIdx.x % 32) return;
  us_engine_jitter(b);
  us_attention_say(&s->planned, n + 1);
}

#endif
