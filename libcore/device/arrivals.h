/* arrivals.h: a recorded load: when requests arrived, how long their prompts were and their answers; and serving it again.
 *
 *     us_arrivals_read("load.tsv", &arrivals, &n, &err);          // arrival_ms, prompt_tokens, output_tokens
 *     us_arrivals_serve(ex, arrivals, n, &options, &result, &err);
 *     free(arrivals);
 *
 * Prompts are random tokens and run through prefill as they arrive; while one does, the others wait. Answers have the recorded
 * length: end tokens do not end them. A request that arrives while all places are taken waits for one. Time is real time.
 */
#ifndef US_DEVICE_ARRIVALS_H
#define US_DEVICE_ARRIVALS_H

#include "device/bench.h"

struct us_arrival {
  double seconds; /* since the first */
  uint32_t prompt_tokens, output_tokens;
};

/* Tab-separated, a header line with the three names in any order, ascending times. US_ERR_INPUT names the line. The caller frees
 * the list. */
US_CHECKED enum us_status us_arrivals_read(const char *path, struct us_arrival **ret_arrivals, size_t *ret_n,
                                           struct us_err *err);

/* Positions that the longest request needs. */
uint32_t us_arrivals_positions(const struct us_arrival *arrivals, size_t n);

struct us_arrivals_options {
  uint32_t batch,
      block; /* requests together; rows of a round: above 1 the drafter proposes, or nobody does */
  uint64_t seed;
  bool (*interrupted)(void); /* may be NULL */
};

struct us_arrivals_result {
  uint64_t requests, prompt_tokens, output_tokens, steps; /* steps: rounds of single requests */
  double seconds;                                         /* from the first arrival to the last token */
  uint32_t most_together;
  struct us_bench_spread first_token, token,
      request; /* from arrival to the first token; a token, of rounds by the GPU's clock; from
                                                       * arrival to the last token: seconds */
};

US_CHECKED enum us_status us_arrivals_serve(struct us_executor *ex, const struct us_arrival *arrivals,
                                            size_t n, const struct us_arrivals_options *options,
                                            struct us_arrivals_result *ret_result, struct us_err *err);

#endif
