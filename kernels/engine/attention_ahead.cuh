/* attention_ahead.cuh: a warp that plans attention while the projection before it still runs.
 *
 *     us_engine_attention_ahead(b, op, when, n);             // the planning warp: operation n of the launch, not before `when`
 *     us_attention_await_plan(b);                            // all compute threads
 *
 * A plan is three loads from L2 one after the other and some 700 instructions, 4 us on an idle machine and three times that beside
 * streaming weights, that nobody has to wait for: rows and page tables stand since op->attention.ready. It lies behind the 34 KB that a
 * product's sums take, where products and reductions of one row tile have nothing, so it may be written when the compute warps come to
 * the reduction before the product before the attention; behind anything else when they come to the attention. The block's first pages
 * go to L2 behind it.
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
  uint64_t begin = us_engine_span_begin(b);
  while ((int32_t)(us_attention_look(planned) - want) < 0)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, 0, want);
  us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
}

/* This block's first job. */
static __device__ __forceinline__ uint32_t us_attention_first(const struct us_engine_block *b,
                                                              const struct us_engine_op *op) {
  return (b->index + b->blocks - op->shift % b->blocks) % b->blocks;
}

static __device__ __forceinline__ void us_attention_fetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* What the first job will read, in registers: when the plan is announced, the compute warps may go on to another job. */
struct us_attention_fetching {
  const uint8_t *page[US_ATTENTION_UNITS];                      /* NULL: none */
  const float *rope, *norm[2];                                  /* norms: NULL: none */
  uint32_t Q, keys, values, key_lines, value_lines, rope_lines; /* offsets in a page; lines of 128 bytes */
};
static __device__ __forceinline__ struct us_attention_fetching us_attention_fetching_of(
    const struct us_attention_shared *sh, bool set) {
  const struct us_engine_attention *a = &sh->a;
  struct us_attention_fetching x = {};
  if (!set || sh->row[sh->job.row].sequence == US_ENGINE_NONE) return x;
  const struct us_attention_row *row = sh->row + sh->job.row;
#pragma unroll
  for (uint32_t u = 0; u < US_ATTENTION_UNITS; u++)
    x.page[u] = sh->job.leaf == US_ENGINE_NONE ? sh->leaf[u].page : (const uint8_t *)0;
  x.keys = us_head_key_offset(a->Q, sh->job.g, 0), x.key_lines = us_engine_k_stride(a->Q); /* 64 keys */
  x.values = us_head_value_offset(a->G, a->Q, a->V, sh->job.g, 0), x.value_lines = a->V;
  x.norm[0] = a->q_norm, x.norm[1] = a->k_norm, x.Q = a->Q;
  x.rope = a->rope + (size_t)row->fresh * a->rotary, x.rope_lines = row->count * a->rotary / 32 + 1;
  return x;
}

/* One warp: ask for it. */
static __device__ __forceinline__ void us_attention_fetch_job(const struct us_attention_fetching *x) {
  uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t u = 0; u < US_ATTENTION_UNITS; u++)
#pragma unroll 1
    for (uint32_t i = lane; x->page[u] && i < x->key_lines + x->value_lines; i += 32)
      us_attention_fetch(x->page[u] +
                         (i < x->key_lines ? x->keys + i * 128 : x->values + (i - x->key_lines) * 128));
#pragma unroll 1
  for (uint32_t i = lane; i < x->rope_lines; i += 32) us_attention_fetch(x->rope + i * 32);
#pragma unroll
  for (int k = 0; k < 2; k++)
    if (x->norm[k] && lane * 32 < x->Q) us_attention_fetch(x->norm[k] + lane * 32);
}

/* What a plan needs of the operation: nothing of it changes, so it is loaded before there is anything to plan. */
struct us_attention_task {
  uint32_t program, row_tile, first, wait, ready;
  uint32_t word; /* of us_engine_attention, a lane's */
  float sink[US_ATTENTION_HEADS / 32];
};
static_assert(sizeof(struct us_engine_attention) <= 128, "a word a lane");

