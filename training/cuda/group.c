/* group.c: GPUs that train together, through NCCL. */
#include "training/cuda/group.h"

#include "training/cuda/cuda.h"

#include <nccl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST_VALUES 64
#define LOOK_EVERY  2000 /* polls of 20 us between looks for processes that are gone */

struct us_cuda_group {
  struct us_cuda *const *cuda; /* (lanes) borrowed */
  uint32_t lanes, rank, ranks;
  struct us_rendezvous *rendezvous; /* borrowed; NULL in one process */
  ncclComm_t *comm;                 /* (lanes) */
  double **device;                  /* (lanes) MOST_VALUES */
  double *pinned;
  bool broken;
};

static enum us_status nccl_status(ncclResult_t code, const char *what, struct us_err *err) {
  if (code == ncclSuccess || code == ncclInProgress) return US_OK;
  return us_err_set(err, US_ERR_DEVICE, "%s: %s", what, ncclGetErrorString(code));
}

/* --- life --- */

static enum us_status connect_lanes(struct us_cuda_group *g, struct us_err *err) {
  ncclUniqueId id;
  memset(&id, 0, sizeof id);
  enum us_status status = US_OK;
  if (g->rank == 0) status = nccl_status(ncclGetUniqueId(&id), "NCCL", err);
  if (status == US_OK && g->rendezvous) status = us_rendezvous_share(g->rendezvous, &id, sizeof id, err);
  if (status == US_OK) status = nccl_status(ncclGroupStart(), "NCCL", err);
  for (uint32_t i = 0; i < g->lanes && status == US_OK; i++) {
    us_cuda_use(g->cuda[i]);
    status = nccl_status(ncclCommInitRank(&g->comm[i], (int)g->ranks, id, (int)(g->rank + i)),
                         "connecting the GPUs", err);
  }
  ncclResult_t ended = ncclGroupEnd();
  return status == US_OK ? nccl_status(ended, "connecting the GPUs", err) : status;
}

static enum us_status take_buffers(struct us_cuda_group *g, struct us_err *err) {
  void *memory = NULL;
  enum us_status status = us_cuda_take_pinned(MOST_VALUES * sizeof(double), "sums", &memory, err);
  g->pinned = memory;
  for (uint32_t i = 0; i < g->lanes && status == US_OK; i++) {
    status = us_cuda_take(g->cuda[i], MOST_VALUES * sizeof(double), "sums", &memory, err);
    g->device[i] = memory;
  }
  return status;
}

enum us_status us_cuda_group_create(struct us_cuda *const *cuda, uint32_t lanes, uint32_t rank,
                                    uint32_t ranks, struct us_rendezvous *opt_rendezvous,
                                    struct us_cuda_group **ret_group, struct us_err *err) {
  struct us_cuda_group *g = calloc(1, sizeof *g);
  *ret_group = NULL;
  if (!g) return us_err_memory(err, "group of GPUs", sizeof *g);
  *g = (struct us_cuda_group){
      .cuda = cuda, .lanes = lanes, .rank = rank, .ranks = ranks, .rendezvous = opt_rendezvous};
  g->comm = calloc(lanes, sizeof *g->comm);
  g->device = calloc(lanes, sizeof *g->device);
  enum us_status status = g->comm && g->device ? US_OK : us_err_memory(err, "group of GPUs", lanes);
  if (status == US_OK) status = take_buffers(g, err);
  if (status == US_OK) status = connect_lanes(g, err);
  if (status != US_OK) {
    us_cuda_group_free(g);
    return status;
  }
  *ret_group = g;
  return US_OK;
}

/* What is queued will never end: give it up. */
static void break_up(struct us_cuda_group *g) {
  for (uint32_t i = 0; i < g->lanes; i++)
    if (g->comm[i]) (void)ncclCommAbort(g->comm[i]);
  memset(g->comm, 0, g->lanes * sizeof *g->comm);
  g->broken = true;
}

void us_cuda_group_free(struct us_cuda_group *g) {
  if (!g) return;
  for (uint32_t i = 0; g->comm && i < g->lanes; i++)
    if (g->comm[i]) (void)ncclCommDestroy(g->comm[i]);
  for (uint32_t i = 0; g->device && i < g->lanes; i++) us_cuda_give(g->device[i]);
  us_cuda_give_pinned(g->pinned);
  free(g->comm);
  free(g->device);
  free(g);
}

/* --- transfers --- */

static enum us_status check(const struct us_cuda_group *g, struct us_err *err) {
  return g->broken ? us_err_set(err, US_ERR_DEVICE, "the group of GPUs was given up") : US_OK;
}

