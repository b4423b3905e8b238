/* attention.cu: causal attention of a chunk's rows over KV pages, on tensor cores.
 *
 * A block takes 128 consecutive (row, query head) pairs of one KV head, so that with 16 query heads a KV head 8 rows share every
 * key they read; a warp 16 of them. Key tiles of 64 at absolute positions, in ascending order, double-buffered; scores, weights
 * and sums as in kernels/attention/attention.h, but the running maximum is applied tile by tile (Dao 2023). Queries and weights
 * enter as two bf16 terms, which keeps 16 of their 24 bits. A tile in which a row sees no key changes nothing of the row. A weight of
 * 0 times a value that is not finite is not 0: a tile with such values, some of which not every row sees, is multiplied position by
 * position, with zeros for what is not seen. Finite values give the same bits either way.
 *
 * Bound: mma.sync, 2 multiplies a product: 4 Q + 4 V flops a score.
 *
 * Contents: loading; one key tile; values that are not finite; the block.
 */
#include "formats/bf16.h"
#include "kernels/cpu/exp.h"
#include "kernels/prefill/cache.cuh"
#include "kernels/prefill/fragment.cuh"

#define WARPS    8
#define THREADS  (WARPS * 32)
#define QUERIES  (WARPS * 16)
#define KEYS     US_PREFILL_PAGE
#define MOST_Q   192
#define PAD      8 /* values: rows of shared memory start 4 banks apart */
#define V_STRIDE (KEYS + PAD)

/* Shared memory: queries' high terms, low terms (QUERIES, stride); keys (2, KEYS, stride); values (2, V, V_STRIDE). */
struct layout {
  uint32_t stride;                   /* values a row of queries and keys */
  uint32_t low, keys, values, bytes; /* offsets */
};

static __host__ __device__ struct layout layout_of(uint32_t Q, uint32_t rows_v) {
  struct layout l;
  l.stride = us_engine_k_stride(Q) + PAD;
  l.low = QUERIES * l.stride * 2;
  l.keys = 2 * l.low;
  l.values = l.keys + 2 * KEYS * l.stride * 2;
  l.bytes = l.values + 2 * rows_v * V_STRIDE * 2;
  return l;
}

/* ---- loading ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void copy_16(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

/* x = high + low + less than 2^-16 |x|. */
static __device__ __forceinline__ void split(float x, float y, uint32_t *high, uint32_t *low) {
  *high = pack_bf16(x, y);
  *low = pack_bf16(x - __uint_as_float(*high << 16), y - __uint_as_float(*high & 0xffff0000u));
}

/* A warp's 16 rotated queries from q0 on; zeros past the last and past Q. */
static __device__ __forceinline__ void load_queries(const struct us_prefill_attention *a,
                                                    const struct layout *l, uint8_t *to, uint32_t q0,
                                                    uint32_t g, int lane) {
  uint32_t Q = a->cache.Q, width = us_engine_k_stride(Q), heads = a->H / a->cache.G;
#pragma unroll 4
  for (uint32_t q = 0; q < 16; q++) {
    uint32_t row = (q0 + q) / heads, exists = row < a->rows;
    const float *head = a->q + (size_t)row * a->stride + (g * heads + (q0 + q) % heads) * Q;
    const float *table = a->rope + (size_t)(a->position + row) * a->rotary;
#pragma unroll
    for (uint32_t j = 0; j < MOST_Q / 64; j++) {
      uint32_t d = j * 64 + lane * 2, high, low;
      if (d >= width) break;
      float x = exists && d < Q ? us_prefill_rotate(head, table, a->rotary, d) : 0;
      float y = exists && d + 1 < Q ? us_prefill_rotate(head, table, a->rotary, d + 1) : 0;
      split(x, y, &high, &low);
      *(uint32_t *)(to + (q * l->stride + d) * 2) = high;
      *(uint32_t *)(to + l->low + (q * l->stride + d) * 2) = low;
    }
  }
}

