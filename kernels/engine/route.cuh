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

#define US_ROUTE_EXPERTS 512 /* E at most */
#define US_ROUTE_WORDS   (US_ROUTE_EXPERTS / 32)

/* Over us_engine_scratch. Loops are kept rolled where a row has few of a thing: this code runs once a layer, and fetching a
 * long straight run of instructions costs more than executing it. */
struct us_route_work {
  float score[US_ENGINE_ROWS][US_ROUTE_EXPERTS];  /* sigmoid of the logit */
  uint32_t key[US_ENGINE_ROWS][US_ROUTE_EXPERTS]; /* what is chosen by; 0: no expert */
  uint32_t any[US_ROUTE_WORDS];                   /* bit mask of the experts somebody chose */
  float chosen[US_ENGINE_ROWS][US_ENGINE_MAX_TOPK];
  /* Of the rows: read once a block, since 132 blocks that read one word wait for each other. */
  uint64_t seed[US_ENGINE_ROWS];
  uint32_t exists[US_ENGINE_ROWS], position[US_ENGINE_ROWS], sample[US_ENGINE_ROWS];
};
static_assert(sizeof(struct us_route_work) <= US_ENGINE_VECTOR_BYTES, "routing in shared memory");

static __device__ __forceinline__ float us_route_sigmoid(float logit) {
  return 1.0f / (1.0f + us_expf(-logit));
}

/* Order-preserving bits of a choice; NaN is below everything but still an expert. */
static __device__ __forceinline__ uint32_t us_route_key(float choice) {
  if (!(choice >= -INFINITY)) return 1;
  uint32_t bits = __float_as_uint(choice + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Uniform routing: a random key an expert, a function of request, position and layer, so that plain and speculative decoding
 * route a token alike. One thread makes four experts' keys. */
static __device__ __forceinline__ void us_route_random(const struct us_engine_block *b, const struct us_engine_op *op,
                                                       struct us_route_work *work) {
  uint32_t E = op->route.E, quads = (E + 3) / 4;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < US_ENGINE_ROWS * quads; i += US_ENGINE_COMPUTE) {
    uint32_t token = i / quads, quad = i % quads, out[4];
    struct us_philox_key philox = us_philox_key(op->route.uniform_seed ^ work->seed[token]);
    us_philox_quad(philox, work->position[token], work->sample[token], quad, US_STREAM_ROUTE | op->layer << 8, out);
    for (uint32_t j = 0; j < 4 && quad * 4 + j < E; j++) work->key[token][quad * 4 + j] = (out[j] >> 1) + 1;
  }
}

/* What routing needs to know of the rows. */
static __device__ __forceinline__ void us_route_rows(const struct us_engine_block *b, const struct us_engine_op *op,
                                                     struct us_route_work *work) {
  uint32_t token = threadIdx.x;
  if (token >= US_ENGINE_ROWS) return;
  const struct us_engine_row *row = us_engine_rows(b, op) + token;
  uint32_t sequence = __ldcg(&row->sequence);
  work->exists[token] = sequence != US_ENGINE_NONE;
  work->position[token] = __ldcg(&row->position);
  work->seed[token] = 0, work->sample[token] = 0;
  if (sequence == US_ENGINE_NONE || !op->route.uniform) return;
  const struct us_engine_sequence *s = &b->rank->state->sequence[sequence];
  work->seed[token] = __ldcg(&s->seed), work->sample[token] = __ldcg(&s->sample);
}

#define US_ROUTE_AHEAD 6 /* logits of a thread whose loads are under way together: 8 x 384 over 512 threads */

/* Logits of all rows, the parts' sums added in order, into shared memory. */
static __device__ __forceinline__ void us_route_gather(struct us_route_work *work, const struct us_engine_route *r) {
  uint32_t total = US_ENGINE_ROWS * r->E, parts = r->parts, E = r->E, stride = r->stride;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < total; first += US_ROUTE_AHEAD * US_ENGINE_COMPUTE) {
    float sum[US_ROUTE_AHEAD] = {};
#pragma unroll 1
    for (uint32_t p = 0; p < parts; p++) {
      float v[US_ROUTE_AHEAD];
#pragma unroll
      for (int j = 0; j < US_ROUTE_AHEAD; j++) {
        uint32_t i = first + j * US_ENGINE_COMPUTE;
        v[j] = i < total ? __ldcg(r->logits + ((size_t)p * US_ENGINE_ROWS + i / E) * stride + i % E) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < US_ROUTE_AHEAD; j++) sum[j] = p ? __fadd_rn(sum[j], v[j]) : v[j];
    }
#pragma unroll
    for (int j = 0; j < US_ROUTE_AHEAD; j++) {
      uint32_t i = first + j * US_ENGINE_COMPUTE;
      if (i < total) work->score[i / E][i % E] = sum[j];
    }
  }
}

/* Scores and keys from the logits, by the threads that wrote them. */
static __device__ __forceinline__ void us_route_score(struct us_route_work *work, const struct us_engine_route *r) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < US_ENGINE_ROWS * r->E; i += US_ENGINE_COMPUTE) {
    uint32_t token = i / r->E, e = i % r->E;
    float score = us_route_sigmoid(work->score[token][e]);
    work->score[token][e] = score;
    if (!r->uniform) work->key[token][e] = us_route_key(score + (r->bias ? r->bias[e] : 0.0f));
  }
}

