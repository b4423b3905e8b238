/* lower.c: from a shape to a tile program.
 *
 * Contents: bytes of a layer's matrices; one layer; the three programs.
 */
#include "plan/lower.h"

#include "plan/builder.h"

#include <stdlib.h>
#include <string.h>

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

/* Weight bytes that one pass over a layer streams, by op; experts: of one expert. */
struct layer_bytes {
  uint64_t qkv, o_proj, router, up, down;
};

static uint64_t format_bytes(enum us_format format, uint64_t rows, uint64_t cols, uint64_t chunk_rows) {
  return us_matrix_data_bytes(format, rows, cols) + us_matrix_scale_bytes(format, rows, cols, chunk_rows);
}

static uint64_t matrix_bytes(const struct us_matrix *w) {
  return w->format == US_FORMAT_NONE ? 0 : format_bytes(w->format, w->rows, w->cols, w->scale_chunk_rows);
}

static struct layer_bytes model_layer_bytes(const struct us_layer *layer, bool moe) {
  struct layer_bytes bytes = {.qkv = matrix_bytes(&layer->qkv) + matrix_bytes(&layer->q) +
                                     matrix_bytes(&layer->k) + matrix_bytes(&layer->v),
                              .o_proj = matrix_bytes(&layer->o_proj)};
  const struct us_matrix *gate = moe ? &layer->experts[0].gate : &layer->gate;
  const struct us_matrix *up = moe ? &layer->experts[0].up : &layer->up;
  const struct us_matrix *down = moe ? &layer->experts[0].down : &layer->down;
  bytes.up = matrix_bytes(gate) + matrix_bytes(up);
  bytes.down = matrix_bytes(down);
  if (moe) bytes.router = matrix_bytes(&layer->router);
  return bytes;
}

static struct layer_bytes shape_layer_bytes(const struct us_shape *shape, uint32_t l) {
  const struct us_attention_shape *a = us_shape_attention(shape, l);
  const struct us_precision *precision = &shape->precision;
  uint64_t qkv_rows = us_attention_qkv_rows(a), D = shape->hidden;
  bool moe = shape->moe_layer[l];
  enum us_format mlp = moe ? precision->experts : precision->dense;
  uint64_t F = moe ? shape->expert_inner : shape->dense_inner;
  return (struct layer_bytes){
      .qkv = format_bytes(precision->qkv, qkv_rows, D, shape->qkv_chunks ? qkv_rows / shape->qkv_chunks : 0),
      .o_proj = format_bytes(precision->o_proj, D, (uint64_t)a->q_heads * a->v_dim, 0),
      .router = moe ? format_bytes(precision->router, shape->experts, D, 0) : 0,
      .up = 2 * format_bytes(mlp, F, D, 0),
      .down = format_bytes(mlp, D, F, 0)};
}

static uint64_t head_bytes(const struct us_shape *shape, const struct us_lower_options *options) {
  if (options->model) return matrix_bytes(&options->model->head);
  return format_bytes(shape->precision.head, shape->vocab, shape->hidden, 0);
}

/* A drafter's own head, or the target's. */
static uint64_t draft_head_bytes(const struct us_draft_shape *draft, const struct us_shape *target,
                                 const struct us_lower_options *options) {
  if (options->draft && options->draft->head.rows) return matrix_bytes(&options->draft->head);
  if (draft->head == US_FORMAT_NONE) return head_bytes(target, options);
  return format_bytes(draft->head, target->vocab, target->hidden, 0);
}

/* Share of rank r, so that the ranks' shares add up to the whole. */
static uint64_t share(uint64_t bytes, uint32_t rank, uint32_t ranks) {
  return bytes * (rank + 1) / ranks - bytes * rank / ranks;
}

/* ---- one layer --------------------------------------------------------------------------------------------------- */

/* What lowering carries from op to op. `normed` is the event after which every rank's normed rows stand. */
struct lowering {
  struct us_builder builder;
  struct us_lower_options options;
  uint32_t normed[US_TASK_WAITS * 2]; /* by rank */
};

#define MAX_RANKS (US_TASK_WAITS * 2)

