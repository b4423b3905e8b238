/* shape_print.c: a shape to the config.json that its checkpoint is published with. */
#include "base/json.h"
#include "model/config.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* An object being filled; `whole` until a member could not be added, for want of memory. */
struct object {
  json_t *json;
  bool whole;
};

static struct object new_object(void) {
  return (struct object){.json = json_object(), .whole = true};
}

/* What was made, if all of it was; else NULL. */
static json_t *finish(struct object *o) {
  if (o->whole) return o->json;
  json_decref(o->json);
  return NULL;
}

static void set(struct object *o, const char *key, json_t *value) {
  us_json_set(o->json, key, value, &o->whole);
}
static void set_int(struct object *o, const char *key, uint32_t value) {
  set(o, key, json_integer(value));
}
static void set_real(struct object *o, const char *key, double value) {
  set(o, key, json_real(value));
}
static void set_bool(struct object *o, const char *key, bool value) {
  set(o, key, json_boolean(value));
}
static void set_string(struct object *o, const char *key, const char *value) {
  set(o, key, json_string(value));
}

static void set_flags(struct object *o, const char *key, const uint8_t *values, uint32_t count) {
  json_t *array = json_array();
  for (uint32_t i = 0; i < count; i++) us_json_append(array, json_integer(values[i]), &o->whole);
  set(o, key, array);
}

static void set_choices(struct object *o, const char *key, const uint8_t *values, uint32_t count,
                        const char *zero, const char *one) {
  json_t *array = json_array();
  for (uint32_t i = 0; i < count; i++) us_json_append(array, json_string(values[i] ? one : zero), &o->whole);
  set(o, key, array);
}

/* Integral thetas print as integers, as published. */
static void set_theta(struct object *o, const char *key, double value) {
  bool whole = value == (double)(json_int_t)value;
  set(o, key, whole ? json_integer((json_int_t)value) : json_real(value));
}

static void print_attention(struct object *o, const struct us_shape *s) {
  const struct us_attention_shape *f = &s->full, *w = &s->swa;
  set_int(o, "num_attention_heads", f->q_heads);
  set_int(o, "num_key_value_heads", f->kv_heads);
  set_int(o, "head_dim", f->qk_dim);
  set_int(o, "v_head_dim", f->v_dim);
  set_theta(o, "rope_theta", f->rope_theta);
  set_bool(o, "add_full_attention_sink_bias", f->sink);
  set_int(o, "swa_num_attention_heads", w->q_heads);
  set_int(o, "swa_num_key_value_heads", w->kv_heads);
  set_int(o, "swa_head_dim", w->qk_dim);
  set_int(o, "swa_v_head_dim", w->v_dim);
  set_theta(o, "swa_rope_theta", w->rope_theta);
  set_bool(o, "add_swa_attention_sink_bias", w->sink);
  set_int(o, "sliding_window", w->window);
  set_int(o, "sliding_window_size", w->window);
  set_real(o, "partial_rotary_factor", us_config_rotary_factor(f->qk_dim, f->rotary_dim));
  set_bool(o, "attention_bias", false);
  set_real(o, "attention_value_scale", s->value_scale);
  set_string(o, "attention_projection_layout", s->qkv_chunks ? "fused_qkv" : "split");
}

static void print_mlp(struct object *o, const struct us_shape *s) {
  set_int(o, "intermediate_size", s->dense_inner);
  set_string(o, "hidden_act", "silu");
  set_int(o, "moe_intermediate_size", s->expert_inner);
  set_int(o, "n_routed_experts", s->experts);
  set(o, "n_shared_experts", json_null());
  set_int(o, "num_experts_per_tok", s->top_k);
  set_string(o, "scoring_func", "sigmoid");
  set_string(o, "topk_method", "noaux_tc");
  set_int(o, "n_group", 1);
  set_int(o, "topk_group", 1);
  set_bool(o, "norm_topk_prob", s->norm_topk_prob);
  set(o, "routed_scaling_factor", s->routed_scaling == 1 ? json_null() : json_real(s->routed_scaling));
}

