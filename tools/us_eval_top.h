/* us_eval_top.h: us-eval's records of what a model thinks of held-out tokens: writing one, measuring against one. */
#ifndef US_TOOLS_US_EVAL_TOP_H
#define US_TOOLS_US_EVAL_TOP_H

#include "tools/tool.h"
#include "training/likeliest.h"

/* --write-top: measure and write; the record of the file goes to stdout. */
US_CHECKED enum us_status us_eval_write_top(struct us_tool_run *run, const struct us_likeliest_job *job,
                                            struct us_pool *pool, const char *provenance, struct us_err *err);

/* --top: one row a model. */
US_CHECKED enum us_status us_eval_against_top(struct us_tool_run *run, struct us_model *model,
                                              struct us_learner *learner, struct us_pool *pool,
                                              struct us_err *err);

#endif
