/* route.cuh: router logits to the active experts of a row tile, in the shared memory of every block: no hand-off after it.
 *
 * Bound: latency between the router's logits and the first expert page: every block does all of it. Rule as kernels/router: sigmoid
 * scores, bias for choosing only, ties to the lowest id, ids ascending, weights normalised over the chosen ones. A warp has a
 * row; expert e is lane e % 32's.
 */
#ifndef US_KERNELS_ENGINE_ROUTE_CUH
#define US_KERNELS_ENGINE_ROUTE_CUH

#include "base/philox.h"
#include "kernels/engine/reduce.cuh"

#define US_ROUTE_LANE_EXPERTS 16 /* E <= 512 */

/* What a row chose, and which experts anybody chose: over us_engine_scratch. */
struct us_route_work {
  float logit[US_ENGINE_ROWS][32 * US_ROUTE_LANE_EXPERTS];
  uint32_t chosen[US_ENGINE_ROWS][US_ROUTE_LANE_EXPERTS]; /* bit masks of 32 experts */
  uint32_t any[US_ROUTE_LANE_EXPERTS];
  float score[US_ENGINE_ROWS][US_ENGINE_MAX_TOPK]; /* by ascending id */
};

static __device__ __forceinline__ float us_route_sigmoid(float logit) {
  return 1.0f / (1.0f + us_expf(-logit));
}

