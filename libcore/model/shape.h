/* shape.h: the geometry of a MiMo-V2 model and of its DFlash drafter: everything a config.json says.
 *
 *     struct us_shape shape;
 *     if (us_shape_load("mimo-v2.5-pro", &shape, &err) != US_OK) ...   // a built-in name, a shape file or a HF folder
 *     printf("%u layers of %u\n", shape.layers, shape.hidden);
 *
 * Plain data without pointers: copied by assignment. Sources: Hugging Face MiMoV2Flash configuration, and the MiMo-V2.5
 * and MiMo-V2.5-Pro-FP4-DFlash config.json files (docs/formats.md).
 */
#ifndef US_MODEL_SHAPE_H
#define US_MODEL_SHAPE_H

#include "base/err.h"
#include "formats/matrix.h"
#include <stdbool.h>
#include <stdint.h>

#define US_MAX_LAYERS       256
#define US_MAX_DRAFT_LAYERS 16
#define US_MAX_TAPS         16
#define US_MAX_BLOCK        16
#define US_MAX_STOP_IDS     8

enum us_model_type { US_MODEL_MIMO_V2, US_MODEL_MIMO_V2_FLASH };

/* One kind of attention layer. H query heads share G key/value heads; H % G == 0. */
struct us_attention_shape {
  uint32_t q_heads;    /* H */
  uint32_t kv_heads;   /* G */
  uint32_t qk_dim;     /* Q */
  uint32_t v_dim;      /* V */
  uint32_t rotary_dim; /* leading dims of each head that rotate, NeoX half-split; even, <= Q */
  double rope_theta;
  uint32_t window; /* a query sees keys with q_pos - k_pos < window; 0: all */
  bool sink;       /* one learned logit a query head that only enlarges the softmax denominator */
};

/* Storage format of each module family. Files may differ by layer; this is what most tensors have, for pricing. */
struct us_precision {
  enum us_format embed, head, qkv, o_proj, dense, experts, router, draft;
};

struct us_shape {
  char name[64];
  enum us_model_type type;
  uint32_t layers;                  /* L */
  uint32_t hidden;                  /* D */
  uint32_t vocab;                   /* N */
  struct us_attention_shape full;   /* layers with swa_layer[l] == 0 */
  struct us_attention_shape swa;    /* layers with swa_layer[l] == 1 */
  uint8_t swa_layer[US_MAX_LAYERS]; /* hybrid pattern */
  uint8_t moe_layer[US_MAX_LAYERS]; /* 1: router and experts, 0: dense MLP */
  uint32_t dense_inner;             /* F of dense layers */
  uint32_t expert_inner;            /* F of an expert */
  uint32_t experts, top_k;          /* E, K */
  bool norm_topk_prob;              /* divide the chosen scores by (their sum + 1e-20) */
  double routed_scaling;            /* factor on the routing weights, 1 if the config has null */
  double norm_eps;
  double value_scale;  /* V rows are multiplied by it before they are cached; 1 if the config has none */
  uint32_t qkv_chunks; /* fused qkv_proj: number of [Q_c | K_c | V_c] chunks; 0: split projections */
  uint32_t max_positions;
  uint32_t stop_ids[US_MAX_STOP_IDS]; /* end-of-sequence ids */
  uint32_t stop_count;
  struct us_precision precision;
};

/* The DFlash drafter (research: z-lab DFlash; MiMo-V2.5-Pro-FP4-DFlash dflash/config.json). */
struct us_draft_shape {
  uint32_t layers;
  uint32_t hidden;     /* equals the target's */
  uint32_t vocab;      /* the target's embedding is used, and without a head of its own the target's head */
  enum us_format head; /* of its own copy of the output head; NONE: it drafts with the target's */
  uint32_t inner;
  /* The window counts positions back from the query; sinks on every layer if set. */
  struct us_attention_shape attention;
  double norm_eps;
  double value_scale;
  uint32_t block;                  /* anchor + block-1 masks, at most US_MAX_BLOCK */
  uint32_t mask_id;                /* token id that stands for a mask; its vector comes from the side file */
  uint32_t taps;                   /* how many target layers are tapped */
  uint32_t tap_layer[US_MAX_TAPS]; /* 0-based: the residual stream after that layer, before the final norm */
  uint32_t target_layers;
  uint32_t markov; /* rank of what a row gets of the token drafted before it; 0: nothing (model/forward.h) */
};

