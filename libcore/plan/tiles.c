/* tiles.c: the CPU executor of tile programs.
 *
 * Contents: layers as tasks see them; programs kept by kind and rows; running a pass; the executor's operations.
 */
#include "plan/tiles.h"

#include "formats/bf16.h"
#include "kernels/rope/rope.h"
#include "model/markov.h"
#include "plan/check.h"
#include "plan/lower.h"
#include "plan/runner.h"
#include "plan/tile_buffers.h"

#include <stdlib.h>
#include <string.h>

/* Programs are kept for this many (kind, rows, head) combinations; the least recently used makes room. Decode uses one
 * to sixteen rows, prefill 512 and a remainder. */
#define PROGRAMS_KEPT 64

struct kept_program {
  struct us_program *program;
  enum us_program_kind kind;
  uint32_t rows;
  bool no_head;
  uint64_t used; /* when, in passes */
};

struct tiles {
  struct us_executor base;
  struct us_pool *pool;
  struct us_tile_layer *target_layers, *draft_layers;
  struct kept_program kept[PROGRAMS_KEPT];
  struct us_runner runner;
  struct us_tile_buffers buffers;
  struct us_row draft_rows[US_MAX_BLOCK];
  struct us_row *context_rows;
  size_t context_capacity;
  struct us_kv_spec spec, draft_spec;
  struct us_markov *markov;  /* NULL: the drafter has no such head */
  struct us_forward forward; /* of what it adds */
};

/* ---- layers as tasks see them ------------------------------------------------------------------------------------ */

static struct us_tile_layer target_layer(const struct us_model *model, uint32_t l) {
  const struct us_layer *layer = &model->layers[l];
  bool fused = layer->qkv.format != US_FORMAT_NONE, moe = model->shape.moe_layer[l];
  return (struct us_tile_layer){
      .attention = us_shape_attention(&model->shape, l),
      .chunks = fused ? model->shape.qkv_chunks : 0,
      .projection = {fused ? &layer->qkv : &layer->q, fused ? NULL : &layer->k, fused ? NULL : &layer->v},
      .o_proj = &layer->o_proj,
      .gate = moe ? NULL : &layer->gate,
      .up = moe ? NULL : &layer->up,
      .down = moe ? NULL : &layer->down,
      .router = moe ? &layer->router : NULL,
      .input_norm = layer->input_norm,
      .post_norm = layer->post_norm,
      .sink = layer->sink,
      .router_bias = layer->router_bias,
      .experts = layer->experts};
}

static struct us_tile_layer draft_layer(const struct us_draft *draft, uint32_t l) {
  const struct us_draft_layer *layer = &draft->layers[l];
  return (struct us_tile_layer){.attention = &draft->shape.attention,
                                .projection = {&layer->q, &layer->k, &layer->v},
                                .o_proj = &layer->o_proj,
                                .gate = &layer->gate,
                                .up = &layer->up,
                                .down = &layer->down,
                                .input_norm = layer->input_norm,
                                .post_norm = layer->post_norm,
                                .sink = layer->sink,
                                .q_norm = layer->q_norm,
                                .k_norm = layer->k_norm};
}

/* ---- programs ---------------------------------------------------------------------------------------------------- */

static enum us_status lower(const struct tiles *tiles, enum us_program_kind kind, uint32_t rows, bool no_head,
                            struct us_program **ret_program, struct us_err *err) {
  const struct us_model *model = tiles->base.model;
  struct us_lower_options options = {
      .rows = rows, .no_head = no_head, .model = model, .draft = tiles->base.draft};
  switch (kind) {
  case US_PROGRAM_TARGET:
    return us_lower_target(&model->shape, &options, ret_program, err);
  case US_PROGRAM_DRAFT:
    return us_lower_draft(&tiles->base.draft->shape, &model->shape, &options, ret_program, err);
  case US_PROGRAM_CONTEXT:
    return us_lower_context(&tiles->base.draft->shape, &model->shape, &options, ret_program, err);
  }
  return us_err_set(err, US_ERR_USAGE, "no such tile program");
}

