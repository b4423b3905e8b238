/* append.cu: K and V of a chunk's rows into pages. Bound: bytes, a fraction of the projection's output. A block takes 16 slots
 * of a KV head, so that transposed values leave 32 bytes at a time. */
#include "formats/bf16.h"
#include "kernels/prefill/cache.cuh"

#define SLOTS   16
#define THREADS 512
#define MOST_Q  256

/* What stands in a slot. */
enum slot_source { SLOT_ROW, SLOT_OLD, SLOT_ZERO, SLOT_KEEP };

static __device__ __forceinline__ enum slot_source source_of(const struct us_prefill_append *a, uint32_t p) {
  uint32_t end = a->position + a->rows;
  if (p >= a->position && p < end) {
    bool overwritten = !a->cache.opt_staging && end - p > a->cache.page_count * US_PREFILL_PAGE;
    return overwritten ? SLOT_KEEP : SLOT_ROW;
  }
  if (!a->cache.opt_staging) return SLOT_KEEP;
  return p < a->position ? SLOT_OLD : SLOT_ZERO;
}

/* 1 / rms of the head in each slot; 1 without a norm. */
static __device__ __forceinline__ void head_scales(const struct us_prefill_append *a, uint32_t p0, uint32_t g,
                                                   float *scale) {
  uint32_t Q = a->cache.Q, lane = threadIdx.x % 32;
  for (uint32_t j = threadIdx.x / 32; j < SLOTS; j += THREADS / 32) {
    float squares = 0;
    if (a->opt_k_norm && source_of(a, p0 + j) == SLOT_ROW) {
      const float *k = a->kv + (size_t)(p0 + j - a->position) * a->stride + g * Q;
      for (uint32_t d = lane; d < Q; d += 32) squares = fmaf(k[d], k[d], squares);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (lane == 0) scale[j] = 1.0f / sqrtf(squares / (float)Q + a->eps);
  }
}

static __device__ __forceinline__ void append_keys(const struct us_prefill_append *a, uint32_t p0, uint32_t g,
                                                   uint8_t *page, uint8_t *old, const float *scale,
                                                   float (*head)[MOST_Q]) {
  uint32_t Q = a->cache.Q, stride = us_engine_k_stride(Q), slot0 = p0 % US_PREFILL_PAGE;
  uint16_t *keys = us_prefill_keys(&a->cache, page, g) + slot0 * stride;
  for (uint32_t i = threadIdx.x; i < SLOTS * Q; i += THREADS) {
    uint32_t j = i / Q, d = i % Q;
    if (source_of(a, p0 + j) != SLOT_ROW) continue;
    float x = a->kv[(size_t)(p0 + j - a->position) * a->stride + g * Q + d];
    head[j][d] = a->opt_k_norm ? x * scale[j] * a->opt_k_norm[d] : x;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < SLOTS * stride; i += THREADS) {
    uint32_t j = i / stride, d = i % stride, p = p0 + j;
    enum slot_source source = source_of(a, p);
    if (source == SLOT_KEEP) continue;
    uint16_t bits = 0;
    if (source == SLOT_OLD)
      bits = (us_prefill_keys(&a->cache, old, g) + slot0 * stride)[i];
    else if (source == SLOT_ROW && d < Q)
      bits = us_bf16_from_f32(us_prefill_rotate(head[j], a->rope + (size_t)p * a->rotary, a->rotary, d));
    keys[i] = bits;
  }
}

static __device__ __forceinline__ void append_values(const struct us_prefill_append *a, uint32_t p0,
                                                     uint32_t g, uint8_t *page, uint8_t *old) {
  uint32_t V = a->cache.V, slot0 = p0 % US_PREFILL_PAGE;
  uint16_t *values = us_prefill_values(&a->cache, page, g) + slot0;
  for (uint32_t i = threadIdx.x; i < SLOTS * V; i += THREADS) {
    uint32_t j = i % SLOTS, d = i / SLOTS, at = d * US_PREFILL_PAGE + j;
    enum slot_source source = source_of(a, p0 + j);
    if (source == SLOT_KEEP) continue;
    uint16_t bits = 0;
    if (source == SLOT_OLD)
      bits = (us_prefill_values(&a->cache, old, g) + slot0)[at];
    else if (source == SLOT_ROW)
      bits = us_bf16_from_f32(a->kv[(size_t)(p0 + j - a->position) * a->stride + a->v_first + g * V + d] *
                              a->value_scale);
    values[at] = bits;
  }
}

static __global__ void __launch_bounds__(THREADS)
    prefill_append(const __grid_constant__ struct us_prefill_append a, uint32_t first) {
  __shared__ float scale[SLOTS], head[SLOTS][MOST_Q];
  uint32_t p0 = first + blockIdx.x * SLOTS, tile = p0 / US_PREFILL_PAGE;
  uint8_t *page = us_prefill_page(&a.cache, tile), *old = NULL;
  if (a.cache.opt_staging && p0 < a.position)
    old = a.cache.pool + a.cache.tables[a.cache.layer][tile % a.cache.page_count];
  head_scales(&a, p0, blockIdx.y, scale);
  __syncthreads();
  append_keys(&a, p0, blockIdx.y, page, old, scale, head);
  append_values(&a, p0, blockIdx.y, page, old);
}

int us_prefill_append(const struct us_prefill_append *append, cudaStream_t stream) {
  const struct us_prefill_append *a = append;
  bool staging = a->cache.opt_staging != NULL;
  uint32_t unit = staging ? US_PREFILL_PAGE : SLOTS, first = a->position / unit * unit;
  uint32_t end = (a->position + a->rows + unit - 1) / unit * unit;
  if (a->cache.Q > MOST_Q || a->rotary > a->cache.Q || !a->cache.page_count) return cudaErrorInvalidValue;
  if (staging && a->cache.first_tile != first / US_PREFILL_PAGE) return cudaErrorInvalidValue;
  if (a->rows) prefill_append<<<dim3((end - first) / SLOTS, a->cache.G), THREADS, 0, stream>>>(*a, first);
  return cudaGetLastError();
}
