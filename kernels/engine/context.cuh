/* context.cuh: keys and values of committed rows into every layer of the drafter's cache.
 *
 *     case US_ENGINE_CONTEXT: us_engine_context_append(b, op);      // all compute threads of all blocks of the rank
 *
 * A row whose slot is below its sequence's `committed` is appended; others leave no trace. Per head: norm and rotation in FP32
 * (attention_head.cuh, as the drafter's own keys), values scaled, both rounded to bf16. Bound: latency; half a warp an item (row,
 * layer, KV head), 80 items for the published drafter's share.
 */
#ifndef US_KERNELS_ENGINE_CONTEXT_CUH
#define US_KERNELS_ENGINE_CONTEXT_CUH

#include "kernels/engine/attention_head.cuh"

/* Half a warp: one KV head of one row in one layer; nothing is written unless `exists`. */
static __device__ __forceinline__ void us_context_append(const struct us_engine_block *b,
                                                         const struct us_engine_context *c,
                                                         const struct us_engine_row *row, const float *kv,
                                                         uint32_t layer, uint32_t g, bool exists) {
  uint32_t lane = threadIdx.x % 16, position = exists ? row->position : 0, slot = position % 64;
  const float *from = kv + layer * c->G * (c->Q + c->V);
  struct us_head h = {from + g * c->Q,
                      c->k_norm ? c->k_norm + layer * c->Q : (const float *)0,
                      c->rope + (size_t)position * c->rotary,
                      c->Q,
                      c->rotary,
                      c->eps};
  float2 x[US_HEAD_PAIRS];
  us_head_load<0>(&h, lane, x);
  us_head_finish<0>(&h, lane, x);
  if (!exists) return;
  const uint64_t *table = b->rank->state->sequence[row->sequence].draft_kv.tables[layer];
  uint8_t *page = (uint8_t *)b->rank->draft_pool + table[position / 64 % c->page_count];
  uint32_t *key = (uint32_t *)(page + us_head_key_offset(c->Q, g, slot)) + lane;
#pragma unroll
  for (uint32_t i = 0; i < US_HEAD_PAIRS; i++)
    if (32 * i < c->Q) key[16 * i] = us_head_round(x[i].x, x[i].y);
  for (uint32_t d = lane; d < c->V; d += 16)
    ((uint16_t *)(page + us_head_value_offset(c->G, c->Q, c->V, g, d)))[slot] =
        us_bf16_from_f32(__ldcg(from + c->G * c->Q + g * c->V + d) * c->value_scale);
}

namespace us_rare {
static __device__ __noinline__ void us_engine_context_append(struct us_engine_block *b,
                                                             const struct us_engine_op *op) {
  const struct us_engine_context *c = &op->context;
  const struct us_engine_state *state = b->rank->state;
  uint32_t first = (b->index + b->blocks - op->shift % b->blocks) % b->blocks;
  uint32_t each = c->layers * c->G, items = US_ENGINE_ROWS * each; /* even */
  us_engine_wait_done(b, op->wait);
  for (uint32_t pair = first + threadIdx.x / 32 * b->blocks; pair < items / 2;
       pair += b->blocks * US_ENGINE_COMPUTE_WARPS) {
    uint32_t i = pair * 2 + threadIdx.x / 16 % 2, r = i / each;
    const struct us_engine_row *row = state->context + op->row_tile * US_ENGINE_ROWS + r;
    bool exists = row->sequence != US_ENGINE_NONE && row->slot < state->sequence[row->sequence].committed;
    const float *kv = c->kv + (size_t)r * each * (c->Q + c->V);
    us_context_append(b, c, row, kv, i % each / c->G, i % c->G, exists);
  }
  us_engine_finish(b);
}
} // namespace us_rare
using us_rare::us_engine_context_append;

#endif
