/* route.cuh: router logits to the active experts of a row tile, in the shared memory of every block: no hand-off after it.
 *
 * Bound: latency between the router's logits and the first expert page: every block does all of it. Rule as kernels/router: sigmoid
 * scores, bias for choosing only, ties to the lowest id, ids ascending, weights normalised over the chosen ones. Two warps score
 * a row, one chooses: expert e is lane e % 32's. A chain of loads costs a microsecond a link, so all of a thread's logits come at once,
 * and what does not depend on them is done before they are there.
 *
 * Contents: keys and logits; choice; the list; the operation.
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
  float score[US_ENGINE_ROWS][US_ROUTE_EXPERTS];  /* logit, then its sigmoid */
  uint32_t key[US_ENGINE_ROWS][US_ROUTE_EXPERTS]; /* what is chosen by; 0: no expert. Before that the bias */
  uint16_t candidate[US_ENGINE_ROWS][US_ROUTE_EXPERTS];
  uint32_t any[US_ROUTE_WORDS];                    /* bit mask of the experts somebody chose */
  uint32_t users[US_ENGINE_ACTIVE];                /* bit mask of the rows that use an active expert */
  uint32_t id[US_ENGINE_ROWS][US_ENGINE_MAX_TOPK]; /* a row's chosen experts, ascending, and their scores */
  float chosen[US_ENGINE_ROWS][US_ENGINE_MAX_TOPK];
  /* Of several row tiles, by expert: bit masks of their rows, first pair. */
  uint32_t rows[US_ROUTE_EXPERTS][2], first[US_ROUTE_EXPERTS], counts[US_ENGINE_COMPUTE_WARPS];
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
  uint32_t E = op->route.E, quads = (E + 3) / 4, token = us_route_token(), out[4];
  struct us_philox_key philox = us_philox_key(op->route.uniform_seed ^ rows->seed[token]);
#pragma unroll 1
  for (uint32_t quad = us_route_first(); quad < quads; quad += US_ROUTE_STEP) {
    us_philox_quad(philox, rows->position[token], rows->sample[token], quad, US_STREAM_ROUTE | op->layer << 8,
                   out);
#pragma unroll
    for (uint32_t j = 0; j < 4; j++)
      if (quad * 4 + j < E) work->key[token][quad * 4 + j] = (out[j] >> 1) + 1;
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
    const struct us_engine_sequence *s = &b->rank->state->sequence[draws ? sequence : 0];
    rows->exists[token] = sequence != US_ENGINE_NONE;
    rows->position[token] = __ldcg(&row->position);
    rows->seed[token] = draws ? __ldcg(&s->seed) : 0, rows->sample[token] = draws ? __ldcg(&s->sample) : 0;
  }
  if (token == 0) rows->pass = pass;
  us_engine_meet();
}

#define US_ROUTE_AHEAD 6 /* logits of a thread whose loads are under way together, in each of */
#define US_ROUTE_PARTS 4 /* so many parts: 384 experts over 64 threads */

