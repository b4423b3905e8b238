/* attention_avx2.c: attention_simd.h compiled for avx2. */
#include "kernels/attention/attention_simd.h"

void us_attention_tile_avx2(const struct us_attention_tile *tile, struct us_attention_state *state,
                            float *tile_out) {
  attention_tile_any(tile, state, tile_out);
}
