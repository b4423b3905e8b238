/* shape.c: checking shapes, and finding them by name. */
#include "model/shape.h"
#include "model/config.h"
#include "us_version.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Generous caps that keep every product below 2^63 and every list in memory. */
enum {
  MAX_HIDDEN = 1 << 16,
  MAX_INNER = 1 << 20,
  MAX_VOCAB = 1 << 22,
  MAX_HEADS = 1 << 12,
  MAX_HEAD_DIM = 1 << 11,
  MAX_EXPERTS = 1 << 13,
};

/* --- checks --- */

static enum us_status bad(struct us_err *err, const char *field, const char *problem) {
  return us_err_set(err, US_ERR_INPUT, "%s: %s", field, problem);
}

static enum us_status in_range(uint32_t value, uint32_t min, uint32_t max, const char *field,
                               struct us_err *err) {
  if (value >= min && value <= max) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s: %u is outside [%u, %u]", field, value, min, max);
}

static enum us_status multiple_of_32(uint32_t value, uint32_t max, const char *field, struct us_err *err) {
  if (value >= 32 && value <= max && value % US_MXFP4_GROUP == 0) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s: %u is not a multiple of 32 in [32, %u]", field, value, max);
}

static enum us_status positive(double value, const char *field, struct us_err *err) {
  if (isfinite(value) && value > 0) return US_OK;
  return us_err_set(err, US_ERR_INPUT, "%s: %g is not a positive number", field, value);
}

/* Field names of one kind of attention in the config, for messages. */
struct attention_fields {
  const char *q_heads, *kv_heads, *qk_dim, *v_dim, *rope_theta, *window;
};

