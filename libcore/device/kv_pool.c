/* kv_pool.c: pages of the key/value caches on GPUs, and their tables. */
#include "device/kv_pool.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

/* Pages of one kind: those never used, which are zero, and those given back, which are not. */
struct kind {
  uint64_t fresh;     /* pages used so far */
  uint64_t *returned; /* (count) offsets, a stack */
  uint64_t returned_count;
};

/* The device tables of one cache: where they are on a rank is the same for all. */
struct tables {
  const struct us_kv *kv; /* NULL: free */
  uint64_t version;       /* of kv that is uploaded */
  uint64_t used;          /* when, in calls */
};

struct us_kv_pool {
  struct us_devices *devices;
  uint32_t layers;
  struct us_kv_memory memory;
  struct us_kv_pool_layout layout;
  struct kind kind[2];
  uint8_t *pages[US_ENGINE_MAX_RANKS];  /* device */
  uint8_t *tables[US_ENGINE_MAX_RANKS]; /* device: US_KV_POOL_TABLES of layout.table_bytes */
  struct tables slot[US_KV_POOL_TABLES];
  uint64_t calls;
  uint64_t *staging; /* host: one cache's tables */
};

/* ---- pages ------------------------------------------------------------------------------------------------------- */

static cudaStream_t stream_of(const struct us_kv_pool *pool, uint32_t rank) {
  uint32_t gpu = us_devices_gpu(pool->devices, rank);
  us_devices_use(pool->devices, gpu);
  return pool->devices->stream[gpu];
}