static struct us_lower_options with_defaults(const struct us_lower_options *options) {
  struct us_lower_options o = *options;
  if (!o.ranks) o.ranks = 1;
  if (!o.rows) o.rows = 1;
  if (!o.tile) o.tile = 64;
  if (!o.head_tile) o.head_tile = 256;
  if (!o.row_tile) o.row_tile = 4;
  return o;
}

/* Append one op of one rank, cut into tiles of options.tile unless the tiling says otherwise. */
static void add_op(struct lowering *lw, struct us_tiling tiling, uint32_t wait, uint32_t signal) {
  if (!tiling.tile) tiling.tile = lw->options.tile;
  tiling.waits = us_wait1(wait);
  tiling.signal = signal;
  us_builder_tiles(&lw->builder, &tiling);
}

/* Residual add (of attention: 0, of the MLP: 1) and norm on every rank, after `after`; sets lw->normed. */
static void lower_residual_norm(struct lowering *lw, enum us_task_op op, uint32_t layer, uint32_t of,
                                uint32_t after) {
  for (uint32_t rank = 0; rank < lw->options.ranks; rank++) {
    uint32_t done = us_builder_event(&lw->builder);
    add_op(lw,
           (struct us_tiling){.op = op,
                              .layer = layer,
                              .rank = rank,
                              .slot = of,
                              .end = lw->options.rows,
                              .tile = lw->options.row_tile},
           after, done);
    lw->normed[rank] = done;
  }
}

static void lower_attention(struct lowering *lw, uint32_t layer, const struct us_program_dims *dims,
                            uint32_t kind, const struct layer_bytes *bytes) {
  uint32_t ranks = lw->options.ranks, partial = us_builder_event(&lw->builder);
  for (uint32_t rank = 0; rank < ranks; rank++) {
    uint32_t projected = us_builder_event(&lw->builder), attended = us_builder_event(&lw->builder);
    add_op(lw,
           (struct us_tiling){.op = US_TASK_QKV,
                              .layer = layer,
                              .rank = rank,
                              .end = dims->qkv_rows[kind],
                              .bytes = share(bytes->qkv, rank, ranks)},
           lw->normed[rank], projected);
    add_op(lw,
           (struct us_tiling){
               .op = US_TASK_ATTENTION, .layer = layer, .rank = rank, .end = dims->kv_heads[kind], .tile = 1},
           projected, attended);
    add_op(lw,
           (struct us_tiling){.op = US_TASK_O_PROJ,
                              .layer = layer,
                              .rank = rank,
                              .end = dims->hidden,
                              .bytes = share(bytes->o_proj, rank, ranks)},
           attended, partial);
  }
  lower_residual_norm(lw, US_TASK_RESIDUAL_NORM, layer, 0, partial);
}

static uint32_t lower_dense(struct lowering *lw, uint32_t layer, const struct us_program_dims *dims,
                            const struct layer_bytes *bytes) {
  uint32_t ranks = lw->options.ranks, partial = us_builder_event(&lw->builder);
  for (uint32_t rank = 0; rank < ranks; rank++) {
    uint32_t inner = us_builder_event(&lw->builder);
    add_op(lw,
           (struct us_tiling){.op = US_TASK_DENSE_UP,
                              .layer = layer,
                              .rank = rank,
                              .end = dims->dense_inner,
                              .bytes = share(bytes->up, rank, ranks)},
           lw->normed[rank], inner);
    add_op(lw,
           (struct us_tiling){.op = US_TASK_DENSE_DOWN,
                              .layer = layer,
                              .rank = rank,
                              .end = dims->hidden,
                              .bytes = share(bytes->down, rank, ranks)},
           inner, partial);
  }
  return partial;
}

