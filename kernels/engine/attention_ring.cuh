/* attention_ring.cuh: long contexts: the ring of weights as room for keys and values, and copies into it.
 *
 *     case US_ENGINE_ATTENTION: us_engine_attention_stream(b, op);     // streaming thread: gives the ring away
 *     us_attention_take_ring(b);                                       // all compute threads; the ring is theirs
 *     us_attention_copy_keys<192, 128>(shared, slot, page, i);         // asynchronous: commit, wait, barrier
 *     us_attention_give_ring(b);                                       // all compute threads; weights stream on
 *
 * An operation takes the ring if a row is cut in segments, which the warp that plans it finds out and says (us_attention_decide); the
 * streaming thread and the epilogue warps wait to hear it, and weights of the next product stream during attention if not. The ring then
 * holds one leaf a unit (attention_long.cuh), or the queries of 8 rows, one leaf, weights (attention_shared.cuh). While a leaf is
 * multiplied the next one is on its way. Rows of 16-byte pieces; in odd rows the two halves of every 128 bytes are swapped, so that 8
 * lanes that load 64 bytes of two rows meet every bank once.
 */
#ifndef US_KERNELS_ENGINE_ATTENTION_RING_CUH
#define US_KERNELS_ENGINE_ATTENTION_RING_CUH

#include "kernels/engine/attention_plan.cuh"

#define US_ATTENTION_VALUES 24576 /* of a leaf's slot: where its values begin */
#define US_ATTENTION_SLOT   40960
static_assert(US_ATTENTION_UNITS * US_ATTENTION_SLOT <= US_ENGINE_STAGES * US_ENGINE_STAGE_BYTES,
              "slots of units");

/* Whether a row may see more leaves (of 64 keys; a drafter's block is one) than a block does at once. */
static __device__ __forceinline__ bool us_engine_attention_is_long(const struct us_engine_attention *a) {
  return !a->window || (a->window + 62) / 64 + 1 + a->draft > US_ENGINE_ATTENTION_TOGETHER;
}

/* ---- the ring -------------------------------------------------------------------------------------------------------- */

/* The i-th stage from a role's place on, and its phase. */
static __device__ __forceinline__ uint32_t us_attention_stage_of(const struct us_engine_block *b, uint32_t i,
                                                                 uint32_t *phase) {
  uint32_t at = b->stage + i;
  *phase = at < US_ENGINE_STAGES ? b->phase : b->phase ^ 1;
  return at < US_ENGINE_STAGES ? at : at - US_ENGINE_STAGES;
}

/* One lane of the planning warp: the roles that wait for answers have heard all but the last 31. */
static __device__ __forceinline__ void us_attention_await_heard(const struct us_engine_block *b) {
  const struct us_engine_shared *s = us_engine_shared_of(b);
  struct us_engine_watch watch = {0, 0};
#pragma unroll 1
  for (uint32_t warp = US_ENGINE_COMPUTE_WARPS; warp <= US_ENGINE_COMPUTE_WARPS + US_ENGINE_EPILOGUES;
       warp++) {
    const volatile uint32_t *heard = &s->warp[warp].attentions;
    while (b->attentions - *heard >= 32)
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_FREE, warp, *heard, b->attentions);
  }
}

/* One lane of the planning warp: whether the operation takes the ring. Nobody else writes the two words. */
static __device__ __forceinline__ void us_attention_decide(struct us_engine_block *b, bool takes) {
  struct us_engine_shared *s = us_engine_shared_of(b);
  us_attention_await_heard(b);
  uint32_t bit = 1u << b->attentions % 32;
  *(volatile uint32_t *)&s->takes = takes ? s->takes | bit : s->takes & ~bit;
  __threadfence_block();
  *(volatile uint32_t *)&s->decided = b->attentions + 1;
}

/* Another role: wait for it. `warp`: all its lanes are here. */
static __device__ __forceinline__ bool us_attention_decided(struct us_engine_block *b,
                                                            const struct us_engine_op *op, bool warp) {
  const volatile struct us_engine_shared *s = us_engine_shared_of(b);
  if (!us_engine_attention_is_long(&op->attention)) return false;
  if (warp) __syncwarp();
  uint32_t here = b->attentions;
  if (threadIdx.x % 32 == 0) {
    struct us_engine_watch watch = {0, 0};
    while ((int32_t)(s->decided - here) <= 0) {
      __nanosleep(100);
      us_engine_watch_try(b, &watch, US_ENGINE_WAIT_FREE, 0, s->decided, here + 1);
    }
    __threadfence_block();
  }
  if (warp) __syncwarp();
  bool takes = s->takes >> here % 32 & 1;
  us_engine_count(&b->attentions);
  return takes;
}

/* The streaming thread: every stage, with nothing in it. */
static __device__ __forceinline__ void us_engine_attention_stream(struct us_engine_block *b,
                                                                  const struct us_engine_op *op) {
  struct us_engine_shared *s = us_engine_shared_of(b);
  if (!us_attention_decided(b, op, false)) return;
#pragma unroll 1
  for (uint32_t i = 0; i < US_ENGINE_STAGES; i++) {
    uint32_t phase, stage = us_attention_stage_of(b, i, &phase);
    us_engine_barrier_wait(b, &s->empty[stage], phase ^ 1, US_ENGINE_WAIT_FREE);
    us_barrier_arrive_many(us_shared_address(&s->full[stage]), US_ENGINE_FILLERS);
  }
  b->phase ^= 1;
}

