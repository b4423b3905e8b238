/* executor_reference.c: the target pass, operation by operation in the order of the formulas.
 *
 * Contents: buffers of a pass; attention of a layer; MLP of a layer; taps and logits; the pass; the executor.
 */
#include "model/forward.h"
#include "model/markov.h"

#include "formats/bf16.h"
#include "kernels/embed/embed.h"
#include "kernels/linear/linear.h"
#include "kernels/residual/residual.h"
#include "kernels/rope/rope.h"
#include "kernels/router/router.h"
#include <stdlib.h>
#include <string.h>

#define EXPERT_TILE 64 /* output columns a task; a multiple of 32 */

struct reference {
  struct us_executor base;
  struct us_forward forward;
  struct us_kv_spec spec;
  struct us_markov *markov; /* NULL: the drafter has no such head */
};

/* ---- Buffers of a pass ---- */

struct target_pass {
  struct us_forward *f;
  const struct us_executor *ex;
  const struct us_model *model;
  const struct us_pass *pass;
  struct us_err *err;
  float *h, *norm, *packed, *qkv, *q, *attention, *y, *router, *inner, *rope[2];
  uint32_t *ids;
  float *weights;
  struct us_expert_groups groups;
  bool stopped; /* an observer asked to stop */
};

static uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

static void carve_routes(struct target_pass *p, size_t R, float *memory) {
  const struct us_shape *s = &p->model->shape;
  size_t pairs = R * s->top_k;
  uint32_t *words = (uint32_t *)(void *)memory;
  p->ids = words;
  p->weights = memory + pairs;
  p->groups.row = words + 2 * pairs;
  p->groups.weight = memory + 3 * pairs;
  p->groups.expert = words + 4 * pairs;
  p->groups.begin = p->groups.expert + s->experts;
}

static enum us_status take_buffers(struct target_pass *p) {
  const struct us_shape *s = &p->model->shape;
  struct us_forward *f = p->f;
  size_t R = p->pass->R, D = s->hidden;
  uint32_t qkv = larger(us_attention_qkv_rows(&s->full), us_attention_qkv_rows(&s->swa));
  uint32_t q = larger(s->full.q_heads * s->full.qk_dim, s->swa.q_heads * s->swa.qk_dim);
  uint32_t attention = larger(s->full.q_heads * s->full.v_dim, s->swa.q_heads * s->swa.v_dim);
  size_t packed = us_forward_packed_width(D, attention, s->dense_inner);
  size_t pairs = R * s->top_k, rotary = s->full.rotary_dim + (size_t)s->swa.rotary_dim;
  enum us_status status = US_OK;
  p->h = us_forward_need(f, US_WORK_H, R * D, &status, p->err);
  p->norm = us_forward_need(f, US_WORK_NORM, R * D, &status, p->err);
  p->packed = us_forward_need(f, US_WORK_PACKED, R * packed, &status, p->err);
  p->qkv = us_forward_need(f, US_WORK_QKV, R * qkv, &status, p->err);
  p->q = us_forward_need(f, US_WORK_Q, R * q, &status, p->err);
  p->attention = us_forward_need(f, US_WORK_ATTENTION, R * attention, &status, p->err);
  p->y = us_forward_need(f, US_WORK_Y, R * D, &status, p->err);
  p->router = us_forward_need(f, US_WORK_ROUTER, R * s->experts, &status, p->err);
  p->inner =
      us_forward_need(f, US_WORK_INNER, pairs * us_linear_packed_width(s->expert_inner), &status, p->err);
  p->rope[0] = us_forward_need(f, US_WORK_ROPE, R * rotary, &status, p->err);
  float *routes = us_forward_need(f, US_WORK_ROUTES, 4 * pairs + 2 * (size_t)s->experts + 1, &status, p->err);
  if (status != US_OK) return status;
  p->rope[1] = p->rope[0] + R * s->full.rotary_dim;
  carve_routes(p, R, routes);
  return US_OK;
}

/* Tell the observer; false when the pass is to stop here. */
static bool observe(struct target_pass *p, const char *op, uint32_t layer, const float *values, size_t R,
                    size_t width) {
  const struct us_observer *observer = p->pass->observer;
  if (observer && !observer->after_op(observer->arg, op, layer, values, R, width)) p->stopped = true;
  return !p->stopped;
}

