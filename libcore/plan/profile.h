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

#define US_TRACE_ROLES 4
#define US_TRACE_WAITS 10 /* enum us_engine_wait */

/* "worker", "compute", "stream", "epilogue"; and what a role of the engine waits for: "hand-off", "ring empty", ... */
const char *us_trace_role_name(int role);
const char *us_trace_wait_name(int wait);

/* Operations by name, and what no task of the tile program stands for: "round". */
const char *us_trace_op_name(int op);

/* Spans as TSV: pass, program, op, layer, worker, claimed_us, start_us, end_us, bytes, role, wait; header first. */
US_CHECKED enum us_status us_profile_write_tsv(const struct us_trace *trace, FILE *file, struct us_err *err);

/* Chrome trace events; Perfetto opens it. One track a worker, a second one for its waits; of the engine a process a GPU, in it a
 * track for every role of a block, waits inside of operations. The caller owns the file. */
US_CHECKED enum us_status us_profile_write_perfetto(const struct us_trace *trace, FILE *file,
                                                    struct us_err *err);

#endif
