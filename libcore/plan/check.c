/* check.c: the static checker of tile programs.
 *
 * Contents: events and what is known when they are complete; live accesses of a buffer; one task; the program.
 */
#include "plan/check.h"

#include "plan/regions.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A read or write that later accesses must be ordered after. */
struct live {
  struct us_region region;
  uint32_t task;
  bool writes;
};

struct live_list {
  struct live *items;
  size_t count, capacity;
};

struct checker {
  const struct us_program *program;
  size_t words;        /* 64-bit words of an event set */
  uint64_t *done;      /* (event_count, words): events known complete once event e is */
  uint64_t *known;     /* (words): events known complete when the present task runs */
  uint32_t *signalled; /* (event_count) signals seen so far */
  uint32_t indices;    /* buffer instances per (buffer, rank): max(slots, layers) */
  struct live_list *buffers;
  struct us_access *accesses;
  struct us_err *err;
};

/* ---- events ------------------------------------------------------------------------------------------------------ */

static void describe(const struct us_program *p, uint32_t index, char *text, size_t size) {
  const struct us_task *t = &p->tasks[index];
  char layer[32] = "no layer";
  if (t->layer != US_LAYER_NONE) snprintf(layer, sizeof layer, "layer %u", t->layer);
  snprintf(text, size, "task %u (%s, %s, rank %u, slot %u, [%u, %u))", index, us_task_op_name(t->op), layer,
           t->rank, t->slot, t->begin, t->end);
}

static enum us_status fail(struct checker *c, uint32_t index, const char *problem) {
  char text[160];
  describe(c->program, index, text, sizeof text);
  return us_err_set(c->err, US_ERR_CHECK, "%s %s", text, problem);
}

/* known = all that the task's waits imply. A wait for an event that is not complete in list order is a deadlock. */
static enum us_status learn_from_waits(struct checker *c, uint32_t index) {
  const struct us_task *task = &c->program->tasks[index];
  memset(c->known, 0, c->words * sizeof *c->known);
  for (int w = 0; w < US_TASK_WAITS; w++) {
    uint32_t event = task->waits[w];
    if (event == US_EVENT_NONE) continue;
    if (event >= c->program->event_count) return fail(c, index, "waits for an event that does not exist");
    if (c->program->event_totals[event] == 0)
      return fail(c, index, "waits for an event that nothing signals: deadlock");
    if (c->signalled[event] != c->program->event_totals[event])
      return fail(c, index, "waits for an event that a later task signals: deadlock");
    for (size_t i = 0; i < c->words; i++) c->known[i] |= c->done[event * c->words + i];
  }
  return US_OK;
}

static enum us_status record_signal(struct checker *c, uint32_t index) {
  uint32_t event = c->program->tasks[index].signal;
  if (event == US_EVENT_NONE) return US_OK;
  if (event >= c->program->event_count) return fail(c, index, "signals an event that does not exist");
  if (c->signalled[event] == c->program->event_totals[event])
    return fail(c, index, "signals an event more often than it counts");
  c->signalled[event]++;
  uint64_t *done = &c->done[event * c->words];
  for (size_t i = 0; i < c->words; i++) done[i] |= c->known[i];
  done[event / 64] |= 1ull << (event % 64);
  return US_OK;
}

static bool same_operation(const struct us_operation *a, const struct us_operation *b) {
  return a->op == b->op && a->layer == b->layer && a->slot == b->slot;
}

static struct us_operation operation_of(const struct checker *c, uint32_t index) {
  const struct us_task *t = &c->program->tasks[index];
  return (struct us_operation){.op = (enum us_task_op)t->op, .layer = t->layer, .slot = t->slot};
}

static bool happens_before(const struct checker *c, uint32_t earlier) {
  uint32_t event = c->program->tasks[earlier].signal;
  return event != US_EVENT_NONE && (c->known[event / 64] >> (event % 64) & 1);
}

/* ---- live accesses ----------------------------------------------------------------------------------------------- */

static bool overlaps(const struct us_region *a, const struct us_region *b) {
  return a->row0 < b->row1 && b->row0 < a->row1 && a->col0 < b->col1 && b->col0 < a->col1;
}

static uint64_t common_area(const struct us_region *a, const struct us_region *b) {
  if (!overlaps(a, b)) return 0;
  uint64_t row0 = a->row0 > b->row0 ? a->row0 : b->row0, row1 = a->row1 < b->row1 ? a->row1 : b->row1;
  uint64_t col0 = a->col0 > b->col0 ? a->col0 : b->col0, col1 = a->col1 < b->col1 ? a->col1 : b->col1;
  return (row1 - row0) * (col1 - col0);
}

static uint64_t area(const struct us_region *r) {
  return (uint64_t)(r->row1 - r->row0) * (r->col1 - r->col0);
}