/* ---- Attention of a layer ---- */

struct rope_job {
  struct target_pass *p;
  uint32_t layer;
  size_t begin;
};

/* Rotate q and k of rows begin + [from, to), scale v, and append k and v to the rows' caches. */
static void rope_rows(void *arg, size_t from, size_t to, int worker) {
  const struct rope_job *job = arg;
  struct target_pass *p = job->p;
  const struct us_shape *s = &p->model->shape;
  const struct us_attention_shape *a = us_shape_attention(s, job->layer);
  const float *tables = p->rope[s->swa_layer[job->layer] ? 1 : 0];
  float value_scale = (float)s->value_scale;
  for (size_t r = job->begin + from; r < job->begin + to; r++) {
    const struct us_row *row = &p->pass->rows[r];
    const float *table = tables + r * a->rotary_dim;
    float *qkv = p->qkv + r * us_attention_qkv_rows(a);
    for (uint32_t h = 0; h < a->q_heads; h++) {
      float *q = p->q + (r * a->q_heads + h) * a->qk_dim;
      memcpy(q, qkv + us_attention_q_row(a, s->qkv_chunks, h), a->qk_dim * sizeof *q);
      us_rope_apply(table, a->rotary_dim, q);
    }
    for (uint32_t g = 0; g < a->kv_heads; g++) {
      float *k = qkv + us_attention_k_row(a, s->qkv_chunks, g),
            *v = qkv + us_attention_v_row(a, s->qkv_chunks, g);
      us_rope_apply(table, a->rotary_dim, k);
      for (uint32_t d = 0; d < a->v_dim; d++) v[d] = v[d] * value_scale;
      us_kv_write(row->kv, job->layer, row->position, g, k, v);
    }
  }
}

/* How many rows from `begin` may be appended before any of them attends. A windowed layer's ring has room for
 * US_MAX_BLOCK - 1 positions beyond a row's own window, so a sequence's rows in one batch span at most US_MAX_BLOCK. */
static size_t batch_end(const struct us_pass *pass, size_t begin, uint32_t window) {
  if (!window) return pass->R;
  size_t end = begin + 1;
  for (; end < pass->R; end++)
    for (size_t i = begin; i < end; i++)
      if (pass->rows[i].kv == pass->rows[end].kv &&
          pass->rows[end].position - pass->rows[i].position >= US_MAX_BLOCK)
        return end;
  return end;
}

static void project_qkv(struct target_pass *p, const struct us_layer *layer,
                        const struct us_attention_shape *a) {
  size_t R = p->pass->R, stride = us_attention_qkv_rows(a);
  if (layer->qkv.format != US_FORMAT_NONE) {
    us_forward_linear(p->f, &layer->qkv, p->packed, R, p->qkv, stride);
    return;
  }
  us_forward_linear(p->f, &layer->q, p->packed, R, p->qkv, stride);
  us_forward_linear(p->f, &layer->k, p->packed, R, p->qkv + layer->q.rows, stride);
  us_forward_linear(p->f, &layer->v, p->packed, R, p->qkv + layer->q.rows + layer->k.rows, stride);
}

