/* tiles.h: the executor that runs tile programs on the CPU's thread pool.
 *
 *     struct us_executor *ex;
 *     us_executor_create_tiles(model, opt_draft, pool, US_ROUND_BF16, &ex, &err);
 *     us_executor_tiles_trace(ex, trace);        // optional: record every task from now on
 *     ex->ops->forward(ex, &pass, &err);
 *     ex->ops->free(ex);
 *
 * Programs are lowered and checked once for each number of rows and kept. The bits are those of the reference executor
 * for any number of threads.
 */
#ifndef US_PLAN_TILES_H
#define US_PLAN_TILES_H

#include "model/executor.h"
#include "plan/trace.h"

/* Borrows model, draft and pool. With an observer in a pass its tasks run in list order on the calling thread, so that
 * every operation can be seen, and the pass stopped, after its last tile. */
US_CHECKED enum us_status us_executor_create_tiles(const struct us_model *model,
                                                   const struct us_draft *opt_draft, struct us_pool *pool,
                                                   enum us_rounding rounding,
                                                   struct us_executor **ret_executor, struct us_err *err);

/* Append the tasks of later passes to `trace` (borrowed; NULL stops). The executor must be a tiles executor. */
void us_executor_tiles_trace(struct us_executor *executor, struct us_trace *trace);

#endif
