/* schedule_units.c: the tile programs of a round, and a rank's tasks grouped into what becomes one operation a row tile.
 *
 * Contents: a model of the packed formats; lowering; units.
 */
#include "device/schedule_impl.h"
#include "plan/lower.h"

#include <stdlib.h>

/* Tasks are as large as an operation allows, since blocks divide it by pages and not by tasks; two a long dimension keep the
 * grouping honest. */
#define TILE      4096
#define HEAD_TILE 65536

/* ---- formats ----------------------------------------------------------------------------------------------------- */

static void set(struct us_matrix *w, const struct us_device_matrix *from) {
  w->format = (enum us_format)from->pages.format;
}

static void set_layer(struct us_layer *to, const struct us_device_layer *from, const struct us_shape *s,
                      uint32_t l) {
  if (s->qkv_chunks) {
    set(&to->qkv, &from->qkv);
    to->qkv.scale_chunk_rows = us_attention_qkv_rows(us_shape_attention(s, l)) / s->qkv_chunks;
  } else {
    set(&to->q, &from->qkv), set(&to->k, &from->qkv), set(&to->v, &from->qkv);
  }
  set(&to->o_proj, &from->o_proj);
  struct us_expert *e = s->moe_layer[l] ? to->experts : NULL;
  set(e ? &e->gate : &to->gate, &from->up);
  set(e ? &e->up : &to->up, &from->up);
  set(e ? &e->down : &to->down, &from->down);
  if (e) set(&to->router, &from->router);
}

/* A model and a drafter without data whose formats are those of the packed weights: lowering asks for nothing else. */
static enum us_status make_model(const struct us_device_schedule *s, struct us_model **ret_model,
                                 struct us_draft **ret_draft, struct us_err *err) {
  const struct us_device_weights *w = s->weights;
  *ret_draft = NULL;
  enum us_status status = us_model_create(&w->shape, ret_model, err);
  if (status == US_OK && us_schedule_drafts(s)) status = us_draft_create(&w->draft_shape, ret_draft, err);
  if (status != US_OK) return status;
  for (uint32_t l = 0; l < w->shape.layers; l++)
    set_layer(&(*ret_model)->layers[l], &w->layers[l], &w->shape, l);
  set(&(*ret_model)->head, &w->head);
  if (!*ret_draft) return US_OK;
  set(&(*ret_draft)->fc, &w->draft_fc);
  if (w->draft_head.rows) set(&(*ret_draft)->head, &w->draft_head);
  for (uint32_t l = 0; l < w->draft_shape.layers; l++) {
    struct us_draft_layer *to = &(*ret_draft)->layers[l];
    const struct us_device_layer *from = &w->draft_layers[l];
    set(&to->q, &from->qkv), set(&to->k, &from->qkv), set(&to->v, &from->qkv);
    set(&to->o_proj, &from->o_proj);
    set(&to->gate, &from->up), set(&to->up, &from->up), set(&to->down, &from->down);
  }
  return US_OK;
}

/* ---- lowering ---------------------------------------------------------------------------------------------------- */

enum us_status us_schedule_lower(const struct us_device_schedule *s,
                                 struct us_schedule_programs *ret_programs, struct us_err *err) {
  const struct us_device_weights *w = s->weights;
  struct us_program **program = ret_programs->program;
  struct us_model *model = NULL;
  struct us_draft *draft = NULL;
  *ret_programs = (struct us_schedule_programs){0};
  enum us_status status = make_model(s, &model, &draft, err);
  struct us_lower_options options = {.ranks = w->ranks,
                                     .rows = s->options.batch * s->options.block,
                                     .tile = TILE,
                                     .head_tile = HEAD_TILE,
                                     .row_tile = US_ENGINE_ROWS,
                                     .model = model,
                                     .draft = draft};
  if (status == US_OK) status = us_lower_target(&w->shape, &options, &program[US_ENGINE_PASS_TARGET], err);
  if (status == US_OK && draft)
    status = us_lower_draft(&w->draft_shape, &w->shape, &options, &program[US_ENGINE_PASS_DRAFT], err);
  if (status == US_OK && draft)
    status = us_lower_context(&w->draft_shape, &w->shape, &options, &program[US_ENGINE_PASS_CONTEXT], err);
  us_model_free(model), us_draft_free(draft);
  if (status != US_OK) us_schedule_programs_release(ret_programs);
  return status;
}

