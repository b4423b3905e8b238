/* attention.h: softmax attention of one query row over a paged key/value cache, any range of its heads.
 *
 *     struct us_attention_keys keys = us_kv_keys(kv, layer);      // pages, type, G, Q, V
 *     struct us_attention_args args = {.keys = &keys, .q = q, .H = 128, .position = p, .cached = p + 1,
 *                                      .window = 128, .sink = sink, .scale = 1 / sqrtf(192), .out = out,
 *                                      .head_begin = 0, .head_end = 128, .round_bf16 = true};
 *     us_attention(&args, scratch);
 *
 * The order of the sums, so that neither the number of rows nor of threads can matter: keys are taken in
 * tiles of 64 at fixed absolute positions (tile t holds positions 64t .. 64t + 63). A score is scale * dot(k, q)
 * with the canonical dot of linear.h. In a tile: m_t = largest score, weight_j = us_expf(score_j - m_t),
 * s_t = their sum in 16 lanes (lane j % 16) and the tree, o_t[d] = fmaf(weight_j, v_j[d], o_t[d]) in ascending j.
 * Tiles merge in ascending order: M = max(m, m_t), a = us_expf(m - M), b = us_expf(m_t - M),
 * s = fmaf(s_t, b, s * a), o = fmaf(o_t, b, o * a); the drafter's own block is one more tile after the cached
 * ones. Last, the sink joins the denominator: M = max(m, sink), e = us_expf(m - M),
 * out = o * e / fmaf(s, e, us_expf(sink - M)). Keys outside the window are never read.
 * (MiMo-V2: the sink is a logit a query head, not scaled, without a value.)
 */
#ifndef US_KERNELS_ATTENTION_ATTENTION_H
#define US_KERNELS_ATTENTION_ATTENTION_H

#include "kernels/cpu/isa.h"
#include <stddef.h>
#include <stdint.h>

#define US_KV_PAGE 64 /* positions a page, and the tile of the attention sums */

enum us_kv_type { US_KV_BF16, US_KV_F32 /* parity runs without rounding */ };

/* A layer's keys and values: position p lies in pages[(p / 64) % page_count] at slot p % 64. A page holds K
 * as (G, 64, Q), then V as (G, 64, V), contiguous, in `type`. */
struct us_attention_keys {
  void *const *pages;
  uint32_t page_count; /* all pages of a full layer; the ring's of a windowed layer */
  enum us_kv_type type;
  uint32_t G, Q, V;
};

struct us_attention_args {
  const struct us_attention_keys *keys; /* cached positions; the query's own too unless there is a block */
  const float *q;                       /* (H, Q) after rope, head h at q + h * Q */
  uint32_t H;                           /* query heads; head h reads KV head h / (H / G) */
  uint32_t position;                    /* of the query */
  uint32_t cached;   /* keys at positions < cached exist in the cache: position + 1 for causal attention */
  uint32_t window;   /* a key is visible if position - key < window; 0: all */
  const float *sink; /* (H) or NULL */
  float scale;       /* 1 / sqrt(Q) */
  /* Non-causal block of a drafter: keys at positions block_position + j, j < block_rows, all visible within
   * the window, stored like one page: K (G, 64, Q), then V (G, 64, V). NULL: none. */
  const void *opt_block;
  uint32_t block_position, block_rows;
  uint32_t head_begin, head_end; /* range of query heads */
  float *out;                    /* (H, V), head h at out + h * V */
  bool round_bf16;
  enum us_isa isa;
};

/* Bytes of a page. */
static inline size_t us_attention_page_bytes(const struct us_attention_keys *keys) {
  return (size_t)keys->G * US_KV_PAGE * (keys->Q + keys->V) * (keys->type == US_KV_F32 ? 4 : 2);
}

/* Byte offsets in a page of the K row and of the V row of KV head g, slot s. */
static inline size_t us_attention_k_offset(const struct us_attention_keys *keys, uint32_t g, uint32_t s) {
  return ((size_t)g * US_KV_PAGE + s) * keys->Q * (keys->type == US_KV_F32 ? 4 : 2);
}
static inline size_t us_attention_v_offset(const struct us_attention_keys *keys, uint32_t g, uint32_t s) {
  return ((size_t)keys->G * US_KV_PAGE * keys->Q + ((size_t)g * US_KV_PAGE + s) * keys->V) *
         (keys->type == US_KV_F32 ? 4 : 2);
}

/* Floats of scratch that one call needs, for a range of at most `heads` heads. */
size_t us_attention_scratch(const struct us_attention_keys *keys, uint32_t heads);

/* Attention of one row on heads [head_begin, head_end). No allocation, thread-safe with its own scratch. */
void us_attention(const struct us_attention_args *args, float *scratch);

#endif
