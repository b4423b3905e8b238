/* small_shape.h: a model and a drafter small enough to run everywhere. */
#ifndef US_TESTS_MODEL_SMALL_SHAPE_H
#define US_TESTS_MODEL_SMALL_SHAPE_H

#include "model/shape.h"

/* Four layers, full and windowed, dense and MoE; every storage format is used somewhere. */
static inline struct us_shape small_shape(uint32_t window) {
  struct us_shape s = {
      .name = "small",
      .type = US_MODEL_MIMO_V2,
      .layers = 4,
      .hidden = 64,
      .vocab = 97,
      .full = {.q_heads = 4, .kv_heads = 2, .qk_dim = 24, .v_dim = 16, .rotary_dim = 8, .rope_theta = 1e6},
      .swa = {.q_heads = 8,
              .kv_heads = 4,
              .qk_dim = 24,
              .v_dim = 16,
              .rotary_dim = 8,
              .rope_theta = 1e4,
              .window = window,
              .sink = true},
      .swa_layer = {0, 1, 1, 0},
      .moe_layer = {0, 1, 1, 1},
      .dense_inner = 96,
      .expert_inner = 32,
      .experts = 12,
      .top_k = 3,
      .norm_topk_prob = true,
      .routed_scaling = 1,
      .norm_eps = 1e-5,
      .value_scale = 0.612,
      .qkv_chunks = 2,
      .max_positions = 512,
      .precision = {.embed = US_FORMAT_BF16,
                    .head = US_FORMAT_BF16,
                    .qkv = US_FORMAT_FP8,
                    .o_proj = US_FORMAT_BF16,
                    .dense = US_FORMAT_FP8,
                    .experts = US_FORMAT_MXFP4,
                    .router = US_FORMAT_F32,
                    .draft = US_FORMAT_BF16}};
  return s;
}

static uint32_t small_markov __attribute__((unused)); /* rank of the drafter's Markov head; 0: none */

static inline struct us_draft_shape small_draft_shape(uint32_t window) {
  return (struct us_draft_shape){.layers = 2,
                                 .hidden = 64,
                                 .vocab = 97,
                                 .inner = 96,
                                 .attention = {.q_heads = 4,
                                               .kv_heads = 2,
                                               .qk_dim = 16,
                                               .v_dim = 16,
                                               .rotary_dim = 8,
                                               .rope_theta = 1e4,
                                               .window = window,
                                               .sink = true},
                                 .norm_eps = 1e-5,
                                 .value_scale = 0.612,
                                 .block = 8,
                                 .mask_id = 96,
                                 .taps = 2,
                                 .tap_layer = {0, 3},
                                 .target_layers = 4,
                                 .markov = small_markov};
}

#endif