static enum us_status run_attention(struct target_pass *p, uint32_t l) {
  const struct us_shape *s = &p->model->shape;
  const struct us_layer *layer = &p->model->layers[l];
  const struct us_attention_shape *a = us_shape_attention(s, l);
  size_t R = p->pass->R, D = s->hidden, width = (size_t)a->q_heads * a->v_dim;
  us_forward_norm(p->f, p->h, layer->input_norm, R, D, s->norm_eps, p->norm, p->packed);
  if (!observe(p, "attn_norm", l, p->norm, R, D)) return US_OK;
  project_qkv(p, layer, a);
  if (!observe(p, "qkv", l, p->qkv, R, us_attention_qkv_rows(a))) return US_OK;
  struct us_forward_attention attention = {.rows = p->pass->rows,
                                           .layer = l,
                                           .shape = a,
                                           .sink = a->sink ? layer->sink : NULL,
                                           .q = p->q,
                                           .out = p->attention};
  for (size_t begin = 0; begin < R; begin = attention.end) {
    attention.begin = begin;
    attention.end = batch_end(p->pass, begin, a->window);
    struct rope_job job = {.p = p, .layer = l, .begin = begin};
    us_pool_for(p->f->pool, attention.end - begin, 1, rope_rows, &job);
    enum us_status status = us_forward_attention(p->f, &attention, p->err);
    if (status != US_OK) return status;
  }
  if (!observe(p, "attention", l, p->attention, R, width)) return US_OK;
  us_forward_pack(p->f, p->attention, R, width, p->packed);
  us_forward_linear(p->f, &layer->o_proj, p->packed, R, p->y, D);
  if (!observe(p, "o_proj", l, p->y, R, D)) return US_OK;
  us_residual_add(p->h, p->y, R * D);
  observe(p, "residual", l, p->h, R, D);
  return US_OK;
}

/* ---- MLP of a layer ---- */

struct experts_job {
  struct us_experts_args args;
  size_t tiles; /* of the stage's output columns */
  float *scratch;
  size_t scratch_floats;
};

static void inner_tasks(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_job *job = arg;
  for (size_t i = begin; i < end; i++) {
    size_t first = i % job->tiles * EXPERT_TILE, last = first + EXPERT_TILE;
    us_experts_inner(&job->args, (uint32_t)(i / job->tiles), first, last < job->args.F ? last : job->args.F,
                     job->scratch + (size_t)worker * job->scratch_floats);
  }
}

static void outer_tasks(void *arg, size_t begin, size_t end, int worker) {
  const struct experts_job *job = arg;
  for (size_t i = begin; i < end; i++) {
    size_t first = i * EXPERT_TILE, last = first + EXPERT_TILE;
    us_experts_outer(&job->args, first, last < job->args.D ? last : job->args.D,
                     job->scratch + (size_t)worker * job->scratch_floats);
  }
}

static void route_rows(struct target_pass *p, uint32_t l) {
  const struct us_shape *s = &p->model->shape;
  const struct us_layer *layer = &p->model->layers[l];
  size_t R = p->pass->R, K = s->top_k;
  for (size_t r = 0; r < R; r++)
    us_router_select(&(struct us_router_args){.logits = p->router + r * s->experts,
                                              .bias = layer->router_bias,
                                              .E = s->experts,
                                              .K = s->top_k,
                                              .normalise = s->norm_topk_prob,
                                              .scaling = (float)s->routed_scaling},
                     p->ids + r * K, p->weights + r * K);
  if (p->pass->routed) memcpy(p->pass->routed + l * R * K, p->ids, R * K * sizeof *p->ids);
}

static enum us_status run_experts(struct target_pass *p, uint32_t l) {
  const struct us_shape *s = &p->model->shape;
  const struct us_layer *layer = &p->model->layers[l];
  size_t R = p->pass->R;
  us_forward_linear(p->f, &layer->router, p->packed, R, p->router, s->experts);
  if (!observe(p, "router", l, p->router, R, s->experts)) return US_OK;
  route_rows(p, l);
  us_experts_group(p->ids, p->weights, R, s->top_k, s->experts, &p->groups);
  struct experts_job job = {.args = {.experts = &layer->experts[0].gate,
                                     .groups = &p->groups,
                                     .x = p->packed,
                                     .x_stride = us_linear_packed_width(s->hidden),
                                     .R = R,
                                     .D = s->hidden,
                                     .F = s->expert_inner,
                                     .inner = p->inner,
                                     .y = p->y,
                                     .y_stride = s->hidden,
                                     .round_bf16 = p->f->round_bf16,
                                     .isa = p->f->isa},
                            .tiles = (s->expert_inner + EXPERT_TILE - 1) / EXPERT_TILE,
                            .scratch_floats = us_experts_scratch(R, EXPERT_TILE)};
  enum us_status status = US_OK;
  job.scratch = us_forward_need(p->f, US_WORK_SCRATCH,
                                (size_t)us_pool_threads(p->f->pool) * job.scratch_floats, &status, p->err);
  if (status != US_OK) return status;
  us_pool_for(p->f->pool, p->groups.active * job.tiles, 1, inner_tasks, &job);
  us_pool_for(p->f->pool, (s->hidden + EXPERT_TILE - 1) / EXPERT_TILE, 1, outer_tasks, &job);
  return US_OK;
}