/* Router on every rank redundantly (all see the same rounded sums), then a shard of every active expert. */
static uint32_t lower_moe(struct lowering *lw, uint32_t layer, const struct us_program_dims *dims,
                          const struct layer_bytes *bytes) {
  uint32_t ranks = lw->options.ranks, partial = us_builder_event(&lw->builder);
  for (uint32_t rank = 0; rank < ranks; rank++) {
    uint32_t scored = us_builder_event(&lw->builder), routed = us_builder_event(&lw->builder);
    uint32_t inner = us_builder_event(&lw->builder);
    add_op(
        lw,
        (struct us_tiling){
            .op = US_TASK_ROUTER, .layer = layer, .rank = rank, .end = dims->experts, .bytes = bytes->router},
        lw->normed[rank], scored);
    add_op(lw, (struct us_tiling){.op = US_TASK_ROUTE, .layer = layer, .rank = rank, .end = 1, .tile = 1},
           scored, routed);
    for (uint32_t slot = 0; slot < dims->slots; slot++)
      add_op(lw,
             (struct us_tiling){.op = US_TASK_EXPERT_UP,
                                .layer = layer,
                                .rank = rank,
                                .slot = slot,
                                .end = dims->expert_inner,
                                .bytes = share(bytes->up, rank, ranks)},
             routed, inner);
    add_op(lw,
           (struct us_tiling){.op = US_TASK_EXPERT_DOWN,
                              .layer = layer,
                              .rank = rank,
                              .end = dims->hidden,
                              .bytes = share(bytes->down, rank, ranks)},
           inner, partial);
  }
  return partial;
}

static void lower_head(struct lowering *lw, const struct us_program_dims *dims, uint64_t bytes) {
  for (uint32_t rank = 0; rank < lw->options.ranks; rank++) {
    uint32_t begin = us_program_first_id(lw->builder.program, rank),
             end = us_program_first_id(lw->builder.program, rank + 1);
    add_op(lw,
           (struct us_tiling){.op = US_TASK_HEAD,
                              .layer = US_LAYER_NONE,
                              .rank = rank,
                              .begin = begin,
                              .end = end,
                              .tile = lw->options.head_tile,
                              .bytes = bytes * end / dims->vocab - bytes * begin / dims->vocab},
           lw->normed[rank], US_EVENT_NONE);
  }
}

/* ---- programs ---------------------------------------------------------------------------------------------------- */

static enum us_status check_ranks(const struct us_program_dims *whole, uint32_t ranks, struct us_err *err) {
  if (ranks > MAX_RANKS) return us_err_set(err, US_ERR_USAGE, "%u ranks: at most %d", ranks, MAX_RANKS);
  for (int kind = 0; kind < 2; kind++)
    if (whole->kv_heads[kind] % ranks)
      return us_err_set(err, US_ERR_USAGE, "%u KV heads cannot be shared by %u ranks", whole->kv_heads[kind],
                        ranks);
  if (whole->dense_inner % (ranks * US_MXFP4_GROUP))
    return us_err_set(err, US_ERR_USAGE, "dense inner size %u cannot be shared by %u ranks in groups of %d",
                      whole->dense_inner, ranks, US_MXFP4_GROUP);
  if (whole->expert_inner % (ranks * US_MXFP4_GROUP))
    return us_err_set(err, US_ERR_USAGE, "expert inner size %u cannot be shared by %u ranks in groups of %d",
                      whole->expert_inner, ranks, US_MXFP4_GROUP);
  return US_OK;
}

static void shard_dims(struct us_program_dims *dims, uint32_t ranks) {
  for (int kind = 0; kind < 2; kind++) {
    dims->qkv_rows[kind] /= ranks;
    dims->kv_heads[kind] /= ranks;
    dims->attended[kind] /= ranks;
  }
  dims->dense_inner /= ranks;
  dims->expert_inner /= ranks;
}

static void attention_dims(struct us_program_dims *dims, int kind, const struct us_attention_shape *a) {
  dims->qkv_rows[kind] = us_attention_qkv_rows(a);
  dims->kv_heads[kind] = a->kv_heads;
  dims->attended[kind] = a->q_heads * a->v_dim;
}

static enum us_status create_program(enum us_program_kind kind, uint32_t ranks,
                                     const struct us_program_dims *whole, struct us_program **ret_program,
                                     struct us_err *err) {
  enum us_status status = check_ranks(whole, ranks, err);
  if (status != US_OK) return status;
  struct us_program *program = calloc(1, sizeof *program);
  if (!program) return us_err_memory(err, "the tile program", sizeof *program);
  program->kind = kind;
  program->ranks = ranks;
  program->dims = *whole;
  shard_dims(&program->dims, ranks);
  program->swa_layer = calloc(whole->layers, 1);
  program->moe_layer = calloc(whole->layers, 1);
  if (!program->swa_layer || !program->moe_layer) {
    us_program_free(program);
    return us_err_memory(err, "the tile program", 2 * whole->layers);
  }
  *ret_program = program;
  return US_OK;
}

