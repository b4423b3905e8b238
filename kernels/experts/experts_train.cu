/* experts_train.cu: rows to slots, slots to rows, and SwiGLU between the grouped products.
 *
 * Bound: bytes. A thread has 8 values of a row; a row is read once and written to its K slots, or K slots are read at once and
 * added in ascending k, each product and each sum rounded by itself, as on the CPU.
 *
 * Contents: rows to slots; slots to rows; SwiGLU; launch.
 */
#include "kernels/experts/experts_train.h"
#include "kernels/experts/experts_vector.cuh"

#define THREADS     256
#define MOST_CHOSEN 32
#define BATCH       8 /* slots read before the first is added */

/* What a thread works on: values [column, column + 8) of a row. */
struct place {
  uint32_t row, column;
};

/* 32-bit: a 64-bit division would take longer than the bytes. */
static __device__ __forceinline__ bool place_of(uint32_t rows, uint32_t D, struct place *p) {
  uint32_t i = blockIdx.x * THREADS + threadIdx.x, vectors = D / 8;
  p->row = i / vectors, p->column = (i - p->row * vectors) * 8;
  return p->row < rows;
}

/* --- rows to slots --- */

template <bool WIDE>
static __global__ void __launch_bounds__(THREADS)
    scatter_rows(struct us_experts_train_rows rows, const void *x, uint16_t *out) {
  struct place p;
  if (!place_of(rows.R, rows.D, &p)) return;
  const uint64_t at = (uint64_t)p.row * rows.D + p.column;
  uint4 v;
  if (WIDE) {
    const float4 *from = (const float4 *)((const float *)x + at);
    float4 low = from[0], high = from[1];
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    v = pack_8(values);
  } else {
    v = *(const uint4 *)((const uint16_t *)x + at);
  }
  for (uint32_t k = 0; k < rows.K; k++)
    *(uint4 *)(out + (uint64_t)__ldg(rows.slot + p.row * rows.K + k) * rows.D + p.column) = v;
}

/* --- slots to rows --- */

/* sum = weight * slot's values added over k; without weights the values themselves. */
static __device__ __forceinline__ void add_slots(const struct us_experts_train_rows *rows,
                                                 const float *weight, const uint16_t *values,
                                                 const struct place *p, float sum[8]) {
  for (uint32_t first = 0; first < rows->K; first += BATCH) {
    uint4 v[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      uint32_t k = first + j < rows->K ? first + j : rows->K - 1;
      v[j] = __ldcs(
          (const uint4 *)(values + (uint64_t)__ldg(rows->slot + p->row * rows->K + k) * rows->D + p->column));
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if (first + j >= rows->K) break;
      float part[8], w = weight ? __ldg(weight + p->row * rows->K + first + j) : 1.0f;
      unpack_8(v[j], part);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] = first + j ? sum[i] + w * part[i] : w * part[i];
    }
  }
}