static enum us_status run_mlp(struct target_pass *p, uint32_t l) {
  const struct us_shape *s = &p->model->shape;
  const struct us_layer *layer = &p->model->layers[l];
  size_t R = p->pass->R, D = s->hidden, K = s->top_k;
  us_forward_norm(p->f, p->h, layer->post_norm, R, D, s->norm_eps, p->norm, p->packed);
  if (!observe(p, "mlp_norm", l, p->norm, R, D)) return US_OK;
  enum us_status status;
  if (s->moe_layer[l]) {
    status = run_experts(p, l);
  } else {
    status = us_forward_dense(p->f, &layer->gate, &layer->up, &layer->down, p->packed, R, p->y, p->err);
    if (p->pass->routed) memset(p->pass->routed + l * R * K, 0xff, R * K * sizeof *p->pass->routed);
  }
  if (status != US_OK || p->stopped) return status;
  if (!observe(p, s->moe_layer[l] ? "experts" : "dense", l, p->y, R, D)) return US_OK;
  us_residual_add(p->h, p->y, R * D);
  observe(p, "residual", l, p->h, R, D);
  return US_OK;
}

/* ---- Taps and logits ---- */

static void copy_taps(struct target_pass *p, uint32_t l) {
  if (!p->pass->taps) return;
  const struct us_draft_shape *draft = &p->ex->draft->shape;
  size_t D = p->model->shape.hidden;
  for (uint32_t i = 0; i < draft->taps; i++) {
    if (draft->tap_layer[i] != l) continue;
    for (size_t r = 0; r < p->pass->R; r++)
      memcpy(p->pass->taps + (r * draft->taps + i) * D, p->h + r * D, D * sizeof *p->h);
  }
}

/* Runs of wanted rows go through the head together. */
static void run_head(struct target_pass *p) {
  const struct us_shape *s = &p->model->shape;
  const struct us_pass *pass = p->pass;
  size_t width = us_linear_packed_width(s->hidden), N = s->vocab;
  us_forward_norm(p->f, p->h, p->model->final_norm, pass->R, s->hidden, s->norm_eps, p->norm, p->packed);
  if (!observe(p, "final_norm", UINT32_MAX, p->norm, pass->R, s->hidden) || !pass->logits) return;
  for (size_t r = 0; r < pass->R;) {
    size_t end = r;
    while (end < pass->R && (!pass->want_logits || pass->want_logits[end])) end++;
    if (end > r)
      us_forward_linear(p->f, &p->model->head, p->packed + r * width, end - r, pass->logits + r * N, N);
    r = end > r ? end : r + 1;
  }
  observe(p, "head", UINT32_MAX, pass->logits, pass->R, N);
}

/* ---- The pass ---- */

