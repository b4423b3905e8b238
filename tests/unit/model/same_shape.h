/* same_shape.h: that two shapes are equal, field by field: the bytes between fields mean nothing.
 *
 *     assert_same_shape(&one, &other);
 *     assert_same_draft_shape(&one.shape, &other.shape);
 *
 * A field that is added to a shape changes its size, and the assertions at the end then ask for it here.
 */
#ifndef US_TESTS_SAME_SHAPE_H
#define US_TESTS_SAME_SHAPE_H

#include "model/shape.h"
#include "suite.h"

#define SAME(field) ck_assert_msg(a->field == b->field, #field " differs")

static inline void assert_same_attention(const struct us_attention_shape *a,
                                         const struct us_attention_shape *b) {
  SAME(q_heads), SAME(kv_heads), SAME(qk_dim), SAME(v_dim), SAME(rotary_dim);
  SAME(rope_theta), SAME(window), SAME(sink);
}

static inline void assert_same_precision(const struct us_precision *a, const struct us_precision *b) {
  SAME(embed), SAME(head), SAME(qkv), SAME(o_proj), SAME(dense), SAME(experts), SAME(router), SAME(draft);
}

static inline void assert_same_shape(const struct us_shape *a, const struct us_shape *b) {
  ck_assert_str_eq(a->name, b->name);
  SAME(type), SAME(layers), SAME(hidden), SAME(vocab), SAME(dense_inner), SAME(expert_inner), SAME(experts);
  SAME(top_k), SAME(norm_topk_prob), SAME(routed_scaling), SAME(norm_eps), SAME(value_scale),
      SAME(qkv_chunks);
  SAME(max_positions), SAME(stop_count);
  assert_same_attention(&a->full, &b->full);
  assert_same_attention(&a->swa, &b->swa);
  assert_same_precision(&a->precision, &b->precision);
  for (uint32_t l = 0; l < US_MAX_LAYERS; l++) SAME(swa_layer[l]), SAME(moe_layer[l]);
  for (uint32_t i = 0; i < US_MAX_STOP_IDS; i++) SAME(stop_ids[i]);
}

static inline void assert_same_draft_shape(const struct us_draft_shape *a, const struct us_draft_shape *b) {
  SAME(layers), SAME(hidden), SAME(vocab), SAME(head), SAME(inner), SAME(norm_eps), SAME(value_scale);
  SAME(block), SAME(mask_id), SAME(taps), SAME(target_layers), SAME(markov);
  assert_same_attention(&a->attention, &b->attention);
  for (uint32_t i = 0; i < US_MAX_TAPS; i++) SAME(tap_layer[i]);
}

#undef SAME

_Static_assert(sizeof(struct us_attention_shape) == 40, "compare the new field in assert_same_attention");
_Static_assert(sizeof(struct us_precision) == 32, "compare the new field in assert_same_precision");
_Static_assert(sizeof(struct us_shape) == 800, "compare the new field in assert_same_shape");
_Static_assert(sizeof(struct us_draft_shape) == 168, "compare the new field in assert_same_draft_shape");

#endif
