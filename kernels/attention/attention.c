/* attention.c: which tiles a query row visits, the scores of a group of heads, and the sink. */
#include "kernels/attention/attention_impl.h"

#include "kernels/cpu/exp.h"
#include "kernels/linear/linear.h"

/* What one call keeps in scratch for the heads of one KV head. */
struct group {
  uint32_t g, first_head, heads;
  float *q;        /* (heads, packed Q) */
  float *scores;   /* (heads, 64) */
  float *out;      /* (heads, V) */
  float *max;      /* (heads) */
  float *sum;      /* (heads) */
  float *tile_out; /* (V) */
  us_attention_tile_fn *tile_fn;
};

size_t us_attention_scratch(const struct us_attention_keys *keys, uint32_t heads) {
  return (size_t)heads * (us_linear_packed_width(keys->Q) + US_KV_PAGE + keys->V + 2) + keys->V;
}

static us_attention_tile_fn *tile_fn_of(enum us_isa isa) {
#if defined(__x86_64__)
  enum us_isa resolved = us_isa_resolve(isa);
  if (resolved == US_ISA_AVX512) return us_attention_tile_avx512;
  if (resolved == US_ISA_AVX2) return us_attention_tile_avx2;
#endif
  return us_attention_tile_plain;
}

static void open_group(const struct us_attention_args *args, uint32_t g, uint32_t first, uint32_t heads,
                       float *scratch, struct group *group) {
  const struct us_attention_keys *keys = args->keys;
  size_t packed = us_linear_packed_width(keys->Q);
  *group = (struct group){
      .g = g, .first_head = first, .heads = heads, .q = scratch, .tile_fn = tile_fn_of(args->isa)};
  group->scores = group->q + heads * packed;
  group->out = group->scores + (size_t)heads * US_KV_PAGE;
  group->max = group->out + (size_t)heads * keys->V;
  group->sum = group->max + heads;
  group->tile_out = group->sum + heads;
  us_linear_pack(args->q + (size_t)first * keys->Q, heads, keys->Q, keys->Q, group->q, packed);
  for (uint32_t i = 0; i < heads; i++) {
    group->max[i] = -INFINITY;
    group->sum[i] = 0;
  }
  for (size_t i = 0; i < (size_t)heads * keys->V; i++) group->out[i] = 0;
}

/* Slots [begin, end) of one page for all heads of the group. */
static void visit_tile(const struct us_attention_args *args, struct group *group, const void *page,
                       uint32_t begin, uint32_t end) {
  const struct us_attention_keys *keys = args->keys;
  struct us_matrix k = {.format = keys->type == US_KV_F32 ? US_FORMAT_F32 : US_FORMAT_BF16,
                        .rows = US_KV_PAGE,
                        .cols = keys->Q,
                        .data = (const char *)page + us_attention_k_offset(keys, group->g, 0)};
  us_linear(&(struct us_linear_args){.w = &k,
                                     .x = group->q,
                                     .x_stride = us_linear_packed_width(keys->Q),
                                     .y = group->scores + begin,
                                     .y_stride = US_KV_PAGE,
                                     .R = group->heads,
                                     .begin = begin,
                                     .end = end,
                                     .isa = args->isa});
  for (uint32_t i = 0; i < group->heads; i++) {
    struct us_attention_state state = {
        .max = group->max[i], .sum = group->sum[i], .out = group->out + (size_t)i * keys->V};
    struct us_attention_tile tile = {.scores = group->scores + (size_t)i * US_KV_PAGE,
                                     .begin = begin,
                                     .end = end,
                                     .scale = args->scale,
                                     .values = (const char *)page + us_attention_v_offset(keys, group->g, 0),
                                     .type = keys->type,
                                     .V = keys->V};
    group->tile_fn(&tile, &state, group->tile_out);
    group->max[i] = state.max;
    group->sum[i] = state.sum;
  }
}

static void visit_cache(const struct us_attention_args *args, struct group *group, uint32_t first_key) {
  const struct us_attention_keys *keys = args->keys;
  for (uint32_t key = first_key; key < args->cached; key = (key / US_KV_PAGE + 1) * US_KV_PAGE) {
    uint32_t tile = key / US_KV_PAGE, left = args->cached - tile * US_KV_PAGE;
    visit_tile(args, group, keys->pages[tile % keys->page_count], key % US_KV_PAGE,
               left < US_KV_PAGE ? left : US_KV_PAGE);
  }
}

/* The sink joins the denominator, then one division a value. */
static void close_head(const struct us_attention_args *args, const struct group *group, uint32_t i) {
  uint32_t V = args->keys->V, head = group->first_head + i;
  const float *o = group->out + (size_t)i * V;
  float *out = args->out + (size_t)head * V, e = 1.0f, denominator = group->sum[i];
  if (args->sink) {
    float sink = args->sink[head], max = group->max[i] > sink ? group->max[i] : sink;
    e = us_expf(group->max[i] - max);
    denominator = fmaf(denominator, e, us_expf(sink - max));
  }
  for (uint32_t d = 0; d < V; d++) {
    float value = o[d] * e / denominator;
    out[d] = args->round_bf16 ? us_bf16_round(value) : value;
  }
}

void us_attention(const struct us_attention_args *args, float *scratch) {
  uint32_t per_group = args->H / args->keys->G;
  uint32_t first_key =
      args->window && args->position + 1 > args->window ? args->position + 1 - args->window : 0;
  for (uint32_t head = args->head_begin; head < args->head_end;) {
    uint32_t g = head / per_group, end = (g + 1) * per_group;
    if (end > args->head_end) end = args->head_end;
    struct group group;
    open_group(args, g, head, end - head, scratch, &group);
    visit_cache(args, &group, first_key);
    if (args->opt_block) {
      uint32_t begin = first_key > args->block_position ? first_key - args->block_position : 0;
      if (begin < args->block_rows) visit_tile(args, &group, args->opt_block, begin, args->block_rows);
    }
    for (uint32_t i = 0; i < group.heads; i++) close_head(args, &group, i);
    head = end;
  }
}
