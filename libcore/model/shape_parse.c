/* shape_parse.c: a MiMo-V2 config.json to a shape.
 *
 * Keys are those of the published files. The form that transformers 5 saves is read too: layer_types and mlp_layer_types
 * for the patterns, rope_parameters for theta and partial rotation, rms_norm_eps; and model type mimo_v2_flash may leave
 * out what its configuration class fixes (SWA layers have twice the KV heads, sinks on SWA layers).
 */
#include "model/config.h"

#include <stdio.h>
#include <string.h>

/* Caps of what a field may hold before us_shape_check relates the fields to each other. */
#define MANY (1u << 24)

/* --- rotation --- */

static struct us_config rope_config(struct us_config *c, const char *kind) {
  const json_t *parameters = us_config_get(c, "rope_parameters");
  const json_t *of_kind = json_object_get(parameters, kind);
  return (struct us_config){.root = of_kind ? of_kind : parameters,
                            .name = c->name,
                            .prefix = "rope_parameters.",
                            .err = c->err,
                            .status = c->status};
}

/* Theta and rotary dimensions of one kind of layer. def_theta 0: theta must be there. */
static void parse_rotation(struct us_config *c, const char *kind, const char *theta_key, double def_theta,
                           struct us_attention_shape *a) {
  double factor = us_config_real_or(c, "partial_rotary_factor", 1, 0, 1);
  bool published = us_config_get(c, theta_key) != NULL;
  if (published) a->rope_theta = us_config_real(c, theta_key, 1, 1e12);
  if (us_config_get(c, "rope_parameters")) {
    struct us_config rope = rope_config(c, kind);
    us_config_expect_string(&rope, "rope_type", "default");
    double theta = us_config_real(&rope, "rope_theta", 1, 1e12);
    if (published && theta != a->rope_theta)
      us_config_fail(&rope, "rope_theta", "differs from %s", theta_key);
    a->rope_theta = theta;
    factor = us_config_real_or(&rope, "partial_rotary_factor", factor, 0, 1);
    if (c->status == US_OK) c->status = rope.status;
  } else if (!published && def_theta > 0) {
    a->rope_theta = def_theta;
  } else if (!published) {
    us_config_fail(c, theta_key, "missing");
  }
  a->rotary_dim = us_config_rotary_dim(a->qk_dim, factor);
}

static void expect_no_rope_scaling(struct us_config *c) {
  const json_t *scaling = us_config_get(c, "rope_scaling");
  if (!scaling) return;
  const char *type = json_string_value(json_object_get(scaling, "rope_type"));
  if (!type) type = json_string_value(json_object_get(scaling, "type"));
  if (!type || strcmp(type, "default") != 0) us_config_fail(c, "rope_scaling", "is not supported");
}

/* --- attention --- */

static void parse_full(struct us_config *c, struct us_attention_shape *a) {
  a->q_heads = us_config_u32(c, "num_attention_heads", 1, MANY);
  a->kv_heads = us_config_u32(c, "num_key_value_heads", 1, MANY);
  a->qk_dim = us_config_u32(c, "head_dim", 1, MANY);
  a->v_dim = us_config_u32_or(c, "v_head_dim", a->qk_dim, 1, MANY);
  a->sink = us_config_bool_or(c, "add_full_attention_sink_bias", false);
  parse_rotation(c, "full_attention", "rope_theta", 0, a);
}

