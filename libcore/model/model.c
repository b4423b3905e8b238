/* model.c: empty models and drafters of a shape, and the published names of their tensors. */
#include "model/model.h"
#include "model/owner.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- creation --- */

static struct us_matrix empty(size_t rows, size_t cols) {
  return (struct us_matrix){.rows = rows, .cols = cols};
}

static enum us_status new_vector(void *owner, size_t n, float **ret_vector, struct us_err *err) {
  void *memory = NULL;
  enum us_status status = us_owner_alloc(owner, n * sizeof(float), &memory, err);
  *ret_vector = memory;
  return status;
}

static enum us_status init_mlp(const struct us_shape *s, uint32_t l, void *owner, struct us_layer *layer,
                               struct us_err *err) {
  if (!s->moe_layer[l]) {
    layer->gate = layer->up = empty(s->dense_inner, s->hidden);
    layer->down = empty(s->hidden, s->dense_inner);
    return US_OK;
  }
  void *experts = NULL;
  enum us_status status = us_owner_alloc(owner, s->experts * sizeof *layer->experts, &experts, err);
  if (status != US_OK) return status;
  layer->experts = experts;
  for (uint32_t e = 0; e < s->experts; e++) {
    layer->experts[e].gate = layer->experts[e].up = empty(s->expert_inner, s->hidden);
    layer->experts[e].down = empty(s->hidden, s->expert_inner);
  }
  layer->router = empty(s->experts, s->hidden);
  return new_vector(owner, s->experts, &layer->router_bias, err);
}

static enum us_status init_layer(const struct us_shape *s, uint32_t l, void *owner, struct us_layer *layer,
                                 struct us_err *err) {
  const struct us_attention_shape *a = us_shape_attention(s, l);
  if (s->qkv_chunks) {
    layer->qkv = empty(us_attention_qkv_rows(a), s->hidden);
  } else {
    layer->q = empty((size_t)a->q_heads * a->qk_dim, s->hidden);
    layer->k = empty((size_t)a->kv_heads * a->qk_dim, s->hidden);
    layer->v = empty((size_t)a->kv_heads * a->v_dim, s->hidden);
  }
  layer->o_proj = empty(s->hidden, (size_t)a->q_heads * a->v_dim);
  enum us_status status = new_vector(owner, s->hidden, &layer->input_norm, err);
  if (status == US_OK) status = new_vector(owner, s->hidden, &layer->post_norm, err);
  if (status == US_OK && a->sink) status = new_vector(owner, a->q_heads, &layer->sink, err);
  if (status == US_OK) status = init_mlp(s, l, owner, layer, err);
  return status;
}

enum us_status us_model_create(const struct us_shape *shape, struct us_model **ret_model,
                               struct us_err *err) {
  *ret_model = NULL;
  enum us_status status = us_shape_check(shape, err);
  if (status != US_OK) return status;
  struct us_model *model = calloc(1, sizeof *model);
  if (!model) return us_err_memory(err, "model", sizeof *model);
  model->shape = *shape;
  model->embed = model->head = empty(shape->vocab, shape->hidden);
  void *layers = NULL;
  struct us_owner *owner = NULL;
  status = us_owner_create(&owner, err);
  model->owner = owner;
  if (status == US_OK) status = us_owner_alloc(owner, shape->layers * sizeof *model->layers, &layers, err);
  model->layers = layers;
  if (status == US_OK) status = new_vector(owner, shape->hidden, &model->final_norm, err);
  for (uint32_t l = 0; status == US_OK && l < shape->layers; l++) {
    status = init_layer(shape, l, owner, &model->layers[l], err);
  }
  if (status != US_OK) {
    us_model_free(model);
    return status;
  }
  *ret_model = model;
  return US_OK;
}