/* Attention geometry and MLP kind of layer l. */
static inline const struct us_attention_shape *us_shape_attention(const struct us_shape *shape, uint32_t l) {
  return shape->swa_layer[l] ? &shape->swa : &shape->full;
}

/* Rows of the fused q|k|v projection of a layer: H*Q + G*Q + G*V. */
static inline uint32_t us_attention_qkv_rows(const struct us_attention_shape *a) {
  return a->q_heads * a->qk_dim + a->kv_heads * (a->qk_dim + a->v_dim);
}

/* Where a head's rows start in the projection's output, laid out as `chunks` runs of [Q_c | K_c | V_c] (split
 * projections are one chunk). */
static inline uint32_t us_attention_q_row(const struct us_attention_shape *a, uint32_t chunks,
                                          uint32_t q_head) {
  uint32_t c = chunks ? chunks : 1, per = a->q_heads / c, chunk = q_head / per;
  return chunk * (us_attention_qkv_rows(a) / c) + (q_head % per) * a->qk_dim;
}
static inline uint32_t us_attention_k_row(const struct us_attention_shape *a, uint32_t chunks,
                                          uint32_t kv_head) {
  uint32_t c = chunks ? chunks : 1, per = a->kv_heads / c, chunk = kv_head / per;
  return chunk * (us_attention_qkv_rows(a) / c) + a->q_heads / c * a->qk_dim + (kv_head % per) * a->qk_dim;
}
static inline uint32_t us_attention_v_row(const struct us_attention_shape *a, uint32_t chunks,
                                          uint32_t kv_head) {
  uint32_t c = chunks ? chunks : 1, per = a->kv_heads / c, chunk = kv_head / per;
  return chunk * (us_attention_qkv_rows(a) / c) + (a->q_heads / c + per) * a->qk_dim +
         (kv_head % per) * a->v_dim;
}

/* Check ranges and divisibility (H % G, K <= E, D and inner sizes multiples of 32, ...). US_ERR_INPUT names the field. */
US_CHECKED enum us_status us_shape_check(const struct us_shape *shape, struct us_err *err);
US_CHECKED enum us_status us_draft_shape_check(const struct us_draft_shape *draft,
                                               const struct us_shape *target, struct us_err *err);

/* Parse a config.json (model types mimo_v2, mimo_v2_flash), or a drafter's. `name` is for messages. */
US_CHECKED enum us_status us_shape_parse(const char *json, size_t bytes, const char *name,
                                         struct us_shape *ret_shape, struct us_err *err);
US_CHECKED enum us_status us_draft_shape_parse(const char *json, size_t bytes, const char *name,
                                               struct us_draft_shape *ret_draft, struct us_err *err);

/* Print the config.json of a shape; *ret_json is malloc'ed and freed by the caller. */
US_CHECKED enum us_status us_shape_print(const struct us_shape *shape, char **ret_json, struct us_err *err);
US_CHECKED enum us_status us_draft_shape_print(const struct us_draft_shape *draft, char **ret_json,
                                               struct us_err *err);

/* Load a shape: a path to a JSON file or to a folder with config.json, else the name of a file in the installed shapes
 * folder (data/shapes, or $ULTRASPEED_DATA/shapes). */
US_CHECKED enum us_status us_shape_load(const char *name_or_path, struct us_shape *ret_shape,
                                        struct us_err *err);
US_CHECKED enum us_status us_draft_shape_load(const char *name_or_path, struct us_draft_shape *ret_draft,
                                              struct us_err *err);

#endif
