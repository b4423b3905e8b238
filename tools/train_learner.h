/* train_learner.h: --device and --gpus of the training tools: where to train, alone or with other processes.
 *
 *     US_OPT_TRAIN_WHERE,                                       // in the table
 *     us_tool_open_learner(run, pool, &learner, &err);          // says on which GPUs; other processes are waited for
 *     ... us_learner_leads(learner): this process logs and writes ...
 *     us_learner_free(learner);
 */
#ifndef US_TOOLS_TRAIN_LEARNER_H
#define US_TOOLS_TRAIN_LEARNER_H

#include "tools/tool.h"
#include "training/learner.h"

/* clang-format off */
#define US_OPT_TRAIN_DEVICE                                                                                     \
  US_OPT_DEVICE("device", 0, "where to compute: cpu, cuda or cuda:N", .def = "cpu")
#define US_OPT_TRAIN_WHERE                                                                                      \
  US_OPT_TRAIN_DEVICE,                                                                                         \
  US_OPT_INT("gpus", 0, "N", "GPUs of this process, from --device on", .def = "1", .min = 1, .max = 64)
/* clang-format on */

/* The learner of the options; a tool without --gpus uses one GPU and looks for no other processes. On a CPU each process
 * of a launcher trains by itself, with a warning. US_ERR_USAGE for --gpus without --device cuda. In the process that leads,
 * us_tool_check_outputs. */
US_CHECKED enum us_status us_tool_open_learner(struct us_tool_run *run, struct us_pool *pool,
                                               struct us_learner **ret_learner, struct us_err *err);

#endif