/* Start copying a key tile into buffer tile % 2. */
static __device__ __forceinline__ void load_tile(const struct us_prefill_attention *a, const struct layout *l,
                                                 uint32_t shared, uint32_t rows_v, uint32_t tile,
                                                 uint32_t g) {
  uint8_t *page = us_prefill_page(&a->cache, tile);
  const uint16_t *keys = us_prefill_keys(&a->cache, page, g), *values = us_prefill_values(&a->cache, page, g);
  uint32_t chunks = us_engine_k_stride(a->cache.Q) / 8, b = tile % 2;
  uint32_t to = shared + l->keys + b * KEYS * l->stride * 2;
  for (uint32_t i = threadIdx.x; i < KEYS * chunks; i += THREADS)
    copy_16(to + i / chunks * l->stride * 2 + i % chunks * 16, keys + i * 8);
  to = shared + l->values + b * rows_v * V_STRIDE * 2;
  for (uint32_t i = threadIdx.x; i < a->cache.V * (KEYS / 8); i += THREADS)
    copy_16(to + i / (KEYS / 8) * V_STRIDE * 2 + i % (KEYS / 8) * 16, values + i * 8);
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/* ---- one key tile ------------------------------------------------------------------------------------------------ */

/* A warp's state: rows lane / 4 and + 8 of its 16 queries. */
template <int VT> struct state {
  int position[2]; /* of the rows; -1: none */
  float max[2], sum[2];
  float out[VT][4];
};

/* ldmatrix addresses: of 16 x 16 values as the row operand, and of two column operands of 16 values side by side. */
static __device__ __forceinline__ uint32_t row_address(uint32_t base, uint32_t stride, int lane) {
  return base + (lane % 16 * stride + lane / 16 * 8) * 2;
}
static __device__ __forceinline__ uint32_t column_address(uint32_t base, uint32_t stride, int lane) {
  return base + ((lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8) * 2;
}

/* 16 columns of the warp's queries, both terms, and of 64 keys. */
struct operands {
  uint32_t a[2][4], b[4][4];
};
static __device__ __forceinline__ void load_operands(uint32_t high, uint32_t low, uint32_t keys,
                                                     uint32_t stride, uint32_t k, struct operands *o) {
  us_load_matrices(high + k * 32, o->a[0]);
  us_load_matrices(low + k * 32, o->a[1]);
#pragma unroll
  for (int j = 0; j < 4; j++) us_load_matrices(keys + j * 16 * stride * 2 + k * 32, o->b[j]);
}

/* s[n] = scaled dot products of 16 queries with keys 8 n .. 8 n + 7. */
static __device__ __forceinline__ void dot_keys(uint32_t high, uint32_t low, uint32_t keys, uint32_t stride,
                                                uint32_t steps, float scale, float s[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) s[n][c] = 0;
  struct operands now, next;
  load_operands(high, low, keys, stride, 0, &now);
#pragma unroll 2
  for (uint32_t k = 0; k < steps; k++) {
    load_operands(high, low, keys, stride, k + 1 < steps ? k + 1 : k, &next);
#pragma unroll
    for (int term = 0; term < 2; term++)
#pragma unroll
      for (int n = 0; n < 8; n++)
        us_mma_bf16(s[n], now.a[term], now.b[n / 2][n % 2 * 2], now.b[n / 2][n % 2 * 2 + 1], s[n]);
    now = next;
  }
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) s[n][c] *= scale;
}

/* e^x for x <= 0 within 2^-21, two instructions instead of us_expf's twenty: a score costs 20 multiplies of the tensor cores. */
static __device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x * US_EXP_LOG2E));
  return y;
}

static __device__ __forceinline__ bool sees(const struct us_prefill_attention *a, int position, int key) {
  int behind = position - key;
  return behind >= 0 && (a->window == 0 || behind < (int)a->window);
}

/* Scores of keys that a row must not see become -Inf. */
template <int VT>
static __device__ __forceinline__ void mask_keys(const struct us_prefill_attention *a,
                                                 const struct state<VT> *x, uint32_t tile, int lane,
                                                 float s[8][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        int key = (int)(tile * KEYS) + n * 8 + lane % 4 * 2 + c;
        if (!sees(a, x->position[i], key)) s[n][2 * i + c] = -INFINITY;
      }
}

/* Scores to weights relative to the new maximum. factor: what older sums shrink by. */
template <int VT>
static __device__ __forceinline__ void weigh(struct state<VT> *x, float s[8][4], float factor[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    most = fmaxf(most, x->max[i]);
    float base = most == -INFINITY ? 0.0f : most;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float *score = &s[n][2 * i + c];
        *score = fast_exp(*score - base); /* 0 for -Inf */
        sum += *score;
      }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    factor[i] = fast_exp(x->max[i] - base);
    x->sum[i] = fmaf(x->sum[i], factor[i], sum);
    x->max[i] = most;
  }
}

/* out = out * factor + weights x values. */
template <int VT>
static __device__ __forceinline__ void add_values(struct state<VT> *x, const float factor[2],
                                                  const float s[8][4], uint32_t values) {
#pragma unroll
  for (int n = 0; n < VT; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) x->out[n][c] *= factor[c / 2];
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float *p = &s[2 * k + r / 2][r % 2 * 2];
      split(p[0], p[1], &high[r], &low[r]);
    }
