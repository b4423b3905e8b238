/* wishes.cuh: what the host wants of a round, from its mailbox to every rank: to park, and whom to cancel.
 *
 *     mail = us_engine_is_mailman(b, s) ? us_load_system16(b->rank->mailbox) : make_uint4(0, 0, 0, 0);
 *     if (us_engine_is_mailman(b, s)) us_engine_send_wishes(b, s, mail);
 *     us_engine_take_wishes(b, s);                                 // one thread of block 0 of every rank
 *
 * The target's SELECT carries it beside its candidates, so all ranks learn the same of the same round.
 */
#ifndef US_KERNELS_ENGINE_WISHES_CUH
#define US_KERNELS_ENGINE_WISHES_CUH

#include "kernels/engine/candidate.cuh"

/* One thread of block 0 of rank 0: start to load them before anything else, PCIe takes its time. */
static __device__ bool us_engine_is_mailman(const struct us_engine_block *b,
                                            const struct us_engine_select *s) {
  return b->rank->rank == 0 && b->index == 0 && !s->draft && threadIdx.x == US_ENGINE_COMPUTE - 1;
}

/* To every rank, whether to park and whom to cancel. A ring without room for this round and the next parks too. */
static __device__ void us_engine_send_wishes(const struct us_engine_block *b,
                                             const struct us_engine_select *s, uint4 mail) {
  uint32_t room = US_ENGINE_EVENTS - (b->rank->state->events - mail.z);
  uint32_t park = mail.x || room < 2 * US_ENGINE_SEQUENCES;
  struct us_engine_pair pair = {park | (uint64_t)mail.y << 32, (uint64_t)us_engine_select_flag(b, s->number)
                                                                   << 32};
#pragma unroll 1
  for (uint32_t to = 0; to < b->rank->ranks; to++)
    us_store_pair(us_engine_candidates(b, s->number, to) + b->rank->ranks * b->blocks * 128, pair);
}

static __device__ void us_engine_take_wishes(const struct us_engine_block *b,
                                             const struct us_engine_select *s) {
  struct us_engine_pair pair[US_ENGINE_BATCH];
  const uint8_t *from = us_engine_candidates(b, s->number, b->rank->rank) + b->rank->ranks * b->blocks * 128;
  us_engine_await_pairs(b, from, 0, 1, (uint64_t)us_engine_select_flag(b, s->number) << 32,
                        0xffffffffull << 32, pair);
  b->rank->state->park = (uint32_t)pair[0].low;
  b->rank->state->cancel = (uint32_t)(pair[0].low >> 32);
}

#endif
