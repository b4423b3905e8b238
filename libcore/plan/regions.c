/* regions.c: which tasks a tile program has, and what each reads and writes. */
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

/* ---- which tasks there are ---------------------------------------------------------------------------------------- */

static bool op_belongs(const struct us_program *p, const struct us_task *task) {
  bool layers = task->layer < p->dims.layers, context = p->kind == US_PROGRAM_CONTEXT;
  switch ((enum us_task_op)task->op) {
  case US_TASK_EMBED_NORM:
    return !context && task->layer == 0;
  case US_TASK_QKV:
  case US_TASK_ATTENTION:
  case US_TASK_O_PROJ:
  case US_TASK_RESIDUAL_NORM:
    return !context && layers;
  case US_TASK_ROUTER:
  case US_TASK_ROUTE:
  case US_TASK_EXPERT_UP:
  case US_TASK_EXPERT_DOWN:
    return !context && layers && p->moe_layer[task->layer];
  case US_TASK_DENSE_UP:
  case US_TASK_DENSE_DOWN:
    return !context && layers && !p->moe_layer[task->layer];
  case US_TASK_HEAD:
    return !context && task->layer == US_LAYER_NONE;
  case US_TASK_CONTEXT_FC:
  case US_TASK_CONTEXT_NORM:
    return context && task->layer == US_LAYER_NONE;
  case US_TASK_CONTEXT_KV:
    return context && layers;
  case US_TASK_OP_COUNT:
    break;
  }
  return false;
}

static uint32_t slots_of(const struct us_program *p, enum us_task_op op) {
  return op == US_TASK_EXPERT_UP ? p->dims.slots : op == US_TASK_RESIDUAL_NORM ? 2 : 1;
}

bool us_task_extent(const struct us_program *p, const struct us_task *task, uint32_t *ret_begin,
                    uint32_t *ret_end) {
  const struct us_program_dims *dims = &p->dims;
  enum us_task_op op = (enum us_task_op)task->op;
  if (task->rank >= p->ranks || !op_belongs(p, task) || task->slot >= slots_of(p, op)) return false;
  uint32_t kind = task->layer < dims->layers ? p->swa_layer[task->layer] : 0;
  uint32_t ends[US_TASK_OP_COUNT] = {[US_TASK_EMBED_NORM] = dims->rows,
                                     [US_TASK_QKV] = dims->qkv_rows[kind],
                                     [US_TASK_ATTENTION] = dims->kv_heads[kind],
                                     [US_TASK_O_PROJ] = dims->hidden,
                                     [US_TASK_RESIDUAL_NORM] = dims->rows,
                                     [US_TASK_ROUTER] = dims->experts,
                                     [US_TASK_ROUTE] = 1,
                                     [US_TASK_EXPERT_UP] = dims->expert_inner,
                                     [US_TASK_EXPERT_DOWN] = dims->hidden,
                                     [US_TASK_DENSE_UP] = dims->dense_inner,
                                     [US_TASK_DENSE_DOWN] = dims->hidden,
                                     [US_TASK_HEAD] = us_program_first_id(p, task->rank + 1u),
                                     [US_TASK_CONTEXT_FC] = us_program_first_fused(p, task->rank + 1u),
                                     [US_TASK_CONTEXT_NORM] = dims->rows,
                                     [US_TASK_CONTEXT_KV] = dims->kv_heads[kind]};
  *ret_end = ends[op];
  *ret_begin = op == US_TASK_HEAD         ? us_program_first_id(p, task->rank)
               : op == US_TASK_CONTEXT_FC ? us_program_first_fused(p, task->rank)
                                          : 0;
  return true;
}

/* ---- what they read and write ------------------------------------------------------------------------------------- */

struct access_list {
  struct us_access *items;
  size_t count;
};

static void writes(struct access_list *list, struct us_region region) {
  list->items[list->count++] = (struct us_access){.region = region, .writes = true};
}

static void reads(struct access_list *list, struct us_region region, struct us_operation from) {
  list->items[list->count++] = (struct us_access){.region = region, .from = from};
}

static struct us_operation of_layer(enum us_task_op op, uint32_t layer) {
  return (struct us_operation){.op = op, .layer = layer};
}

struct us_operation us_norm_before(uint32_t layer) {
  if (!layer) return of_layer(US_TASK_EMBED_NORM, 0);
  return (struct us_operation){.op = US_TASK_RESIDUAL_NORM, .layer = layer - 1, .slot = 1};
}