#pragma unroll
    for (int j = 0; j < VT / 2; j++) {
      uint32_t b[4];
      us_load_matrices(values + (j * 16 * V_STRIDE + k * 16) * 2, b);
      us_mma_bf16(x->out[2 * j], high, b[0], b[1], x->out[2 * j]);
      us_mma_bf16(x->out[2 * j + 1], high, b[2], b[3], x->out[2 * j + 1]);
      us_mma_bf16(x->out[2 * j], low, b[0], b[1], x->out[2 * j]);
      us_mma_bf16(x->out[2 * j + 1], low, b[2], b[3], x->out[2 * j + 1]);
    }
  }
}

/* ---- values that are not finite ---------------------------------------------------------------------------------- */

/* Whether the thread copied one; after its copies have arrived. */
static __device__ __forceinline__ bool copied_odd_values(const struct us_prefill_attention *a,
                                                         uint32_t values) {
  bool odd = false;
  for (uint32_t i = threadIdx.x; i < a->cache.V * (KEYS / 8); i += THREADS) {
    uint32_t w[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(values + i / (KEYS / 8) * V_STRIDE * 2 + i % (KEYS / 8) * 16));
#pragma unroll
    for (int k = 0; k < 4; k++) odd |= (w[k] & 0x7f80u) == 0x7f80u || (w[k] & 0x7f800000u) == 0x7f800000u;
  }
  return odd;
}

/* Two values of a column operand, of keys `key` and key + 1; 0 for what the position does not see. */
static __device__ __forceinline__ uint32_t seen_values(const struct us_prefill_attention *a, int position,
                                                       int key, uint32_t pair) {
  if (!sees(a, position, key)) pair &= 0xffff0000u;
  if (!sees(a, position, key + 1)) pair &= 0x0000ffffu;
  return pair;
}

/* As add_values, for every position from `first` to `last` with what it sees; each keeps its own rows. */
template <int VT>
static __device__ __forceinline__ void add_seen_values(const struct us_prefill_attention *a,
                                                       struct state<VT> *x, const float factor[2],
                                                       const float s[8][4], uint32_t values, uint32_t tile,
                                                       int first, int last, int lane) {
#pragma unroll
  for (int j = 0; j < VT / 2; j++) {
    float from[2][4], to[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int c = 0; c < 4; c++) from[h][c] = to[h][c] = x->out[2 * j + h][c] * factor[c / 2];
#pragma unroll 1
    for (int position = first; position <= last; position++) {
      float sum[2][4];
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int c = 0; c < 4; c++) sum[h][c] = from[h][c];
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++) {
        uint32_t high[4], low[4], b[4];
        int key = (int)(tile * KEYS) + k * 16 + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float *p = &s[2 * k + r / 2][r % 2 * 2];
          split(p[0], p[1], &high[r], &low[r]);
        }
        us_load_matrices(values + (j * 16 * V_STRIDE + k * 16) * 2, b);
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = seen_values(a, position, key + i % 2 * 8, b[i]);
        us_mma_bf16(sum[0], high, b[0], b[1], sum[0]);
        us_mma_bf16(sum[1], high, b[2], b[3], sum[1]);
        us_mma_bf16(sum[0], low, b[0], b[1], sum[0]);
        us_mma_bf16(sum[1], low, b[2], b[3], sum[1]);
      }
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (x->position[c / 2] == position) to[h][c] = sum[h][c];
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int c = 0; c < 4; c++) x->out[2 * j + h][c] = to[h][c];
  }
}

/* ---- the block --------------------------------------------------------------------------------------------------- */

/* Divide by the denominator, the sink in it, round, store. q: the warp's first query. */
template <int VT>
static __device__ __forceinline__ void store_out(const struct us_prefill_attention *a,
                                                 const struct state<VT> *x, uint32_t q, uint32_t g,
                                                 int lane) {
  uint32_t heads = a->H / a->cache.G, V = a->cache.V;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t at = q + lane / 4 + 8 * i, head = g * heads + at % heads;
    if (x->position[i] < 0) continue;
    float keep = 1, sum = x->sum[i];
    if (a->opt_sink) {
      float sink = a->opt_sink[head], most = fmaxf(x->max[i], sink);
      keep = us_expf(x->max[i] - most);
      sum = fmaf(sum, keep, us_expf(sink - most));
    }
    uint16_t *to = a->out + ((size_t)(at / heads) * a->H + head) * V;
#pragma unroll
    for (int n = 0; n < VT; n++) {
      uint32_t d = n * 8 + lane % 4 * 2;
      if (d >= V) continue;
      float low = us_bf16_round(x->out[n][2 * i] * keep / sum),
            high = us_bf16_round(x->out[n][2 * i + 1] * keep / sum);
      *(uint32_t *)(to + d) = pack_bf16(low * US_ENGINE_OPERAND_UNIT, high * US_ENGINE_OPERAND_UNIT);
    }
  }
}