static void parse_swa(struct us_config *c, bool flash, bool any, const struct us_attention_shape *full,
                      struct us_attention_shape *a) {
  a->q_heads = us_config_u32_or(c, "swa_num_attention_heads", full->q_heads, 1, MANY);
  if (any && !flash) {
    a->kv_heads = us_config_u32(c, "swa_num_key_value_heads", 1, MANY);
  } else {
    uint32_t def = any ? 2 * full->kv_heads : full->kv_heads;
    a->kv_heads = us_config_u32_or(c, "swa_num_key_value_heads", def, 1, MANY);
  }
  a->qk_dim = us_config_u32_or(c, "swa_head_dim", full->qk_dim, 1, MANY);
  a->v_dim = us_config_u32_or(c, "swa_v_head_dim", full->v_dim, 1, MANY);
  uint32_t window = us_config_u32_or(c, "sliding_window_size", any ? 0 : 1, 1, 1u << 30);
  a->window = us_config_u32_or(c, "sliding_window", window, 1, 1u << 30);
  if (a->window == 0) us_config_fail(c, "sliding_window", "missing");
  if (window && a->window != window) us_config_fail(c, "sliding_window", "differs from sliding_window_size");
  a->sink = any && !flash ? us_config_bool(c, "add_swa_attention_sink_bias")
                          : us_config_bool_or(c, "add_swa_attention_sink_bias", flash);
  parse_rotation(c, "sliding_attention", "swa_rope_theta", any && !flash ? 0 : full->rope_theta, a);
}

static void parse_attention(struct us_config *c, bool flash, struct us_shape *s) {
  bool any = memchr(s->swa_layer, 1, s->layers) != NULL;
  expect_no_rope_scaling(c);
  us_config_expect_false(c, "attention_bias");
  parse_full(c, &s->full);
  parse_swa(c, flash, any, &s->full, &s->swa);
  s->value_scale = us_config_real_or(c, "attention_value_scale", flash ? 0.707 : 1, 1e-6, 1e6);
  const char *layout = us_config_string_or(c, "attention_projection_layout", flash ? "split" : "fused_qkv");
  if (strcmp(layout, "fused_qkv") == 0)
    s->qkv_chunks = s->full.kv_heads;
  else if (strcmp(layout, "split") != 0) {
    us_config_fail(c, "attention_projection_layout", "'%.64s' is neither 'fused_qkv' nor 'split'", layout);
  }
}

/* --- layers --- */

/* A pattern of 0 and 1 under its published key, as words under transformers' key, or both if they agree. */
static void parse_pattern(struct us_config *c, const char *flags_key, const char *words_key, const char *zero,
                          const char *one, uint32_t layers, uint8_t *ret_flags) {
  if (!us_config_get(c, words_key)) {
    us_config_flags(c, flags_key, layers, ret_flags);
    return;
  }
  us_config_choices(c, words_key, layers, zero, one, ret_flags);
  if (!us_config_get(c, flags_key) || c->status != US_OK) return;
  uint8_t flags[US_MAX_LAYERS] = {0};
  us_config_flags(c, flags_key, layers, flags);
  if (memcmp(flags, ret_flags, layers) != 0) us_config_fail(c, words_key, "differs from %s", flags_key);
}

static void parse_patterns(struct us_config *c, struct us_shape *s) {
  parse_pattern(c, "hybrid_layer_pattern", "layer_types", "full_attention", "sliding_attention", s->layers,
                s->swa_layer);
  parse_pattern(c, "moe_layer_freq", "mlp_layer_types", "dense", "sparse", s->layers, s->moe_layer);
}

static void parse_mlp(struct us_config *c, struct us_shape *s) {
  bool dense = memchr(s->moe_layer, 0, s->layers) != NULL, moe = memchr(s->moe_layer, 1, s->layers) != NULL;
  s->dense_inner = dense ? us_config_u32(c, "intermediate_size", 1, MANY)
                         : us_config_u32_or(c, "intermediate_size", 0, 0, MANY);
  us_config_expect_string(c, "hidden_act", "silu");
  us_config_expect_u32(c, "n_shared_experts", 0);
  if (moe) {
    s->expert_inner = us_config_u32(c, "moe_intermediate_size", 1, MANY);
    s->experts = us_config_u32(c, "n_routed_experts", 1, MANY);
    s->top_k = us_config_u32(c, "num_experts_per_tok", 1, MANY);
    s->norm_topk_prob = us_config_bool_or(c, "norm_topk_prob", true);
    us_config_expect_string(c, "scoring_func", "sigmoid");
    us_config_expect_string(c, "topk_method", "noaux_tc");
    us_config_expect_u32(c, "n_group", 1);
    us_config_expect_u32(c, "topk_group", 1);
  }
  s->routed_scaling = us_config_real_or(c, "routed_scaling_factor", 1, 1e-6, 1e6);
}

/* --- precision --- */