/* This thread's logits, the parts' sums added in order, into shared memory. */
static __device__ __noinline__ void us_route_gather_any(struct us_route_work *work,
                                                        const struct us_engine_route *r,
                                                        const float *logits) {
  uint32_t E = r->E, parts = r->parts, part = US_ENGINE_ROWS * r->stride, token = us_route_token();
#pragma unroll 1
  for (uint32_t first = us_route_first(); first < E; first += US_ROUTE_AHEAD * US_ROUTE_STEP) {
    const float *from = logits + token * r->stride + first;
    float sum[US_ROUTE_AHEAD] = {};
#pragma unroll 1
    for (uint32_t p = 0; p < parts; p += US_ROUTE_PARTS, from += US_ROUTE_PARTS * part) {
      float v[US_ROUTE_PARTS][US_ROUTE_AHEAD];
#pragma unroll
      for (int q = 0; q < US_ROUTE_PARTS; q++)
#pragma unroll
        for (int j = 0; j < US_ROUTE_AHEAD; j++)
          v[q][j] = p + q < parts && first + j * US_ROUTE_STEP < E
                        ? __ldcg(from + q * part + j * US_ROUTE_STEP)
                        : 0.0f;
#pragma unroll
      for (int q = 0; q < US_ROUTE_PARTS; q++)
#pragma unroll
        for (int j = 0; j < US_ROUTE_AHEAD; j++) sum[j] = __fadd_rn(sum[j], v[q][j]);
    }
#pragma unroll
    for (int j = 0; j < US_ROUTE_AHEAD; j++)
      if (first + j * US_ROUTE_STEP < E) work->score[token][first + j * US_ROUTE_STEP] = sum[j];
  }
}
/* The same; of 384 experts and four parts in a quarter of the instructions, whose fetching is most of the time. */
static __device__ __forceinline__ void us_route_gather(struct us_route_work *work,
                                                       const struct us_engine_route *r, const float *logits) {
  if (r->E != US_ROUTE_AHEAD * US_ROUTE_STEP || r->parts != US_ROUTE_PARTS) {
    us_route_gather_any(work, r, logits);
    return;
  }
  uint32_t token = us_route_token(), first = us_route_first(), stride = r->stride;
  const float *from = logits + token * stride + first;
  float v[US_ROUTE_PARTS][US_ROUTE_AHEAD];
#pragma unroll
  for (int q = 0; q < US_ROUTE_PARTS; q++, from += US_ENGINE_ROWS * stride)
#pragma unroll
    for (int j = 0; j < US_ROUTE_AHEAD; j++) v[q][j] = __ldcg(from + j * US_ROUTE_STEP);
#pragma unroll
  for (int j = 0; j < US_ROUTE_AHEAD; j++) {
    float sum = 0.0f;
#pragma unroll
    for (int q = 0; q < US_ROUTE_PARTS; q++) sum = __fadd_rn(sum, v[q][j]);
    work->score[token][first + j * US_ROUTE_STEP] = sum;
  }
}

/* Scores and keys from this thread's logits. */
static __device__ __forceinline__ void us_route_score(struct us_route_work *work,
                                                      const struct us_engine_route *r) {
  uint32_t token = us_route_token(), E = r->E;
  bool uniform = r->uniform;
#pragma unroll 1
  for (uint32_t e = us_route_first(); e < E; e += US_ROUTE_STEP) {
    float score = us_route_sigmoid(work->score[token][e]);
    work->score[token][e] = score;
    if (!uniform) work->key[token][e] = us_route_key(score + __uint_as_float(work->key[token][e]));
  }
}

/* ---- choice ------------------------------------------------------------------------------------------------------- */

/* The largest of this lane's keys; 0: it has none. */
static __device__ __forceinline__ uint32_t us_route_best(const uint32_t *key, uint32_t E, uint32_t lane) {
  uint32_t best = 0;
#pragma unroll 4
  for (uint32_t e = lane; e < E; e += 32) best = key[e] > best ? key[e] : best;
  return best;
}

/* One warp: the top_k-th largest of the lanes' best, or 0. Everything that is chosen reaches it. */
static __device__ __forceinline__ uint32_t us_route_least(uint32_t best, uint32_t top_k, uint32_t lane) {
  uint32_t above = 0;
#pragma unroll 4
  for (uint32_t j = 0; j < 32; j++) {
    uint32_t other = __shfl_sync(0xffffffffu, best, j);
    above += other > best || (other == best && j < lane);
  }
  return __reduce_max_sync(0xffffffffu, above == top_k - 1 ? best : 0);
}

/* One warp: the experts whose keys reach `least`, ids ascending, into `id`, their keys to the front of `key`. How many they are. */
static __device__ __forceinline__ uint32_t us_route_reaching(uint32_t *key, uint16_t *id, uint32_t least,
                                                             uint32_t E, uint32_t lane) {
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t begin = 0; begin < E; begin += 4 * 32) { /* all lanes as often */
    uint32_t first = begin + lane, k[4];
#pragma unroll
    for (int i = 0; i < 4; i++) k[i] = first + i * 32 < E ? key[first + i * 32] : 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bool reaches = k[i] && k[i] >= least;
      uint32_t mask = __ballot_sync(0xffffffffu, reaches), to = count + __popc(mask & ((1u << lane) - 1));
      if (reaches) key[to] = k[i], id[to] = (uint16_t)(first + i * 32); /* a place that has been read */
      count += __popc(mask);
    }
  }
  __syncwarp();
  return count;
}

/* One warp: the row's experts, ascending, and their scores into `work`; ORed into the mask of those that somebody chose. Of all
 * keys only some ten reach the top_k-th largest of the lanes' best; of these each counts how many are above it. Rolled loops: a search
 * for the best, top_k times, takes longer, and so does fetching unrolled code. */
