/* learner.c: CUDA GPUs as a learner: lanes, parameters on them, and the step's sums.
 *
 * A thread a lane runs the passes (us_learner_each); everything else is queued on all lanes by the caller's thread.
 *
 * Contents: lanes; parameters; gradients; life.
 */
#include "training/cuda/learner.h"

#include "training/cuda/learner_state.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Below that the small operations of a narrow model do not fill the SMs. */
#define BUSY_ROWS 32768

#define ARRIVAL_SECONDS 300.0 /* a scheduler may start processes minutes apart */

/* --- lanes --- */

struct lane_run {
  struct cuda_learner *learner;
  us_learner_body body;
  void *arg;
  struct us_err *errs; /* (lanes) */
};

static void run_lane(void *arg, int worker, int workers) {
  struct lane_run *run = arg;
  us_cuda_use(run->learner->cuda[worker]);
  enum us_status status = run->body(run->arg, (uint32_t)worker, &run->errs[worker]);
  run->errs[worker].status = status;
}

static enum us_status cuda_sum(struct us_learner *base, double *values, size_t n, struct us_err *err) {
  return us_cuda_group_sum(((struct cuda_learner *)base)->group, values, n, err);
}

static void cuda_part(struct us_learner *base) {
  us_rendezvous_part(((struct cuda_learner *)base)->meeting);
}

enum us_status us_cuda_learner_wait(struct cuda_learner *learner, struct us_err *err) {
  enum us_status status = learner->group ? us_cuda_group_wait(learner->group, err) : US_OK;
  for (uint32_t i = 0; i < learner->base.lanes && status == US_OK; i++)
    status = us_cuda_sync(learner->cuda[i], err);
  return status;
}

enum us_status us_cuda_learner_wait_set(const struct us_learner_set *base, struct us_err *err) {
  const struct cuda_set *set = (const struct cuda_set *)base;
  enum us_status status = us_cuda_learner_wait(us_cuda_learner_of(base), err);
  return status == US_OK ? us_cuda_params_check(set->lane[0], err) : status;
}

static enum us_status cuda_each(struct us_learner *base, us_learner_body body, void *arg,
                                struct us_err *err) {
  struct cuda_learner *learner = (struct cuda_learner *)base;
  /* A pass may wait for its uploads, which stand behind the last step's transfers: those must not wait for a process that is gone. */
  enum us_status status = learner->meeting ? us_cuda_learner_wait(learner, err) : US_OK;
  if (status != US_OK) return status;
  if (base->lanes == 1) {
    us_cuda_use(learner->cuda[0]);
    return body(arg, 0, err);
  }
  struct us_err *errs = calloc(base->lanes, sizeof *errs);
  if (!errs) return us_err_memory(err, "lanes", base->lanes * sizeof *errs);
  us_pool_run(learner->threads, run_lane,
              &(struct lane_run){.learner = learner, .body = body, .arg = arg, .errs = errs});
  for (uint32_t i = 0; i < base->lanes && status == US_OK; i++)
    if (errs[i].status != US_OK) status = us_err_set(err, errs[i].status, "%s", errs[i].message);
  free(errs);
  return status;
}

/* --- parameters --- */

static void cuda_remove(struct us_learner_set *base) {
  struct cuda_set *set = (struct cuda_set *)base;
  for (uint32_t i = 0; set->lane && i < base->learner->lanes; i++) us_cuda_params_free(set->lane[i]);
  free(set->lane);
  free(set->owned);
  free(set->bias);
  free(set);
}

static void copy_biases(struct cuda_set *set) {
  const struct us_params *params = set->base.params;
  for (size_t i = 0; i < params->count; i++) {
    const struct us_param *p = &params->items[i];
    if (p->group == US_PARAM_BIAS) memcpy(set->bias + p->offset, p->value, p->rows * sizeof(float));
  }
}

static enum us_status cuda_place(struct us_learner *base, struct us_params *params,
                                 struct us_learner_set **ret_set, struct us_err *err) {
  struct cuda_learner *learner = (struct cuda_learner *)base;
  struct cuda_set *set = calloc(1, sizeof *set);
  *ret_set = NULL;
  if (!set) return us_err_memory(err, "parameters", sizeof *set);
  *set = (struct cuda_set){.base = {.learner = base, .params = params}, .factor = 1.0};
  set->lane = calloc(base->lanes, sizeof *set->lane);
  set->owned = calloc(base->ranks, sizeof *set->owned);
  set->bias = calloc(params->floats, sizeof *set->bias);
  enum us_status status = set->lane && set->owned && set->bias
                              ? US_OK
                              : us_err_memory(err, "parameters", base->ranks * sizeof *set->owned);
  /* Muon's costs: where AdamW does everything the ranks' shares differ more, but then they are short. */
  if (status == US_OK) us_ownership_plan(params, US_OPTIM_MUON, base->ranks, set->owned);
  for (uint32_t i = 0; i < base->lanes && status == US_OK; i++)
    status = us_cuda_params_create(learner->cuda[i], params, set->owned[base->rank + i], &set->lane[i], err);
  if (status != US_OK) {
    cuda_remove(&set->base);
    return status;
  }
  copy_biases(set);
  *ret_set = &set->base;
  return US_OK;
}