static __device__ __forceinline__ void store_8(float *to, const float v[8]) {
  ((float4 *)to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  ((float4 *)to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

static __device__ __forceinline__ void load_8(const float *from, float v[8]) {
  float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

static __global__ void __launch_bounds__(THREADS)
    combine_rows(struct us_experts_train_rows rows, const float *weight, const uint16_t *y, const float *in,
                 float *out) {
  struct place p;
  if (!place_of(rows.R, rows.D, &p)) return;
  const uint64_t at = (uint64_t)p.row * rows.D + p.column;
  float sum[8], residual[8];
  load_8(in + at, residual);
  add_slots(&rows, weight, y, &p, sum);
#pragma unroll
  for (int i = 0; i < 8; i++) residual[i] += sum[i];
  store_8(out + at, residual);
}

static __global__ void __launch_bounds__(THREADS)
    gather_rows(struct us_experts_train_rows rows, const uint16_t *dx, struct us_experts_train_router router,
                float *out) {
  struct place p;
  if (!place_of(rows.R, rows.D, &p)) return;
  float sum[8], routed[8] = {};
  for (uint32_t k = 0; k < rows.K && router.dlogit; k++) {
    uint32_t pair = p.row * rows.K + k;
    float w[8], d = __ldg(router.dlogit + pair);
    load_8(router.w + (uint64_t)__ldg(router.id + pair) * rows.D + p.column, w);
#pragma unroll
    for (int i = 0; i < 8; i++) routed[i] += d * w[i];
  }
  add_slots(&rows, NULL, dx, &p, sum);
  if (router.dlogit)
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += routed[i];
  store_8(out + (uint64_t)p.row * rows.D + p.column, sum);
}

/* --- SwiGLU --- */

static __global__ void __launch_bounds__(THREADS)
    swiglu_rows(uint32_t S, uint32_t F, const uint16_t *gate_up, uint16_t *a) {
  struct place p;
  if (!place_of(S, F, &p)) return;
  const uint16_t *from = gate_up + (uint64_t)p.row * 2 * F + p.column;
  float gate[8], up[8];
  unpack_8(*(const uint4 *)from, gate), unpack_8(*(const uint4 *)(from + F), up);
#pragma unroll
  for (int i = 0; i < 8; i++) up[i] = gate[i] * sigmoid(gate[i]) * up[i];
  *(uint4 *)(a + (uint64_t)p.row * F + p.column) = pack_8(up);
}

/* Four values: 8 bytes, so that F of 128, 256 and 384 leave no lane idle. */
struct swiglu_four {
  float gate[4], up[4], da[4], a[4];
};

static __device__ __forceinline__ void load_four(const uint16_t *from, float v[4]) {
  uint2 both = *(const uint2 *)from;
  unpack_2(both.x, v), unpack_2(both.y, v + 2);
}

static __device__ __forceinline__ void store_four(uint16_t *to, const float v[4]) {
  *(uint2 *)to = make_uint2(pack_2(v), pack_2(v + 2));
}

/* a . da of four columns, and their share of a_w and dgate_up. */
static __device__ __forceinline__ float swiglu_four_grad(const struct us_experts_train_swiglu_grad *g,
                                                         uint64_t slot, uint32_t column, float w) {
  const uint16_t *from = g->gate_up + slot * 2 * g->F + column;
  struct swiglu_four v;
  float dot = 0.0f, dgate[4], dup[4];
  load_four(from, v.gate), load_four(from + g->F, v.up), load_four(g->da + slot * g->F + column, v.da);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float s = sigmoid(v.gate[i]), silu = v.gate[i] * s, d = w * v.da[i];
    v.a[i] = silu * v.up[i];
    dgate[i] = d * v.up[i] * s * (1.0f + v.gate[i] * (1.0f - s));
    dup[i] = d * silu;
  }
  uint32_t low = pack_2(v.a), high = pack_2(v.a + 2); /* the a that the forward multiplied */
  unpack_2(low, v.a), unpack_2(high, v.a + 2);
#pragma unroll
  for (int i = 0; i < 4; i++) dot += v.a[i] * v.da[i], v.a[i] *= w;
  store_four(g->a_w + slot * g->F + column, v.a);
  store_four(g->dgate_up + slot * 2 * g->F + column, dgate);
  store_four(g->dgate_up + slot * 2 * g->F + g->F + column, dup);
  return dot;
}

/* A warp a slot. */
static __global__ void __launch_bounds__(THREADS) swiglu_grad_rows(struct us_experts_train_swiglu_grad g) {
  uint32_t slot = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (slot >= g.S) return;
  uint32_t pair = __ldg(g.pair + slot);
  float w = __ldg(g.weight + pair), sum = 0.0f;
#pragma unroll 3
  for (uint32_t column = lane * 4; column < g.F; column += 128) sum += swiglu_four_grad(&g, slot, column, w);
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane == 0) g.dweight[pair] = sum;
}

/* --- launch --- */

static bool valid(const struct us_experts_train_rows *rows) {
  return rows->D && rows->D % 8 == 0 && rows->K && rows->K <= MOST_CHOSEN &&
         (uint64_t)rows->R * rows->K <= INT32_MAX && (uint64_t)rows->R * (rows->D / 8) <= INT32_MAX;
}

static uint32_t blocks_for(uint64_t rows, uint32_t columns) {
  return (uint32_t)((rows * (columns / 8) + THREADS - 1) / THREADS);
}

int us_experts_train_scatter(const struct us_experts_train_rows *rows, const uint16_t *x, uint16_t *x_slot,
                             cudaStream_t stream) {
  if (!valid(rows)) return cudaErrorInvalidValue;
  if (rows->R) scatter_rows<false><<<blocks_for(rows->R, rows->D), THREADS, 0, stream>>>(*rows, x, x_slot);
  return cudaGetLastError();
}

int us_experts_train_scatter_grad(const struct us_experts_train_rows *rows, const float *dx,
                                  uint16_t *dy_slot, cudaStream_t stream) {
  if (!valid(rows)) return cudaErrorInvalidValue;
  if (rows->R) scatter_rows<true><<<blocks_for(rows->R, rows->D), THREADS, 0, stream>>>(*rows, dx, dy_slot);
  return cudaGetLastError();
}

int us_experts_train_combine(const struct us_experts_train_rows *rows, const float *weight,
                             const uint16_t *y_slot, const float *residual_in, float *residual_out,
                             cudaStream_t stream) {
  if (!valid(rows)) return cudaErrorInvalidValue;
  if (rows->R)
    combine_rows<<<blocks_for(rows->R, rows->D), THREADS, 0, stream>>>(*rows, weight, y_slot, residual_in,
                                                                       residual_out);
  return cudaGetLastError();
}

int us_experts_train_gather_grad(const struct us_experts_train_rows *rows, const uint16_t *dx_slot,
                                 const struct us_experts_train_router *opt_router, float *dnorm,
                                 cudaStream_t stream) {
  struct us_experts_train_router router = {};
  if (!valid(rows)) return cudaErrorInvalidValue;
  if (opt_router) router = *opt_router;
  if (rows->R)
    gather_rows<<<blocks_for(rows->R, rows->D), THREADS, 0, stream>>>(*rows, dx_slot, router, dnorm);
  return cudaGetLastError();
}

int us_experts_train_swiglu(uint32_t S, uint32_t F, const uint16_t *gate_up, uint16_t *a,
                            cudaStream_t stream) {
  if (!F || F % 8 || (uint64_t)S * (F / 8) > INT32_MAX) return cudaErrorInvalidValue;
  if (S) swiglu_rows<<<blocks_for(S, F), THREADS, 0, stream>>>(S, F, gate_up, a);
  return cudaGetLastError();
}

int us_experts_train_swiglu_grad(const struct us_experts_train_swiglu_grad *grad, cudaStream_t stream) {
  if (!grad->F || grad->F % 8) return cudaErrorInvalidValue;
  uint32_t each = THREADS / 32;
  if (grad->S) swiglu_grad_rows<<<(grad->S + each - 1) / each, THREADS, 0, stream>>>(*grad);
  return cudaGetLastError();
}
