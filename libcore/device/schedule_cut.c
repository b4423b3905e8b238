/* schedule_cut.c: how a product's K is cut into parts, warps and stages, and the experts' down projection into steps. */
#include "device/schedule_impl.h"

/* What an addend costs its reader, in stages: a stage of 34 KB takes an SM 1 us of its share of HBM, an addend one more load from
 * L2 on the way of a hand-off. */
#define ADDEND_COST 0.25

static uint32_t up(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

/* Stages that the busiest block goes through, and what the parts cost later. */
static double cost_of(const struct us_engine_matrix *w, const struct us_schedule_cut *cut, uint32_t addends) {
  uint32_t items = up(w->tiles * cut->parts, US_SCHEDULE_NOMINAL_BLOCKS);
  return (double)items * cut->subs + ADDEND_COST * cut->parts * addends;
}

bool us_schedule_cut(const struct us_engine_matrix *w, uint32_t most_parts, uint32_t addends,
                     struct us_schedule_cut *ret_cut) {
  uint32_t most_subs = US_ENGINE_MAX_SUBS(w->format, w->halves);
  bool found = false;
  for (uint32_t warps = US_ENGINE_COMPUTE_WARPS; warps; warps--) {
    if (w->slices % warps || warps * w->page_bytes > US_ENGINE_STAGE_BYTES) continue;
    uint32_t stages = w->slices / warps;
    for (uint32_t parts = 1; parts <= stages && parts <= most_parts; parts++) {
      struct us_schedule_cut cut = {parts, warps, stages / parts};
      if (stages % parts || cut.subs > most_subs) continue;
      if (found && cost_of(w, &cut, addends) >= cost_of(w, ret_cut, addends)) continue;
      *ret_cut = cut;
      found = true;
    }
  }
  return found;
}

uint32_t us_schedule_step_bytes(const struct us_engine_matrix *w, uint32_t step_slices, bool rows) {
  uint32_t activations = step_slices * w->groups * 64 + 64;
  return 3 * step_slices * w->page_bytes + (rows ? US_ENGINE_ROWS * activations : 0);
}

void us_schedule_cut_down(const struct us_engine_matrix *w, struct us_engine_down *down) {
  uint32_t step = US_ENGINE_COMPUTE_WARPS / w->groups;
  while (step > 1 && (w->slices % step || us_schedule_step_bytes(w, step, true) > US_ENGINE_DOWN_BYTES))
    step--;
  down->step_slices = step;
  down->steps = w->slices / step;
  down->stage_steps = 2 * us_schedule_step_bytes(w, step, false) <= US_ENGINE_DOWN_BYTES ? 2 : 1;
}

const struct us_device_matrix *us_schedule_matrix(const struct us_device_schedule *s, uint32_t program,
                                                  enum us_task_op op, uint32_t layer) {
  const struct us_device_weights *w = s->weights;
  const struct us_device_layer *from = layer == US_LAYER_NONE ? NULL : us_schedule_layer(s, program, layer);
  switch (op) {
  case US_TASK_QKV:
    return &from->qkv;
  case US_TASK_O_PROJ:
    return &from->o_proj;
  case US_TASK_ROUTER:
    return &from->router;
  case US_TASK_EXPERT_UP:
  case US_TASK_DENSE_UP:
    return &from->up;
  case US_TASK_EXPERT_DOWN:
  case US_TASK_DENSE_DOWN:
    return &from->down;
  case US_TASK_HEAD:
    return program == US_ENGINE_PASS_DRAFT && w->draft_head.rows ? &w->draft_head : &w->head;
  case US_TASK_CONTEXT_FC:
    return &w->draft_fc;
  case US_TASK_CONTEXT_KV:
    return &w->draft_kv;
  default:
    return NULL;
  }
}

enum us_status us_schedule_cut_of(const struct us_device_schedule *s, uint32_t program, enum us_task_op op,
                                  uint32_t layer, struct us_schedule_cut *ret_cut, struct us_err *err) {
  const struct us_device_matrix *m = us_schedule_matrix(s, program, op, layer);
  bool summed = op == US_TASK_O_PROJ || op == US_TASK_DENSE_DOWN;
  bool parts = summed || op == US_TASK_CONTEXT_FC || op == US_TASK_ROUTER;
  if (us_schedule_cut(&m->pages, parts ? UINT32_MAX : 1, summed ? s->weights->ranks : 1, ret_cut))
    return US_OK;
  return us_err_set(err, US_ERR_USAGE, "%s: %u columns in %s cannot be multiplied in one sum on the GPU",
                    us_task_op_name(op), m->cols, us_format_name((enum us_format)m->pages.format));
}

static bool gathers(const struct us_device_schedule *s, uint32_t program, uint32_t layer) {
  const struct us_device_layer *from = us_schedule_layer(s, program, layer);
  const struct us_engine_matrix *up = &from->up.pages, *down = &from->down.pages;
  return up->format == US_FORMAT_MXFP4 && up->halves == 2 && down->format == US_FORMAT_MXFP4 &&
         down->groups == 4;
}

uint32_t us_schedule_together(const struct us_device_schedule *s, uint32_t program, enum us_task_op op,
                              uint32_t layer, uint32_t tile) {
  bool experts = op == US_TASK_ROUTE || op == US_TASK_EXPERT_UP || op == US_TASK_EXPERT_DOWN;
  bool reduces = op == US_TASK_EMBED_NORM || op == US_TASK_RESIDUAL_NORM || op == US_TASK_CONTEXT_NORM;
  const struct us_device_matrix *m = experts ? NULL : us_schedule_matrix(s, program, op, layer);
  uint32_t left = s->row_tiles - tile;
  if (experts && !gathers(s, program, layer)) return 1;
  if (!experts && !reduces && (!m || m->pages.format == US_FORMAT_MXFP4)) return 1;
  /* A Markov head's SELECT waits for one product and reads all row tiles: none may be left alone, which would be a product of another
   * kind, whose end says nothing of the others'. */
  bool alone = us_schedule_slots(s) && program == US_ENGINE_PASS_DRAFT && op == US_TASK_HEAD &&
               left == US_ENGINE_GATHERED + 1;
  return alone ? left - 2 : left < US_ENGINE_GATHERED ? left : US_ENGINE_GATHERED;
}
