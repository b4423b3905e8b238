/* kv.h: the key/value cache of one sequence.
 *
 *     struct us_kv_spec spec = us_kv_spec_of(&model->shape);
 *     us_kv_create(&spec, 4096, US_KV_BF16, &kv, &err);
 *     us_kv_write(kv, layer, position, g, k_row, v_row);    // k (Q), v (V), already rotated and scaled
 *     us_kv_fork(kv, &sample_kv, &err);                     // shares the full pages of the prompt
 *
 * Full layers keep pages of US_KV_PAGE positions, reference-counted and copied on write, so that samples of one prompt
 * share it. Windowed layers keep a ring of at least window + US_MAX_BLOCK - 1 slots, since a rejected draft must not
 * have overwritten what a later row still needs. A position may be written again: rejected drafts are simply replaced.
 *
 * Pages may lie elsewhere, on GPUs (us_kv_create_in): such a cache is made, forked, reserved and freed the same way, but its
 * rows cannot be read or written here; us_kv_place tells the device where they are.
 */
#ifndef US_MODEL_KV_H
#define US_MODEL_KV_H

#include "kernels/attention/attention.h" /* US_KV_PAGE, enum us_kv_type, the page layout */
#include "model/shape.h"

/* Cache geometry of up to US_MAX_LAYERS layers. */
struct us_kv_spec {
  uint32_t layers;
  struct us_attention_shape attention[2]; /* [0] and [1], chosen by kind */
  uint8_t kind[US_MAX_LAYERS];
};

struct us_kv;

/* Memory that this process does not address. A place names a page of a layer kind; only the memory knows what it means.
 * `take` gives a page of zeros, `copy` a copy of page `from` into page `to`; both may be ordered on a stream of the device. */
struct us_kv_memory {
  enum us_status (*take)(void *arg, uint32_t kind, uint64_t *ret_place, struct us_err *err);
  enum us_status (*copy)(void *arg, uint32_t kind, uint64_t to, uint64_t from, struct us_err *err);
  void (*give)(void *arg, uint32_t kind, uint64_t place);
  void (*forget)(void *arg, const struct us_kv *kv); /* the cache is being freed; may be NULL */
  void *arg;
  size_t page_bytes[2];   /* of a page of each kind, in all */
  uint32_t max_positions; /* of one cache; 0: any */
};

#define US_KV_ABSENT UINT64_MAX

struct us_kv_spec us_kv_spec_of(const struct us_shape *shape);
struct us_kv_spec us_kv_spec_of_draft(const struct us_draft_shape *draft);

US_CHECKED enum us_status us_kv_create(const struct us_kv_spec *spec, uint32_t max_positions,
                                       enum us_kv_type type, struct us_kv **ret_kv, struct us_err *err);

/* The same with pages in `opt_memory` (borrowed, outlives the cache and its forks); NULL: this process's. */
US_CHECKED enum us_status us_kv_create_in(const struct us_kv_memory *opt_memory,
                                          const struct us_kv_spec *spec, uint32_t max_positions,
                                          enum us_kv_type type, struct us_kv **ret_kv, struct us_err *err);

US_CHECKED enum us_status us_kv_fork(struct us_kv *parent, struct us_kv **ret_child, struct us_err *err);
void us_kv_free(struct us_kv *kv);

/* Make room for positions [position, position + rows) in every layer before a pass writes them (allocates or un-shares
 * pages; not thread-safe). US_ERR_USAGE past max_positions. */
US_CHECKED enum us_status us_kv_reserve(struct us_kv *kv, uint32_t position, uint32_t rows,
                                        struct us_err *err);

/* Store one head's key (Q) and value (V) rows, rounded to the cache's type. Thread-safe for distinct (layer, position, g). */
void us_kv_write(struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g, const float *k,
                 const float *v);

/* The same into slot `slot` of a page that is not in a cache: a drafter's temporary block. */
void us_kv_store(const struct us_attention_keys *keys, void *page, uint32_t slot, uint32_t g, const float *k,
                 const float *v);

/* The stored rows of one head as FP32. */
void us_kv_read_k(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g, float *k);
void us_kv_read_v(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g, float *v);

/* Pointers to the stored bf16 (uint16_t) or f32 rows of one position of one head, for kernels. */
const void *us_kv_k(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g);
const void *us_kv_v(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g);

/* The layer's page table, for us_attention; valid until the next us_kv_reserve. */
struct us_attention_keys us_kv_keys(const struct us_kv *kv, uint32_t layer);

/* Of a cache in a us_kv_memory: which one (NULL: this process's), the place of page `index` of a layer (US_KV_ABSENT before it
 * is reserved), and a number that grows whenever a place changes. us_kv_page_count is of either kind of cache. */
const struct us_kv_memory *us_kv_memory_of(const struct us_kv *kv);
uint64_t us_kv_place(const struct us_kv *kv, uint32_t layer, uint32_t index);
uint64_t us_kv_version(const struct us_kv *kv);
uint32_t us_kv_page_count(const struct us_kv *kv, uint32_t layer);

/* Pages of a layer's table in a cache of so many positions. */
uint32_t us_kv_pages_of(const struct us_attention_shape *attention, uint32_t max_positions);

const struct us_kv_spec *us_kv_spec_used(const struct us_kv *kv);
uint32_t us_kv_max_positions(const struct us_kv *kv);
enum us_kv_type us_kv_type_of(const struct us_kv *kv);

/* Bytes of the pages that this cache reads, shared ones included. */
size_t us_kv_bytes(const struct us_kv *kv);

#endif
