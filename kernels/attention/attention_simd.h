/* attention_simd.h: one key tile of one query head over 16 lanes. Bound: at short contexts the exponentials, at long
 * ones reading K and V, which the heads of a group share from the first-level cache. */
#include "kernels/attention/attention_impl.h"
#include "kernels/cpu/vec16.h"

#define LANES 16

/* Slots outside [begin, end) take no part: -Inf for the maximum, weight 0 for the sum. */
static void hide_slots(const struct us_attention_tile *tile, float value) {
  for (uint32_t j = 0; j < tile->begin; j++) tile->scores[j] = value;
  for (uint32_t j = tile->end; j < US_KV_PAGE; j++) tile->scores[j] = value;
}

static float weigh(const struct us_attention_tile *tile, float *ret_max) {
  vec16 score[US_KV_PAGE / LANES], sum = vec16_zero();
  float max = -INFINITY;
  hide_slots(tile, -INFINITY);
#pragma GCC unroll 4
  for (int i = 0; i < US_KV_PAGE / LANES; i++)
    score[i] = vec16_mul(vec16_load(tile->scores + i * LANES), vec16_set1(tile->scale));
  float top[LANES];
  vec16_store(top, vec16_max(vec16_max(score[3], score[2]), vec16_max(score[1], score[0])));
  for (int l = 0; l < LANES; l++) max = top[l] > max ? top[l] : max;
#pragma GCC unroll 4
  for (int i = 0; i < US_KV_PAGE / LANES; i++)
    vec16_store(tile->scores + i * LANES, vec16_exp(vec16_sub(score[i], vec16_set1(max))));
  hide_slots(tile, 0);
#pragma GCC unroll 4
  for (int i = 0; i < US_KV_PAGE / LANES; i++) sum = vec16_add(sum, vec16_load(tile->scores + i * LANES));
  *ret_max = max;
  return vec16_sum(sum);
}

VEC16_INLINE vec16 load_values(const struct us_attention_tile *tile, size_t at, const enum us_kv_type type) {
  return type == US_KV_F32 ? vec16_load((const float *)tile->values + at)
                           : vec16_load_bf16((const uint16_t *)tile->values + at);
}

/* `vectors` of 16 dims at once from d on: as many independent chains of fma over the slots. */
VEC16_INLINE void mix_dims(const struct us_attention_tile *tile, uint32_t d, const int vectors,
                           const enum us_kv_type type, float *tile_out) {
  vec16 acc[8];
#pragma GCC unroll 8
  for (int i = 0; i < vectors; i++) acc[i] = vec16_zero();
  for (uint32_t j = tile->begin; j < tile->end; j++) {
    vec16 weight = vec16_set1(tile->scores[j]);
    size_t at = (size_t)j * tile->V + d;
#pragma GCC unroll 8
    for (int i = 0; i < vectors; i++)
      acc[i] = vec16_fma(weight, load_values(tile, at + (size_t)i * LANES, type), acc[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < vectors; i++) vec16_store(tile_out + d + i * LANES, acc[i]);
}

VEC16_INLINE void mix_values(const struct us_attention_tile *tile, const enum us_kv_type type,
                             float *tile_out) {
  uint32_t d = 0;
  for (; d + 4 * LANES <= tile->V; d += 4 * LANES) mix_dims(tile, d, 4, type, tile_out);
  for (; d + LANES <= tile->V; d += LANES) mix_dims(tile, d, 1, type, tile_out);
  for (; d < tile->V; d++) {
    tile_out[d] = 0;
    for (uint32_t j = tile->begin; j < tile->end; j++) {
      size_t at = (size_t)j * tile->V + d;
      float v = type == US_KV_F32 ? ((const float *)tile->values)[at]
                                  : us_bf16_to_f32(((const uint16_t *)tile->values)[at]);
      tile_out[d] = fmaf(tile->scores[j], v, tile_out[d]);
    }
  }
}

static void attention_tile_any(const struct us_attention_tile *tile, struct us_attention_state *state,
                               float *tile_out) {
  float tile_max, tile_sum = weigh(tile, &tile_max);
  if (tile->type == US_KV_F32)
    mix_values(tile, US_KV_F32, tile_out);
  else
    mix_values(tile, US_KV_BF16, tile_out);
  float max = state->max > tile_max ? state->max : tile_max;
  float keep = us_expf(state->max - max), add = us_expf(tile_max - max);
  state->max = max;
  state->sum = fmaf(tile_sum, add, state->sum * keep);
  uint32_t d = 0;
  for (; d + LANES <= tile->V; d += LANES) {
    vec16 kept = vec16_mul(vec16_load(state->out + d), vec16_set1(keep));
    vec16_store(state->out + d, vec16_fma(vec16_load(tile_out + d), vec16_set1(add), kept));
  }
  for (; d < tile->V; d++) state->out[d] = fmaf(tile_out[d], add, state->out[d] * keep);
}