/* An epilogue warp only passes by. */
static __device__ __forceinline__ void us_engine_attention_pass(struct us_engine_block *b,
                                                                const struct us_engine_op *op) {
  if (!us_attention_decided(b, op, true)) return;
  if (threadIdx.x % 32 == 0) b->phase ^= 1;
  __syncwarp();
}

static __device__ __forceinline__ void us_attention_take_ring(const struct us_engine_block *b) {
#pragma unroll 1
  for (uint32_t i = 0; i < US_ENGINE_STAGES; i++) {
    uint32_t phase, stage = us_attention_stage_of(b, i, &phase);
    us_engine_barrier_wait(b, &us_engine_shared_of(b)->full[stage], phase, US_ENGINE_WAIT_STAGE);
  }
}

/* What threads wrote there is over before copies of weights begin. */
static __device__ __forceinline__ void us_attention_give_ring(struct us_engine_block *b) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
#pragma unroll 1
    for (uint32_t i = 0; i < US_ENGINE_STAGES; i++)
      us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->empty[i]));
    b->phase ^= 1;
  }
  __syncwarp();
}

static __device__ __forceinline__ uint8_t *us_attention_slot(uint32_t unit) {
  return us_engine_shared_of((const struct us_engine_block *)0)->ring[0] + unit * US_ATTENTION_SLOT;
}

/* ---- copies ---------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void us_attention_copy(const void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(us_shared_address(to)), "l"(from)
               : "memory");
}
static __device__ __forceinline__ void us_attention_commit(void) {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/* This thread's copies but those of the last N commits. */
template <int N> static __device__ __forceinline__ void us_attention_copied(void) {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
static __device__ __forceinline__ void us_attention_copied_all(void) {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Index of a 16-byte piece of a leaf's row, of `pieces` a row. */
static __device__ __forceinline__ uint32_t us_attention_at(uint32_t pieces, uint32_t row, uint32_t piece) {
  return row * pieces + (pieces % 8 ? piece : piece ^ (row % 2 * 4));
}

/* Thread i of THREADS: its part of a page's keys: 8 pieces of a row are a line. */
template <int QS, int THREADS>
static __device__ __forceinline__ void us_attention_copy_keys(const struct us_attention_shared *sh,
                                                              uint8_t *slot, const uint8_t *page,
                                                              uint32_t i) {
  uint32_t Q = QS ? QS : sh->a.Q, pieces = us_engine_k_stride(Q) / 8;
  const uint4 *from = (const uint4 *)(page + us_head_key_offset(Q, sh->job.g, 0));
  asm volatile("" : "+r"(i)); /* its addresses are not worth registers */
  if (QS % 64 || !QS) {
#pragma unroll 1
    for (; i < 64 * pieces; i += THREADS)
      us_attention_copy((uint4 *)slot + us_attention_at(pieces, i / pieces, i % pieces), from + i);
    return;
  }
  uint4 *to = (uint4 *)slot + us_attention_at(pieces, i / 8, i % 8);
  from += i / 8 * pieces + i % 8;
#pragma unroll
  for (uint32_t row = 0; row < 64; row += THREADS / 8)
#pragma unroll
    for (uint32_t line = 0; line < (QS ? QS : 64) / 64; line++)
      us_attention_copy(to + row * pieces + line * 8, from + row * pieces + line * 8);
}

/* The same of its values. */
template <int QS, int VS, int THREADS>
static __device__ __forceinline__ void us_attention_copy_values(const struct us_attention_shared *sh,
                                                                uint8_t *slot, const uint8_t *page,
                                                                uint32_t i) {
  uint32_t Q = QS ? QS : sh->a.Q, V = VS ? VS : sh->a.V;
  asm volatile("" : "+r"(i));
  const uint4 *from = (const uint4 *)(page + us_head_value_offset(sh->a.G, Q, V, sh->job.g, 0)) + i;
  uint4 *to = (uint4 *)(slot + US_ATTENTION_VALUES) + us_attention_at(8, i / 8, i % 8);
#pragma unroll
  for (uint32_t row = 0; row < (VS ? VS : 128); row += THREADS / 8)
    if (VS || row + i / 8 < V) us_attention_copy(to + row * 8, from + row * 8);
}

/* A lane's piece 4 i + t of a row: `even`, `odd`: where pieces t of even and odd i lie, less 4 i. */
struct us_attention_pieces {
  const uint4 *even, *odd;
};
static __device__ __forceinline__ struct us_attention_pieces us_attention_pieces_of(const uint8_t *rows,
                                                                                    uint32_t pieces,
                                                                                    uint32_t row,
                                                                                    uint32_t t) {
  const uint4 *at = (const uint4 *)rows + row * pieces + t;
  int swap = pieces % 8 ? 0 : (int)(row % 2) * 4;
  struct us_attention_pieces x = {at + swap, at - swap};
  return x;
}
static __device__ __forceinline__ uint4 us_attention_piece_at(struct us_attention_pieces x, int i,
                                                              uint32_t more) {
  return (i % 2 ? x.odd : x.even)[4 * i + more];
}

#endif