static enum us_status take(void *arg, uint32_t kind, uint64_t *ret_place, struct us_err *err) {
  struct us_kv_pool *pool = arg;
  struct kind *k = &pool->kind[kind];
  if (!k->returned_count && k->fresh == pool->layout.count[kind])
    return us_err_set(
        err, US_ERR_MEMORY,
        "all %llu pages of the key/value caches on the GPU are taken: fewer or shorter sequences fit",
        (unsigned long long)pool->layout.count[kind]);
  if (!k->returned_count) {
    *ret_place = pool->layout.first[kind] + k->fresh++ * pool->layout.page_bytes[kind];
    return US_OK;
  }
  *ret_place = k->returned[--k->returned_count];
  for (uint32_t rank = 0; rank < pool->devices->ranks; rank++) {
    cudaStream_t stream = stream_of(pool, rank);
    int code = (int)cudaMemsetAsync(pool->pages[rank] + *ret_place, 0, pool->layout.page_bytes[kind], stream);
    enum us_status status = us_cuda_status(code, "zeroing a page", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static enum us_status copy(void *arg, uint32_t kind, uint64_t to, uint64_t from, struct us_err *err) {
  struct us_kv_pool *pool = arg;
  for (uint32_t rank = 0; rank < pool->devices->ranks; rank++) {
    cudaStream_t stream = stream_of(pool, rank);
    uint8_t *pages = pool->pages[rank];
    int code = (int)cudaMemcpyAsync(pages + to, pages + from, pool->layout.page_bytes[kind],
                                    cudaMemcpyDeviceToDevice, stream);
    enum us_status status = us_cuda_status(code, "copying a page", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

static void give(void *arg, uint32_t kind, uint64_t place) {
  struct kind *k = &((struct us_kv_pool *)arg)->kind[kind];
  k->returned[k->returned_count++] = place;
}

static void forget(void *arg, const struct us_kv *kv) {
  struct us_kv_pool *pool = arg;
  for (uint32_t i = 0; i < US_KV_POOL_TABLES; i++)
    if (pool->slot[i].kv == kv) pool->slot[i] = (struct tables){0};
}

const struct us_kv_memory *us_kv_pool_memory(const struct us_kv_pool *pool) {
  return &pool->memory;
}

const uint8_t *us_kv_pool_pages(const struct us_kv_pool *pool, uint32_t rank) {
  return pool->pages[rank];
}

uint64_t us_kv_pool_left(const struct us_kv_pool *pool, uint32_t kind) {
  return pool->layout.count[kind] - pool->kind[kind].fresh + pool->kind[kind].returned_count;
}

/* ---- tables ------------------------------------------------------------------------------------------------------ */

/* The cache's slot, or the one that was not asked for longest. */
static struct tables *find_slot(struct us_kv_pool *pool, const struct us_kv *kv) {
  struct tables *oldest = &pool->slot[0];
  for (uint32_t i = 0; i < US_KV_POOL_TABLES; i++) {
    if (pool->slot[i].kv == kv) return &pool->slot[i];
    if (pool->slot[i].used < oldest->used) oldest = &pool->slot[i];
  }
  *oldest = (struct tables){.kv = kv};
  return oldest;
}

static uint8_t *table_at(const struct us_kv_pool *pool, uint32_t rank, const struct tables *slot) {
  return pool->tables[rank] + (uint64_t)(slot - pool->slot) * pool->layout.table_bytes;
}

/* Offsets of pages, the same on every rank; what is not reserved reads page 0. */
static void fill_offsets(const struct us_kv_pool *pool, const struct us_kv *kv, uint64_t *offsets) {
  for (uint32_t l = 0; l < pool->layers; l++) {
    uint32_t entries = pool->layout.entry[l + 1] - pool->layout.entry[l], held = us_kv_page_count(kv, l);
    for (uint32_t i = 0; i < entries; i++) {
      uint64_t place = i < held ? us_kv_place(kv, l, i) : US_KV_ABSENT;
      offsets[pool->layout.entry[l] + i] = place == US_KV_ABSENT ? 0 : place;
    }
  }
}

static enum us_status upload(struct us_kv_pool *pool, const struct tables *slot, struct us_err *err) {
  uint32_t layers = pool->layers;
  fill_offsets(pool, slot->kv, pool->staging + layers);
  for (uint32_t rank = 0; rank < pool->devices->ranks; rank++) {
    uint8_t *table = table_at(pool, rank, slot);
    for (uint32_t l = 0; l < layers; l++)
      pool->staging[l] =
          (uint64_t)(uintptr_t)(table + (layers + (uint64_t)pool->layout.entry[l]) * sizeof(uint64_t));
    cudaStream_t stream = stream_of(pool, rank);
    /* From pageable memory: the call returns when the staging buffer may be written again. */
    int code =
        (int)cudaMemcpyAsync(table, pool->staging, pool->layout.table_bytes, cudaMemcpyHostToDevice, stream);
    enum us_status status = us_cuda_status(code, "page tables", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

enum us_status us_kv_pool_tables(struct us_kv_pool *pool, const struct us_kv *kv,
                                 struct us_engine_kv ret_tables[US_ENGINE_MAX_RANKS], struct us_err *err) {
  if (us_kv_memory_of(kv) != &pool->memory)
    return us_err_set(err, US_ERR_USAGE, "the key/value cache is not of this GPU's pool");
  struct tables *slot = find_slot(pool, kv);
  slot->used = ++pool->calls;
  if (slot->version != us_kv_version(kv)) {
    enum us_status status = upload(pool, slot, err);
    if (status != US_OK) return status;
    slot->version = us_kv_version(kv);
  }
  for (uint32_t rank = 0; rank < pool->devices->ranks; rank++)
    ret_tables[rank].tables = (const uint64_t *const *)(const void *)table_at(pool, rank, slot);
  return US_OK;
}

/* ---- creation ---------------------------------------------------------------------------------------------------- */

static enum us_status allocate(struct us_kv_pool *pool, struct us_err *err) {
  for (uint32_t rank = 0; rank < pool->devices->ranks; rank++) {
    cudaStream_t stream = stream_of(pool, rank);
    void *pages = NULL, *tables = NULL;
    int code = (int)cudaMalloc(&pages, pool->layout.pages_bytes);
    pool->pages[rank] = pages;
    if (!code) code = (int)cudaMalloc(&tables, US_KV_POOL_TABLES * pool->layout.table_bytes);
    pool->tables[rank] = tables;
    if (!code) code = (int)cudaMemsetAsync(pages, 0, pool->layout.pages_bytes, stream);
    enum us_status status = us_cuda_status(code, "key/value caches", err);
    if (status != US_OK) return status;
  }
  return US_OK;
}

enum us_status us_kv_pool_create(struct us_devices *devices, const struct us_kv_spec *spec,
                                 const struct us_kv_pool_options *options, struct us_kv_pool **ret_pool,
                                 struct us_err *err) {
  *ret_pool = NULL;
  struct us_kv_pool_layout layout;
  enum us_status status = us_kv_pool_lay_out(spec, devices->ranks, options, &layout, err);
  if (status != US_OK) return status;
  struct us_kv_pool *pool = calloc(1, sizeof *pool);
  if (!pool) return us_err_memory(err, "key/value caches", sizeof *pool);
  pool->devices = devices;
  pool->layers = spec->layers;
  pool->layout = layout;
  pool->memory = (struct us_kv_memory){
      .take = take,
      .copy = copy,
      .give = give,
      .forget = forget,
      .arg = pool,
      .page_bytes = {layout.page_bytes[0] * devices->ranks, layout.page_bytes[1] * devices->ranks},
      .max_positions = options->positions};
  pool->staging = malloc(layout.table_bytes);
  pool->kind[0].returned = calloc(layout.count[0] + 1, sizeof(uint64_t));
  pool->kind[1].returned = calloc(layout.count[1] + 1, sizeof(uint64_t));
  bool failed = !pool->staging || !pool->kind[0].returned || !pool->kind[1].returned;
  status = failed ? us_err_memory(err, "key/value page lists", layout.table_bytes) : allocate(pool, err);
  if (status != US_OK) {
    us_kv_pool_free(pool);
    return status;
  }
  *ret_pool = pool;
  return US_OK;
}

void us_kv_pool_free(struct us_kv_pool *pool) {
  if (!pool) return;
  for (uint32_t rank = 0; rank < pool->devices->ranks; rank++) {
    us_devices_use(pool->devices, us_devices_gpu(pool->devices, rank));
    (void)cudaFree(pool->pages[rank]);
    (void)cudaFree(pool->tables[rank]);
  }
  free(pool->kind[0].returned);
  free(pool->kind[1].returned);
  free(pool->staging);
  free(pool);
}
