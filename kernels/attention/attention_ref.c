/* attention_ref.c: one key tile of one query head in plain C: the definition. */
#include "kernels/attention/attention_impl.h"

#include "kernels/cpu/exp.h"

#define LANES 16

static float value_at(const struct us_attention_tile *tile, uint32_t slot, uint32_t d) {
  size_t at = (size_t)slot * tile->V + d;
  return tile->type == US_KV_F32 ? ((const float *)tile->values)[at]
                                 : us_bf16_to_f32(((const uint16_t *)tile->values)[at]);
}

/* Turn scores into weights exp(score - max); returns their sum and the max. */
static float weigh(const struct us_attention_tile *tile, float *ret_max) {
  float lane[LANES] = {0}, max = -INFINITY;
  for (uint32_t j = tile->begin; j < tile->end; j++) {
    tile->scores[j] = tile->scores[j] * tile->scale;
    if (tile->scores[j] > max) max = tile->scores[j];
  }
  for (uint32_t j = tile->begin; j < tile->end; j++) {
    tile->scores[j] = us_expf(tile->scores[j] - max);
    lane[j % LANES] = lane[j % LANES] + tile->scores[j];
  }
  for (uint32_t width = LANES / 2; width; width /= 2)
    for (uint32_t l = 0; l < width; l++) lane[l] = lane[l] + lane[l + width];
  *ret_max = max;
  return lane[0];
}

void us_attention_tile_plain(const struct us_attention_tile *tile, struct us_attention_state *state,
                             float *tile_out) {
  float tile_max, tile_sum = weigh(tile, &tile_max);
  for (uint32_t d = 0; d < tile->V; d++) {
    tile_out[d] = 0;
    for (uint32_t j = tile->begin; j < tile->end; j++)
      tile_out[d] = fmaf(tile->scores[j], value_at(tile, j, d), tile_out[d]);
  }
  float max = state->max > tile_max ? state->max : tile_max;
  float keep = us_expf(state->max - max), add = us_expf(tile_max - max);
  state->max = max;
  state->sum = fmaf(tile_sum, add, state->sum * keep);
  for (uint32_t d = 0; d < tile->V; d++) state->out[d] = fmaf(tile_out[d], add, state->out[d] * keep);
}