static __device__ __forceinline__ void us_route_choose(struct us_route_work *work,
                                                       const struct us_engine_route *r, uint32_t token,
                                                       uint32_t lane) {
  uint32_t *key = work->key[token], top_k = r->top_k, E = r->E, placed = 0;
  uint16_t *candidate = work->candidate[token];
  uint32_t least = us_route_least(us_route_best(key, E, lane), top_k, lane);
  uint32_t count = us_route_reaching(key, candidate, least, E, lane);
#pragma unroll 1
  for (uint32_t first = 0; first < count && placed < top_k; first += 32) {
    uint32_t mine = first + lane, k = mine < count ? key[mine] : 0, above = 0;
#pragma unroll 4
    for (uint32_t j = 0; j < count; j++) above += key[j] > k || (key[j] == k && j < mine);
    bool chosen = mine < count && above < top_k;
    uint32_t mask = __ballot_sync(0xffffffffu, chosen), place = placed + __popc(mask & ((1u << lane) - 1));
    placed += __popc(mask);
    if (!chosen) continue;
    uint32_t id = candidate[mine];
    work->id[token][place] = id, work->chosen[token][place] = work->score[token][id];
    atomicOr(&work->any[id / 32], 1u << id % 32);
  }
}

/* Routing weight of the lane's choice of a row. */
static __device__ __forceinline__ float us_route_weight(const struct us_route_work *work,
                                                        const struct us_engine_route *r, uint32_t token,
                                                        uint32_t lane) {
  uint32_t top_k = r->top_k;
  float sum = 0, weight = work->chosen[token][lane];
#pragma unroll
  for (int k = 0; k < US_ENGINE_MAX_TOPK; k++)
    if (k < top_k) sum = __fadd_rn(sum, work->chosen[token][k]);
  if (r->normalise) weight = weight / (sum + 1e-20f);
  return weight * r->scaling;
}

/* ---- the list ----------------------------------------------------------------------------------------------------- */

/* One warp, a row: enter its pairs into the table, lane k the k-th. An expert's place is the number of active ones below it. */
static __device__ __forceinline__ void us_route_enter(struct us_engine_active *active,
                                                      struct us_route_work *work,
                                                      const struct us_engine_route *r, uint32_t token,
                                                      uint32_t lane, bool report) {
  uint32_t top_k = r->top_k, e = lane < top_k ? work->id[token][lane] : 0;
  uint32_t word = lane < US_ROUTE_WORDS ? work->any[lane] : 0, below = __popc(word), sum_k = below;
#pragma unroll
  for (int step = 1; step < US_ROUTE_WORDS; step *= 2) {
    uint32_t other = __shfl_up_sync(0xffffffffu, sum_k, step);
    if (lane >= step) sum_k += other;
  }
  below = __shfl_sync(0xffffffffu, sum_k - below, e / 32), word = __shfl_sync(0xffffffffu, word, e / 32);
  if (lane >= top_k) return;
  uint32_t slot = below + __popc(word & ((1u << e % 32) - 1));
  active->weight[slot][token] = us_route_weight(work, r, token, lane);
  active->expert[slot] = (uint16_t)e;
  atomicOr(&work->users[slot], 1u << token);
  if (report && r->opt_routed) r->opt_routed[token * top_k + lane] = e;
}

/* Number the pairs: thread 8 slot + row. */
static __device__ __forceinline__ void us_route_number(struct us_engine_active *active,
                                                       const struct us_route_work *work, uint32_t lane) {
  uint32_t users[2] = {work->users[lane], work->users[lane + 32]},
           sum[2] = {(uint32_t)__popc(users[0]), (uint32_t)__popc(users[1])};
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    uint32_t low = __shfl_up_sync(0xffffffffu, sum[0], step),
             high = __shfl_up_sync(0xffffffffu, sum[1], step);
    if (lane >= step) sum[0] += low, sum[1] += high;
  }
  sum[1] += __shfl_sync(0xffffffffu, sum[0], 31);
  uint32_t slot = threadIdx.x / US_ENGINE_ROWS, token = threadIdx.x % US_ENGINE_ROWS,
           half = slot / 32; /* of a warp: the same half */
  uint32_t through = __shfl_sync(0xffffffffu, half ? sum[1] : sum[0], slot % 32),
           mask = __shfl_sync(0xffffffffu, half ? users[1] : users[0], slot % 32);
  uint32_t number = through - __popc(mask >> token);
  active->pair[slot][token] = (int16_t)(mask >> token & 1 ? (int)number : -1);
  if (token == 0)
    active->brief[slot] =
        us_engine_brief(active->expert[slot], through - __popc(mask), (uint32_t)__popc(mask));
  uint32_t count =
      __popc(__ballot_sync(0xffffffffu, users[0] != 0)) + __popc(__ballot_sync(0xffffffffu, users[1] != 0));
  if (threadIdx.x == 0) active->count = count;
}