static enum us_status cuda_send(struct us_learner_set *base, struct us_err *err) {
  struct cuda_set *set = (struct cuda_set *)base;
  enum us_status status = US_OK;
  for (uint32_t i = 0; i < base->learner->lanes && status == US_OK; i++)
    status = us_cuda_params_upload(set->lane[i], err);
  copy_biases(set);
  return status;
}

static float *cuda_bias(struct us_learner_set *base, const struct us_param *p) {
  return ((struct cuda_set *)base)->bias + p->offset;
}

static enum us_status cuda_send_bias(struct us_learner_set *base, const struct us_param *p,
                                     struct us_err *err) {
  struct cuda_set *set = (struct cuda_set *)base;
  for (uint32_t i = 0; i < base->learner->lanes; i++) {
    struct us_cuda *cuda = us_cuda_learner_of(base)->cuda[i];
    us_cuda_use(cuda);
    us_cuda_did(cuda,
                cudaMemcpyAsync(set->lane[i]->value + p->offset, set->bias + p->offset,
                                p->rows * sizeof(float), cudaMemcpyHostToDevice, cuda->stream),
                "router bias");
  }
  return US_OK; /* a failure shows at the next wait */
}

/* What all ranks own apart to this process's host, through the arena of the gradients, which nobody needs between steps. */
static enum us_status gather_owned(struct cuda_set *set, size_t which, struct us_err *err) {
  struct us_learner *base = set->base.learner;
  struct cuda_learner *learner = (struct cuda_learner *)base;
  float *from[US_POOL_MAX_THREADS], *to[US_POOL_MAX_THREADS];
  float *device[US_CUDA_OWNED_ARENAS], *host[US_CUDA_OWNED_ARENAS];
  for (uint32_t i = 0; i < base->lanes; i++) {
    us_cuda_params_owned_arenas(set->lane[i], device, host);
    from[i] = device[which];
    to[i] = set->lane[i]->grad;
  }
  enum us_status status = us_cuda_group_share(learner->group, set->owned, from, to, err);
  if (status == US_OK) status = us_cuda_group_wait(learner->group, err);
  if (status != US_OK) return status;
  us_cuda_use(learner->cuda[0]);
  us_cuda_did(learner->cuda[0],
              cudaMemcpyAsync(host[which], to[0], set->base.params->floats * sizeof(float),
                              cudaMemcpyDeviceToHost, learner->cuda[0]->stream),
              "copying moments");
  return us_cuda_sync(learner->cuda[0], err);
}

static enum us_status cuda_fetch(struct us_learner_set *base, bool moments, struct us_err *err) {
  struct cuda_set *set = (struct cuda_set *)base;
  enum us_status status = us_cuda_learner_wait(us_cuda_learner_of(base), err);
  if (status == US_OK) status = us_cuda_params_download(set->lane[0], err);
  if (!moments || status != US_OK) return status;
  if (base->learner->processes == 1) {
    for (uint32_t i = 0; i < base->learner->lanes && status == US_OK; i++)
      status = us_cuda_params_download_owned(set->lane[i], err);
    return status;
  }
  float *device[US_CUDA_OWNED_ARENAS], *host[US_CUDA_OWNED_ARENAS];
  size_t count = us_cuda_params_owned_arenas(set->lane[0], device, host);
  for (size_t which = 0; which < count && status == US_OK; which++) status = gather_owned(set, which, err);
  return status;
}

static enum us_status cuda_refresh(struct us_learner_set *base, struct us_err *err) {
  struct cuda_set *set = (struct cuda_set *)base;
  for (uint32_t i = 0; i < base->learner->lanes; i++) us_cuda_params_refresh(set->lane[i]);
  return US_OK; /* what is not finite shows at the next wait */
}

/* --- gradients --- */

static void cuda_zero_grad(struct us_learner_set *base) {
  struct cuda_set *set = (struct cuda_set *)base;
  for (uint32_t i = 0; i < base->learner->lanes; i++) us_cuda_params_zero_grad(set->lane[i]);
  set->factor = 1.0;
}

