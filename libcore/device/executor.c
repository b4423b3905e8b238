/* executor.c: making the CUDA executor: GPUs, weights, caches.
 *
 * Contents: weights; caches; creation and end.
 */
#include "device/executor_impl.h"

#include "base/pool.h"
#include "device/weights_layout.h"
#include "model/precision.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- weights: every rank's at once, each thread on its GPU -------------------------------------------------------- */

struct load {
  struct us_cuda *cuda;
  const struct us_shape *shape;
  const struct us_draft_shape *draft_shape;
  bool synthetic;
  uint64_t seed;
  struct us_markov *markov; /* NULL: the drafter has no such head */
  struct us_err err[US_ENGINE_MAX_RANKS];
  enum us_status status[US_ENGINE_MAX_RANKS];
  pthread_mutex_t lock; /* of the progress */
  uint64_t done[US_ENGINE_MAX_RANKS], total[US_ENGINE_MAX_RANKS];
};

struct load_rank {
  struct load *load;
  uint32_t rank;
};

static void report(void *arg, uint64_t done, uint64_t total) {
  const struct load_rank *at = arg;
  struct load *load = at->load;
  const struct us_executor_cuda_options *o = &load->cuda->options;
  uint64_t sum = 0, whole = 0;
  pthread_mutex_lock(&load->lock);
  load->done[at->rank] = done, load->total[at->rank] = total;
  for (uint32_t r = 0; r < load->cuda->devices->ranks; r++) sum += load->done[r], whole += load->total[r];
  o->progress(o->arg, sum, whole);
  pthread_mutex_unlock(&load->lock);
}

static void load_ranks(void *arg, size_t begin, size_t end, int worker) {
  struct load *load = arg;
  struct us_cuda *cuda = load->cuda;
  for (size_t r = begin; r < end; r++) {
    uint32_t gpu = us_devices_gpu(cuda->devices, (uint32_t)r);
    struct load_rank at = {.load = load, .rank = (uint32_t)r};
    struct us_device_weights_options options = {.device = cuda->devices->ordinal[gpu],
                                                .rank = (uint32_t)r,
                                                .ranks = cuda->devices->ranks,
                                                .opt_markov = load->markov,
                                                .progress = cuda->options.progress ? report : NULL,
                                                .arg = &at};
    us_devices_use(cuda->devices, gpu);
    load->status[r] = load->synthetic
                          ? us_device_weights_synthetic(load->shape, load->draft_shape, load->seed, &options,
                                                        &cuda->weights[r], &load->err[r])
                          : us_device_weights_load(cuda->base.model, cuda->base.draft, &options,
                                                   &cuda->weights[r], &load->err[r]);
  }
}

static enum us_status load_weights(struct load *load, struct us_err *err) {
  uint32_t ranks = load->cuda->devices->ranks;
  struct us_pool *pool;
  enum us_status status = us_pool_create((int)load->cuda->devices->gpus, &pool, err);
  if (status != US_OK) return status;
  pthread_mutex_init(&load->lock, NULL);
  /* Ranks that share a GPU are one thread's: their scratch is not there at the same time. */
  us_pool_for(pool, ranks, ranks / load->cuda->devices->gpus, load_ranks, load);
  pthread_mutex_destroy(&load->lock);
  us_pool_free(pool);
  for (uint32_t r = 0; r < ranks; r++)
    if (load->status[r] != US_OK) {
      *err = load->err[r];
      return ranks > 1 ? us_err_prefix(err, "rank %u", r) : err->status;
    }
  return US_OK;
}

/* The tables of a Markov head, made by all cores, to every rank. */
static enum us_status make_markov(struct load *load, struct us_err *err) {
  const struct us_cuda *cuda = load->cuda;
  struct us_pool *pool;
  if (!load->draft_shape || !load->draft_shape->markov) return US_OK;
  enum us_status status = us_pool_create(0, &pool, err);
  if (status != US_OK) return status;
  status =
      load->synthetic
          ? us_markov_random(load->shape, load->draft_shape, load->seed, pool, &load->markov, err)
          : us_markov_create(cuda->base.model, cuda->base.draft, US_ROUND_BF16, pool, &load->markov, err);
  us_pool_free(pool);
  return status;
}

/* ---- caches ------------------------------------------------------------------------------------------------------- */

