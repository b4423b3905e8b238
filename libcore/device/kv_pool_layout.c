/* kv_pool_layout.c: sizes of a pool of key/value pages. */
#include "device/kv_pool.h"

static const struct us_attention_shape *attention_of(const struct us_kv_spec *spec, uint32_t layer) {
  return &spec->attention[spec->kind[layer]];
}

void us_kv_pool_need(const struct us_kv_spec *spec, uint32_t positions, uint32_t caches, uint64_t pages[2]) {
  pages[0] = pages[1] = 0;
  for (uint32_t l = 0; l < spec->layers; l++)
    pages[spec->kind[l]] += (uint64_t)us_kv_pages_of(attention_of(spec, l), positions) * caches;
}

enum us_status us_kv_pool_lay_out(const struct us_kv_spec *spec, uint32_t ranks,
                                  const struct us_kv_pool_options *options,
                                  struct us_kv_pool_layout *ret_layout, struct us_err *err) {
  struct us_kv_pool_layout *layout = ret_layout;
  *layout = (struct us_kv_pool_layout){.count = {options->pages[0], options->pages[1]}};
  for (uint32_t l = 0; l < spec->layers; l++) {
    const struct us_attention_shape *a = attention_of(spec, l);
    if (a->kv_heads % ranks)
      return us_err_set(err, US_ERR_USAGE, "the %u KV heads of layer %u cannot be shared by %u ranks",
                        a->kv_heads, l, ranks);
    layout->entry[l + 1] = layout->entry[l] + us_kv_pages_of(a, options->positions);
  }
  for (int kind = 0; kind < 2; kind++) {
    const struct us_attention_shape *a = &spec->attention[kind];
    layout->page_bytes[kind] = us_engine_page_bytes(a->kv_heads / ranks, a->qk_dim, a->v_dim);
  }
  const uint64_t *page = layout->page_bytes;
  layout->first[0] = page[0] > page[1] ? page[0] : page[1];
  layout->first[1] = layout->first[0] + layout->count[0] * page[0];
  layout->pages_bytes = layout->first[1] + layout->count[1] * page[1];
  layout->table_bytes = (spec->layers + (uint64_t)layout->entry[spec->layers]) * sizeof(uint64_t);
  return US_OK;
}