static void cuda_scale_grad(struct us_learner_set *base, float factor) {
  ((struct cuda_set *)base)->factor *= (double)factor;
}

static enum us_status reduce(struct cuda_set *set, struct us_err *err) {
  struct cuda_learner *learner = us_cuda_learner_of(&set->base);
  float *grad[US_POOL_MAX_THREADS];
  for (uint32_t i = 0; i < learner->base.lanes; i++) grad[i] = set->lane[i]->grad;
  return learner->group ? us_cuda_group_reduce(learner->group, set->owned, grad, err) : US_OK;
}

static enum us_status cuda_clip(struct us_learner_set *base, double limit, double *ret_norm,
                                struct us_err *err) {
  struct cuda_set *set = (struct cuda_set *)base;
  double sum = 0.0;
  enum us_status status = reduce(set, err);
  if (status == US_OK) status = us_cuda_learner_wait_set(base, err);
  for (uint32_t i = 0; i < base->learner->lanes && status == US_OK; i++) {
    double own = 0.0;
    status = us_cuda_params_square(set->lane[i], &own, err);
    sum += own;
  }
  if (status == US_OK) status = us_learner_sum(base->learner, &sum, 1, err);
  *ret_norm = set->factor * sqrt(sum);
  if (limit > 0.0 && *ret_norm > limit) set->factor *= limit / *ret_norm;
  return status;
}

/* Of this process's ranges; *ret_index stays SIZE_MAX if all are finite. */
static enum us_status find_own(struct cuda_set *set, size_t *ret_index, struct us_err *err) {
  enum us_status status = US_OK;
  *ret_index = SIZE_MAX;
  for (uint32_t i = 0; i < set->base.learner->lanes && status == US_OK && *ret_index == SIZE_MAX; i++) {
    const struct us_param *p = NULL;
    status = us_cuda_params_nonfinite(set->lane[i], &p, err);
    if (p) *ret_index = (size_t)(p - set->base.params->items);
  }
  return status;
}

/* The first tensor over all processes: each says in its turn what it found. */
static enum us_status cuda_nonfinite(struct us_learner_set *base, const struct us_param **ret_param,
                                     struct us_err *err) {
  struct us_learner *learner = base->learner;
  size_t own = SIZE_MAX, found = SIZE_MAX;
  *ret_param = NULL;
  enum us_status status = find_own((struct cuda_set *)base, &own, err);
  for (uint32_t rank = 0; rank < learner->ranks && status == US_OK; rank++) {
    bool mine = rank == learner->rank && own != SIZE_MAX;
    double index = mine ? (double)own + 1.0 : 0.0;
    status = us_learner_sum(learner, &index, 1, err);
    if (index > 0.0 && (size_t)index - 1 < found) found = (size_t)index - 1;
  }
  if (status == US_OK && found < base->params->count) *ret_param = &base->params->items[found];
  return status;
}

static enum us_status cuda_update(struct us_learner_set *base, const struct us_optim *optim, double rate,
                                  struct us_err *err) {
  struct cuda_set *set = (struct cuda_set *)base;
  struct cuda_learner *learner = us_cuda_learner_of(base);
  float *from[US_POOL_MAX_THREADS], *to[US_POOL_MAX_THREADS];
  enum us_status status = US_OK;
  for (uint32_t i = 0; i < base->learner->lanes && status == US_OK; i++) {
    status = us_cuda_params_update(set->lane[i], optim, rate, (float)set->factor, err);
    to[i] = set->lane[i]->value;
    from[i] = to[i] + set->owned[base->learner->rank + i].begin;
  }
  if (status == US_OK && learner->group)
    status = us_cuda_group_share(learner->group, set->owned, from, to, err);
  return status;
}

/* --- life --- */

static void cuda_free(struct us_learner *base) {
  struct cuda_learner *learner = (struct cuda_learner *)base;
  us_cuda_group_free(learner->group);
  us_rendezvous_close(learner->meeting);
  for (uint32_t i = 0; learner->cuda && i < base->lanes; i++) us_cuda_close(learner->cuda[i]);
  us_pool_free(learner->threads);
  pthread_mutex_destroy(&learner->mutex);
  free(learner->cuda);
  free(learner);
}