static enum us_status finish_program(struct lowering *lw, struct us_program **ret_program,
                                     struct us_err *err) {
  enum us_status status = us_builder_finish(&lw->builder, err);
  if (status == US_OK) {
    *ret_program = lw->builder.program;
    return US_OK;
  }
  us_program_free(lw->builder.program);
  return status;
}

enum us_status us_lower_target(const struct us_shape *shape, const struct us_lower_options *options,
                               struct us_program **ret_program, struct us_err *err) {
  struct lowering lw = {.options = with_defaults(options)};
  uint64_t routed = (uint64_t)lw.options.rows * shape->top_k;
  struct us_program_dims whole = {.rows = lw.options.rows,
                                  .hidden = shape->hidden,
                                  .vocab = shape->vocab,
                                  .layers = shape->layers,
                                  .experts = shape->experts,
                                  .slots = routed < shape->experts ? (uint32_t)routed : shape->experts,
                                  .expert_inner = shape->expert_inner,
                                  .dense_inner = shape->dense_inner};
  attention_dims(&whole, 0, &shape->full);
  attention_dims(&whole, 1, &shape->swa);
  struct us_program *program;
  enum us_status status = create_program(US_PROGRAM_TARGET, lw.options.ranks, &whole, &program, err);
  if (status != US_OK) return status;
  memcpy(program->swa_layer, shape->swa_layer, shape->layers);
  memcpy(program->moe_layer, shape->moe_layer, shape->layers);

  us_builder_init(&lw.builder, program);
  lower_residual_norm(&lw, US_TASK_EMBED_NORM, 0, 0, US_EVENT_NONE);
  for (uint32_t l = 0; l < shape->layers; l++) {
    bool moe = shape->moe_layer[l];
    struct layer_bytes bytes =
        options->model ? model_layer_bytes(&options->model->layers[l], moe) : shape_layer_bytes(shape, l);
    lower_attention(&lw, l, &program->dims, shape->swa_layer[l], &bytes);
    uint32_t partial =
        moe ? lower_moe(&lw, l, &program->dims, &bytes) : lower_dense(&lw, l, &program->dims, &bytes);
    lower_residual_norm(&lw, US_TASK_RESIDUAL_NORM, l, 1, partial);
  }
  if (!options->no_head) lower_head(&lw, &program->dims, head_bytes(shape, options));
  return finish_program(&lw, ret_program, err);
}

static struct us_program_dims draft_dims(const struct us_draft_shape *draft, const struct us_shape *target,
                                         uint32_t rows) {
  struct us_program_dims whole = {.rows = rows,
                                  .hidden = draft->hidden,
                                  .vocab = target->vocab,
                                  .layers = draft->layers,
                                  .dense_inner = draft->inner,
                                  .features = draft->taps * draft->hidden};
  attention_dims(&whole, 1, &draft->attention);
  return whole;
}

static struct layer_bytes draft_layer_bytes(const struct us_draft_shape *draft, const struct us_shape *target,
                                            const struct us_lower_options *options, uint32_t l) {
  const struct us_attention_shape *a = &draft->attention;
  enum us_format format = target->precision.draft;
  uint64_t D = draft->hidden, F = draft->inner;
  if (!options->draft)
    return (struct layer_bytes){.qkv = format_bytes(format, us_attention_qkv_rows(a), D, 0),
                                .o_proj = format_bytes(format, D, (uint64_t)a->q_heads * a->v_dim, 0),
                                .up = 2 * format_bytes(format, F, D, 0),
                                .down = format_bytes(format, D, F, 0)};
  const struct us_draft_layer *layer = &options->draft->layers[l];
  return (struct layer_bytes){.qkv =
                                  matrix_bytes(&layer->q) + matrix_bytes(&layer->k) + matrix_bytes(&layer->v),
                              .o_proj = matrix_bytes(&layer->o_proj),
                              .up = matrix_bytes(&layer->gate) + matrix_bytes(&layer->up),
                              .down = matrix_bytes(&layer->down)};
}