template <int VT>
static __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const __grid_constant__ struct us_prefill_attention a) {
  extern __shared__ __align__(128) uint8_t shared[];
  const struct layout l = layout_of(a.cache.Q, VT * 8);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t heads = a.H / a.cache.G, g = blockIdx.y,
           q0 = (gridDim.x - 1 - blockIdx.x) * QUERIES; /* longest first */
  uint32_t count = a.rows * heads, end = q0 + QUERIES < count ? q0 + QUERIES : count;
  uint32_t first = a.position + q0 / heads, last = a.position + (end - 1) / heads;
  uint32_t begin = a.window && first + 1 > a.window ? first + 1 - a.window : 0;
  uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), tile = begin / KEYS, tiles = last / KEYS + 1;
  load_tile(&a, &l, base, VT * 8, tile, g);
  load_queries(&a, &l, shared + warp * 16 * l.stride * 2, q0 + warp * 16, g, lane);

  struct state<VT> x;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t q = q0 + warp * 16 + lane / 4 + 8 * i;
    x.position[i] = q < count ? (int)(a.position + q / heads) : -1;
    x.max[i] = -INFINITY, x.sum[i] = 0;
  }
#pragma unroll
  for (int n = 0; n < VT; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) x.out[n][c] = 0;

  uint32_t seen_by_all =
      end == q0 + QUERIES ? first + 1 : 0; /* keys before this, unless a window hides them */
  uint32_t high = row_address(base + warp * 16 * l.stride * 2, l.stride, lane),
           steps = us_engine_k_stride(a.cache.Q) / 16;
  uint32_t own = q0 + warp * 16 < count ? q0 + warp * 16 : count - 1, /* the warp's first and last query */
      own_end = own + 15 < count ? own + 15 : count - 1;
  for (; tile < tiles; tile++) {
    if (tile + 1 < tiles) load_tile(&a, &l, base, VT * 8, tile + 1, g);
    if (tile + 1 < tiles)
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    uint32_t b = tile % 2, keys = base + l.keys + b * KEYS * l.stride * 2,
             values = base + l.values + b * VT * 8 * V_STRIDE * 2;
    bool all = (tile + 1) * KEYS <= seen_by_all && (a.window == 0 || tile * KEYS + a.window > last);
    bool odd = __syncthreads_or(!all && copied_odd_values(&a, values));
    float s[8][4], factor[2];
    dot_keys(high, high + l.low, column_address(keys, l.stride, lane), l.stride, steps, a.scale, s);
    if (!all) mask_keys<VT>(&a, &x, tile, lane, s);
    weigh<VT>(&x, s, factor);
    if (odd)
      add_seen_values<VT>(&a, &x, factor, s, column_address(values, V_STRIDE, lane), tile,
                          (int)(a.position + own / heads), (int)(a.position + own_end / heads), lane);
    else
      add_values<VT>(&x, factor, s, column_address(values, V_STRIDE, lane));
    __syncthreads();
  }
  store_out<VT>(&a, &x, q0 + warp * 16, g, lane);
}

template <int VT> static cudaError_t launch(const struct us_prefill_attention *a, cudaStream_t stream) {
  auto kernel = prefill_attention<VT>;
  uint32_t bytes = layout_of(a->cache.Q, VT * 8).bytes, count = a->rows * (a->H / a->cache.G);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3((count + QUERIES - 1) / QUERIES, a->cache.G), THREADS, bytes, stream>>>(*a);
  return cudaGetLastError();
}

int us_prefill_attention(const struct us_prefill_attention *attention, cudaStream_t stream) {
  const struct us_prefill_attention *a = attention;
  uint32_t V = a->cache.V;
  if (!a->cache.G || a->H % a->cache.G || V % 8 || V > 128 || a->rotary > a->cache.Q || !a->cache.page_count)
    return cudaErrorInvalidValue;
  if (!a->rows) return cudaSuccess;
  if (V <= 16) return launch<2>(a, stream);
  if (V <= 32) return launch<4>(a, stream);
  if (V <= 64) return launch<8>(a, stream);
  return launch<16>(a, stream);
}
