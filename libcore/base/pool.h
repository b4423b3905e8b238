/* pool.h: a persistent thread pool.
 *
 *     struct us_pool *pool;
 *     us_pool_create(0, &pool, &err);                      // 0: one thread a core
 *     us_pool_for(pool, rows, 64, add_rows, &args);        // add_rows(&args, begin, end, worker)
 *     us_pool_free(pool);
 *
 * The caller is worker 0. Calls do not nest, and one thread at a time may use a pool. What a body computes must not
 * depend on how the range was cut: every kernel here is written so, and tests compare one thread with many.
 */
#ifndef US_BASE_POOL_H
#define US_BASE_POOL_H

#include "base/err.h"
#include <stddef.h>

#define US_POOL_MAX_THREADS 256

struct us_pool;

/* Start threads - 1 workers (0: the number of usable cores). Sets *ret_pool; free with us_pool_free.
 * US_ERR_USAGE above US_POOL_MAX_THREADS, US_ERR_MEMORY or US_ERR_IO when a thread cannot be started. */
US_CHECKED enum us_status us_pool_create(int threads, struct us_pool **ret_pool, struct us_err *err);

/* Stop and join the workers; NULL is allowed. */
void us_pool_free(struct us_pool *pool);

/* Number of workers, the caller included. A NULL pool has one. */
int us_pool_threads(const struct us_pool *pool);

/* Run body(arg, worker, workers) once on every worker; returns when all have returned. A NULL pool runs it here. */
void us_pool_run(struct us_pool *pool, void (*body)(void *arg, int worker, int workers), void *arg);

/* Cut [0, n) into pieces of at least `grain` (at least 1) and run body on each; pieces are claimed dynamically.
 * Every piece begins at a multiple of grain; only the last may end elsewhere. */
void us_pool_for(struct us_pool *pool, size_t n, size_t grain,
                 void (*body)(void *arg, size_t begin, size_t end, int worker), void *arg);

#endif