static const struct attention_fields full_fields = {
    "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "rope_theta", "sliding_window"};
static const struct attention_fields swa_fields = {
    "swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim",
    "swa_v_head_dim",          "swa_rope_theta",          "sliding_window"};

static enum us_status check_attention(const struct us_attention_shape *a, const struct attention_fields *f,
                                      struct us_err *err) {
  enum us_status status = in_range(a->q_heads, 1, MAX_HEADS, f->q_heads, err);
  if (status == US_OK) status = in_range(a->kv_heads, 1, MAX_HEADS, f->kv_heads, err);
  if (status == US_OK) status = in_range(a->qk_dim, 2, MAX_HEAD_DIM, f->qk_dim, err);
  if (status == US_OK) status = in_range(a->v_dim, 1, MAX_HEAD_DIM, f->v_dim, err);
  if (status == US_OK) status = positive(a->rope_theta, f->rope_theta, err);
  if (status == US_OK) status = in_range(a->window, 0, 1u << 30, f->window, err);
  if (status != US_OK) return status;
  if (a->q_heads % a->kv_heads) {
    return us_err_set(err, US_ERR_INPUT, "%s: %u is not a multiple of %s %u", f->q_heads, a->q_heads,
                      f->kv_heads, a->kv_heads);
  }
  if (a->rotary_dim < 2 || a->rotary_dim > a->qk_dim || a->rotary_dim % 2) {
    return us_err_set(err, US_ERR_INPUT,
                      "partial_rotary_factor: %u rotary dimensions of %s %u are not even or not in range",
                      a->rotary_dim, f->qk_dim, a->qk_dim);
  }
  if ((uint64_t)a->q_heads * a->v_dim % US_MXFP4_GROUP) {
    return us_err_set(err, US_ERR_INPUT, "%s: %s * %s = %u is not a multiple of 32", f->v_dim, f->q_heads,
                      f->v_dim, a->q_heads * a->v_dim);
  }
  return US_OK;
}

static bool is_weight_format(enum us_format format) {
  return format > US_FORMAT_NONE && format < US_FORMAT_COUNT;
}

static enum us_status check_precision(const struct us_precision *p, struct us_err *err) {
  if (is_weight_format(p->embed) && is_weight_format(p->head) && is_weight_format(p->qkv) &&
      is_weight_format(p->o_proj) && is_weight_format(p->dense) && is_weight_format(p->experts) &&
      is_weight_format(p->router) && is_weight_format(p->draft)) {
    return US_OK;
  }
  return bad(err, "precision", "a family has no format");
}

static enum us_status check_chunks(const struct us_shape *s, struct us_err *err) {
  if (s->qkv_chunks == 0) return US_OK;
  if (s->qkv_chunks != s->full.kv_heads) {
    return us_err_set(err, US_ERR_INPUT,
                      "attention_projection_layout: %u chunks, but num_key_value_heads is %u", s->qkv_chunks,
                      s->full.kv_heads);
  }
  if (s->swa.kv_heads % s->qkv_chunks || s->swa.q_heads % s->qkv_chunks) {
    return us_err_set(err, US_ERR_INPUT, "swa_num_key_value_heads: %u heads cannot be cut into %u qkv chunks",
                      s->swa.kv_heads, s->qkv_chunks);
  }
  return US_OK;
}

static enum us_status check_layers(const struct us_shape *s, struct us_err *err) {
  bool dense = false, moe = false;
  for (uint32_t l = 0; l < s->layers; l++) {
    if (s->swa_layer[l] > 1) return bad(err, "hybrid_layer_pattern", "an entry is not 0 or 1");
    if (s->moe_layer[l] > 1) return bad(err, "moe_layer_freq", "an entry is not 0 or 1");
    if (s->moe_layer[l])
      moe = true;
    else
      dense = true;
  }
  enum us_status status = US_OK;
  if (dense) status = multiple_of_32(s->dense_inner, MAX_INNER, "intermediate_size", err);
  if (moe && status == US_OK)
    status = multiple_of_32(s->expert_inner, MAX_INNER, "moe_intermediate_size", err);
  if (moe && status == US_OK) status = in_range(s->experts, 1, MAX_EXPERTS, "n_routed_experts", err);
  if (moe && status == US_OK) status = in_range(s->top_k, 1, s->experts, "num_experts_per_tok", err);
  if (!moe && status == US_OK) status = in_range(s->experts, 0, MAX_EXPERTS, "n_routed_experts", err);
  return status;
}

enum us_status us_shape_check(const struct us_shape *s, struct us_err *err) {
  enum us_status status = in_range(s->layers, 1, US_MAX_LAYERS, "num_hidden_layers", err);
  if (status == US_OK) status = multiple_of_32(s->hidden, MAX_HIDDEN, "hidden_size", err);
  if (status == US_OK) status = in_range(s->vocab, 2, MAX_VOCAB, "vocab_size", err);
  if (status == US_OK) status = check_attention(&s->full, &full_fields, err);
  if (status == US_OK) status = check_attention(&s->swa, &swa_fields, err);
  if (status == US_OK) status = check_layers(s, err);
  if (status == US_OK) status = check_chunks(s, err);
  if (status == US_OK) status = positive(s->routed_scaling, "routed_scaling_factor", err);
  if (status == US_OK) status = positive(s->norm_eps, "layernorm_epsilon", err);
  if (status == US_OK) status = positive(s->value_scale, "attention_value_scale", err);
  if (status == US_OK) status = in_range(s->max_positions, 1, 1u << 30, "max_position_embeddings", err);
  if (status == US_OK) status = in_range(s->stop_count, 0, US_MAX_STOP_IDS, "eos_token_id", err);
  for (uint32_t i = 0; status == US_OK && i < s->stop_count; i++) {
    status = in_range(s->stop_ids[i], 0, s->vocab - 1, "eos_token_id", err);
  }
  if (status == US_OK && s->full.window)
    status = bad(err, "sliding_window", "full-attention layers have a window");
  if (status == US_OK && s->swa.window == 0) status = bad(err, "sliding_window", "SWA layers have no window");
  if (status == US_OK) status = check_precision(&s->precision, err);
  return status;
}

static enum us_status check_target(const struct us_draft_shape *d, const struct us_shape *t,
                                   struct us_err *err) {
  if (d->hidden != t->hidden) {
    return us_err_set(err, US_ERR_INPUT, "drafter hidden_size: %u, but the model's is %u", d->hidden,
                      t->hidden);
  }
  if (d->target_layers != t->layers) {
    return us_err_set(err, US_ERR_INPUT, "drafter num_target_layers: %u, but the model has %u layers",
                      d->target_layers, t->layers);
  }
  /* The published Pro drafter says 152064 of 152576: without a vocabulary tensor only its mask id must exist. */
  if (d->mask_id >= t->vocab) {
    return us_err_set(err, US_ERR_INPUT, "drafter mask_token_id: %u is not in the model's vocabulary of %u",
                      d->mask_id, t->vocab);
  }
  if (d->head != US_FORMAT_NONE && d->vocab != t->vocab) {
    return us_err_set(
        err, US_ERR_INPUT,
        "drafter vocab_size: %u, but the model's is %u, and the drafter has an output head of its own",
        d->vocab, t->vocab);
  }
  return US_OK;
}

static enum us_status check_taps(const struct us_draft_shape *d, struct us_err *err) {
  enum us_status status = in_range(d->taps, 1, US_MAX_TAPS, "dflash_config.target_layer_ids", err);
  for (uint32_t i = 0; status == US_OK && i < d->taps; i++) {
    if (d->tap_layer[i] >= d->target_layers) {
      return us_err_set(err, US_ERR_INPUT, "dflash_config.target_layer_ids: layer %u of %u", d->tap_layer[i],
                        d->target_layers);
    }
    if (i && d->tap_layer[i] <= d->tap_layer[i - 1]) {
      return bad(err, "dflash_config.target_layer_ids", "not ascending");
    }
  }
  return status;
}

enum us_status us_draft_shape_check(const struct us_draft_shape *d, const struct us_shape *target,
                                    struct us_err *err) {
  enum us_status status = in_range(d->layers, 1, US_MAX_DRAFT_LAYERS, "num_hidden_layers", err);
  if (status == US_OK) status = multiple_of_32(d->hidden, MAX_HIDDEN, "hidden_size", err);
  if (status == US_OK) status = multiple_of_32(d->inner, MAX_INNER, "intermediate_size", err);
  if (status == US_OK) status = in_range(d->vocab, 2, MAX_VOCAB, "vocab_size", err);
  if (status == US_OK) status = check_attention(&d->attention, &full_fields, err);
  if (status == US_OK && d->attention.window == 0)
    status = bad(err, "sliding_window", "the drafter has no window");
  if (status == US_OK) status = positive(d->norm_eps, "rms_norm_eps", err);
  if (status == US_OK) status = positive(d->value_scale, "dflash_config.attention_value_scale", err);
  if (status == US_OK) status = in_range(d->block, 2, US_MAX_BLOCK, "dflash_config.block_size", err);
  if (status == US_OK) status = in_range(d->mask_id, 0, MAX_VOCAB - 1, "dflash_config.mask_token_id", err);
  if (status == US_OK) status = in_range(d->target_layers, 1, US_MAX_LAYERS, "num_target_layers", err);
  if (status == US_OK && d->markov)
    status = multiple_of_32(d->markov, d->hidden, "dflash_config.markov_rank", err);
  if (status == US_OK) status = check_taps(d, err);
  if (status == US_OK && target) status = check_target(d, target, err);
  return status;
}

/* --- loading --- */

/* The file that a name or path means. */
static enum us_status find_file(const char *name_or_path, char *path, size_t bytes, struct us_err *err) {
  struct stat st;
  if (stat(name_or_path, &st) == 0) {
    snprintf(path, bytes, "%s%s", name_or_path, S_ISDIR(st.st_mode) ? "/config.json" : "");
    return US_OK;
  }
  if (strchr(name_or_path, '/')) return us_err_errno(err, US_ERR_IO, "cannot open '%s'", name_or_path);
  const char *data = getenv("ULTRASPEED_DATA");
  snprintf(path, bytes, "%s/shapes/%s.json", data && *data ? data : US_DATA_DIR, name_or_path);
  if (stat(path, &st) == 0) return US_OK;
  return us_err_set(err, US_ERR_USAGE, "no shape '%s': neither a file nor in %s", name_or_path,
                    data && *data ? "$ULTRASPEED_DATA/shapes" : US_DATA_DIR "/shapes");
}

/* A config, whose path is put into `path` (4096 bytes). */
static enum us_status load_config(const char *name_or_path, char *path, json_t **ret_config,
                                  struct us_err *err) {
  enum us_status status = find_file(name_or_path, path, 4096, err);
  size_t n = status == US_OK ? strlen(path) : 0;
  if (n > 3 && strcmp(path + n - 3, ".h5") == 0)
    return us_err_set(err, US_ERR_INPUT,
                      "%s: a checkpoint where a shape is expected: a name, a config.json or a folder", path);
  return status == US_OK ? us_config_load(path, ret_config, err) : status;
}

enum us_status us_shape_load(const char *name_or_path, struct us_shape *ret_shape, struct us_err *err) {
  char path[4096];
  json_t *config = NULL;
  enum us_status status = load_config(name_or_path, path, &config, err);
  if (status == US_OK) status = us_shape_read(config, path, ret_shape, err);
  json_decref(config);
  return status;
}

enum us_status us_draft_shape_load(const char *name_or_path, struct us_draft_shape *ret_draft,
                                   struct us_err *err) {
  char path[4096];
  json_t *config = NULL;
  enum us_status status = load_config(name_or_path, path, &config, err);
  if (status == US_OK) status = us_draft_shape_read(config, path, ret_draft, err);
  json_decref(config);
  return status;
}
