/* parity_models.h: the models that the parity programs run: random ones, cut ones of published width, the bundled one; the CPU's
 * executor of each, and executors on GPUs.
 *
 *     struct models m = open_random("wide", widen);
 *     struct us_executor *ex = open_cuda(&m, &(struct us_executor_cuda_options){.ranks = 2});
 *     ...
 *     ex->ops->free(ex);
 *     close_models(&m);
 */
#ifndef US_TESTS_GPU_PARITY_MODELS_H
#define US_TESTS_GPU_PARITY_MODELS_H

#include "device/executor.h"
#include "model/checkpoint.h"
#include "model/precision.h"
#include "model/random.h"
#include "parity.h"
#include "plan/tiles.h"

#define SEQUENCES 8

struct models {
  const char *name;
  struct us_model *model;
  struct us_draft *draft;
  struct us_pool *pool;
  struct us_executor *cpu;
  struct us_draft *shared; /* what the drafter shares its matrices with; NULL: it has its own */
};

static inline void say(void *arg, const char *line) {
  fprintf(stderr, "%s\n", line);
}

/* Room for 8 ranks, and every format that experts and projections come in. */
static inline void widen(struct us_shape *s) {
  snprintf(s->name, sizeof s->name, "wide");
  s->hidden = 256, s->dense_inner = 512, s->expert_inner = 512, s->experts = 32, s->top_k = 8;
  s->full.q_heads = s->swa.q_heads = 16, s->full.kv_heads = s->swa.kv_heads = 8;
  s->full.qk_dim = s->swa.qk_dim = s->full.v_dim = s->swa.v_dim =
      32; /* a chunk is 128 rows: FP8 blocks are whole */
  s->qkv_chunks = 8;
  s->precision.experts = US_FORMAT_MXFP4, s->precision.qkv = US_FORMAT_FP8;
}

/* As many layers as MiMo-V2.5-Pro has, small ones, for 4 ranks. */
static inline void deepen(struct us_shape *s) {
  snprintf(s->name, sizeof s->name, "deep");
  s->layers = 70, s->dense_inner = s->expert_inner = 128, s->experts = 8, s->top_k = 2;
  for (uint32_t l = 0; l < s->layers; l++) s->swa_layer[l] = l % 7 != 0, s->moe_layer[l] = l != 0;
}

/* A dense layer of full attention and a windowed one with experts: as few operations a round as have every kind, for 8 ranks. */
static inline void shorten(struct us_shape *s) {
  widen(s);
  snprintf(s->name, sizeof s->name, "short");
  s->layers = 2, s->dense_inner = s->expert_inner = 128, s->experts = 8, s->top_k = 2;
}

/* Contexts of 32 K. */
static inline void lengthen(struct us_shape *s) {
  widen(s);
  snprintf(s->name, sizeof s->name, "long");
  s->max_positions = 33792;
}

/* Choice of experts is spread out, so that near-ties are rare; scores still decide between neighbours. */
static inline void spread_router(struct us_model *m) {
  uint32_t word = 12345;
  for (uint32_t l = 0; l < m->shape.layers; l++)
    for (uint32_t e = 0; m->layers[l].router_bias && e < m->shape.experts; e++) {
      word = word * 1664525u + 1013904223u;
      m->layers[l].router_bias[e] = (float)(word >> 16) * 0x1p-15f;
    }
}

static inline struct models open_drafted(const char *name, const struct us_shape *shape,
                                         const struct us_draft_shape *draft) {
  struct models m = {.name = name};
  struct us_err err = {0};
  need(us_pool_create(0, &m.pool, &err), &err, name);
  need(us_shape_check(shape, &err), &err, name);
  need(us_model_random(shape, 5, m.pool, &m.model, &err), &err, name);
  need(us_draft_random(draft, US_FORMAT_BF16, 6, m.pool, &m.draft, &err), &err, name);
  spread_router(m.model);
  need(us_executor_create_tiles(m.model, m.draft, m.pool, US_ROUND_BF16, &m.cpu, &err), &err, name);
  return m;
}

