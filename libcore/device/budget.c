/* budget.c: GPU memory by kind. */
#include "device/budget.h"

#include <stdio.h>
#include <string.h>

/* What CUDA itself takes while the engine runs: graphs, local memory, the driver's tables. */
#define RESERVE          ((uint64_t)384 << 20)
#define FEWEST_POSITIONS 1024

static double gib(uint64_t bytes) {
  return (double)bytes / (double)(1u << 30);
}

static uint32_t ranks_a_gpu(const struct us_device_budget *budget) {
  return budget->options.ranks / budget->options.gpus;
}

static enum us_status largest_rank(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                   uint32_t ranks, struct us_device_bytes *ret_bytes, struct us_err *err) {
  *ret_bytes = (struct us_device_bytes){0};
  for (uint32_t rank = 0; rank < ranks; rank++) {
    struct us_device_weights_options options = {.rank = rank, .ranks = ranks};
    struct us_device_bytes bytes;
    enum us_status status = us_device_weights_bytes(shape, opt_draft, &options, &bytes, err);
    if (status != US_OK) return status;
    if (us_device_bytes_weights(&bytes) > us_device_bytes_weights(ret_bytes)) *ret_bytes = bytes;
  }
  return US_OK;
}

static uint64_t workspace_of(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                             const struct us_device_budget_options *options) {
  uint64_t bytes = options->prefill_bytes;
  for (uint32_t i = 0; i < US_DEVICE_GROUPS; i++) {
    struct us_device_schedule_options schedule = us_device_group_options(i, opt_draft ? opt_draft->block : 0);
    schedule.max_positions = options->positions + US_MAX_BLOCK;
    schedule.observe = true;
    if (schedule.batch <= US_ENGINE_SEQUENCES)
      bytes += us_device_schedule_bytes(shape, opt_draft, options->ranks, &schedule);
  }
  return bytes;
}

/* Bytes of a pool of one rank for all sequences' caches. */
static enum us_status add_pool(const struct us_kv_spec *spec, const struct us_device_budget_options *o,
                               struct us_kv_pool_options *pool, uint64_t *ret_bytes, struct us_err *err) {
  struct us_kv_pool_layout layout;
  pool->positions = o->positions + US_MAX_BLOCK;
  us_kv_pool_need(spec, pool->positions, o->sequences, pool->pages);
  enum us_status status = us_kv_pool_lay_out(spec, o->ranks, pool, &layout, err);
  if (status == US_OK) *ret_bytes = us_kv_pool_layout_bytes(&layout);
  return status;
}

/* Everything that depends on the number of positions. */
static enum us_status add_positions(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                    struct us_device_budget *budget, struct us_err *err) {
  const struct us_device_budget_options *o = &budget->options;
  struct us_kv_spec spec = us_kv_spec_of(shape);
  enum us_status status = add_pool(&spec, o, &budget->pool, &budget->caches, err);
  if (status == US_OK && opt_draft) {
    spec = us_kv_spec_of_draft(opt_draft);
    status = add_pool(&spec, o, &budget->draft_pool, &budget->draft_caches, err);
  }
  budget->workspace = workspace_of(shape, opt_draft, o);
  budget->gpu_bytes =
      RESERVE + ranks_a_gpu(budget) * (us_device_bytes_weights(&budget->weights) + budget->workspace +
                                       budget->caches + budget->draft_caches);
  return status;
}

enum us_status us_device_budget(const struct us_shape *shape, const struct us_draft_shape *opt_draft,
                                const struct us_device_budget_options *options, uint64_t free_bytes,
                                struct us_device_budget *ret_budget, struct us_err *err) {
  struct us_device_budget *budget = ret_budget;
  *budget = (struct us_device_budget){.options = *options};
  struct us_device_budget_options *o = &budget->options;
  uint32_t most = shape->max_positions ? shape->max_positions : US_DEVICE_POSITIONS;
  if (!o->sequences) o->sequences = 2;
  if (!o->positions) o->positions = most < US_DEVICE_POSITIONS ? most : US_DEVICE_POSITIONS;
  enum us_status status = largest_rank(shape, opt_draft, o->ranks, &budget->weights, err);
  if (status == US_OK) status = add_positions(shape, opt_draft, budget, err);
  while (status == US_OK && !options->positions && free_bytes && budget->gpu_bytes > free_bytes &&
         o->positions >= 2 * FEWEST_POSITIONS) {
    o->positions /= 2;
    status = add_positions(shape, opt_draft, budget, err);
  }
  return status;
}

/* ---- words ------------------------------------------------------------------------------------------------------- */

/* "experts 103.2, attention 6.5, ..." of a GPU, GiB. */
static void list(const struct us_device_budget *budget, char *text, size_t bytes) {
  const struct us_device_bytes *w = &budget->weights;
  const struct {
    const char *name;
    uint64_t bytes;
  } kinds[] = {{"experts", w->experts},    {"attention", w->attention},
               {"dense", w->dense},        {"router", w->router},
               {"head", w->head},          {"embedding", w->embed},
               {"drafter", w->draft},      {"drafter's head", w->draft_head},
               {"vectors", w->vectors},    {"workspace", budget->workspace},
               {"caches", budget->caches}, {"drafter's caches", budget->draft_caches}};
  size_t used = 0;
  text[0] = 0;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    if (!kinds[i].bytes || used >= bytes) continue;
    used += (size_t)snprintf(text + used, bytes - used, "%s%s %.4g", used ? ", " : "", kinds[i].name,
                             gib(kinds[i].bytes * ranks_a_gpu(budget)));
  }
}

void us_device_budget_say(const struct us_device_budget *budget, void (*say)(void *arg, const char *line),
                          void *arg) {
  char kinds[512], line[640];
  list(budget, kinds, sizeof kinds);
  snprintf(line, sizeof line, "memory of each GPU, GiB: %s; in all %.4g", kinds, gib(budget->gpu_bytes));
  say(arg, line);
  snprintf(line, sizeof line, "caches: %u sequences of %u positions", budget->options.sequences,
           budget->options.positions);
  say(arg, line);
}

enum us_status us_device_budget_check(const struct us_device_budget *budget, uint64_t free_bytes,
                                      const char *gpu, struct us_err *err) {
  /* Loading comes first: its scratch is gone when the caches are made. */
  uint64_t loading =
      RESERVE + ranks_a_gpu(budget) * us_device_bytes_weights(&budget->weights) + budget->weights.scratch;
  uint64_t need = loading > budget->gpu_bytes ? loading : budget->gpu_bytes;
  char kinds[512];
  if (need <= free_bytes) return US_OK;
  list(budget, kinds, sizeof kinds);
  return us_err_set(err, US_ERR_MEMORY, "%s: %.4g GiB are needed, %.4g are free (GiB: %s%s)", gpu, gib(need),
                    gib(free_bytes), kinds, loading > budget->gpu_bytes ? ", and more while loading" : "");
}
