/* small.h: small models for tests of passes, and a run over tokens. */
#ifndef US_TESTS_MODEL_SMALL_H
#define US_TESTS_MODEL_SMALL_H

#include "model/executor.h"
#include "model/random.h"
#include "small_shape.h"
#include "suite.h"

#include <string.h>

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