static enum us_status push(struct checker *c, struct live_list *list, struct live item) {
  if (item.region.row0 >= item.region.row1 || item.region.col0 >= item.region.col1) return US_OK;
  if (list->count == list->capacity) {
    size_t capacity = list->capacity ? list->capacity * 2 : 16;
    struct live *bigger = realloc(list->items, capacity * sizeof *bigger);
    if (!bigger) return us_err_memory(c->err, "the plan checker", capacity * sizeof *bigger);
    list->items = bigger;
    list->capacity = capacity;
  }
  list->items[list->count++] = item;
  return US_OK;
}

/* Replace list item i by what is left of it outside `cut` (up to four rectangles). */
static enum us_status subtract(struct checker *c, struct live_list *list, size_t i,
                               const struct us_region *cut) {
  struct live old = list->items[i], piece = old;
  const struct us_region *r = &old.region;
  list->items[i] = list->items[--list->count];
  uint32_t row0 = r->row0 > cut->row0 ? r->row0 : cut->row0, row1 = r->row1 < cut->row1 ? r->row1 : cut->row1;
  piece.region.row1 = row0;
  enum us_status status = push(c, list, piece);
  piece.region.row0 = row1, piece.region.row1 = r->row1;
  if (status == US_OK) status = push(c, list, piece);
  piece.region.row0 = row0, piece.region.row1 = row1;
  piece.region.col1 = cut->col0 > r->col0 ? cut->col0 : r->col0;
  if (status == US_OK) status = push(c, list, piece);
  piece.region.col0 = cut->col1 < r->col1 ? cut->col1 : r->col1, piece.region.col1 = r->col1;
  if (status == US_OK) status = push(c, list, piece);
  return status;
}

static struct live_list *list_of(const struct checker *c, const struct us_region *region) {
  size_t instance = ((size_t)region->buffer * c->program->ranks + region->rank) * c->indices + region->index;
  return &c->buffers[instance];
}

/* ---- one task ---------------------------------------------------------------------------------------------------- */

static enum us_status race(struct checker *c, uint32_t index, const struct us_access *access,
                           const struct live *other) {
  char text[160], problem[320];
  describe(c->program, other->task, text, sizeof text);
  snprintf(problem, sizeof problem, "%s %s that %s may still be %s", access->writes ? "writes" : "reads",
           us_buffer_name(access->region.buffer), text, other->writes ? "writing" : "reading");
  return fail(c, index, problem);
}

/* `problem` and the task that is in the way. */
static enum us_status fail_with(struct checker *c, uint32_t index, const char *problem,
                                const struct us_region *region, uint32_t other) {
  char text[160], whole[320];
  describe(c->program, other, text, sizeof text);
  snprintf(whole, sizeof whole, "%s %s that %s wrote", problem, us_buffer_name(region->buffer), text);
  return fail(c, index, whole);
}

static enum us_status check_read(struct checker *c, uint32_t index, const struct us_access *access) {
  struct live_list *list = list_of(c, &access->region);
  uint64_t covered = 0;
  bool repeated = false;
  for (size_t i = 0; i < list->count; i++) {
    const struct live *item = &list->items[i];
    if (!overlaps(&item->region, &access->region)) continue;
    if (!item->writes) {
      /* Tiles of one op read the same rows for the same event: one entry stands for all. */
      repeated |= memcmp(&item->region, &access->region, sizeof item->region) == 0 &&
                  c->program->tasks[item->task].signal == c->program->tasks[index].signal;
      continue;
    }
    if (!happens_before(c, item->task)) return race(c, index, access, item);
    struct us_operation writer = operation_of(c, item->task);
    if (!same_operation(&writer, &access->from))
      return fail_with(c, index, "reads, of another operation than its own needs,", &access->region,
                       item->task);
    covered += common_area(&item->region, &access->region);
  }
  if (covered != area(&access->region)) {
    char problem[128];
    snprintf(problem, sizeof problem, "reads parts of %s that no task has written",
             us_buffer_name(access->region.buffer));
    return fail(c, index, problem);
  }
  return repeated ? US_OK : push(c, list, (struct live){.region = access->region, .task = index});
}

static enum us_status check_write(struct checker *c, uint32_t index, const struct us_access *access) {
  struct live_list *list = list_of(c, &access->region);
  struct us_operation own = operation_of(c, index);
  for (size_t i = 0; i < list->count;) {
    const struct live *item = &list->items[i];
    if (!overlaps(&item->region, &access->region)) {
      i++;
      continue;
    }
    if (item->task != index && !happens_before(c, item->task)) return race(c, index, access, item);
    struct us_operation other = operation_of(c, item->task);
    if (item->writes && same_operation(&own, &other))
      return fail_with(c, index, "computes again", &access->region, item->task);
    enum us_status status = subtract(c, list, i, &access->region);
    if (status != US_OK) return status;
  }
  return push(c, list, (struct live){.region = access->region, .task = index, .writes = true});
}

static enum us_status check_tile(struct checker *c, uint32_t index) {
  const struct us_task *task = &c->program->tasks[index];
  uint32_t begin, end;
  if (!us_task_extent(c->program, task, &begin, &end)) return fail(c, index, "is no task of such a program");
  if (task->begin >= task->end) return fail(c, index, "has an empty tile");
  if (task->begin < begin || task->end > end) return fail(c, index, "has a tile beyond its operation's");
  return US_OK;
}

