/* rmsnorm_train.cu: RMSNorm over rows and its gradients.
 *
 * Bound: bytes. Forward 6 a value (FP32 in, bf16 out), backward 16 to 18. An item is held in registers: by a warp up to 1024
 * values (8 loads of 16 bytes a lane under way, no barrier), by half a warp up to 128, by a block of 256 above 1024. The gain's
 * gradient stays in registers over all items of a warp, is added over the warps of a block, then over the blocks.
 */
#include "kernels/gpu/rows.cuh"
#include "kernels/rmsnorm/rmsnorm_train.h"

#define THREADS     256
#define WARP_D      1024
#define HALF_D      128
#define GAIN_BLOCKS 1056 /* partial sums of the gain at most: 8 blocks on each of 132 SMs */

struct norm_args {
  struct us_rmsnorm_train n;
  uint32_t items, heads;
};

struct grad_args {
  struct norm_args a;
  const float *dy;
  const uint16_t *dy_bf16;
  float *dx;
  uint16_t *dx_bf16, *copy;
  float *partial; /* (blocks, D) or NULL */
  uint32_t blocks, per_block;
};

static __device__ __forceinline__ size_t item_start(const struct norm_args &a, uint32_t i) {
  return (size_t)(i / a.heads) * a.n.stride + (size_t)(i % a.heads) * a.n.D;
}

static __device__ __forceinline__ struct us_four load_either(const float *f32, const uint16_t *bf16,
                                                             size_t at) {
  return f32 ? us_load_four(f32 + at) : us_load_four(bf16 + at);
}

/* Sum over the T threads of an item. */
template <int T> static __device__ __forceinline__ float item_sum(float x) {
  __shared__ float warps[THREADS / 32];
  constexpr int lanes = T < 32 ? T : 32;
  return T <= 32 ? us_warp_sum<lanes>(x) : us_block_sum<THREADS>(x, warps);
}

/* --- forward --- */

template <int T, int CHUNKS>
static __global__ void __launch_bounds__(THREADS) norm_rows(const __grid_constant__ struct norm_args a) {
  const struct us_rmsnorm_train &n = a.n;
  uint32_t i = blockIdx.x * (THREADS / T) + threadIdx.x / T, lane = threadIdx.x % T, D = (uint32_t)n.D;
  if (i >= a.items) return;
  size_t at = item_start(a, i);
  struct us_four x[CHUNKS];
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    uint32_t k = (c * T + lane) * 4;
    x[c] = k < D ? load_either(n.x, n.x_bf16, at + k) : us_four{};
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int j = 0; j < 4; j++) squares = fmaf(x[c].v[j], x[c].v[j], squares);
  float inverse = 1.0f / sqrtf(item_sum<T>(squares) / (float)D + n.eps);
  if (n.inverse && lane == 0) n.inverse[i] = inverse;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    uint32_t k = (c * T + lane) * 4;
    if (k >= D) continue;
    struct us_four gain = us_load_four(n.gain + k);
    if (n.opt_tap) us_store_four(n.opt_tap + (size_t)i * n.tap_stride + k, x[c]);
#pragma unroll
    for (int j = 0; j < 4; j++) x[c].v[j] = x[c].v[j] * inverse * gain.v[j];
    if (n.opt_add) {
      struct us_four added = us_load_four(n.opt_add + at + k);
#pragma unroll
      for (int j = 0; j < 4; j++) x[c].v[j] += added.v[j];
    }
    us_store_four(n.y + at + k, x[c]);
  }
}

/* --- gradients --- */

