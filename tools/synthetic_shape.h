/* synthetic_shape.h: the shapes that random weights are made for, from a tool's options.
 *
 *     US_OPT_FILE("model", ...), US_OPT_FILE("draft", ...), US_OPT_INT("gpus", ...), US_OPT_SYNTHETIC_SHAPE,
 *     ...
 *     us_tool_synthetic_check(opts, &err);                 // those of the options that need --synthetic
 *     struct us_synthetic_shape s;
 *     us_tool_synthetic_shape(opts, &s, &err);             // --precision and --share done
 *     us_executor_create_synthetic(&s.shape, s.drafting ? &s.draft : NULL, seed, ...);
 */
#ifndef US_TOOLS_SYNTHETIC_SHAPE_H
#define US_TOOLS_SYNTHETIC_SHAPE_H

#include "base/opt.h"
#include "model/shape.h"

/* clang-format off */
#define US_OPT_SYNTHETIC_SHAPE                                                                                  \
  US_OPT_INT("synthetic", 0, "SEED",                                                                            \
             "random weights; --model and --draft name shapes instead of checkpoints"),                         \
  US_OPT_RULES("precision", 0, "RULES",                                                                         \
               "synthetic weights: module=format,... instead of the shape's; the last match wins"),             \
  US_OPT_INT("share", 0, "R",                                                                                   \
             "synthetic weights: what --gpus of R ranks hold and do, for R that are more than the GPUs at hand", \
             .min = 1, .max = 64)
/* clang-format on */

struct us_synthetic_shape {
  struct us_shape shape;
  struct us_draft_shape draft;
  bool drafting;
};

/* US_ERR_USAGE: --precision or --share without --synthetic, or a --share that is no multiple of --gpus. */
US_CHECKED enum us_status us_tool_synthetic_check(struct us_opts *opts, struct us_err *err);

/* Shapes of --model and --draft with --precision's formats, cut into --share / --gpus parts (model/shape_share.h), so
 * that each GPU holds what one of --share ranks does. Errors of reading them, US_ERR_INPUT if they cannot be cut. */
US_CHECKED enum us_status us_tool_synthetic_shape(struct us_opts *opts, struct us_synthetic_shape *ret_shape,
                                                  struct us_err *err);

/* Whether the weights fit into this machine's memory, for those that are made on the CPU. US_ERR_MEMORY says what they take. */
US_CHECKED enum us_status us_tool_synthetic_fits(const struct us_synthetic_shape *shape, struct us_err *err);

#endif
