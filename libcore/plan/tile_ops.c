/* tile_ops.c: what each task of the tile program computes: the kernels, on one tile.
 *
 * Contents: norms and residual; projections; attention; experts and dense MLP; head; drafter context; dispatch.
 * The kernels are those of the reference executor and every sum has the same order, so the bits are the same.
 */
#include "plan/tile_pass.h"

#include "kernels/attention/attention.h"
#include "kernels/embed/embed.h"
#include "kernels/residual/residual.h"
#include "kernels/rmsnorm/rmsnorm.h"
#include "kernels/rope/rope.h"
#include "kernels/router/router.h"
#include "kernels/swiglu/swiglu.h"

#include <math.h>
#include <string.h>

static float *scratch_of(const struct us_tile_pass *pass, int worker) {
  return pass->buffers->scratch + (size_t)worker * pass->buffers->scratch_floats;
}

/* ---- norms and residual ------------------------------------------------------------------------------------------ */

static double norm_eps(const struct us_tile_pass *pass) {
  return pass->draft ? pass->draft->shape.norm_eps : pass->model->shape.norm_eps;
}

/* normed row r = norm(x), kept plain and packed. */
static void norm_row(const struct us_tile_pass *pass, const float *x, const float *weight, size_t r) {
  size_t D = pass->program->dims.hidden, packed = us_linear_packed_width(D);
  float *normed = pass->buffers->normed + r * D;
  us_rmsnorm(&(struct us_rmsnorm_args){.x = x,
                                       .x_stride = D,
                                       .weight = weight,
                                       .y = normed,
                                       .y_stride = D,
                                       .R = 1,
                                       .D = D,
                                       .eps = (float)norm_eps(pass),
                                       .round_bf16 = pass->round_bf16,
                                       .isa = pass->isa});
  us_linear_pack(normed, 1, D, D, pass->buffers->normed_packed + r * packed, packed);
}

static void embed_norm(const struct us_tile_pass *pass, const struct us_task *task) {
  size_t D = pass->program->dims.hidden;
  for (size_t r = task->begin; r < task->end; r++) {
    float *h = pass->buffers->residual + r * D;
    if (pass->draft && r > 0)
      memcpy(h, pass->draft->mask_embedding, D * sizeof *h);
    else
      us_embed(&pass->model->embed, (uint32_t)pass->rows[r].token, h);
    norm_row(pass, h, pass->layers[0].input_norm, r);
  }
}

/* The norm after a residual add: of this layer's MLP, of the next layer's attention, or the final one. */
static const float *next_norm(const struct us_tile_pass *pass, const struct us_task *task) {
  if (task->slot == 0) return pass->layers[task->layer].post_norm;
  if (task->layer + 1 < pass->program->dims.layers) return pass->layers[task->layer + 1].input_norm;
  return pass->draft ? pass->draft->final_norm : pass->model->final_norm;
}

static void keep_taps(const struct us_tile_pass *pass, const struct us_task *task) {
  size_t D = pass->program->dims.hidden;
  for (uint32_t t = 0; t < pass->tap_count; t++) {
    if (pass->tap_layer[t] != task->layer) continue;
    for (size_t r = task->begin; r < task->end; r++)
      memcpy(pass->taps + (r * pass->tap_count + t) * D, pass->buffers->residual + r * D, D * sizeof(float));
  }
}

static void residual_norm(const struct us_tile_pass *pass, const struct us_task *task) {
  size_t D = pass->program->dims.hidden;
  const float *weight = next_norm(pass, task);
  for (size_t r = task->begin; r < task->end; r++) {
    float *h = pass->buffers->residual + r * D;
    us_residual_add(h, pass->buffers->partial[task->slot] + r * D, D);
    norm_row(pass, h, weight, r);
  }
  if (pass->taps && task->slot == 1) keep_taps(pass, task);
}

/* ---- projections ------------------------------------------------------------------------------------------------- */