/* The kept program of that kind, or a new one, lowered and proved. */
static enum us_status find_program(struct tiles *tiles, enum us_program_kind kind, uint32_t rows,
                                   bool no_head, const struct us_program **ret_program, struct us_err *err) {
  struct kept_program *oldest = &tiles->kept[0];
  for (size_t i = 0; i < PROGRAMS_KEPT; i++) {
    struct kept_program *kept = &tiles->kept[i];
    if (kept->program && kept->kind == kind && kept->rows == rows && kept->no_head == no_head) {
      kept->used = tiles->runner.passes + 1u;
      *ret_program = kept->program;
      return US_OK;
    }
    if (kept->used < oldest->used) oldest = kept;
  }
  struct us_program *program;
  enum us_status status = lower(tiles, kind, rows, no_head, &program, err);
  if (status != US_OK) return status;
  status = us_program_check(program, err);
  if (status != US_OK) {
    us_program_free(program);
    return status;
  }
  us_program_free(oldest->program);
  *oldest = (struct kept_program){
      .program = program, .kind = kind, .rows = rows, .no_head = no_head, .used = tiles->runner.passes + 1u};
  *ret_program = program;
  return US_OK;
}

/* ---- running a pass ---------------------------------------------------------------------------------------------- */

static void fill_rope(const struct us_tile_pass *pass) {
  struct us_tile_buffers *b = pass->buffers;
  const struct us_attention_shape *kinds[2] = {&pass->model->shape.full, &pass->model->shape.swa};
  if (pass->draft) kinds[0] = NULL, kinds[1] = &pass->draft->shape.attention;
  for (int kind = 0; kind < 2; kind++)
    for (size_t r = 0; kinds[kind] && r < pass->program->dims.rows; r++)
      us_rope_table(kinds[kind]->rope_theta, kinds[kind]->rotary_dim, pass->rows[r].position,
                    b->rope[kind] + r * kinds[kind]->rotary_dim);
}

/* Tell the observer what the reference executor would after the same op; false to stop. */
static bool observe(const struct us_tile_pass *pass, const struct us_observer *observer,
                    const struct us_task *task) {
  const struct us_tile_buffers *b = pass->buffers;
  const struct us_program_dims *dims = &pass->program->dims;
  uint32_t l = task->layer, kind = l == US_LAYER_NONE ? 0 : pass->program->swa_layer[l];
  size_t R = dims->rows, D = dims->hidden;
  bool last = l + 1 == dims->layers;
  void *arg = observer->arg;
  switch ((enum us_task_op)task->op) {
  case US_TASK_EMBED_NORM:
    return observer->after_op(arg, "attn_norm", 0, b->normed, R, D);
  case US_TASK_QKV:
    return observer->after_op(arg, "qkv", l, b->qkv, R, dims->qkv_rows[kind]);
  case US_TASK_ATTENTION:
    return observer->after_op(arg, "attention", l, b->attended, R, dims->attended[kind]);
  case US_TASK_O_PROJ:
    return observer->after_op(arg, "o_proj", l, b->partial[0], R, D);
  case US_TASK_ROUTER:
    return observer->after_op(arg, "router", l, b->router, R, dims->experts);
  case US_TASK_EXPERT_DOWN:
    return observer->after_op(arg, "experts", l, b->partial[1], R, D);
  case US_TASK_DENSE_DOWN:
    return observer->after_op(arg, "dense", l, b->partial[1], R, D);
  case US_TASK_RESIDUAL_NORM:
    if (!observer->after_op(arg, "residual", l, b->residual, R, D)) return false;
    if (task->slot == 0) return observer->after_op(arg, "mlp_norm", l, b->normed, R, D);
    return observer->after_op(arg, last ? "final_norm" : "attn_norm", last ? US_LAYER_NONE : l + 1, b->normed,
                              R, D);
  case US_TASK_HEAD:
    return observer->after_op(arg, "head", US_LAYER_NONE, pass->logits, R, dims->vocab);
  default:
    return true;
  }
}

