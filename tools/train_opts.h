/* train_opts.h: the options of a training run that the training tools share; each gives its own defaults.
 *
 *     US_OPT_TRAIN_OPTIMIZER("muon"),                       // --optimizer, --newton
 *     US_OPT_NUM("lr", ...),
 *     US_OPT_TRAIN_SCHEDULE("0.02", "0.05", "0.1"),        // --schedule, --warmup, --floor, --decay, --clip
 *     US_OPT_TRAIN_PROGRESS,                               // --state, --save-every, --resume, --log-every
 *     ...
 *     US_OPT_TRAIN_ACROSS,                                 // --across
 *     us_tool_read_trainer(run->opts, &trainer);           // the above, --lr, --steps and --minutes
 */
#ifndef US_TOOLS_TRAIN_OPTS_H
#define US_TOOLS_TRAIN_OPTS_H

#include "base/opt.h"
#include "training/trainer.h"

/* clang-format off */
#define US_OPT_TRAIN_OPTIMIZER(usual)                                                                           \
  US_OPT_ENUM("optimizer", 0, "muon|adamw", "rule for the matrices of the layers; AdamW does the rest",       \
              .def = usual),                                                                                   \
  US_OPT_ENUM("newton", 0, "schulz|polar", "Muon's iteration: Newton-Schulz or Polar Express", .def = "schulz")

#define US_OPT_TRAIN_SCHEDULE(warmup, last, decay)                                                              \
  US_OPT_ENUM("schedule", 0, "constant|cosine|linear|quadratic", "fall of the learning rate",                 \
              .def = "cosine"),                                                                               \
  US_OPT_NUM("warmup", 0, "SHARE", "share of the run that climbs to the peak", .def = warmup, .max = 1),      \
  US_OPT_NUM("floor", 0, "SHARE", "last learning rate as a share of the peak", .def = last, .max = 1),        \
  US_OPT_NUM("decay", 0, "X", "weight decay", .def = decay),                                                   \
  US_OPT_NUM("clip", 0, "X", "largest gradient norm; 0: none", .def = "1")

#define US_OPT_TRAIN_ACROSS                                                                                     \
  US_OPT_NUM("across", 0, "SHARE", "sequences of text in which attention goes on over the edges of documents",  \
             .def = "0", .max = 1)

#define US_OPT_TRAIN_PROGRESS                                                                                   \
  US_OPT_FILE("state", 0, "FILE", "keep the run in FILE.0 and FILE.1, to be resumed",                         \
              .writes = US_OPT_WRITES_FILE),                                                                  \
  US_OPT_INT("save-every", 0, "N", "steps between saves of the state", .def = "100"),                          \
  US_OPT_FLAG("resume", 0, "continue the run in --state, if there is one"),                                    \
  US_OPT_INT("log-every", 0, "N", "steps between log lines", .def = "10", .min = 1)
/* clang-format on */

/* Optimizer, schedule, lengths and state; options and resume stay the caller's.
 */
void us_tool_read_trainer(struct us_opts *opts, struct us_trainer *trainer);

#endif