/* The tile's columns [begin, end) of W x for all rows; y points at the first of them in row 0. */
static void project(const struct us_tile_pass *pass, const struct us_matrix *w, const float *x, float *y,
                    size_t y_stride, size_t begin, size_t end) {
  us_linear(&(struct us_linear_args){.w = w,
                                     .x = x,
                                     .x_stride = us_linear_packed_width(w->cols),
                                     .y = y,
                                     .y_stride = y_stride,
                                     .R = pass->program->dims.rows,
                                     .begin = begin,
                                     .end = end,
                                     .isa = pass->isa});
}

/* Split projections lie behind each other in the output: a tile may touch two of them. */
static void qkv(const struct us_tile_pass *pass, const struct us_task *task) {
  const struct us_tile_layer *layer = &pass->layers[task->layer];
  size_t width = us_attention_qkv_rows(layer->attention), first = 0;
  for (int i = 0; i < 3 && layer->projection[i]; i++) {
    size_t rows = layer->projection[i]->rows;
    size_t begin = task->begin > first ? task->begin - first : 0,
           end = task->end < first + rows ? task->end - first : rows;
    if (task->end > first && begin < end)
      project(pass, layer->projection[i], pass->buffers->normed_packed, pass->buffers->qkv + first + begin,
              width, begin, end);
    first += rows;
  }
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static const float *rope_table(const struct us_tile_pass *pass, const struct us_tile_layer *layer, size_t r) {
  int kind = pass->draft || layer->attention == &pass->model->shape.swa;
  return pass->buffers->rope[kind] + r * layer->attention->rotary_dim;
}

/* Per-head norm of the drafter's queries and keys (in place, FP32), then rotation. */
static void norm_and_rotate(const struct us_tile_pass *pass, const struct us_tile_layer *layer,
                            const float *weight, size_t r, float *head) {
  size_t Q = layer->attention->qk_dim;
  if (weight)
    us_rmsnorm(&(struct us_rmsnorm_args){.x = head,
                                         .x_stride = Q,
                                         .weight = weight,
                                         .y = head,
                                         .y_stride = Q,
                                         .R = 1,
                                         .D = Q,
                                         .eps = (float)norm_eps(pass),
                                         .isa = pass->isa});
  us_rope_apply(rope_table(pass, layer, r), layer->attention->rotary_dim, head);
}

/* Rotated key and scaled value of KV head g in row r, into k (Q) and v (V). */
static void key_and_value(const struct us_tile_pass *pass, const struct us_tile_layer *layer, size_t r,
                          uint32_t g, float *k, float *v) {
  const struct us_attention_shape *a = layer->attention;
  const float *row = pass->buffers->qkv + r * us_attention_qkv_rows(a);
  memcpy(k, row + us_attention_k_row(a, layer->chunks, g), a->qk_dim * sizeof *k);
  norm_and_rotate(pass, layer, layer->k_norm, r, k);
  const float *value = row + us_attention_v_row(a, layer->chunks, g);
  float scale = (float)(pass->draft ? pass->draft->shape.value_scale : pass->model->shape.value_scale);
  for (uint32_t d = 0; d < a->v_dim; d++) v[d] = value[d] * scale;
}

/* One row's queries of KV head g: rotate, attend, keep packed. */
static void attend_row(const struct us_tile_pass *pass, const struct us_tile_layer *layer, uint32_t l,
                       size_t r, uint32_t g, float *scratch) {
  const struct us_attention_shape *a = layer->attention;
  struct us_tile_buffers *b = pass->buffers;
  uint32_t group = a->q_heads / a->kv_heads, first = g * group;
  const float *row = b->qkv + r * us_attention_qkv_rows(a);
  float *q = b->q + r * a->q_heads * a->qk_dim;
  for (uint32_t h = first; h < first + group; h++) {
    memcpy(q + (size_t)h * a->qk_dim, row + us_attention_q_row(a, layer->chunks, h), a->qk_dim * sizeof *q);
    norm_and_rotate(pass, layer, layer->q_norm, r, q + (size_t)h * a->qk_dim);
  }
  struct us_attention_keys keys = us_kv_keys(pass->rows[r].kv, l);
  size_t width = (size_t)a->q_heads * a->v_dim;
  float *out = b->attended + r * width, *packed = b->attended_packed + r * us_linear_packed_width(width);
  uint32_t position = pass->rows[r].position;
  us_attention(&(struct us_attention_args){.keys = &keys,
                                           .q = q,
                                           .H = a->q_heads,
                                           .position = position,
                                           .cached = pass->draft ? pass->rows[0].position : position + 1,
                                           .window = a->window,
                                           .sink = a->sink ? layer->sink : NULL,
                                           .scale = (float)(1.0 / sqrt(a->qk_dim)),
                                           .opt_block = pass->draft ? b->block_page : NULL,
                                           .block_position = pass->rows[0].position,
                                           .block_rows = pass->draft ? pass->program->dims.rows : 0,
                                           .head_begin = first,
                                           .head_end = first + group,
                                           .out = out,
                                           .round_bf16 = pass->round_bf16,
                                           .isa = pass->isa},
               scratch);
  for (size_t k = (size_t)first * a->v_dim; k < (size_t)(first + group) * a->v_dim; k++)
    packed[us_linear_packed_index(k)] = out[k];
}

/* A target row appends its K/V just before it attends, so that a long prefill chunk never overruns a window's ring. A
 * draft block sees all of itself: its K/V come first. */
static void attention(const struct us_tile_pass *pass, const struct us_task *task, float *scratch) {
  const struct us_tile_layer *layer = &pass->layers[task->layer];
  float *k = scratch, *v = k + layer->attention->qk_dim;
  float *rest = v + layer->attention->v_dim;
  size_t R = pass->program->dims.rows;
  for (uint32_t g = task->begin; g < task->end; g++) {
    for (size_t r = 0; r < R && pass->draft; r++) {
      struct us_attention_keys keys = us_kv_keys(pass->rows[r].kv, task->layer);
      key_and_value(pass, layer, r, g, k, v);
      us_kv_store(&keys, pass->buffers->block_page, (uint32_t)r, g, k, v);
    }
    for (size_t r = 0; r < R; r++) {
      if (!pass->draft) {
        key_and_value(pass, layer, r, g, k, v);
        us_kv_write(pass->rows[r].kv, task->layer, pass->rows[r].position, g, k, v);
      }
      attend_row(pass, layer, task->layer, r, g, rest);
    }
  }
}

/* ---- experts and dense MLP --------------------------------------------------------------------------------------- */

static void route(const struct us_tile_pass *pass, const struct us_task *task) {
  const struct us_shape *shape = &pass->model->shape;
  struct us_tile_buffers *b = pass->buffers;
  size_t R = pass->program->dims.rows, K = shape->top_k;
  for (size_t r = 0; r < R; r++)
    us_router_select(&(struct us_router_args){.logits = b->router + r * shape->experts,
                                              .bias = pass->layers[task->layer].router_bias,
                                              .E = shape->experts,
                                              .K = shape->top_k,
                                              .normalise = shape->norm_topk_prob,
                                              .scaling = (float)shape->routed_scaling},
                     b->ids + r * K, b->weights + r * K);
  us_experts_group(b->ids, b->weights, R, shape->top_k, shape->experts, &b->groups);
  if (pass->routed) memcpy(pass->routed + task->layer * R * K, b->ids, R * K * sizeof *b->ids);
}

static struct us_experts_args experts_args(const struct us_tile_pass *pass, const struct us_task *task) {
  const struct us_shape *shape = &pass->model->shape;
  struct us_tile_buffers *b = pass->buffers;
  return (struct us_experts_args){.experts = &pass->layers[task->layer].experts[0].gate,
                                  .groups = &b->groups,
                                  .x = b->normed_packed,
                                  .x_stride = us_linear_packed_width(shape->hidden),
                                  .R = pass->program->dims.rows,
                                  .D = shape->hidden,
                                  .F = shape->expert_inner,
                                  .inner = b->inner_packed,
                                  .y = b->partial[1],
                                  .y_stride = shape->hidden,
                                  .round_bf16 = pass->round_bf16,
                                  .isa = pass->isa};
}

static void dense_up(const struct us_tile_pass *pass, const struct us_task *task, float *scratch) {
  const struct us_tile_layer *layer = &pass->layers[task->layer];
  size_t R = pass->program->dims.rows, width = task->end - task->begin;
  size_t packed = us_linear_packed_width(pass->program->dims.dense_inner);
  float *gate = scratch, *up = scratch + R * width;
  project(pass, layer->gate, pass->buffers->normed_packed, gate, width, task->begin, task->end);
  project(pass, layer->up, pass->buffers->normed_packed, up, width, task->begin, task->end);
  us_swiglu(&(struct us_swiglu_args){
      .gate = gate, .up = up, .y = gate, .n = R * width, .round_bf16 = pass->round_bf16, .isa = pass->isa});
  us_linear_pack(gate, R, width, width, pass->buffers->inner_packed + task->begin, packed);
}

/* ---- head -------------------------------------------------------------------------------------------------------- */

/* Runs of rows whose logits are wanted; a draft block's anchor row predicts nothing. */
static void head(const struct us_tile_pass *pass, const struct us_task *task) {
  size_t N = pass->program->dims.vocab, R = pass->program->dims.rows, skipped = pass->draft ? 1 : 0;
  size_t packed = us_linear_packed_width(pass->program->dims.hidden);
  const struct us_matrix *w = pass->draft ? us_draft_head(pass->draft, pass->model) : &pass->model->head;
  for (size_t r = skipped; r < R;) {
    size_t end = r;
    while (end < R && (!pass->want_logits || pass->want_logits[end])) end++;
    if (end > r)
      us_linear(&(struct us_linear_args){.w = w,
                                         .x = pass->buffers->normed_packed + r * packed,
                                         .x_stride = packed,
                                         .y = pass->logits + (r - skipped) * N + task->begin,
                                         .y_stride = N,
                                         .R = end - r,
                                         .begin = task->begin,
                                         .end = task->end,
                                         .isa = pass->isa});
    r = end + 1;
  }
}

/* ---- drafter context --------------------------------------------------------------------------------------------- */

static void context_kv(const struct us_tile_pass *pass, const struct us_task *task, float *scratch) {
  const struct us_tile_layer *layer = &pass->layers[task->layer];
  const struct us_attention_shape *a = layer->attention;
  size_t R = pass->program->dims.rows;
  float *k = scratch, *v = scratch + R * a->qk_dim;
  float scale = (float)pass->draft->shape.value_scale;
  for (uint32_t g = task->begin; g < task->end; g++) {
    size_t k0 = (size_t)g * a->qk_dim, v0 = (size_t)g * a->v_dim;
    project(pass, layer->projection[1], pass->buffers->normed_packed, k, a->qk_dim, k0, k0 + a->qk_dim);
    project(pass, layer->projection[2], pass->buffers->normed_packed, v, a->v_dim, v0, v0 + a->v_dim);
    for (size_t r = 0; r < R; r++) {
      norm_and_rotate(pass, layer, layer->k_norm, r, k + r * a->qk_dim);
      for (uint32_t d = 0; d < a->v_dim; d++) v[r * a->v_dim + d] *= scale;
      us_kv_write(pass->rows[r].kv, task->layer, pass->rows[r].position, g, k + r * a->qk_dim,
                  v + r * a->v_dim);
    }
  }
}

/* ---- dispatch ---------------------------------------------------------------------------------------------------- */

size_t us_tile_scratch(const struct us_tile_pass *pass) {
  const struct us_program_dims *dims = &pass->program->dims;
  size_t R = dims->rows, most = 0, widest_tile = 0;
  for (size_t i = 0; i < pass->program->task_count; i++) {
    const struct us_task *task = &pass->program->tasks[i];
    bool inner =
        task->op == US_TASK_DENSE_UP || task->op == US_TASK_EXPERT_UP || task->op == US_TASK_EXPERT_DOWN;
    if (inner && task->end - task->begin > widest_tile) widest_tile = task->end - task->begin;
  }
  most = us_experts_scratch(R, widest_tile);
  for (uint32_t l = 0; l < dims->layers; l++) {
    const struct us_attention_shape *a = pass->layers[l].attention;
    struct us_attention_keys keys = {.Q = a->qk_dim, .V = a->v_dim, .G = a->kv_heads};
    size_t attend = a->qk_dim + a->v_dim + us_attention_scratch(&keys, a->q_heads / a->kv_heads);
    size_t context = R * (a->qk_dim + a->v_dim);
    if (attend > most) most = attend;
    if (pass->program->kind == US_PROGRAM_CONTEXT && context > most) most = context;
  }
  return most;
}

uint64_t us_tile_run(void *arg, const struct us_task *task, int worker) {
  const struct us_tile_pass *pass = arg;
  struct us_tile_buffers *b = pass->buffers;
  const struct us_tile_layer *layer = task->layer == US_LAYER_NONE ? NULL : &pass->layers[task->layer];
  float *scratch = scratch_of(pass, worker);
  size_t D = pass->program->dims.hidden;
  uint64_t bytes = task->bytes;
  switch ((enum us_task_op)task->op) {
  case US_TASK_EMBED_NORM:
    embed_norm(pass, task);
    break;
  case US_TASK_QKV:
    qkv(pass, task);
    break;
  case US_TASK_ATTENTION:
    attention(pass, task, scratch);
    break;
  case US_TASK_O_PROJ:
    project(pass, layer->o_proj, b->attended_packed, b->partial[0] + task->begin, D, task->begin, task->end);
    break;
  case US_TASK_RESIDUAL_NORM:
    residual_norm(pass, task);
    break;
  case US_TASK_ROUTER:
    project(pass, layer->router, b->normed_packed, b->router + task->begin, pass->program->dims.experts,
            task->begin, task->end);
    break;
  case US_TASK_ROUTE:
    route(pass, task);
    break;
  case US_TASK_EXPERT_UP: {
    if (task->slot >= b->groups.active) return 0;
    struct us_experts_args args = experts_args(pass, task);
    us_experts_inner(&args, task->slot, task->begin, task->end, scratch);
    break;
  }
  case US_TASK_EXPERT_DOWN: {
    struct us_experts_args args = experts_args(pass, task);
    us_experts_outer(&args, task->begin, task->end, scratch);
    bytes *= b->groups.active;
    break;
  }
  case US_TASK_DENSE_UP:
    dense_up(pass, task, scratch);
    break;
  case US_TASK_DENSE_DOWN:
    project(pass, layer->down, b->inner_packed, b->partial[1] + task->begin, D, task->begin, task->end);
    break;
  case US_TASK_HEAD:
    head(pass, task);
    break;
  case US_TASK_CONTEXT_FC:
    project(pass, &pass->draft->fc, b->features_packed, b->context + task->begin, D, task->begin, task->end);
    break;
  case US_TASK_CONTEXT_NORM:
    for (size_t r = task->begin; r < task->end; r++)
      norm_row(pass, b->context + r * D, pass->draft->hidden_norm, r);
    break;
  case US_TASK_CONTEXT_KV:
    context_kv(pass, task, scratch);
    break;
  case US_TASK_OP_COUNT:
    break;
  }
  return bytes;
}
