/* profile_device.h: rounds of the engine with its timeline recorded, and the same rounds without.
 *
 *     struct us_device_profile_options options = {.batch = 1, .block = 8, .context = 4096, .rounds = 3, .capacity = 32768, .keep = 4};
 *     us_device_profile_run(ex, &options, &result, trace, &err);
 *     printf("a round of %.3f ms, %.1f %% of it streaming\n", 1e3 * result.breakdown.round, ...);
 *
 * Sequences are placed as for a bench (device/bench.h). Recording takes time: result.plain_round tells how long a round takes
 * without, measured just before and just after.
 */
#ifndef US_DEVICE_PROFILE_DEVICE_H
#define US_DEVICE_PROFILE_DEVICE_H

#include "device/critical_path.h"
#include "device/traffic.h"
#include "model/executor.h"

struct us_device_profile_options {
  uint32_t batch,
      block; /* sequences; rows of each: anchor and proposals, the drafter's or, without one, arbitrary */
  uint32_t context;  /* positions before the first round */
  uint32_t rounds;   /* recorded ones, after some that bring the clocks up */
  uint32_t capacity; /* spans a role of a block; less if the GPU has no room */
  uint32_t keep;     /* blocks of each GPU whose spans go into the trace; 0: all */
  bool path;         /* find the critical path too */
  uint64_t seed;
  bool (*interrupted)(void); /* may be NULL */
};

struct us_device_profile_result {
  struct us_breakdown breakdown;
  struct us_critical_path path;                       /* if asked for */
  double plain_round, recorded_round;                 /* seconds, mean, by the GPU's clock */
  double experts;                                     /* distinct ones a MoE layer and row tile, mean */
  struct us_device_traffic traffic[US_PROGRAM_KINDS]; /* of a round on one rank, by program */
  uint32_t gpus, ranks, blocks;                       /* blocks: of a GPU */
};

/* US_ERR_USAGE: what us_bench_run refuses; US_ERR_MEMORY: no room for the spans; US_ERR_CHECK: for those of two rounds. */
US_CHECKED enum us_status us_device_profile_run(struct us_executor *ex,
                                                const struct us_device_profile_options *options,
                                                struct us_device_profile_result *ret_result,
                                                struct us_trace *trace, struct us_err *err);

#endif