static enum us_format dtype(struct us_config *c, const char *key, enum us_format def) {
  const char *text = us_config_string_or(c, key, NULL);
  if (!text) return def;
  if (strcmp(text, "bfloat16") == 0) return US_FORMAT_BF16;
  if (strcmp(text, "float32") == 0) return US_FORMAT_F32;
  us_config_fail(c, key, "'%.64s' is neither 'bfloat16' nor 'float32'", text);
  return def;
}

static void parse_block_size(struct us_config *q) {
  const json_t *size = us_config_get(q, "weight_block_size");
  if (size && !(json_array_size(size) == 2 && json_integer_value(json_array_get(size, 0)) == US_FP8_BLOCK &&
                json_integer_value(json_array_get(size, 1)) == US_FP8_BLOCK)) {
    us_config_fail(q, "weight_block_size", "only [128, 128] is supported");
  }
}

/* Modules that quantization left alone; a family is taken to be what one of its modules is. */
static void parse_ignored(struct us_config *q, enum us_format base, struct us_precision *p) {
  const json_t *list = us_config_get(q, "ignored_layers");
  if (!list) return;
  if (!json_is_array(list)) {
    us_config_fail(q, "ignored_layers", "expected an array of module names");
    return;
  }
  size_t i;
  const json_t *entry;
  json_array_foreach(list, i, entry) {
    const char *module = json_string_value(entry);
    if (!module) {
      us_config_fail(q, "ignored_layers", "entry %zu is not a string", i);
      return;
    }
    if (strstr(module, "o_proj"))
      p->o_proj = base;
    else if (strstr(module, "qkv_proj") || strstr(module, "q_proj"))
      p->qkv = base;
    else if (strstr(module, "mlp.experts"))
      p->experts = base;
    else if (strstr(module, "mlp.gate_proj") || strstr(module, "mlp.down_proj"))
      p->dense = base;
  }
}

static void parse_quantization(struct us_config *c, enum us_format base, struct us_precision *p) {
  const json_t *config = us_config_get(c, "quantization_config");
  if (!config) return;
  if (!json_is_object(config)) {
    us_config_fail(c, "quantization_config", "expected an object");
    return;
  }
  struct us_config q = {
      .root = config, .name = c->name, .prefix = "quantization_config.", .err = c->err, .status = c->status};
  us_config_expect_string(&q, "quant_method", "fp8");
  us_config_expect_string(&q, "fmt", "e4m3");
  parse_block_size(&q);
  p->qkv = p->o_proj = p->dense = p->experts = US_FORMAT_FP8;
  if (us_config_get(&q, "store_dtype")) {
    us_config_expect_string(&q, "store_dtype", "mxfp4");
    us_config_expect_u32(&q, "mxfp4_block_size", US_MXFP4_GROUP);
    p->experts = US_FORMAT_MXFP4;
  }
  parse_ignored(&q, base, p);
  c->status = q.status;
}

/* The toolkit's own key, for what the published ones cannot say (an FP8 head, say). */
static void parse_families(struct us_config *c, struct us_precision *p) {
  const json_t *config = us_config_get(c, "ultraspeed_precision");
  if (!config) return;
  struct us_config f = {
      .root = config, .name = c->name, .prefix = "ultraspeed_precision.", .err = c->err, .status = c->status};
  struct {
    const char *key;
    enum us_format *format;
  } families[] = {{"embed", &p->embed},   {"head", &p->head},   {"qkv", &p->qkv},
                  {"o_proj", &p->o_proj}, {"dense", &p->dense}, {"experts", &p->experts},
                  {"router", &p->router}, {"draft", &p->draft}};
  for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
    const char *text = us_config_string_or(&f, families[i].key, NULL);
    if (!text) continue;
    enum us_format format = us_format_parse(text);
    if (format == US_FORMAT_NONE)
      us_config_fail(&f, families[i].key, "'%.64s' is not a format", text);
    else
      *families[i].format = format;
  }
  c->status = f.status;
}

