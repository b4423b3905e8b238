/* executor.h: the executor that runs passes on GPUs: the persistent kernel, or one kernel an operation in a CUDA graph.
 *
 *     struct us_executor_cuda_options options = {.device = 0, .gpus = 1, .mode = US_DEVICE_ENGINE, .sequences = 2};
 *     struct us_executor *ex;
 *     us_executor_create_cuda(model, opt_draft, &options, &ex, &err);
 *     us_executor_create_synthetic(&shape, opt_draft_shape, seed, &options, &ex, &err);   // weights made on the GPU
 *     us_generate(ex, requests, n, ...);                       // caches lie on the GPU: ex->kv_memory
 *     ex->ops->free(ex);
 *
 * A pass of R rows runs 8 to 128 at a time, a sequence's rows 16 at a time; a row's result does not depend on the cut. With
 * several GPUs or ranks every rank runs the same list on its share of the weights.
 */
#ifndef US_DEVICE_EXECUTOR_H
#define US_DEVICE_EXECUTOR_H

#include "device/group.h"
#include "model/executor.h"

struct us_executor_cuda_options {
  int device;               /* first GPU */
  uint32_t gpus;            /* from it on; 0 counts as 1 */
  uint32_t ranks;           /* shares of the weights; 0: as many as GPUs */
  enum us_device_mode mode; /* ENGINE or GRAPH */
  uint32_t sequences;       /* caches that live at once; 0: 2 */
  uint32_t positions;       /* of a sequence at most; 0: as many as fit (budget.h) */
  bool
      uniform; /* draw experts uniformly instead of by the router's scores: synthetic weights choose too few */
  uint64_t uniform_seed;
  uint32_t jitter;     /* test: random delays of up to so many ns before every hand-off */
  uint64_t timeout_ns; /* of the watchdog of one wait; 0: five seconds */
  void (*say)(void *arg, const char *line);                   /* memory report, hung roles; may be NULL */
  void (*progress)(void *arg, uint64_t done, uint64_t total); /* bytes of weights on the GPUs; may be NULL */
  void *arg;
};

/* Loads the weights. Borrows model and draft, which the passes do not read again. US_ERR_DEVICE: no GPU, the wrong kind, no
 * peer access, or a CUDA error; US_ERR_MEMORY: says what is needed by kind; US_ERR_USAGE: the shape cannot be cut so. */
US_CHECKED enum us_status us_executor_create_cuda(const struct us_model *model,
                                                  const struct us_draft *opt_draft,
                                                  const struct us_executor_cuda_options *options,
                                                  struct us_executor **ret_executor, struct us_err *err);

/* Random weights of a shape, made on the GPUs (us_device_weights_synthetic). ex->model is a skeleton: its matrices have formats
 * and sizes, no data. */
US_CHECKED enum us_status us_executor_create_synthetic(const struct us_shape *shape,
                                                       const struct us_draft_shape *opt_draft, uint64_t seed,
                                                       const struct us_executor_cuda_options *options,
                                                       struct us_executor **ret_executor, struct us_err *err);

/* What a loop on the GPUs shares with the executor: it makes a group of its own from these. */
struct us_executor_cuda_parts {
  struct us_devices *devices;
  struct us_device_weights *const *weights; /* (ranks) */
  struct us_kv_pool *pool, *draft_pool;     /* draft_pool NULL without a drafter */
  uint32_t positions;                       /* for us_device_schedule_options.max_positions */
  enum us_device_mode mode;
  bool uniform;
  uint64_t uniform_seed;
  uint32_t jitter; /* of us_executor_cuda_options, as the next */
  uint64_t timeout_ns;
};
/* false: not an executor of this kind. */
bool us_executor_cuda_parts(const struct us_executor *executor, struct us_executor_cuda_parts *ret_parts);

#endif
