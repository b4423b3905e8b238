/* tile_profile_gpu.h: tile-profile --device cuda: where a round of the engine goes.
 *
 *     us_tile_profile_open(run, pair, &ex, &err);        // from the pair of a checkpoint, or random weights of a shape
 *     us_tile_profile_gpu(run, ex, trace, &err);         // runs, fills the trace, prints the table
 */
#ifndef US_TOOLS_TILE_PROFILE_GPU_H
#define US_TOOLS_TILE_PROFILE_GPU_H

#include "decode/pair.h"
#include "model/executor.h"
#include "plan/trace.h"
#include "tools/synthetic_shape.h"
#include "tools/tool.h"

#define US_TILE_PROFILE_GPU_OPTIONS                                                                          \
  US_OPT_GROUP("GPUs"), US_OPT_DEVICE("device", 0, "where to compute: cpu, cuda or cuda:N", .def = "cpu"),   \
      US_OPT_INT("gpus", 0, "N", "number of GPUs, from --device on", .def = "1", .min = 1, .max = 8),        \
      US_OPT_ENUM("engine", 0, "engine|graph",                                                               \
                  "one persistent kernel, or a CUDA graph of one kernel an operation", .def = "engine"),     \
      US_OPT_SYNTHETIC_SHAPE,                                                                                \
      US_OPT_FLAG("uniform", 0, "synthetic weights: draw experts uniformly instead of by the router"),       \
      US_OPT_INT("batch", 0, "N", "sequences that step together", .def = "1", .min = 1, .max = 8),           \
      US_OPT_INT("context", 0, "N", "positions before the first round", .def = "4096", .max = 1 << 20),      \
      US_OPT_INT("rounds", 0, "N", "rounds that are recorded", .def = "8", .min = 2, .max = 1000),           \
      US_OPT_INT("sms", 0, "N", "SMs of each GPU in the files; 0 is all", .def = "4", .max = 256),           \
      US_OPT_FLAG("critical-path", 0,                                                                        \
                  "print what a round waits for, from cause to cause, not means over SMs"),                  \
      US_OPT_INT("role-spans", 0, "N", "most intervals a role of an SM records", .def = "64K", .min = 2048,  \
                 .max = 1 << 22)

/* US_ERR_USAGE: options of the GPU without --device cuda; US_ERR_DEVICE: no GPU. */
US_CHECKED enum us_status us_tile_profile_check(struct us_opts *opts, struct us_err *err);
US_CHECKED enum us_status us_tile_profile_open(struct us_tool_run *run, const struct us_pair *pair,
                                               struct us_executor **ret_ex, struct us_err *err);
US_CHECKED enum us_status us_tile_profile_gpu(struct us_tool_run *run, struct us_executor *ex,
                                              struct us_trace *trace, struct us_err *err);

#endif