/* ---- the operation ------------------------------------------------------------------------------------------------ */

/* What experts are chosen by, but for their scores. The rows have been read by this block, not yet met. */
static __device__ __forceinline__ void us_route_keys(const struct us_engine_block *b,
                                                     const struct us_engine_op *op,
                                                     struct us_route_work *work) {
  const struct us_engine_route *r = &op->route;
  if (r->uniform) {
    us_route_random(b, op, work);
    return;
  }
  const float *bias = r->bias;
#pragma unroll 1
  for (uint32_t first = us_route_first(); first < r->E; first += US_ROUTE_AHEAD * US_ROUTE_STEP) {
    float v[US_ROUTE_AHEAD];
#pragma unroll
    for (int j = 0; j < US_ROUTE_AHEAD; j++) {
      uint32_t e = first + j * US_ROUTE_STEP;
      v[j] = 0.0f;
      if (bias && e < r->E) v[j] = bias[e];
    }
#pragma unroll
    for (int j = 0; j < US_ROUTE_AHEAD; j++)
      if (first + j * US_ROUTE_STEP < r->E)
        work->key[us_route_token()][first + j * US_ROUTE_STEP] = __float_as_uint(v[j]);
  }
}

/* What does not depend on the logits, while they are on their way. */
static __device__ __forceinline__ void us_route_prepare(struct us_engine_block *b,
                                                        const struct us_engine_op *op) {
  struct us_route_work *work = (struct us_route_work *)us_engine_scratch(b);
  us_engine_drain(b);
  us_route_rows(b, op, 0);
  if (threadIdx.x < US_ROUTE_WORDS) work->any[threadIdx.x] = 0;
  if (threadIdx.x < US_ENGINE_ACTIVE) work->users[threadIdx.x] = 0;
  us_route_keys(b, op, work);
  /* The other roles leave the list when they have handed over the router's sums. */
  us_engine_barrier_wait(b, &us_engine_shared_of(b)->listed, (b->routes - 1) & 1, US_ENGINE_WAIT_ROUTE);
  ((float *)us_engine_shared_of(b)->active.weight)[threadIdx.x] = 0;
}

/* The active list from the rows' logits; the router's operation is done, and all threads have met since us_route_prepare. */
static __device__ __forceinline__ void us_route_build(struct us_engine_block *b,
                                                      const struct us_engine_op *op) {
  const struct us_engine_route *r = &op->route;
  struct us_engine_active *active = &us_engine_shared_of(b)->active;
  struct us_route_work *work = (struct us_route_work *)us_engine_scratch(b);
  uint32_t token = threadIdx.x / 32, lane = threadIdx.x % 32;
  us_route_gather(work, r, r->logits);
  us_route_score(work, r);
  us_engine_meet();
  bool chooses = token < US_ENGINE_ROWS && us_engine_shared_of(b)->rows.exists[token];
  if (chooses) us_route_choose(work, r, token, lane);
  us_engine_meet();
  if (chooses) us_route_enter(active, work, r, token, lane, b->index == 0);
  us_engine_meet();
  us_route_number(active, work, lane);
  us_engine_meet();
}
static_assert(US_ENGINE_ACTIVE * US_ENGINE_ROWS == US_ENGINE_COMPUTE, "one thread an entry of the table");

/* `wait` may be US_ENGINE_NONE. */
static __device__ __noinline__ void us_engine_route_build(struct us_engine_block *b,
                                                          const struct us_engine_op *op, uint32_t wait) {
  us_route_prepare(b, op);
  us_engine_wait_done(b, wait);
  us_route_build(b, op);
}

#endif