static enum us_status init_draft_layer(const struct us_draft_shape *s, void *owner,
                                       struct us_draft_layer *layer, struct us_err *err) {
  const struct us_attention_shape *a = &s->attention;
  layer->q = empty((size_t)a->q_heads * a->qk_dim, s->hidden);
  layer->k = empty((size_t)a->kv_heads * a->qk_dim, s->hidden);
  layer->v = empty((size_t)a->kv_heads * a->v_dim, s->hidden);
  layer->o_proj = empty(s->hidden, (size_t)a->q_heads * a->v_dim);
  layer->gate = layer->up = empty(s->inner, s->hidden);
  layer->down = empty(s->hidden, s->inner);
  enum us_status status = new_vector(owner, s->hidden, &layer->input_norm, err);
  if (status == US_OK) status = new_vector(owner, s->hidden, &layer->post_norm, err);
  if (status == US_OK) status = new_vector(owner, a->qk_dim, &layer->q_norm, err);
  if (status == US_OK) status = new_vector(owner, a->qk_dim, &layer->k_norm, err);
  if (status == US_OK && a->sink) status = new_vector(owner, a->q_heads, &layer->sink, err);
  return status;
}

enum us_status us_draft_create(const struct us_draft_shape *shape, struct us_draft **ret_draft,
                               struct us_err *err) {
  *ret_draft = NULL;
  enum us_status status = us_draft_shape_check(shape, NULL, err);
  if (status != US_OK) return status;
  struct us_draft *draft = calloc(1, sizeof *draft);
  if (!draft) return us_err_memory(err, "drafter", sizeof *draft);
  draft->shape = *shape;
  draft->fc = empty(shape->hidden, (size_t)shape->taps * shape->hidden);
  if (shape->markov) {
    draft->markov_in = empty(shape->markov, shape->hidden);
    draft->markov_out = empty(shape->hidden, shape->markov);
  }
  if (shape->head != US_FORMAT_NONE) draft->head = empty(shape->vocab, shape->hidden);
  void *layers = NULL;
  struct us_owner *owner = NULL;
  status = us_owner_create(&owner, err);
  draft->owner = owner;
  if (status == US_OK) status = us_owner_alloc(owner, shape->layers * sizeof *draft->layers, &layers, err);
  draft->layers = layers;
  if (status == US_OK) status = new_vector(owner, shape->hidden, &draft->hidden_norm, err);
  if (status == US_OK) status = new_vector(owner, shape->hidden, &draft->final_norm, err);
  if (status == US_OK) status = new_vector(owner, shape->hidden, &draft->mask_embedding, err);
  for (uint32_t l = 0; status == US_OK && l < shape->layers; l++) {
    status = init_draft_layer(shape, owner, &draft->layers[l], err);
  }
  if (status != US_OK) {
    us_draft_free(draft);
    return status;
  }
  *ret_draft = draft;
  return US_OK;
}

enum us_status us_model_alloc(struct us_model *model, size_t bytes, void **ret_memory, struct us_err *err) {
  return us_owner_alloc(model->owner, bytes, ret_memory, err);
}

enum us_status us_draft_alloc(struct us_draft *draft, size_t bytes, void **ret_memory, struct us_err *err) {
  return us_owner_alloc(draft->owner, bytes, ret_memory, err);
}

void us_model_free(struct us_model *model) {
  if (!model) return;
  us_owner_free(model->owner);
  free(model->tokenizer_json);
  free(model->provenance_json);
  free(model->notes);
  free(model);
}

void us_draft_free(struct us_draft *draft) {
  if (!draft) return;
  us_owner_free(draft->owner);
  free(draft->provenance_json);
  free(draft->notes);
  free(draft);
}

/* --- names --- */

size_t us_tensor_scale_chunk_rows(const struct us_shape *shape, const struct us_tensor_ref *ref) {
  bool fused = shape->qkv_chunks && strcmp(ref->family, "qkv") == 0;
  return fused ? ref->rows / shape->qkv_chunks : 0;
}

enum us_format us_tensor_format(const struct us_precision *p, const struct us_tensor_ref *ref) {
  const struct {
    const char *family;
    enum us_format format;
  } formats[] = {{"embed", p->embed}, {"head", p->head},       {"qkv", p->qkv},       {"o_proj", p->o_proj},
                 {"dense", p->dense}, {"experts", p->experts}, {"router", p->router}, {"draft", p->draft}};
  for (size_t i = 0; ref->matrix && i < sizeof formats / sizeof *formats; i++) {
    if (strcmp(formats[i].family, ref->family) == 0) return formats[i].format;
  }
  return US_FORMAT_NONE;
}

