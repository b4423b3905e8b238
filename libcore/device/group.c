/* group.c: the ranks' schedules, their state, and their launches. */
#include "device/group.h"

#include "kernels/engine/round.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

/* A range captured on every GPU, with or without sampling filters, for running indices that are equal modulo `cycle`: the exchange
 * buffers repeat then. */
struct us_device_graph {
  uint32_t first, last, exchange;
  bool filters;
  cudaGraphExec_t exec[US_ENGINE_MAX_RANKS];
  struct us_device_graph *next;
};

/* ---- running indices --------------------------------------------------------------------------------------------- */

/* Running indices that operations [first, last) take: one a row tile. */
static uint32_t count(const struct us_device_group *group, uint32_t first, uint32_t last) {
  const struct us_engine_op *ops = group->schedule[0]->ops;
  uint32_t n = 0;
  for (uint32_t i = first; i < last; i++)
    if (ops[i].kind == US_ENGINE_EMBED || ops[i].kind == US_ENGINE_REDUCE) n += ops[i].row_tiles;
  return n;
}

void us_device_group_ran(struct us_device_group *group, uint32_t first, uint32_t last, uint32_t rounds) {
  group->exchanges += rounds * count(group, first, last);
}

/* Running indices repeat after so many in captured launches. A multiple of the exchange slots and of 2, since flags lie in
 * buffers of that period; above 2, so that a flag left by the launch before never equals one that is waited for. */
static uint32_t cycle_of(const struct us_device_group *group) {
  return 4 * group->schedule[0]->rank.slots;
}

/* Whether draws may need more than the best score of a row. */
static bool filters(const struct us_device_group *group) {
  return !us_engine_all_simple(&group->state, group->schedule[0]->weights->shape.vocab);
}

static void fill(const struct us_device_group *group, uint32_t gpu, uint32_t first, uint32_t last,
                 uint32_t exchanges, struct us_engine_launch *ret_launch) {
  uint32_t each = group->devices->ranks / group->devices->gpus;
  struct us_engine_launch launch = {.ranks = each,
                                    .first = first,
                                    .last = last,
                                    .rounds = 1,
                                    .exchanges = exchanges - count(group, 0, first),
                                    .exchanges_a_round = count(group, first, last),
                                    .several = group->schedule[0]->row_tiles > 1,
                                    .unfiltered = !filters(group),
                                    .jitter = group->jitter,
                                    .timeout_ns = group->timeout_ns,
                                    .profile = group->profile[gpu]};
  for (uint32_t i = 0; i < each; i++) launch.rank[i] = group->schedule[gpu * each + i]->rank;
  *ret_launch = launch;
}

void us_device_group_fill(const struct us_device_group *group, uint32_t gpu, uint32_t first, uint32_t last,
                          struct us_engine_launch *ret_launch) {
  fill(group, gpu, first, last, group->exchanges, ret_launch);
}

/* ---- launches ---------------------------------------------------------------------------------------------------- */