/* The norm before a layer's MLP: its first. */
static struct us_operation norm_within(uint32_t layer) {
  return of_layer(US_TASK_RESIDUAL_NORM, layer);
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

static struct us_region routes(uint32_t rank) {
  return (struct us_region){.buffer = US_BUFFER_ROUTES, .rank = rank, .row1 = 1, .col1 = 1};
}

static void residual_accesses(const struct us_program *p, const struct us_task *task,
                              struct access_list *list) {
  uint32_t D = p->dims.hidden, layer = task->layer;
  bool mlp = task->slot != 0;
  enum us_buffer partials = mlp ? US_BUFFER_PARTIAL_MLP : US_BUFFER_PARTIAL_ATTENTION;
  enum us_task_op sums = !mlp                  ? US_TASK_O_PROJ
                         : p->moe_layer[layer] ? US_TASK_EXPERT_DOWN
                                               : US_TASK_DENSE_DOWN;
  for (uint32_t rank = 0; rank < p->ranks; rank++)
    reads(list, token_rows(partials, rank, task, D), of_layer(sums, layer));
  reads(list, token_rows(US_BUFFER_RESIDUAL, task->rank, task, D),
        mlp ? norm_within(layer) : us_norm_before(layer));
  writes(list, token_rows(US_BUFFER_RESIDUAL, task->rank, task, D));
  writes(list, token_rows(US_BUFFER_NORMED, task->rank, task, D));
}

static void attention_accesses(const struct us_program *p, const struct us_task *task,
                               struct access_list *list) {
  /* The heads of one KV group lie scattered in the chunked projection: the whole of it counts as read. */
  uint32_t kind = p->swa_layer[task->layer], per_head = p->dims.attended[kind] / p->dims.kv_heads[kind];
  reads(list, columns(p, US_BUFFER_QKV, task->rank, 0, 0, p->dims.qkv_rows[kind]),
        of_layer(US_TASK_QKV, task->layer));
  writes(list, columns(p, US_BUFFER_KV, task->rank, task->layer, task->begin, task->end));
  writes(list, columns(p, US_BUFFER_ATTENDED, task->rank, 0, task->begin * per_head, task->end * per_head));
}

size_t us_task_accesses(const struct us_program *p, const struct us_task *task, struct us_access *accesses) {
  struct access_list list = {.items = accesses};
  const struct us_program_dims *dims = &p->dims;
  uint32_t rank = task->rank, D = dims->hidden, layer = task->layer;
  struct us_region normed = columns(p, US_BUFFER_NORMED, rank, 0, 0, D);
  switch ((enum us_task_op)task->op) {
  case US_TASK_EMBED_NORM:
    writes(&list, token_rows(US_BUFFER_RESIDUAL, rank, task, D));
    writes(&list, token_rows(US_BUFFER_NORMED, rank, task, D));
    break;
  case US_TASK_QKV:
    reads(&list, normed, us_norm_before(layer));
    writes(&list, columns(p, US_BUFFER_QKV, rank, 0, task->begin, task->end));
    break;
  case US_TASK_ATTENTION:
    attention_accesses(p, task, &list);
    break;
  case US_TASK_O_PROJ:
    reads(&list, columns(p, US_BUFFER_ATTENDED, rank, 0, 0, dims->attended[p->swa_layer[layer]]),
          of_layer(US_TASK_ATTENTION, layer));
    writes(&list, columns(p, US_BUFFER_PARTIAL_ATTENTION, rank, 0, task->begin, task->end));
    break;
  case US_TASK_RESIDUAL_NORM:
    residual_accesses(p, task, &list);
    break;
  case US_TASK_ROUTER:
    reads(&list, normed, norm_within(layer));
    writes(&list, columns(p, US_BUFFER_ROUTER, rank, 0, task->begin, task->end));
    break;
  case US_TASK_ROUTE:
    reads(&list, columns(p, US_BUFFER_ROUTER, rank, 0, 0, dims->experts), of_layer(US_TASK_ROUTER, layer));
    writes(&list, routes(rank));
    break;
  case US_TASK_EXPERT_UP:
    reads(&list, routes(rank), of_layer(US_TASK_ROUTE, layer));
    reads(&list, normed, norm_within(layer));
    writes(&list, columns(p, US_BUFFER_EXPERT_INNER, rank, task->slot, task->begin, task->end));
    break;
  case US_TASK_EXPERT_DOWN:
    reads(&list, routes(rank), of_layer(US_TASK_ROUTE, layer));
    for (uint32_t slot = 0; slot < dims->slots; slot++)
      reads(&list, columns(p, US_BUFFER_EXPERT_INNER, rank, slot, 0, dims->expert_inner),
            (struct us_operation){.op = US_TASK_EXPERT_UP, .layer = layer, .slot = slot});
    writes(&list, columns(p, US_BUFFER_PARTIAL_MLP, rank, 0, task->begin, task->end));
    break;
  case US_TASK_DENSE_UP:
    reads(&list, normed, norm_within(layer));
    writes(&list, columns(p, US_BUFFER_DENSE_INNER, rank, 0, task->begin, task->end));
    break;
  case US_TASK_DENSE_DOWN:
    reads(&list, columns(p, US_BUFFER_DENSE_INNER, rank, 0, 0, dims->dense_inner),
          of_layer(US_TASK_DENSE_UP, layer));
    writes(&list, columns(p, US_BUFFER_PARTIAL_MLP, rank, 0, task->begin, task->end));
    break;
  case US_TASK_HEAD:
    reads(&list, normed, us_norm_before(dims->layers));
    writes(&list, columns(p, US_BUFFER_LOGITS, 0, 0, task->begin, task->end));
    break;
  case US_TASK_CONTEXT_FC:
    writes(&list, columns(p, US_BUFFER_CONTEXT, 0, 0, task->begin, task->end));
    break;
  case US_TASK_CONTEXT_NORM:
    reads(&list, token_rows(US_BUFFER_CONTEXT, 0, task, D), of_layer(US_TASK_CONTEXT_FC, US_LAYER_NONE));
    writes(&list, token_rows(US_BUFFER_NORMED, rank, task, D));
    break;
  case US_TASK_CONTEXT_KV:
    reads(&list, normed, of_layer(US_TASK_CONTEXT_NORM, US_LAYER_NONE));
    writes(&list, columns(p, US_BUFFER_KV, rank, layer, task->begin, task->end));
    break;
  case US_TASK_OP_COUNT:
    break;
  }
  return list.count;
}