struct listing {
  struct us_tensor_ref *refs;
  size_t count;
};

US_PRINTF(7, 8)
static void add(struct listing *list, const char *family, uint32_t layer, struct us_matrix *matrix,
                float **vector, size_t n, const char *format, ...) {
  struct us_tensor_ref *ref = &list->refs[list->count++];
  *ref = (struct us_tensor_ref){
      .family = family, .layer = layer, .matrix = matrix, .vector = vector, .rows = n, .cols = 1};
  if (matrix) ref->rows = matrix->rows, ref->cols = matrix->cols;
  va_list args;
  va_start(args, format);
  vsnprintf(ref->name, sizeof ref->name, format, args);
  va_end(args);
}

static void list_attention(struct listing *list, const struct us_shape *s, uint32_t l, struct us_layer *w) {
  add(list, "norm", l, NULL, &w->input_norm, s->hidden, "model.layers.%u.input_layernorm.weight", l);
  if (s->qkv_chunks) {
    add(list, "qkv", l, &w->qkv, NULL, 0, "model.layers.%u.self_attn.qkv_proj.weight", l);
  } else {
    add(list, "qkv", l, &w->q, NULL, 0, "model.layers.%u.self_attn.q_proj.weight", l);
    add(list, "qkv", l, &w->k, NULL, 0, "model.layers.%u.self_attn.k_proj.weight", l);
    add(list, "qkv", l, &w->v, NULL, 0, "model.layers.%u.self_attn.v_proj.weight", l);
  }
  if (w->sink) {
    add(list, "sink", l, NULL, &w->sink, us_shape_attention(s, l)->q_heads,
        "model.layers.%u.self_attn.attention_sink_bias", l);
  }
  add(list, "o_proj", l, &w->o_proj, NULL, 0, "model.layers.%u.self_attn.o_proj.weight", l);
  add(list, "norm", l, NULL, &w->post_norm, s->hidden, "model.layers.%u.post_attention_layernorm.weight", l);
}

static void list_mlp(struct listing *list, const struct us_shape *s, uint32_t l, struct us_layer *w) {
  if (!s->moe_layer[l]) {
    add(list, "dense", l, &w->gate, NULL, 0, "model.layers.%u.mlp.gate_proj.weight", l);
    add(list, "dense", l, &w->up, NULL, 0, "model.layers.%u.mlp.up_proj.weight", l);
    add(list, "dense", l, &w->down, NULL, 0, "model.layers.%u.mlp.down_proj.weight", l);
    return;
  }
  add(list, "router", l, &w->router, NULL, 0, "model.layers.%u.mlp.gate.weight", l);
  add(list, "router", l, NULL, &w->router_bias, s->experts,
      "model.layers.%u.mlp.gate.e_score_correction_bias", l);
  for (uint32_t e = 0; e < s->experts; e++) {
    struct us_expert *x = &w->experts[e];
    add(list, "experts", l, &x->gate, NULL, 0, "model.layers.%u.mlp.experts.%u.gate_proj.weight", l, e);
    add(list, "experts", l, &x->up, NULL, 0, "model.layers.%u.mlp.experts.%u.up_proj.weight", l, e);
    add(list, "experts", l, &x->down, NULL, 0, "model.layers.%u.mlp.experts.%u.down_proj.weight", l, e);
  }
}

/* Upper bound of what one layer lists: 2 norms, q, k, v, sink, o_proj, then router and bias, or three dense matrices. */
enum { TENSORS_A_LAYER = 10 };

