/* regions.c: what each operation of the tile program reads and writes. */
#include "plan/regions.h"

const char *us_buffer_name(enum us_buffer buffer) {
  static const char *const names[US_BUFFER_COUNT] = {[US_BUFFER_RESIDUAL] = "residual",
                                                     [US_BUFFER_NORMED] = "normed",
                                                     [US_BUFFER_QKV] = "qkv",
                                                     [US_BUFFER_ATTENDED] = "attended",
                                                     [US_BUFFER_PARTIAL_ATTENTION] = "partial_attention",
                                                     [US_BUFFER_PARTIAL_MLP] = "partial_mlp",
                                                     [US_BUFFER_ROUTER] = "router",
                                                     [US_BUFFER_ROUTES] = "routes",
                                                     [US_BUFFER_EXPERT_INNER] = "expert_inner",
                                                     [US_BUFFER_DENSE_INNER] = "dense_inner",
                                                     [US_BUFFER_LOGITS] = "logits",
                                                     [US_BUFFER_KV] = "kv",
                                                     [US_BUFFER_CONTEXT] = "context"};
  return buffer >= 0 && buffer < US_BUFFER_COUNT ? names[buffer] : "unknown";
}

size_t us_task_accesses_max(const struct us_program *program) {
  return 8 + program->ranks + program->dims.slots;
}

struct access_list {
  struct us_access *items;
  size_t count;
};

static void add(struct access_list *list, bool writes, struct us_region region) {
  list->items[list->count++] = (struct us_access){.region = region, .writes = writes};
}

/* All R rows and columns [col0, col1). */
static struct us_region columns(const struct us_program *p, enum us_buffer buffer, uint32_t rank,
                                uint32_t index, uint32_t col0, uint32_t col1) {
  return (struct us_region){
      .buffer = buffer, .rank = rank, .index = index, .row1 = p->dims.rows, .col0 = col0, .col1 = col1};
}

/* Token rows [row0, row1), all `width` columns. */
static struct us_region token_rows(enum us_buffer buffer, uint32_t rank, const struct us_task *task,
                                   uint32_t width) {
  return (struct us_region){
      .buffer = buffer, .rank = rank, .row0 = task->begin, .row1 = task->end, .col1 = width};
}

static void residual_accesses(const struct us_program *p, const struct us_task *task,
                              struct access_list *list) {
  uint32_t D = p->dims.hidden;
  enum us_buffer partials = task->slot ? US_BUFFER_PARTIAL_MLP : US_BUFFER_PARTIAL_ATTENTION;
  for (uint32_t rank = 0; rank < p->ranks; rank++) add(list, false, token_rows(partials, rank, task, D));
  add(list, false, token_rows(US_BUFFER_RESIDUAL, task->rank, task, D));
  add(list, true, token_rows(US_BUFFER_RESIDUAL, task->rank, task, D));
  add(list, true, token_rows(US_BUFFER_NORMED, task->rank, task, D));
}

static void attention_accesses(const struct us_program *p, const struct us_task *task,
                               struct access_list *list) {
  /* The heads of one KV group lie scattered in the chunked projection: the whole of it counts as read. */
  uint32_t kind = p->swa_layer[task->layer], per_head = p->dims.attended[kind] / p->dims.kv_heads[kind];
  add(list, false, columns(p, US_BUFFER_QKV, task->rank, 0, 0, p->dims.qkv_rows[kind]));
  add(list, true, columns(p, US_BUFFER_KV, task->rank, task->layer, task->begin, task->end));
  add(list, true,
      columns(p, US_BUFFER_ATTENDED, task->rank, 0, task->begin * per_head, task->end * per_head));
}

