/* attention_avx512.c: attention_simd.h compiled for avx512. */
#include "kernels/attention/attention_simd.h"

void us_attention_tile_avx512(const struct us_attention_tile *tile, struct us_attention_state *state,
                              float *tile_out) {
  attention_tile_any(tile, state, tile_out);
}
