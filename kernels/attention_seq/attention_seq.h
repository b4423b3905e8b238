/* attention_seq.h: attention of many queries over key ranges, and its gradients.
 *
 *     struct us_attention_seq a = {.queries = R, .keys = R, .q_heads = H, ..., .context_begin = c0, .context_end = c1};
 *     us_attention_seq(&seq, &a);                           // out, and (max, sum) for the gradient
 *     us_attention_seq_grad(&seq, &a, &(struct us_attention_seq_grads){.dout = dout, .dq = dq, .dk = dk, .dv = dv});
 *
 * Query i sees the keys [context_begin[i], context_end[i]) and [block_begin[i], block_end[i]), two disjoint ranges of key
 * rows, either of them possibly empty. That covers the causal LM (context_end = i + 1, context_begin = start of the
 * document or of the window) and block drafting (context strictly before the anchor, the whole own block).
 *   out_h = sum_j p_j v_j,  p_j = exp(scale q_h.k_j - m) / (sum_j exp(scale q_h.k_j - m) + exp(sink_h - m))
 * with m the largest of all scores and the sink. A query that sees nothing gives 0. Probabilities are recomputed in the
 * gradient from (max, sum). Cost is fixed by tiles of US_ATTENTION_TILE queries times the union of their ranges, so
 * queries should be sorted by where they look.
 */
#ifndef US_KERNELS_ATTENTION_SEQ_H
#define US_KERNELS_ATTENTION_SEQ_H

#include "kernels/seq/seq.h"

#define US_ATTENTION_TILE 64

struct us_attention_seq {
  size_t queries, keys;
  uint32_t q_heads, kv_heads, qk_dim, v_dim; /* H, G, Q, V; query head h reads KV head h / (H / G) */
  const float *q, *k, *v;                    /* rows of q_stride, k_stride, v_stride floats */
  size_t q_stride, k_stride, v_stride;
  const uint32_t *q_offset, *k_offset, *v_offset; /* (H), (G), (G): where a head starts in a row */
  const uint32_t *context_begin, *context_end;    /* (queries) */
  const uint32_t *block_begin, *block_end;        /* (queries), or NULL: no block ranges */
  float scale;
  const float *sink; /* (H) or NULL */
  float *out;        /* (queries, H * V) written, rounded to bf16 where seq rounds */
  float *max, *sum;  /* (queries, H) written */
};

struct us_attention_seq_grads {
  const float *dout;   /* (queries, H * V) */
  float *dq, *dk, *dv; /* laid out as q, k, v: the heads' parts are written */
  float *dsink;        /* (H) added to; NULL if there is no sink or it is frozen */
};

void us_attention_seq(struct us_seq *seq, const struct us_attention_seq *a);
void us_attention_seq_grad(struct us_seq *seq, const struct us_attention_seq *a,
                           const struct us_attention_seq_grads *grads);

#endif