size_t us_task_accesses(const struct us_program *p, const struct us_task *task, struct us_access *accesses) {
  struct access_list list = {.items = accesses};
  const struct us_program_dims *dims = &p->dims;
  uint32_t rank = task->rank, D = dims->hidden;
  switch ((enum us_task_op)task->op) {
  case US_TASK_EMBED_NORM:
    add(&list, true, token_rows(US_BUFFER_RESIDUAL, rank, task, D));
    add(&list, true, token_rows(US_BUFFER_NORMED, rank, task, D));
    break;
  case US_TASK_QKV:
    add(&list, false, columns(p, US_BUFFER_NORMED, rank, 0, 0, D));
    add(&list, true, columns(p, US_BUFFER_QKV, rank, 0, task->begin, task->end));
    break;
  case US_TASK_ATTENTION:
    attention_accesses(p, task, &list);
    break;
  case US_TASK_O_PROJ:
    add(&list, false, columns(p, US_BUFFER_ATTENDED, rank, 0, 0, dims->attended[p->swa_layer[task->layer]]));
    add(&list, true, columns(p, US_BUFFER_PARTIAL_ATTENTION, rank, 0, task->begin, task->end));
    break;
  case US_TASK_RESIDUAL_NORM:
    residual_accesses(p, task, &list);
    break;
  case US_TASK_ROUTER:
    add(&list, false, columns(p, US_BUFFER_NORMED, rank, 0, 0, D));
    add(&list, true, columns(p, US_BUFFER_ROUTER, rank, 0, task->begin, task->end));
    break;
  case US_TASK_ROUTE:
    add(&list, false, columns(p, US_BUFFER_ROUTER, rank, 0, 0, dims->experts));
    add(&list, true, (struct us_region){.buffer = US_BUFFER_ROUTES, .rank = rank, .row1 = 1, .col1 = 1});
    break;
  case US_TASK_EXPERT_UP:
    add(&list, false, (struct us_region){.buffer = US_BUFFER_ROUTES, .rank = rank, .row1 = 1, .col1 = 1});
    add(&list, false, columns(p, US_BUFFER_NORMED, rank, 0, 0, D));
    add(&list, true, columns(p, US_BUFFER_EXPERT_INNER, rank, task->slot, task->begin, task->end));
    break;
  case US_TASK_EXPERT_DOWN:
    add(&list, false, (struct us_region){.buffer = US_BUFFER_ROUTES, .rank = rank, .row1 = 1, .col1 = 1});
    for (uint32_t slot = 0; slot < dims->slots; slot++)
      add(&list, false, columns(p, US_BUFFER_EXPERT_INNER, rank, slot, 0, dims->expert_inner));
    add(&list, true, columns(p, US_BUFFER_PARTIAL_MLP, rank, 0, task->begin, task->end));
    break;
  case US_TASK_DENSE_UP:
    add(&list, false, columns(p, US_BUFFER_NORMED, rank, 0, 0, D));
    add(&list, true, columns(p, US_BUFFER_DENSE_INNER, rank, 0, task->begin, task->end));
    break;
  case US_TASK_DENSE_DOWN:
    add(&list, false, columns(p, US_BUFFER_DENSE_INNER, rank, 0, 0, dims->dense_inner));
    add(&list, true, columns(p, US_BUFFER_PARTIAL_MLP, rank, 0, task->begin, task->end));
    break;
  case US_TASK_HEAD:
    add(&list, false, columns(p, US_BUFFER_NORMED, rank, 0, 0, D));
    add(&list, true, columns(p, US_BUFFER_LOGITS, 0, 0, task->begin, task->end));
    break;
  case US_TASK_CONTEXT_FC:
    add(&list, true, columns(p, US_BUFFER_CONTEXT, 0, 0, task->begin, task->end));
    break;
  case US_TASK_CONTEXT_NORM:
    add(&list, false, token_rows(US_BUFFER_CONTEXT, 0, task, D));
    add(&list, true, token_rows(US_BUFFER_NORMED, rank, task, D));
    break;
  case US_TASK_CONTEXT_KV:
    add(&list, false, columns(p, US_BUFFER_NORMED, rank, 0, 0, D));
    add(&list, true, columns(p, US_BUFFER_KV, rank, task->layer, task->begin, task->end));
    break;
  case US_TASK_OP_COUNT:
    break;
  }
  return list.count;
}