static enum us_status check_task(struct checker *c, uint32_t index) {
  enum us_status status = check_tile(c, index);
  if (status == US_OK) status = learn_from_waits(c, index);
  if (status != US_OK) return status;
  size_t count = us_task_accesses(c->program, &c->program->tasks[index], c->accesses);
  for (size_t i = 0; i < count && status == US_OK; i++)
    status = c->accesses[i].writes ? check_write(c, index, &c->accesses[i])
                                   : check_read(c, index, &c->accesses[i]);
  return status == US_OK ? record_signal(c, index) : status;
}

/* ---- the program ------------------------------------------------------------------------------------------------- */

/* The operation `from` has written all of the region, and nothing came after it. */
static enum us_status check_output(struct checker *c, struct us_region region, struct us_operation from) {
  struct live_list *list = list_of(c, &region);
  uint64_t covered = 0;
  for (size_t i = 0; i < list->count; i++) {
    struct us_operation writer = operation_of(c, list->items[i].task);
    if (list->items[i].writes && same_operation(&writer, &from))
      covered += common_area(&list->items[i].region, &region);
  }
  if (covered == area(&region)) return US_OK;
  return us_err_set(c->err, US_ERR_CHECK, "%s of rank %u, layer or slot %u, is not written completely by %s",
                    us_buffer_name(region.buffer), region.rank, region.index, us_task_op_name(from.op));
}

/* Keys and values of every layer, and of a rank of passes with a residual stream its last norm. */
static enum us_status check_rank_outputs(struct checker *c, uint32_t rank) {
  const struct us_program *p = c->program;
  bool context = p->kind == US_PROGRAM_CONTEXT;
  enum us_status status = US_OK;
  for (uint32_t l = 0; l < p->dims.layers && status == US_OK; l++)
    status = check_output(
        c,
        (struct us_region){.buffer = US_BUFFER_KV,
                           .rank = rank,
                           .index = l,
                           .row1 = p->dims.rows,
                           .col1 = p->dims.kv_heads[p->swa_layer[l]]},
        (struct us_operation){.op = context ? US_TASK_CONTEXT_KV : US_TASK_ATTENTION, .layer = l});
  if (status != US_OK || context) return status;
  return check_output(
      c,
      (struct us_region){
          .buffer = US_BUFFER_NORMED, .rank = rank, .row1 = p->dims.rows, .col1 = p->dims.hidden},
      us_norm_before(p->dims.layers));
}

static enum us_status check_outputs(struct checker *c) {
  const struct us_program *p = c->program;
  enum us_status status = US_OK;
  bool head = false;
  for (size_t i = 0; i < p->task_count; i++) head |= p->tasks[i].op == US_TASK_HEAD;
  if (head)
    status = check_output(
        c, (struct us_region){.buffer = US_BUFFER_LOGITS, .row1 = p->dims.rows, .col1 = p->dims.vocab},
        (struct us_operation){.op = US_TASK_HEAD, .layer = US_LAYER_NONE});
  for (uint32_t rank = 0; rank < p->ranks && status == US_OK; rank++) status = check_rank_outputs(c, rank);
  return status;
}

static enum us_status check_all(struct checker *c) {
  for (uint32_t i = 0; i < c->program->task_count; i++) {
    enum us_status status = check_task(c, i);
    if (status != US_OK) return status;
  }
  for (uint32_t event = 0; event < c->program->event_count; event++)
    if (c->signalled[event] != c->program->event_totals[event])
      return us_err_set(c->err, US_ERR_CHECK, "event %u is signalled %u times, not %u", event,
                        c->signalled[event], c->program->event_totals[event]);
  return check_outputs(c);
}

enum us_status us_program_check(const struct us_program *program, struct us_err *err) {
  const struct us_program_dims *dims = &program->dims;
  struct checker c = {.program = program, .err = err, .words = program->event_count / 64 + 1};
  c.indices = dims->slots > dims->layers ? dims->slots : dims->layers;
  if (!c.indices) c.indices = 1;
  size_t buffers = (size_t)US_BUFFER_COUNT * program->ranks * c.indices;
  c.done = calloc(program->event_count * c.words + 1, sizeof *c.done);
  c.known = calloc(c.words, sizeof *c.known);
  c.signalled = calloc(program->event_count + 1, sizeof *c.signalled);
  c.buffers = calloc(buffers, sizeof *c.buffers);
  c.accesses = calloc(us_task_accesses_max(program), sizeof *c.accesses);
  enum us_status status = c.done && c.known && c.signalled && c.buffers && c.accesses
                              ? check_all(&c)
                              : us_err_memory(err, "the plan checker", program->event_count * c.words * 8);
  for (size_t i = 0; c.buffers && i < buffers; i++) free(c.buffers[i].items);
  free(c.done);
  free(c.known);
  free(c.signalled);
  free(c.buffers);
  free(c.accesses);
  return status;
}