/* --- precision --- */

US_PRINTF(3, 4) static void append(struct object *o, json_t *array, const char *format, ...) {
  va_list args;
  va_start(args, format);
  us_json_append(array, json_vsprintf(format, args), &o->whole);
  va_end(args);
}

/* Modules that are not quantized; `o` is what they will be a member of. */
static json_t *ignored_layers(struct object *o, const struct us_shape *s, enum us_format base) {
  static const char *const split[] = {"q_proj", "k_proj", "v_proj"}, *const mlp[] = {"gate_proj", "up_proj",
                                                                                     "down_proj"};
  const struct us_precision *p = &s->precision;
  json_t *list = json_array();
  for (uint32_t l = 0; l < s->layers; l++) {
    if (p->qkv == base && s->qkv_chunks) append(o, list, "model.layers.%u.self_attn.qkv_proj", l);
    for (int i = 0; i < 3 && p->qkv == base && !s->qkv_chunks; i++) {
      append(o, list, "model.layers.%u.self_attn.%s", l, split[i]);
    }
    if (p->o_proj == base) append(o, list, "model.layers.%u.self_attn.o_proj", l);
    for (int i = 0; i < 3 && p->dense == base && !s->moe_layer[l]; i++)
      append(o, list, "model.layers.%u.mlp.%s", l, mlp[i]);
    if (p->experts == base && s->moe_layer[l]) append(o, list, "model.layers.%u.mlp.experts", l);
  }
  if (p->o_proj == base) append(o, list, "model.decoder.self_attn.o_proj");
  return list;
}

static json_t *quantization_config(const struct us_shape *s, enum us_format base) {
  struct object q = new_object();
  set_string(&q, "quant_method", "fp8");
  set_string(&q, "fmt", "e4m3");
  set_string(&q, "activation_scheme", "dynamic");
  set(&q, "weight_block_size", json_pack("[i,i]", US_FP8_BLOCK, US_FP8_BLOCK));
  if (s->precision.experts == US_FORMAT_MXFP4) {
    set_string(&q, "store_dtype", "mxfp4");
    set_int(&q, "mxfp4_block_size", US_MXFP4_GROUP);
  }
  set(&q, "ignored_layers", ignored_layers(&q, s, base));
  return finish(&q);
}

static bool quantized(enum us_format format) {
  return format == US_FORMAT_FP8 || format == US_FORMAT_MXFP4;
}

/* What the published keys say when read back; a difference goes into the toolkit's own key. */
static bool says_it_all(struct object *o, const struct us_shape *s) {
  struct us_shape back;
  char *text = us_json_dump(o->json, JSON_REAL_PRECISION(17));
  enum us_status status = text ? us_shape_parse(text, strlen(text), s->name, &back, NULL) : US_ERR_MEMORY;
  free(text);
  if (status == US_ERR_MEMORY) o->whole = false;
  return status == US_OK && memcmp(&back.precision, &s->precision, sizeof back.precision) == 0;
}

static void print_precision(struct object *o, const struct us_shape *s) {
  const struct us_precision *p = &s->precision;
  enum us_format base = p->embed == US_FORMAT_F32 ? US_FORMAT_F32 : US_FORMAT_BF16;
  set_string(o, "torch_dtype", base == US_FORMAT_F32 ? "float32" : "bfloat16");
  set_string(o, "moe_router_dtype", p->router == US_FORMAT_BF16 ? "bfloat16" : "float32");
  if (quantized(p->qkv) || quantized(p->o_proj) || quantized(p->dense) || quantized(p->experts)) {
    set(o, "quantization_config", quantization_config(s, base));
  }
  if (says_it_all(o, s)) return;
  struct object own = new_object();
  set_string(&own, "embed", us_format_name(p->embed));
  set_string(&own, "head", us_format_name(p->head));
  set_string(&own, "qkv", us_format_name(p->qkv));
  set_string(&own, "o_proj", us_format_name(p->o_proj));
  set_string(&own, "dense", us_format_name(p->dense));
  set_string(&own, "experts", us_format_name(p->experts));
  set_string(&own, "router", us_format_name(p->router));
  set_string(&own, "draft", us_format_name(p->draft));
  set(o, "ultraspeed_precision", finish(&own));
}