/* In list order on this thread, telling the observer after each op; stops where it says so. */
static void run_observed(struct us_tile_pass *pass, const struct us_observer *observer) {
  const struct us_program *program = pass->program;
  for (size_t i = 0; i < program->task_count; i++) {
    const struct us_task *task = &program->tasks[i], *next = i + 1 < program->task_count ? task + 1 : NULL;
    us_tile_run(pass, task, 0);
    bool op_ends = !next || next->op != task->op || next->layer != task->layer || next->slot != task->slot;
    if (task->op == US_TASK_EXPERT_UP) continue;
    if (op_ends && !observe(pass, observer, task)) return;
  }
}

static enum us_status run_pass(struct tiles *tiles, struct us_tile_pass *pass,
                               const struct us_observer *observer, struct us_err *err) {
  enum us_status status = us_tile_buffers_reserve_scratch(&tiles->buffers, us_tile_scratch(pass),
                                                          us_pool_threads(tiles->pool), err);
  if (status != US_OK) return status;
  fill_rope(pass);
  if (observer) {
    run_observed(pass, observer);
    return US_OK;
  }
  return us_runner_run(&tiles->runner, pass->program, tiles->pool, us_tile_run, pass, err);
}

static struct us_tile_pass new_pass(struct tiles *tiles, const struct us_program *program,
                                    const struct us_row *rows) {
  bool target = program->kind == US_PROGRAM_TARGET;
  return (struct us_tile_pass){.program = program,
                               .model = tiles->base.model,
                               .draft = target ? NULL : tiles->base.draft,
                               .layers = target ? tiles->target_layers : tiles->draft_layers,
                               .buffers = &tiles->buffers,
                               .round_bf16 = tiles->base.rounding == US_ROUND_BF16,
                               .isa = us_isa_resolve(US_ISA_BEST),
                               .rows = rows};
}

static enum us_status prepare(struct tiles *tiles, enum us_program_kind kind, size_t R, bool no_head,
                              const struct us_program **ret_program, struct us_err *err) {
  if (R == 0 || R > UINT32_MAX) return us_err_set(err, US_ERR_USAGE, "a pass of %zu rows", R);
  enum us_status status = find_program(tiles, kind, (uint32_t)R, no_head, ret_program, err);
  if (status != US_OK) return status;
  return us_tile_buffers_reserve(&tiles->buffers, tiles->base.model, tiles->base.draft, R, err);
}

/* ---- the executor's operations ----------------------------------------------------------------------------------- */

static bool wants_head(const struct us_pass *pass) {
  if (!pass->logits) return false;
  for (size_t r = 0; r < pass->R; r++)
    if (!pass->want_logits || pass->want_logits[r]) return true;
  return false;
}