static enum us_status make_caches(struct us_cuda *cuda, struct us_err *err) {
  struct us_kv_spec spec = us_kv_spec_of(&cuda->base.model->shape);
  enum us_status status = us_kv_pool_create(cuda->devices, &spec, &cuda->budget.pool, &cuda->pool, err);
  if (status != US_OK) return status;
  cuda->base.kv_memory = us_kv_pool_memory(cuda->pool);
  if (!cuda->base.draft) return US_OK;
  spec = us_kv_spec_of_draft(&cuda->base.draft->shape);
  status = us_kv_pool_create(cuda->devices, &spec, &cuda->budget.draft_pool, &cuda->draft_pool, err);
  if (status == US_OK) cuda->base.draft_kv_memory = us_kv_pool_memory(cuda->draft_pool);
  return status;
}

static enum us_status make_prefill(struct us_cuda *cuda, struct us_err *err) {
  struct us_device_prefill_options options = us_cuda_prefill_options(cuda, cuda->budget.options.positions);
  enum us_status status =
      us_device_prefill_create(cuda->devices, cuda->weights, &options, &cuda->prefill, err);
  if (status == US_OK) us_device_prefill_caches(cuda->prefill, cuda->pool, cuda->draft_pool);
  cuda->base.makes_context = true;
  return status;
}

/* ---- creation and end --------------------------------------------------------------------------------------------- */

static void cuda_free(struct us_executor *executor) {
  struct us_cuda *cuda = (struct us_cuda *)executor;
  if (!cuda) return;
  us_device_loop_free(cuda->loop);
  us_device_prefill_free(cuda->prefill);
  for (int i = 0; i < US_DEVICE_GROUPS; i++) us_device_group_free(cuda->groups[i]);
  us_kv_pool_free(cuda->pool);
  us_kv_pool_free(cuda->draft_pool);
  for (int r = 0; r < US_ENGINE_MAX_RANKS; r++) us_device_weights_free(cuda->weights[r]);
  (void)cudaFreeHost(cuda->staging);
  us_devices_close(cuda->devices);
  us_draft_free(cuda->draft_outline);
  us_model_free(cuda->outline);
  free(cuda);
}

/* What the model needs of every GPU, and whether each has it. */
static enum us_status plan_memory(struct us_cuda *cuda, const struct us_shape *shape,
                                  const struct us_draft_shape *draft, struct us_err *err) {
  struct us_device_budget_options options = {.gpus = cuda->devices->gpus,
                                             .ranks = cuda->devices->ranks,
                                             .sequences = cuda->options.sequences,
                                             .positions = cuda->options.positions};
  struct us_device_prefill_options prefill =
      us_cuda_prefill_options(cuda, options.positions ? options.positions : US_DEVICE_POSITIONS);
  uint64_t least = UINT64_MAX, free_bytes[US_ENGINE_MAX_RANKS], total;
  enum us_status status = US_OK;
  for (uint32_t gpu = 0; status == US_OK && gpu < options.gpus; gpu++) {
    status = us_devices_memory(cuda->devices, gpu, &free_bytes[gpu], &total, err);
    if (status == US_OK && free_bytes[gpu] < least) least = free_bytes[gpu];
  }
  if (status == US_OK)
    status = us_device_prefill_bytes(shape, draft, options.ranks, &prefill, &options.prefill_bytes, err);
  if (status == US_OK) status = us_device_budget(shape, draft, &options, least, &cuda->budget, err);
  if (status == US_OK && cuda->options.say)
    us_device_budget_say(&cuda->budget, cuda->options.say, cuda->options.arg);
  for (uint32_t gpu = 0; status == US_OK && gpu < options.gpus; gpu++) {
    char name[32];
    snprintf(name, sizeof name, "GPU %d", cuda->devices->ordinal[gpu]);
    status = us_device_budget_check(&cuda->budget, free_bytes[gpu], name, err);
  }
  return status;
}