static enum us_status check_pass(const struct reference *ref, const struct us_pass *pass,
                                 struct us_err *err) {
  if (pass->taps && !ref->base.draft) return us_err_set(err, US_ERR_USAGE, "taps need a drafter");
  for (size_t r = 0; r < pass->R; r++) {
    const struct us_row *row = &pass->rows[r];
    if (row->token < 0 || (uint32_t)row->token >= ref->base.model->shape.vocab)
      return us_err_set(err, US_ERR_USAGE, "token %d is outside the vocabulary of %u", row->token,
                        ref->base.model->shape.vocab);
    if (r > 0 && row->kv == row[-1].kv) continue;
    enum us_status status = us_forward_check_kv(row->kv, &ref->spec, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status reserve_rows(const struct us_pass *pass, struct us_err *err) {
  for (size_t r = 0; r < pass->R; r++) {
    enum us_status status = us_kv_reserve(pass->rows[r].kv, pass->rows[r].position, 1, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status reference_forward(struct us_executor *ex, const struct us_pass *pass,
                                        struct us_err *err) {
  struct reference *ref = (struct reference *)ex;
  const struct us_shape *s = &ex->model->shape;
  struct target_pass p = {.f = &ref->forward, .ex = ex, .model = ex->model, .pass = pass, .err = err};
  enum us_status status = check_pass(ref, pass, err);
  if (status == US_OK) status = reserve_rows(pass, err);
  if (status != US_OK || !pass->R) return status;
  status = take_buffers(&p);
  if (status != US_OK) return status;
  for (size_t r = 0; r < pass->R; r++)
    us_embed(&ex->model->embed, (uint32_t)pass->rows[r].token, p.h + r * s->hidden);
  us_forward_rope(s->full.rope_theta, s->full.rotary_dim, pass->rows, pass->R, p.rope[0]);
  us_forward_rope(s->swa.rope_theta, s->swa.rotary_dim, pass->rows, pass->R, p.rope[1]);
  for (uint32_t l = 0; l < s->layers; l++) {
    status = run_attention(&p, l);
    if (status == US_OK && !p.stopped) status = run_mlp(&p, l);
    if (status != US_OK || p.stopped) return status;
    copy_taps(&p, l);
  }
  if (pass->logits || pass->observer) run_head(&p);
  return US_OK;
}

/* ---- The executor ---- */

static enum us_status reference_context(struct us_executor *ex, const struct us_draft_context *context,
                                        struct us_err *err) {
  if (!ex->draft) return us_err_set(err, US_ERR_USAGE, "this executor has no drafter");
  return us_draft_forward_context(&((struct reference *)ex)->forward, ex->draft, context, err);
}

static enum us_status reference_draft(struct us_executor *ex, const struct us_draft_pass *pass,
                                      struct us_err *err) {
  if (!ex->draft) return us_err_set(err, US_ERR_USAGE, "this executor has no drafter");
  struct reference *ref = (struct reference *)ex;
  enum us_status status = us_draft_forward_block(&ref->forward, ex->model, ex->draft, pass, err);
  if (status != US_OK || !ref->markov || !pass->logits) return status;
  return us_markov_add(ref->markov, &ref->forward, pass, err);
}

static void reference_free(struct us_executor *ex) {
  if (!ex) return;
  us_forward_release(&((struct reference *)ex)->forward);
  us_markov_free(((struct reference *)ex)->markov);
  free(ex);
}

static const struct us_executor_ops reference_ops = {.forward = reference_forward,
                                                     .draft_context = reference_context,
                                                     .draft = reference_draft,
                                                     .free = reference_free};

enum us_status us_executor_create_reference(const struct us_model *model, const struct us_draft *opt_draft,
                                            struct us_pool *pool, enum us_rounding rounding,
                                            struct us_executor **ret_executor, struct us_err *err) {
  *ret_executor = NULL;
  if (model->shape.top_k > US_ROUTER_MAX_K)
    return us_err_set(err, US_ERR_USAGE, "%u experts a token; at most %d can be routed", model->shape.top_k,
                      US_ROUTER_MAX_K);
  if (opt_draft && (opt_draft->shape.hidden != model->shape.hidden || opt_draft->shape.block > US_MAX_BLOCK))
    return us_err_set(err, US_ERR_USAGE,
                      "the drafter (hidden %u, block %u) does not fit the model (hidden %u)",
                      opt_draft->shape.hidden, opt_draft->shape.block, model->shape.hidden);
  struct reference *ref = calloc(1, sizeof *ref);
  if (!ref) return us_err_memory(err, "executor", sizeof *ref);
  ref->base = (struct us_executor){
      .ops = &reference_ops, .name = "reference", .model = model, .draft = opt_draft, .rounding = rounding};
  ref->forward = (struct us_forward){
      .pool = pool, .isa = us_isa_resolve(US_ISA_BEST), .round_bf16 = rounding == US_ROUND_BF16};
  ref->spec = us_kv_spec_of(&model->shape);
  enum us_status status = US_OK;
  if (opt_draft && opt_draft->shape.markov)
    status = us_markov_create(model, opt_draft, rounding, pool, &ref->markov, err);
  if (status == US_OK)
    *ret_executor = &ref->base;
  else
    reference_free(&ref->base);
  return status;
}