static enum us_status launch_whole(struct us_device_group *group, uint32_t first, uint32_t last,
                                   struct us_err *err) {
  for (uint32_t gpu = 0; gpu < group->devices->gpus; gpu++) {
    struct us_engine_launch launch;
    us_device_group_fill(group, gpu, first, last, &launch);
    us_devices_use(group->devices, gpu);
    enum us_status status =
        us_cuda_status(us_engine_run(&launch, group->devices->stream[gpu]), "launching the engine", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

/* One launch an operation on one GPU, from the given running indices on. */
static enum us_status launch_each(const struct us_device_group *group, uint32_t gpu, uint32_t first,
                                  uint32_t last, uint32_t exchanges, struct us_err *err) {
  for (uint32_t i = first; i < last; i++) {
    struct us_engine_launch launch;
    fill(group, gpu, i, i + 1, exchanges, &launch);
    exchanges += launch.exchanges_a_round;
    int code = us_engine_run(&launch, group->devices->stream[gpu]);
    enum us_status status = us_cuda_status(code, "launching an operation", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status capture(const struct us_device_group *group, uint32_t gpu,
                              struct us_device_graph *graph, struct us_err *err) {
  cudaStream_t stream = group->devices->stream[gpu];
  cudaGraph_t captured = NULL;
  us_devices_use(group->devices, gpu);
  enum us_status status = us_cuda_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                                         "capturing a graph", err);
  if (status != US_OK) return status;
  status = launch_each(group, gpu, graph->first, graph->last, graph->exchange, err);
  cudaError_t code = cudaStreamEndCapture(stream, &captured);
  if (status == US_OK) status = us_cuda_status(code, "capturing a graph", err);
  if (status == US_OK) {
    status = us_cuda_status(cudaGraphInstantiate(&graph->exec[gpu], captured, 0), "making a graph", err);
    if (status != US_OK) graph->exec[gpu] = NULL; /* what it says then is nothing to destroy */
  }
  if (captured) (void)cudaGraphDestroy(captured);
  return status;
}

static void free_graph(const struct us_device_group *group, struct us_device_graph *graph) {
  for (uint32_t gpu = 0; gpu < group->devices->gpus; gpu++)
    if (graph->exec[gpu]) (void)cudaGraphExecDestroy(graph->exec[gpu]);
  free(graph);
}

static enum us_status find_graph(struct us_device_group *group, uint32_t first, uint32_t last,
                                 struct us_device_graph **ret_graph, struct us_err *err) {
  uint32_t cycle = cycle_of(group), exchange = group->exchanges % cycle;
  bool filter = filters(group);
  for (struct us_device_graph *g = group->graphs; g; g = g->next)
    if (g->first == first && g->last == last && g->exchange == exchange && g->filters == filter) {
      *ret_graph = g;
      return US_OK;
    }
  struct us_device_graph *graph = calloc(1, sizeof *graph);
  if (!graph) return us_err_memory(err, "a graph", sizeof *graph);
  *graph = (struct us_device_graph){.first = first, .last = last, .exchange = exchange, .filters = filter};
  enum us_status status = US_OK;
  for (uint32_t gpu = 0; status == US_OK && gpu < group->devices->gpus; gpu++)
    status = capture(group, gpu, graph, err);
  if (status != US_OK) { /* what was captured in part must not be found again */
    free_graph(group, graph);
    return status;
  }
  graph->next = group->graphs;
  group->graphs = *ret_graph = graph;
  return US_OK;
}

static enum us_status launch_graph(struct us_device_group *group, uint32_t first, uint32_t last,
                                   struct us_err *err) {
  struct us_device_graph *graph = NULL;
  enum us_status status = find_graph(group, first, last, &graph, err);
  for (uint32_t gpu = 0; status == US_OK && gpu < group->devices->gpus; gpu++) {
    us_devices_use(group->devices, gpu);
    status = us_cuda_status(cudaGraphLaunch(graph->exec[gpu], group->devices->stream[gpu]),
                            "launching a graph", err);
  }
  return status;
}

/* All GPUs get an operation before any gets the next: what waits for a peer's sums never fills its own queue before the peer's
 * operation is in the other. */
static enum us_status launch_single(const struct us_device_group *group, uint32_t first, uint32_t last,
                                    struct us_err *err) {
  enum us_status status = US_OK;
  uint32_t exchanges = group->exchanges;
  for (uint32_t i = first; i < last; i++) {
    for (uint32_t gpu = 0; status == US_OK && gpu < group->devices->gpus; gpu++) {
      us_devices_use(group->devices, gpu);
      status = launch_each(group, gpu, i, i + 1, exchanges, err);
    }
    exchanges += count(group, i, i + 1);
  }
  return status;
}

/* Operations of several GPUs that are a graph. A launch waits where its GPU's queue is full, and a GPU in turn for its peers: what waits for
 * a peer's sums must not fill the queue before the peer has the operations that send them, as above. */
#define GRAPH_OPS 64

static enum us_status run_piece(struct us_device_group *group, enum us_device_mode mode, uint32_t first,
                                uint32_t last, struct us_err *err) {
  enum us_status status = mode == US_DEVICE_ENGINE  ? launch_whole(group, first, last, err)
                          : mode == US_DEVICE_GRAPH ? launch_graph(group, first, last, err)
                                                    : launch_single(group, first, last, err);
  if (status == US_OK) us_device_group_ran(group, first, last, 1);
  return status;
}

enum us_status us_device_group_run(struct us_device_group *group, enum us_device_mode mode, uint32_t first,
                                   uint32_t last, struct us_err *err) {
  uint32_t most = mode == US_DEVICE_GRAPH && group->devices->gpus > 1 ? GRAPH_OPS : last - first;
  enum us_status status = US_OK;
  for (uint32_t i = first; status == US_OK && i < last; i += most)
    status = run_piece(group, mode, i, last - i < most ? last : i + most, err);
  return status;
}

enum us_status us_device_group_sync(struct us_device_group *group, struct us_err *err) {
  return us_devices_sync(group->devices, group->schedule[0]->ops, group->schedule[0]->op_count, err);
}

enum us_status us_device_group_reset(struct us_device_group *group, struct us_err *err) {
  enum us_status status = us_device_group_sync(group, err);
  for (uint32_t r = 0; status == US_OK && r < group->devices->ranks; r++) {
    const struct us_engine_rank *rank = &group->schedule[r]->rank;
    uint32_t gpu = us_devices_gpu(group->devices, r);
    size_t bytes = (size_t)rank->slots * rank->addends * US_ENGINE_ROWS * rank->D * sizeof(float);
    us_devices_use(group->devices, gpu);
    int code = (int)cudaMemsetAsync(rank->exchange[r], 0xff, bytes, group->devices->stream[gpu]);
    status = us_cuda_status(code, "clearing partial sums", err);
  }
  return status == US_OK ? us_device_group_sync(group, err) : status;
}

/* ---- state ------------------------------------------------------------------------------------------------------- */

enum us_status us_device_group_upload(struct us_device_group *group, const struct us_device_tables *tables,
                                      struct us_err *err) {
  struct us_engine_state state = group->state;
  for (uint32_t r = 0; r < group->devices->ranks; r++) {
    uint32_t gpu = us_devices_gpu(group->devices, r);
    for (uint32_t s = 0; s < US_ENGINE_SEQUENCES; s++)
      state.sequence[s].kv = tables->kv[s][r], state.sequence[s].draft_kv = tables->draft_kv[s][r];
    us_devices_use(group->devices, gpu);
    /* From pageable memory: the call returns when `state` may change. */
    int code = (int)cudaMemcpyAsync(group->schedule[r]->rank.state, &state, sizeof state,
                                    cudaMemcpyHostToDevice, group->devices->stream[gpu]);
    enum us_status status = us_cuda_status(code, "the rows of a pass", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

void us_device_group_caches(struct us_device_group *group, const struct us_kv_pool *target,
                            const struct us_kv_pool *opt_draft) {
  for (uint32_t r = 0; r < group->devices->ranks; r++) {
    group->schedule[r]->rank.kv_pool = us_kv_pool_pages(target, r);
    group->schedule[r]->rank.draft_pool = opt_draft ? us_kv_pool_pages(opt_draft, r) : NULL;
  }
}

/* ---- creation ---------------------------------------------------------------------------------------------------- */

enum us_status us_device_group_create(struct us_devices *devices, struct us_device_weights *const *weights,
                                      const struct us_device_schedule_options *options,
                                      struct us_device_group **ret_group, struct us_err *err) {
  *ret_group = NULL;
  struct us_device_group *group = calloc(1, sizeof *group);
  if (!group) return us_err_memory(err, "schedules", sizeof *group);
  group->devices = devices;
  enum us_status status = US_OK;
  for (uint32_t r = 0; status == US_OK && r < devices->ranks; r++) {
    us_devices_use(devices, us_devices_gpu(devices, r));
    status = us_device_schedule_create(weights[r], options, &group->schedule[r], err);
    if (status == US_OK && r == 0) status = us_device_schedule_check(group->schedule[0], err);
  }
  if (status != US_OK) {
    us_device_group_free(group);
    return status;
  }
  us_device_schedule_connect(group->schedule, devices->ranks);
  for (uint32_t r = 0; r < devices->ranks; r++) {
    uint32_t gpu = us_devices_gpu(devices, r);
    group->schedule[r]->rank.blocks = devices->blocks[gpu] / (devices->ranks / devices->gpus);
    group->schedule[r]->rank.stuck = devices->stuck[gpu];
  }
  group->rows = group->schedule[0]->row_tiles * US_ENGINE_ROWS;
  group->state.block = options->block;
  *ret_group = group;
  return US_OK;
}

static void free_graphs(struct us_device_group *group) {
  while (group->graphs) {
    struct us_device_graph *graph = group->graphs;
    group->graphs = graph->next;
    free_graph(group, graph);
  }
}

void us_device_group_free(struct us_device_group *group) {
  if (!group) return;
  free_graphs(group);
  for (uint32_t r = 0; r < group->devices->ranks; r++) {
    us_devices_use(group->devices, us_devices_gpu(group->devices, r));
    us_device_schedule_free(group->schedule[r]);
  }
  free(group);
}