/* One item: dx, and what it adds to the gain's gradient. With ADD the old dx is under way together with x and dy. */
template <int T, int CHUNKS, bool ADD>
static __device__ __forceinline__ void grad_item(const struct grad_args &g, uint32_t i,
                                                 struct us_four *dgain) {
  const struct us_rmsnorm_train &n = g.a.n;
  uint32_t lane = threadIdx.x % T, D = (uint32_t)n.D;
  size_t at = item_start(g.a, i);
  struct us_four x[CHUNKS], dy[CHUNKS], old[ADD ? CHUNKS : 1];
  float inverse = n.inverse[i], dot = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    uint32_t k = (c * T + lane) * 4;
    x[c] = k < D ? load_either(n.x, n.x_bf16, at + k) : us_four{};
    dy[c] = k < D ? load_either(g.dy, g.dy_bf16, at + k) : us_four{};
    if (ADD) old[ADD ? c : 0] = k < D ? us_load_four(g.dx + at + k) : us_four{};
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    uint32_t k = (c * T + lane) * 4;
    struct us_four gain = k < D ? us_load_four(n.gain + k) : us_four{};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      dgain[c].v[j] = fmaf(dy[c].v[j] * x[c].v[j], inverse, dgain[c].v[j]);
      dy[c].v[j] *= gain.v[j];
      dot = fmaf(dy[c].v[j], x[c].v[j], dot);
    }
  }
  float pull = item_sum<T>(dot) * inverse * inverse / (float)D;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    uint32_t k = (c * T + lane) * 4;
    if (k >= D) continue;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float part = inverse * (dy[c].v[j] - x[c].v[j] * pull);
      dy[c].v[j] = ADD ? old[ADD ? c : 0].v[j] + part : part;
    }
    if (g.dx_bf16)
      us_store_four(g.dx_bf16 + at + k, dy[c]);
    else
      us_store_four(g.dx + at + k, dy[c]);
    if (g.copy) us_store_four(g.copy + at + k, dy[c]);
  }
}

/* Block b has items [b * per_block, (b + 1) * per_block), its warps (or the block as a whole) one after another. */
template <int T, int CHUNKS, bool ADD>
static __global__ void __launch_bounds__(THREADS) grad_rows(const __grid_constant__ struct grad_args g) {
  __shared__ float4 shared[THREADS];
  uint32_t group = threadIdx.x / T, lane = threadIdx.x % T, D = (uint32_t)g.a.n.D;
  uint32_t first = blockIdx.x * g.per_block, last = min(first + g.per_block, g.a.items);
  struct us_four dgain[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) dgain[c] = us_four{};
  for (uint32_t i = first + group; i < last; i += THREADS / T) grad_item<T, CHUNKS, ADD>(g, i, dgain);
  if (!g.partial) return;
  float *partial = g.partial + (size_t)blockIdx.x * D;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) { /* over the block's warps, in order */
    uint32_t k = (c * T + lane) * 4;
    __syncthreads();
    shared[threadIdx.x] = make_float4(dgain[c].v[0], dgain[c].v[1], dgain[c].v[2], dgain[c].v[3]);
    __syncthreads();
    if (group || k >= D) continue;
    float4 sum = shared[lane];
    for (uint32_t w = 1; w < THREADS / T; w++) {
      float4 part = shared[w * T + lane];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    *(float4 *)(partial + k) = sum;
  }
}

/* dgain += the sum of the blocks: 32 lanes of blocks a column, then over the lanes in order. */
static __global__ void __launch_bounds__(1024)
    add_gain(const float *partial, uint32_t blocks, uint32_t D, float *dgain) {
  __shared__ float lanes[32][33];
  uint32_t column = blockIdx.x * 32 + threadIdx.x % 32, lane = threadIdx.x / 32;
  float sum = 0.0f;
  if (column < D)
    for (uint32_t b = lane; b < blocks; b += 32) sum += partial[(size_t)b * D + column];
  lanes[lane][threadIdx.x % 32] = sum;
  __syncthreads();
  if (lane || column >= D) return;
  for (uint32_t l = 1; l < 32; l++) sum += lanes[l][threadIdx.x];
  dgain[column] += sum;
}

/* --- entry points --- */

/* Items and defaults; false for sizes that the header rules out. */
static bool complete(const struct us_rmsnorm_train *norm, struct norm_args *ret_args) {
  *ret_args = {*norm, 0, (uint32_t)(norm->heads ? norm->heads : 1)};
  struct us_rmsnorm_train *n = &ret_args->n;
  if (!n->stride) n->stride = ret_args->heads * n->D;
  ret_args->items = (uint32_t)(n->R * ret_args->heads);
  return n->D > 0 && n->D <= 8192 && n->D % 4 == 0 && n->stride % 4 == 0 &&
         n->R * ret_args->heads < 1u << 31 && !n->x != !n->x_bf16;
}