static inline struct models open_shape(const char *name, const struct us_shape *shape, uint32_t heads) {
  struct us_draft_shape draft = draft_shape(shape, heads, 16);
  return open_drafted(name, shape, &draft);
}

/* A drafter whose slots are chosen one after the other. */
static inline struct models open_markov(const char *name, void (*change)(struct us_shape *shape)) {
  struct us_shape shape;
  struct us_err err = {0};
  need(us_shape_load("tiny-pro", &shape, &err), &err, name);
  if (change) change(&shape);
  struct us_draft_shape draft = draft_shape(&shape, change ? 8 : 2, 16);
  draft.markov = 64;
  return open_drafted(name, &shape, &draft);
}

/* A built-in shape, or tiny-pro changed by `change`, which may be NULL. */
static inline struct models open_random(const char *name, void (*change)(struct us_shape *shape)) {
  struct us_shape shape;
  struct us_err err = {0};
  need(us_shape_load(change ? "tiny-pro" : name, &shape, &err), &err, name);
  if (change) change(&shape);
  return open_shape(name, &shape, change && shape.full.kv_heads >= 8 ? 8 : change ? 4 : 2);
}

/* MiMo-V2.5-Pro's widths and formats: a dense layer and two with experts, one of each attention. */
static inline struct models open_pro(const char *name) {
  struct us_shape shape;
  struct us_err err = {0};
  need(us_shape_load("mimo-v2.5-pro", &shape, &err), &err, name);
  shape.layers = 4, shape.experts = 12, shape.vocab = 4096, shape.max_positions = 1024;
  for (uint32_t l = 0; l < shape.layers; l++)
    shape.swa_layer[l] = l == 1, shape.moe_layer[l] = l == 1 || l == 3;
  shape.stop_count = 0;
  return open_shape(name, &shape, 8);
}

/* data/models/pico; false if $ULTRASPEED_DATA does not say where. */
static inline bool open_pico(struct models *ret_models) {
  const char *data = getenv("ULTRASPEED_DATA");
  char path[1024];
  struct models m = {.name = "pico"};
  struct us_err err = {0};
  if (!data) return false;
  snprintf(path, sizeof path, "%s/models/pico/pico.h5", data);
  need(us_model_open(path, &m.model, &err), &err, path);
  snprintf(path, sizeof path, "%s/models/pico/draft.h5", data);
  need(us_draft_open(path, &m.draft, &err), &err, path);
  need(us_pool_create(0, &m.pool, &err), &err, "pico");
  need(us_executor_create_tiles(m.model, m.draft, m.pool, US_ROUND_BF16, &m.cpu, &err), &err, "pico");
  *ret_models = m;
  return true;
}

/* The drafter with a copy of the target's head of its own, by another name. */
static inline void give_head(struct models *m, enum us_format format, const char *name) {
  struct us_matrix_encoding encoding = {.format = format};
  struct us_draft *draft;
  struct us_err err = {0};
  need(us_draft_with_head(m->draft, &m->model->head, &encoding, m->pool, &draft, &err), &err, name);
  m->cpu->ops->free(m->cpu);
  m->name = name, m->shared = m->draft, m->draft = draft;
  need(us_executor_create_tiles(m->model, draft, m->pool, US_ROUND_BF16, &m->cpu, &err), &err, name);
}

static inline void close_models(struct models *m) {
  m->cpu->ops->free(m->cpu);
  us_draft_free(m->draft);
  us_draft_free(m->shared);
  us_model_free(m->model);
  us_pool_free(m->pool);
}

/* With room for all sequences and a prompt, on one GPU unless the options say otherwise. */
static inline struct us_executor *open_cuda(const struct models *m,
                                            const struct us_executor_cuda_options *opt_options) {
  struct us_executor_cuda_options options = {0};
  struct us_executor *ex;
  struct us_err err = {0};
  if (opt_options) options = *opt_options;
  if (!options.gpus) options.gpus = 1;
  if (!options.sequences) options.sequences = SEQUENCES + 1;
  options.say = say;
  options.timeout_ns = (uint64_t)watchdog_seconds(0) * 1000000000u;
  need(us_executor_create_cuda(m->model, m->draft, &options, &ex, &err), &err, m->name);
  return ex;
}

#endif
