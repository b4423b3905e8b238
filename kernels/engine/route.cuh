/* route.cuh: router logits to the active experts of a row tile, in the shared memory of every block: no hand-off after it.
 *
 * Bound: latency between the router's logits and the first expert page: every block does all of it. Rule as kernels/router: sigmoid
 * scores, bias for choosing only, ties to the lowest id, ids ascending, weights normalised over the chosen ones. Two warps score
 * a row, one chooses, and a thread an expert makes the list. A chain of loads costs a microsecond a link, so all of a thread's logits
 * come at once, and what does not depend on them is done before they are there. Logits of one row tile carry their own flag, so a block does
 * not hear of them, and then load them, but loads them until they are there.
 *
 * Contents: keys and logits; choice; the list; the operation.
 */
#ifndef US_KERNELS_ENGINE_ROUTE_CUH
#define US_KERNELS_ENGINE_ROUTE_CUH

#include "base/philox.h"
#include "kernels/engine/reduce.cuh"

#define US_ROUTE_EXPERTS 512 /* E at most */
static_assert(US_ROUTE_EXPERTS == US_ENGINE_COMPUTE, "one thread an expert");

/* Experts up to the next multiple of what a warp looks at together have a key, so that nobody asks whether one exists. */
static __device__ __forceinline__ uint32_t us_route_padded(uint32_t E) {
  return (E + 127) & ~127u;
}

/* Over us_engine_scratch. Loops are kept rolled where a row has few of a thing: this code runs once a layer, and fetching a
 * long straight run of instructions costs more than executing it. */
struct us_route_work {
  float score[US_ENGINE_ROWS]
             [US_ROUTE_EXPERTS]; /* logit, then its sigmoid, then of the chosen the routing weight */
  uint32_t key[US_ENGINE_ROWS][US_ROUTE_EXPERTS]; /* what is chosen by; 0: no expert */
  union {
    float bias[US_ROUTE_EXPERTS]; /* until there are keys */
    uint16_t candidate[US_ENGINE_ROWS][US_ROUTE_EXPERTS];
  };
  uint32_t id[US_ENGINE_ROWS]
             [US_ENGINE_MAX_TOPK]; /* a row's chosen experts, ascending, and their scores, then 0 */
  alignas(16) float chosen[US_ENGINE_ROWS][US_ENGINE_MAX_TOPK];
  uint32_t rows[US_ROUTE_EXPERTS][2]; /* of several row tiles, by expert: bit masks of their rows */
  union {                             /* by expert */
    uint32_t users[US_ROUTE_EXPERTS]; /* bit mask of the row tile's rows that chose it */
    uint32_t first[US_ROUTE_EXPERTS]; /* of several row tiles: first pair */
  };
  uint32_t counts[US_ENGINE_COMPUTE_WARPS];
};
static_assert(sizeof(struct us_route_work) <= US_ENGINE_VECTOR_BYTES, "routing in shared memory");

/* ---- keys and logits ---------------------------------------------------------------------------------------------- */

/* Two warps have a row until its experts are chosen: this thread's row, its first expert and the step to its next. */
#define US_ROUTE_STEP 64
static __device__ __forceinline__ uint32_t us_route_token(void) {
  return threadIdx.x / US_ROUTE_STEP;
}
static __device__ __forceinline__ uint32_t us_route_first(void) {
  return threadIdx.x % US_ROUTE_STEP;
}

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
 * route a token alike. A thread makes four experts' keys at a time. */
static __device__ __forceinline__ void us_route_random(const struct us_engine_block *b,
                                                       const struct us_engine_op *op,
                                                       struct us_route_work *work) {
  const struct us_engine_routed *rows = &us_engine_shared_of(b)->rows;
  uint32_t quads = (op->route.E + 3) / 4, token = us_route_token();
  uint64_t seed = op->route.uniform_seed ^ rows->seed[token];
#pragma unroll 1
  for (uint32_t quad = us_route_first(); quad < quads; quad += US_ROUTE_STEP) {
    struct us_philox_key philox = us_philox_key(seed);
    uint32_t c[4] = {rows->position[token], rows->sample[token], quad, US_STREAM_ROUTE | op->layer << 8};
#pragma unroll 1
    for (uint32_t round = 0; round < US_PHILOX_ROUNDS; round++) us_philox_step(c, philox.word);
    *(uint4 *)&work->key[token][quad * 4] =
        make_uint4((c[0] >> 1) + 1, (c[1] >> 1) + 1, (c[2] >> 1) + 1, (c[3] >> 1) + 1);
  }
}

