/* shape_share.c: the shape of what one of several ranks holds. */
#include "model/shape_share.h"

#include <stdio.h>

/* *field / parts, if that is whole. */
static enum us_status divide(uint32_t *field, uint32_t parts, const char *name, struct us_err *err) {
  if (*field % parts)
    return us_err_set(err, US_ERR_INPUT, "%s: %u cannot be cut into %u equal parts", name, *field, parts);
  *field /= parts;
  return US_OK;
}

static enum us_status divide_heads(struct us_attention_shape *a, uint32_t parts, const char *prefix,
                                   struct us_err *err) {
  char name[48];
  snprintf(name, sizeof name, "%snum_key_value_heads", prefix);
  enum us_status status = divide(&a->kv_heads, parts, name, err);
  snprintf(name, sizeof name, "%snum_attention_heads", prefix);
  return status == US_OK ? divide(&a->q_heads, parts, name, err) : status;
}

/* Ids beyond the share's vocabulary name nothing there. */
static void keep_stop_ids(struct us_shape *s) {
  uint32_t kept = 0;
  for (uint32_t i = 0; i < s->stop_count; i++)
    if (s->stop_ids[i] < s->vocab) s->stop_ids[kept++] = s->stop_ids[i];
  s->stop_count = kept;
}

enum us_status us_shape_share(struct us_shape *shape, uint32_t parts, struct us_err *err) {
  struct us_shape s = *shape;
  if (parts == 0) return us_err_set(err, US_ERR_USAGE, "a shape is cut into at least one part");
  enum us_status status = divide_heads(&s.full, parts, "", err);
  if (status == US_OK) status = divide_heads(&s.swa, parts, "swa_", err);
  if (status == US_OK) status = divide(&s.dense_inner, parts, "intermediate_size", err);
  if (status == US_OK) status = divide(&s.expert_inner, parts, "moe_intermediate_size", err);
  if (status != US_OK) return status;
  s.qkv_chunks = s.qkv_chunks ? s.full.kv_heads : 0;
  s.vocab = (s.vocab + parts - 1) / parts;
  keep_stop_ids(&s);
  status = us_shape_check(&s, err);
  if (status == US_OK) *shape = s;
  return status;
}

enum us_status us_draft_shape_share(struct us_draft_shape *draft, const struct us_shape *target_share,
                                    uint32_t parts, struct us_err *err) {
  struct us_draft_shape d = *draft;
  if (parts == 0) return us_err_set(err, US_ERR_USAGE, "a shape is cut into at least one part");
  enum us_status status = divide_heads(&d.attention, parts, "", err);
  if (status == US_OK) status = divide(&d.inner, parts, "intermediate_size", err);
  if (status != US_OK) return status;
  d.vocab = target_share->vocab;
  if (d.mask_id >= d.vocab) d.mask_id = d.vocab - 1;
  status = us_draft_shape_check(&d, target_share, err);
  if (status == US_OK) *draft = d;
  return status;
}