static const struct us_learner_ops cuda_ops = {.free = cuda_free,
                                               .each = cuda_each,
                                               .part = cuda_part,
                                               .sum = cuda_sum,
                                               .place = cuda_place,
                                               .remove = cuda_remove,
                                               .send = cuda_send,
                                               .fetch = cuda_fetch,
                                               .refresh = cuda_refresh,
                                               .zero_grad = cuda_zero_grad,
                                               .scale_grad = cuda_scale_grad,
                                               .clip = cuda_clip,
                                               .nonfinite = cuda_nonfinite,
                                               .update = cuda_update,
                                               .model_create = us_cuda_learner_model_create,
                                               .model_free = us_cuda_learner_model_free,
                                               .pass = us_cuda_learner_pass,
                                               .total = us_cuda_learner_total,
                                               .load = us_cuda_learner_load,
                                               .clear_load = us_cuda_learner_clear_load,
                                               .bias = cuda_bias,
                                               .send_bias = cuda_send_bias,
                                               .forward = us_cuda_learner_forward,
                                               .logits = us_cuda_learner_logits,
                                               .routed = us_cuda_learner_routed,
                                               .draft_create = us_cuda_learner_draft_create,
                                               .draft_free = us_cuda_learner_draft_free,
                                               .draft_pass = us_cuda_learner_draft_pass,
                                               .draft_tally = us_cuda_learner_draft_tally,
                                               .gptq = us_cuda_learner_gptq,
                                               .generate = us_cuda_learner_generate};

static enum us_status open_lanes(struct cuda_learner *learner, const struct us_learner_cuda_options *options,
                                 const struct us_ranks *ranks, struct us_err *err) {
  int visible = 0;
  uint32_t first = 0;
  enum us_status status = US_OK;
  cudaError_t code = cudaGetDeviceCount(&visible);
  if (code != cudaSuccess || visible <= options->first)
    return us_err_set(err, US_ERR_DEVICE, "no GPU %d%s%s%s", options->first, code == cudaSuccess ? "" : " (",
                      code == cudaSuccess ? "" : cudaGetErrorString(code), code == cudaSuccess ? "" : ")");
  if (!options->opt_ordinals)
    status = us_ranks_first_gpu(ranks, (uint32_t)(visible - options->first), options->gpus, &first, err);
  for (uint32_t i = 0; i < options->gpus && status == US_OK; i++) {
    int ordinal = options->opt_ordinals ? options->opt_ordinals[i] : options->first + (int)(first + i);
    status = us_cuda_open(ordinal, &learner->cuda[i], err);
    if (status == US_OK)
      snprintf(learner->base.name, sizeof learner->base.name, "%s", learner->cuda[i]->name);
    if (status == US_OK) learner->base.peak += learner->cuda[i]->peak * (double)ranks->processes;
  }
  if (status == US_OK && options->gpus > 1)
    status = us_pool_create((int)options->gpus, &learner->threads, err);
  return status;
}

static enum us_status open_group(struct cuda_learner *learner, const struct us_ranks *ranks,
                                 struct us_err *err) {
  struct us_learner *base = &learner->base;
  enum us_status status = US_OK;
  if (ranks->processes > 1) status = us_rendezvous_open(ranks, ARRIVAL_SECONDS, &learner->meeting, err);
  if (status == US_OK && base->ranks > 1)
    status = us_cuda_group_create(learner->cuda, base->lanes, base->rank, base->ranks, learner->meeting,
                                  &learner->group, err);
  return status;
}

enum us_status us_learner_create_cuda(const struct us_learner_cuda_options *options,
                                      struct us_learner **ret_learner, struct us_err *err) {
  static const struct us_ranks alone = {.processes = 1, .local_processes = 1};
  const struct us_ranks *ranks = options->ranks ? options->ranks : &alone;
  *ret_learner = NULL;
  if (!options->gpus || options->gpus > US_POOL_MAX_THREADS)
    return us_err_set(err, US_ERR_USAGE, "%u GPUs", options->gpus);
  struct cuda_learner *learner = calloc(1, sizeof *learner);
  if (!learner) return us_err_memory(err, "learner", sizeof *learner);
  learner->base = (struct us_learner){.ops = &cuda_ops,
                                      .lanes = options->gpus,
                                      .rank = ranks->process * options->gpus,
                                      .ranks = ranks->processes * options->gpus,
                                      .processes = ranks->processes,
                                      .apart = true,
                                      .busy = BUSY_ROWS};
  pthread_mutex_init(&learner->mutex, NULL);
  learner->cuda = calloc(options->gpus, sizeof *learner->cuda);
  enum us_status status =
      learner->cuda ? US_OK : us_err_memory(err, "GPUs", options->gpus * sizeof *learner->cuda);
  if (status == US_OK) status = open_lanes(learner, options, ranks, err);
  if (status == US_OK) status = open_group(learner, ranks, err);
  if (status == US_OK)
    *ret_learner = &learner->base;
  else
    cuda_free(&learner->base);
  return status;
}
