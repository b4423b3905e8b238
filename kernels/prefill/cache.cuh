/* cache.cuh: where keys and values of a position are, for kernels that append and attend. */
#ifndef US_KERNELS_PREFILL_CACHE_CUH
#define US_KERNELS_PREFILL_CACHE_CUH

#include "kernels/prefill/prefill.h"

#define US_PREFILL_PAGE 64 /* positions */

/* The page of positions [64 tile, 64 tile + 64). */
static __device__ __forceinline__ uint8_t *us_prefill_page(const struct us_prefill_cache *c, uint32_t tile) {
  if (c->opt_staging && tile >= c->first_tile)
    return c->opt_staging + (size_t)(tile - c->first_tile) * us_engine_page_bytes(c->G, c->Q, c->V);
  return c->pool + c->tables[c->layer][tile % c->page_count];
}

/* K (64, us_engine_k_stride(Q)) and V (V, 64) of KV head g in a page. */
static __device__ __forceinline__ uint16_t *us_prefill_keys(const struct us_prefill_cache *c, uint8_t *page,
                                                            uint32_t g) {
  return (uint16_t *)page + g * US_PREFILL_PAGE * us_engine_k_stride(c->Q);
}
static __device__ __forceinline__ uint16_t *us_prefill_values(const struct us_prefill_cache *c, uint8_t *page,
                                                              uint32_t g) {
  return (uint16_t *)(page + us_engine_v_offset(c->G, c->Q)) + g * c->V * US_PREFILL_PAGE;
}

/* Element d of a rotated head x; table: the row's cosines, then sines (kernels/rope/rope.h). */
static __device__ __forceinline__ float us_prefill_rotate(const float *x, const float *table, uint32_t rotary,
                                                          uint32_t d) {
  uint32_t half = rotary / 2;
  if (d >= rotary) return x[d];
  if (d < half) return x[d] * table[d] - x[d + half] * table[half + d];
  return x[d] * table[d - half] + x[d - half] * table[d];
}

#endif
