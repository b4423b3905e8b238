/* profile_files.h: a trace as an HDF5 artefact and as a picture.
 *
 *     us_profile_write_h5(trace, "trace.h5", provenance_json, &err);
 *     us_profile_plot(trace, workers, 40, "trace.png", provenance_json, &err);     // the last 40 ms
 */
#ifndef US_PLAN_PROFILE_FILES_H
#define US_PLAN_PROFILE_FILES_H

#include "plan/profile.h"

#define US_TRACE_KIND "trace"

/* Kind "trace": datasets claimed, start, end, bytes (u64: ns, bytes), layer, pass, op, worker, program, role, wait (u32), one
 * element a span, and root texts "ops", "programs", "roles" and "waits": the names that the numbers stand for, separated by
 * commas. */
US_CHECKED enum us_status us_profile_write_h5(const struct us_trace *trace, const char *path,
                                              const char *provenance_json, struct us_err *err);

/* A timeline with a row a worker, operations as colours, over the last `milliseconds` of the trace (0: all of it). */
US_CHECKED enum us_status us_profile_plot(const struct us_trace *trace, int workers, double milliseconds,
                                          const char *path, const char *opt_provenance, struct us_err *err);

/* The engine's: a row a role of every block in the trace, waits in front of operations, over `milliseconds` in the trace's middle
 * (0: all of it). */
US_CHECKED enum us_status us_profile_plot_engine(const struct us_trace *trace, double milliseconds,
                                                 const char *path, const char *opt_provenance,
                                                 struct us_err *err);

#endif