enum us_status us_cuda_group_reduce(struct us_cuda_group *g, const struct us_owned *owned, float *const *grad,
                                    struct us_err *err) {
  enum us_status status = check(g, err);
  if (status != US_OK) return status;
  status = nccl_status(ncclGroupStart(), "NCCL", err);
  for (uint32_t r = 0; r < g->ranks; r++)
    for (uint32_t i = 0; i < g->lanes && status == US_OK && owned[r].end > owned[r].begin; i++) {
      float *at = grad[i] + owned[r].begin;
      status = nccl_status(ncclReduce(at, at, owned[r].end - owned[r].begin, ncclFloat, ncclSum, (int)r,
                                      g->comm[i], g->cuda[i]->stream),
                           "summing gradients", err);
    }
  ncclResult_t ended = ncclGroupEnd();
  return status == US_OK ? nccl_status(ended, "summing gradients", err) : status;
}

enum us_status us_cuda_group_share(struct us_cuda_group *g, const struct us_owned *owned, float *const *from,
                                   float *const *to, struct us_err *err) {
  enum us_status status = check(g, err);
  if (status != US_OK) return status;
  status = nccl_status(ncclGroupStart(), "NCCL", err);
  for (uint32_t r = 0; r < g->ranks; r++)
    for (uint32_t i = 0; i < g->lanes && status == US_OK && owned[r].end > owned[r].begin; i++)
      status = nccl_status(ncclBroadcast(from[i], to[i] + owned[r].begin, owned[r].end - owned[r].begin,
                                         ncclFloat, (int)r, g->comm[i], g->cuda[i]->stream),
                           "sharing weights", err);
  ncclResult_t ended = ncclGroupEnd();
  return status == US_OK ? nccl_status(ended, "sharing weights", err) : status;
}

enum us_status us_cuda_group_sum(struct us_cuda_group *g, double *values, size_t n, struct us_err *err) {
  enum us_status status = check(g, err);
  if (status != US_OK) return status;
  if (n > MOST_VALUES) return us_err_set(err, US_ERR_USAGE, "%zu values in a sum of %d", n, MOST_VALUES);
  memcpy(g->pinned, values, n * sizeof *values);
  us_cuda_use(g->cuda[0]);
  us_cuda_upload(g->cuda[0], g->device[0], g->pinned, n * sizeof *values);
  status = nccl_status(ncclGroupStart(), "NCCL", err);
  for (uint32_t i = 0; i < g->lanes && status == US_OK; i++) /* the other lanes' values stay 0 */
    status = nccl_status(ncclAllReduce(i ? g->device[i] : g->device[0], i ? g->device[i] : g->device[0], n,
                                       ncclDouble, ncclSum, g->comm[i], g->cuda[i]->stream),
                         "sums", err);
  ncclResult_t ended = ncclGroupEnd();
  if (status == US_OK) status = nccl_status(ended, "sums", err);
  if (status != US_OK) return status;
  us_cuda_use(g->cuda[0]);
  us_cuda_download(g->cuda[0], g->pinned, g->device[0], n * sizeof *values);
  for (uint32_t i = 1; i < g->lanes; i++) {
    us_cuda_use(g->cuda[i]);
    us_cuda_did(g->cuda[i],
                cudaMemsetAsync(g->device[i], 0, MOST_VALUES * sizeof(double), g->cuda[i]->stream), "sums");
  }
  status = us_cuda_group_wait(g, err);
  memcpy(values, g->pinned, n * sizeof *values);
  return status;
}

/* --- waiting --- */

/* Whether every stream has come to its end, or an error. */
static enum us_status poll_streams(struct us_cuda_group *g, bool *ret_done, struct us_err *err) {
  enum us_status status = US_OK;
  *ret_done = true;
  for (uint32_t i = 0; i < g->lanes && status == US_OK; i++) {
    ncclResult_t state = ncclSuccess;
    us_cuda_use(g->cuda[i]);
    cudaError_t code = cudaStreamQuery(g->cuda[i]->stream);
    if (code == cudaErrorNotReady) *ret_done = false;
    if (code != cudaSuccess && code != cudaErrorNotReady) {
      us_cuda_did(g->cuda[i], code, "waiting for the GPU");
      status = us_cuda_failed(g->cuda[i], err);
    }
    if (status == US_OK) status = nccl_status(ncclCommGetAsyncError(g->comm[i], &state), "NCCL", err);
    if (status == US_OK) status = nccl_status(state, "NCCL", err);
  }
  return status;
}

enum us_status us_cuda_group_wait(struct us_cuda_group *g, struct us_err *err) {
  bool done = false;
  enum us_status status = check(g, err);
  for (uint32_t polls = 0; status == US_OK && !done; polls++) {
    status = poll_streams(g, &done, err);
    if (status == US_OK && !done && g->rendezvous && polls % LOOK_EVERY == LOOK_EVERY - 1)
      status = us_rendezvous_check(g->rendezvous, err);
    if (status == US_OK && !done) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
  }
  struct us_err lost = {0};
  if (status == US_OK || g->broken) return status;
  /* NCCL may notice first that a peer hung up: who it was says more. */
  if (g->rendezvous && us_rendezvous_check(g->rendezvous, &lost) != US_OK)
    (void)us_err_set(err, lost.status, "%s", lost.message);
  break_up(g);
  return status;
}