/* All compute threads: what routing needs to know of the operation's rows, in struct us_engine_routed. The first layer of a pass
 * looks it up, rows and then their sequences, which takes longer than a router's hand-off. */
static __device__ __forceinline__ void us_route_rows(const struct us_engine_block *b,
                                                     const struct us_engine_op *op, uint32_t tile) {
  struct us_engine_routed *rows = &us_engine_shared_of(b)->rows;
  uint32_t token = threadIdx.x,
           pass = (b->round * US_ENGINE_PASSES + op->program) * US_ENGINE_MAX_TILES + op->row_tile + tile + 1;
  if (rows->pass == pass) return;
  us_engine_meet(); /* all have looked */
  if (token < US_ENGINE_ROWS) {
    const struct us_engine_row *row = us_engine_rows(b, op) + tile * US_ENGINE_ROWS + token;
    uint32_t sequence = __ldcg(&row->sequence);
    bool draws = sequence != US_ENGINE_NONE && op->route.uniform;
    const struct us_engine_sequence *s = &us_engine_rank_of(b)->state->sequence[draws ? sequence : 0];
    rows->exists[token] = sequence != US_ENGINE_NONE;
    rows->position[token] = __ldcg(&row->position);
    rows->seed[token] = draws ? __ldcg(&s->seed) : 0, rows->sample[token] = draws ? __ldcg(&s->sample) : 0;
  }
  if (token == 0) rows->pass = pass;
  us_engine_meet();
}

#define US_ROUTE_AHEAD 6 /* logits of a thread whose loads are under way together, in each of */
#define US_ROUTE_PARTS 4 /* so many parts: 384 experts over 64 threads */
#define US_ROUTE_SOME  2 /* parts at a time of any other shape */

/* This thread's logits, the parts' sums added in order, into shared memory. */
namespace us_rare {
static __device__ __noinline__ void us_route_gather_any(struct us_route_work *work,
                                                        const struct us_engine_route *r,
                                                        const float *logits) {
  const struct us_engine_block *b = us_engine_self();
  bool flagged = r->flagged;
  uint32_t E = r->E, parts = r->parts, part = US_ENGINE_ROWS * r->stride, token = us_route_token();
#pragma unroll 1
  for (uint32_t first = us_route_first(); first < E; first += US_ROUTE_AHEAD * US_ROUTE_STEP) {
    const float *from = logits + token * r->stride + first;
    float sum[US_ROUTE_AHEAD] = {};
#pragma unroll 1
    for (uint32_t p = 0; p < parts; p += US_ROUTE_SOME, from += US_ROUTE_SOME * part) {
      uint32_t v
          [US_ROUTE_SOME]
          [US_ROUTE_AHEAD]; /* all under way together; more would be kept on the stack while they are looked at */
      struct us_engine_watch watch = {0, 0};
      for (bool absent = true; absent;) {
        absent = false;
#pragma unroll
        for (int q = 0; q < US_ROUTE_SOME; q++)
#pragma unroll
          for (int j = 0; j < US_ROUTE_AHEAD; j++) {
            v[q][j] = 0;
            if (p + q < parts && first + j * US_ROUTE_STEP < E)
              v[q][j] = us_load_relaxed((const uint32_t *)from + q * part + j * US_ROUTE_STEP);
          }
#pragma unroll
        for (int q = 0; q < US_ROUTE_SOME; q++)
#pragma unroll
          for (int j = 0; j < US_ROUTE_AHEAD; j++) absent |= v[q][j] == US_ENGINE_ABSENT;
        absent = absent && flagged;
        if (absent) us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, us_engine_fetched_op(b)->wait, 0, 1);
      }
#pragma unroll
      for (int q = 0; q < US_ROUTE_SOME; q++)
#pragma unroll
        for (int j = 0; j < US_ROUTE_AHEAD; j++) sum[j] = __fadd_rn(sum[j], __uint_as_float(v[q][j]));
    }
#pragma unroll
    for (int j = 0; j < US_ROUTE_AHEAD; j++)
      if (first + j * US_ROUTE_STEP < E) work->score[token][first + j * US_ROUTE_STEP] = sum[j];
  }
}
} // namespace us_rare
using us_rare::us_route_gather_any;
/* A warp's logits of 384 experts and four parts, all loads under way together; until none is absent if they carry their own flag. */
#define US_ROUTE_PAIRS (US_ROUTE_AHEAD / 2)
static __device__ __forceinline__ void us_route_load(uint2 (*v)[US_ROUTE_PAIRS], const float *from,
                                                     bool flagged) {
  const struct us_engine_block *b = us_engine_self();
  struct us_engine_watch watch = {0, 0};
  uint64_t begin = us_engine_span_begin(b);
  for (bool absent = true; absent;) {
    absent = false;
#pragma unroll
    for (int q = 0; q < US_ROUTE_PARTS; q++)
#pragma unroll
      for (int j = 0; j < US_ROUTE_PAIRS; j++)
        v[q][j] = us_load_gpu8(from + (q * US_ENGINE_ROWS * US_ROUTE_AHEAD + j * 2) * US_ROUTE_STEP);
#pragma unroll
    for (int q = 0; q < US_ROUTE_PARTS; q++)
#pragma unroll
      for (int j = 0; j < US_ROUTE_PAIRS; j++)
        absent |= v[q][j].x == US_ENGINE_ABSENT || v[q][j].y == US_ENGINE_ABSENT;
    absent = __any_sync(0xffffffffu, absent && flagged);
    if (absent) us_engine_watch_try(b, &watch, US_ENGINE_WAIT_DONE, us_engine_fetched_op(b)->wait, 0, 1);
  }
  us_engine_span_end(b, US_ENGINE_WAIT_DONE, begin);
}

