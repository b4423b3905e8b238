/* prefill.h: prompt passes: hundreds of rows of one sequence at once through the target, their taps into the drafter's cache.
 *
 *     struct us_device_prefill_options options = {.rows = 512, .logit_rows = 1, .max_positions = 32768 + 16};
 *     us_device_prefill_create(devices, weights, &options, &prefill, &err);
 *     us_device_prefill_caches(prefill, pool, opt_draft_pool);
 *     struct us_device_prefill_chunk chunk = {.tokens = tokens, .position = 0, .rows = 512, .kv = tables, .logits = 1};
 *     us_device_prefill_run(prefill, &chunk, &err);          // queued on the devices' streams
 *     us_device_prefill_fetch_logits(prefill, 1, logits, &err);
 *     us_device_prefill_free(prefill);
 *
 * Kernels in order on a stream a GPU (kernels/prefill/prefill.h), the same weights and pages as the engine. A row's results do not
 * depend on how a prompt is cut into chunks. Ranks share the rows between products: each adds up and norms its own, so that
 * every sum over ranks is made once, in rank order, and what is sent is partial sums to their owner and rounded rows to all.
 * GPUs wait for each other by events; ranks on one GPU take turns on its stream.
 */
#ifndef US_DEVICE_PREFILL_H
#define US_DEVICE_PREFILL_H

#include "device/device.h"
#include "device/kv_pool.h"
#include "device/weights.h"

struct us_device_prefill_options {
  uint32_t rows;       /* of a chunk at most, US_PREFILL_MAX_ROWS; more rows share each read of the experts */
  uint32_t logit_rows; /* of a chunk, its last ones, that may have logits; at least 1 */
  uint32_t max_positions; /* of a sequence: rope tables and page tables */
  bool uniform;           /* route uniformly from Philox, as the engine does for a request of that seed */
  uint64_t uniform_seed;
};

/* Up to `rows` rows at [position, position + rows). */
struct us_device_prefill_chunk {
  const int32_t *tokens; /* (rows) */
  uint32_t position, rows;
  const struct us_engine_kv *kv;           /* (ranks): tables with room for the rows */
  const struct us_engine_kv *opt_draft_kv; /* (ranks): also make drafter context of the rows; NULL: not */
  uint32_t logits;                         /* how many of the last rows want logits */
};

/* What a chunk leaves on a rank's GPU until the next one. */
struct us_device_prefill_result {
  const float *logits; /* (logits of the chunk, logits_stride): this rank's share of the vocabulary */
  uint32_t logits_stride, logits_first, logits_count;
  const uint16_t *features; /* (rows, taps * D): bf16(x) * 2^64; NULL without a drafter */
  const uint32_t
      *routed; /* (L, rows, top_k) of options.rows rows a layer: ascending ids; dense layers: not written */
};

struct us_device_prefill;

/* weights (devices->ranks), borrowed like devices. US_ERR_USAGE: sizes that the kernels do not support. */
US_CHECKED enum us_status us_device_prefill_create(struct us_devices *devices,
                                                   struct us_device_weights *const *weights,
                                                   const struct us_device_prefill_options *options,
                                                   struct us_device_prefill **ret_prefill,
                                                   struct us_err *err);
void us_device_prefill_free(struct us_device_prefill *prefill); /* NULL is allowed */

/* Where the caches' pages are; opt_draft NULL without a drafter. */
void us_device_prefill_caches(struct us_device_prefill *prefill, const struct us_kv_pool *target,
                              const struct us_kv_pool *opt_draft);

/* Queue a chunk. Returns before it is done. */
US_CHECKED enum us_status us_device_prefill_run(struct us_device_prefill *prefill,
                                                const struct us_device_prefill_chunk *chunk,
                                                struct us_err *err);

struct us_device_prefill_result us_device_prefill_result(const struct us_device_prefill *prefill,
                                                         uint32_t rank);

/* The last `rows` logits of the chunk, (rows, N) of all ranks, into host memory. Waits. */
US_CHECKED enum us_status us_device_prefill_fetch_logits(struct us_device_prefill *prefill, uint32_t rows,
                                                         float *logits, struct us_err *err);

/* GPU memory of a rank. */
US_CHECKED enum us_status us_device_prefill_bytes(const struct us_shape *shape,
                                                  const struct us_draft_shape *opt_draft, uint32_t ranks,
                                                  const struct us_device_prefill_options *options,
                                                  uint64_t *ret_bytes, struct us_err *err);

#endif
