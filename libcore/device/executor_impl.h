/* executor_impl.h: what the sources of the CUDA executor share. Internal to device/. */
#ifndef US_DEVICE_EXECUTOR_IMPL_H
#define US_DEVICE_EXECUTOR_IMPL_H

#include "device/budget.h"
#include "device/executor.h"
#include "device/loop.h"
#include "device/prefill.h"

struct us_cuda {
  struct us_executor base;
  struct us_executor_cuda_options options;
  struct us_devices *devices;
  struct us_device_weights *weights[US_ENGINE_MAX_RANKS];
  struct us_device_budget budget;
  struct us_kv_pool *pool, *draft_pool;
  struct us_device_group *groups[US_DEVICE_GROUPS]; /* of 8 << i rows; made when first needed */
  struct us_device_prefill
      *prefill;                   /* NULL: its kernels cannot run this shape, prompts go through the groups */
  struct us_device_loop *loop;    /* resident rounds; made when first asked for */
  struct us_device_tables tables; /* of the pass that is being prepared */
  void *staging;                  /* pinned host memory that results are copied to */
  size_t staging_bytes;
  struct us_model *outline; /* of synthetic weights */
  struct us_draft *draft_outline;
  uint32_t passes;
};

/* Up to 128 rows of a target pass on their way through a group. */
struct us_cuda_chunk {
  struct us_device_group *group;
  const struct us_pass *pass;
  size_t begin, rows;                 /* of the pass */
  uint32_t place[US_ENGINE_MAX_ROWS]; /* (rows) each row's in the group, ascending */
};

/* The smallest group of at least `rows` rows. */
US_CHECKED enum us_status us_cuda_group(struct us_cuda *cuda, size_t rows, struct us_device_group **ret_group,
                                        struct us_err *err);

/* Pinned memory of at least so many bytes. */
US_CHECKED enum us_status us_cuda_staging(struct us_cuda *cuda, size_t bytes, struct us_err *err);

/* Operations [begin, end) of a pass of the group, up to and with its logits, or without the head. */
uint32_t us_cuda_range_end(const struct us_device_schedule *schedule, enum us_engine_program program,
                           bool head);

/* Copy a rank's memory to the host, in the order of its stream; does not wait. */
US_CHECKED enum us_status us_cuda_fetch(const struct us_cuda *cuda, uint32_t rank, void *to, const void *from,
                                        size_t bytes, struct us_err *err);

/* The stream of a rank's GPU, which becomes the current one. */
cudaStream_t us_cuda_use_rank(const struct us_cuda *cuda, uint32_t rank);

void us_cuda_clear_rows(struct us_engine_row rows[US_ENGINE_MAX_ROWS]);

/* Upload the group's state with cuda->tables and launch a program of it. */
US_CHECKED enum us_status us_cuda_run(struct us_cuda *cuda, struct us_device_group *group,
                                      enum us_engine_program program, bool head, struct us_err *err);

/* Rows [a, b) of the logits of all ranks side by side into the staging memory (row r at r * N); does not wait. */
US_CHECKED enum us_status us_cuda_fetch_logits(const struct us_cuda *cuda,
                                               const struct us_device_group *group, bool draft, size_t a,
                                               size_t b, struct us_err *err);

/* Prompt rows in one launch of the prefill kernels (passes_prefill.c). us_cuda_prefill_takes: whether the pass is one for them. */
bool us_cuda_prefill_takes(const struct us_pass *pass);
US_CHECKED enum us_status us_cuda_prefill(struct us_cuda *cuda, const struct us_pass *pass,
                                          struct us_err *err);

/* What the prefill kernels are made for. */
struct us_device_prefill_options us_cuda_prefill_options(const struct us_cuda *cuda, uint32_t positions);

/* The operations of an executor (passes.c, passes_draft.c). */
enum us_status us_cuda_forward(struct us_executor *executor, const struct us_pass *pass, struct us_err *err);
enum us_status us_cuda_draft_context(struct us_executor *executor, const struct us_draft_context *context,
                                     struct us_err *err);
enum us_status us_cuda_draft(struct us_executor *executor, const struct us_draft_pass *pass,
                             struct us_err *err);

/* Run operations [first, last) of a chunk one by one, telling the pass's observer after each (observe.c). *ret_stopped: the
 * observer said so. */
US_CHECKED enum us_status us_cuda_observe(struct us_cuda *cuda, const struct us_cuda_chunk *chunk,
                                          uint32_t first, uint32_t last, bool *ret_stopped,
                                          struct us_err *err);

#endif