/* The same; of 384 experts and four parts in a quarter of the instructions, whose fetching is most of the time. */
static __device__ __forceinline__ void us_route_gather(struct us_route_work *work,
                                                       const struct us_engine_route *r, const float *logits) {
  constexpr uint32_t E = US_ROUTE_AHEAD * US_ROUTE_STEP, PAIRS = US_ROUTE_PAIRS;
  if (r->E != E || r->stride != E || r->parts != US_ROUTE_PARTS) {
    us_route_gather_any(work, r, logits);
    return;
  }
  uint32_t token = us_route_token(), first = us_route_first() * 2;
  const float *from = logits + token * E + first;
  uint2 v[US_ROUTE_PARTS][PAIRS];
  us_route_load(v, from, r->flagged);
#pragma unroll
  for (int j = 0; j < PAIRS; j++) {
    float2 sum = make_float2(__uint_as_float(v[0][j].x), __uint_as_float(v[0][j].y));
#pragma unroll
    for (int q = 1; q < US_ROUTE_PARTS; q++)
      sum = make_float2(__fadd_rn(sum.x, __uint_as_float(v[q][j].x)),
                        __fadd_rn(sum.y, __uint_as_float(v[q][j].y)));
    *(float2 *)&work->score[token][first + j * 2 * US_ROUTE_STEP] = sum;
  }
}

/* Scores and keys from the logits, which another thread may have brought. */
static __device__ __forceinline__ void us_route_score(struct us_route_work *work,
                                                      const struct us_engine_route *r) {
  uint32_t token = us_route_token(), E = r->E, end = us_route_padded(E);
  bool uniform = r->uniform;
  us_engine_meet();
#pragma unroll 1
  for (uint32_t e = us_route_first(); e < end; e += US_ROUTE_STEP) {
    float score = us_route_sigmoid(work->score[token][e]);
    uint32_t key = uniform ? work->key[token][e] : us_route_key(score + work->bias[e]);
    work->score[token][e] = score, work->key[token][e] = e < E ? key : 0;
  }
  us_engine_meet();
}

/* ---- choice ------------------------------------------------------------------------------------------------------- */

/* The largest of this lane's keys; 0: it has none. */
static __device__ __forceinline__ uint32_t us_route_best(const uint32_t *key, uint32_t end, uint32_t lane) {
  uint32_t best = 0;
#pragma unroll 1
  for (uint32_t e = lane * 4; e < end; e += 128) {
    uint4 k = *(const uint4 *)(key + e);
    best = max(max(best, max(k.x, k.y)), max(k.z, k.w));
  }
  return best;
}

