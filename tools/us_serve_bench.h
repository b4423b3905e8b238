/* us_serve_bench.h: us-serve --bench: the speed of decoding on GPUs, over batches and contexts.
 *
 *     static const struct us_opt opts[] = {..., US_SERVE_BENCH_OPTIONS, US_OPT_END};
 *     us_serve_bench_plan(run->opts, accept, accept_count, &plan, &err);    // before the executor: what it must have room for
 *     us_serve_bench(run, &plan, ex, &err);
 *
 * A table on a terminal, else a JSON line a combination of batch and context.
 */
#ifndef US_TOOLS_US_SERVE_BENCH_H
#define US_TOOLS_US_SERVE_BENCH_H

#include "device/arrivals.h"
#include "tools/tool.h"

#define US_SERVE_BENCH_LIST 32

#define US_SERVE_BENCH_OPTIONS                                                                               \
  US_OPT_GROUP("Benchmark"), US_OPT_FLAG("bench", 0, "time rounds on the GPU instead of answering prompts"), \
      US_OPT_STR("batches", 0, "N,N,...", "numbers of sequences to try instead of --batch"),                 \
      US_OPT_STR("context", 0, "N,N,...", "positions before the first round to try; default: 4096"),         \
      US_OPT_INT("rounds", 0, "N", "rounds that are timed", .def = "256", .min = 2, .max = 100000),          \
      US_OPT_INT("warmup", 0, "N", "rounds before them", .def = "64", .min = 1, .max = 100000),              \
      US_OPT_FLAG("first-token", 0, "also run a prompt of each context and time its first token"),           \
      US_OPT_FILE("trace", 0, "FILE.tsv",                                                                    \
                  "serve a recorded load again: arrival_ms, prompt_tokens, output_tokens"),                  \
      US_OPT_FILE("plot", 0, "FILE.png", "tokens a second over batches, a line a context",                   \
                  .writes = US_OPT_WRITES_FILE)

struct us_serve_bench_plan {
  uint32_t batches[US_SERVE_BENCH_LIST], contexts[US_SERVE_BENCH_LIST];
  uint32_t batch_count, context_count;
  float accept[US_MAX_BLOCK]; /* replayed rates; count 0: measured */
  size_t accept_count;
  uint32_t sequences, positions; /* that the executor must have caches for */
  struct us_arrival *arrivals;   /* (arrival_count) of --trace; freed by us_serve_bench_release */
  size_t arrival_count;
};

/* US_ERR_USAGE: options that need --bench, or that it cannot do. The rates are those of --accept, already read. */
US_CHECKED enum us_status us_serve_bench_plan(struct us_opts *opts, const float *accept, size_t accept_count,
                                              struct us_serve_bench_plan *ret_plan, struct us_err *err);

void us_serve_bench_release(struct us_serve_bench_plan *plan);

US_CHECKED enum us_status us_serve_bench(struct us_tool_run *run, const struct us_serve_bench_plan *plan,
                                         struct us_executor *ex, struct us_err *err);

#endif