/* Order-preserving bits of a choice; NaN is below everything. */
static __device__ __forceinline__ uint32_t us_route_key(float choice) {
  if (!(choice >= -INFINITY)) return 0;
  uint32_t bits = __float_as_uint(choice + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Uniform routing: a random key an expert, a function of request, position and layer, so that plain and speculative decoding
 * route a token alike. Experts 32 i + lane for i = 4 q + j share the quad of words (q, lane). */
static __device__ __forceinline__ void us_route_random(const struct us_engine_block *b, const struct us_engine_op *op,
                                                       uint32_t token, uint32_t lane, uint32_t *key) {
  const struct us_engine_row *row = us_engine_rows(b, op) + token;
  const struct us_engine_sequence *sequence = &b->rank->state->sequence[__ldcg(&row->sequence)];
  struct us_philox_key philox = us_philox_key(op->route.uniform_seed ^ __ldcg(&sequence->seed));
  uint32_t position = __ldcg(&row->position), sample = __ldcg(&sequence->sample), E = op->route.E;
#pragma unroll
  for (int q = 0; q < US_ROUTE_LANE_EXPERTS / 4; q++) {
    uint32_t out[4];
    if (q * 128 >= E) continue;
    us_philox_quad(philox, position, sample, q * 32 + lane, US_STREAM_ROUTE | op->layer << 8, out);
#pragma unroll
    for (int j = 0; j < 4; j++) key[4 * q + j] = (4 * q + j) * 32 + lane < E ? (out[j] >> 1) + 1 : 0;
  }
}

/* The logits of all rows into shared memory, every load under way at once. */
static __device__ __forceinline__ void us_route_gather(struct us_route_work *work, const struct us_engine_route *r) {
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < US_ENGINE_ROWS * r->E; i += US_ENGINE_COMPUTE) {
    uint32_t token = i / r->E, e = i % r->E;
    const float *from = r->logits + (size_t)token * r->stride + e;
    float sum = __ldcg(from);
#pragma unroll 4
    for (uint32_t p = 1; p < r->parts; p++) sum = __fadd_rn(sum, __ldcg(from + (size_t)p * US_ENGINE_ROWS * r->stride));
    work->logit[token][e] = sum;
  }
}

/* What to choose by; 0 stands for no expert. */
static __device__ __forceinline__ void us_route_keys(const struct us_engine_block *b, const struct us_engine_op *op,
                                                     const struct us_route_work *work, uint32_t token, uint32_t lane,
                                                     uint32_t *key) {
  const struct us_engine_route *r = &op->route;
#pragma unroll
  for (int i = 0; i < US_ROUTE_LANE_EXPERTS; i++) {
    uint32_t e = i * 32 + lane;
    key[i] = 0;
    if (e >= r->E || r->uniform) continue;
    key[i] = us_route_key(us_route_sigmoid(work->logit[token][e]) + (r->bias ? r->bias[e] : 0.0f));
    if (!key[i]) key[i] = 1; /* a NaN choice still is an expert */
  }
  if (r->uniform) us_route_random(b, op, token, lane, key);
}

/* Choose top_k experts of a row: bit masks of its experts, and their scores by ascending id. */
static __device__ __forceinline__ void us_route_choose(struct us_route_work *work, const struct us_engine_route *r,
                                                       uint32_t token, uint32_t lane, const uint32_t *key) {
  uint32_t mine = 0; /* bit i: expert 32 i + lane */
  for (uint32_t k = 0; k < r->top_k; k++) {
    uint32_t best = 0, id = US_ENGINE_NONE;
#pragma unroll
    for (int i = 0; i < US_ROUTE_LANE_EXPERTS; i++)
      if (key[i] > best && !(mine >> i & 1)) best = key[i], id = i * 32 + lane;
    uint32_t most = __reduce_max_sync(0xffffffffu, best);
    uint32_t first = __reduce_min_sync(0xffffffffu, best == most ? id : US_ENGINE_NONE);
    if (id == first && best == most) mine |= 1u << id / 32;
  }
  uint32_t before = 0;
#pragma unroll
  for (int i = 0; i < US_ROUTE_LANE_EXPERTS; i++) {
    uint32_t word = __ballot_sync(0xffffffffu, mine >> i & 1), at = before + __popc(word & ((1u << lane) - 1));
    if (lane == 0) work->chosen[token][i] = word;
    if ((mine >> i & 1) && at < US_ENGINE_MAX_TOPK) work->score[token][at] = us_route_sigmoid(work->logit[token][i * 32 + lane]);
    before += __popc(word);
  }
}

/* Position of expert e among the active ones: experts below it. */
static __device__ __forceinline__ uint32_t us_route_slot(const struct us_route_work *work, uint32_t e) {
  uint32_t below = __popc(work->any[e / 32] & ((1u << e % 32) - 1));
  for (uint32_t i = 0; i < e / 32; i++) below += __popc(work->any[i]);
  return below;
}

/* One warp a row: enter the row's pairs into the table. */
static __device__ __forceinline__ void us_route_enter(struct us_engine_active *active, const struct us_route_work *work,
                                                      const struct us_engine_route *r, uint32_t token, uint32_t lane,
                                                      bool report) {
  float sum = 0;
  for (uint32_t k = 0; k < r->top_k; k++) sum = __fadd_rn(sum, work->score[token][k]);
  uint32_t before = 0;
  for (uint32_t i = 0; i < US_ROUTE_LANE_EXPERTS; i++) {
    uint32_t word = work->chosen[token][i];
    if (word >> lane & 1) {
      uint32_t k = before + __popc(word & ((1u << lane) - 1)), e = i * 32 + lane, slot = us_route_slot(work, e);
      float weight = work->score[token][k];
      if (r->normalise) weight = weight / (sum + 1e-20f);
      active->pair[slot][token] = (int16_t)(token * r->top_k + k);
      active->weight[slot][token] = weight * r->scaling;
      active->expert[slot] = (uint16_t)e;
      if (report && r->opt_routed) r->opt_routed[token * r->top_k + k] = e;
    }
    before += __popc(word);
  }
}

/* The active list from the rows' logits; the router's operation is done. */
static __device__ __noinline__ void us_engine_route_build(struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_route *r = &op->route;
  struct us_engine_active *active = &b->shared->active;
  struct us_route_work *work = (struct us_route_work *)us_engine_scratch(b);
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  us_engine_drain(b);
  for (uint32_t i = threadIdx.x; i < US_ENGINE_ACTIVE * US_ENGINE_ROWS; i += US_ENGINE_COMPUTE)
    active->pair[i / US_ENGINE_ROWS][i % US_ENGINE_ROWS] = -1, active->weight[i / US_ENGINE_ROWS][i % US_ENGINE_ROWS] = 0;
  if (threadIdx.x < US_ROUTE_LANE_EXPERTS) work->any[threadIdx.x] = 0;
  us_route_gather(work, r);
  us_engine_meet();
  bool exists = warp < US_ENGINE_ROWS && __ldcg(&us_engine_rows(b, op)[warp % US_ENGINE_ROWS].sequence) != US_ENGINE_NONE;
  if (exists) {
    uint32_t key[US_ROUTE_LANE_EXPERTS];
    us_route_keys(b, op, work, warp, lane, key);
    us_route_choose(work, r, warp, lane, key);
    __syncwarp();
    if (lane < US_ROUTE_LANE_EXPERTS) atomicOr(&work->any[lane], work->chosen[warp][lane]);
  }
  us_engine_meet();
  if (exists) us_route_enter(active, work, r, warp, lane, b->index == 0);
  uint32_t count = 0;
  for (uint32_t i = 0; i < US_ROUTE_LANE_EXPERTS; i++) count += __popc(work->any[i]);
  if (threadIdx.x == 0) active->count = count;
  us_engine_meet();
}

static __device__ void us_engine_route(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_wait_done(b, op->wait);
  us_engine_route_build(b, op);
  if (threadIdx.x == 0) {
    us_barrier_arrive(us_shared_address(&b->shared->routed));
    if (b->index == 0) {
      b->rank->state->experts += b->shared->active.count;
      b->rank->state->expert_layers++;
    }
  }
  us_engine_finish(b);
}

#endif