enum us_status us_lower_draft(const struct us_draft_shape *draft, const struct us_shape *target,
                              const struct us_lower_options *options, struct us_program **ret_program,
                              struct us_err *err) {
  struct lowering lw = {.options = with_defaults(options)};
  struct us_program_dims whole = draft_dims(draft, target, lw.options.rows);
  struct us_program *program;
  enum us_status status = create_program(US_PROGRAM_DRAFT, lw.options.ranks, &whole, &program, err);
  if (status != US_OK) return status;
  memset(program->swa_layer, 1, draft->layers);

  us_builder_init(&lw.builder, program);
  lower_residual_norm(&lw, US_TASK_EMBED_NORM, 0, 0, US_EVENT_NONE);
  for (uint32_t l = 0; l < draft->layers; l++) {
    struct layer_bytes bytes = draft_layer_bytes(draft, target, options, l);
    lower_attention(&lw, l, &program->dims, 1, &bytes);
    lower_residual_norm(&lw, US_TASK_RESIDUAL_NORM, l, 1, lower_dense(&lw, l, &program->dims, &bytes));
  }
  if (!options->no_head) lower_head(&lw, &program->dims, draft_head_bytes(draft, target, options));
  return finish_program(&lw, ret_program, err);
}

enum us_status us_lower_context(const struct us_draft_shape *draft, const struct us_shape *target,
                                const struct us_lower_options *options, struct us_program **ret_program,
                                struct us_err *err) {
  struct lowering lw = {.options = with_defaults(options)};
  struct us_program_dims whole = draft_dims(draft, target, lw.options.rows);
  struct us_program *program;
  enum us_status status = create_program(US_PROGRAM_CONTEXT, lw.options.ranks, &whole, &program, err);
  if (status != US_OK) return status;
  memset(program->swa_layer, 1, draft->layers);

  us_builder_init(&lw.builder, program);
  const struct us_attention_shape *a = &draft->attention;
  uint64_t fc_bytes = options->draft
                          ? matrix_bytes(&options->draft->fc)
                          : format_bytes(target->precision.draft, draft->hidden, whole.features, 0);
  uint32_t fused = us_builder_event(&lw.builder);
  for (uint32_t rank = 0; rank < lw.options.ranks; rank++)
    add_op(&lw,
           (struct us_tiling){.op = US_TASK_CONTEXT_FC,
                              .layer = US_LAYER_NONE,
                              .rank = rank,
                              .begin = us_program_first_fused(program, rank),
                              .end = us_program_first_fused(program, rank + 1),
                              .bytes = share(fc_bytes, rank, lw.options.ranks)},
           US_EVENT_NONE, fused);
  lower_residual_norm(&lw, US_TASK_CONTEXT_NORM, US_LAYER_NONE, 0, fused);
  for (uint32_t l = 0; l < draft->layers; l++) {
    /* k and v rows only: the context has no queries. */
    uint64_t kv_rows = (uint64_t)a->kv_heads * (a->qk_dim + a->v_dim);
    uint64_t bytes = options->draft ? matrix_bytes(&options->draft->layers[l].k) +
                                          matrix_bytes(&options->draft->layers[l].v)
                                    : format_bytes(target->precision.draft, kv_rows, draft->hidden, 0);
    for (uint32_t rank = 0; rank < lw.options.ranks; rank++)
      add_op(&lw,
             (struct us_tiling){.op = US_TASK_CONTEXT_KV,
                                .layer = l,
                                .rank = rank,
                                .end = program->dims.kv_heads[1],
                                .tile = 1,
                                .bytes = share(bytes, rank, lw.options.ranks)},
             lw.normed[rank], US_EVENT_NONE);
  }
  return finish_program(&lw, ret_program, err);
}

void us_program_free(struct us_program *program) {
  if (!program) return;
  free(program->swa_layer);
  free(program->moe_layer);
  free(program->tasks);
  free(program->event_totals);
  free(program);
}
