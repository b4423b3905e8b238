/* router_train.cu: the router over many rows: logits on the tensor cores, choice, and the gradient of the chosen ones.
 *
 * w = high + middle + low, each bf16, are 3 E rows of one matrix: 16384 rows x 192 x 1024 take 21 us on tensor cores, the
 * 2.1 GFLOP of FP32 multiplies 70 at half of their rate. The gradient of w reads K rows of x a row of the batch, from L2: 268 MB.
 *
 * Contents: logits; choice; gradient of the logits; gradient of the weights; another router's lesson.
 */
#include "kernels/router/router_train.h"
#include "kernels/cpu/exp.h"
#include "kernels/experts/experts_vector.cuh"
#include "kernels/experts/grouped_gemm.h"

#define MOST_EXPERTS 1024
#define MOST_CHOSEN  32
#define WARPS        4 /* rows of a block that chooses */
#define THREADS      128
#define PUSH_BLOCKS  128 /* that add up a margin's pushes */

/* Experts in one third of the split matrix: what the grouped product can multiply. */
static inline __host__ __device__ uint32_t padded(uint32_t E) {
  return (E + 15) / 16 * 16;
}

/* --- logits --- */

/* w (E, D) as terms (3, padded E, D); rows past E are zeros. */
static __global__ void split_weights(uint32_t E, uint32_t D, const float *w, uint16_t *terms) {
  uint64_t third = (uint64_t)padded(E) * D, i = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (i >= third) return;
  float rest = i < (uint64_t)E * D ? w[i] : 0.0f;
  for (int term = 0; term < 3; term++) {
    uint16_t half = us_bf16_from_f32(rest);
    terms[term * third + i] = half;
    rest -= us_bf16_to_f32(half);
  }
}

static size_t terms_bytes(uint32_t D, uint32_t E) {
  return ((size_t)3 * padded(E) * D * 2 + 255) / 256 * 256;
}

size_t us_router_train_scratch(uint32_t R, uint32_t D, uint32_t E) {
  return terms_bytes(D, E) + (size_t)R * 3 * padded(E) * sizeof(float);
}

/* --- choice --- */

