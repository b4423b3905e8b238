/* shape_draft.c: the drafter's config.json, parsed and printed.
 *
 * Published keys (MiMo-V2.5-Pro-FP4-DFlash, dflash/config.json): the geometry at the top level, the drafting in
 * dflash_config. The drafter rotates with rope_theta; dflash_config.backbone_rotary_base is the target's theta at
 * training time and not used (the engines with good acceptance agree). The stale vocab_size is kept as it is.
 */
#include "base/json.h"
#include "model/config.h"

#include <string.h>

#define MANY (1u << 24)

static void parse_attention(struct us_config *c, struct us_config *d, struct us_draft_shape *s) {
  struct us_attention_shape *a = &s->attention;
  a->q_heads = us_config_u32(c, "num_attention_heads", 1, MANY);
  a->kv_heads = us_config_u32(c, "num_key_value_heads", 1, MANY);
  a->qk_dim = us_config_u32(c, "head_dim", 1, MANY);
  a->v_dim = us_config_u32_or(c, "v_head_dim", a->qk_dim, 1, MANY);
  a->rope_theta = us_config_real(c, "rope_theta", 1, 1e12);
  a->rotary_dim = us_config_rotary_dim(a->qk_dim, us_config_real_or(c, "partial_rotary_factor", 1, 0, 1));
  if (!us_config_bool_or(d, "use_swa", true)) us_config_fail(d, "use_swa", "false is not supported");
  uint32_t window = us_config_u32_or(d, "swa_window_size", 0, 1, 1u << 30);
  a->window = window ? us_config_u32_or(c, "sliding_window", window, 1, 1u << 30)
                     : us_config_u32(c, "sliding_window", 1, 1u << 30);
  if (window && a->window != window) us_config_fail(d, "swa_window_size", "differs from sliding_window");
  a->sink = us_config_bool_or(d, "attention_sink_bias", false);
  us_config_expect_false(c, "attention_bias");
  us_config_expect_false(c, "is_causal");
}

/* The format of the drafter's own output head; without the key the target's is used. */
static enum us_format parse_head(struct us_config *d) {
  if (!us_config_get(d, "own_head")) return US_FORMAT_NONE;
  const char *text = us_config_string_or(d, "own_head", NULL);
  enum us_format format = text ? us_format_parse(text) : US_FORMAT_NONE;
  if (text && format == US_FORMAT_NONE)
    us_config_fail(d, "own_head", "'%.32s' is not a format (bf16, fp8, mxfp4, f32)", text);
  return format;
}

static void parse_draft(struct us_config *c, struct us_config *d, struct us_draft_shape *s) {
  s->layers = us_config_u32(c, "num_hidden_layers", 1, US_MAX_DRAFT_LAYERS);
  s->hidden = us_config_u32(c, "hidden_size", 1, MANY);
  s->vocab = us_config_u32(c, "vocab_size", 1, MANY);
  s->inner = us_config_u32(c, "intermediate_size", 1, MANY);
  s->norm_eps = us_config_real(c, "rms_norm_eps", 1e-12, 1);
  s->target_layers = us_config_u32(c, "num_target_layers", 1, US_MAX_LAYERS);
  us_config_expect_string(c, "hidden_act", "silu");
  us_config_expect_false(c, "tie_word_embeddings");
  parse_attention(c, d, s);
  if (!d->root) us_config_fail(c, "dflash_config", "missing or not an object");
  s->value_scale = us_config_real_or(d, "attention_value_scale", 1, 1e-6, 1e6);
  uint32_t outer = us_config_u32_or(c, "block_size", 0, 2, US_MAX_BLOCK);
  s->block = outer ? us_config_u32_or(d, "block_size", outer, 2, US_MAX_BLOCK)
                   : us_config_u32(d, "block_size", 2, US_MAX_BLOCK);
  if (outer && s->block != outer) us_config_fail(d, "block_size", "differs from the outer block_size");
  s->mask_id = us_config_u32(d, "mask_token_id", 0, MANY);
  if (!us_config_get(d, "target_layer_ids")) us_config_fail(d, "target_layer_ids", "missing");
  s->head = parse_head(d);
  s->markov = us_config_u32_or(d, "markov_rank", 0, 0, MANY);
  s->taps = us_config_ids(d, "target_layer_ids", US_MAX_TAPS, US_MAX_LAYERS - 1, s->tap_layer);
}

