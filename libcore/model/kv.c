/* kv.c: the key/value cache of one sequence: a page table a layer, pages counted and copied on write.
 *
 * A windowed layer is the same page table used as a ring: position p lies in page (p / 64) % pages. The ring is a whole
 * number of pages, so a tile of 64 positions is contiguous in either kind of layer. Of a page in a us_kv_memory the table
 * holds a counted handle, whose data is the place.
 */
#include "model/kv.h"

#include "formats/bf16.h"
#include <stdlib.h>
#include <string.h>

#define PAGE_HEADER 64 /* keeps the rows on a cache line */

struct page {
  uint32_t refs;
};

struct layer_cache {
  uint32_t page_count;
  size_t page_bytes;
  void **pages; /* (page_count) data of each page (its place, in a memory), NULL before it is reserved */
};

struct us_kv {
  struct us_kv_spec spec;
  uint32_t max_positions;
  enum us_kv_type type;
  const struct us_kv_memory *memory; /* NULL: this process's */
  uint64_t version;
  struct layer_cache *layers;
};

struct us_kv_spec us_kv_spec_of(const struct us_shape *shape) {
  struct us_kv_spec spec = {.layers = shape->layers, .attention = {shape->full, shape->swa}};
  memcpy(spec.kind, shape->swa_layer, sizeof spec.kind);
  return spec;
}

struct us_kv_spec us_kv_spec_of_draft(const struct us_draft_shape *draft) {
  return (struct us_kv_spec){.layers = draft->layers, .attention = {draft->attention, draft->attention}};
}

static const struct us_attention_shape *attention_of(const struct us_kv *kv, uint32_t layer) {
  return &kv->spec.attention[kv->spec.kind[layer]];
}

/* ---- Pages ---- */

static struct page *header_of(void *data) {
  return (struct page *)(void *)((char *)data - PAGE_HEADER);
}

static void *new_page(size_t bytes) {
  size_t total = (PAGE_HEADER + bytes + 63) / 64 * 64;
  char *memory = aligned_alloc(64, total);
  if (!memory) return NULL;
  memset(memory, 0, total);
  ((struct page *)(void *)memory)->refs = 1;
  return memory + PAGE_HEADER;
}

static uint64_t place_of(const void *data) {
  uint64_t place;
  memcpy(&place, data, sizeof place);
  return place;
}

static void drop_page(const struct us_kv *kv, uint32_t kind, void *data) {
  if (!data || --header_of(data)->refs > 0) return;
  if (kv->memory) kv->memory->give(kv->memory->arg, kind, place_of(data));
  free(header_of(data));
}

/* The handle `page` names a new place with the content of `opt_old`'s, or of zeros. */
static enum us_status take_place(const struct us_kv *kv, uint32_t kind, const void *opt_old, void *page,
                                 struct us_err *err) {
  const struct us_kv_memory *memory = kv->memory;
  uint64_t place;
  enum us_status status = memory->take(memory->arg, kind, &place, err);
  if (status != US_OK) return status;
  memcpy(page, &place, sizeof place);
  if (!opt_old) return US_OK;
  status = memory->copy(memory->arg, kind, place, place_of(opt_old), err);
  if (status != US_OK) memory->give(memory->arg, kind, place);
  return status;
}

/* The page is there and nobody else's. */
static enum us_status own_page(struct us_kv *kv, uint32_t layer, uint32_t index, struct us_err *err) {
  void **slot = &kv->layers[layer].pages[index];
  if (*slot && header_of(*slot)->refs == 1) return US_OK;
  uint32_t kind = kv->spec.kind[layer];
  size_t bytes = kv->memory ? sizeof(uint64_t) : kv->layers[layer].page_bytes;
  void *page = new_page(bytes);
  if (!page) return us_err_memory(err, "a page of the key/value cache", bytes);
  if (kv->memory) {
    enum us_status status = take_place(kv, kind, *slot, page, err);
    if (status != US_OK) {
      free(header_of(page));
      return status;
    }
  } else if (*slot) {
    memcpy(page, *slot, bytes);
  }
  drop_page(kv, kind, *slot);
  *slot = page;
  kv->version++;
  return US_OK;
}

/* ---- The cache ---- */