template <int T, int CHUNKS> static void launch_norm(const struct norm_args &a, cudaStream_t stream) {
  uint32_t items = THREADS / T;
  norm_rows<T, CHUNKS><<<(a.items + items - 1) / items, THREADS, 0, stream>>>(a);
}

int us_rmsnorm_train(const struct us_rmsnorm_train *norm, cudaStream_t stream) {
  struct norm_args a;
  if (!complete(norm, &a) || (norm->opt_tap && (a.heads != 1 || norm->tap_stride % 4)))
    return cudaErrorInvalidValue;
  if (!a.items) return cudaSuccess;
  if (norm->D <= HALF_D)
    launch_norm<16, 2>(a, stream);
  else if (norm->D <= 256)
    launch_norm<32, 2>(a, stream);
  else if (norm->D <= 512)
    launch_norm<32, 4>(a, stream);
  else if (norm->D <= WARP_D)
    launch_norm<32, 8>(a, stream);
  else if (norm->D <= 4096)
    launch_norm<THREADS, 4>(a, stream);
  else
    launch_norm<THREADS, 8>(a, stream);
  return cudaGetLastError();
}

static uint32_t items_a_block(size_t items, size_t D) {
  uint32_t least = D <= HALF_D ? THREADS / 16 : D <= WARP_D ? THREADS / 32 : 1;
  size_t per_block = (items + GAIN_BLOCKS - 1) / GAIN_BLOCKS;
  per_block = (per_block + least - 1) / least * least;
  return (uint32_t)(per_block ? per_block : least);
}

size_t us_rmsnorm_train_scratch(size_t R, size_t heads, size_t D) {
  size_t items = R * (heads ? heads : 1), per_block = items_a_block(items, D);
  return ((items + per_block - 1) / per_block) * D * sizeof(float);
}

template <int T, int CHUNKS>
static void launch_grad(const struct grad_args &g, bool add, cudaStream_t stream) {
  if (add)
    grad_rows<T, CHUNKS, true><<<g.blocks, THREADS, 0, stream>>>(g);
  else
    grad_rows<T, CHUNKS, false><<<g.blocks, THREADS, 0, stream>>>(g);
}

int us_rmsnorm_train_grad(const struct us_rmsnorm_train_grad *grad, cudaStream_t stream) {
  struct grad_args g = {{}, grad->dy, grad->dy_bf16, grad->dx, grad->dx_bf16, grad->opt_dx_copy, NULL, 0, 0};
  bool wrong = !complete(&grad->norm, &g.a) || !grad->dy == !grad->dy_bf16 || !grad->dx == !grad->dx_bf16 ||
               ((grad->add || grad->opt_dx_copy) && !grad->dx) || (grad->opt_dgain && !grad->scratch);
  if (wrong) return cudaErrorInvalidValue;
  if (!g.a.items) return cudaSuccess;
  size_t D = grad->norm.D;
  g.per_block = items_a_block(g.a.items, D);
  g.blocks = (g.a.items + g.per_block - 1) / g.per_block;
  if (grad->opt_dgain) g.partial = (float *)grad->scratch;
  if (D <= HALF_D)
    launch_grad<16, 2>(g, grad->add, stream);
  else if (D <= 256)
    launch_grad<32, 2>(g, grad->add, stream);
  else if (D <= 512)
    launch_grad<32, 4>(g, grad->add, stream);
  else if (D <= WARP_D)
    launch_grad<32, 8>(g, grad->add, stream);
  else if (D <= 4096)
    launch_grad<THREADS, 4>(g, grad->add, stream);
  else
    launch_grad<THREADS, 8>(g, grad->add, stream);
  if (grad->opt_dgain)
    add_gain<<<(unsigned)((D + 31) / 32), 1024, 0, stream>>>(g.partial, g.blocks, (uint32_t)D,
                                                             grad->opt_dgain);
  return cudaGetLastError();
}