void us_schedule_programs_release(struct us_schedule_programs *programs) {
  for (int i = 0; i < US_ENGINE_PASSES; i++) us_program_free(programs->program[i]);
  *programs = (struct us_schedule_programs){0};
}

/* ---- units ------------------------------------------------------------------------------------------------------- */

static bool repeats_by_slot(enum us_task_op op) {
  return op == US_TASK_EXPERT_UP;
}

static bool repeats_by_layer(enum us_task_op op) {
  return op == US_TASK_CONTEXT_KV;
}

static bool belongs(const struct us_schedule_unit *unit, const struct us_task *task) {
  enum us_task_op op = (enum us_task_op)task->op;
  return unit->op == op && (repeats_by_layer(op) || unit->layer == task->layer) &&
         (repeats_by_slot(op) || unit->slot == task->slot);
}

static bool waits_for(const struct us_schedule_unit *unit, uint32_t other) {
  for (uint32_t i = 0; i < unit->wait_count; i++)
    if (unit->waits[i] == other) return true;
  return false;
}

static enum us_status wrong(const struct us_task *task, const char *what, struct us_err *err) {
  return us_err_set(err, US_ERR_CHECK, "%s [%u, %u): %s", us_task_op_name((enum us_task_op)task->op),
                    task->begin, task->end, what);
}

/* Add a task to the unit it belongs to. event_unit: by event, of this rank's tasks. */
static enum us_status add_task(struct us_schedule_units *units, const struct us_task *task,
                               const uint32_t *event_unit, struct us_err *err) {
  struct us_schedule_unit *unit = units->count ? &units->unit[units->count - 1] : NULL;
  enum us_task_op op = (enum us_task_op)task->op;
  if (!unit || !belongs(unit, task)) {
    unit = &units->unit[units->count++];
    *unit = (struct us_schedule_unit){
        .op = op, .layer = repeats_by_layer(op) ? US_LAYER_NONE : task->layer, .slot = task->slot};
    unit->begin = unit->end = task->begin;
  }
  uint32_t repeat = repeats_by_slot(op) ? task->slot : repeats_by_layer(op) ? task->layer : 0;
  if (repeat == unit->repeats) { /* the first task of a slot or layer */
    if (task->begin != unit->begin) return wrong(task, "a range with another beginning", err);
    unit->repeats++;
    unit->end = unit->begin;
  }
  if (repeat + 1 != unit->repeats || task->begin != unit->end) return wrong(task, "a gap before it", err);
  unit->end = task->end;
  if (!repeats_by_slot(op) || repeat == 0) unit->bytes += task->bytes;
  for (int i = 0; i < US_TASK_WAITS; i++) {
    if (task->waits[i] == US_EVENT_NONE) continue;
    uint32_t from = event_unit[task->waits[i]];
    if (from == US_ENGINE_NONE) return wrong(task, "it waits for no task of its rank", err);
    if (waits_for(unit, from)) continue;
    if (unit->wait_count == US_TASK_WAITS) return wrong(task, "it waits for too much", err);
    unit->waits[unit->wait_count++] = from;
  }
  return US_OK;
}

enum us_status us_schedule_units_create(const struct us_program *program, uint32_t rank,
                                        struct us_schedule_units *ret_units, struct us_err *err) {
  size_t mine = 0;
  for (size_t i = 0; i < program->task_count; i++) mine += program->tasks[i].rank == rank;
  struct us_schedule_units units = {.unit = calloc(mine + 1, sizeof *units.unit)};
  uint32_t *event_unit = malloc((program->event_count + 1ull) * sizeof *event_unit);
  enum us_status status = US_OK;
  if (!units.unit || !event_unit)
    status = us_err_memory(err, "a list of operations", mine * sizeof *units.unit);
  for (uint32_t e = 0; status == US_OK && e < program->event_count; e++) event_unit[e] = US_ENGINE_NONE;
  for (size_t i = 0; status == US_OK && i < program->task_count; i++) {
    const struct us_task *task = &program->tasks[i];
    if (task->rank != rank) continue;
    status = add_task(&units, task, event_unit, err);
    if (status == US_OK && task->signal != US_EVENT_NONE) event_unit[task->signal] = units.count - 1;
  }
  free(event_unit);
  if (status != US_OK) free(units.unit), units = (struct us_schedule_units){0};
  *ret_units = units;
  return status;
}