static __device__ __forceinline__ struct us_attention_task us_attention_task_of(
    const struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_attention *a = &op->attention;
  uint32_t lane = threadIdx.x % 32;
  struct us_attention_task t = {op->program, op->row_tile, us_attention_first(b, op), op->wait, a->ready, 0,
                                {}};
  if (lane < sizeof *a / 4) t.word = ((const uint32_t *)a)[lane];
#pragma unroll
  for (uint32_t i = 0; i < US_ATTENTION_HEADS / 32; i++)
    t.sink[i] = a->sink && 32 * i + lane < a->H ? a->sink[32 * i + lane] * US_ATTENTION_LOG2E : -CUDART_INF_F;
  return t;
}

/* One warp: `op` is done. Seldom looked at twice in a round: it is the same for a pass. */
static __device__ __forceinline__ void us_attention_await_rows(struct us_engine_block *b, uint32_t op) {
  uint32_t have, want = op == US_ENGINE_NONE ? 0 : us_engine_target(b, op);
  bool known = b->seen_round == b->round && b->seen[0] == op + 1;
  struct us_engine_watch watch = {0, 0};
  while (want && !known && (int32_t)((have = us_load_relaxed(b->rank->done + op)) - want) < 0)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, op, have, want);
  __syncwarp();
  if (threadIdx.x % 32 == 0) b->seen[0] = op + 1, b->seen_round = b->round;
  __syncwarp();
}

/* The operation itself, what it waits for, rows, the block's first job. Returns whether that is set. */
static __device__ __forceinline__ bool us_attention_plan(const struct us_engine_block *b,
                                                         const struct us_attention_task *t,
                                                         struct us_attention_shared *sh) {
  uint32_t lane = threadIdx.x % 32;
  if (lane < sizeof sh->a / 4) ((uint32_t *)&sh->a)[lane] = t->word;
#pragma unroll
  for (uint32_t i = 0; i < US_ATTENTION_HEADS / 32; i++) sh->sink[32 * i + lane] = t->sink[i];
  __syncwarp();
  us_attention_plan_rows(b, t->program, t->row_tile, sh);
  __syncwarp();
  bool exists = t->first < sh->jobs, unset = exists && us_attention_is_shared(sh, t->first);
  if (lane == 0) {
    bool waits = t->wait != US_ENGINE_NONE;
    sh->input = b->rank->done + (waits ? t->wait : 0), sh->want = waits ? us_engine_target(b, t->wait) : 0;
    sh->unset = unset;
  }
  if (exists && !unset) us_attention_set_job(b, sh, t->first);
  __syncwarp();
  return exists && !unset;
}

/* The planning warp: operation n of the launch; from operation `when` on the plan's place is nobody else's. */
static __device__ __noinline__ void us_engine_attention_ahead(struct us_engine_block *b,
                                                              const struct us_engine_op *op, uint32_t when,
                                                              uint32_t n) {
  struct us_attention_shared *sh = (struct us_attention_shared *)us_engine_scratch(b);
  struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_attention_task task = us_attention_task_of(b, op);
  uint32_t have;
  struct us_engine_watch watch = {0, 0};
  while ((int32_t)((have = us_attention_look(&s->entered)) - when) < 0) {
    __nanosleep(100);
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, when);
  }
  us_attention_await_rows(b, task.ready == US_ENGINE_NONE ? task.wait : task.ready);
  bool set = us_attention_plan(b, &task, sh);
  struct us_attention_fetching fetching = us_attention_fetching_of(sh, set);
  if (us_engine_attention_is_long(&sh->a)) {
    if (threadIdx.x % 32 == 0) us_attention_decide(b, sh->ring);
    us_engine_count(&b->attentions);
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    us_engine_jitter(b);
    us_attention_say(&s->planned, n + 1);
  }
  __syncwarp();
  us_attention_fetch_job(&fetching);
}

#endif
