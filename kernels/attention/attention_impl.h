/* attention_impl.h: one key tile of one query head, by instruction set. */
#ifndef US_KERNELS_ATTENTION_ATTENTION_IMPL_H
#define US_KERNELS_ATTENTION_ATTENTION_IMPL_H

#include "kernels/attention/attention.h"

/* Running softmax of one head: sums relative to max. */
struct us_attention_state {
  float max, sum;
  float *out; /* (V) */
};

struct us_attention_tile {
  float *scores;       /* (64) k.q of slots [begin, end); overwritten by the weights */
  uint32_t begin, end; /* visible slots of the tile, begin < end */
  float scale;
  const void *values; /* (64, V) in type */
  enum us_kv_type type;
  uint32_t V;
};

/* Add the tile to the state: attention.h gives the order. tile_out (V) is scratch. */
typedef void us_attention_tile_fn(const struct us_attention_tile *tile, struct us_attention_state *state,
                                  float *tile_out);
us_attention_tile_fn us_attention_tile_plain, us_attention_tile_avx2, us_attention_tile_avx512;

#endif
