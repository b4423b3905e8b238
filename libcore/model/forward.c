/* forward.c: the steps of forward passes over a thread pool. */
#include "model/forward.h"

#include "formats/bf16.h"
#include "kernels/attention/attention.h"
#include "kernels/linear/linear.h"
#include "kernels/rmsnorm/rmsnorm.h"
#include "kernels/rope/rope.h"
#include "kernels/swiglu/swiglu.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Output rows a task: small enough to share 64 rows between two threads, large enough that claiming is free. */
#define LINEAR_TILE 32

float *us_forward_need(struct us_forward *f, enum us_work work, size_t floats, enum us_status *status,
                       struct us_err *err) {
  if (*status != US_OK) return NULL;
  size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  if (bytes <= f->work_bytes[work]) return f->work[work];
  void *memory = floats > SIZE_MAX / 8 ? NULL : aligned_alloc(64, bytes);
  if (!memory) {
    *status = us_err_memory(err, "the activations of a pass", bytes);
    return NULL;
  }
  free(f->work[work]);
  f->work[work] = memory;
  f->work_bytes[work] = bytes;
  return memory;
}

void us_forward_release(struct us_forward *f) {
  for (int i = 0; i < US_WORK_COUNT; i++) free(f->work[i]);
  memset(f->work, 0, sizeof f->work);
  memset(f->work_bytes, 0, sizeof f->work_bytes);
}

size_t us_forward_packed_width(size_t a, size_t b, size_t c) {
  size_t widest = a > b ? a : b;
  return us_linear_packed_width(widest > c ? widest : c);
}

/* ---- Norm, pack, linear ---- */

struct norm_job {
  struct us_forward *f;
  const float *x, *weight;
  size_t D;
  float eps;
  float *plain, *packed;
};

static void norm_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct norm_job *job = arg;
  size_t D = job->D, packed_width = us_linear_packed_width(D);
  us_rmsnorm(&(struct us_rmsnorm_args){.x = job->x + begin * D,
                                       .x_stride = D,
                                       .weight = job->weight,
                                       .y = job->plain + begin * D,
                                       .y_stride = D,
                                       .R = end - begin,
                                       .D = D,
                                       .eps = job->eps,
                                       .round_bf16 = job->f->round_bf16,
                                       .isa = job->f->isa});
  us_linear_pack(job->plain + begin * D, end - begin, D, D, job->packed + begin * packed_width, packed_width);
}

void us_forward_norm(struct us_forward *f, const float *x, const float *weight, size_t R, size_t D,
                     double eps, float *plain, float *packed) {
  struct norm_job job = {
      .f = f, .x = x, .weight = weight, .D = D, .eps = (float)eps, .plain = plain, .packed = packed};
  us_pool_for(f->pool, R, 8, norm_rows, &job);
}

struct pack_job {
  const float *x;
  size_t K;
  float *packed;
};

static void pack_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct pack_job *job = arg;
  size_t width = us_linear_packed_width(job->K);
  us_linear_pack(job->x + begin * job->K, end - begin, job->K, job->K, job->packed + begin * width, width);
}

void us_forward_pack(struct us_forward *f, const float *x, size_t R, size_t K, float *packed) {
  struct pack_job job = {.x = x, .K = K, .packed = packed};
  us_pool_for(f->pool, R, 16, pack_rows, &job);
}

static void linear_tiles(void *arg, size_t begin, size_t end, int worker) {
  struct us_linear_args args = *(const struct us_linear_args *)arg;
  size_t N = args.end;
  args.begin = begin * LINEAR_TILE;
  args.end = end * LINEAR_TILE < N ? end * LINEAR_TILE : N;
  args.y += args.begin;
  us_linear(&args);
}

void us_forward_linear(struct us_forward *f, const struct us_matrix *w, const float *packed, size_t R,
                       float *y, size_t y_stride) {
  struct us_linear_args args = {.w = w,
                                .x = packed,
                                .x_stride = us_linear_packed_width(w->cols),
                                .y = y,
                                .y_stride = y_stride,
                                .R = R,
                                .end = w->rows,
                                .isa = f->isa};
  us_pool_for(f->pool, (w->rows + LINEAR_TILE - 1) / LINEAR_TILE, 1, linear_tiles, &args);
}

/* ---- The dense MLP ---- */

struct swiglu_job {
  struct us_forward *f;
  const float *gate, *up;
  float *inner, *packed;
  size_t F;
};

static void swiglu_rows(void *arg, size_t begin, size_t end, int worker) {
  const struct swiglu_job *job = arg;
  size_t F = job->F, width = us_linear_packed_width(F);
  us_swiglu(&(struct us_swiglu_args){.gate = job->gate + begin * F,
                                     .up = job->up + begin * F,
                                     .y = job->inner + begin * F,
                                     .n = (end - begin) * F,
                                     .round_bf16 = job->f->round_bf16,
                                     .isa = job->f->isa});
  us_linear_pack(job->inner + begin * F, end - begin, F, F, job->packed + begin * width, width);
}