uint32_t us_kv_pages_of(const struct us_attention_shape *a, uint32_t max_positions) {
  uint32_t all = (uint32_t)(((uint64_t)max_positions + US_KV_PAGE - 1) / US_KV_PAGE);
  if (!a->window) return all;
  uint64_t ring = ((uint64_t)a->window + US_MAX_BLOCK - 1 + US_KV_PAGE - 1) / US_KV_PAGE;
  return ring < all ? (uint32_t)ring : all;
}

/* A cache with empty page tables. */
enum us_status us_kv_create_in(const struct us_kv_memory *opt_memory, const struct us_kv_spec *spec,
                               uint32_t max_positions, enum us_kv_type type, struct us_kv **ret_kv,
                               struct us_err *err) {
  *ret_kv = NULL;
  if (!max_positions || spec->layers > US_MAX_LAYERS)
    return us_err_set(err, US_ERR_USAGE, "a key/value cache needs 1 position or more and at most %d layers",
                      US_MAX_LAYERS);
  if (opt_memory && opt_memory->max_positions && max_positions > opt_memory->max_positions)
    return us_err_set(err, US_ERR_USAGE, "a sequence of %u positions; the device's caches have room for %u",
                      max_positions, opt_memory->max_positions);
  struct us_kv *kv = calloc(1, sizeof *kv);
  if (!kv) return us_err_memory(err, "key/value cache", sizeof *kv);
  kv->spec = *spec;
  kv->max_positions = max_positions;
  kv->type = type;
  kv->memory = opt_memory;
  kv->version = 1;
  kv->layers = calloc(spec->layers ? spec->layers : 1, sizeof *kv->layers);
  bool failed = !kv->layers;
  for (uint32_t l = 0; !failed && l < spec->layers; l++) {
    const struct us_attention_shape *a = attention_of(kv, l);
    struct layer_cache *layer = &kv->layers[l];
    struct us_attention_keys keys = {.type = type, .G = a->kv_heads, .Q = a->qk_dim, .V = a->v_dim};
    layer->page_count = us_kv_pages_of(a, max_positions);
    layer->page_bytes = opt_memory ? opt_memory->page_bytes[spec->kind[l]] : us_attention_page_bytes(&keys);
    layer->pages = calloc(layer->page_count, sizeof *layer->pages);
    failed = !layer->pages;
  }
  if (failed) {
    us_kv_free(kv);
    return us_err_memory(err, "key/value page tables", (unsigned long long)spec->layers * max_positions / 8);
  }
  *ret_kv = kv;
  return US_OK;
}

enum us_status us_kv_create(const struct us_kv_spec *spec, uint32_t max_positions, enum us_kv_type type,
                            struct us_kv **ret_kv, struct us_err *err) {
  return us_kv_create_in(NULL, spec, max_positions, type, ret_kv, err);
}

enum us_status us_kv_fork(struct us_kv *parent, struct us_kv **ret_child, struct us_err *err) {
  enum us_status status =
      us_kv_create_in(parent->memory, &parent->spec, parent->max_positions, parent->type, ret_child, err);
  if (status != US_OK) return status;
  for (uint32_t l = 0; l < parent->spec.layers; l++) {
    for (uint32_t i = 0; i < parent->layers[l].page_count; i++) {
      void *page = parent->layers[l].pages[i];
      if (page) header_of(page)->refs++;
      (*ret_child)->layers[l].pages[i] = page;
    }
  }
  return US_OK;
}

void us_kv_free(struct us_kv *kv) {
  if (!kv) return;
  if (kv->memory && kv->memory->forget) kv->memory->forget(kv->memory->arg, kv);
  for (uint32_t l = 0; kv->layers && l < kv->spec.layers; l++) {
    if (!kv->layers[l].pages) continue;
    for (uint32_t i = 0; i < kv->layers[l].page_count; i++)
      drop_page(kv, kv->spec.kind[l], kv->layers[l].pages[i]);
    free(kv->layers[l].pages);
  }
  free(kv->layers);
  free(kv);
}