enum us_status us_draft_shape_read(const json_t *config, const char *name, struct us_draft_shape *ret_draft,
                                   struct us_err *err) {
  struct us_err outer = {0}, nested = {0}; /* each keeps its first problem */
  memset(ret_draft, 0, sizeof *ret_draft);
  const json_t *inner = json_object_get(config, "dflash_config");
  struct us_config c = {.root = config, .name = name, .err = &outer};
  struct us_config d = {
      .root = json_is_object(inner) ? inner : NULL, .name = name, .prefix = "dflash_config.", .err = &nested};
  if (!d.root)
    us_config_fail(&c, "dflash_config", "missing or not an object");
  else
    parse_draft(&c, &d, ret_draft);
  enum us_status status = c.status != US_OK ? c.status : d.status;
  if (status != US_OK) us_err_set(err, status, "%s", c.status != US_OK ? outer.message : nested.message);
  if (status == US_OK) {
    status = us_draft_shape_check(ret_draft, NULL, err);
    if (status != US_OK) us_err_prefix(err, "%s", name);
  }
  return status;
}

enum us_status us_draft_shape_parse(const char *json, size_t bytes, const char *name,
                                    struct us_draft_shape *ret_draft, struct us_err *err) {
  json_t *root = NULL;
  enum us_status status = us_config_parse(json, bytes, name, &root, err);
  if (status == US_OK) status = us_draft_shape_read(root, name, ret_draft, err);
  json_decref(root);
  return status;
}

static json_t *print_dflash(const struct us_draft_shape *s) {
  json_t *taps = json_array();
  bool whole = true;
  for (uint32_t i = 0; i < s->taps; i++) us_json_append(taps, json_integer(s->tap_layer[i]), &whole);
  json_t *o = json_pack("{s:o, s:i, s:i, s:b, s:i, s:f, s:b}", "target_layer_ids", taps, "mask_token_id",
                        (int)s->mask_id, "block_size", (int)s->block, "use_swa", 1, "swa_window_size",
                        (int)s->attention.window, "attention_value_scale", s->value_scale,
                        "attention_sink_bias", (int)s->attention.sink);
  if (s->head != US_FORMAT_NONE) us_json_set(o, "own_head", json_string(us_format_name(s->head)), &whole);
  if (s->markov) us_json_set(o, "markov_rank", json_integer(s->markov), &whole);
  if (whole) return o;
  json_decref(o);
  return NULL;
}

enum us_status us_draft_shape_json(const struct us_draft_shape *s, json_t **ret_root, struct us_err *err) {
  *ret_root = NULL;
  enum us_status status = us_draft_shape_check(s, NULL, err);
  if (status != US_OK) return status;
  const struct us_attention_shape *a = &s->attention;
  json_t *o =
      json_pack("{s:[s], s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:i, s:o}", "architectures",
                "DFlashDraftModel", "model_type", "qwen3", "hidden_size", (int)s->hidden, "intermediate_size",
                (int)s->inner, "num_hidden_layers", (int)s->layers, "num_attention_heads", (int)a->q_heads,
                "num_key_value_heads", (int)a->kv_heads, "head_dim", (int)a->qk_dim, "v_head_dim",
                (int)a->v_dim, "partial_rotary_factor", us_config_rotary_factor(a->qk_dim, a->rotary_dim),
                "block_size", (int)s->block, "dflash_config", print_dflash(s));
  if (!o) return us_err_memory(err, "drafter config.json", 0);
  json_t *rest =
      json_pack("{s:i, s:i, s:f, s:i, s:f, s:s, s:s, s:b, s:b, s:b}", "num_target_layers",
                (int)s->target_layers, "vocab_size", (int)s->vocab, "rope_theta", a->rope_theta,
                "sliding_window", (int)a->window, "rms_norm_eps", s->norm_eps, "torch_dtype", "bfloat16",
                "hidden_act", "silu", "attention_bias", 0, "is_causal", 0, "tie_word_embeddings", 0);
  if (!rest || json_object_update(o, rest) != 0) {
    json_decref(rest);
    json_decref(o);
    return us_err_memory(err, "drafter config.json", 0);
  }
  json_decref(rest);
  *ret_root = o;
  return US_OK;
}

enum us_status us_draft_shape_print(const struct us_draft_shape *s, char **ret_json, struct us_err *err) {
  json_t *root = NULL;
  *ret_json = NULL;
  enum us_status status = us_draft_shape_json(s, &root, err);
  return status == US_OK ? us_config_print(root, ret_json, err) : status;
}