enum us_status us_forward_dense(struct us_forward *f, const struct us_matrix *gate,
                                const struct us_matrix *up, const struct us_matrix *down, float *packed,
                                size_t R, float *y, struct us_err *err) {
  enum us_status status = US_OK;
  size_t F = gate->rows;
  float *g = us_forward_need(f, US_WORK_GATE, R * F, &status, err);
  float *u = us_forward_need(f, US_WORK_UP, R * F, &status, err);
  if (status != US_OK) return status;
  us_forward_linear(f, gate, packed, R, g, F);
  us_forward_linear(f, up, packed, R, u, F);
  struct swiglu_job job = {.f = f, .gate = g, .up = u, .inner = g, .packed = packed, .F = F};
  us_pool_for(f->pool, R, 1, swiglu_rows, &job);
  us_forward_linear(f, down, packed, R, y, down->rows);
  return US_OK;
}

/* ---- Rope and attention ---- */

void us_forward_rope(double theta, uint32_t rotary_dim, const struct us_row *rows, size_t R, float *tables) {
  for (size_t r = 0; r < R; r++) us_rope_table(theta, rotary_dim, rows[r].position, tables + r * rotary_dim);
}

struct attention_job {
  struct us_forward *f;
  const struct us_forward_attention *a;
  float *scratch;
  size_t scratch_floats; /* a worker */
};

/* One task is one row and one KV head with its query heads. */
static void attention_tasks(void *arg, size_t begin, size_t end, int worker) {
  const struct attention_job *job = arg;
  const struct us_forward_attention *a = job->a;
  const struct us_attention_shape *shape = a->shape;
  uint32_t G = shape->kv_heads, per_group = shape->q_heads / G;
  for (size_t i = begin; i < end; i++) {
    size_t r = a->begin + i / G;
    uint32_t g = (uint32_t)(i % G);
    const struct us_row *row = &a->rows[r];
    struct us_attention_keys keys = us_kv_keys(row->kv, a->layer);
    us_attention(&(struct us_attention_args){.keys = &keys,
                                             .q = a->q + r * shape->q_heads * shape->qk_dim,
                                             .H = shape->q_heads,
                                             .position = row->position,
                                             .cached = a->opt_block ? a->block_position : row->position + 1,
                                             .window = shape->window,
                                             .sink = a->sink,
                                             .scale = (float)(1.0 / sqrt(shape->qk_dim)),
                                             .opt_block = a->opt_block,
                                             .block_position = a->block_position,
                                             .block_rows = a->block_rows,
                                             .head_begin = g * per_group,
                                             .head_end = (g + 1) * per_group,
                                             .out = a->out + r * shape->q_heads * shape->v_dim,
                                             .round_bf16 = job->f->round_bf16,
                                             .isa = job->f->isa},
                 job->scratch + (size_t)worker * job->scratch_floats);
  }
}

enum us_status us_forward_attention(struct us_forward *f, const struct us_forward_attention *attention,
                                    struct us_err *err) {
  const struct us_attention_shape *shape = attention->shape;
  struct us_attention_keys widths = {.Q = shape->qk_dim, .V = shape->v_dim};
  struct attention_job job = {.f = f, .a = attention};
  job.scratch_floats = (us_attention_scratch(&widths, shape->q_heads / shape->kv_heads) + 15) / 16 * 16;
  enum us_status status = US_OK;
  job.scratch = us_forward_need(f, US_WORK_SCRATCH, (size_t)us_pool_threads(f->pool) * job.scratch_floats,
                                &status, err);
  if (status != US_OK) return status;
  us_pool_for(f->pool, (attention->end - attention->begin) * shape->kv_heads, 1, attention_tasks, &job);
  return US_OK;
}

enum us_status us_forward_check_kv(const struct us_kv *kv, const struct us_kv_spec *spec,
                                   struct us_err *err) {
  if (!kv) return us_err_set(err, US_ERR_USAGE, "a row has no key/value cache");
  if (us_kv_memory_of(kv))
    return us_err_set(err, US_ERR_USAGE, "the key/value cache lies in the memory of a device");
  const struct us_kv_spec *used = us_kv_spec_used(kv);
  if (used->layers != spec->layers)
    return us_err_set(err, US_ERR_USAGE, "the key/value cache has %u layers, the model %u", used->layers,
                      spec->layers);
  for (uint32_t l = 0; l < spec->layers; l++) {
    const struct us_attention_shape *a = &used->attention[used->kind[l]],
                                    *b = &spec->attention[spec->kind[l]];
    if (a->kv_heads != b->kv_heads || a->qk_dim != b->qk_dim || a->v_dim != b->v_dim ||
        a->window != b->window)
      return us_err_set(err, US_ERR_USAGE,
                        "layer %u of the key/value cache has another geometry than the model's", l);
  }
  return US_OK;
}