/* One warp: lane k < top_k gets the k-th chosen expert of the row in ascending order; others US_ENGINE_NONE. */
static __device__ __forceinline__ uint32_t us_route_choose(const struct us_route_work *work, const struct us_engine_route *r,
                                                           uint32_t token, uint32_t lane) {
  uint32_t key[US_ROUTE_WORDS], id = US_ENGINE_NONE;
#pragma unroll
  for (int i = 0; i < US_ROUTE_WORDS; i++) key[i] = i * 32 + lane < r->E ? work->key[token][i * 32 + lane] : 0;
#pragma unroll 1
  for (uint32_t k = 0; k < r->top_k; k++) {
    uint32_t best = 0, mine = US_ENGINE_NONE;
#pragma unroll
    for (int i = 0; i < US_ROUTE_WORDS; i++)
      if (key[i] > best) best = key[i], mine = i * 32 + lane;
    uint32_t most = __reduce_max_sync(0xffffffffu, best);
    uint32_t first = __reduce_min_sync(0xffffffffu, best == most ? mine : US_ENGINE_NONE);
#pragma unroll
    for (int i = 0; i < US_ROUTE_WORDS; i++)
      if (i * 32 + lane == first) key[i] = 0;
    if (lane == k) id = first;
  }
  uint32_t rank = 0; /* ascending ids: chosen ones below this lane's */
#pragma unroll 1
  for (uint32_t k = 0; k < r->top_k; k++) rank += __shfl_sync(0xffffffffu, id, k) < id;
  uint32_t sorted = US_ENGINE_NONE;
#pragma unroll 1
  for (uint32_t k = 0; k < r->top_k; k++) {
    uint32_t other = __shfl_sync(0xffffffffu, id, k), at = __shfl_sync(0xffffffffu, rank, k);
    if (at == lane) sorted = other;
  }
  return lane < r->top_k ? sorted : US_ENGINE_NONE;
}

/* Position of expert e among the active ones: experts below it. */
static __device__ __forceinline__ uint32_t us_route_slot(const struct us_route_work *work, uint32_t e) {
  uint32_t below = __popc(work->any[e / 32] & ((1u << e % 32) - 1));
#pragma unroll 1
  for (uint32_t i = 0; i < e / 32; i++) below += __popc(work->any[i]);
  return below;
}

/* One warp a row: enter its pairs, lane k the k-th, into the table. */
static __device__ __forceinline__ void us_route_enter(struct us_engine_active *active, const struct us_route_work *work,
                                                      const struct us_engine_route *r, uint32_t token, uint32_t lane,
                                                      uint32_t e, bool report) {
  if (e == US_ENGINE_NONE) return;
  float sum = 0, weight = work->chosen[token][lane];
#pragma unroll 1
  for (uint32_t k = 0; k < r->top_k; k++) sum = __fadd_rn(sum, work->chosen[token][k]);
  if (r->normalise) weight = weight / (sum + 1e-20f);
  uint32_t slot = us_route_slot(work, e);
  active->pair[slot][token] = (int16_t)(token * r->top_k + lane);
  active->weight[slot][token] = weight * r->scaling;
  active->expert[slot] = (uint16_t)e;
  if (report && r->opt_routed) r->opt_routed[token * r->top_k + lane] = e;
}

/* The active list from the rows' logits; the router's operation is done. */
static __device__ __noinline__ void us_engine_route_build(struct us_engine_block *b, const struct us_engine_op *op) {
  const struct us_engine_route *r = &op->route;
  struct us_engine_active *active = &us_engine_shared_of(b)->active;
  struct us_route_work *work = (struct us_route_work *)us_engine_scratch(b);
  uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32, e = US_ENGINE_NONE;
  us_engine_barrier_wait(b, &us_engine_shared_of(b)->listed, (b->routes - 1) & 1, US_ENGINE_WAIT_ROUTE);
  us_engine_drain(b);
  us_route_gather(work, r);
  ((int16_t *)active->pair)[threadIdx.x] = -1;
  ((float *)active->weight)[threadIdx.x] = 0;
  if (threadIdx.x < US_ROUTE_WORDS) work->any[threadIdx.x] = 0;
  us_route_rows(b, op, work);
  us_engine_meet();
  us_route_score(work, r);
  if (r->uniform) us_route_random(b, op, work);
  us_engine_meet();
  if (token < US_ENGINE_ROWS && work->exists[token])
    e = us_route_choose(work, r, token, lane);
  if (e != US_ENGINE_NONE) {
    atomicOr(&work->any[e / 32], 1u << e % 32);
    work->chosen[token][lane] = work->score[token][e];
  }
  us_engine_meet();
  us_route_enter(active, work, r, token, lane, e, b->index == 0);
  us_engine_meet();
  if (threadIdx.x < US_ENGINE_ACTIVE) {
    uint32_t mask = 0;
    for (int t = 0; t < US_ENGINE_ROWS; t++) mask |= (active->pair[threadIdx.x][t] >= 0 ? 1u : 0u) << t;
    active->rows[threadIdx.x] = (uint8_t)mask;
  }
  if (threadIdx.x < 32) {
    uint32_t count = __reduce_add_sync(0xffffffffu, lane < US_ROUTE_WORDS ? __popc(work->any[lane]) : 0);
    if (lane == 0) active->count = count;
  }
  us_engine_meet();
}
static_assert(US_ENGINE_ACTIVE * US_ENGINE_ROWS == US_ENGINE_COMPUTE, "one thread an entry of the table");

static __device__ void us_engine_route(struct us_engine_block *b, const struct us_engine_op *op) {
  us_engine_wait_done(b, op->wait);
  us_engine_route_build(b, op);
  if (threadIdx.x == 0) {
    us_barrier_arrive(us_shared_address(&us_engine_shared_of(b)->routed));
    if (b->index == 0) {
      b->rank->state->experts += us_engine_shared_of(b)->active.count;
      b->rank->state->expert_layers++;
    }
  }
  us_engine_finish(b);
}

#endif
