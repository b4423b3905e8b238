/* prefill.c: the memory of prompt passes, and what they leave behind.
 *
 * Contents: sizes; places; creation and end; results.
 */
#include "device/prefill_impl.h"

#include "device/memory.h"
#include "device/weights_layout.h"
#include "kernels/rope/rope.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

const struct us_attention_shape *us_prefill_attention_shape(const struct us_device_weights *w,
                                                            enum us_prefill_attention_kind kind) {
  if (kind == US_PREFILL_DRAFT) return w->draft_shape.layers ? &w->draft_shape.attention : NULL;
  for (uint32_t l = 0; l < w->shape.layers; l++)
    if (w->shape.swa_layer[l] == (kind == US_PREFILL_WINDOWED))
      return kind == US_PREFILL_WINDOWED ? &w->shape.swa : &w->shape.full;
  return NULL;
}

static uint32_t most(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

static uint64_t most_bytes(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

static void size_layer(const struct us_device_weights *w, uint32_t l, uint64_t rows,
                       struct us_prefill_sizes *z) {
  const struct us_device_layer *layer = &w->layers[l];
  z->qkv_stride = most(z->qkv_stride, (layer->qkv.rows + 3) / 4 * 4);
  z->attended = most(z->attended, layer->o_proj.cols);
  z->addends = most(z->addends, w->ranks * us_prefill_parts(&layer->o_proj.pages));
  if (w->shape.moe_layer[l]) {
    z->inner = most_bytes(z->inner, rows * w->shape.top_k * layer->down.cols);
    z->router = most_bytes(z->router, us_prefill_parts(&layer->router.pages) * rows * w->shape.experts);
  } else {
    z->inner = most_bytes(z->inner, rows * layer->down.cols);
    z->addends = most(z->addends, w->ranks * us_prefill_parts(&layer->down.pages));
  }
}

static struct us_prefill_sizes sizes_of(const struct us_device_weights *w,
                                        const struct us_device_prefill_options *o) {
  struct us_prefill_sizes z = {.own_rows = (o->rows + w->ranks - 1) / w->ranks,
                               .addends = w->ranks,
                               .logits_stride = (w->head.rows + 3) / 4 * 4};
  const struct us_attention_shape *windowed = us_prefill_attention_shape(w, US_PREFILL_WINDOWED);
  for (uint32_t l = 0; l < w->shape.layers; l++) size_layer(w, l, o->rows, &z);
  if (w->draft_shape.layers) z.addends = most(z.addends, us_prefill_parts(&w->draft_fc.pages));
  if (windowed)
    z.staging = (uint64_t)(o->rows / US_KV_PAGE + 2) *
                us_engine_page_bytes(windowed->kv_heads / w->ranks, windowed->qk_dim, windowed->v_dim);
  return z;
}

/* ---- places ------------------------------------------------------------------------------------------------------ */

struct arena {
  uintptr_t base;
  uint64_t used;
};

/* NULL for nothing. */
static void *place(struct arena *arena, uint64_t bytes) {
  uintptr_t at = arena->base + arena->used;
  arena->used += us_device_align(bytes);
  return bytes ? (void *)at : NULL;
}

static void place_experts(const struct us_device_weights *w, uint32_t rows, struct arena *a,
                          struct us_prefill_buffers *b) {
  uint64_t pairs = (uint64_t)rows * w->shape.top_k;
  b->routed = place(a, w->shape.layers * pairs * sizeof(uint32_t));
  b->weights = place(a, pairs * sizeof(float));
  b->groups.tile_count = place(a, sizeof(uint32_t));
  b->groups.tiles =
      place(a, us_prefill_most_tiles(w->shape.experts, (uint32_t)pairs) * sizeof(struct us_prefill_tile));
  b->groups.row = place(a, pairs * sizeof(uint32_t));
  b->groups.pair = place(a, pairs * sizeof(uint32_t));
  b->pairs = place(a, pairs * w->shape.hidden * sizeof(float));
}

static void place_all(const struct us_device_weights *w, const struct us_device_prefill_options *o,
                      const struct us_prefill_sizes *z, struct arena *a, struct us_prefill_buffers *b) {
  uint64_t rows = o->rows, own = z->own_rows, D = w->shape.hidden;
  b->tokens = place(a, rows * sizeof(int32_t));
  b->residual = place(a, own * D * sizeof(float));
  b->sums = place(a, z->addends * own * D * sizeof(float));
  b->normed = place(a, rows * D * sizeof(uint16_t));
  b->qkv = place(a, rows * z->qkv_stride * sizeof(float));
  b->attended = place(a, rows * z->attended * sizeof(uint16_t));
  b->router = place(a, z->router * sizeof(float));
  if (z->router) place_experts(w, o->rows, a, b);
  b->inner = place(a, z->inner * sizeof(uint16_t));
  b->staging = place(a, z->staging);
  b->logits = place(a, (uint64_t)o->logit_rows * z->logits_stride * sizeof(float));
  if (w->draft_shape.layers) {
    b->features = place(a, rows * w->draft_shape.taps * D * sizeof(uint16_t));
    b->context = place(a, rows * w->draft_kv.rows * sizeof(float));
  }
  for (int kind = 0; kind < US_PREFILL_KINDS; kind++) {
    const struct us_attention_shape *s = us_prefill_attention_shape(w, (enum us_prefill_attention_kind)kind);
    b->rope[kind] = place(a, s ? (uint64_t)o->max_positions * s->rotary_dim * sizeof(float) : 0);
  }
}

static enum us_status check_options(const struct us_device_weights *w,
                                    const struct us_device_prefill_options *o, struct us_err *err) {
  if (!o->rows || o->rows > US_PREFILL_MAX_ROWS || !o->logit_rows || o->logit_rows > o->rows)
    return us_err_set(err, US_ERR_USAGE, "%u rows a prompt chunk, %u with logits: 1 to %d rows", o->rows,
                      o->logit_rows, US_PREFILL_MAX_ROWS);
  if (w->shape.experts > US_PREFILL_MAX_EXPERTS || w->shape.top_k > US_ENGINE_MAX_TOPK)
    return us_err_set(err, US_ERR_USAGE, "%u experts, %u a row: prompt passes have at most %d, %d",
                      w->shape.experts, w->shape.top_k, US_PREFILL_MAX_EXPERTS, US_ENGINE_MAX_TOPK);
  for (int kind = 0; kind < US_PREFILL_DRAFT; kind++) {
    const struct us_attention_shape *s = us_prefill_attention_shape(w, (enum us_prefill_attention_kind)kind);
    if (s && (s->qk_dim > 192 || s->v_dim > 128 || s->v_dim % 8))
      return us_err_set(err, US_ERR_USAGE,
                        "heads of %u and %u: prompt passes have at most 192, and 128 in steps of 8",
                        s->qk_dim, s->v_dim);
  }
  return US_OK;
}

enum us_status us_device_prefill_bytes(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                       uint32_t ranks, const struct us_device_prefill_options *options,
                                       uint64_t *ret_bytes, struct us_err *err) {
  struct us_device_weights *w = NULL;
  enum us_status status = us_device_weights_layout(shape, opt_draft, 0, ranks, &w, err);
  if (status != US_OK) return status;
  struct arena arena = {US_DEVICE_ALIGN, 0};
  struct us_prefill_buffers buffers = {0};
  struct us_prefill_sizes sizes = sizes_of(w, options);
  status = check_options(w, options, err);
  place_all(w, options, &sizes, &arena, &buffers);
  *ret_bytes = arena.used;
  us_device_layout_free(w);
  return status;
}

/* ---- creation and end -------------------------------------------------------------------------------------------- */

static enum us_status fill_rope(const struct us_attention_shape *s, uint32_t positions, float *device,
                                struct us_err *err) {
  size_t bytes = (size_t)positions * s->rotary_dim * sizeof(float);
  float *table = malloc(bytes ? bytes : 1);
  if (!table) return us_err_memory(err, "rope tables", bytes);
  for (uint32_t p = 0; p < positions; p++)
    us_rope_table(s->rope_theta, s->rotary_dim, p, table + (size_t)p * s->rotary_dim);
  enum us_status status = us_device_upload(device, table, bytes, "rope tables", err);
  free(table);
  return status;
}

static enum us_status create_rank(struct us_device_prefill *p, uint32_t r, struct us_err *err) {
  struct us_prefill_rank *rank = &p->rank[r];
  const struct us_device_weights *w = rank->weights;
  struct arena count = {US_DEVICE_ALIGN, 0};
  us_devices_use(p->devices, us_devices_gpu(p->devices, r));
  place_all(w, &p->options, &p->sizes, &count, &rank->buffers);
  enum us_status status =
      us_cuda_status((int)cudaMalloc(&rank->arena, count.used), "memory of prompt passes", err);
  if (status != US_OK) return status;
  struct arena arena = {(uintptr_t)rank->arena, 0};
  place_all(w, &p->options, &p->sizes, &arena, &rank->buffers);
  for (int kind = 0; status == US_OK && kind < US_PREFILL_KINDS; kind++) {
    const struct us_attention_shape *s = us_prefill_attention_shape(w, (enum us_prefill_attention_kind)kind);
    if (s) status = fill_rope(s, p->options.max_positions, rank->buffers.rope[kind], err);
  }
  cudaEvent_t event = NULL;
  if (status == US_OK)
    status = us_cuda_status((int)cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event", err);
  rank->arrived = event;
  return status;
}

enum us_status us_device_prefill_create(struct us_devices *devices, struct us_device_weights *const *weights,
                                        const struct us_device_prefill_options *options,
                                        struct us_device_prefill **ret_prefill, struct us_err *err) {
  *ret_prefill = NULL;
  enum us_status status = check_options(weights[0], options, err);
  if (status != US_OK) return status;
  struct us_device_prefill *p = calloc(1, sizeof *p);
  if (!p) return us_err_memory(err, "prompt passes", sizeof *p);
  p->devices = devices, p->options = *options, p->sizes = sizes_of(weights[0], options);
  for (uint32_t r = 0; status == US_OK && r < devices->ranks; r++) {
    p->rank[r].weights = weights[r];
    status = create_rank(p, r, err);
  }
  if (status != US_OK) {
    us_device_prefill_free(p);
    return status;
  }
  *ret_prefill = p;
  return US_OK;
}

void us_device_prefill_free(struct us_device_prefill *p) {
  if (!p) return;
  for (uint32_t r = 0; r < p->devices->ranks; r++) {
    us_devices_use(p->devices, us_devices_gpu(p->devices, r));
    (void)cudaFree(p->rank[r].arena);
    if (p->rank[r].arrived) (void)cudaEventDestroy(p->rank[r].arrived);
  }
  free(p);
}

void us_device_prefill_caches(struct us_device_prefill *p, const struct us_kv_pool *target,
                              const struct us_kv_pool *opt_draft) {
  for (uint32_t r = 0; r < p->devices->ranks; r++) {
    p->rank[r].pool = (uint8_t *)us_kv_pool_pages(target, r);
    p->rank[r].draft_pool = opt_draft ? (uint8_t *)us_kv_pool_pages(opt_draft, r) : NULL;
  }
}

/* ---- results ----------------------------------------------------------------------------------------------------- */

struct us_device_prefill_result us_device_prefill_result(const struct us_device_prefill *p, uint32_t r) {
  const struct us_prefill_rank *rank = &p->rank[r];
  const struct us_device_weights *w = rank->weights;
  return (struct us_device_prefill_result){.logits = rank->buffers.logits,
                                           .logits_stride = p->sizes.logits_stride,
                                           .logits_first = r * w->embed_rows,
                                           .logits_count = w->head.rows,
                                           .features = rank->buffers.features,
                                           .routed = rank->buffers.routed};
}

enum us_status us_device_prefill_fetch_logits(struct us_device_prefill *p, uint32_t rows, float *logits,
                                              struct us_err *err) {
  size_t N = p->rank[0].weights->shape.vocab;
  for (uint32_t r = 0; r < p->devices->ranks; r++) {
    struct us_device_prefill_result from = us_device_prefill_result(p, r);
    uint32_t gpu = us_devices_gpu(p->devices, r);
    if (!from.logits_count) continue;
    us_devices_use(p->devices, gpu);
    int code = (int)cudaMemcpy2DAsync(logits + from.logits_first, N * sizeof(float), from.logits,
                                      from.logits_stride * sizeof(float), from.logits_count * sizeof(float),
                                      rows, cudaMemcpyDeviceToHost, p->devices->stream[gpu]);
    enum us_status status = us_cuda_status(code, "logits of a prompt", err);
    if (status != US_OK) return status;
  }
  return us_devices_sync(p->devices, NULL, 0, err);
}