enum us_status us_model_tensors(struct us_model *model, struct us_tensor_ref **ret_refs, size_t *ret_count,
                                struct us_err *err) {
  const struct us_shape *s = &model->shape;
  size_t most = 3 + (size_t)s->layers * (TENSORS_A_LAYER + 3 * (size_t)s->experts);
  struct listing list = {calloc(most, sizeof *list.refs), 0};
  if (!list.refs) return us_err_memory(err, "tensor list", most * sizeof *list.refs);
  add(&list, "embed", UINT32_MAX, &model->embed, NULL, 0, "model.embed_tokens.weight");
  for (uint32_t l = 0; l < s->layers; l++) {
    list_attention(&list, s, l, &model->layers[l]);
    list_mlp(&list, s, l, &model->layers[l]);
  }
  add(&list, "norm", UINT32_MAX, NULL, &model->final_norm, s->hidden, "model.norm.weight");
  add(&list, "head", UINT32_MAX, &model->head, NULL, 0, "lm_head.weight");
  *ret_refs = list.refs;
  *ret_count = list.count;
  return US_OK;
}

static void list_draft_layer(struct listing *list, const struct us_draft_shape *s, uint32_t l,
                             struct us_draft_layer *w) {
  add(list, "norm", l, NULL, &w->input_norm, s->hidden, "layers.%u.input_layernorm.weight", l);
  add(list, "draft", l, &w->q, NULL, 0, "layers.%u.self_attn.q_proj.weight", l);
  add(list, "draft", l, &w->k, NULL, 0, "layers.%u.self_attn.k_proj.weight", l);
  add(list, "draft", l, &w->v, NULL, 0, "layers.%u.self_attn.v_proj.weight", l);
  add(list, "draft", l, &w->o_proj, NULL, 0, "layers.%u.self_attn.o_proj.weight", l);
  add(list, "norm", l, NULL, &w->q_norm, s->attention.qk_dim, "layers.%u.self_attn.q_norm.weight", l);
  add(list, "norm", l, NULL, &w->k_norm, s->attention.qk_dim, "layers.%u.self_attn.k_norm.weight", l);
  if (w->sink) {
    add(list, "sink", l, NULL, &w->sink, s->attention.q_heads, "layers.%u.self_attn.attention_sink_bias", l);
  }
  add(list, "norm", l, NULL, &w->post_norm, s->hidden, "layers.%u.post_attention_layernorm.weight", l);
  add(list, "draft", l, &w->gate, NULL, 0, "layers.%u.mlp.gate_proj.weight", l);
  add(list, "draft", l, &w->up, NULL, 0, "layers.%u.mlp.up_proj.weight", l);
  add(list, "draft", l, &w->down, NULL, 0, "layers.%u.mlp.down_proj.weight", l);
}

enum us_status us_draft_tensors(struct us_draft *draft, struct us_tensor_ref **ret_refs, size_t *ret_count,
                                struct us_err *err) {
  const struct us_draft_shape *s = &draft->shape;
  size_t most = 7 + (size_t)s->layers * 12;
  struct listing list = {calloc(most, sizeof *list.refs), 0};
  if (!list.refs) return us_err_memory(err, "tensor list", most * sizeof *list.refs);
  add(&list, "draft", UINT32_MAX, &draft->fc, NULL, 0, "fc.weight");
  add(&list, "norm", UINT32_MAX, NULL, &draft->hidden_norm, s->hidden, "hidden_norm.weight");
  for (uint32_t l = 0; l < s->layers; l++) list_draft_layer(&list, s, l, &draft->layers[l]);
  if (s->markov) {
    add(&list, "draft", UINT32_MAX, &draft->markov_in, NULL, 0, "markov_in.weight");
    add(&list, "draft", UINT32_MAX, &draft->markov_out, NULL, 0, "markov_out.weight");
  }
  add(&list, "norm", UINT32_MAX, NULL, &draft->final_norm, s->hidden, "norm.weight");
  if (draft->head.rows) add(&list, "draft.head", UINT32_MAX, &draft->head, NULL, 0, "lm_head.weight");
  add(&list, "embed", UINT32_MAX, NULL, &draft->mask_embedding, s->hidden, "mask_embedding");
  *ret_refs = list.refs;
  *ret_count = list.count;
  return US_OK;
}
