/* small.h: small shapes for tests of passes, and a run over tokens. */
#ifndef US_TESTS_MODEL_SMALL_H
#define US_TESTS_MODEL_SMALL_H

#include "model/executor.h"
#include "model/random.h"
#include "suite.h"

#include <string.h>

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
                                 .target_layers = 4};
}

struct small {
  struct us_model *model;
  struct us_draft *draft;
  struct us_pool *pool;
  struct us_executor *ex;
  enum us_rounding rounding;
};

static inline struct small open_small(uint32_t window, int threads, enum us_rounding rounding) {
  struct small m = {.rounding = rounding};
  struct us_err err = {0};
  struct us_shape shape = small_shape(window);
  struct us_draft_shape draft = small_draft_shape(window);
  ck_assert_msg(us_pool_create(threads, &m.pool, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_model_random(&shape, 11, m.pool, &m.model, &err) == US_OK, "%s", err.message);
  ck_assert_msg(us_draft_random(&draft, US_FORMAT_BF16, 12, m.pool, &m.draft, &err) == US_OK, "%s",
                err.message);
  ck_assert_msg(us_executor_create_reference(m.model, m.draft, m.pool, rounding, &m.ex, &err) == US_OK, "%s",
                err.message);
  return m;
}

static inline void close_small(struct small *m) {
  m->ex->ops->free(m->ex);
  us_pool_free(m->pool);
  us_draft_free(m->draft);
  us_model_free(m->model);
}

static inline struct us_kv *new_kv(const struct small *m) {
  struct us_kv_spec spec = us_kv_spec_of(&m->model->shape);
  struct us_kv *kv;
  struct us_err err = {0};
  ck_assert_msg(us_kv_create(&spec, 512, m->rounding == US_ROUND_NONE ? US_KV_F32 : US_KV_BF16, &kv, &err) ==
                    US_OK,
                "%s", err.message);
  return kv;
}

static inline struct us_kv *new_draft_kv(const struct small *m) {
  struct us_kv_spec spec = us_kv_spec_of_draft(&m->draft->shape);
  struct us_kv *kv;
  struct us_err err = {0};
  ck_assert_msg(us_kv_create(&spec, 512, m->rounding == US_ROUND_NONE ? US_KV_F32 : US_KV_BF16, &kv, &err) ==
                    US_OK,
                "%s", err.message);
  return kv;
}

static inline int32_t small_token(uint32_t position) {
  return (int32_t)((position * 37u + position * position * 5u) % 96u);
}

/* Run positions [from, to) of the test text in one pass; logits (to - from, N) and taps may be NULL. */
static inline void run_rows(const struct small *m, struct us_kv *kv, uint32_t from, uint32_t to,
                            float *logits, float *taps) {
  struct us_row rows[512];
  struct us_err err = {0};
  for (uint32_t p = from; p < to; p++)
    rows[p - from] = (struct us_row){.token = small_token(p), .position = p, .kv = kv};
  struct us_pass pass = {.rows = rows, .R = to - from, .logits = logits, .taps = taps};
  ck_assert_msg(m->ex->ops->forward(m->ex, &pass, &err) == US_OK, "%s", err.message);
}

#endif