static enum us_status check_rows(const struct tiles *tiles, const struct us_pass *pass, struct us_err *err) {
  uint32_t vocab = tiles->base.model->shape.vocab;
  if (pass->taps && !tiles->base.draft) return us_err_set(err, US_ERR_USAGE, "taps need a drafter");
  for (size_t r = 0; r < pass->R; r++) {
    const struct us_row *row = &pass->rows[r];
    if (row->token < 0 || (uint32_t)row->token >= vocab)
      return us_err_set(err, US_ERR_USAGE, "token %d is outside the vocabulary of %u", row->token, vocab);
    enum us_status status =
        r > 0 && row->kv == row[-1].kv ? US_OK : us_forward_check_kv(row->kv, &tiles->spec, err);
    if (status == US_OK) status = us_kv_reserve(row->kv, row->position, 1, err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status forward(struct us_executor *executor, const struct us_pass *pass, struct us_err *err) {
  struct tiles *tiles = (struct tiles *)executor;
  const struct us_shape *shape = &executor->model->shape;
  const struct us_program *program;
  if (!pass->R) return US_OK;
  enum us_status status = prepare(tiles, US_PROGRAM_TARGET, pass->R, !wants_head(pass), &program, err);
  if (status != US_OK) return status;
  status = check_rows(tiles, pass, err);
  if (status != US_OK) return status;
  struct us_tile_pass run = new_pass(tiles, program, pass->rows);
  run.logits = pass->logits;
  run.want_logits = pass->want_logits;
  run.routed = pass->routed;
  if (pass->taps) {
    run.taps = pass->taps;
    run.tap_count = executor->draft->shape.taps;
    run.tap_layer = executor->draft->shape.tap_layer;
  }
  for (uint32_t l = 0; pass->routed && l < shape->layers; l++)
    if (!shape->moe_layer[l])
      memset(pass->routed + l * pass->R * shape->top_k, 0xff, pass->R * shape->top_k * sizeof *pass->routed);
  return run_pass(tiles, &run, pass->observer, err);
}

static enum us_status need_draft(const struct us_executor *executor, struct us_err *err) {
  return executor->draft ? US_OK : us_err_set(err, US_ERR_USAGE, "the executor has no drafter");
}

/* Rows of the context pass: the last `window` ones, since no query will see older ones. */
static enum us_status context_rows(struct tiles *tiles, const struct us_draft_context *context, size_t skip,
                                   struct us_err *err) {
  size_t R = context->R - skip;
  if (R > tiles->context_capacity) {
    struct us_row *rows = realloc(tiles->context_rows, R * sizeof *rows);
    if (!rows) return us_err_memory(err, "drafter context rows", R * sizeof *rows);
    tiles->context_rows = rows;
    tiles->context_capacity = R;
  }
  for (size_t r = 0; r < R; r++)
    tiles->context_rows[r] =
        (struct us_row){.position = context->position + (uint32_t)(skip + r), .kv = context->kv};
  enum us_status status = us_forward_check_kv(context->kv, &tiles->draft_spec, err);
  return status == US_OK ? us_kv_reserve(context->kv, context->position + (uint32_t)skip, (uint32_t)R, err)
                         : status;
}

/* The tapped residual rows enter the fusion rounded to bf16, packed. */
static void pack_features(struct tiles *tiles, const float *taps, size_t R, size_t width) {
  size_t packed = us_linear_packed_width(width);
  float *features = tiles->buffers.features_packed;
  us_linear_pack(taps, R, width, width, features, packed);
  if (tiles->base.rounding == US_ROUND_BF16)
    for (size_t i = 0; i < R * packed; i++) features[i] = us_bf16_round(features[i]);
}

static enum us_status draft_context(struct us_executor *executor, const struct us_draft_context *context,
                                    struct us_err *err) {
  struct tiles *tiles = (struct tiles *)executor;
  const struct us_program *program;
  enum us_status status = need_draft(executor, err);
  if (status != US_OK || !context->R) return status;
  uint32_t window = executor->draft->shape.attention.window;
  size_t skip = window && context->R > window ? context->R - window : 0;
  status = prepare(tiles, US_PROGRAM_CONTEXT, context->R - skip, false, &program, err);
  if (status == US_OK) status = context_rows(tiles, context, skip, err);
  if (status != US_OK) return status;
  size_t width = program->dims.features;
  pack_features(tiles, context->taps + skip * width, context->R - skip, width);
  struct us_tile_pass run = new_pass(tiles, program, tiles->context_rows);
  return run_pass(tiles, &run, NULL, err);
}

static enum us_status draft(struct us_executor *executor, const struct us_draft_pass *pass,
                            struct us_err *err) {
  struct tiles *tiles = (struct tiles *)executor;
  const struct us_program *program;
  enum us_status status = need_draft(executor, err);
  if (status != US_OK) return status;
  if (!pass->block || pass->block > US_MAX_BLOCK)
    return us_err_set(err, US_ERR_USAGE, "a block of %u; 1 to %d rows can be drafted", pass->block,
                      US_MAX_BLOCK);
  if (pass->anchor < 0 || (uint32_t)pass->anchor >= executor->model->shape.vocab)
    return us_err_set(err, US_ERR_USAGE, "anchor token %d is outside the vocabulary of %u", pass->anchor,
                      executor->model->shape.vocab);
  status = us_forward_check_kv(pass->kv, &tiles->draft_spec, err);
  if (status == US_OK) status = prepare(tiles, US_PROGRAM_DRAFT, pass->block, !pass->logits, &program, err);
  if (status != US_OK) return status;
  for (uint32_t j = 0; j < pass->block; j++)
    tiles->draft_rows[j] =
        (struct us_row){.token = pass->anchor, .position = pass->position + j, .kv = pass->kv};
  struct us_tile_pass run = new_pass(tiles, program, tiles->draft_rows);
  run.logits = pass->logits;
  status = run_pass(tiles, &run, NULL, err);
  if (status == US_OK && tiles->markov && pass->logits)
    status = us_markov_add(tiles->markov, &tiles->forward, pass, err);
  size_t D = program->dims.hidden;
  if (status == US_OK && pass->hidden)
    memcpy(pass->hidden, tiles->buffers.normed, pass->block * D * sizeof(float));
  return status;
}

static void tiles_free(struct us_executor *executor) {
  struct tiles *tiles = (struct tiles *)executor;
  for (size_t i = 0; i < PROGRAMS_KEPT; i++) us_program_free(tiles->kept[i].program);
  us_runner_release(&tiles->runner);
  us_tile_buffers_release(&tiles->buffers);
  us_forward_release(&tiles->forward);
  us_markov_free(tiles->markov);
  free(tiles->target_layers);
  free(tiles->draft_layers);
  free(tiles->context_rows);
  free(tiles);
}

void us_executor_tiles_trace(struct us_executor *executor, struct us_trace *trace) {
  ((struct tiles *)executor)->runner.trace = trace;
}

enum us_status us_executor_create_tiles(const struct us_model *model, const struct us_draft *opt_draft,
                                        struct us_pool *pool, enum us_rounding rounding,
                                        struct us_executor **ret_executor, struct us_err *err) {
  static const struct us_executor_ops ops = {
      .forward = forward, .draft_context = draft_context, .draft = draft, .free = tiles_free};
  uint32_t L = model->shape.layers, draft_layers = opt_draft ? opt_draft->shape.layers : 0;
  struct tiles *tiles = calloc(1, sizeof *tiles);
  if (!tiles) return us_err_memory(err, "the tile executor", sizeof *tiles);
  tiles->base = (struct us_executor){
      .ops = &ops, .name = "tiles", .model = model, .draft = opt_draft, .rounding = rounding};
  tiles->pool = pool;
  tiles->forward = (struct us_forward){
      .pool = pool, .isa = us_isa_resolve(US_ISA_BEST), .round_bf16 = rounding == US_ROUND_BF16};
  tiles->spec = us_kv_spec_of(&model->shape);
  if (opt_draft) tiles->draft_spec = us_kv_spec_of_draft(&opt_draft->shape);
  tiles->target_layers = calloc(L, sizeof *tiles->target_layers);
  tiles->draft_layers = calloc(draft_layers + 1, sizeof *tiles->draft_layers);
  if (!tiles->target_layers || !tiles->draft_layers) {
    tiles_free(&tiles->base);
    return us_err_memory(err, "the tile executor", (L + draft_layers) * sizeof *tiles->target_layers);
  }
  for (uint32_t l = 0; l < L; l++) tiles->target_layers[l] = target_layer(model, l);
  for (uint32_t l = 0; l < draft_layers; l++) tiles->draft_layers[l] = draft_layer(opt_draft, l);
  enum us_status status = US_OK;
  if (opt_draft && opt_draft->shape.markov)
    status = us_markov_create(model, opt_draft, rounding, pool, &tiles->markov, err);
  if (status == US_OK)
    *ret_executor = &tiles->base;
  else
    tiles_free(&tiles->base);
  return status;
}