static void parse_precision(struct us_config *c, struct us_precision *p) {
  enum us_format base = dtype(c, "torch_dtype", dtype(c, "dtype", US_FORMAT_BF16));
  *p = (struct us_precision){base, base, base, base, base, base, US_FORMAT_F32, US_FORMAT_BF16};
  p->router = dtype(c, "moe_router_dtype", US_FORMAT_F32);
  parse_quantization(c, base, p);
  parse_families(c, p);
}

/* --- the whole --- */

/* The "name" key, else the file's own name, or its folder's if the file is a config.json. Names end up in messages, tables
 * and JSON: anything but printable ASCII becomes '_'. */
static void parse_name(struct us_config *c, char *name, size_t size) {
  const char *given = us_config_string_or(c, "name", NULL);
  if (given) {
    snprintf(name, size, "%s", given);
  } else {
    size_t end = strlen(c->name);
    const char *suffixes[] = {"/config.json", ".json", "/"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
      size_t n = strlen(suffixes[i]);
      if (end > n && strncmp(c->name + end - n, suffixes[i], n) == 0) end -= n;
    }
    size_t begin = end;
    while (begin && c->name[begin - 1] != '/') begin--;
    snprintf(name, size, "%.*s", (int)(end - begin), c->name + begin);
  }
  for (char *at = name; *at; at++) {
    if (*at < ' ' || *at > '~') *at = '_';
  }
}

static enum us_model_type parse_type(struct us_config *c) {
  const char *type = us_config_string_or(c, "model_type", NULL);
  if (!type)
    us_config_fail(c, "model_type", "missing");
  else if (strcmp(type, "mimo_v2_flash") == 0)
    return US_MODEL_MIMO_V2_FLASH;
  else if (strcmp(type, "mimo_v2") != 0) {
    us_config_fail(c, "model_type", "'%.64s' is neither 'mimo_v2' nor 'mimo_v2_flash'", type);
  }
  return US_MODEL_MIMO_V2;
}

static void parse_shape(struct us_config *c, struct us_shape *s) {
  parse_name(c, s->name, sizeof s->name);
  s->type = parse_type(c);
  s->layers = us_config_u32(c, "num_hidden_layers", 1, US_MAX_LAYERS);
  s->hidden = us_config_u32(c, "hidden_size", 1, MANY);
  s->vocab = us_config_u32(c, "vocab_size", 1, MANY);
  s->max_positions = us_config_u32(c, "max_position_embeddings", 1, 1u << 30);
  const char *eps = us_config_get(c, "layernorm_epsilon") ? "layernorm_epsilon" : "rms_norm_eps";
  s->norm_eps = us_config_real(c, us_config_get(c, eps) ? eps : "layernorm_epsilon", 1e-12, 1);
  if (us_config_real_or(c, "rms_norm_eps", s->norm_eps, 1e-12, 1) != s->norm_eps) {
    us_config_fail(c, "rms_norm_eps", "differs from layernorm_epsilon");
  }
  us_config_expect_false(c, "tie_word_embeddings");
  s->stop_count = us_config_ids(c, "eos_token_id", US_MAX_STOP_IDS, MANY, s->stop_ids);
  parse_patterns(c, s);
  if (c->status == US_OK) parse_attention(c, s->type == US_MODEL_MIMO_V2_FLASH, s);
  if (c->status == US_OK) parse_mlp(c, s);
  parse_precision(c, &s->precision);
}

enum us_status us_shape_read(const json_t *config, const char *name, struct us_shape *ret_shape,
                             struct us_err *err) {
  struct us_config c = {.root = config, .name = name, .err = err};
  memset(ret_shape, 0, sizeof *ret_shape);
  parse_shape(&c, ret_shape);
  if (c.status != US_OK) return c.status;
  enum us_status status = us_shape_check(ret_shape, err);
  if (status != US_OK) us_err_prefix(err, "%s", name);
  return status;
}

enum us_status us_shape_parse(const char *json, size_t bytes, const char *name, struct us_shape *ret_shape,
                              struct us_err *err) {
  json_t *root = NULL;
  enum us_status status = us_config_parse(json, bytes, name, &root, err);
  if (status == US_OK) status = us_shape_read(root, name, ret_shape, err);
  json_decref(root);
  return status;
}
