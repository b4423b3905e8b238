/* bandwidth.h: the memory read bandwidth of this machine, measured now: what a figure is a fraction of.
 *
 *     double bytes_per_second;
 *     us_bandwidth_measure(pool, 512u << 20, &bytes_per_second, &err);
 */
#ifndef US_BASE_BANDWIDTH_H
#define US_BASE_BANDWIDTH_H

#include "base/err.h"
#include "base/pool.h"

#include <stddef.h>

/* Every worker of the pool sums its share of a buffer of `bytes` (several times the last-level cache, or the cache is
 * measured); the best of three passes counts. US_ERR_MEMORY. */
US_CHECKED enum us_status us_bandwidth_measure(struct us_pool *pool, size_t bytes,
                                               double *ret_bytes_per_second, struct us_err *err);

#endif