/* One warp: the top_k-th largest of the lanes' best, at least 1. Everything that is chosen reaches it. */
static __device__ __forceinline__ uint32_t us_route_least(uint32_t best, uint32_t top_k) {
  uint32_t least, taken = 0;
#pragma unroll 1
  do {
    least = __reduce_max_sync(0xffffffffu, best);
    bool has = best == least;
    taken += __popc(__ballot_sync(0xffffffffu, has));
    if (has) best = 0;
  } while (taken < top_k);
  return max(least, 1);
}

/* One warp: the experts whose keys reach `least`, ids ascending, into `id`, their keys to the front of `key`. How many they are. */
static __device__ __forceinline__ uint32_t us_route_reaching(uint32_t *key, uint16_t *id, uint32_t least,
                                                             uint32_t end, uint32_t lane) {
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t first = lane; first < end; first += 2 * 32) { /* all lanes as often */
    uint32_t k[2] = {key[first], key[first + 32]};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      bool reaches = k[i] >= least;
      uint32_t mask = __ballot_sync(0xffffffffu, reaches), to = count + __popc(mask & ((1u << lane) - 1));
      if (reaches) key[to] = k[i], id[to] = (uint16_t)(first + i * 32); /* a place that has been read */
      count += __popc(mask);
    }
  }
  __syncwarp();
  return count;
}

/* One warp: the row's experts, ascending, and their scores into `work`, and who uses them. Of all keys only some ten reach the top_k-th
 * largest of the lanes' best; of these each counts how many are above it. Rolled loops: a search for the best, top_k times, takes longer,
 * and so does fetching unrolled code. */
static __device__ __forceinline__ void us_route_choose(struct us_route_work *work,
                                                       const struct us_engine_route *r, uint32_t token,
                                                       uint32_t lane) {
  uint32_t *key = work->key[token], top_k = r->top_k, end = us_route_padded(r->E), placed = 0;
  uint16_t *candidate = work->candidate[token];
  if (lane < US_ENGINE_MAX_TOPK) work->chosen[token][lane] = 0;
  uint32_t least = us_route_least(us_route_best(key, end, lane), top_k);
  uint32_t count = us_route_reaching(key, candidate, least, end, lane);
#pragma unroll 1
  for (uint32_t first = 0; first < count && placed < top_k; first += 32) {
    uint32_t mine = first + lane, k = mine < count ? key[mine] : 0, above = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < count; j++) above += key[j] > k - (j < mine); /* of equals the first */
    bool chosen = mine < count && above < top_k;
    uint32_t mask = __ballot_sync(0xffffffffu, chosen), place = placed + __popc(mask & ((1u << lane) - 1));
    placed += __popc(mask);
    if (!chosen) continue;
    uint32_t id = candidate[mine];
    work->id[token][place] = id, work->chosen[token][place] = work->score[token][id];
    atomicOr(&work->users[id], 1u << token);
  }
  __syncwarp();
}

/* Routing weight of the lane's choice of a row. Scores are not negative: to add 0 for a choice that there is not changes no sum. */
static __device__ __forceinline__ float us_route_weight(const struct us_route_work *work,
                                                        const struct us_engine_route *r, uint32_t token,
                                                        uint32_t lane) {
  const float4 *chosen = (const float4 *)work->chosen[token];
  float4 low = chosen[0], high = chosen[1];
  float weight = work->chosen[token][lane], sum = __fadd_rn(__fadd_rn(__fadd_rn(low.x, low.y), low.z), low.w);
  sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, high.x), high.y), high.z), high.w);
  if (r->normalise) weight = weight / (sum + 1e-20f);
  return weight * r->scaling;
}
static_assert(US_ENGINE_MAX_TOPK == 8, "two vectors");

/* ---- the list ----------------------------------------------------------------------------------------------------- */

/* One warp, a row that has chosen: the weights to where the list's threads look for them; lane k the k-th. */
static __device__ __forceinline__ void us_route_weigh(struct us_route_work *work,
                                                      const struct us_engine_route *r, uint32_t token,
                                                      uint32_t lane, bool report) {
  uint32_t top_k = r->top_k;
  if (lane >= top_k) return;
  uint32_t e = work->id[token][lane];
  work->score[token][e] = us_route_weight(work, r, token, lane);
  if (report && r->opt_routed) r->opt_routed[token * top_k + lane] = e;
}

