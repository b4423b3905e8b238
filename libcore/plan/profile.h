/* profile.h: from a trace to where the time went, and to files that show it.
 *
 *     struct us_profile profile;
 *     us_profile_summarise(trace, workers, &profile);
 *     printf("idle %.1f %%\n", 100 * profile.idle_share);
 *     us_profile_write_perfetto(trace, "run.json", &err);
 */
#ifndef US_PLAN_PROFILE_H
#define US_PLAN_PROFILE_H

#include "plan/program.h"
#include "plan/trace.h"

#include <stdio.h>

/* One operation of one kind of program, summed over layers, tiles and passes. Seconds are worker-seconds. */
struct us_profile_op {
  uint64_t tasks;
  double busy;  /* start to end */
  double wait;  /* claimed to start */
  double bytes; /* weight bytes streamed */
};

#define US_PROGRAM_KINDS 3

struct us_profile {
  struct us_profile_op ops[US_PROGRAM_KINDS][US_TASK_OP_COUNT];
  double span; /* first claim to last end, seconds */
  double
      in_passes; /* sum over passes of first claim to last end: the rest is sampling, drafting logic, output */
  double busy, wait; /* worker-seconds */
  double idle_share; /* 1 - busy / (workers * in_passes) */
  double bytes;
  uint32_t passes;
  int workers;
};

/* Summarise the kept spans. Zero spans give zeros. */
void us_profile_summarise(const struct us_trace *trace, int workers, struct us_profile *ret_profile);

/* "target", "draft", "context". */
const char *us_program_kind_name(enum us_program_kind kind);

/* Spans as TSV: pass, program, op, layer, worker, claimed_us, start_us, end_us, bytes; header first. */
US_CHECKED enum us_status us_profile_write_tsv(const struct us_trace *trace, FILE *file, struct us_err *err);

/* Chrome trace events, one track a worker, a second one for its waits; Perfetto opens it. The caller owns the file. */
US_CHECKED enum us_status us_profile_write_perfetto(const struct us_trace *trace, FILE *file,
                                                    struct us_err *err);

#endif
