/* attention_ahead.cuh: a warp that plans attention while the projection before it still runs.
 *
 *     us_engine_attention_ahead(op, when, n);                // the planning warp: operation n of the launch, not before `when`
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
  uint32_t shift = op->shift, blocks = b->blocks;
  uint32_t j = b->index + blocks - (shift - us_engine_quotient(shift, blocks) * blocks);
  return j < blocks ? j : j - blocks;
}

static __device__ __forceinline__ void us_attention_fetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* What a lane asks for of what the first job will read, in registers: when the plan is announced, the compute warps may go on to another
 * job. Eight lanes have a unit's page. */
struct us_attention_fetching {
  const uint8_t *page;
  const float *norm, *rope;
  uint32_t keys, values, key_lines;       /* offsets in a page */
  uint32_t lines, norm_lines, rope_lines; /* of 128 bytes; 0: none */
};
static __device__ __forceinline__ struct us_attention_fetching us_attention_fetching_of(
    const struct us_attention_shared *sh, const struct us_attention_row *row) {
  const struct us_engine_attention *a = &sh->a;
  uint32_t lane = threadIdx.x % 32;
  struct us_attention_fetching x;
  x.page = sh->leaf[lane / 8].page;
  x.key_lines = us_engine_k_stride(a->Q); /* 64 keys */
  x.lines = sh->job.leaf == US_ENGINE_NONE && x.page ? x.key_lines + a->V : 0;
  x.keys = us_head_key_offset(a->Q, sh->job.g, 0);
  x.values = us_head_value_offset(a->G, a->Q, a->V, sh->job.g, 0) - x.key_lines * 128;
  x.norm = lane < 16 ? a->q_norm : a->k_norm, x.norm_lines = x.norm ? (a->Q + 31) / 32 : 0;
  x.rope = a->rope + (size_t)row->fresh * a->rotary, x.rope_lines = (row->count * a->rotary + 31) / 32;
  return x;
}
static_assert(US_ATTENTION_UNITS * 8 == 32 && 192 / 32 <= 16, "every lane has a page and a norm");

/* One warp: ask for it. */
static __device__ __forceinline__ void us_attention_fetch_job(const struct us_attention_fetching *x) {
  uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
  for (uint32_t i = lane % 8; i < x->lines; i += 8)
    us_attention_fetch(x->page + (i < x->key_lines ? x->keys : x->values) + i * 128);
#pragma unroll 1
  for (uint32_t i = lane; i < x->rope_lines; i += 32) us_attention_fetch(x->rope + i * 32);
  if (lane % 16 < x->norm_lines) us_attention_fetch(x->norm + lane % 16 * 32);
}

/* What a plan needs of the operation: nothing of it changes, so it is loaded before there is anything to plan. */
struct us_attention_task {
  uint32_t program, row_tile, first, wait;
  uint32_t word; /* of us_engine_attention, a lane's */
};
static_assert(sizeof(struct us_engine_attention) <= 128, "a word a lane");

static __device__ __forceinline__ struct us_attention_task us_attention_task_of(
    const struct us_engine_block *b, const struct us_engine_op *op) {
  uint32_t lane = threadIdx.x % 32;
  struct us_attention_task t = {op->program, op->row_tile, us_attention_first(b, op), op->wait, 0};
  if (lane < sizeof op->attention / 4) t.word = ((const uint32_t *)&op->attention)[lane];
  return t;
}

/* One warp: `op` is done. Seldom looked at twice in a round: it is the same for a pass. */
static __device__ __forceinline__ void us_attention_await_rows(const struct us_engine_block *b, uint32_t op) {
  uint32_t have, want = us_engine_target(b, op), news = (b->seen_round ^ b->round) | (b->seen[0] ^ (op + 1));
  const uint32_t *done = us_engine_rank_of(b)->done + op;
  struct us_engine_watch watch = {0, 0};
  while (want && news && (int32_t)((have = us_load_relaxed(done)) - want) < 0)
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, op, have, want);
}

/* One warp: sinks, rows, the block's first job. Returns whether there is one. */
static __device__ __forceinline__ bool us_attention_plan(const struct us_engine_block *b,
                                                         const struct us_attention_task *t,
                                                         struct us_attention_shared *sh) {
  us_attention_plan_rows(b, t->program, t->row_tile, sh);
  uint32_t H = sh->a.H;
  const float *sinks = sh->a.sink;
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < H; i += 32)
    sh->sink[i] = sinks ? sinks[i] * US_ATTENTION_LOG2E : -CUDART_INF_F;
  __syncwarp();
  bool exists = t->first < sh->jobs;
  if (exists) us_attention_set_job(t->first, true);
  __syncwarp();
  return exists;
}

/* One lane: what the operation waits for; the plan is announced. `rows`: the operation that the rows waited for. */
static __device__ __forceinline__ void us_attention_announce(struct us_engine_block *b, uint32_t wait,
                                                             uint32_t rows, struct us_attention_shared *sh,
                                                             uint32_t n) {
  b->seen[0] = rows + 1, b->seen_round = b->round;
  sh->input = us_engine_rank_of(b)->done + (wait == US_ENGINE_NONE ? 0 : wait);
  sh->want = us_engine_target(b, wait);
  if (us_engine_attention_is_long(&sh->a)) us_attention_decide(b, sh->ring), b->attentions++;
  us_engine_jitter(b);
  us_attention_say(&us_engine_shared_of(b)->planned, n + 1);
}

/* The planning warp: operation n of the launch; from operation `when` on the plan's place is nobody else's. */
static __device__ __noinline__ void us_engine_attention_ahead(const struct us_engine_op *op, uint32_t when,
                                                              uint32_t n) {
  struct us_engine_block *b = us_engine_self();
  struct us_attention_shared *sh = us_attention_shared_of();
  uint32_t lane = threadIdx.x % 32, have;
  struct us_attention_task task = us_attention_task_of(b, op);
  struct us_engine_watch watch = {0, 0};
  while ((int32_t)((have = us_attention_look(&us_engine_shared_of(b)->entered)) - when) < 0) {
    __nanosleep(100);
    us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, b->op_index, have, when);
  }
  if (lane < sizeof sh->a / 4) ((uint32_t *)&sh->a)[lane] = task.word;
  __syncwarp();
  uint32_t rows = sh->a.ready == US_ENGINE_NONE ? task.wait : sh->a.ready;
  us_attention_await_rows(b, rows);
  bool exists = us_attention_plan(b, &task, sh);
  const struct us_attention_row *row = sh->row + (exists ? sh->job.row : 0);
  bool unset = exists && row->together > 1;
  struct us_attention_fetching fetching;
  fetching.lines = fetching.rope_lines = fetching.norm_lines = 0;
  if (exists && !unset && row->sequence != US_ENGINE_NONE) fetching = us_attention_fetching_of(sh, row);
  __syncwarp();
  if (lane == 0) {
    sh->unset = unset;
    us_attention_announce(b, task.wait, rows, sh, n);
  }
  __syncwarp();
  us_attention_fetch_job(&fetching);
}

#endif
