/* tiny.h: two small models whose weights come from a formula that tests/parity/make_grad_goldens.py repeats.
 *
 * Weight k of a tensor: ((splitmix64(fnv1a(name) + k) >> 40) / 2^23 - 1) * scale, exact in float: scale 1 for the embedding
 * and the sinks, 1/8 for the router bias, 1/4 for the rest; norms are 1 + that.
 */
#ifndef US_TESTS_TINY_H
#define US_TESTS_TINY_H

#include "suite.h"
#include "training/model_train.h"

#include <string.h>

static inline uint64_t tiny_mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

static inline uint64_t tiny_hash(const char *name) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (; *name; name++) hash = (hash ^ (uint8_t)*name) * 0x100000001B3u;
  return hash;
}

static inline float tiny_value(uint64_t hash, uint64_t k) {
  return (float)((double)(tiny_mix(hash + k) >> 40) * 0x1p-23 - 1.0);
}

/* Pro's layout: fused qkv in chunks, equal KV heads, dense first layer. */
static inline struct us_shape tiny_pro(void) {
  struct us_attention_shape full = {
      .q_heads = 4, .kv_heads = 2, .qk_dim = 24, .v_dim = 16, .rotary_dim = 8, .rope_theta = 1e6};
  struct us_attention_shape swa = full;
  swa.rope_theta = 1e4, swa.window = 8, swa.sink = true;
  struct us_shape s = {.name = "tiny-pro",
                       .type = US_MODEL_MIMO_V2,
                       .layers = 3,
                       .hidden = 32,
                       .vocab = 96,
                       .full = full,
                       .swa = swa,
                       .swa_layer = {0, 1, 1},
                       .moe_layer = {0, 1, 1},
                       .dense_inner = 64,
                       .expert_inner = 32,
                       .experts = 4,
                       .top_k = 2,
                       .norm_topk_prob = true,
                       .routed_scaling = 1.0,
                       .norm_eps = 1e-5,
                       .value_scale = 0.612,
                       .qkv_chunks = 2,
                       .max_positions = 256,
                       .stop_ids = {0},
                       .stop_count = 1};
  s.precision = (struct us_precision){US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_BF16,
                                      US_FORMAT_BF16, US_FORMAT_BF16, US_FORMAT_F32,  US_FORMAT_BF16};
  return s;
}

/* Flash's layout: split q, k, v; more KV heads in sliding layers; scaled routing weights. */
static inline struct us_shape tiny_flash(void) {
  struct us_shape s = tiny_pro();
  strcpy(s.name, "tiny-flash");
  s.type = US_MODEL_MIMO_V2_FLASH;
  s.full.kv_heads = 1;
  s.swa_layer[2] = 0;
  s.routed_scaling = 2.5;
  s.qkv_chunks = 0;
  return s;
}

static inline void tiny_fill(struct us_params *params) {
  for (size_t i = 0; i < params->count; i++) {
    struct us_param *p = &params->items[i];
    uint64_t hash = tiny_hash(p->name);
    bool norm = strcmp(p->family, "norm") == 0;
    float scale = 0.25f;
    if (strcmp(p->family, "embed") == 0 || strcmp(p->family, "sink") == 0) scale = 1.0f;
    if (p->group == US_PARAM_BIAS) scale = 0.125f;
    for (size_t k = 0; k < p->rows * p->cols; k++)
      p->value[k] = (norm ? 1.0f : 0.0f) + scale * tiny_value(hash, k);
  }
}

/* 40 rows: a document of 25 and one of 15. */
enum { TINY_ROWS = 40, TINY_FIRST = 25 };

struct tiny_rows {
  int32_t token[TINY_ROWS], label[TINY_ROWS];
  uint32_t position[TINY_ROWS], document[TINY_ROWS];
  float weight[TINY_ROWS];
};

static inline void tiny_rows_fill(struct tiny_rows *rows) {
  for (uint32_t i = 0; i < TINY_ROWS; i++) {
    rows->token[i] = (int32_t)(tiny_mix(tiny_hash("token") + i) % 96);
    rows->label[i] = (int32_t)(tiny_mix(tiny_hash("token") + i + 1) % 96);
    rows->document[i] = i < TINY_FIRST ? 0 : TINY_FIRST;
    rows->position[i] = i - rows->document[i];
    rows->weight[i] = 1.0f;
  }
}

static inline struct us_batch tiny_batch(const struct tiny_rows *rows) {
  return (struct us_batch){
      .R = TINY_ROWS, .token = rows->token, .position = rows->position, .document = rows->document};
}

#endif