static enum us_status open_engine(struct load *load, struct us_err *err) {
  struct us_cuda *cuda = load->cuda;
  const struct us_executor_cuda_options *o = &cuda->options;
  uint32_t gpus = o->gpus ? o->gpus : 1;
  enum us_status status = us_devices_open(o->device, gpus, o->ranks ? o->ranks : gpus, &cuda->devices, err);
  if (status != US_OK) return status;
  cuda->devices->say = o->say, cuda->devices->arg = o->arg;
  struct us_shape shape = *load->shape; /* a model's shape knows nothing of the drafter's file */
  if (cuda->base.draft) shape.precision.draft = us_draft_format(cuda->base.draft);
  status = plan_memory(cuda, &shape, load->draft_shape, err);
  if (status == US_OK) status = make_markov(load, err);
  if (status == US_OK) status = load_weights(load, err);
  us_markov_free(load->markov);
  if (status == US_OK) status = make_caches(cuda, err);
  if (status == US_OK) status = make_prefill(cuda, err);
  struct us_device_group *group;
  return status == US_OK ? us_cuda_group(cuda, US_ENGINE_ROWS, &group, err) : status;
}

static enum us_status cuda_rounds(struct us_executor *executor, struct us_rounds *rounds,
                                  struct us_err *err) {
  return us_device_rounds(executor, &((struct us_cuda *)executor)->loop, rounds, err);
}

static struct us_cuda *new_executor(const struct us_executor_cuda_options *options) {
  static const struct us_executor_ops ops = {.forward = us_cuda_forward,
                                             .draft_context = us_cuda_draft_context,
                                             .draft = us_cuda_draft,
                                             .free = cuda_free,
                                             .rounds = cuda_rounds};
  struct us_cuda *cuda = calloc(1, sizeof *cuda);
  if (!cuda) return NULL;
  cuda->options = *options;
  cuda->base = (struct us_executor){.ops = &ops,
                                    .name = options->mode == US_DEVICE_ENGINE ? "cuda-engine" : "cuda-graph",
                                    .rounding = US_ROUND_BF16};
  return cuda;
}

static enum us_status finish(struct load *load, enum us_status status, struct us_executor **ret_executor,
                             struct us_err *err) {
  if (status == US_OK) status = open_engine(load, err);
  if (status == US_OK)
    *ret_executor = &load->cuda->base;
  else
    cuda_free(&load->cuda->base);
  return status;
}

enum us_status us_executor_create_cuda(const struct us_model *model, const struct us_draft *opt_draft,
                                       const struct us_executor_cuda_options *options,
                                       struct us_executor **ret_executor, struct us_err *err) {
  *ret_executor = NULL;
  struct us_cuda *cuda = new_executor(options);
  if (!cuda) return us_err_memory(err, "the CUDA executor", sizeof *cuda);
  cuda->base.model = model, cuda->base.draft = opt_draft;
  struct load load = {
      .cuda = cuda, .shape = &model->shape, .draft_shape = opt_draft ? &opt_draft->shape : NULL};
  return finish(&load, US_OK, ret_executor, err);
}

enum us_status us_executor_create_synthetic(const struct us_shape *shape,
                                            const struct us_draft_shape *opt_draft, uint64_t seed,
                                            const struct us_executor_cuda_options *options,
                                            struct us_executor **ret_executor, struct us_err *err) {
  *ret_executor = NULL;
  struct us_cuda *cuda = new_executor(options);
  if (!cuda) return us_err_memory(err, "the CUDA executor", sizeof *cuda);
  struct load load = {
      .cuda = cuda, .shape = shape, .draft_shape = opt_draft, .synthetic = true, .seed = seed};
  enum us_status status = us_weights_skeleton(shape, opt_draft, &cuda->outline, &cuda->draft_outline, err);
  if (status == US_OK)
    snprintf(cuda->outline->path, sizeof cuda->outline->path, "%s, random weights of seed %llu", shape->name,
             (unsigned long long)seed);
  cuda->base.model = cuda->outline, cuda->base.draft = cuda->draft_outline;
  return finish(&load, status, ret_executor, err);
}

bool us_executor_cuda_parts(const struct us_executor *executor, struct us_executor_cuda_parts *ret_parts) {
  if (executor->ops->free != cuda_free) return false;
  const struct us_cuda *cuda = (const struct us_cuda *)executor;
  *ret_parts = (struct us_executor_cuda_parts){.devices = cuda->devices,
                                               .weights = cuda->weights,
                                               .pool = cuda->pool,
                                               .draft_pool = cuda->draft_pool,
                                               .positions = cuda->budget.options.positions + US_MAX_BLOCK,
                                               .mode = cuda->options.mode,
                                               .uniform = cuda->options.uniform,
                                               .uniform_seed = cuda->options.uniform_seed,
                                               .jitter = cuda->options.jitter,
                                               .timeout_ns = cuda->options.timeout_ns};
  return true;
}
