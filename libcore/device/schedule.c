/* schedule.c: making and connecting schedules. */
#include "device/schedule.h"
#include "device/schedule_impl.h"
#include "device/weights_layout.h"

#include <stdlib.h>

#define POSITIONS    32768
#define MOST_EXPERTS 512 /* kernels/engine/route.cuh */

/* ---- what the kernels can run ------------------------------------------------------------------------------------ */

static enum us_status check_attention(const struct us_attention_shape *a, const char *name,
                                      struct us_err *err) {
  uint32_t group = a->q_heads / a->kv_heads;
  if (group > 16 && group % 16)
    return us_err_set(err, US_ERR_USAGE,
                      "%s: %u query heads a KV head; on the GPU at most 16 or a multiple of 16", name, group);
  if (a->qk_dim > 192 || a->v_dim > 128 || a->v_dim % 8)
    return us_err_set(err, US_ERR_USAGE,
                      "%s: heads of %u and %u; on the GPU at most 192 and 128, a multiple of 8", name,
                      a->qk_dim, a->v_dim);
  if (a->rotary_dim > 64 && a->rotary_dim != 128)
    return us_err_set(err, US_ERR_USAGE, "%s: %u dims rotate; on the GPU at most 64, or 128", name,
                      a->rotary_dim);
  return US_OK;
}

static enum us_status check_experts(const struct us_shape *shape, struct us_err *err) {
  for (uint32_t l = 0; l < shape->layers; l++) {
    if (!shape->moe_layer[l]) continue;
    if (shape->experts > MOST_EXPERTS || shape->top_k > US_ENGINE_MAX_TOPK)
      return us_err_set(err, US_ERR_USAGE, "%u experts, %u a token; on the GPU at most %d and %d",
                        shape->experts, shape->top_k, MOST_EXPERTS, US_ENGINE_MAX_TOPK);
    return US_OK;
  }
  return US_OK;
}

static enum us_status check_rows(const struct us_device_schedule_options *o, struct us_err *err) {
  if (o->batch > US_ENGINE_SEQUENCES || o->block > US_MAX_BLOCK)
    return us_err_set(err, US_ERR_USAGE, "%u sequences of %u rows; a pass has at most %d of %d", o->batch,
                      o->block, US_ENGINE_SEQUENCES, US_MAX_BLOCK);
  return US_OK;
}

static enum us_status check_limits(const struct us_device_schedule *s, struct us_err *err) {
  static const char *const names[US_SCHEDULE_ATTENTIONS] = {"full attention", "windowed attention",
                                                            "the drafter's attention"};
  const struct us_device_weights *w = s->weights;
  enum us_status status = check_rows(&s->options, err);
  if (status == US_OK && us_schedule_drafts(s) && !w->draft_shape.layers)
    status = us_err_set(err, US_ERR_USAGE, "the weights have no drafter");
  if (status == US_OK) status = check_experts(&w->shape, err);
  for (int kind = 0; status == US_OK && kind < US_SCHEDULE_ATTENTIONS; kind++) {
    const struct us_attention_shape *a = us_schedule_attention(s, (enum us_schedule_attention)kind);
    if (a) status = check_attention(a, names[kind], err);
  }
  return status;
}

/* ---- creation ---------------------------------------------------------------------------------------------------- */

static void resolve(struct us_device_schedule *s, const struct us_device_schedule_options *options) {
  struct us_device_schedule_options *o = &s->options;
  uint32_t most = s->weights->shape.max_positions;
  *o = *options;
  if (!o->batch) o->batch = 1;
  if (!o->block) o->block = 1;
  if (!o->max_positions) o->max_positions = most && most < POSITIONS ? most : POSITIONS;
  s->row_tiles = (o->batch * o->block + US_ENGINE_ROWS - 1) / US_ENGINE_ROWS;
  s->logits_first = s->weights->rank * s->weights->embed_rows;
  s->logits_count = s->weights->head.rows;
  s->logits_stride = (s->logits_count + 63) / 64 * 64;
}

