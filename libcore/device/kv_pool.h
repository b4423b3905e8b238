/* kv_pool.h: key/value pages on the GPUs of an engine, and the page tables that its operations read.
 *
 *     struct us_kv_pool_options options = {.positions = 32768, .pages = {n_full, n_windowed}};
 *     us_kv_pool_create(devices, &spec, &options, &pool, &err);
 *     us_kv_create_in(us_kv_pool_memory(pool), &spec, 4096, US_KV_BF16, &kv, &err);       // a sequence's cache
 *     us_kv_reserve(kv, position, rows, &err);                                            // pages of every rank
 *     us_kv_pool_tables(pool, kv, tables, &err);                   // tables[rank] for us_engine_sequence.kv or .draft_kv
 *     us_kv_free(kv);
 *     us_kv_pool_free(pool);                                                              // after its caches
 *
 * A page holds 64 positions of one layer for all KV heads of a rank; it has the same offset in every rank's pool. Its first use
 * finds zeros (keys are padded, and what is masked is still read). Work is ordered on the devices' streams: a page that is
 * given back may be taken and zeroed at once, since what read it was launched before. One pool serves the target's layers,
 * another the drafter's.
 */
#ifndef US_DEVICE_KV_POOL_H
#define US_DEVICE_KV_POOL_H

#include "device/device.h"
#include "model/kv.h"

struct us_kv_pool_options {
  uint32_t positions; /* of one cache, at most */
  uint64_t pages[2];  /* of layers of kind 0 and 1 */
};

struct us_kv_pool;

/* Pages of every kind that `caches` caches of `positions` positions take when they share nothing. */
void us_kv_pool_need(const struct us_kv_spec *spec, uint32_t positions, uint32_t caches, uint64_t pages[2]);

/* A rank's memory: pages of kind 0, then of kind 1, behind one that is zero for ever: absent entries of tables name it. Tables:
 * pointers (layers), then the offsets of every layer's pages. Needs no GPU. */
struct us_kv_pool_layout {
  uint64_t page_bytes[2], first[2], count[2]; /* first: byte offset of page 0 of a kind */
  uint64_t pages_bytes, table_bytes;          /* of all pages; of one cache's tables */
  uint32_t entry[US_MAX_LAYERS + 1];          /* first offset of each layer in a table, in entries */
};

/* US_ERR_USAGE: the KV heads cannot be cut into so many ranks. */
US_CHECKED enum us_status us_kv_pool_lay_out(const struct us_kv_spec *spec, uint32_t ranks,
                                             const struct us_kv_pool_options *options,
                                             struct us_kv_pool_layout *ret_layout, struct us_err *err);

/* Device tables that are kept: of the caches that were asked for last. */
#define US_KV_POOL_TABLES 24

/* Bytes of one rank. */
static inline uint64_t us_kv_pool_layout_bytes(const struct us_kv_pool_layout *layout) {
  return layout->pages_bytes + US_KV_POOL_TABLES * layout->table_bytes;
}

US_CHECKED enum us_status us_kv_pool_create(struct us_devices *devices, const struct us_kv_spec *spec,
                                            const struct us_kv_pool_options *options,
                                            struct us_kv_pool **ret_pool, struct us_err *err);
void us_kv_pool_free(struct us_kv_pool *pool); /* NULL is allowed */

/* For us_kv_create_in. `take` is US_ERR_MEMORY when no page of the kind is left. */
const struct us_kv_memory *us_kv_pool_memory(const struct us_kv_pool *pool);

/* Device tables of a cache on every rank, as its pages are now: uploads what changed, in the order of the streams. They stay
 * where they are while the cache lives and is asked for more often than US_KV_POOL_TABLES other caches of the pool. */
US_CHECKED enum us_status us_kv_pool_tables(struct us_kv_pool *pool, const struct us_kv *kv,
                                            struct us_engine_kv ret_tables[US_ENGINE_MAX_RANKS],
                                            struct us_err *err);

/* Where the pages of a rank begin (struct us_engine_rank kv_pool or draft_pool). */
const uint8_t *us_kv_pool_pages(const struct us_kv_pool *pool, uint32_t rank);

/* Pages of a kind that are free. */
uint64_t us_kv_pool_left(const struct us_kv_pool *pool, uint32_t kind);

#endif