enum us_status us_kv_reserve(struct us_kv *kv, uint32_t position, uint32_t rows, struct us_err *err) {
  if (position > kv->max_positions || rows > kv->max_positions - position)
    return us_err_set(err, US_ERR_USAGE, "position %llu is past the %u that the key/value cache holds",
                      (unsigned long long)position + rows - 1, kv->max_positions);
  if (!rows) return US_OK;
  uint32_t first = position / US_KV_PAGE, last = (position + rows - 1) / US_KV_PAGE;
  for (uint32_t l = 0; l < kv->spec.layers; l++) {
    const struct layer_cache *layer = &kv->layers[l];
    uint32_t tiles = last - first + 1 < layer->page_count ? last - first + 1 : layer->page_count;
    for (uint32_t i = 0; i < tiles; i++) {
      enum us_status status = own_page(kv, l, (last - i) % layer->page_count, err);
      if (status != US_OK) return status;
    }
  }
  return US_OK;
}

/* ---- Rows ---- */

struct us_attention_keys us_kv_keys(const struct us_kv *kv, uint32_t layer) {
  const struct us_attention_shape *a = attention_of(kv, layer);
  return (struct us_attention_keys){.pages = kv->layers[layer].pages,
                                    .page_count = kv->layers[layer].page_count,
                                    .type = kv->type,
                                    .G = a->kv_heads,
                                    .Q = a->qk_dim,
                                    .V = a->v_dim};
}

static char *page_at(const struct us_kv *kv, uint32_t layer, uint32_t position) {
  const struct layer_cache *cache = &kv->layers[layer];
  return cache->pages[position / US_KV_PAGE % cache->page_count];
}

const void *us_kv_k(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g) {
  struct us_attention_keys keys = us_kv_keys(kv, layer);
  return page_at(kv, layer, position) + us_attention_k_offset(&keys, g, position % US_KV_PAGE);
}

const void *us_kv_v(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g) {
  struct us_attention_keys keys = us_kv_keys(kv, layer);
  return page_at(kv, layer, position) + us_attention_v_offset(&keys, g, position % US_KV_PAGE);
}

static void store(enum us_kv_type type, const float *values, size_t n, void *row) {
  if (type == US_KV_F32)
    memcpy(row, values, n * sizeof *values);
  else
    us_bf16_encode(values, n, row);
}

static void load(enum us_kv_type type, const void *row, size_t n, float *values) {
  if (type == US_KV_F32)
    memcpy(values, row, n * sizeof *values);
  else
    us_bf16_decode(row, n, values);
}

void us_kv_store(const struct us_attention_keys *keys, void *page, uint32_t slot, uint32_t g, const float *k,
                 const float *v) {
  store(keys->type, k, keys->Q, (char *)page + us_attention_k_offset(keys, g, slot));
  store(keys->type, v, keys->V, (char *)page + us_attention_v_offset(keys, g, slot));
}

void us_kv_write(struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g, const float *k,
                 const float *v) {
  struct us_attention_keys keys = us_kv_keys(kv, layer);
  us_kv_store(&keys, page_at(kv, layer, position), position % US_KV_PAGE, g, k, v);
}

void us_kv_read_k(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g, float *k) {
  load(kv->type, us_kv_k(kv, layer, position, g), attention_of(kv, layer)->qk_dim, k);
}

void us_kv_read_v(const struct us_kv *kv, uint32_t layer, uint32_t position, uint32_t g, float *v) {
  load(kv->type, us_kv_v(kv, layer, position, g), attention_of(kv, layer)->v_dim, v);
}

/* ---- Facts ---- */

const struct us_kv_memory *us_kv_memory_of(const struct us_kv *kv) {
  return kv->memory;
}

uint64_t us_kv_place(const struct us_kv *kv, uint32_t layer, uint32_t index) {
  const void *data = kv->layers[layer].pages[index];
  return data ? place_of(data) : US_KV_ABSENT;
}

uint64_t us_kv_version(const struct us_kv *kv) {
  return kv->version;
}

uint32_t us_kv_page_count(const struct us_kv *kv, uint32_t layer) {
  return kv->layers[layer].page_count;
}

const struct us_kv_spec *us_kv_spec_used(const struct us_kv *kv) {
  return &kv->spec;
}
uint32_t us_kv_max_positions(const struct us_kv *kv) {
  return kv->max_positions;
}
enum us_kv_type us_kv_type_of(const struct us_kv *kv) {
  return kv->type;
}

size_t us_kv_bytes(const struct us_kv *kv) {
  size_t bytes = 0;
  for (uint32_t l = 0; l < kv->spec.layers; l++)
    for (uint32_t i = 0; i < kv->layers[l].page_count; i++)
      if (kv->layers[l].pages[i]) bytes += kv->layers[l].page_bytes;
  return bytes;
}
