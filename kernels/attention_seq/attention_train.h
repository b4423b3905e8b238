/* attention_train.h: attention over key ranges and its gradients on a GPU, bf16 operands, for training.
 *
 *     struct us_attention_train a = {.queries = R, .keys = R, .q_heads = H, ..., .plan = plan};
 *     us_attention_train_plan(&a, stream);                  // once for ranges, numbers of heads and rows: layers share it
 *     us_attention_train(&a, stream);                       // out, lse
 *     us_attention_train_grad(&a, &(struct us_attention_train_grads){.dout = dout, .dq = dq, .dk = dk, .dv = dv,
 *                             .dsink = dsink, .scratch = scratch}, stream);
 *
 * The same function as attention_seq.h: query i sees the keys [context_begin[i], context_end[i]) and
 * [block_begin[i], block_end[i]), two disjoint ranges of key rows, either possibly empty;
 *   out_h = sum_j p_j v_j,  p_j = exp(scale q_h.k_j - lse),  lse = log(sum_j exp(scale q_h.k_j) + exp(sink_h))
 * A query that sees nothing gives out 0 (and lse = sink_h, or 0 without sinks).
 *   delta = sum_d dout out, dp_j = dout.v_j, ds_j = p_j (dp_j - delta), dv_j = sum p_j dout, dk_j = scale sum ds_j q,
 *   dq = scale sum_j ds_j k_j, dsink_h -= sum exp(sink_h - lse) delta.
 * Rounded to bf16 are p and ds as operands of products, out, dq, dk and dv; scores, sums, lse and delta are FP32.
 *
 * Every sum has an order that shapes and ranges fix; nothing is atomic: the same bits in every run. Key tiles that no query of
 * a tile sees are skipped; queries that look at neighbouring keys should be neighbours (as they are in a packed
 * sequence, or in draft blocks sorted by anchor), but any ranges are right.
 *
 * Pointers are device memory, 16-byte aligned; strides and offsets multiples of 8 elements. No call allocates or waits for
 * the stream. Every call returns a cudaError_t: cudaErrorInvalidValue for what the comments below do not allow.
 */
#ifndef US_KERNELS_ATTENTION_TRAIN_H
#define US_KERNELS_ATTENTION_TRAIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *cudaStream_t; /* as the CUDA runtime declares it */

struct us_attention_train {
  uint32_t queries, keys;
  uint32_t q_heads, kv_heads; /* H, G, H a multiple of G: query head h reads KV head h / (H / G) */
  uint32_t qk_dim, v_dim; /* Q, V: multiples of 16, Q <= 192, V <= 128; fastest at 64/64, 128/128, 192/128 */
  const uint16_t *q, *k, *v; /* bf16: rows of q_stride, k_stride, v_stride elements */
  size_t q_stride, k_stride, v_stride;
  const uint32_t *q_offset, *k_offset, *v_offset; /* (H), (G), (G): where a head starts in a row */
  const uint32_t *context_begin, *context_end;    /* (queries): begin <= end <= keys */
  const uint32_t *block_begin, *block_end;        /* (queries), or NULL: no block ranges */
  uint32_t opt_window; /* the most keys that a query sees, 0: not known. A hint: only speed depends on it */
  float scale;         /* > 0 */
  const float *sink;   /* (H) or NULL */
  void *plan;    /* us_attention_train_plan_bytes(queries, keys, H, G), filled by us_attention_train_plan */
  uint16_t *out; /* bf16 (queries, H * V), written by us_attention_train, read by the gradient */
  float *lse;    /* (queries, H), likewise: natural logarithm of the denominator, the sink in it */
};

struct us_attention_train_grads {
  const uint16_t *dout;   /* bf16 (queries, H * V) */
  uint16_t *dq, *dk, *dv; /* bf16, strides and offsets of q, k, v: every element of the heads is written */
  float *dsink;           /* (H) added to; NULL if there is no sink or it is frozen */
  void *scratch;          /* us_attention_train_scratch(queries, H) */
};

/* Bytes of a plan: which tiles of keys a tile of queries sees and the reverse. Valid for every call with the same ranges,
 * queries, keys, q_heads and kv_heads. */
size_t us_attention_train_plan_bytes(uint32_t queries, uint32_t keys, uint32_t q_heads, uint32_t kv_heads);

/* Bytes of scratch of one gradient: 8 a query and head. */
size_t us_attention_train_scratch(uint32_t queries, uint32_t q_heads);

/* Fill a->plan from the ranges; reads nothing else but the numbers of queries, keys and heads. */
int us_attention_train_plan(const struct us_attention_train *a, cudaStream_t stream);

/* out and lse. */
int us_attention_train(const struct us_attention_train *a, cudaStream_t stream);

/* dq, dk, dv, dsink, from a->out and a->lse of the forward pass and its plan. */
int us_attention_train_grad(const struct us_attention_train *a, const struct us_attention_train_grads *grads,
                            cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