/* Sum of `value` over the threads before this one; *ret_total: over all. Two 16-bit sums side by side. */
static __device__ __forceinline__ uint32_t us_route_before(struct us_route_work *work, uint32_t value,
                                                           uint32_t *ret_total) {
  uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = value;
#pragma unroll 1
  for (uint32_t step = 1; step < 32; step *= 2) {
    uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) work->counts[warp] = sum;
  us_engine_meet();
  uint32_t count = lane < US_ENGINE_COMPUTE_WARPS ? work->counts[lane] : 0;
  *ret_total = __reduce_add_sync(0xffffffffu, count);
  return __reduce_add_sync(0xffffffffu, lane < warp ? count : 0) + sum - value;
}

/* A thread an expert: its slot, which is the number of active ones below it. */
static __device__ __forceinline__ void us_route_list(struct us_engine_active *active,
                                                     struct us_route_work *work) {
  uint32_t e = threadIdx.x, users = work->users[e], pairs = __popc(users), total;
  uint32_t before = us_route_before(work, pairs | (users ? 1u << 16 : 0), &total), first = before & 0xffffu;
  if (e == 0) active->count = total >> 16;
  if (!users) return;
  uint32_t slot = before >> 16;
  active->expert[slot] = (uint16_t)e;
  active->brief[slot] = us_engine_brief(e, first, pairs);
#pragma unroll 1
  for (uint32_t row = 0; row < US_ENGINE_ROWS; row++) {
    bool uses = users >> row & 1;
    active->weight[slot][row] = uses ? work->score[row][e] : 0.0f;
    active->pair[slot][row] = (int16_t)(uses ? (int)first : -1);
    first += uses;
  }
}

/* ---- the operation ------------------------------------------------------------------------------------------------ */

/* What experts are chosen by, but for their scores. The rows have been read by this block, not yet met. */
static __device__ __forceinline__ void us_route_keys(const struct us_engine_block *b,
                                                     const struct us_engine_op *op,
                                                     struct us_route_work *work) {
  const float *bias = op->route.bias;
  if (op->route.uniform)
    us_route_random(b, op, work);
  else
    work->bias[threadIdx.x] = bias && threadIdx.x < op->route.E ? bias[threadIdx.x] : 0.0f;
}

/* What does not depend on the logits, while they are on their way. */
static __device__ __forceinline__ void us_route_prepare(const struct us_engine_block *b,
                                                        const struct us_engine_op *op,
                                                        struct us_route_work *work) {
  us_engine_drain(b);
  us_route_rows(b, op, 0);
  work->users[threadIdx.x] = 0;
  us_route_keys(b, op, work);
  /* The other roles leave the list when they have handed over the router's sums. */
  us_engine_barrier_wait(b, &us_engine_shared_of(b)->listed, (b->routes - 1) & 1, US_ENGINE_WAIT_ROUTE);
}

/* The active list from the rows' logits; the router's operation is done, or they carry their own flag. */
static __device__ __forceinline__ void us_route_build(const struct us_engine_block *b,
                                                      const struct us_engine_route *r,
                                                      struct us_route_work *work) {
  uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32;
  us_route_gather(work, r, r->logits);
  us_route_score(work, r);
  if (token < US_ENGINE_ROWS && us_engine_shared_of(b)->rows.exists[token]) {
    us_route_choose(work, r, token, lane);
    us_route_weigh(work, r, token, lane, b->index == 0);
  }
  us_engine_meet();
  us_route_list(&us_engine_shared_of(b)->active, work);
  us_engine_meet();
}

/* The compute warps' operation, a ROUTE of one row tile. */
static __device__ __noinline__ void us_engine_route_build(void) {
  const struct us_engine_block *b = us_engine_self();
  const struct us_engine_op *op = us_engine_fetched_op(b);
  struct us_route_work *work = (struct us_route_work *)us_engine_scratch(b);
  us_route_prepare(b, op, work);
  if (!op->route.flagged) us_engine_wait_done(b, op->wait);
  us_route_build(b, &op->route, work);
}

#endif