/* Unsigned order of choices; NaN above all others, so that K are found in any case. */
static __device__ __forceinline__ uint32_t order_of(float choice) {
  uint32_t bits = __float_as_uint(choice);
  if (choice != choice) return UINT32_MAX;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The lane's best of experts lane, lane + 32, ..: the lowest among equals. Chosen ones are 0, below any choice. */
static __device__ __forceinline__ uint32_t best_of_lane(const uint32_t *order, uint32_t E, int lane,
                                                        uint32_t *id) {
  uint32_t best = 0;
  for (uint32_t e = lane; e < E; e += 32)
    if (order[e] > best) best = order[e], *id = e;
  return best;
}

/* Ids of the K largest, ascending; ties to the lowest id. order (E) in shared memory. */
static __device__ __forceinline__ void choose(uint32_t *order, uint32_t E, uint32_t K, int lane,
                                              uint32_t *id) {
  uint32_t own_id = 0, own = best_of_lane(order, E, lane, &own_id), chosen = 0;
  for (uint32_t k = 0; k < K; k++) {
    uint32_t best = __reduce_max_sync(~0u, own),
             winner = __reduce_min_sync(~0u, own == best ? own_id : UINT32_MAX);
    if (own == best && own_id == winner) {
      order[winner] = 0;
      own = best_of_lane(order, E, lane, &own_id);
    }
  }
  __syncwarp();
  for (uint32_t first = 0; first < E && chosen < K; first += 32) {
    uint32_t e = first + lane, mask = __ballot_sync(~0u, e < E && order[e] == 0);
    if (mask >> lane & 1) id[chosen + __popc(mask & ((1u << lane) - 1))] = e;
    chosen += __popc(mask);
  }
  __syncwarp();
}

/* A warp a row. Shared memory: (WARPS, 2, E) scores, and choices as integers. */
static __global__ void __launch_bounds__(WARPS * 32)
    choose_rows(const struct us_router_train router, const float *logits) {
  extern __shared__ float shared[];
  __shared__ uint32_t ids[WARPS][MOST_CHOSEN];
  const uint32_t E = router.E, K = router.K, warp = threadIdx.x / 32, lane = threadIdx.x % 32,
                 r = blockIdx.x * WARPS + warp, third = padded(E);
  float *score = shared + warp * 2 * E;
  uint32_t *order = (uint32_t *)score + E;
  if (r >= router.R) return;
  const float *row = logits + (uint64_t)r * 3 * third;
  for (uint32_t e = lane; e < E; e += 32) {
    float logit = row[2 * third + e] + row[third + e] + row[e];
    score[e] = 1.0f / (1.0f + us_expf(-logit));
    order[e] = order_of(score[e] + (router.opt_bias ? router.opt_bias[e] : 0.0f));
    router.scores[(uint64_t)r * E + e] = score[e];
  }
  __syncwarp();
  if (!router.opt_chosen)
    choose(order, E, K, lane, ids[warp]);
  else if (lane < K)
    ids[warp][lane] = router.opt_chosen[(uint64_t)r * K + lane];
  __syncwarp();
  float sum = 0.0f;
  for (uint32_t k = 0; k < K; k++) sum += score[ids[warp][k]];
  if (lane >= K) return;
  uint32_t id = ids[warp][lane];
  float share = router.normalise ? score[id] / (sum + 1e-20f) : score[id];
  router.id[(uint64_t)r * K + lane] = id;
  router.weight[(uint64_t)r * K + lane] = share * router.scaling;
}

static bool valid(uint32_t R, uint32_t D, uint32_t E, uint32_t K) {
  return D && D % 16 == 0 && E && E <= MOST_EXPERTS && K && K <= E && K <= MOST_CHOSEN &&
         (uint64_t)R * K <= INT32_MAX;
}

int us_router_train(const struct us_router_train *router, cudaStream_t stream) {
  uint32_t R = router->R, D = router->D, E = router->E;
  if (!valid(R, D, E, router->K)) return cudaErrorInvalidValue;
  if (!R) return cudaSuccess;
  uint16_t *terms = (uint16_t *)router->scratch;
  float *logits = (float *)((uint8_t *)router->scratch + terms_bytes(D, E));
  split_weights<<<(uint32_t)(((uint64_t)padded(E) * D + 255) / 256), 256, 0, stream>>>(E, D, router->w,
                                                                                       terms);
  struct us_grouped product = {};
  product.groups = 1, product.rows = R, product.N = 3 * padded(E), product.K = D;
  int status = us_grouped_forward_f32(&product, router->x, terms, 0, logits, stream);
  if (status != cudaSuccess) return status;
  choose_rows<<<(R + WARPS - 1) / WARPS, WARPS * 32, WARPS * 2 * E * sizeof(float), stream>>>(*router,
                                                                                              logits);
  return cudaGetLastError();
}

/* --- gradient of the logits --- */

/* A thread a row, in the order of kernels/router/router_grad.c. */
static __global__ void __launch_bounds__(THREADS) grad_logits(const struct us_router_train_grad g) {
  uint32_t r = blockIdx.x * THREADS + threadIdx.x;
  if (r >= g.R) return;
  const float *score = g.scores + (uint64_t)r * g.E, *dweight = g.dweight + (uint64_t)r * g.K;
  const uint32_t *id = g.id + (uint64_t)r * g.K;
  float sum = 1e-20f, pull = 0.0f;
  for (uint32_t k = 0; k < g.K; k++) sum += score[id[k]];
  for (uint32_t k = 0; k < g.K; k++) pull += dweight[k] * score[id[k]] / sum;
  for (uint32_t k = 0; k < g.K; k++) {
    float s = score[id[k]], ds = g.normalise ? (dweight[k] - pull) / sum : dweight[k];
    g.dlogit[(uint64_t)r * g.K + k] = ds * g.scaling * s * (1.0f - s);
  }
}

/* --- gradient of the weights --- */

/* Pieces of an expert's slots, each a sum of its own: about 1024 blocks. */
static inline __host__ __device__ uint32_t pieces(uint32_t E) {
  uint32_t wanted = MOST_EXPERTS / E;
  return wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
}

size_t us_router_train_grad_scratch(uint32_t D, uint32_t E) {
  return (size_t)E * pieces(E) * D * sizeof(float);
}

/* Block (piece, expert, columns): dlogit * x over the piece's slots in order; a thread has 8 columns. */
static __global__ void __launch_bounds__(THREADS)
    sum_pieces(const struct us_router_train_grad g, float *sums) {
  const uint32_t piece = blockIdx.x, e = blockIdx.y, column = (blockIdx.z * THREADS + threadIdx.x) * 8;
  if (column >= g.D) return;
  uint32_t first = __ldg(g.start + e), end = __ldg(g.start + e + 1),
           each = (end - first + gridDim.x - 1) / gridDim.x;
  first += piece * each;
  if (first + each < end) end = first + each;
  float sum[8] = {};
#pragma unroll 8
  for (uint32_t slot = first; slot < end; slot++) {
    uint32_t pair = __ldg(g.pair + slot);
    float x[8], d = __ldg(g.dlogit + pair);
    unpack_8(*(const uint4 *)(g.x + (uint64_t)(pair / g.K) * g.D + column), x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(d, x[i], sum[i]);
  }
  float4 *to = (float4 *)(sums + ((uint64_t)e * gridDim.x + piece) * g.D + column);
  to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]), to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

static __global__ void __launch_bounds__(THREADS)
    add_pieces(uint32_t D, uint32_t count, const float *sums, float *dw) {
  uint32_t column = blockIdx.x * THREADS + threadIdx.x, e = blockIdx.y;
  if (column >= D) return;
  float sum = 0.0f;
#pragma unroll 8
  for (uint32_t piece = 0; piece < count; piece++) sum += sums[((uint64_t)e * count + piece) * D + column];
  dw[(uint64_t)e * D + column] += sum;
}

int us_router_train_grad(const struct us_router_train_grad *g, cudaStream_t stream) {
  if (!valid(g->R, g->D, g->E, g->K)) return cudaErrorInvalidValue;
  if (!g->R) return cudaSuccess;
  grad_logits<<<(g->R + THREADS - 1) / THREADS, THREADS, 0, stream>>>(*g);
  if (g->opt_dw) {
    float *sums = (float *)g->scratch;
    dim3 grid(pieces(g->E), g->E, (g->D + THREADS * 8 - 1) / (THREADS * 8));
    sum_pieces<<<grid, THREADS, 0, stream>>>(*g, sums);
    dim3 columns((g->D + THREADS - 1) / THREADS, g->E);
    add_pieces<<<columns, THREADS, 0, stream>>>(g->D, pieces(g->E), sums, g->opt_dw);
  }
  return cudaGetLastError();
}

/* --- another router's lesson --- */

static __device__ bool is_chosen(const struct us_router_train_lesson &lesson, const uint32_t *id,
                                 uint32_t e) {
  for (uint32_t k = 0; k < lesson.K; k++)
    if (__ldg(id + k) == e) return true;
  return false;
}

/* As middle_of in router_grad.c; a warp. */
static __device__ float middle_of(const struct us_router_train_lesson &lesson, const float *score,
                                  const uint32_t *id, uint32_t lane) {
  float least = INFINITY, most = -INFINITY;
  for (uint32_t e = lane; e < lesson.E; e += 32) {
    float own = score[e] + (lesson.opt_bias ? __ldg(lesson.opt_bias + e) : 0.0f);
    if (is_chosen(lesson, id, e))
      least = fminf(least, own);
    else
      most = fmaxf(most, own);
  }
  for (int distance = 16; distance; distance >>= 1) {
    least = fminf(least, __shfl_xor_sync(~0u, least, distance));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
  }
  return 0.5f * (least + most);
}

/* As pushed in router_grad.c. */
static __device__ float pushed(float score, float t, float tanh_half, bool chosen) {
  if (!(t > 0.0f && t < 1.0f)) return 0.0f;
  float push = fmaxf(0.0f, 1.0f - fabsf(score - t) / ((score + t - 2.0f * score * t) * tanh_half));
  return chosen ? push : -push;
}

/* What a warp knows of its row. */
struct taught_row {
  const float *score;
  const uint32_t *id;
  float weight, middle, tanh_half;
};

static __device__ struct taught_row row_of(const struct us_router_train_lesson &lesson, uint32_t r,
                                           uint32_t lane) {
  struct taught_row row = {lesson.scores + (uint64_t)r * lesson.E, NULL,
                           lesson.opt_weight ? __ldg(lesson.opt_weight + r) : 1.0f, 0.0f, 0.0f};
  if (!(lesson.margin_scale > 0.0f)) return row;
  row.id = lesson.id + (uint64_t)r * lesson.K;
  row.middle = middle_of(lesson, row.score, row.id, lane);
  row.tanh_half = tanhf(0.5f * lesson.margin);
  return row;
}

static __device__ float push_of(const struct us_router_train_lesson &lesson, const struct taught_row &row,
                                uint32_t e) {
  float t = row.middle - (lesson.opt_bias ? __ldg(lesson.opt_bias + e) : 0.0f);
  return pushed(row.score[e], t, row.tanh_half, is_chosen(lesson, row.id, e));
}

/* sums (PUSH_BLOCKS, E + 1): weighted pushes to each expert over a block's rows, and the rows' weights. A warp a row, its lanes the
 * experts, the rows of a warp in order: the same sums every time. */
static __global__ void __launch_bounds__(THREADS)
    sum_pushes(const struct us_router_train_lesson lesson, float *sums) {
  extern __shared__ float of_warp[]; /* (THREADS / 32, E + 1) */
  const uint32_t warps = THREADS / 32, E = lesson.E;
  uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *own = of_warp + warp * (E + 1);
  for (uint32_t e = lane; e <= E; e += 32) own[e] = 0.0f;
  __syncwarp();
  for (uint32_t r = blockIdx.x * warps + warp; r < lesson.R; r += PUSH_BLOCKS * warps) {
    struct taught_row row = row_of(lesson, r, lane);
    for (uint32_t e = lane; e < E; e += 32) own[e] += row.weight * push_of(lesson, row, e);
    if (lane == 0) own[E] += row.weight;
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e <= E; e += THREADS) {
    float sum = 0.0f;
    for (uint32_t w = 0; w < warps; w++) sum += of_warp[w * (E + 1) + e];
    sums[blockIdx.x * (E + 1) + e] = sum;
  }
}

static __global__ void mean_pushes(uint32_t E, const float *sums, float *mean) {
  uint32_t e = blockIdx.x * THREADS + threadIdx.x;
  if (e >= E) return;
  float sum = 0.0f, weights = 0.0f;
  for (uint32_t b = 0; b < PUSH_BLOCKS; b++) sum += sums[b * (E + 1) + e], weights += sums[b * (E + 1) + E];
  mean[e] = weights > 0.0f ? sum / weights : 0.0f;
}

/* A warp a row; mean (E) of the pushes, where there is a margin. */
static __global__ void __launch_bounds__(THREADS)
    teach_rows(const struct us_router_train_lesson lesson, const float *mean) {
  uint32_t r = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, E = lesson.E;
  if (r >= lesson.R) return;
  const float *theirs = lesson.opt_theirs ? lesson.opt_theirs + (uint64_t)r * E : NULL;
  struct taught_row row = row_of(lesson, r, lane);
  for (uint32_t e = lane; e < E; e += 32) {
    float sum = lesson.scale * (row.score[e] - (theirs ? theirs[e] : lesson.target));
    if (lesson.margin_scale > 0.0f) sum -= lesson.margin_scale * (push_of(lesson, row, e) - __ldg(mean + e));
    lesson.dlogit[(uint64_t)r * E + e] = us_bf16_from_f32(row.weight * sum);
  }
}

size_t us_router_train_lesson_scratch(uint32_t E) {
  return ((size_t)PUSH_BLOCKS * (E + 1) + E) * sizeof(float);
}

int us_router_train_lesson(const struct us_router_train_lesson *lesson, cudaStream_t stream) {
  const uint32_t warps = THREADS / 32, E = lesson->E;
  float *sums = (float *)lesson->scratch, *mean = sums + (size_t)PUSH_BLOCKS * (E + 1);
  if (!lesson->R) return cudaSuccess;
  if (lesson->margin_scale > 0.0f) {
    sum_pushes<<<PUSH_BLOCKS, THREADS, warps *(E + 1) * sizeof(float), stream>>>(*lesson, sums);
    mean_pushes<<<(E + THREADS - 1) / THREADS, THREADS, 0, stream>>>(E, sums, mean);
  }
  teach_rows<<<(lesson->R + warps - 1) / warps, THREADS, 0, stream>>>(*lesson, mean);
  return cudaGetLastError();
}