/* --- the whole --- */

static void print_stop_ids(struct object *o, const struct us_shape *s) {
  if (s->stop_count == 1) {
    set_int(o, "eos_token_id", s->stop_ids[0]);
    return;
  }
  json_t *ids = json_array();
  for (uint32_t i = 0; i < s->stop_count; i++) us_json_append(ids, json_integer(s->stop_ids[i]), &o->whole);
  set(o, "eos_token_id", ids);
}

static json_t *rope_parameters(const struct us_attention_shape *a) {
  return json_pack("{s:s, s:f, s:f}", "rope_type", "default", "rope_theta", a->rope_theta,
                   "partial_rotary_factor", us_config_rotary_factor(a->qk_dim, a->rotary_dim));
}

/* The same facts in the keys that transformers 5 reads, so that it loads a mimo_v2_flash folder as it is. */
static void print_for_transformers(struct object *o, const struct us_shape *s) {
  set_choices(o, "layer_types", s->swa_layer, s->layers, "full_attention", "sliding_attention");
  set_choices(o, "mlp_layer_types", s->moe_layer, s->layers, "dense", "sparse");
  set(o, "rope_parameters",
      json_pack("{s:o, s:o}", "full_attention", rope_parameters(&s->full), "sliding_attention",
                rope_parameters(&s->swa)));
  set_real(o, "rms_norm_eps", s->norm_eps);
}

enum us_status us_shape_json(const struct us_shape *s, json_t **ret_root, struct us_err *err) {
  *ret_root = NULL;
  enum us_status status = us_shape_check(s, err);
  if (status != US_OK) return status;
  double factor = us_config_rotary_factor(s->full.qk_dim, s->full.rotary_dim);
  if (us_config_rotary_dim(s->swa.qk_dim, factor) != s->swa.rotary_dim) {
    return us_err_set(err, US_ERR_INPUT, "partial_rotary_factor: no one factor gives %u of %u and %u of %u",
                      s->full.rotary_dim, s->full.qk_dim, s->swa.rotary_dim, s->swa.qk_dim);
  }
  bool flash = s->type == US_MODEL_MIMO_V2_FLASH;
  struct object o = new_object();
  set_string(&o, "name", s->name);
  set(&o, "architectures", json_pack("[s]", flash ? "MiMoV2FlashForCausalLM" : "MiMoV2ForCausalLM"));
  set_string(&o, "model_type", flash ? "mimo_v2_flash" : "mimo_v2");
  set_int(&o, "vocab_size", s->vocab);
  set_int(&o, "hidden_size", s->hidden);
  set_int(&o, "num_hidden_layers", s->layers);
  set_flags(&o, "hybrid_layer_pattern", s->swa_layer, s->layers);
  set_flags(&o, "moe_layer_freq", s->moe_layer, s->layers);
  print_attention(&o, s);
  print_mlp(&o, s);
  set_real(&o, "layernorm_epsilon", s->norm_eps);
  set_int(&o, "max_position_embeddings", s->max_positions);
  if (flash) print_for_transformers(&o, s);
  print_stop_ids(&o, s);
  set_bool(&o, "tie_word_embeddings", false);
  print_precision(&o, s);
  *ret_root = finish(&o);
  return *ret_root ? US_OK : us_err_memory(err, "config.json", 0);
}

enum us_status us_shape_print(const struct us_shape *s, char **ret_json, struct us_err *err) {
  json_t *root = NULL;
  *ret_json = NULL;
  enum us_status status = us_shape_json(s, &root, err);
  return status == US_OK ? us_config_print(root, ret_json, err) : status;
}