/* The list and its counters to the device: claimed, then done. */
static enum us_status upload(struct us_device_schedule *s, struct us_err *err) {
  struct us_schedule_owner *owner = us_schedule_owner(s);
  const struct us_device_memory_ops *m = &owner->memory;
  uint64_t ops = s->op_count * sizeof *s->ops,
           done = (US_ENGINE_COUNTERS + 1) * s->op_count * sizeof *s->rank.done;
  enum us_status status = m->alloc(m->arg, ops, &owner->ops, err);
  if (status == US_OK) status = m->alloc(m->arg, done, &owner->done, err);
  if (status == US_OK && m->upload) status = m->upload(m->arg, owner->ops, s->ops, ops, err);
  if (status == US_OK && m->fill) status = m->fill(m->arg, owner->done, 0, done, err);
  s->rank.ops = owner->ops;
  s->rank.claimed = owner->done;
  s->rank.done = s->rank.claimed + US_ENGINE_COUNTERS * s->op_count;
  s->workspace_bytes = owner->arena_bytes + us_device_align(ops) + us_device_align(done);
  return status;
}

static enum us_status build(struct us_device_schedule *s, struct us_err *err) {
  struct us_schedule_programs programs = {0};
  enum us_status status = check_limits(s, err);
  if (status == US_OK) status = us_schedule_lower(s, &programs, err);
  if (status == US_OK) status = us_schedule_buffers_create(s, err);
  if (status == US_OK) status = us_schedule_list_create(s, &programs, err);
  us_schedule_programs_release(&programs);
  return status == US_OK ? upload(s, err) : status;
}

enum us_status us_device_schedule_create_in(const struct us_device_weights *weights,
                                            const struct us_device_schedule_options *options,
                                            const struct us_device_memory_ops *memory,
                                            struct us_device_schedule **ret_schedule, struct us_err *err) {
  *ret_schedule = NULL;
  struct us_device_schedule *s = calloc(1, sizeof *s);
  struct us_schedule_owner *owner = calloc(1, sizeof *owner);
  if (!s || !owner) {
    free(s), free(owner);
    return us_err_memory(err, "a schedule", sizeof *s + sizeof *owner);
  }
  owner->memory = *memory;
  s->owner = owner;
  s->weights = weights;
  resolve(s, options);
  enum us_status status = build(s, err);
  if (status == US_OK)
    *ret_schedule = s;
  else
    us_device_schedule_free(s);
  return status;
}

void us_device_schedule_connect(struct us_device_schedule *const *schedules, uint32_t ranks) {
  for (uint32_t i = 0; i < ranks; i++)
    for (uint32_t j = 0; j < ranks; j++) {
      struct us_engine_rank *to = &schedules[i]->rank;
      const struct us_engine_rank *from = &schedules[j]->rank;
      to->exchange[j] = from->exchange[j];
      to->select[j] = from->select[j];
      to->embed[j] = from->embed[j];
      to->logits_all[j] = from->logits_all[j];
    }
}

void us_device_schedule_free(struct us_device_schedule *s) {
  if (!s) return;
  struct us_schedule_owner *owner = us_schedule_owner(s);
  owner->memory.free(owner->memory.arg, owner->arena);
  owner->memory.free(owner->memory.arg, owner->ops);
  owner->memory.free(owner->memory.arg, owner->done);
  free(s->ops), free(owner);
  free(s);
}

uint64_t us_device_schedule_bytes(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                  uint32_t ranks, const struct us_device_schedule_options *options) {
  struct us_device_weights *weights = NULL;
  struct us_device_schedule *schedule = NULL;
  struct us_err err = {0};
  uint64_t next = 0, bytes = 0;
  struct us_device_memory_ops memory = us_device_memory_count(&next);
  if (us_device_weights_layout(shape, opt_draft, 0, ranks, &weights, &err) == US_OK &&
      us_device_schedule_create_in(weights, options, &memory, &schedule, &err) == US_OK)
    bytes = schedule->workspace_bytes;
  us_device_schedule_free(schedule);
  us_device_layout_free(weights);
  return bytes;
}
