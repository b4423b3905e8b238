/* bench.h: how fast an engine decodes: sequences placed at a position, rounds timed by the GPU's own clock.
 *
 *     struct us_bench_device device;
 *     us_bench_device(ex, &device, &err);                                  // what runs, and the ceiling of its memory
 *     struct us_bench_options options = {.batch = 1, .block = 8, .context = 4096, .rounds = 256, .warmup = 64};
 *     us_bench_run(ex, &options, &result, &err);
 *     printf("%.1f tokens/s\n", (double)result.tokens / result.seconds);
 *
 * A sequence starts after `context` positions whose keys and values are zero: what they are does not change the time. Rounds are
 * those of ops->rounds (device/loop.h), resident or as a graph, drafter, verification and token ring included. Acceptance is what
 * the drafter reaches, or replayed: the target's own tokens are recorded first, plainly, then proposed again, each kept at the
 * rate of its slot, while the drafter runs for its time alone.
 */
#ifndef US_DEVICE_BENCH_H
#define US_DEVICE_BENCH_H

#include "device/traffic.h"
#include "device/weights.h"
#include "model/executor.h"

struct us_bench_device {
  uint32_t gpus, ranks;
  char name[64];
  const char *engine;               /* "cuda-engine" or "cuda-graph" */
  double ceiling;                   /* bytes a second that all GPUs together can read */
  struct us_device_bytes bytes;     /* weights of a GPU: of its largest rank, times ranks a GPU */
  uint64_t cache_bytes;             /* pages of all caches, on a GPU */
  uint64_t used_bytes, total_bytes; /* of the fullest GPU's memory, by anybody */
};

/* No cache may be open: the pages that are free count as all. US_ERR_USAGE: not an executor on GPUs. */
US_CHECKED enum us_status us_bench_device(const struct us_executor *ex, struct us_bench_device *ret_device,
                                          struct us_err *err);

struct us_bench_options {
  uint32_t batch, block;   /* sequences; rows of a round, anchor included: 1 is plain decoding */
  uint32_t context;        /* positions before the first round's anchor */
  uint32_t rounds, warmup; /* rounds that are timed, after so many that are not */
  const float *accept;     /* (accept_count) rates by slot, the last one repeats: replayed; NULL: measured */
  size_t accept_count;
  uint64_t seed; /* of the first tokens */
  bool (*interrupted)(void);
};

struct us_bench_spread { /* seconds */
  double mean, p50, p95, p99;
};

struct us_bench_result {
  uint32_t rounds; /* that were timed: fewer than asked for where the record of a replay ended */
  uint64_t tokens; /* committed in them, by all sequences */
  uint64_t steps;  /* rounds of single sequences: tokens / steps is the acceptance length */
  double seconds;  /* of all timed rounds */
  struct us_bench_spread round,
      token;      /* a round's time; shared among the tokens that a sequence gets from it */
  double experts; /* distinct experts a MoE layer and row tile, mean; 0 without MoE layers */
  struct us_device_traffic traffic; /* of a round on one rank */
  double weight_bytes;              /* of a round on all ranks, as counted */
  double kv_bytes;                  /* keys and values of a round at `context`, on all ranks */
  uint64_t workspace_bytes;         /* of the schedule on a GPU */
};

/* Positions of a sequence that a run may reach: what the caches must hold. Needs no GPU. */
uint32_t us_bench_positions(const struct us_bench_options *options);

/* Tokens of each sequence that a replay records: what the rates come to, and a tenth more. */
uint32_t us_bench_replayed(const struct us_bench_options *options);

/* Weighted mean, and the values below which half, 95 % and 99 % of the weight lie; samples (n) are sorted. */
struct us_bench_sample {
  double value, weight;
};
struct us_bench_spread us_bench_spread_of(struct us_bench_sample *samples, size_t n);

/* The executor's drafter runs if it has one and block > 1. US_ERR_USAGE: a block without drafter or rates; what the caches cannot
 * hold; US_ERR_CHECK: logits that are not finite; US_ERR_DEVICE; US_ERR_MEMORY; US_INTERRUPTED. */
US_CHECKED enum us_status us_bench_run(struct us_executor *ex, const struct us_bench_options *options,
                                       struct us_bench_result *ret_result, struct us_err *err);

/* Whether the engine runs so many sequences in such blocks; `replays`: proposals may come from elsewhere than a drafter. */
US_CHECKED enum us_status us_bench_check(const struct us_executor *ex, uint32_t batch, uint32_t block,
                                         bool replays, struct us_err *err);

/* Sequences that stand at a position with nothing but zeros behind them: what a bench, or a profile, runs rounds of. */
struct us_bench_place {
  uint32_t batch;
  struct us_kv *kv[US_ENGINE_SEQUENCES], *draft_kv[US_ENGINE_SEQUENCES];
  struct us_rounds_sequence sequence[US_ENGINE_SEQUENCES]; /* limit and drafts are the caller's to set */
};
US_CHECKED enum us_status us_bench_place(struct us_executor *ex, uint32_t batch, uint32_t context,
                                         uint32_t positions, bool drafting, uint64_t seed,
                                         struct us_bench_place *ret_place, struct us_err *err);
void us_bench_unplace(struct us_bench_place *place);

#endif
